"""Runs a detector over images, folders and videos, and writes what other tools read: COCO, CSV, YOLO labels, copies."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections, label_name
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.files import atomic_file, write_text
from fcos_deploy.core.image import (
    VIDEO_SUFFIXES,
    describe_content,
    file_head,
    image_format,
    is_video,
    list_images,
    windows,
)
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector.detector import Detector
from fcos_deploy.detector.draw import DrawOptions, draw_detections

__all__ = [
    "TABLE_COLUMNS",
    "Prediction",
    "frame_count",
    "is_video_file",
    "predict",
    "prediction_json",
    "prediction_rows",
    "read_frames",
    "write_coco",
    "write_csv",
    "write_video",
    "write_yolo",
]


cv2 = lazy_import("cv2")

# Containers that store the number of frames; for the others OpenCV computes it from the duration that they state.
_COUNTED = re.compile(rb"RIFF|....(?:ftyp|moov|mdat|wide|free|skip)", re.DOTALL)
_UNREADABLE = 2  # frames that a decoder may leave out at the ends of a sound file
_SHARE = 0.9  # of the stated duration that the frames of a sound file last at least, less half a second

_DEFAULT_RATE = 25.0  # frames a second, for files that do not say their rate


def is_video_file(path: Path) -> bool:
    """Whether a file is a video by its content; where that is unknown, by its suffix."""
    head = file_head(path)
    if is_video(head):
        return True
    return not image_format(head) and not describe_content(head) and path.suffix.lower() in VIDEO_SUFFIXES


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
    frames, seconds = 0, 0.0
    with _opened(path) as capture:
        announced = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        rate = capture.get(cv2.CAP_PROP_FPS)
        while True:
            read, frame = capture.read()
            if not read:
                break
            frames += 1
            seconds = max(seconds, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    if not frames:
        raise ImageError(f"Video '{path}' has no frame that can be read.")
    if _COUNTED.match(file_head(path)):
        if frames < announced - _UNREADABLE:
            raise ImageError(
                f"Video '{path}' is damaged: {frames} of the {announced} frames of its header can be read."
            )
    elif rate > 0 and seconds + 1 / rate < _SHARE * announced / rate - 0.5:
        raise ImageError(
            f"Video '{path}' is damaged: {seconds:.1f} of the {announced / rate:.1f} seconds of its header can be read."
        )


@contextlib.contextmanager
def write_video(path: Path, *, like: Path) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Write an .mp4 under its final name once it is complete, with the frame rate of the video ``like``.

    Yields what appends a frame (h, w, 3) uint8 RGB; one of another size than the first is scaled to it.

    Raises:
        ConfigError: this OpenCV cannot write .mp4.
    """
    with _opened(like) as capture:
        rate = capture.get(cv2.CAP_PROP_FPS) or _DEFAULT_RATE
    writer, size = cv2.VideoWriter(), (0, 0)

    with atomic_file(path) as temporary:

        def write(image: NDArray[np.uint8]) -> None:
            nonlocal size
            if not writer.isOpened():
                size = image.shape[1], image.shape[0]
                if not writer.open(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, size):
                    raise ConfigError(f"OpenCV cannot write '{path}'.", hint="use an OpenCV that was built with FFmpeg")
            if size != (image.shape[1], image.shape[0]):  # OpenCV would leave it out.
                image = cv2.resize(image, size)
            writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            writer.release()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    capture = cv2.VideoCapture(str(path)) if path.is_file() else None
    if capture is None or not capture.isOpened():
        raise ImageError(f"Cannot read video '{path}'.", hint="is it there, whole, and a video that OpenCV knows?")
    try:
        yield capture
    finally:
        capture.release()


_LISTED = 5  # sources that an error names

