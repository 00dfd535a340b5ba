"""``fcos-deploy calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.serialize import to_json

__all__ = ["command"]


def command(
    model: Annotated[Path, typer.Argument(help="Float ONNX graph.")],
    *,
    images: Annotated[Path, typer.Option(help="Folder, list file or COCO json of calibration images.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The calibration.json to write.")],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO json of the images: the sample then covers classes and sizes.")
    ] = None,
    method: Annotated[str, typer.Option(help="minmax, percentile, entropy, mse or l3.")] = "",
    count: Annotated[int | None, typer.Option(min=1, help="Images to use (default: up to 128).")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    evaluation_images: Annotated[
        Path | None, typer.Option(help="Images that accuracy will be measured on: overlap is reported.")
    ] = None,
    engine: Annotated[str, typer.Option(help="onnxruntime, openvino, or auto: the faster one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.")] = None,
    convergence: Annotated[bool, typer.Option(help="Report how the ranges settle with more images.")] = False,
    tensorrt_cache: Annotated[
        str, typer.Option(help="Also write a calibration cache (.cache) for this TensorRT version, such as 8.5.2.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure the ranges of a graph's activations on images."""
    from calibration.calibrate import CalibrationRequest, calibrate

    request = CalibrationRequest(
        model=model,
        images=images,
        output=output,
        annotations=annotations,
        method=method,
        count=count,
        seed=seed,
        evaluation_images=evaluation_images,
        engine=engine,
        threads=threads,
        convergence=convergence,
        tensorrt_version=tensorrt_cache,
    )
    with progress_bar() as progress:
        report = calibrate(request, progress=progress)
    for line in report.lines():
        note(line)
    if as_json:
        print_json(to_json(report))
