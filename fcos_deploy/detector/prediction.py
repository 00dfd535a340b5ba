"""Runs a detector over images, folders and videos."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.libraries import require
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector.detector import Detector
from fcos_deploy.detector.draw import DrawOptions, draw_detections
from fcos_deploy.detector.sources import VIDEO_SUFFIXES, VideoWriter, frame_count, read_frames

__all__ = ["TABLE_COLUMNS", "Prediction", "predict", "prediction_json", "prediction_rows"]

TABLE_COLUMNS = ("image", "name", "score", "x1", "y1", "x2", "y2")

_AT_A_TIME = 16  # images in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Detections of one image, or of one frame of a video; sizes and boxes in image pixels."""

    source: Path
    width: int
    height: int
    detections: Detections
    frame: int | None = None


def predict(
    detector: Detector,
    sources: Sequence[Path],
    *,
    draw: Path | None = None,
    options: DrawOptions | None = None,
    progress: ProgressFn = no_progress,
) -> Iterator[Prediction]:
    """Detections of every image, of the images in every folder, and of every frame of every video, in order.

    ``draw``: a folder for annotated copies, images as .jpg and videos as .mp4; what lies in it is no source.

    Raises:
        ImageError: a source that is missing or empty, or, when all others are done, images that cannot be read.
        ConfigError: ``draw`` cannot be written.
    """
    images, videos = _sorted_out(sources, without=draw)
    targets = _Targets(draw, [*images, *videos], options or DrawOptions())
    unread: list[ImageError] = []
    yield from _predict_images(detector, images, targets=targets, unread=unread, progress=progress)
    for video in videos:
        yield from _predict_video(detector, video, targets=targets, progress=progress)
    if unread:
        more = f" And {len(unread) - 1} more." if len(unread) > 1 else ""
        raise ImageError(f"{unread[0].message}{more}", hint=unread[0].hint) from unread[0]


def prediction_json(prediction: Prediction, detector: Detector) -> dict[str, Any]:
    """``{"image", "width", "height", "backend", "precision", "detections": [...]}``, and ``"frame"`` for a video's.

    ``"fallbacks"``, as verification records it, where a bundle's own backend was passed over for this one.
    """
    document: dict[str, Any] = {
        "image": str(prediction.source),
        "width": prediction.width,
        "height": prediction.height,
        "backend": detector.session.description["backend"],
        "precision": str(detector.contract.precision),
        "detections": prediction.detections.to_list(detector.names),
    }
    if detector.fallbacks:
        document["fallbacks"] = to_json(detector.fallbacks)
    return document if prediction.frame is None else {**document, "frame": prediction.frame}


def prediction_rows(prediction: Prediction, names: tuple[str, ...]) -> list[list[str]]:
    """One row for each detection, in ``TABLE_COLUMNS``; one that says so where there is none."""
    place = prediction.source.name if prediction.frame is None else f"{prediction.source.name}#{prediction.frame}"
    rows = [
        [place, one["name"], f"{one['score']:.3f}", *(f"{edge:.1f}" for edge in one["box"])]
        for one in prediction.detections.to_list(names)
    ]
    return rows or [[place, "nothing", *[""] * 5]]


def _sorted_out(sources: Sequence[Path], *, without: Path | None) -> tuple[list[Path], list[Path]]:
    """Images, those in folders included, and videos; nothing below ``without``."""
    images: list[Path] = []
    videos: list[Path] = []
    for source in sources:
        if source.is_dir():
            found = list_images(source)
            images += [path for path in found if without is None or not _is_below(path, without)]
        elif source.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(source)
        else:
            images.append(source)
    return images, videos


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


class _Targets:
    """Where annotated copies go, the sources' paths below what they have in common, and how they are drawn."""

    def __init__(self, folder: Path | None, sources: Sequence[Path], options: DrawOptions) -> None:
        self.folder = folder
        self.options = options
        parents = [source.resolve().parent for source in sources]
        self._common = Path(os.path.commonpath(parents)) if parents else Path()

    def of(self, source: Path, suffix: str) -> Path | None:
        if self.folder is None:
            return None
        target = (self.folder / source.resolve().relative_to(self._common)).with_suffix(suffix)
        if target.resolve() == source.resolve():
            raise ConfigError(f"Drawing would overwrite '{source}'.", hint="give another folder")
        return target


def _predict_images(
    detector: Detector,
    paths: Sequence[Path],
    *,
    targets: _Targets,
    unread: list[ImageError],
    progress: ProgressFn,
) -> Iterator[Prediction]:
    """What cannot be read is put into ``unread``."""
    for start in range(0, len(paths), _AT_A_TIME):
        window = paths[start : start + _AT_A_TIME]
        pictures = []
        for path in window:
            try:
                pictures.append((path, read_image(path)))
            except ImageError as error:
                unread.append(error)
        results = detector.detect_batch([image for _, image in pictures])
        for (path, image), found in zip(pictures, results, strict=True):
            target = targets.of(path, ".jpg")
            if target is not None:
                _write_jpeg(draw_detections(image, found, detector.names, options=targets.options), target)
            yield Prediction(source=path, width=image.shape[1], height=image.shape[0], detections=found)
        progress("detect", start + len(window), len(paths))


def _predict_video(detector: Detector, path: Path, *, targets: _Targets, progress: ProgressFn) -> Iterator[Prediction]:
    target, total = targets.of(path, ".mp4"), frame_count(path)
    with VideoWriter(target, like=path) as writer:
        for index, image in enumerate(read_frames(path)):
            found = detector.detect(image)
            if target is not None:
                writer.write(draw_detections(image, found, detector.names, options=targets.options))
            yield Prediction(source=path, frame=index, width=image.shape[1], height=image.shape[0], detections=found)
            progress(path.name, index + 1, max(total, index + 1) if total else 0)


def _write_jpeg(image: NDArray[np.uint8], path: Path) -> None:
    cv2 = require("cv2")
    done, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    if not done:
        raise ImageError(f"Cannot encode '{path}' as JPEG.")
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.tobytes())
