"""Reads and writes video files with OpenCV."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.media_files import VIDEO_SUFFIXES, describe_content, file_head, image_format, is_video

__all__ = ["VideoWriter", "frame_count", "is_video_file", "read_frames"]

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
        self._size = (0, 0)  # width, height

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
        """Append a frame (h, w, 3) uint8 RGB; one of another size than the first is scaled to it.

        Raises:
            ConfigError: this OpenCV cannot write .mp4.
        """
        if self._writer is None:
            self._size = image.shape[1], image.shape[0]
            self._writer = self._open(*self._size)
        if self._size != (image.shape[1], image.shape[0]):  # OpenCV would leave it out.
            image = cv2.resize(image, self._size)
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def _open(self, width: int, height: int) -> Any:
        with _opened(self._like) as capture:
            rate = capture.get(cv2.CAP_PROP_FPS) or _DEFAULT_RATE
        code = cv2.VideoWriter_fourcc(*"mp4v")
        writer = cv2.VideoWriter(str(self._temporary), code, rate, (width, height))
        if not writer.isOpened():
            raise ConfigError(f"OpenCV cannot write '{self._path}'.", hint="use an OpenCV that was built with FFmpeg")
        return writer


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    capture = cv2.VideoCapture(str(path)) if path.is_file() else None
    if capture is None or not capture.isOpened():
        raise ImageError(f"Cannot read video '{path}'.", hint="is it there, whole, and a video that OpenCV knows?")
    try:
        yield capture
    finally:
        capture.release()
