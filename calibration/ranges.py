"""From values to ranges: what calibration measures of a tensor, and the methods that find a range in it.

A graph that hands out its activations holds all of them until the inference ends: gigabytes for a ResNet-50 at
800x1333. A graph that measures them itself hands out half a megabyte of each at most, whatever the image's size, so
that one inference is enough.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import CalibrationError, unknown_name
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_file import with_outputs

__all__ = [
    "BINS",
    "DEFAULT_METHOD",
    "SAMPLES",
    "Histogram",
    "Range",
    "RangeMethod",
    "TensorSample",
    "find_range",
    "in_order_of_release",
    "measure",
    "measuring_model",
    "range_method",
    "read_sample",
]

onnx = lazy_import("onnx", extra="export")
cv2 = lazy_import("cv2", extra="onnxruntime")
Floats = NDArray[np.float64]


# Values of one tensor of one image that enter its histogram.
SAMPLES = 1 << 17
_MARK = "fcos_deploy.statistics"  # begins the names of everything that is added to a graph


@dataclass(frozen=True, slots=True)
class TensorSample:
    """A tensor of one image.

    ``values``: (n,) float32, evenly spaced ones in the tensor's order. ``minimum``, ``maximum``: of all of its values.
    ``channel_means``: (channels,) float64 of a tensor (n, channels, h, w), empty for others. ``finite``: whether no
    value is NaN or infinite.
    """

    values: NDArray[np.float32]
    minimum: float
    maximum: float
    channel_means: NDArray[np.float64]
    finite: bool


def _step(size: int, samples: int) -> int:
    """From one counted value to the next: 1 while there are at most ``samples``."""
    # ceil(size / samples), made odd: an even step would see the same columns of every row of an even-width map.
    return -(-size // samples) | 1 if size > samples else 1


def measure(values: NDArray[np.float32], *, samples: int = SAMPLES) -> TensorSample:
    """Of an array of any shape with at least one value; about ``samples`` values are kept."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    means = values.reshape(*values.shape[:2], -1).mean(2).mean(0) if values.ndim == 4 else np.zeros(0)
    low, high = float(flat.min()), float(flat.max())
    return TensorSample(
        np.ascontiguousarray(flat[:: _step(flat.size, samples)]),
        low,
        high,
        means.astype(np.float64),
        math.isfinite(low) and math.isfinite(high),
    )


def measuring_model(model: Any, names: Sequence[str], *, samples: int = SAMPLES) -> Any:  # onnx.ModelProto, untyped
    """A copy of the model whose outputs are ``measure`` of the named float tensors; ``read_sample`` reads them.

    The step between samples is computed in the graph where the shape follows the image.
    """
    copy = with_outputs(model, (f"{_MARK}.{part}:{name}" for name in names for part in _PARTS))
    known = [*onnx.shape_inference.infer_shapes(model).graph.value_info, *model.graph.output]
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in known}
    writer = _StatisticsWriter(samples)
    for name in names:
        writer.add(name, shapes.get(name, []))
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:  # Each tensor's statistics stand right behind the node that makes it.
        copy.graph.node.append(node)
        for output in node.output:
            copy.graph.node.extend(writer.nodes.get(output, []))
    copy.graph.initializer.extend(writer.constants.values())
    return copy


_PARTS = ("samples", "min", "max", "means")


