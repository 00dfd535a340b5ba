"""The score threshold that an application runs at: what it finds there, and how many of its detections are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import ClassMatches
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.matching import share_interval

__all__ = ["OPERATING_COLUMNS", "OperatingGoal", "OperatingPoint", "Share", "operating_points", "operating_rows"]

OPERATING_COLUMNS = ("class", "chosen by", "score", "precision", "recall", "F1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingGoal:
    """What a threshold is chosen for: the best F1, or a smallest precision or recall (0..1) with most of the other."""

    precision: float | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        if self.precision is not None and self.recall is not None:
            raise ConfigError(
                "A score threshold is chosen for a precision or for a recall.",
                hint="give --at-precision or --at-recall",
            )
        for name, value in (("precision", self.precision), ("recall", self.recall)):
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigError(f"The {name} must be in (0, 1], got {value}.", hint=f"--at-{name} 0.95, for example")

    def __str__(self) -> str:
        if self.precision is not None:
            return f"precision {self.precision:g}"
        return "best F1" if self.recall is None else f"recall {self.recall:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share in 0..1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """One class at the threshold that the goal asks for, at IoU 0.5.

    ``score``: detections with more are kept; it lies halfway between two scores that were seen. None, with the rest:
    the class has no object, or no threshold reaches the goal.
    """

    name: str
    goal: str
    score: float | None = None
    precision: Share | None = None
    recall: Share | None = None
    f1: float | None = None


def operating_points(
    matches: Sequence[ClassMatches], class_names: Sequence[str], *, goal: OperatingGoal | None = None
) -> tuple[OperatingPoint, ...]:
    """One point for each class."""
    goal = goal or OperatingGoal()
    return tuple(_point(match, name, goal) for match, name in zip(matches, class_names, strict=True))


def operating_rows(points: Sequence[OperatingPoint]) -> list[tuple[str, ...]]:
    """Lines of a table, as ``OPERATING_COLUMNS`` names it."""
    return [
        (
            point.name,
            point.goal,
            _number(point.score),
            *(f"{s.value:.3f} ({s.low:.3f} to {s.high:.3f})" if s else "-" for s in (point.precision, point.recall)),
            _number(point.f1),
        )
        for point in points
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _point(match: ClassMatches, name: str, goal: OperatingGoal) -> OperatingPoint:
    nothing = OperatingPoint(name=name, goal=str(goal))
    objects = int(match.positives.sum())
    counted = ~match.ignored[0]  # Detections in a crowd are neither right nor wrong.
    scores, correct, image = match.scores[counted], match.correct[0][counted], match.image[counted]
    if not objects or not len(scores):
        return nothing
    # A threshold keeps all detections of one score or none: only the last of equal scores ends a choice.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    right = np.cumsum(correct)[ends]
    precision, recall = right / (ends + 1), right / objects
    f1 = 2 * right / (ends + 1 + objects)
    chosen = _choose(precision, recall, f1, goal)
    if chosen is None:
        return nothing
    kept = int(ends[chosen]) + 1
    following = float(scores[kept]) if kept < len(scores) else 0.0
    return OperatingPoint(
        name=name,
        goal=str(goal),
        score=(float(scores[kept - 1]) + following) / 2,
        precision=_share(correct[:kept], image[:kept], np.bincount(image[:kept], minlength=len(match.positives))),
        recall=_share(correct[:kept], image[:kept], match.positives),
        f1=float(f1[chosen]),
    )


def _choose(
    precision: NDArray[np.float64], recall: NDArray[np.float64], f1: NDArray[np.float64], goal: OperatingGoal
) -> int | None:
    """Position of the threshold; None where none reaches the goal. Of equals the higher threshold is taken."""
    if goal.recall is not None:
        reached = np.flatnonzero(recall >= goal.recall)
        return int(reached[0]) if len(reached) else None  # Recall only grows: the first has the highest threshold.
    if goal.precision is not None:
        reached = np.flatnonzero(precision >= goal.precision)
        return int(reached[np.argmax(recall[reached])]) if len(reached) else None
    return int(np.argmax(f1)) if f1.max() > 0 else None


def _share(correct: NDArray[np.bool_], image: NDArray[np.int64], due: NDArray[np.int64]) -> Share:
    """The share of ``due`` (images,) that is right."""
    right = np.bincount(image[correct], minlength=len(due))
    low, high = share_interval(due - right, due)
    return Share(value=float(right.sum() / due.sum()), low=low, high=high)
