"""What C libraries print while they work: libjpeg says there, and nowhere else, that an image is damaged."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["with_messages"]

T = TypeVar("T")

# libjpeg's warnings about the file (jerror.h), which a caller gets instead of the terminal.
_LIBJPEG = re.compile(
    rb"^(?:Corrupt JPEG data|Premature end of JPEG|Invalid SOS parameters|Inconsistent progression|Unknown Adobe"
    rb"|Warning: unknown JFIF|Warning: thumbnail).*\n",
    re.MULTILINE,
)


class _Stream:
    """glibc's variable ``stderr``, which it allows to be set, is a stream in memory while something is decoded.

    Python's own ``sys.stderr``, the file descriptor and child processes are not touched. Several threads may decode at
    a time. Only if something was printed, which is rare, is the work repeated alone, to know by whom.
    """

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.usable = hasattr(libc, "gnu_get_libc_version")  # in musl the variable is constant
        if not self.usable:
            return
        self._flush, self._seek = libc.fflush, libc.fseek
        for function in (self._flush, self._seek):
            function.argtypes = [ctypes.c_void_p, *([ctypes.c_long, ctypes.c_int] if function is self._seek else [])]
        libc.open_memstream.restype = ctypes.c_void_p
        libc.open_memstream.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._text, self._size = ctypes.c_void_p(), ctypes.c_size_t()
        self._memory: Any = libc.open_memstream(ctypes.byref(self._text), ctypes.byref(self._size))
        self._variable = ctypes.c_void_p.in_dll(libc, "stderr")
        self._terminal = self._variable.value
        self.usable = bool(self._memory)
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
                others = _LIBJPEG.sub(b"", printed)
                if others.strip():
                    os.write(2, others)
            self._changed.notify_all()
        return printed

    def call(self, work: Callable[[], T]) -> tuple[T, str]:
        """``work()``, and what was printed meanwhile by this thread."""
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
        return result, printed.decode("utf-8", "replace")


_CREATION = threading.Lock()
_stream = functools.cache(_Stream)


def with_messages(work: Callable[[], T]) -> tuple[T, str | None]:
    """``work()`` and what C code printed on stderr in it, which may call it twice; None where that cannot be known."""
    with _CREATION:
        stream = _stream()
    return stream.call(work) if stream.usable else (work(), None)
