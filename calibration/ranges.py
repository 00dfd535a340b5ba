"""From values to ranges: histograms of tensors, and the methods that find a range in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.measuring import TensorSample
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import CalibrationError, unknown_name

__all__ = [
    "BINS",
    "DEFAULT_METHOD",
    "Histogram",
    "Range",
    "RangeMethod",
    "find_range",
    "range_method",
]

Floats = NDArray[np.float64]


# Bins for each sign. The largest magnitude always lies in the upper half, so that at least 2048 bins resolve it: eight
# for each of the 256 levels that a quantizer has.
BINS = 4096


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

    def add(self, sample: TensorSample) -> None:
        """Count the values of a tensor of one image; the extremes are those of all of its values.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        flat, low, high = sample.values, sample.minimum, sample.maximum
        if not sample.finite:
            bad = flat[~np.isfinite(flat)]  # may be empty: a sample does not hold every value
            first = f", the first is {bad[0]}" if bad.size else ""
            raise CalibrationError(f"{bad.size or 'some'} of {flat.size} values are not finite{first}")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if sample.channel_means.size:
            self.channel_sums = sample.channel_means + (self.channel_sums if self.additions else 0.0)
            self.additions += 1
        zeros = int(np.count_nonzero(flat == 0.0))  # four times as fast as on the floats
        self.zeros += zeros
        self.elements += flat.size
        if zeros == flat.size:
            return
        self._widen(max(-low, high))
        # Exact in float32: the width is a power of two, and the number of a bin has 13 bits.
        numbers = flat * np.float32(1.0 / self.width)
        np.floor(numbers, out=numbers)
        numbers += BINS
        counts = np.bincount(numbers.astype(np.uint16), minlength=2 * BINS)
        self.positive += counts[BINS:]
        self.negative += counts[BINS - 1 :: -1]
        self.positive[0] -= zeros

    def _widen(self, amax: float) -> None:
        """Merge pairs of bins until the range holds ``amax``."""
        # frexp gives amax = m * 2^e with 0.5 <= m < 1, so that BINS bins of 2^e / BINS reach to 2^e: more than amax and
        # at most twice as far. float32 has no normal numbers below 2^-126; narrower bins are of no use.
        exponent = max(math.frexp(amax)[1] - int(math.log2(BINS)), -120)
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            for counts in (self.positive, self.negative):
                counts[: BINS // 2] = counts[0::2] + counts[1::2]
                counts[BINS // 2 :] = 0
            self.exponent += 1

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


# 99.9 % costs an FCOS seven points: large objects live in the tails (docs/int8.md).
_PERCENTILE = 99.999
_LEVELS = 256
_STOPS = 64  # clipping points that the entropy method tries
# Shares of the full range that are tried, the widest first so that it wins among equals.
_SHARES = np.linspace(1.0, 0.02, 50)
# Bins merged for the searches: at least 512 remain on the longer side, two for each of 256 levels.
_COARSE = 4


class RangeMethod(StrEnum):
    """How the range of a tensor follows from its histogram."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"
    L3 = "l3"


# Shares the lead over the models and placements of docs/int8.md.
DEFAULT_METHOD = RangeMethod.PERCENTILE


def range_method(name: str) -> RangeMethod:
    """A method by name, the default for an empty one.

    Raises:
        ConfigError: naming the ones that exist.
    """
    known = [str(method) for method in RangeMethod]
    if name and name not in known:
        raise unknown_name("range method", name, known)
    return RangeMethod(name) if name else DEFAULT_METHOD


@dataclass(frozen=True, slots=True)
class Range:
    """``low`` <= 0 <= ``high`` for asymmetric quantization, ``amax`` > 0 for symmetric."""

    low: float
    high: float
    amax: float

    def __post_init__(self) -> None:
        # Whether numbers of a file are finite is asked where the tensor's name is known.
        if self.low > 0.0 or self.high < 0.0 or self.amax <= 0.0:
            raise CalibrationError(f"A range must hold zero, got [{self.low}, {self.high}] and amax {self.amax}.")


def find_range(histogram: Histogram, method: RangeMethod) -> Range:
    """The range of one tensor.

    Raises:
        CalibrationError: the histogram is empty or holds nothing but zeros.
    """
    if histogram.elements == 0 or histogram.amax == 0.0:
        raise CalibrationError("The range is empty: the tensor is zero for every image")
    return _METHODS[method](histogram)


def _minmax(histogram: Histogram) -> Range:
    return Range(min(histogram.minimum, 0.0), max(histogram.maximum, 0.0), histogram.amax)


def _percentile(histogram: Histogram) -> Range:
    """The range outside of which 1 of 100,000 values lies on each side.

    Exact zeros count among the values, as in ``numpy.percentile`` of the tensor.
    """
    outside = histogram.elements * (1.0 - _PERCENTILE / 100.0)

    def tail(counts: NDArray[np.int64]) -> float:
        """The value above which ``outside`` counts lie."""
        above = np.cumsum(counts[::-1])[::-1]  # above[i]: counts in bin i and higher
        if above[0] <= outside:
            return 0.0
        # The bin in which the count passes `outside`; its values are taken to be spread evenly over it.
        last = int(np.flatnonzero(above > outside)[-1])
        beyond = float(above[last + 1]) if last + 1 < BINS else 0.0
        return (last + 1.0 - (outside - beyond) / float(counts[last])) * histogram.width

    low, high = -tail(histogram.negative), tail(histogram.positive)
    return _clipped(histogram, low=low, high=high, amax=tail(histogram.positive + histogram.negative))


def _clipped(histogram: Histogram, *, low: float, high: float, amax: float) -> Range:
    """Never wider than what was seen, never empty."""
    full = _minmax(histogram)
    low, high = max(low, full.low), min(high, full.high)
    if low == high:  # Nearly all values are zero, so that everything else counts as an outlier.
        return full
    return Range(low, high, min(max(amax, -low, high), full.amax) or full.amax)


def _power(exponent: int) -> Callable[[Histogram], Range]:
    """The range with the smallest sum of |error|^exponent; 2 is MSE, 3 weighs the tails more."""

    def search(histogram: Histogram) -> Range:
        full = _minmax(histogram)
        values, counts = _occupied_bins(histogram)

        def best(limit: float, low: float | None = None, high: float | None = None) -> float:
            """The cheapest share of ``limit`` as the open end, or as both ends when neither is given."""
            if limit == 0.0:
                return 1.0
            limits = limit * _SHARES
            lows = -limits if low is None else np.full_like(limits, low)
            highs = limits if high is None else np.full_like(limits, high)
            errors = _quantization_errors(values, lows, highs)
            powers = errors.copy()
            for _ in range(1, exponent):  # much faster than a power
                np.multiply(powers, errors, out=powers)
            return float(_SHARES[int(np.argmin(powers @ counts))])

        # The tail that reaches farther decides first; the other then follows with that one fixed.
        if full.high >= -full.low:
            high = full.high * best(full.high, low=full.low)
            low = full.low * best(-full.low, high=high)
        else:
            low = full.low * best(-full.low, high=full.high)
            high = full.high * best(full.high, low=low)
        return Range(low, high, full.amax * best(full.amax))

    return search


def _occupied_bins(histogram: Histogram) -> tuple[Floats, Floats]:
    """(b,) centres and (b,) counts of the occupied bins; exact zeros cost nothing in any range and are left out."""
    centres = (np.arange(BINS // _COARSE) + 0.5) * histogram.width * _COARSE
    negative, positive = (
        counts.reshape(-1, _COARSE).sum(1).astype(np.float64) for counts in (histogram.negative, histogram.positive)
    )
    values, counts = np.concatenate([-centres[::-1], centres]), np.concatenate([negative[::-1], positive])
    return values[counts > 0], counts[counts > 0]


def _quantization_errors(values: Floats, lows: Floats, highs: Floats) -> Floats:
    """(s, b) |error| of each value (b,) when it is rounded to one of 256 levels between each pair of ends (s,)."""
    steps = ((highs - lows) / (_LEVELS - 1))[:, None]
    errors: Floats = np.clip(values[None], lows[:, None], highs[:, None])
    np.divide(errors, steps, out=errors)
    np.rint(errors, out=errors)
    np.multiply(errors, steps, out=errors)
    np.subtract(errors, values[None], out=errors)
    np.abs(errors, out=errors)
    return errors


def _entropy(histogram: Histogram) -> Range:
    """The clipping point with the smallest Kullback-Leibler divergence from the clipped to the quantized distribution.

    The method of TensorRT's entropy calibrator (S. Migacz, "8-bit Inference with TensorRT", GTC 2017): P is the
    histogram of magnitudes with everything beyond the clipping point added to its last bin, Q the same bins without
    that, averaged over 128 levels; the divergence is the sum of P log(P / Q). Exact zeros are left out: they survive
    any range, and their spike would hide everything else.
    """
    magnitudes = (histogram.positive + histogram.negative).reshape(-1, 2).sum(1).astype(np.float64)
    width = histogram.width * 2
    top = int(np.flatnonzero(magnitudes)[-1]) + 1
    levels = _LEVELS // 2
    # Below two bins a level the divergence says nothing.
    stops = np.unique(np.linspace(min(2 * levels, top), top, _STOPS).astype(int))
    costs = _divergences(magnitudes[:top], stops, levels)
    amax = min(float(stops[int(np.argmin(costs))]) * width, histogram.amax)
    full = _minmax(histogram)
    return _clipped(histogram, low=max(full.low, -amax), high=min(full.high, amax), amax=amax)


def _divergences(counts: Floats, stops: NDArray[np.int64], levels: int) -> Floats:
    """Divergence of the counts (b,) clipped at each of ``stops`` (s,), from their own quantization; (s,)."""
    bins = np.arange(len(counts))
    inside = bins < stops[:, None]
    clipped = np.where(inside, counts, 0.0)
    quantized = _spread(clipped, stops, levels)
    clipped[np.arange(len(stops)), stops - 1] += counts.sum() - np.cumsum(counts)[stops - 1]
    total = np.maximum(quantized.sum(1, keepdims=True), 1e-300)
    p = clipped / clipped.sum(1, keepdims=True)
    # A bin that only outliers occupy has q = 0; a little mass keeps the divergence finite and large.
    ratio = np.divide(p, np.maximum(quantized / total, 1e-9), out=np.ones_like(p), where=p > 0)
    divergences: Floats = (p * np.log(ratio)).sum(1)
    return divergences


def _spread(inside: Floats, stops: NDArray[np.int64], levels: int) -> Floats:
    """The counts (s, b) with those of each level spread evenly over the level's occupied bins."""
    rows, bins = inside.shape
    widths = np.minimum(stops, levels)[:, None]
    level = np.minimum(((np.arange(bins) + 1) * widths - 1) // stops[:, None], levels - 1)
    flat = (level + np.arange(rows)[:, None] * levels).reshape(-1)
    occupied = inside > 0
    sums = np.bincount(flat, inside.reshape(-1), rows * levels)
    share = sums / np.maximum(np.bincount(flat, occupied.reshape(-1), rows * levels), 1)
    return np.where(occupied, share[flat].reshape(rows, bins), 0.0)


_METHODS: dict[RangeMethod, Callable[[Histogram], Range]] = {
    RangeMethod.MINMAX: _minmax,
    RangeMethod.PERCENTILE: _percentile,
    RangeMethod.ENTROPY: _entropy,
    RangeMethod.MSE: _power(2),
    RangeMethod.L3: _power(3),
}
