"""Score thresholds of classes, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_deploy.accuracy.coco import ClassMatches
from fcos_deploy.accuracy.operating_point import OperatingGoal, OperatingPoint, operating_points
from fcos_deploy.core.errors import ConfigError


def matches(scores: list[float], correct: str, *, ignored: str = "", positives: int = 4) -> ClassMatches:
    """One detection an image, best first; ``correct`` and ``ignored`` have a ``1`` for each that is."""
    count = len(scores)

    def flags(text: str) -> np.ndarray:
        return np.tile(np.array([mark == "1" for mark in text.ljust(count, "0")], np.bool_), (10, 1))

    objects = np.zeros(max(count, positives), np.int64)
    objects[:positives] = 1
    return ClassMatches(np.arange(count), np.float32(scores), flags(correct), flags(ignored), objects)


def point(match: ClassMatches, **goal: float) -> OperatingPoint:
    (found,) = operating_points([match], ["cell"], goal=OperatingGoal(**goal))
    return found


@pytest.mark.parametrize(
    ("goal", "score", "precision", "recall"),
    [
        ({}, 0.45, 3 / 4, 3 / 4),  # F1 of 1, 2, 3 ... detections: 2/5, 4/6, 4/7, 6/8, 6/9
        ({"precision": 1.0}, 0.75, 1.0, 2 / 4),
        ({"precision": 0.7}, 0.45, 3 / 4, 3 / 4),
        ({"recall": 0.25}, 0.85, 1.0, 1 / 4),
        ({"recall": 0.6}, 0.45, 3 / 4, 3 / 4),
    ],
)
def test_threshold_lies_between_the_scores(
    goal: dict[str, float], score: float, precision: float, recall: float
) -> None:
    found = point(matches([0.9, 0.8, 0.7, 0.5, 0.4], "11010"), **goal)
    assert found.score == pytest.approx(score)
    assert found.precision is not None
    assert found.recall is not None
    assert (found.precision.value, found.recall.value) == (precision, recall)
    for share in (found.precision, found.recall):
        assert share.low < share.value <= share.high
        assert share.low < 1.0, "four detections do not prove a precision of 1"


def test_equal_scores_stay_together_and_a_crowd_does_not_count() -> None:
    tied = point(matches([0.9, 0.9, 0.5], "101"), precision=1.0)
    assert tied.score is None, "the first two cannot be told apart"
    crowd = point(matches([0.9, 0.8, 0.5], "101", ignored="010"), precision=1.0)
    assert crowd.precision is not None
    assert (crowd.score, crowd.precision.value) == (pytest.approx(0.25), 1.0)


@pytest.mark.parametrize(
    ("match", "goal"),
    [
        (matches([], ""), {}),
        (matches([0.9], "1", positives=0), {}),
        (matches([0.9, 0.8], "00"), {}),
        (matches([0.9, 0.8], "01"), {"recall": 0.9}),
    ],
)
def test_what_cannot_be_reached_has_no_threshold(match: ClassMatches, goal: dict[str, float]) -> None:
    assert point(match, **goal).score is None


def test_a_goal_is_one_share() -> None:
    with pytest.raises(ConfigError, match="for a precision or for a recall"):
        OperatingGoal(precision=0.9, recall=0.9)
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\], got 95"):
        OperatingGoal(precision=95)
