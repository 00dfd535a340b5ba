"""``fcos-deploy soak``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions

__all__ = ["command"]


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "hint", "threads")
@cli.with_server_options
def command(
    model: cli.Model,
    *,
    images: Annotated[
        Path | None, cli.option("Folder of the images. Default: generated images.", metavar="DIR")
    ] = None,
    inferences: Annotated[int, cli.option("Number of inferences in all.", min=1)] = 20_000,
    concurrency: Annotated[int, cli.option("Number of threads that call the detector at a time.", min=1)] = 8,
    max_memory_growth: Annotated[
        float,
        cli.option(
            "Growth of the memory after the warm-up that passes, 0.02 for 2 %.",
            min=0.0,
            metavar="SHARE",
            panel=cli.GATE,
        ),
    ] = 0.02,
    backend: cli.Backend = "",
    precision: cli.BundlePrecision = None,
    session: SessionOptions,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Soak-test a model from many threads: every result must equal the single-threaded one, and nothing may leak.

    Exit code 1: a result differs, or memory or the number of open files grew.
    """
    from fcos_deploy.benchmark.soak import require_sound, soak, soak_images, soak_json
    from fcos_deploy.detector import Detector

    session = replace(session, checkpoint=options)
    opened = Detector.open(model, backend=backend, precision=precision, options=session)
    with opened as detector, progress_bar() as progress:
        frames = soak_images(images, orientation=detector.contract.preprocess.orientation)
        result = soak(detector, frames, inferences=inferences, threads=concurrency, progress=progress)
    if as_json:
        print_json({**detector.session.description, **soak_json(result)})
    note(str(result))
    require_sound(result, max_memory_growth=max_memory_growth)
