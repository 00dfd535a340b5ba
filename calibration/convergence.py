"""How the ranges settle as images are added: whether there were enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.histogram import Histogram
from calibration.ranges import RangeMethod, find_range

__all__ = ["ConvergencePoint", "ConvergenceRecorder", "convergence_curve"]

_STEPS = 6


@dataclass(frozen=True, slots=True)
class ConvergencePoint:
    """After ``images`` images, how far the symmetric ranges are from the final ones, as shares of those."""

    images: int
    median_change: float
    largest_change: float


class ConvergenceRecorder:
    """Notes every tensor's range after 1, 2, 4, ... images of a pass."""

    def __init__(self, total: int, *, method: RangeMethod) -> None:
        self._method = method
        self._stops = set(stops(total))
        self._seen: dict[int, dict[str, float]] = {}

    def __call__(self, done: int, histograms: dict[str, Histogram]) -> None:
        """Look at the histograms after ``done`` images."""
        if done in self._stops:
            self._seen[done] = {n: find_range(h, self._method).amax for n, h in histograms.items() if h.amax > 0}

    def curve(self) -> tuple[ConvergencePoint, ...]:
        """One point a stop, the last of which is the final state."""
        return convergence_curve(self._seen)


def stops(total: int) -> Iterator[int]:
    """``total`` and its halves down to one image, at most ``_STEPS`` of them."""
    for _ in range(_STEPS):
        yield total
        if total <= 1:
            return
        total //= 2


def convergence_curve(seen: dict[int, dict[str, float]]) -> tuple[ConvergencePoint, ...]:
    """Compare each stop's ranges with the last stop's."""
    if not seen:
        return ()
    final = seen[max(seen)]
    return tuple(_point(images, seen[images], final) for images in sorted(seen))


def _point(images: int, ranges: dict[str, float], final: dict[str, float]) -> ConvergencePoint:
    changes: Sequence[float] = [abs(ranges[name] / value - 1.0) for name, value in final.items() if name in ranges]
    return ConvergencePoint(images, round(float(np.median(changes)), 5), round(float(np.max(changes)), 5))
