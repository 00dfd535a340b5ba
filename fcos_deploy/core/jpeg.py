"""Whether a JPEG is whole. Decoders fill what is missing or damaged with gray, and return no error.

What libjpeg prints decides; ``with_messages`` catches it. It prints one line alone, and there are lines about what does
not change a pixel: behind these, and where its lines cannot be had, the entropy-coded data of a sequential JPEG is
followed symbol by symbol, without any arithmetic on pixels: it must hold exactly as many blocks as the frame has (ITU-T
T.81, annexes B and F). That takes 25 ms for 640 x 480 pixels, so that without libjpeg's lines it is done only where
something hints at damage.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode_jpeg", "with_messages"]

_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
# The end of a scan: a marker that is neither a stuffed zero nor a restart.
_SCAN_END = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
# The next marker that has a length, or ends the file; libjpeg passes over all that comes before it.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd8])", re.DOTALL)
_APPLICATION = frozenset((*range(0xE0, 0xF0), 0xFE))  # APPn and comments: metadata
_REPEATED = np.uint64(0x0101010101010101)  # times a byte: eight of them
# A block has at most 64 symbols of 16 + 11 bits: reading this many bytes too far is noticed before it is an error.
_OVERRUN = 64 * 27 // 8 + 8
_END_OF_BLOCK = 128  # advances the coefficient's position beyond any that a block can reach
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_OTHER_FRAMES = (0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))


class _DamageError(Exception):
    """What is wrong, as half a sentence."""


@dataclass(frozen=True, slots=True)
class _Component:
    horizontal: int
    vertical: int


@dataclass(slots=True)
class _Frame:
    """What scans refer to; tables map (class, id) to ``_code_table``'s."""

    kind: int = 0
    height: int = 0
    width: int = 0
    components: dict[int, _Component] = field(default_factory=dict)
    tables: dict[tuple[int, int], bytes] = field(default_factory=dict)
    restart_interval: int = 0


@dataclass(frozen=True, slots=True)
class _Scan:
    """components: (id, DC table, AC table). ``spectral``: first and last coefficient.

    ``low_bit``: how many of the lowest bits are left for later scans. ``refines``: it adds a bit to earlier ones.
    """

    components: tuple[tuple[int, int, int], ...]
    spectral: tuple[int, int]
    low_bit: int
    refines: bool
    data: bytes
    restart_interval: int
    tables: dict[tuple[int, int], bytes]


_Pixels = NDArray[np.uint8]


def decode_jpeg(content: bytes, decode: Callable[[bytes], tuple[_Pixels | None, str | None]]) -> tuple[_Pixels, str]:
    """The pixels (h, w, 3) of a JPEG file, and what is wrong with it as half a sentence; empty when nothing is.

    ``decode``: libjpeg, with what it prints, of which only the first line comes out; None where that cannot be known.
    Bytes between the file's segments, which it passes over, are left out for it, and a missing end is added, so that
    its line is of the pixels.
    """
    nothing = np.empty((0, 0, 3), np.uint8)
    try:
        file = _parse(content)
        pixels, messages = decode(content if file.is_plain else file.rebuilt(content))
        if pixels is None:
            return nothing, "the decoder gives it up"
        if messages is not None and _OF_METADATA.search(messages):
            messages = decode(file.rebuilt(content, metadata=False))[1]
        _check(file, pixels, messages)
    except _DamageError as damage:
        return nothing, str(damage)
    except (IndexError, KeyError, ValueError, ZeroDivisionError):
        return nothing, "its segments contradict one another"
    return pixels, ""


# libjpeg's warnings (jerror.h): of the pixels, and of what does not change them.
_OF_PIXELS = re.compile(r"premature end|Premature end|bad (?:Huffman|arithmetic) code|instead of RST|Inconsistent")
_OF_METADATA = re.compile(r"unknown JFIF|Unknown Adobe|bad ICC|thumbnail", re.IGNORECASE)


def _check(file: _File, pixels: _Pixels, messages: str | None) -> None:
    frame, scans = file.frame, file.scans
    said = _OF_PIXELS.search(messages or "")
    if said:
        raise _DamageError(f"the decoder says '{(messages or '').strip()}'")
    if frame.kind not in (*_SEQUENTIAL, _PROGRESSIVE):  # lossless or arithmetic coding, which is not followed here
        return
    if messages is None:
        if not file.has_end:
            raise _DamageError("the file ends early")
        doubtful = any(_has_run(scan.data) for scan in scans) or _has_gray_block(pixels)
    else:
        doubtful = messages != ""
    if {identifier for scan in scans for identifier, *_ in scan.components} != set(frame.components):
        raise _DamageError("scans are missing at its end")
    if frame.kind == _PROGRESSIVE:
        _check_progression(frame, scans, look_for_holes=messages is None)
        if messages and not _only_filling(scans, messages):
            raise _DamageError(f"the decoder says '{messages.strip()}'")
        return
    for scan in scans:
        list(_intervals(scan, _units(frame, scan)[0]))  # raises where parts are missing or out of order
        if doubtful or len(scans) > 1:
            _check_blocks(frame, scan)


