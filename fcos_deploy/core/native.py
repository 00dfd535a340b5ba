"""The loops of the host path in C (``c/host.c``), where it was compiled; NumPy's are in ``decode`` and ``detections``.

Both give the same results to the bit (``tests/unit/test_native.py``). The library has a plain C interface, so that one
file serves every Python; its loops run without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError

__all__ = ["NATIVE_TYPES", "SWITCH", "Native", "Scan", "library_problem", "native"]

SWITCH = "FCOS_DEPLOY_NATIVE"  # 0: NumPy. 1: the library, or an error. Otherwise: the library if it is there.
_FILE = Path(__file__).with_name("c") / "host.so"
_INTERFACE = 2  # INTERFACE in host.c
NATIVE_TYPES = (np.float32, np.float16)  # of the arrays that the library takes
_BLOCK = 64  # BLOCK in host.c
_KEPT = 100_000  # pairs: 1.2 MB a thread

_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: dict[str, tuple[type[Any], ...]] = {  # Any: ctypes' simple types
    "host_interface": (),
    "host_scan": (
        *(_POINTER, _NUMBER, _POINTER, _NUMBER, _NUMBER),  # logits, centerness, classes
        *(_POINTER, _NUMBER, _POINTER, _COUNT, _COUNT),  # bounds, ends of levels, capacity
        *(_POINTER, _POINTER, _POINTER),  # flat, values, counts
    ),
    "host_finite": (_POINTER, _NUMBER, _COUNT),  # values, halves, how many
    "host_best": (_POINTER, _COUNT, _COUNT, _POINTER),  # scores, limit, best
    "host_largest": (_POINTER, _NUMBER, _COUNT, _NUMBER, _POINTER),  # logits, locations, classes, largest
    "host_select": (
        *(_POINTER, _POINTER, _POINTER, _POINTER, _COUNT, _NUMBER),  # flat, p, q, counts, levels, classes
        *(_NUMBER, ctypes.c_float, _NUMBER, _NUMBER, _COUNT, _NUMBER),  # gate, threshold, rank, score, limit, sorted
        *(_POINTER, _COUNT, _POINTER, _NUMBER),  # centers, locations, distances
        *(_POINTER, _POINTER, _POINTER),  # boxes, scores, channels
    ),
    "host_suppress": (
        *(_POINTER, _POINTER, _POINTER, _COUNT),  # boxes, scores, labels
        *(ctypes.c_double, ctypes.c_double, _COUNT, _NUMBER, _POINTER),  # threshold, offset, limit, ties, kept
    ),
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
    except (OSError, AttributeError) as error:  # of another processor or C library; or of another version
        return None, f"'{_FILE}' does not load: {error}"
    if interface != _INTERFACE:
        return None, f"'{_FILE}' is of another version of fcos-deploy"
    return Native(library), ""


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

    Where there were more than the capacity, only ``counts`` are there.
    """

    flat: NDArray[np.int32]
    values: NDArray[np.float32]
    counts: NDArray[np.int64]

    @property
    def complete(self) -> bool:
        """Whether all fitted."""
        return len(self.flat) == int(self.counts.sum())


class Native:
    """The functions of the library, on contiguous arrays."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
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
        counts = np.empty(len(ends), np.int64)
        count = self._library.host_scan(
            *(_address(logits), half, _address(centerness), centerness.dtype == np.float16, logits.shape[1]),
            *(_address(keys), len(bounds) > 1, _address(ends), len(ends), capacity),
            *(_address(flat), _address(values), _address(counts)),
        )
        count = count if count <= capacity else 0
        return Scan(flat[:count], values[: 2 * count].reshape(2, count), counts)

    def all_finite(self, values: NDArray[Any]) -> bool:
        """Whether no float32 or float16 of a contiguous array is infinite or NaN."""
        return bool(self._library.host_finite(_address(values), values.dtype == np.float16, values.size))

    def best_first(self, scores: NDArray[np.float32], *, limit: int) -> NDArray[np.intp]:
        """As ``decode.best_first``."""
        scores = np.ascontiguousarray(scores, np.float32)
        best = np.empty(min(len(scores), limit), np.int64)
        _require_memory(self._library.host_best(_address(scores), len(scores), limit, _address(best)))
        return best

    def largest(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        """(L,): the largest logit of each location; logits: (L, C) float32 or float16."""
        largest = np.empty(len(logits), np.float32)
        half = logits.dtype == np.float16
        self._library.host_largest(_address(logits), half, *logits.shape, _address(largest))
        return largest

    def select(
        self,
        passing: Scan,
        probabilities: NDArray[np.float32],
        *,
        classes: int,
        forms: tuple[int, int, int],
        threshold: float,
        limit: int,
        best_first: bool,
        centers: NDArray[np.float32],
        distances: NDArray[Any],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (n, 4), scores (n,) and channels (n,) of the pairs that pass, of each level the ``limit`` best.

        probabilities: (2, n) p and q of each. forms: gate, rank and score. Within a
        level the best rank comes first, or else the first position. centers: (2, L). distances: (L, 4).
        """
        count, levels = len(passing.flat), len(passing.counts)
        capacity = sum(min(int(of_level), limit) for of_level in passing.counts)
        boxes, scores = np.empty((capacity, 4), np.float32), np.empty(capacity, np.float32)
        channels = np.empty(capacity, np.int64)
        gate, rank, score = forms
        p = _address(probabilities)
        rows = self._library.host_select(
            *(_address(passing.flat), p, p + 4 * count, _address(passing.counts), levels, classes),
            *(gate, threshold, rank, score, limit, best_first),
            *(_address(centers), centers.shape[1], _address(distances), distances.dtype == np.float16),
            *(_address(boxes), _address(scores), _address(channels)),
        )
        _require_memory(rows)
        return boxes[:rows], scores[:rows], channels[:rows]

    def suppress(
        self,
        boxes: NDArray[np.float32],
        scores: NDArray[np.float32],
        *,
        labels: NDArray[Any],
        iou_threshold: float,
        iou_offset: float,
        limit: int,
        keep_ties: bool,
    ) -> NDArray[np.int64]:
        """Indices of the boxes that stay, best score first, as ``detections.suppress`` says."""
        boxes, scores = np.ascontiguousarray(boxes, np.float32), np.ascontiguousarray(scores, np.float32)
        labels = np.ascontiguousarray(labels, np.int64)
        kept = np.empty(len(scores), np.int64)
        count = self._library.host_suppress(
            *(_address(boxes), _address(scores), _address(labels), len(scores)),
            *(iou_threshold, iou_offset, limit, keep_ties, _address(kept)),
        )
        _require_memory(count)
        return kept[:count]


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
        raise MemoryError("The host path found no memory.")
