"""Runs a detector over images, folders and videos, whose frames are read and written here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.image import list_images, windows
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector.detector import Detector
from fcos_deploy.detector.draw import DrawOptions, draw_detections

__all__ = [
    "TABLE_COLUMNS",
    "VIDEO_SUFFIXES",
    "Prediction",
    "VideoWriter",
    "frame_count",
    "predict",
    "prediction_json",
    "prediction_rows",
    "read_frames",
]


cv2 = lazy_import("cv2")

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})

# Containers that store the number of frames; for the others OpenCV estimates it from the duration.
_COUNTED_SUFFIXES = frozenset({".avi", ".m4v", ".mov", ".mp4"})
_UNREADABLE = 2  # frames that a decoder may leave out at the ends of a sound file

_DEFAULT_RATE = 25.0  # frames a second, for files that do not say their rate


def frame_count(path: Path) -> int:
    """Frames as the file's header has them; 0 if it does not say.

    Raises:
        ImageError: the file is missing or not a video.
    """
    with _opened(path) as capture:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def read_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Frames (h, w, 3) uint8 RGB.

    Raises:
        ImageError: the file is missing, not a video, has no frame, or, after its last frame, ends early.
    """
    frames, expected = 0, frame_count(path) if path.suffix.lower() in _COUNTED_SUFFIXES else 0
    with _opened(path) as capture:
        while True:
            read, frame = capture.read()
            if not read:
                break
            frames += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    if not frames:
        raise ImageError(f"Video '{path}' has no frame that can be read.")
    if frames < expected - _UNREADABLE:
        raise ImageError(f"Video '{path}' is damaged: its header says {expected} frames, {frames} can be read.")


