"""``fcos-deploy predict``: the detections of images, folders and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import AllowFallback, PublicKeys, RequireSignature, trusted_keys, with_checkpoint_options
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision
from fcos_deploy.core.errors import ImageError

__all__ = ["command"]

_DRAWN = 0.3  # least score that is drawn: what scores less hides what matters
_SHOWN = 200  # rows of the table


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
    draw_threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Least score that is drawn: --score-threshold, or else 0.3."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    *,
    options: CheckpointOptions,
) -> None:
    """Detect objects; boxes are x1, y1, x2, y2 in pixels of the image.

    Images that cannot be read do not stop the others; the exit code is then 1.
    """
    from fcos_deploy.cli.output import note, print_json, progress_bar, table
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import Detector
    from fcos_deploy.detector.draw import DrawOptions
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
    least = next(t for t in (draw_threshold, score_threshold, _DRAWN) if t is not None)
    found, unread = [], None
    with opened as detector, progress_bar() as progress:
        try:
            drawing = DrawOptions(score_threshold=least)
            for one in predict(detector, images, draw=draw, options=drawing, progress=progress):
                found.append(one)
        except ImageError as error:
            unread = error
    for fallback in detector.fallbacks:
        note(f"fallback from {fallback.backend}: {fallback.reason}")
    rows = [row for one in found for row in prediction_rows(one, detector.names)]
    if as_json and (found or unread is None):
        print_json([prediction_json(one, detector) for one in found])
    elif rows and not as_json:
        table("Detections", TABLE_COLUMNS, rows[:_SHOWN])
    if len(rows) > _SHOWN and not as_json:
        note(f"and {len(rows) - _SHOWN} more; --json prints all")
    if draw is not None and found:
        note(f"annotated copies are in '{draw}' (scores of at least {least:g})")
    if unread is not None:
        raise unread
