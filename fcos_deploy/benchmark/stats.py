"""Times in brief."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError

__all__ = ["LatencyStats", "StageMedians"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyStats:
    """Milliseconds of one request after another; ``minimum`` is the figure that other load disturbs least."""

    mean: float
    p50: float
    p90: float
    p99: float
    minimum: float
    maximum: float
    count: int

    @staticmethod
    def of(milliseconds: NDArray[np.float64]) -> LatencyStats:
        """Summarise (n,) times.

        Raises:
            ConfigError: there are none.
        """
        if not len(milliseconds):
            raise ConfigError("There are no times to summarise.", hint="measure at least one iteration")
        p50, p90, p99 = (float(v) for v in np.percentile(milliseconds, [50, 90, 99]))
        return LatencyStats(
            mean=float(milliseconds.mean()),
            p50=p50,
            p90=p90,
            p99=p99,
            minimum=float(milliseconds.min()),
            maximum=float(milliseconds.max()),
            count=len(milliseconds),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMedians:
    """Median milliseconds of each stage of one image."""

    preprocess: float
    infer: float
    decode: float

    @property
    def host_share(self) -> float:
        """Share of the time that is not the network, in 0..1."""
        total = self.preprocess + self.infer + self.decode
        return 1.0 - self.infer / total if total else 0.0
