"""The loops of the host path in C (``c/host.c``), where it was compiled.

The others are NumPy's in ``decode`` and ``detections``, and OpenCV's in ``preprocess``.

Both give the same results to the bit (``tests/unit/test_native.py``). The library has a plain C interface, so that one
file serves every Python; its loops run without the interpreter's lock. What is the same for each image of a size is
laid out once (``Resizer``, ``Finisher``): after a network the caches hold nothing of ours, and what Python does for one
call takes ten times as long as when it is repeated.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError

__all__ = [
    "NATIVE_TYPES",
    "SWITCH",
    "DetectionArrays",
    "Finish",
    "Finisher",
    "Native",
    "Resizer",
    "Scan",
    "Selection",
    "SuppressionRule",
    "library_problem",
    "native",
]

SWITCH = "FCOS_DEPLOY_NATIVE"  # 0: NumPy. 1: the library, or an error. Otherwise: the library if it is there.
_FILE = Path(__file__).with_name("c") / "host.so"
_INTERFACE = 4  # INTERFACE in host.c
NATIVE_TYPES = (np.float32, np.float16)  # of the arrays that the library takes
_BLOCK = 64  # BLOCK in host.c
_NO_MEMORY = -1  # NO_MEMORY in host.c
_KEPT = 100_000  # pairs: 1.2 MB a thread
_MOST_ROWS = 4096  # detections that a Finisher has room for, however many are allowed

_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_HEAD = object.__basicsize__  # bytes of a Python object before its own fields


class _Pairs(ctypes.Structure):
    """As in host.c, which also says what the fields of the others are."""

    _fields_ = (
        *((name, _POINTER) for name in ("flat", "p", "q", "counts", "distances")),
        *(("levels", _COUNT), ("classes", _NUMBER), ("half", _NUMBER)),
    )


class Selection(ctypes.Structure):
    """Which pairs are candidates."""

    _fields_ = (
        *(("address", _POINTER), ("locations", _COUNT), ("limit", _COUNT), ("threshold", ctypes.c_float)),
        *((name, _NUMBER) for name in ("gate", "rank", "score", "sorted")),
    )

    def __init__(
        self,
        centers: NDArray[np.float32],
        *,
        limit: int,
        threshold: float,
        forms: tuple[int, int, int],
        best_first: bool,
    ) -> None:
        """Take of each level the ``limit`` best by rank, in this order or by position.

        ``centers``: (2, L) x and y. ``forms``: gate, rank and score.
        """
        super().__init__(_address(centers), centers.shape[1], limit, threshold, *forms, best_first)
        self.centers = centers  # which the address is of


class SuppressionRule(ctypes.Structure):
    """What ``detections.Suppression`` says."""

    _fields_ = (
        *(("iou_threshold", ctypes.c_double), ("iou_offset", ctypes.c_double), ("limit", _COUNT)),
        ("keep_ties", _NUMBER),
    )


class Finish(ctypes.Structure):
    """From candidates to detections in image pixels."""

    _fields_ = (
        *(("suppression", SuppressionRule), ("label_map", _POINTER)),
        *(("clip", ctypes.c_float * 2), ("final_clip", ctypes.c_float * 2), ("to_image", ctypes.c_float * 4)),
        ("min_size", ctypes.c_float),
        *((name, _NUMBER) for name in ("drops_small", "in_image_pixels", "class_agnostic", "sort_by_score")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (("boxes", _POINTER), ("scores", _POINTER), ("labels", _POINTER), ("room", _COUNT))


class _Image(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("logits", "centerness", "distances", "bound", "ends")),
        *(("levels", _COUNT), ("capacity", _COUNT)),
        *((name, _POINTER) for name in ("flat", "values", "counts", "exponential", "data", "selection", "finish")),
        *(("out", _Rows), ("classes", _NUMBER)),
        *((name, _NUMBER) for name in ("half_logits", "half_centerness", "half_distances")),
    )


class _Resize(ctypes.Structure):
    _fields_ = (
        *(("planes", _POINTER * 3), ("plane_row", _COUNT), ("height", _COUNT), ("width", _COUNT)),
        *(("new_height", _COUNT), ("new_width", _COUNT), ("room", _POINTER)),
    )


class _Array(ctypes.Structure):
    """The first fields of PyArrayObject_fields (numpy/ndarraytypes.h)."""

    _fields_ = (("data", _POINTER), ("dimensions", ctypes.c_int), ("shape", _POINTER), ("strides", _POINTER))


class _Ufunc(ctypes.Structure):
    """The first fields of PyUFuncObject (numpy/ufuncobject.h)."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("inputs", "outputs", "arguments", "identity")),
        *(("functions", ctypes.POINTER(_POINTER)), ("data", ctypes.POINTER(_POINTER)), ("types", ctypes.c_int)),
    )


