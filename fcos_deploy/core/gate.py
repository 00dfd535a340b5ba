"""The limits that a deployed detector must keep, what a judgement can come to, and what its images leave open."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError

__all__ = [
    "Finding",
    "Gate",
    "Judge",
    "Outcome",
    "Severity",
    "interval_outcome",
    "overall_outcome",
    "undecided_because",
]


class Outcome(StrEnum):
    """What a judgement came to; ``inconclusive``: the data cannot decide, which says nothing against the model."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


class Judge(StrEnum):
    """What must keep a limit: the whole 95 % ``interval`` of a figure, or the ``point`` estimate alone."""

    INTERVAL = "interval"
    POINT = "point"


def interval_outcome(low: float, high: float, *, at_most: float) -> Outcome:
    """Passed when the whole interval keeps the limit, failed when none of it does, otherwise inconclusive.

    With an interval that covers the true figure in 95 % of all data sets, half of its misses are too low: a figure
    beyond the limit passes in 2.5 % of them.
    """
    if high <= at_most:
        return Outcome.PASSED
    return Outcome.FAILED if low > at_most else Outcome.INCONCLUSIVE


def overall_outcome(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Failed when one failed, else inconclusive when one is, else passed; None when nothing was judged."""
    every = set(outcomes)
    return next((o for o in (Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.PASSED) if o in every), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits; None leaves a quantity unjudged.

    ``max_map_drop``: AP of the reference minus AP of the candidate, in 0..1 (0.01 is one AP point).
    ``min_ap``: AP itself. ``judge``: whether the confidence interval or the measured figure must keep a limit.
    ``max_precision_drop``, ``max_recall_drop``: as ``max_map_drop``, of the mean precision and recall of the classes at
    their score thresholds.

    ``min_match_rate``: share of the detections of both detectors that are paired, in 0..1.
    ``min_iou``: overlap that a pair needs; None is 0.5. ``max_score_delta`` (in 0..1) and ``max_box_delta_px`` (image
    pixels): how far the two of a pair may differ. In an evaluation they bound percentiles, the 5th and 95th of the
    scores' differences and the 95th of the boxes'; golden detections whose scores differ by more are not paired at all.
    """

    max_map_drop: float | None = None
    min_ap: float | None = None
    max_precision_drop: float | None = None
    max_recall_drop: float | None = None
    min_match_rate: float | None = None
    min_iou: float | None = None
    max_score_delta: float | None = None
    max_box_delta_px: float | None = None
    judge: Judge = Judge.INTERVAL

    def __post_init__(self) -> None:
        shares = ("max_map_drop", "min_ap", "max_precision_drop", "max_recall_drop", "min_match_rate")
        for name in (*shares, "min_iou", "max_score_delta"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is a share of 1, so it must be in [0, 1], got {value}.")
        if self.max_box_delta_px is not None and not self.max_box_delta_px >= 0:
            raise ConfigError(f"max_box_delta_px must not be negative, got {self.max_box_delta_px}.")

    @property
    def has_limits(self) -> bool:
        """Whether anything is judged."""
        return self != Gate(judge=self.judge)


class Severity(StrEnum):
    """``warning``: to be known. ``inconclusive``: no verdict on these images can be passed. ``refused``: no run."""

    WARNING = "warning"
    INCONCLUSIVE = "inconclusive"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``kind``: its name for machines, such as ``overlap``. ``message``: half a sentence for people."""

    kind: str
    severity: Severity
    message: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self.message}"


def undecided_because(findings: Iterable[Finding]) -> str:
    """Why no verdict can be passed, as half a sentence; empty when nothing stands in the way."""
    return "; ".join(finding.message for finding in findings if finding.severity is Severity.INCONCLUSIVE)
