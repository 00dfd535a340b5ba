"""``fcos-deploy predict``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, note_placements, print_json, print_json_line, progress_bar, table
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.serialize import to_json

if TYPE_CHECKING:
    from fcos_deploy.detector import Detector
    from fcos_deploy.detector.prediction import Prediction
    from fcos_deploy.detector.sources import StreamOptions, StreamView

__all__ = ["predict_command"]

_SHOWN = 0.3  # lowest score that people are shown by default: boxes of lower scores hide the others
_ROWS = 200  # of the table


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads", "allow_fallback", "allow_engine_code")
@cli.with_server_options
def predict_command(
    model: cli.Model,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Images, folders of images and videos; or one stream: a URL such as rtsp://HOST/PATH, /dev/video0 or "
            "a camera's number, a GStreamer pipeline, or with --follow a folder.",
        ),
    ],
    *,
    score_threshold: Annotated[
        float | None,
        cli.DETECTION.option("Minimum score of a detection. Default: the model's.", min=0.0, max=1.0, metavar="SCORE"),
    ] = None,
    operating_point: Annotated[
        bool,
        cli.DETECTION.option(
            "Score threshold of each class as the bundle carries it: of best F1, or what --at-precision or --at-recall "
            "chose. Classes without one have no detections."
        ),
    ] = False,
    backend: cli.Backend = "",
    precision: cli.BundlePrecision = None,
    session: SessionOptions,
    cache: Annotated[
        Path | None, cli.RUNTIME.option("Folder for compiled models. Default: ~/.cache/fcos-deploy.", metavar="DIR")
    ] = None,
    draw: Annotated[
        str | None,
        cli.OUTPUT.option(
            "Folder for annotated copies (.jpg, .mp4); for a stream, the address at which a browser shows it, such as "
            "http://localhost:8090.",
            metavar="DIR",
        ),
    ] = None,
    draw_threshold: Annotated[
        float | None,
        cli.OUTPUT.option(
            "Minimum score of a box that is drawn. Default: --score-threshold, or else 0.3.",
            min=0.0,
            max=1.0,
            metavar="SCORE",
        ),
    ] = None,
    follow: Annotated[bool, cli.STREAM.option("Detections of images that arrive in a folder from now on.")] = False,
    max_frames: Annotated[
        int | None, cli.STREAM.option("Number of frames to detect on. Default: no limit.", min=1)
    ] = None,
    max_seconds: Annotated[
        float | None, cli.STREAM.option("Seconds after which to stop. Default: no limit.", metavar="SECONDS")
    ] = None,
    give_up: Annotated[
        float, cli.STREAM.option("Seconds without a frame after which to give up.", metavar="SECONDS")
    ] = 60.0,
    coco: Annotated[
        Path | None, cli.OUTPUT.option("COCO data set of the detections to write, with scores.", metavar="FILE")
    ] = None,
    as_csv: Annotated[
        Path | None, cli.OUTPUT.option("CSV of the detections to write.", "--csv", metavar="FILE")
    ] = None,
    yolo: Annotated[
        Path | None, cli.OUTPUT.option("Folder for YOLO labels, a .txt for each image.", metavar="DIR")
    ] = None,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Predict the objects in images, videos and streams; boxes are x1, y1, x2, y2 in image pixels.

    Images that cannot be read do not stop the others; the exit code is then 1. The table shows
    detections down to --score-threshold, by default 0.3; files and JSON have all that the model gives. For a stream,
    the newest frame is used, --json prints one line per frame, and latency and drop rate are printed at the end.
    """
    from fcos_deploy.detector import Detector
    from fcos_deploy.detector.draw import DrawOptions
    from fcos_deploy.detector.prediction import predict, write_coco, write_csv, write_yolo
    from fcos_deploy.detector.sources import StreamOptions, StreamView, is_stream

    streamed = follow or any(map(is_stream, images))
    written = ((coco, write_coco), (as_csv, write_csv), (yolo, write_yolo))
    kept = any(path is not None for path in (coco, as_csv, yolo))
    _require_fitting(streamed, several=len(images) > 1, kept=kept, ends=bool(max_frames or max_seconds), draw=draw)
    session = replace(session, cache_dir=cache, checkpoint=options)
    opened = Detector.open(
        model,
        backend=backend,
        precision=precision,
        options=session,
        score_threshold=score_threshold,
        operating_point=operating_point,
    )
    lowest = 0.0 if operating_point else _SHOWN
    shown = lowest if score_threshold is None else score_threshold
    with opened as detector:
        for fallback in detector.fallbacks:
            note(f"fallback from {fallback.backend}: {fallback.reason}")
        note_placements([detector.session.description])
        drawing = DrawOptions(score_threshold=shown if draw_threshold is None else draw_threshold)
        if streamed:
            limits = StreamOptions(max_frames=max_frames, max_seconds=max_seconds, give_up=give_up)
            view = StreamView(draw, names=detector.names, options=drawing) if draw else None
            with view or contextlib.nullcontext():
                _stream(detector, images[0], limits, view=view, as_json=as_json)
            return
        predictions: list[Prediction] = []
        unread = None
        with progress_bar() as progress:
            files, folder = list(map(Path, images)), Path(draw) if draw else None
            try:
                for prediction in predict(detector, files, draw=folder, options=drawing, progress=progress):
                    predictions.append(prediction)
            except ImageError as error:
                unread = error
        for path, write in written:
            if path is not None:
                write(path, predictions, detector.names)
                note(f"wrote {path}")
        if predictions or unread is None:
            _show(predictions, detector, lowest=shown, as_json=as_json)
        if draw is not None and predictions:
            note(f"annotated copies are in '{draw}' (scores of at least {drawing.score_threshold:g})")
    if unread is not None:
        raise unread


