"""Shift of scores per class, and the threshold that keeps the operating point."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.matching import equivalent_threshold, score_drift


def found(*items: tuple[float, float, int]) -> Detections:
    """(left edge, score, label) each: boxes of 10 x 10."""
    boxes = np.float32([[x, 0, x + 10, 10] for x, _, _ in items]).reshape(-1, 4)
    return Detections(boxes, np.float32([s for _, s, _ in items]), np.int64([c for *_, c in items]))


def test_shift_is_per_class() -> None:
    reference = [found((0, 0.9, 0), (50, 0.8, 1), (90, 0.6, 0))]
    quantized = [found((0, 0.8, 0), (51, 0.85, 1), (90, 0.5, 0))]
    drift = score_drift(reference, quantized, class_names=("red", "white"))
    assert [(c.name, c.matched) for c in drift.classes] == [("red", 2), ("white", 1)]
    assert drift.classes[0].mean_shift == pytest.approx(-0.1, abs=1e-4)
    assert drift.classes[1].mean_shift == pytest.approx(0.05, abs=1e-4)


def test_objects_that_do_not_overlap_are_not_matched() -> None:
    drift = score_drift([found((0, 0.9, 0))], [found((30, 0.4, 0))], class_names=("red",))
    assert drift.classes[0].matched == 0


def test_each_object_is_matched_once() -> None:
    drift = score_drift([found((0, 0.9, 0), (1, 0.8, 0))], [found((0, 0.7, 0))], class_names=("red",))
    assert drift.classes[0].matched == 1


def test_names_are_by_label_and_unseen_classes_are_left_out() -> None:
    names = ("background", "red", "unused", "white")
    drift = score_drift([found((0, 0.9, 1))], [found((0, 0.8, 1), (50, 0.7, 3))], class_names=names)
    assert [c.name for c in drift.classes] == ["red", "white"]


def test_threshold_lets_as_many_pass() -> None:
    reference = np.float32([0.9, 0.7, 0.35, 0.25, 0.1])
    quantized = reference - np.float32(0.1)
    threshold = equivalent_threshold(reference, quantized, threshold=0.3)
    assert (quantized > threshold).sum() == (reference > 0.3).sum() == 3
    assert threshold == pytest.approx((0.25 + 0.15) / 2)


def test_unmoved_scores_keep_the_threshold() -> None:
    scores = np.float32([0.9, 0.5, 0.1])
    assert equivalent_threshold(scores, scores + np.float32(0.001), threshold=0.3) == 0.3


def test_equivalents_are_given_where_detections_decide_them() -> None:
    scores = np.linspace(0.1, 0.62, 53)
    places = range(0, 53 * 20, 20)
    reference = found(*((x, float(s), 0) for x, s in zip(places, scores, strict=True)))
    quantized = found(*((x, float(s) - 0.105, 0) for x, s in zip(places, scores, strict=True)))
    drift = score_drift([reference], [quantized], class_names=("red",))
    assert [t for t, _ in drift.equivalents] == [0.2, 0.3, 0.4, 0.5]  # 3 detections exceed 0.6
    for threshold, equivalent in drift.equivalents:
        assert equivalent == pytest.approx(threshold - 0.1, abs=0.011)
        assert (quantized.scores > equivalent).sum() == (reference.scores > threshold).sum()


def test_no_detections_at_all() -> None:
    drift = score_drift([found()], [found()], class_names=("red",))
    assert (drift.threshold, drift.classes, drift.equivalents) == (0.3, (), ())


def test_numbers_of_images_must_agree() -> None:
    with pytest.raises(ConfigError, match="1 and 0 were given"):
        score_drift([found()], [], class_names=("red",))
