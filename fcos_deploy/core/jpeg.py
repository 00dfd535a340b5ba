"""Whether a JPEG is whole. Decoders fill what is missing or damaged with gray, and return no error.

What libjpeg prints decides; ``with_messages`` catches it. It prints its first line alone, and there are lines about
what does not change a pixel. Nothing is printed about scans that a file leaves out: they are counted here (ITU-T T.81,
annexes B and G).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_jpeg", "with_messages"]

# The end of a scan: a marker that is neither a stuffed zero nor a restart.
_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
# The next marker that has a length, or ends the file; libjpeg passes over all that comes before it.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
_APPLICATION = frozenset((*range(0xE0, 0xF0), 0xFE))  # APPn and comments: metadata
_PROGRESSIVE = 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # the others are lossless or arithmetic coding, whose scans are not counted
# libjpeg's warnings (jerror.h): of the pixels, of what does not change them, and of bytes that a scan has too many.
_OF_PIXELS = re.compile(r"premature end|Premature end|bad (?:Huffman|arithmetic) code|instead of RST|Inconsistent")
_OF_METADATA = re.compile(r"unknown JFIF|Unknown Adobe|bad ICC|thumbnail", re.IGNORECASE)
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes")

_Pixels = NDArray[np.uint8]


class _DamageError(Exception):
    """What is wrong, as half a sentence."""


@dataclass(slots=True)
class _File:
    """``segments``: marker, begin and end of each; scans include their data. ``is_plain``: it is nothing else.

    ``complete``: for each component, which of its 64 coefficients the scans send down to the last bit. ``ends``: the
    last bytes of each scan's data are before these places.
    """

    segments: list[tuple[int, int, int]] = field(default_factory=list)
    complete: dict[int, NDArray[np.bool_]] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    is_progressive: bool = False
    is_plain: bool = True
    has_end: bool = False

    def rebuilt(self, content: bytes, *, metadata: bool = True) -> bytes:
        """The same image without what lies between the segments, and with an end."""
        kept = [content[begin:end] for marker, begin, end in self.segments if metadata or marker not in _APPLICATION]
        return b"".join([b"\xff\xd8", *kept, b"\xff\xd9"])

    def add(self, marker: int, payload: bytes) -> None:
        """Take in a frame's components, or what a scan sends of them."""
        if marker in _FRAMES:
            self.is_progressive = marker == _PROGRESSIVE
            self.complete = {payload[i]: np.zeros(64, np.bool_) for i in range(6, 6 + 3 * payload[5], 3)}
        elif marker == 0xDA and self.complete:
            components = payload[1 : 1 + 2 * payload[0] : 2]
            first, last, bits = payload[1 + 2 * payload[0] : 4 + 2 * payload[0]]
            for component in components:
                self.complete[component][first : last + 1] |= bits & 15 == 0 or not self.is_progressive


def decode_jpeg(content: bytes, decode: Callable[[bytes], tuple[_Pixels | None, str]]) -> tuple[_Pixels, str]:
    """The pixels (h, w, 3) of a JPEG file, and what is wrong with it as half a sentence; empty when nothing is.

    ``decode``: libjpeg, with what it prints, of which only the first line comes out.
    Bytes between the file's segments, which it passes over, are left out for it, and a missing end is added, so that
    its line is of the pixels.
    """
    nothing = np.empty((0, 0, 3), np.uint8)
    try:
        file = _parse(content)
        pixels, messages = decode(content if file.is_plain else file.rebuilt(content))
        if pixels is None:
            return nothing, "the decoder gives it up"
        if _OF_METADATA.search(messages):
            messages = decode(file.rebuilt(content, metadata=False))[1]
        if messages and (_OF_PIXELS.search(messages) or not _only_filling(content, file, messages)):
            return nothing, f"the decoder says '{messages.strip()}'"
        if not all(sent.all() for sent in file.complete.values()):
            return nothing, "scans are missing at its end"
    except _DamageError as damage:
        return nothing, str(damage)
    except (IndexError, KeyError, ValueError):
        return nothing, "its segments contradict one another"
    return pixels, ""


def _only_filling(content: bytes, file: _File, messages: str) -> bool:
    """Whether what is too much in a scan are bytes of one kind that some cameras fill files with."""
    extraneous = _EXTRANEOUS.search(messages)
    return extraneous is None or any(
        set(content[end - int(extraneous[1]) : end]) in ({0x00}, {0xFF}) for end in file.ends
    )


def _parse(content: bytes) -> _File:
    """The first image of the file; embedded previews lie in segments, and what is appended comes after its end."""
    file, position = _File(), 2
    while begin := _MARKER.search(content, position):
        file.is_plain &= begin.start() == position
        marker, position = begin[1][0], begin.end()
        if marker == 0xD9:
            file.has_end = True
            break
        length = int.from_bytes(content[position : position + 2], "big")
        payload = content[position + 2 : position + length]
        if length < 2 or len(payload) < length - 2:
            if marker in (0xC4, 0xDA):
                raise _DamageError("the file ends early")
            break  # the end of a file whose scans may be whole
        position += length
        file.add(marker, payload)
        if marker == 0xDA:
            end = _SCAN_END.search(content, position)
            position = end.start() if end else len(content)
            file.ends.append(position)
        file.segments.append((marker, begin.start(), position))
    file.is_plain &= file.has_end
    if not file.ends:
        raise _DamageError("it holds no scan" if file.has_end else "the file ends early")
    return file