class _StatisticsWriter:
    """The nodes that measure tensors, by tensor, and the constants that they share."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.nodes: dict[str, list[Any]] = defaultdict(list)
        self.constants: dict[int, Any] = {}

    def add(self, tensor: str, shape: Sequence[int]) -> None:
        """``shape``: a 0 for each dimension that is not known; empty when the rank is not known either."""

        def node(operator: str, *inputs: str, part: str, **attributes: int) -> str:
            output = f"{_MARK}.{part}:{tensor}"
            self.nodes[tensor].append(onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
            return output

        flat = node("Reshape", tensor, self._constant(-1), part="flat")
        node("ReduceMin", flat, part="min", keepdims=0)
        node("ReduceMax", flat, part="max", keepdims=0)
        if len(shape) == 4:
            node("GlobalAveragePool", tensor, part="means")
        else:
            node("ReduceMean", flat, part="means", keepdims=0)
        size = math.prod(shape)
        if shape and size:
            step = self._constant(_step(size, self._samples))
        else:  # As _step: ceil(size / samples) | 1, which is 1 for a size of up to samples.
            rounded = node("Add", node("Shape", flat, part="size"), self._constant(self._samples - 1), part="rounded")
            quotient = node("Div", rounded, self._constant(self._samples), part="quotient")
            odd = node("Mod", quotient, self._constant(2), part="odd")
            even = node("Sub", quotient, odd, part="even")
            step = node("Add", even, self._constant(1), part="step")
        end = self._constant(int(np.iinfo(np.int64).max))
        node("Slice", flat, self._constant(0), end, self._constant(0), step, part="samples")

    def _constant(self, value: int) -> str:
        """The name of an int64 (1,) with this value."""
        name = f"{_MARK}.constant:{value}"
        self.constants[value] = onnx.numpy_helper.from_array(np.array([value], np.int64), name)
        return name


def read_sample(outputs: Tensors, name: str) -> TensorSample:
    """A tensor's sample out of the outputs of ``measuring_model``."""
    values, low, high, means = (outputs[f"{_MARK}.{part}:{name}"] for part in _PARTS)
    return TensorSample(
        np.ascontiguousarray(values),
        float(low),
        float(high),
        means.reshape(*means.shape[:2]).mean(0, dtype=np.float64) if means.ndim == 4 else np.zeros(0),
        # Minimum and maximum may pass over a NaN; a mean does not.
        bool(np.isfinite(means).all()) and math.isfinite(low) and math.isfinite(high),
    )


def in_order_of_release(model: Any) -> Any:  # onnx.ModelProto, untyped
    """Put the nodes of a measuring model into the order in which its tensors can be released soonest, in place.

    A tensor is measured, and brought into the layout for that, before the network goes on. ONNX Runtime's own order
    leaves both to the end, when every tensor of the network is still held.
    """
    nodes = list(model.graph.node)
    maker = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    readers: dict[int, list[int]] = defaultdict(list)
    missing = []
    for index, node in enumerate(nodes):
        sources = {maker[name] for name in node.input if name in maker}
        missing.append(len(sources))
        for source in sources:
            readers[source].append(index)

    def rank(index: int) -> tuple[bool, int]:
        node = nodes[index]
        # ReorderOutput: ONNX Runtime's operator from its blocked layout back to the graph's.
        return not (node.output[0].startswith(_MARK) or node.op_type == "ReorderOutput"), index

    ready = [rank(index) for index, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    del model.graph.node[:]
    while ready:
        _, index = heapq.heappop(ready)
        model.graph.node.append(nodes[index])
        for reader in readers[index]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, rank(reader))
    return model


# Bins for each sign. The largest magnitude always lies in the upper half, so that at least 2048 bins resolve it: eight
# for each of the 256 levels that a quantizer has.
BINS = 4096
_CHUNK = 1 << 22  # cv2.calcHist counts in float32, which holds every whole number up to 2^24


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
        zeros = flat.size - int(np.count_nonzero(flat))
        self.zeros += zeros
        self.elements += flat.size
        if zeros == flat.size:
            return
        self._widen(max(-low, high))
        reach = BINS * self.width
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            if low >= 0:
                self.positive += _count(chunk, 0.0, reach, bins=BINS)
                continue
            counts = _count(chunk, -reach, reach, bins=2 * BINS)
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


def _count(values: NDArray[np.float32], low: float, high: float, *, bins: int) -> NDArray[np.int64]:
    """(bins,) counts of the values in [low, high)."""
    counts: NDArray[np.int64] = cv2.calcHist([values.reshape(1, -1)], [0], None, [bins], [low, high])
    return counts.reshape(-1).astype(np.int64)


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