def _require_fitting(streamed: bool, *, several: bool, kept: bool, ends: bool, draw: str | None) -> None:
    """Refuse what a stream has and files have not, and the reverse.

    Raises:
        ConfigError: naming what does not fit.
    """
    from fcos_deploy.detector.sources import is_view_address

    if streamed and (several or kept):
        raise ConfigError(
            "A command reads a single stream, and writes no files of detections.",
            hint="leave the other sources, --coco, --csv and --yolo out",
        )
    if draw is not None and is_view_address(draw) != streamed:
        raise ConfigError(
            "A stream is shown in a browser, annotated copies of files are kept in a folder.",
            hint="of a stream --draw http://localhost:8090, of files --draw DIR",
        )
    if not streamed and ends:
        raise ConfigError("--max-frames and --max-seconds end a stream; these sources end by themselves.")


def _show(predictions: Sequence[Prediction], detector: Detector, *, lowest: float, as_json: bool) -> None:
    """All detections as JSON; for people a table of those with at least this score, and how many it leaves out."""
    from fcos_deploy.detector.prediction import TABLE_COLUMNS, prediction_json, prediction_rows

    rows = [row for prediction in predictions for row in prediction_rows(prediction, detector.names, score=lowest)]
    hidden = sum(len(p.detections) - len(p.detections.above(lowest)) for p in predictions)
    if as_json:
        print_json([prediction_json(prediction, detector) for prediction in predictions])
    elif rows:
        table("Detections", TABLE_COLUMNS, rows[:_ROWS])
    if len(rows) > _ROWS and not as_json:
        note(f"and {len(rows) - _ROWS} more; --json prints all")
    if hidden and not as_json:
        note(f"{hidden} more have scores below {lowest:g}; --score-threshold shows them")
    videos = Counter((p.source, p.announced) for p in predictions if p.frame is not None)
    for (source, announced), frames in videos.items():
        note(f"'{source}': {frames} frames decoded of {announced or 'an unknown number'} announced")


def _stream(
    detector: Detector, address: str, options: StreamOptions, *, view: StreamView | None, as_json: bool
) -> None:
    """Detections of one stream, frame by frame, and how fast they were.

    Raises:
        ImageError: no frame came any more, or some could not be read.
    """
    from fcos_deploy.detector.sources import shown_source

    source = shown_source(address)
    if view is not None:
        note(f"shown at {view.url}" + ("" if view.is_local else ", to everybody who can reach this machine"))
    with detector.stream(address, options=options) as stream:
        try:
            for item in stream:
                if view is not None:
                    view.show(item.pixels, item.detections)
                detections = item.detections.to_list(detector.names)
                if as_json:
                    document = {
                        "source": source,
                        **({"image": item.image} if item.image else {}),
                        "frame": item.frame,
                        "time": round(item.time, 6),
                        "latency_ms": round(item.latency * 1000, 2),
                        "dropped": item.dropped,
                        "width": item.pixels.shape[1],
                        "height": item.pixels.shape[0],
                    }
                    print_json_line({**document, "detections": detections})
                else:
                    names = Counter(detection["name"] for detection in detections)
                    shown = ", ".join(f"{count} {name}" for name, count in names.items()) or "nothing"
                    note(f"{item.image or item.frame}: {shown} ({item.latency * 1000:.0f} ms)")
        finally:
            figures = stream.statistics
            latencies = (figures.latency_p50, figures.latency_p90, figures.latency_p99)
            shown = "; latency p50 {}, p90 {}, p99 {} ms".format(*latencies) if figures.detected else ""
            note(
                f"{source}: {figures.detected} of {figures.frames} frames detected in {figures.seconds:.1f} s, "
                f"{figures.drop_rate:.1%} dropped, {figures.failed} unreadable, "
                f"{figures.reconnections} reconnections{shown}"
            )
            if as_json:
                print_json_line({"source": source, "statistics": to_json(figures)})
    if figures.failed:
        raise ImageError(
            f"{figures.failed} of {figures.frames} frames of '{source}' could not be read; the last: {figures.problem}",
            hint="the others were detected on",
        )