def _has_run(data: bytes) -> bool:
    """Whether a run of 15 equal bytes or more is in it, or by chance one of 8 to 14: a hole, or a flat area."""
    words = np.frombuffer(data, np.uint64, len(data) // 8)
    return bool((words == (words & np.uint64(255)) * _REPEATED).any())


def _has_gray_block(pixels: NDArray[np.uint8] | None) -> bool:
    """Whether somewhere 5 x 5 pixels are exactly middle gray, as a block without data is."""
    if pixels is None:
        return False
    gray = (pixels[4::8, 4::8] == 128).all(2)
    return any((pixels[8 * y + 2 : 8 * y + 7, 8 * x + 2 : 8 * x + 7] == 128).all() for y, x in np.argwhere(gray))


@dataclass(slots=True)
class _File:
    """``segments``: marker, begin and end of each; scans include their data. ``is_plain``: it is nothing else."""

    frame: _Frame = field(default_factory=_Frame)
    scans: list[_Scan] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    is_plain: bool = True
    has_end: bool = False

    def rebuilt(self, content: bytes, *, metadata: bool = True) -> bytes:
        """The same image without what lies between the segments, and with an end."""
        kept = [content[begin:end] for marker, begin, end in self.segments if metadata or marker not in _APPLICATION]
        return b"".join([b"\xff\xd8", *kept, b"\xff\xd9"])


def _parse(content: bytes) -> _File:
    """The first image of the file; embedded previews lie in segments, and what is appended comes after its end."""
    file, position = _File(), 2
    while True:
        begin = _MARKER.search(content, position)
        if begin is None:
            if not file.scans:
                raise _DamageError("the file ends early")
            file.is_plain = False
            return file
        file.is_plain &= begin.start() == position
        marker, position = begin[1][0], begin.end()
        if marker == 0xD9:
            if not file.scans:
                raise _DamageError("it holds no scan")
            file.has_end = True
            return file
        length = int.from_bytes(content[position : position + 2], "big")
        payload = content[position + 2 : position + length]
        if length < 2 or len(payload) < length - 2:
            if file.scans and marker not in (0xC4, 0xDA):  # the end of a file whose scans may be whole
                file.is_plain = False
                return file
            raise _DamageError("the file ends early")
        position += length
        if marker == 0xDA:
            end = _SCAN_END.search(content, position)
            stop = end.start() if end else len(content)
            file.scans.append(_scan(payload, content[position:stop], file.frame))
            position = stop
        else:
            _read_segment(marker, payload, file.frame)
        file.segments.append((marker, begin.start(), position))


def _read_segment(marker: int, payload: bytes, frame: _Frame) -> None:
    if marker in _SEQUENTIAL or marker == _PROGRESSIVE or marker in _OTHER_FRAMES:
        frame.kind = marker
        frame.height, frame.width = int.from_bytes(payload[1:3], "big"), int.from_bytes(payload[3:5], "big")
        for i in range(6, 6 + 3 * payload[5], 3):
            frame.components[payload[i]] = _Component(payload[i + 1] >> 4, payload[i + 1] & 15)
    elif marker == 0xC4:
        position = 0
        while position + 17 <= len(payload):
            size = 17 + sum(payload[position + 1 : position + 17])
            frame.tables[payload[position] >> 4, payload[position] & 15] = payload[position + 1 : position + size]
            position += size
    elif marker == 0xDD:
        frame.restart_interval = int.from_bytes(payload[:2], "big")


def _scan(payload: bytes, data: bytes, frame: _Frame) -> _Scan:
    count = payload[0]
    entries = [(payload[1 + 2 * i], payload[2 + 2 * i] >> 4, payload[2 + 2 * i] & 15) for i in range(count)]
    first, last, bits = payload[1 + 2 * count : 4 + 2 * count]
    if any(identifier not in frame.components for identifier, *_ in entries):
        raise _DamageError("a scan is of a component that the frame does not have")
    return _Scan(
        tuple(entries), (first, last), bits & 15, bits >> 4 > 0, data, frame.restart_interval, dict(frame.tables)
    )


def _only_filling(scans: list[_Scan], messages: str) -> bool:
    """Whether what is too much in a scan are bytes of one kind that some cameras fill files with."""
    extraneous = re.search(r"(\d+) extraneous bytes", messages)
    if extraneous is None:
        return True
    return any(set(scan.data[-int(extraneous[1]) :]) in ({0x00}, {0xFF}) for scan in scans)


def _check_progression(frame: _Frame, scans: list[_Scan], *, look_for_holes: bool) -> None:
    """Every coefficient of every component must have been sent down to its last bit, the means without a gap."""
    final = {identifier: np.zeros(64, np.bool_) for identifier in frame.components}
    for scan in scans:
        if look_for_holes and scan.spectral[0] == 0:
            _check_means(frame, scan)
        elif look_for_holes and _has_run(
            scan.data
        ):  # One code passes over a whole flat area, so that none of these is of that.
            raise _DamageError("there is a hole in its data")
        for identifier, *_ in scan.components:
            final[identifier][scan.spectral[0] : scan.spectral[1] + 1] |= scan.low_bit == 0
    if not all(sent.all() for sent in final.values()):
        raise _DamageError("scans are missing at its end")


def _units(frame: _Frame, scan: _Scan) -> tuple[int, list[tuple[int, int]]]:
    """How many minimum coded units a scan has, and the tables of the blocks of each."""
    widest = max(component.horizontal for component in frame.components.values())
    tallest = max(component.vertical for component in frame.components.values())
    if len(scan.components) > 1:
        blocks = [
            (dc, ac)
            for identifier, dc, ac in scan.components
            for _ in range(frame.components[identifier].horizontal * frame.components[identifier].vertical)
        ]
        return math.ceil(frame.width / (8 * widest)) * math.ceil(frame.height / (8 * tallest)), blocks
    ((identifier, dc, ac),) = scan.components
    component = frame.components[identifier]
    columns = math.ceil(math.ceil(frame.width * component.horizontal / widest) / 8)
    rows = math.ceil(math.ceil(frame.height * component.vertical / tallest) / 8)
    return columns * rows, [(dc, ac)]


def _intervals(scan: _Scan, units: int) -> Iterator[tuple[bytes, int]]:
    """The data between restart markers, and how many units each has."""
    step = scan.restart_interval or units
    parts = _RESTART.split(scan.data)
    if len(parts) // 2 + 1 != math.ceil(units / step):
        raise _DamageError("parts of its data are missing")
    if any(marker[0] & 7 != index % 8 for index, marker in enumerate(parts[1::2])):
        raise _DamageError("parts of its data are out of order")
    for index, data in enumerate(parts[::2]):
        yield data, min(step, units - index * step)


def _check_means(frame: _Frame, scan: _Scan) -> None:
    """A DC scan of a progressive file: a code for each block at first, one bit for each in a refinement."""
    units, blocks = _units(frame, scan)
    if not scan.refines:
        _check_blocks(frame, scan, coefficients=1)
        return
    for data, count in _intervals(scan, units):
        if len(data.replace(b"\xff\x00", b"\xff")) != math.ceil(count * len(blocks) / 8):
            raise _DamageError("parts of its data are missing")


def _check_blocks(frame: _Frame, scan: _Scan, *, coefficients: int = 64) -> None:
    units, blocks = _units(frame, scan)
    tables = {
        (kind, identifier): _code_table(scan.tables.get((kind, identifier), b""), kind=kind)
        for pair in blocks
        for kind, identifier in enumerate(pair)
    }
    pairs = [(tables[0, dc], tables[1, ac]) for dc, ac in blocks]
    for data, count in _intervals(scan, units):
        _check_interval(data.replace(b"\xff\x00", b"\xff"), pairs, units=count, coefficients=coefficients)


def _code_table(definition: bytes, *, kind: int) -> list[int]:
    """For each 16 bits ahead, the bits of code and value, and 64 times the coefficients it stands for; 0: no code.

    definition: how many codes have 1 to 16 bits, then their symbols. DC symbols (kind 0) are sizes of values; AC
    symbols are a run of zero coefficients and a size, where 0 ends the block.
    """
    table, code, position = np.zeros(1 << 16, np.int64), 0, 16
    for length in range(1, 17):
        for _ in range(definition[length - 1] if definition else 0):
            symbol = definition[position]
            position += 1
            run, size = (0, symbol) if kind == 0 else (symbol >> 4, symbol & 15)
            advance = _END_OF_BLOCK if kind == 1 and size == 0 and run < 15 else run + 1
            start = code << (16 - length)
            table[start : start + (1 << (16 - length))] = 64 * advance + length + size
            code += 1
        code <<= 1
    entries: list[int] = table.tolist()
    return entries


def _check_interval(data: bytes, pairs: list[tuple[list[int], list[int]]], *, units: int, coefficients: int) -> None:
    padded = np.frombuffer(data + b"\xff" * _OVERRUN, np.uint8).astype(np.int64)
    ahead = ((padded[:-2] << 16) | (padded[1:-1] << 8) | padded[2:]).tolist()  # 24 bits from each byte on
    position, end = 0, 8 * len(data)
    for _ in range(units):
        for dc, ac in pairs:
            entry = dc[(ahead[position >> 3] >> (8 - (position & 7))) & 0xFFFF]
            position += entry & 63
            coefficient = 1 if entry else coefficients + 1
            while coefficient < coefficients:
                entry = ac[(ahead[position >> 3] >> (8 - (position & 7))) & 0xFFFF]
                position += entry & 63
                coefficient += entry >> 6 if entry else 64
            if position > end:
                raise _DamageError("its data ends early")
            if coefficients < coefficient < _END_OF_BLOCK:
                raise _DamageError("there is a hole in its data")
    rest = set(data[(position + 7) >> 3 :])  # some cameras fill files up
    if len(rest) > 1 or rest - {0x00, 0xFF}:
        raise _DamageError("there is a hole in its data")


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
