"""``fcos-deploy predict``: the detections of images, folders and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import with_checkpoint_options
from fcos_deploy.cli.trust import AllowFallback, PublicKeys, RequireSignature, trusted_keys
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision

__all__ = ["command"]


@with_checkpoint_options
def command(
    model: Annotated[Path, typer.Argument(help="Checkpoint, ONNX file, IR, engine or bundle.")],
    images: Annotated[list[Path], typer.Argument(help="Images, folders of images, videos.")],
    backend: Annotated[str, typer.Option(help="Runtime; the one meant for MODEL when not given.")] = "",
    precision: Annotated[Precision | None, typer.Option(help="Which artifact of a bundle.")] = None,
    device: Annotated[str, typer.Option(help="In the runtime's own words, such as GPU.0 or cuda:0.")] = "",
    compute: Annotated[ComputeType, typer.Option(help="What the runtime computes float in.")] = ComputeType.F32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for compiled models.")] = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Least score; the model's own when not given.")
    ] = None,
    allow_fallback: AllowFallback = False,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    draw: Annotated[Path | None, typer.Option(help="Folder for annotated copies (.jpg, .mp4).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    *,
    options: CheckpointOptions,
) -> None:
    """Detect objects; boxes are x1, y1, x2, y2 in pixels of the image."""
    from fcos_deploy.cli.output import note, print_json, progress_bar, table
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import Detector
    from fcos_deploy.detector.prediction import TABLE_COLUMNS, predict, prediction_json, prediction_rows

    session = SessionOptions(
        device=device,
        compute=compute,
        threads=threads,
        cache_dir=cache,
        checkpoint=options,
        public_keys=trusted_keys(public_key, required=require_signature),
        allow_fallback=allow_fallback,
    )
    opened = Detector.open(
        model, backend=backend, precision=precision, options=session, score_threshold=score_threshold
    )
    with opened as detector, progress_bar() as progress:
        stepped_down = detector.session.description.get("stepped_down")
        found = list(predict(detector, images, draw=draw, progress=progress))
    if stepped_down:
        note(f"stepped down from {stepped_down}")
    if as_json:
        print_json([prediction_json(one, detector.names) for one in found])
    else:
        table("Detections", TABLE_COLUMNS, [row for one in found for row in prediction_rows(one, detector.names)])
    if draw is not None:
        note(f"annotated copies are in '{draw}'")
