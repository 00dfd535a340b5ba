"""``fcos-deploy calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.serialize import to_json

__all__ = ["command"]


def command(
    model: cli.Graph,
    *,
    images: Annotated[Path, cli.option("Calibration images: a folder, list file or COCO JSON.", metavar="PATH")],
    output: Annotated[Path, cli.output("Calibration file (.json) to write.")],
    annotations: Annotated[
        Path | None,
        cli.option(
            "COCO annotations of the images, to choose images that cover all classes and object sizes. "
            "Default: images are chosen at random.",
            metavar="FILE",
        ),
    ] = None,
    count: Annotated[int | None, cli.option("Number of images to choose. Default: up to 128.", min=1)] = None,
    seed: Annotated[int, cli.option("Random seed for choosing calibration images.")] = 0,
    evaluation_images: Annotated[
        Path | None, cli.option("Images that accuracy will be measured on; an overlap is refused.", metavar="PATH")
    ] = None,
    allow_overlap: cli.AllowOverlap = False,
    allow_outside: Annotated[
        bool, cli.option("Permission for a list file to name images that are not below its folder.", "--allow-outside")
    ] = False,
    method: Annotated[
        str,
        cli.option(
            "Method that turns statistics into ranges: minmax, percentile, entropy, mse or l3. Default: percentile.",
            metavar="NAME",
        ),
    ] = "",
    convergence: Annotated[
        bool, cli.option("Report of how the ranges settle with more images.", "--convergence")
    ] = False,
    tensorrt_cache: Annotated[
        str,
        cli.option(
            "TensorRT version, such as 8.5.2, to also write a calibration cache (.cache) for. Default: none.",
            metavar="VERSION",
        ),
    ] = "",
    engine: Annotated[
        str,
        cli.option(
            "Runtime that measures: onnxruntime, openvino, or auto for the first that is installed.",
            metavar="NAME",
            panel=cli.RUNTIME,
        ),
    ] = "auto",
    threads: cli.Threads = None,
    as_json: cli.Json = False,
) -> None:
    """Measure the ranges of a graph's activations on images, for 'fcos-deploy quantize'."""
    from calibration.calibrate import CalibrationRequest, calibrate

    request = CalibrationRequest(
        model=model,
        images=images,
        output=output,
        annotations=annotations,
        method=method,
        count=count,
        seed=seed,
        allow_outside=allow_outside,
        evaluation_images=evaluation_images,
        allow_overlap=allow_overlap,
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