TABLE_COLUMNS = ("image", "name", "score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Detections of one image, or of one frame of a video; sizes and boxes in image pixels.

    ``announced``: how many frames the video's header says it has; 0 if it does not.
    """

    source: Path
    width: int
    height: int
    detections: Detections
    frame: int | None = None
    announced: int = 0


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
        ImageError: a folder that is missing or empty, or, when all others are done, images and videos that cannot be
            read to their end.
        ConfigError: ``draw`` cannot be written.
    """
    images, videos = _split_sources(sources, without=draw)
    copies = _Copies(draw, images=images, videos=videos, options=options or DrawOptions(), names=detector.names)
    unread: list[ImageError] = []
    yield from _predict_images(detector, images, copies=copies, unread=unread, progress=progress)
    for video in videos:
        yield from _predict_video(detector, video, copies=copies, unread=unread, progress=progress)
    if unread:
        more = [f"And {len(unread) - _LISTED} more."] if len(unread) > _LISTED else []
        hint = next((error.hint for error in unread if error.hint), "")
        raise ImageError("\n".join([*(e.message for e in unread[:_LISTED]), *more]), hint=hint) from unread[0]


def _split_sources(sources: Sequence[Path], *, without: Path | None) -> tuple[list[Path], list[Path]]:
    """Images, those in folders included, and videos; nothing below ``without``."""
    images: list[Path] = []
    videos: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = list_images(source)
            images += [p for p in inside if without is None or not p.resolve().is_relative_to(without.resolve())]
        elif is_video_file(source):
            videos.append(source)
        else:
            images.append(source)
    return images, videos


def _copy_names(suffixes: Mapping[Path, str]) -> dict[Path, Path]:
    """Beside each source a name for its copy with this suffix: no two are the same, whether case counts or not.

    A source whose name another shares but for its suffix keeps that in the copy's name: ``a.png.jpg``.
    """
    plain = {source: source.with_suffix(suffix) for source, suffix in suffixes.items()}
    counts = Counter(str(path).casefold() for path in plain.values())
    names = {source: path for source, path in plain.items() if counts[str(path).casefold()] == 1}
    taken = {str(path).casefold() for path in names.values()}
    for source in (source for source in plain if source not in names):
        numbered = (source.with_name(f"{source.name}{f'.{n}' if n else ''}{suffixes[source]}") for n in count())
        names[source] = next(path for path in numbered if str(path).casefold() not in taken)
        taken.add(str(names[source]).casefold())
    return names


class _Copies:
    """Annotated copies: drawn in one way, under the sources' paths below the folder that they have in common."""

    def __init__(
        self,
        folder: Path | None,
        *,
        images: Sequence[Path],
        videos: Sequence[Path],
        options: DrawOptions,
        names: tuple[str, ...],
    ) -> None:
        self._folder, self._options, self._names = folder, options, names
        suffixes = {path.resolve(): ".jpg" for path in images} | {path.resolve(): ".mp4" for path in videos}
        self._paths = _copy_names(suffixes) if folder is not None else {}
        self._common = Path(os.path.commonpath([path.parent for path in suffixes])) if suffixes else Path()

    def path(self, source: Path) -> Path | None:
        """Where the copy of ``source`` goes; None where none is asked for."""
        if self._folder is None:
            return None
        source = source.resolve()
        path = self._folder / self._paths[source].relative_to(self._common)
        if path.exists() and path.resolve().parent == source.parent:
            raise ConfigError(f"Drawing '{source}' would overwrite '{path}'.", hint="give another folder")
        return path

    def draw(self, image: NDArray[np.uint8], detections: Detections) -> NDArray[np.uint8]:
        return draw_detections(image, detections, self._names, options=self._options)


def _predict_images(
    detector: Detector, paths: Sequence[Path], *, copies: _Copies, unread: list[ImageError], progress: ProgressFn
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
            copy = copies.path(path)
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


def _predict_video(
    detector: Detector, video: Path, *, copies: _Copies, unread: list[ImageError], progress: ProgressFn
) -> Iterator[Prediction]:
    """Frame by frame; the error of a video that cannot be read to its end is put into ``unread``."""
    with contextlib.ExitStack() as stack:
        try:
            copy, announced = copies.path(video), frame_count(video)
            write = stack.enter_context(write_video(copy, like=video)) if copy else None
            for index, frame in enumerate(read_frames(video)):
                detections = detector.detect(frame)
                if write:
                    write(copies.draw(frame, detections))
                yield Prediction(
                    source=video,
                    frame=index,
                    announced=announced,
                    width=frame.shape[1],
                    height=frame.shape[0],
                    detections=detections,
                )
                progress(video.name, index + 1, max(announced, index + 1) if announced else 0)
        except ImageError as error:
            unread.append(error)


def prediction_json(prediction: Prediction, detector: Detector) -> dict[str, Any]:
    """``{"image", "width", "height", "backend", "precision", "detections": [...]}``.

    For a frame of a video also ``"frame"`` and ``"frames_announced"``, null where its header does not say it.
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
    if prediction.frame is not None:
        document |= {"frame": prediction.frame, "frames_announced": prediction.announced or None}
    return document


def prediction_rows(prediction: Prediction, names: tuple[str, ...], *, score: float = 0.0) -> list[list[str]]:
    """A row for each detection of at least this score, in ``TABLE_COLUMNS``; one that says so where there is none."""
    place = prediction.source.name if prediction.frame is None else f"{prediction.source.name}#{prediction.frame}"
    rows = [
        [place, item["name"], f"{item['score']:.3f}", *(f"{edge:.1f}" for edge in item["box"])]
        for item in prediction.detections.above(score).to_list(names)
    ]
    return rows or [[place, "nothing", *[""] * 5]]


_COLUMNS = ("image", "frame", "width", "height", "label", "name", "score", "x1", "y1", "x2", "y2")


def write_coco(path: Path, predictions: Sequence[Prediction], names: tuple[str, ...]) -> None:
    """A COCO data set whose annotations have a ``score``: ids from 1, boxes x, y, width, height in image pixels.

    A category's id is its label, so that those of the training stay what they are. Frames of a video are images of one
    name with a ``frame``.
    """
    images: list[dict[str, Any]] = []  # Any: JSON values
    annotations: list[dict[str, Any]] = []
    for image_id, prediction in enumerate(predictions, 1):
        frame = {} if prediction.frame is None else {"frame": prediction.frame}
        size = {"width": prediction.width, "height": prediction.height}
        images.append({"id": image_id, "file_name": str(prediction.source), **size, **frame})
        for item in prediction.detections.to_list(names):
            x1, y1, x2, y2 = item["box"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": item["label"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": item["score"],
                }
            )
    labels = {*range(len(names)), *(annotation["category_id"] for annotation in annotations)}
    categories = [{"id": label, "name": label_name(label, names)} for label in sorted(labels)]
    write_text(path, json.dumps({"images": images, "annotations": annotations, "categories": categories}) + "\n")


def write_csv(path: Path, predictions: Sequence[Prediction], names: tuple[str, ...]) -> None:
    """One line for a detection under a line of titles; boxes x1, y1, x2, y2 in image pixels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for prediction in predictions:
        frame = "" if prediction.frame is None else prediction.frame
        for item in prediction.detections.to_list(names):
            image = (str(prediction.source), frame, prediction.width, prediction.height)
            writer.writerow([*image, item["label"], item["name"], item["score"], *item["box"]])
    write_text(path, text.getvalue())


def write_yolo(folder: Path, predictions: Sequence[Prediction], names: tuple[str, ...]) -> None:
    """``classes.txt``, and for each image ``NAME.txt`` with lines ``label x y width height score``.

    x and y are of the box's centre; all four are shares of the image's size. A frame has its number behind the name.

    Raises:
        ConfigError: two images have one name.
    """
    files: dict[str, Prediction] = {}
    for prediction in predictions:
        name = prediction.source.stem + ("" if prediction.frame is None else f"_{prediction.frame:06d}")
        if name in files or name == "classes":
            raise ConfigError(
                f"'{files[name].source if name in files else 'classes.txt'}' and '{prediction.source}' would be one "
                f"file, '{name}.txt'.",
                hint="predict folder by folder, or write CSV or COCO",
            )
        files[name] = prediction
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names))
    for name, prediction in files.items():
        lines = []
        for item in prediction.detections.to_list(names):
            x1, y1, x2, y2 = item["box"]
            shares = (
                *((x1 + x2) / 2 / prediction.width, (y1 + y2) / 2 / prediction.height),
                *((x2 - x1) / prediction.width, (y2 - y1) / prediction.height),
            )
            lines.append(f"{item['label']} {' '.join(f'{share:.6f}' for share in shares)} {item['score']:.6f}\n")
        write_text(folder / f"{name}.txt", "".join(lines))