_ARGUMENTS: dict[str, tuple[type[Any], ...]] = {  # Any: ctypes' simple types
    "host_interface": (),
    "host_scan": (
        *(_POINTER, _NUMBER, _POINTER, _NUMBER, _NUMBER),  # logits, centerness, classes
        *(_POINTER, _NUMBER, _POINTER, _COUNT, _COUNT),  # bounds, ends of levels, capacity
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # flat, values, counts, finite
    ),
    "host_finite": (_POINTER, _NUMBER, _COUNT),  # values, halves, how many
    "host_best": (_POINTER, _COUNT, _COUNT, _POINTER),  # scores, limit, best
    "host_bounds": (
        *(_POINTER, _POINTER, _POINTER, _COUNT),  # ranks, largest, ends, levels
        *(_COUNT, ctypes.c_float, _POINTER),  # limit, gate, bounds
    ),
    "host_largest": (_POINTER, _NUMBER, _COUNT, _NUMBER, _POINTER),  # logits, locations, classes, largest
    "host_select": (_POINTER, _POINTER, _POINTER),  # pairs, selection, rows
    "host_detect": (_POINTER, _POINTER, _POINTER, _POINTER),  # pairs, selection, finish, rows
    "host_finish": (_POINTER,),  # image
    "host_resize_room": (_COUNT, _COUNT),  # width, new_width
    "host_resize_prepare": (_POINTER,),  # resize
    "host_resize": (_POINTER, _POINTER),  # resize, array
    "host_suppress": (_POINTER, _POINTER, _POINTER, _COUNT, _POINTER, _POINTER),  # boxes to labels, rule, kept
}


def native() -> Native | None:
    """The library, or None where the loops are NumPy's.

    Raises:
        ConfigError: ``FCOS_DEPLOY_NATIVE=1``, and it is not there or does not load; or another value than 0 and 1.
    """
    return _choose(os.environ.get(SWITCH, ""))


def library_problem() -> str:
    """Why the library cannot be used here; empty if it can."""
    return _load()[1]


@functools.lru_cache(maxsize=8)
def _choose(switch: str) -> Native | None:
    if switch not in ("", "0", "1"):
        raise ConfigError(f"{SWITCH} must be 0 or 1, got '{switch}'.")
    if switch == "0":
        return None
    library, problem = _load()
    if library is None and switch == "1":
        raise ConfigError(f"{SWITCH}=1, but {problem}.", hint=f"install a wheel for this machine, or {SWITCH}=0")
    return library


@functools.lru_cache(maxsize=1)
def _load() -> tuple[Native | None, str]:
    """The library, or None and what is wrong."""
    if not _FILE.exists():
        return None, "the library was not compiled when fcos-deploy was installed"
    try:
        library = ctypes.CDLL(str(_FILE))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _COUNT
        interface = int(library.host_interface())
        exponential = _exponential()
    except (OSError, AttributeError, ValueError) as error:  # of another processor, C library or version; a null pointer
        return None, f"'{_FILE}' does not load: {error}"
    if interface != _INTERFACE:
        return None, f"'{_FILE}' is of another version of fcos-deploy"
    if exponential is None:
        return None, f"it does not know the inside of NumPy {np.__version__} on this Python"
    return Native(library, exponential), ""


