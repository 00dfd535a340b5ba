"""``fcos-deploy soak``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import (
    GATE,
    RUNTIME,
    Backend,
    BundlePrecision,
    Device,
    Json,
    Model,
    PublicKeys,
    RequireSignature,
    Threads,
    trusted_keys,
    with_common_checkpoint_options,
)
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import PerformanceHint

__all__ = ["command"]


@with_common_checkpoint_options
def command(
    model: Model,
    *,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the images. Default: generated images.")
    ] = None,
    inferences: Annotated[int, typer.Option(min=1, metavar="N", help="Number of inferences in all.")] = 20_000,
    concurrency: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of threads that call the detector at a time.")
    ] = 8,
    max_memory_growth: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SHARE",
            help="Growth of the memory after the warm-up that passes, 0.02 for 2 %.",
            rich_help_panel=GATE,
        ),
    ] = 0.02,
    backend: Backend = "",
    precision: BundlePrecision = None,
    device: Device = "",
    hint: Annotated[
        PerformanceHint, typer.Option(help="Goal the runtime is tuned for.", rich_help_panel=RUNTIME)
    ] = PerformanceHint.LATENCY,
    threads: Threads = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    as_json: Json = False,
    options: CheckpointOptions,
) -> None:
    """Soak-test a model from many threads: every result must equal the single-threaded one, and nothing may leak.

    Exit code 1: a result differs, or memory or the number of open files grew.
    """
    from fcos_deploy.benchmark.soak import require_sound, soak, soak_images, soak_json
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import Detector

    keys = trusted_keys(public_key, required=require_signature)
    session = SessionOptions(device=device, hint=hint, threads=threads, public_keys=keys, checkpoint=options)
    opened = Detector.open(model, backend=backend, precision=precision, options=session)
    with opened as detector, progress_bar() as progress:
        result = soak(detector, soak_images(images), inferences=inferences, threads=concurrency, progress=progress)
    if as_json:
        print_json({**detector.session.description, **soak_json(result)})
    note(str(result))
    require_sound(result, max_memory_growth=max_memory_growth)
