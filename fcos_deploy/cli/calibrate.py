"""``fcos-deploy calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import RUNTIME, Graph, Json, Threads, output
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.serialize import to_json

__all__ = ["command"]


def command(
    model: Graph,
    *,
    images: Annotated[Path, typer.Option(metavar="PATH", help="Calibration images: a folder, list file or COCO JSON.")],
    output: Annotated[Path, output("Calibration file (.json) to write.")],
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="COCO annotations of the images, to choose images that cover all classes and object sizes. "
            "Default: images are chosen at random.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of images to choose. Default: up to 128.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed for choosing calibration images.")] = 0,
    evaluation_images: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Images that accuracy will be measured on; an overlap is reported."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Method that turns statistics into ranges: minmax, percentile, entropy, mse or l3. "
            "Default: percentile.",
            show_default=False,
        ),
    ] = "",
    convergence: Annotated[
        bool, typer.Option("--convergence", help="Report of how the ranges settle with more images.")
    ] = False,
    tensorrt_cache: Annotated[
        str,
        typer.Option(
            metavar="VERSION",
            help="TensorRT version, such as 8.5.2, to also write a calibration cache (.cache) for. Default: none.",
            show_default=False,
        ),
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Runtime that measures: onnxruntime, openvino, or auto for the faster one.",
            rich_help_panel=RUNTIME,
        ),
    ] = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Calibrate: measure the ranges of a graph's activations on images, for 'fcos-deploy quantize'."""
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