def _exponential() -> tuple[int, int | None] | None:
    """NumPy's loop for exponentials of float32, and what it is given as its data; None where they are not found.

    The C library's exponentials differ from NumPy's in the last bit, and those of ufuncs take longer to call.
    """
    sample, exp = np.linspace(-87, 88, 999, dtype=np.float32), np.exp
    if sys.implementation.name != "cpython":
        return None
    array, ufunc = _Array.from_address(id(sample) + _HEAD), _Ufunc.from_address(id(exp) + _HEAD)
    if (array.data, array.dimensions) != (_address(sample), 1):
        return None
    if (ufunc.inputs, ufunc.outputs, ufunc.arguments, ufunc.types) != (1, 1, 2, len(exp.types)):
        return None
    index, expected, sizes = exp.types.index("f->f"), exp(sample), (ctypes.c_ssize_t * 2)(len(sample), 4)
    loop, data = ufunc.functions[index], ufunc.data[index]
    steps, arrays = (ctypes.c_ssize_t * 2)(4, 4), (_POINTER * 2)(array.data, array.data)
    ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _POINTER, _POINTER)(loop)(arrays, sizes, steps, data)
    return (loop, data) if sample.tobytes() == expected.tobytes() else None


class _Scratch(threading.local):
    """What a thread's scans write: fresh pages would take longer than the scan. What is far too large is let go."""

    flat = np.empty(0, np.int32)
    values = np.empty(0, np.float32)

    def of_capacity(self, capacity: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if not 2 * capacity <= len(self.values) <= 2 * max(16 * capacity, _KEPT):
            self.flat, self.values = np.empty(capacity + _BLOCK, np.int32), np.empty(2 * capacity, np.float32)
        return self.flat, self.values


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """Pairs that pass, ascending: flat indices (n,), logits and centernesses (2, n), and how many of each level.

    Where there were more than the capacity, only ``counts`` are there. ``finite``: whether all logits are; with a bound
    for each location they are not looked at.
    """

    flat: NDArray[np.int32]
    values: NDArray[np.float32]
    counts: NDArray[np.int64]
    finite: bool

    @property
    def complete(self) -> bool:
        """Whether all fitted."""
        return len(self.flat) == int(self.counts.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Passing:
    """A complete scan, p and q (2, n) of its pairs, and the (L, 4) distances of all locations."""

    scan: Scan
    probabilities: NDArray[np.float32]
    classes: int
    distances: NDArray[Any]

    def most_rows(self, limit: int) -> int:
        """How many candidates there may be with ``limit`` of a level."""
        return sum(min(count, limit) for count in self.scan.counts.tolist())


# Boxes (n, 4), scores (n,), channels or labels (n,).
DetectionArrays = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]


class Native:
    """The functions of the library, on contiguous arrays."""

    def __init__(self, library: ctypes.CDLL, exponential: tuple[int, int | None]) -> None:
        self._library = library
        self._exponential = exponential
        self._scratch = _Scratch()

    def scan(
        self,
        logits: NDArray[Any],
        centerness: NDArray[Any],
        bounds: NDArray[np.float32],
        *,
        ends: NDArray[np.int64],
        capacity: int,
    ) -> Scan:
        """Pairs whose logit is above its bound; the calling thread's next call overwrites them.

        logits: (L, C) and centerness: (L,), float32 or float16. bounds: (1,) for all, or (L,).
        ends: where levels end, as locations. ``capacity``: for how many pairs there is room.
        """
        half = logits.dtype == np.float16
        keys = _half_keys(bounds) if half else bounds
        flat, values = self._scratch.of_capacity(capacity)
        counts, finite, per_location = np.empty(len(ends), np.int64), _NUMBER(1), len(bounds) > 1
        count = self._library.host_scan(
            *(_address(logits), half, _address(centerness), centerness.dtype == np.float16, logits.shape[1]),
            *(_address(keys), per_location, _address(ends), len(ends), capacity),
            *(_address(flat), _address(values), _address(counts), None if per_location else ctypes.byref(finite)),
        )
        count = count if count <= capacity else 0
        return Scan(flat[:count], values[: 2 * count].reshape(2, count), counts, bool(finite.value))

    def all_finite(self, values: NDArray[Any]) -> bool:
        """Whether no float32 or float16 of a contiguous array is infinite or NaN."""
        return bool(self._library.host_finite(_address(values), values.dtype == np.float16, values.size))

    def best_first(self, scores: NDArray[np.float32], *, limit: int) -> NDArray[np.intp]:
        """As ``decode.best_first``."""
        scores = np.ascontiguousarray(scores, np.float32)
        best = np.empty(min(len(scores), limit), np.int64)
        _require_memory(self._library.host_best(_address(scores), len(scores), limit, _address(best)))
        return best

    def largest(self, logits: NDArray[Any]) -> tuple[NDArray[np.float32], bool]:
        """(L,): the largest logit of each location, NaN where one is; and whether all are finite. logits: (L, C)."""
        largest = np.empty(len(logits), np.float32)
        half = logits.dtype == np.float16
        finite = self._library.host_largest(_address(logits), half, *logits.shape, _address(largest))
        return largest, bool(finite)

    def bounds_of_best(
        self,
        ranks: NDArray[np.float32],
        largest: NDArray[np.float32],
        *,
        ends: NDArray[np.int64],
        limit: int,
        gate: float,
    ) -> NDArray[np.float32]:
        """(L,): ``gate`` for locations whose largest logit (L,) is above it, and ``limit`` of a level by rank (L,).

        Infinity for the others.
        """
        bounds = np.empty(len(ranks), np.float32)
        _require_memory(
            self._library.host_bounds(
                *(_address(ranks), _address(largest), _address(ends), len(ends), limit, gate, _address(bounds))
            )
        )
        return bounds

    def select(self, passing: Passing, selection: Selection) -> DetectionArrays:
        """The candidates among the pairs that pass."""
        rows, arrays = self._rows(passing.most_rows(selection.limit))
        count = self._library.host_select(_pairs(passing), ctypes.byref(selection), ctypes.byref(rows))
        _require_memory(count)
        boxes, scores, channels = arrays
        return boxes[:count], scores[:count], channels[:count]

    def detect(self, passing: Passing, selection: Selection, finish: Finish) -> DetectionArrays:
        """As ``select``, then what survives of them, in image pixels, with labels in place of channels."""
        rows, arrays = self._rows(passing.most_rows(selection.limit))
        count = self._library.host_detect(_pairs(passing), *map(ctypes.byref, (selection, finish, rows)))
        _require_memory(count)
        boxes, scores, channels = arrays
        return boxes[:count].copy(), scores[:count].copy(), channels[:count].copy()  # without the room for the others

    def suppress(
        self,
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        *,
        labels: NDArray[Any],
        rule: SuppressionRule,
    ) -> NDArray[np.int64]:
        """Indices of the boxes that stay, best score first, as ``detections.suppress`` says."""
        boxes, scores = np.ascontiguousarray(boxes, np.float32), np.ascontiguousarray(scores, np.float32)
        labels = np.ascontiguousarray(labels, np.int64)
        kept = np.empty(len(scores), np.int64)
        count = self._library.host_suppress(
            _address(boxes), _address(scores), _address(labels), len(scores), ctypes.byref(rule), _address(kept)
        )
        _require_memory(count)
        return kept[:count]

    def resizer(self, size: tuple[int, int], planes: Sequence[NDArray[np.uint8]]) -> Resizer | None:
        """From images of (height, width) pixels into three (new_h, new_w) planes; None: it is not for these."""
        (new_height, new_width), layout = planes[0].shape, [plane.strides for plane in planes]
        halved = size == (2 * new_height, 2 * new_width)  # which OpenCV does in another way
        room = self._library.host_resize_room(size[1], new_width)
        if room == 0 or halved or layout != [(layout[0][0], 1)] * 3:
            return None
        return Resizer(self._library, np.empty(room, np.uint8), size=size, planes=planes)

    def finisher(
        self,
        logits: NDArray[Any],
        centerness: NDArray[Any],
        distances: NDArray[Any],
        *,
        bound: NDArray[np.float32],
        ends: NDArray[np.int64],
        capacity: int,
        selection: Selection,
        finish: Finish,
    ) -> Finisher:
        """All that is done with the outputs of an image, as they are in these arrays whenever it is called.

        logits: (L, C), centerness: (L,) and distances: (L, 4), contiguous. bound: (1,). For the calling thread.
        """
        half = [array.dtype == np.float16 for array in (logits, centerness, distances)]
        flat, values = self._scratch.of_capacity(capacity)
        counts, keys = np.empty(len(ends), np.int64), _half_keys(bound) if half[0] else bound
        rows, arrays = self._rows(min(finish.suppression.limit, _MOST_ROWS) + _BLOCK)
        image = _Image(
            *[_address(array) for array in (logits, centerness, distances, keys, ends)],
            *(len(ends), capacity, *[_address(array) for array in (flat, values, counts)], *self._exponential),
            *(ctypes.addressof(selection), ctypes.addressof(finish), rows, logits.shape[1], *half),
        )
        used = (logits, centerness, distances, keys, ends, flat, values, counts, selection, finish)
        return Finisher(self._library, image, rows=arrays, used=used)

    @staticmethod
    def _rows(count: int) -> tuple[_Rows, DetectionArrays]:
        arrays = np.empty((count, 4), np.float32), np.empty(count, np.float32), np.empty(count, np.int64)
        return _Rows(*(_address(array) for array in arrays), count), arrays


class Resizer:
    """Resizes images of one size into the same planes, as OpenCV's INTER_LINEAR does; one thread at a time."""

    def __init__(
        self,
        library: ctypes.CDLL,
        room: NDArray[np.uint8],
        *,
        size: tuple[int, int],
        planes: Sequence[NDArray[np.uint8]],
    ) -> None:
        addresses = (_POINTER * 3)(*[_address(plane) for plane in planes])
        self._job = _Resize(addresses, planes[0].strides[0], *size, *planes[0].shape, _address(room))
        self._used = (room, *planes)  # which the addresses are of
        self._resize, self._reference = library.host_resize, ctypes.byref(self._job)
        library.host_resize_prepare(self._reference)

    def __call__(self, image: NDArray[np.uint8]) -> bool:
        """Of (height, width, 3) uint8; False: nothing was done, as its rows are not contiguous or it is not NumPy's."""
        return isinstance(image, np.ndarray) and bool(self._resize(self._reference, id(image) + _HEAD))


class Finisher:
    """From the outputs of one image, in the same memory each time, to its detections; one thread at a time."""

    def __init__(self, library: ctypes.CDLL, image: _Image, *, rows: DetectionArrays, used: tuple[Any, ...]) -> None:
        self._image, self._rows, self._used = image, rows, used  # what the image's addresses are of
        self._finish, self._reference = library.host_finish, ctypes.byref(image)
        self._count, self._written = len(rows[1]), rows  # as many rows as the last image had detections

    def __call__(self) -> DetectionArrays | None:
        """Boxes, scores and labels; None: an output is not finite, or too many pairs pass for one scan."""
        count = self._finish(self._reference)
        if count < 0:
            if count == _NO_MEMORY:
                _require_memory(count)
            return None
        if count != self._count:
            boxes, scores, labels = self._rows
            self._count, self._written = count, (boxes[:count], scores[:count], labels[:count])
        boxes, scores, labels = self._written
        return boxes.copy(), scores.copy(), labels.copy()


def _pairs(passing: Passing) -> Any:  # Any: a ctypes reference
    scan, distances = passing.scan, passing.distances
    p = _address(passing.probabilities)
    return ctypes.byref(
        _Pairs(
            *(_address(scan.flat), p, p + 4 * len(scan.flat), _address(scan.counts), _address(distances)),
            *(len(scan.counts), passing.classes, distances.dtype == np.float16),
        )
    )


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _half_keys(bounds: NDArray[np.float32]) -> NDArray[np.int16]:
    """half_order() in host.c of the largest halves that are not above the bounds: the same halves exceed both."""
    with np.errstate(over="ignore"):
        halves = bounds.astype(np.float16)
    halves = np.where(halves > bounds, np.nextafter(halves, np.float16(-np.inf)), halves)
    bits = halves.view(np.int16)
    return np.where(bits < 0, bits ^ np.int16(0x7FFF), bits)


def _require_memory(count: int) -> None:
    if count < 0:
        raise MemoryError("There is not enough memory for decoding.")
