"""``fcos-deploy soak``: many inferences from many threads, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, trusted_keys, with_checkpoint_options
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import PerformanceHint, Precision

__all__ = ["command"]


@with_checkpoint_options
def command(
    model: Annotated[Path, typer.Argument(help="Checkpoint, ONNX file, IR, engine or bundle.")],
    inferences: Annotated[int, typer.Option(min=1, help="How many, over all threads.")] = 20_000,
    threads: Annotated[int, typer.Option(min=1, help="Threads that call the detector.")] = 8,
    images: Annotated[Path | None, typer.Option(help="Folder of images; made-up ones when not given.")] = None,
    backend: Annotated[str, typer.Option(help="Runtime; the one meant for MODEL when not given.")] = "",
    precision: Annotated[Precision | None, typer.Option(help="Which artifact of a bundle.")] = None,
    device: Annotated[str, typer.Option(help="In the runtime's own words, such as GPU.0 or cuda:0.")] = "",
    hint: Annotated[PerformanceHint, typer.Option(help="What the runtime is tuned for.")] = PerformanceHint.LATENCY,
    runtime_threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime itself.")] = None,
    max_memory_growth: Annotated[float, typer.Option(min=0.0, help="As a share, after the warm-up.")] = 0.02,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    *,
    options: CheckpointOptions,
) -> None:
    """Exit 0 when every result equals the single-threaded one and neither memory nor open files grew, 1 when not."""
    from fcos_deploy.benchmark.soak import require_sound, soak, soak_images, soak_json
    from fcos_deploy.cli.output import note, print_json, progress_bar
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import Detector

    keys = trusted_keys(public_key, required=require_signature)
    session = SessionOptions(device=device, hint=hint, threads=runtime_threads, public_keys=keys, checkpoint=options)
    opened = Detector.open(model, backend=backend, precision=precision, options=session)
    with opened as detector, progress_bar() as progress:
        report = soak(detector, soak_images(images), inferences=inferences, threads=threads, progress=progress)
    if as_json:
        print_json({**detector.session.description, **soak_json(report)})
    note(str(report))
    require_sound(report, max_memory_growth=max_memory_growth)