class VideoWriter:
    """Writes an .mp4 under its final name once it is complete; writes nothing where ``path`` is None.

    ``like`` is the video whose frame rate it takes.
    """

    def __init__(self, path: Path | None, *, like: Path) -> None:
        self._path = path
        self._like = like
        self._stack = contextlib.ExitStack()
        self._temporary: Path | None = None
        self._writer: Any = None

    def __enter__(self) -> VideoWriter:
        if self._path is not None:
            self._temporary = self._stack.enter_context(atomic_file(self._path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        self._stack.__exit__(kind, error, trace)

    def write(self, image: NDArray[np.uint8]) -> None:
        """Append a frame (h, w, 3) uint8 RGB; all have the size of the first.

        Raises:
            ConfigError: this OpenCV cannot write .mp4.
        """
        if self._writer is None:
            with _opened(self._like) as capture:
                rate = capture.get(cv2.CAP_PROP_FPS) or _DEFAULT_RATE
            code, size = cv2.VideoWriter_fourcc(*"mp4v"), (image.shape[1], image.shape[0])
            writer = cv2.VideoWriter(str(self._temporary), code, rate, size)
            if not writer.isOpened():
                raise ConfigError(
                    f"OpenCV cannot write '{self._path}'.", hint="use an OpenCV that was built with FFmpeg"
                )
            self._writer = writer
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    capture = cv2.VideoCapture(str(path)) if path.is_file() else None
    if capture is None or not capture.isOpened():
        raise ImageError(f"Cannot read video '{path}'.", hint="is it there, and a video that OpenCV knows?")
    try:
        yield capture
    finally:
        capture.release()


TABLE_COLUMNS = ("image", "name", "score", "x1", "y1", "x2", "y2")


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
    images, videos = _split_sources(sources, without=draw)
    copies = _Copies(draw, [*images, *videos], options or DrawOptions(), detector.names)
    unread: list[ImageError] = []
    yield from _predict_images(detector, images, copies=copies, unread=unread, progress=progress)
    for video in videos:
        copy, total = copies.path(video, ".mp4"), frame_count(video)
        with VideoWriter(copy, like=video) as writer:
            for index, frame in enumerate(read_frames(video)):
                detections = detector.detect(frame)
                if copy is not None:
                    writer.write(copies.draw(frame, detections))
                yield Prediction(
                    source=video, frame=index, width=frame.shape[1], height=frame.shape[0], detections=detections
                )
                progress(video.name, index + 1, max(total, index + 1) if total else 0)
    if unread:
        more = f" And {len(unread) - 1} more." if len(unread) > 1 else ""
        raise ImageError(f"{unread[0].message}{more}", hint=unread[0].hint) from unread[0]


def _split_sources(sources: Sequence[Path], *, without: Path | None) -> tuple[list[Path], list[Path]]:
    """Images, those in folders included, and videos; nothing below ``without``."""
    images: list[Path] = []
    videos: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = list_images(source)
            images += [p for p in inside if without is None or not p.resolve().is_relative_to(without.resolve())]
        elif source.suffix.lower() in VIDEO_SUFFIXES:
            videos.append(source)
        else:
            images.append(source)
    return images, videos


class _Copies:
    """Annotated copies: drawn in one way, under the sources' paths below the folder that they have in common."""

    def __init__(
        self, folder: Path | None, sources: Sequence[Path], options: DrawOptions, names: tuple[str, ...]
    ) -> None:
        self._folder, self._options, self._names = folder, options, names
        parents = [source.resolve().parent for source in sources]
        self._common = Path(os.path.commonpath(parents)) if parents else Path()

    def path(self, source: Path, suffix: str) -> Path | None:
        """Where the copy of ``source`` goes; None where none is asked for."""
        if self._folder is None:
            return None
        path = (self._folder / source.resolve().relative_to(self._common)).with_suffix(suffix)
        if path.resolve() == source.resolve():
            raise ConfigError(f"Drawing would overwrite '{source}'.", hint="give another folder")
        return path

    def draw(self, image: NDArray[np.uint8], detections: Detections) -> NDArray[np.uint8]:
        return draw_detections(image, detections, self._names, options=self._options)


def _predict_images(
    detector: Detector,
    paths: Sequence[Path],
    *,
    copies: _Copies,
    unread: list[ImageError],
    progress: ProgressFn,
) -> Iterator[Prediction]:
    """In batches; the errors of images that cannot be read are put into ``unread``."""

    def readable() -> Iterator[tuple[Path, NDArray[np.uint8]]]:
        for path in paths:
            try:
                yield path, detector.read(path)
            except ImageError as error:
                unread.append(error)

    done = 0
    for images in windows(readable()):
        results = detector.detect_batch([image for _, image in images])
        for (path, image), detections in zip(images, results, strict=True):
            copy = copies.path(path, ".jpg")
            if copy is not None:
                drawn = cv2.cvtColor(copies.draw(image, detections), cv2.COLOR_RGB2BGR)
                encoded, content = cv2.imencode(".jpg", drawn)
                if not encoded:
                    raise ImageError(f"Cannot encode '{copy}' as JPEG.")
                with atomic_file(copy) as temporary:
                    temporary.write_bytes(content.tobytes())
            yield Prediction(source=path, width=image.shape[1], height=image.shape[0], detections=detections)
        done += len(images)
        progress("detect", done + len(unread), len(paths))


def prediction_json(prediction: Prediction, detector: Detector) -> dict[str, Any]:
    """``{"image", "width", "height", "backend", "precision", "detections": [...]}``, and ``"frame"`` for a video's.

    ``"artifact"``, the file of a bundle that ran, and ``"fallbacks"``, as verification records it, where a bundle's own
    backend was passed over for this one.
    """
    document: dict[str, Any] = {
        "image": str(prediction.source),
        "width": prediction.width,
        "height": prediction.height,
        "backend": detector.session.description["backend"],
        "precision": str(detector.contract.precision),
        "detections": prediction.detections.to_list(detector.names),
    }
    if "artifact" in detector.session.description:
        document["artifact"] = detector.session.description["artifact"]
    if detector.fallbacks:
        document["fallbacks"] = to_json(detector.fallbacks)
    return document if prediction.frame is None else {**document, "frame": prediction.frame}


def prediction_rows(prediction: Prediction, names: tuple[str, ...]) -> list[list[str]]:
    """One row for each detection, in ``TABLE_COLUMNS``; one that says so where there is none."""
    place = prediction.source.name if prediction.frame is None else f"{prediction.source.name}#{prediction.frame}"
    rows = [
        [place, item["name"], f"{item['score']:.3f}", *(f"{edge:.1f}" for edge in item["box"])]
        for item in prediction.detections.to_list(names)
    ]
    return rows or [[place, "nothing", *[""] * 5]]
