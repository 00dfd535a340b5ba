"""``fcos-deploy predict``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.errors import ImageError

__all__ = ["command"]

_DRAWN = 0.3  # lowest score that is drawn by default: boxes of lower scores hide the others
_ROWS = 200  # of the table


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads", "allow_fallback", "allow_engine_code")
@cli.with_server_options
def command(
    model: cli.Model,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="Images, folders of images, videos.")],
    *,
    score_threshold: Annotated[
        float | None,
        cli.option(
            "Minimum score of a detection. Default: the model's.", min=0.0, max=1.0, metavar="SCORE", panel="Detection"
        ),
    ] = None,
    backend: cli.Backend = "",
    precision: cli.BundlePrecision = None,
    session: SessionOptions,
    cache: Annotated[
        Path | None,
        cli.option("Folder for compiled models. Default: ~/.cache/fcos-deploy.", metavar="DIR", panel=cli.RUNTIME),
    ] = None,
    draw: Annotated[
        Path | None, cli.option("Folder for annotated copies (.jpg, .mp4).", metavar="DIR", panel=cli.OUTPUT)
    ] = None,
    draw_threshold: Annotated[
        float | None,
        cli.option(
            "Minimum score of a box that is drawn. Default: --score-threshold, or else 0.3.",
            min=0.0,
            max=1.0,
            metavar="SCORE",
            panel=cli.OUTPUT,
        ),
    ] = None,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Predict the objects in images and videos; boxes are x1, y1, x2, y2 in image pixels.

    Images that cannot be read do not stop the others; the exit code is then 1.
    """
    from fcos_deploy.detector import Detector
    from fcos_deploy.detector.draw import DrawOptions
    from fcos_deploy.detector.prediction import TABLE_COLUMNS, predict, prediction_json, prediction_rows

    session = replace(session, cache_dir=cache, checkpoint=options)
    opened = Detector.open(
        model, backend=backend, precision=precision, options=session, score_threshold=score_threshold
    )
    drawn = next(t for t in (draw_threshold, score_threshold, _DRAWN) if t is not None)
    predictions, unread = [], None
    with opened as detector, progress_bar() as progress:
        try:
            drawing = DrawOptions(score_threshold=drawn)
            for prediction in predict(detector, images, draw=draw, options=drawing, progress=progress):
                predictions.append(prediction)
        except ImageError as error:
            unread = error
    for fallback in detector.fallbacks:
        note(f"fallback from {fallback.backend}: {fallback.reason}")
    rows = [row for prediction in predictions for row in prediction_rows(prediction, detector.names)]
    if as_json and (predictions or unread is None):
        print_json([prediction_json(prediction, detector) for prediction in predictions])
    elif rows and not as_json:
        table("Detections", TABLE_COLUMNS, rows[:_ROWS])
    if len(rows) > _ROWS and not as_json:
        note(f"and {len(rows) - _ROWS} more; --json prints all")
    videos = Counter((p.source, p.announced) for p in predictions if p.frame is not None)
    for (source, announced), frames in videos.items():
        note(f"'{source}': {frames} frames decoded of {announced or 'an unknown number'} announced")
    if draw is not None and predictions:
        note(f"annotated copies are in '{draw}' (scores of at least {drawn:g})")
    if unread is not None:
        raise unread
