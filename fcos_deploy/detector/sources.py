"""Reads and writes video files with OpenCV."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import lazy_import

__all__ = ["VIDEO_SUFFIXES", "VideoWriter", "frame_count", "read_frames"]

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
            self._writer = self._open(width=image.shape[1], height=image.shape[0])
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def _open(self, *, width: int, height: int) -> Any:
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
        raise ImageError(f"Cannot read video '{path}'.", hint="is it there, and a video that OpenCV knows?")
    try:
        yield capture
    finally:
        capture.release()
