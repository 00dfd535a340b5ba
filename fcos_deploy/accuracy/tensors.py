"""How far a tensor is from the one that it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import ComputeType
from fcos_deploy.core.enums import Precision

__all__ = ["TensorDifference", "Tolerance", "measure_difference", "tolerance_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """``max_abs`` and ``mean_abs`` in the tensor's own unit; ``relative`` is ``max_abs`` over the reference's RMS.

    ``sqnr_db``: signal to difference in decibels, infinite (None) when equal; ``bits``: the mantissa bits that a
    rounding of this size leaves. ``where``: index of the largest difference; ``image``: on which image it was.
    """

    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    sqnr_db: float | None
    where: tuple[int, ...]
    image: str

    @property
    def bits(self) -> float:
        """log2 of the signal over the difference (both RMS)."""
        return math.inf if self.sqnr_db is None else self.sqnr_db / (20 * math.log10(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What rounding alone may do: to a tensor, and to the detections.

    ``relative``: largest difference over RMS. ``min_sqnr_db``: least signal to difference. ``min_match_rate``: least
    share of detections that agree, in 0..1.
    """

    relative: float
    min_sqnr_db: float
    min_match_rate: float = 0.98

    def holds(self, difference: TensorDifference) -> bool:
        """Whether the difference can be rounding."""
        enough = difference.sqnr_db is None or difference.sqnr_db >= self.min_sqnr_db
        return enough and difference.relative <= self.relative


# Rounding to k mantissa bits leaves about 6.02 k + 5 dB; a network of fifty layers loses some 10 dB of it.
_BY_COMPUTE: dict[ComputeType, Tolerance] = {
    ComputeType.F32: Tolerance(relative=1e-3, min_sqnr_db=80.0),
    ComputeType.F16: Tolerance(relative=0.1, min_sqnr_db=40.0, min_match_rate=0.97),
    ComputeType.BF16: Tolerance(relative=0.5, min_sqnr_db=22.0, min_match_rate=0.95),
}
_BY_PRECISION: dict[Precision, Tolerance] = {
    Precision.FP32: Tolerance(relative=0.0, min_sqnr_db=math.inf, min_match_rate=1.0),
    Precision.FP16: _BY_COMPUTE[ComputeType.F16],
    Precision.INT8: Tolerance(relative=4.0, min_sqnr_db=10.0, min_match_rate=0.9),
}


def tolerance_for(precision: Precision, compute: ComputeType) -> Tolerance:
    """The wider of what the weights' format and the arithmetic allow."""
    by_precision, by_compute = _BY_PRECISION[precision], _BY_COMPUTE[compute]
    return Tolerance(
        relative=max(by_precision.relative, by_compute.relative),
        min_sqnr_db=min(by_precision.min_sqnr_db, by_compute.min_sqnr_db),
        min_match_rate=min(by_precision.min_match_rate, by_compute.min_match_rate),
    )


def measure_difference(
    reference: NDArray[Any], candidate: NDArray[Any], *, image: str = "", least_rms: float = 0.0
) -> TensorDifference:
    """Compare two tensors of one shape; what is not finite in one alone counts as infinitely far.

    ``least_rms``: scale that ``relative`` uses at least, for tensors that are (nearly) all zero.
    """
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    both = np.isfinite(a) & np.isfinite(b)
    delta = np.where(both, np.abs(np.where(both, a, 0) - np.where(both, b, 0)), np.where(a == b, 0.0, np.inf))
    worst = int(delta.argmax()) if delta.size else 0
    a, b = np.where(both, a, 0), np.where(both, b, 0)
    signal, noise = float((a * a).sum()), float((delta * delta).sum())
    rms = max(math.sqrt(signal / max(1, a.size)), least_rms, 1e-30)
    norms = math.sqrt(signal) * math.sqrt(float((b * b).sum()))
    largest = float(delta[worst]) if delta.size else 0.0
    return TensorDifference(
        max_abs=largest,
        mean_abs=float(delta.mean()) if delta.size else 0.0,
        relative=largest / rms,
        cosine=float(a @ b) / norms if norms else float(noise == 0),
        sqnr_db=_sqnr(max(signal, least_rms**2 * a.size), noise),
        where=tuple(int(i) for i in np.unravel_index(worst, reference.shape)) if delta.size else (),
        image=image,
    )


def _sqnr(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    return -math.inf if signal == 0 or math.isinf(noise) else 10 * math.log10(signal / noise)
