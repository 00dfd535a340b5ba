"""A histogram of fixed size whose range grows: bounded memory, whatever the number of values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import CalibrationError
from fcos_deploy.core.require import require

__all__ = ["BINS", "Histogram"]

# Bins for each sign. The largest magnitude always lies in the upper half, so that at least 2048 bins resolve it.
BINS = 4096
_CHUNK = 1 << 22  # cv2 counts in float32, which is exact up to 2^24


class Histogram:
    """Counts of values in bins of width ``2**exponent`` on both sides of zero.

    Widths are powers of two and edges multiples of them, so that widening merges pairs of bins without error and the
    result does not depend on the order in which values arrive. Exact zeros, which ReLU makes by the million and every
    quantizer represents exactly, are counted apart.

    positive, negative: (BINS,) int64; entry i counts values from i to i + 1 widths away from zero.
    channel_sums: (channels,) float64, the means of the channels of ``additions`` arrays (n, channels, h, w).
    """

    def __init__(self) -> None:
        self.exponent: int | None = None
        self.positive = np.zeros(BINS, np.int64)
        self.negative = np.zeros(BINS, np.int64)
        self.zeros = 0
        self.elements = 0
        self.minimum = math.inf
        self.maximum = -math.inf
        self.channel_sums = np.zeros(0, np.float64)
        self.additions = 0

    @property
    def channel_means(self) -> NDArray[np.float64]:
        """(channels,), empty for a tensor that has none."""
        return self.channel_sums / max(self.additions, 1)

    @property
    def amax(self) -> float:
        """Largest magnitude seen."""
        return max(abs(self.minimum), abs(self.maximum)) if self.elements else 0.0

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self.exponent or 0)

    def magnitudes(self) -> NDArray[np.int64]:
        """(BINS,) counts of absolute values without the exact zeros."""
        return self.positive + self.negative

    def add(self, values: NDArray[np.float32], *, samples: int = 1 << 62) -> None:
        """Count the values of an array of any shape.

        Of an array with more than ``samples`` values, evenly spaced ones are counted, about that many; the extremes are
        those of all values.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = flat[~np.isfinite(flat)]
            raise CalibrationError(f"{bad.size} of {flat.size} values are not finite, the first is {bad[0]}")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if values.ndim == 4:
            means = values.reshape(*values.shape[:2], -1).mean(2).mean(0)
            self.channel_sums = means + (self.channel_sums if self.additions else 0.0)
            self.additions += 1
        # An odd step does not beat against the even widths of feature maps.
        step = -(-flat.size // samples)
        flat = np.ascontiguousarray(flat[:: step | 1]) if step > 1 else flat
        zeros = flat.size - int(np.count_nonzero(flat))
        self.zeros += zeros
        self.elements += flat.size
        if zeros == flat.size:
            return
        self._widen(max(-low, high))
        self._count(flat, negative=low < 0)
        self.positive[0] -= zeros

    def _widen(self, amax: float) -> None:
        # amax < BINS * 2**e, and subnormal widths are of no use.
        wanted = max(math.frexp(amax)[1] - int(math.log2(BINS)), -120)
        if self.exponent is None:
            self.exponent = wanted
        while self.exponent < wanted:
            self.positive, self.negative = _merge_pairs(self.positive), _merge_pairs(self.negative)
            self.exponent += 1

    def _count(self, flat: NDArray[np.float32], *, negative: bool) -> None:
        reach = BINS * self.width
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            if not negative:
                self.positive += _count_bins(chunk, 0.0, reach, bins=BINS)
                continue
            counts = _count_bins(chunk, -reach, reach, bins=2 * BINS)
            self.positive += counts[BINS:]
            self.negative += counts[BINS - 1 :: -1]

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything, as arrays that an npz file can hold."""
        numbers = np.array([self.minimum, self.maximum], np.float64)
        exponent = -9999 if self.exponent is None else self.exponent
        counts = np.array([self.elements, self.zeros, exponent, self.additions], np.int64)
        bins = {"positive": self.positive, "negative": self.negative}
        return {**bins, "channels": self.channel_sums, "numbers": numbers, "counts": counts}

    @classmethod
    def from_state(cls, state: dict[str, NDArray[Any]]) -> Histogram:
        """The inverse of ``state``."""
        histogram = cls()
        histogram.positive, histogram.negative = state["positive"].copy(), state["negative"].copy()
        histogram.minimum, histogram.maximum = (float(v) for v in state["numbers"])
        histogram.channel_sums = state["channels"].copy()
        histogram.elements, histogram.zeros, exponent, histogram.additions = (int(v) for v in state["counts"])
        histogram.exponent = None if exponent == -9999 else exponent
        return histogram


def _merge_pairs(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    merged = np.zeros_like(counts)
    merged[: BINS // 2] = counts[0::2] + counts[1::2]
    return merged


def _count_bins(values: NDArray[np.float32], low: float, high: float, *, bins: int) -> NDArray[np.int64]:
    """(bins,) counts of the values in [low, high)."""
    cv2 = require("cv2", extra="onnxruntime")
    counts = cv2.calcHist([values.reshape(1, -1)], [0], None, [bins], [low, high])
    whole: NDArray[np.int64] = counts.reshape(-1).astype(np.int64)
    return whole