T = TypeVar("T")

# libjpeg's warnings about the file (jerror.h), which a caller gets instead of the terminal.
_LIBJPEG = re.compile(
    rb"^(?:Corrupt JPEG data|Premature end of JPEG|Invalid SOS parameters|Inconsistent progression|Unknown Adobe"
    rb"|Warning: unknown JFIF|Warning: thumbnail).*\n",
    re.MULTILINE,
)


def _libjpeg_lines(printed: bytes) -> str:
    return b"".join(_LIBJPEG.findall(printed)).decode("utf-8", "replace")


def _pass_on(printed: bytes) -> None:
    """Write what is not libjpeg's to the terminal, if there is one."""
    others = _LIBJPEG.sub(b"", printed)
    if others.strip():
        with contextlib.suppress(OSError):
            os.write(2, others)


class _Stream:
    """glibc's variable ``stderr``, which it allows to be set, is a stream in memory while something is decoded.

    Python's own ``sys.stderr``, the file descriptor and child processes are not touched. Several threads may decode at
    a time. Only if something was printed, which is rare, is the work repeated alone, to know by whom.
    """

    def __init__(self, libc: ctypes.CDLL) -> None:
        self._flush, self._seek = libc.fflush, libc.fseek
        for function in (self._flush, self._seek):
            function.argtypes = [ctypes.c_void_p, *([ctypes.c_long, ctypes.c_int] if function is self._seek else [])]
        libc.open_memstream.restype = ctypes.c_void_p
        libc.open_memstream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._text, self._size = ctypes.c_void_p(), ctypes.c_size_t()
        self._memory: Any = libc.open_memstream(ctypes.byref(self._text), ctypes.byref(self._size))
        self._variable = ctypes.c_void_p.in_dll(libc, "stderr")
        self._terminal = self._variable.value
        if not self._memory:
            raise MemoryError("There is no memory for what libjpeg prints.")
        self._changed = threading.Condition()
        self._active = 0
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """A child has only the thread that forked, and none that decodes."""
        self._changed, self._active = threading.Condition(), 0
        self._variable.value = self._terminal

    def _enter(self) -> None:
        if not self._active:
            self._terminal = self._variable.value
            self._variable.value = self._memory
        self._active += 1

    def _leave(self) -> bytes:
        """All that was printed since the first of those who are active now entered."""
        self._flush(self._memory)
        printed = ctypes.string_at(self._text, self._size.value) if self._size.value else b""
        self._active -= 1
        if not self._active:
            self._variable.value = self._terminal
            if printed:
                self._seek(self._memory, 0, 0)
                self._flush(self._memory)  # with it the size is 0 again
                _pass_on(printed)
            self._changed.notify_all()
        return printed

    def call(self, work: Callable[[], T]) -> tuple[T, str]:
        """``work()``, and libjpeg's lines of it."""
        with self._changed:
            self._enter()
        try:
            result = work()
        finally:
            with self._changed:
                printed = self._leave()
        if not printed:
            return result, ""
        with self._changed:
            self._changed.wait_for(lambda: not self._active)
            self._enter()
            try:
                result = work()
            finally:
                printed = self._leave()
        return result, _libjpeg_lines(printed)


class _Descriptor:
    """File descriptor 2 is a file without a name while something is decoded, by one thread at a time.

    What other threads write meanwhile goes on to the terminal; a process that they start then keeps the file.
    """

    def __init__(self) -> None:
        self._terminal = -1
        self._prepare()
        os.register_at_fork(after_in_child=self._after_fork)

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        if hasattr(os, "memfd_create"):  # Linux: it needs no folder
            self._file = os.memfd_create("stderr")
        else:
            with TemporaryFile() as file:
                self._file = os.dup(file.fileno())

    def _after_fork(self) -> None:
        """A child has only the thread that forked, and none that decodes; the file is its parent's."""
        self._restore()
        os.close(self._file)
        self._prepare()

    def _restore(self) -> None:
        if self._terminal >= 0:
            os.dup2(self._terminal, 2)
            os.close(self._terminal)
            self._terminal = -1

    def call(self, work: Callable[[], T]) -> tuple[T, str]:
        """``work()``, and libjpeg's lines of it."""
        with self._lock:
            try:
                self._terminal = os.dup(2)
            except OSError:  # it is closed
                self._terminal = os.open(os.devnull, os.O_WRONLY)
            os.dup2(self._file, 2)
            try:
                result = work()
            finally:
                self._restore()
                printed = os.pread(self._file, os.lseek(self._file, 0, os.SEEK_CUR), 0)
                os.lseek(self._file, 0, os.SEEK_SET)
                _pass_on(printed)
        return result, _libjpeg_lines(printed)


_CREATION = threading.Lock()


@functools.cache
def _capture() -> _Stream | _Descriptor:
    libc = ctypes.CDLL(None)
    return _Stream(libc) if hasattr(libc, "gnu_get_libc_version") else _Descriptor()  # musl's stderr is constant


def with_messages(work: Callable[[], T]) -> tuple[T, str]:
    """``work()`` and what libjpeg printed on stderr in it, which may call it twice."""
    with _CREATION:
        capture = _capture()
    return capture.call(work)
