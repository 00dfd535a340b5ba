"""Pairs of detections of two detectors, and how far INT8 moves scores."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import (
    Distribution,
    MatchOptions,
    compare_detections,
    equivalent_threshold,
    match_detections,
    score_drift,
)


def detections(rows: list[tuple[list[float], float, int]]) -> Detections:
    return Detections(
        np.array([r[0] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows], np.int64),
    )


def test_the_best_score_takes_the_largest_overlap_and_the_next_what_is_left() -> None:
    reference = detections([([0, 0, 10, 10], 0.9, 0), ([0, 0, 10, 7], 0.6, 0)])
    candidate = detections([([0, 0, 10, 8], 0.5, 0), ([0, 0, 10, 8], 0.8, 0)])
    match = match_detections(reference, candidate)
    # Both overlap 70 / 80 with the second of the reference and 80 / 100 with the first.
    assert (match.reference.tolist(), match.candidate.tolist()) == ([0, 1], [0, 1])
    assert match.iou.tolist() == pytest.approx([0.8, 0.875])


def test_scores_that_differ_too_much_are_not_paired() -> None:
    reference, candidate = detections([([0, 0, 9, 9], 0.9, 0)]), detections([([0, 0, 9, 9], 0.7, 0)])
    assert len(match_detections(reference, candidate, options=MatchOptions(max_score_delta=0.25)).reference) == 1
    match = match_detections(reference, candidate, options=MatchOptions(max_score_delta=0.15))
    assert (match.missed.tolist(), match.extra.tolist()) == ([0], [0])


def test_identical_detections_all_match() -> None:
    found = detections([([0, 0, 10, 10], 0.9, 1), ([5, 5, 30, 40], 0.5, 0)])
    match = match_detections(found, found)
    assert match.reference.tolist() == match.candidate.tolist() == [0, 1]
    assert match.iou.tolist() == [1.0, 1.0]
    assert not len(match.missed)
    assert not len(match.extra)


def test_boxes_that_were_clipped_to_a_line_match_themselves() -> None:
    lines = np.array([[0, 5, 0, 9], [3, 12, 8, 12]], np.float32)
    both = Detections(lines, np.array([0.9, 0.8], np.float32), np.array([1, 2]))
    match = match_detections(both, both)
    assert match.iou.tolist() == [1.0, 1.0]


def test_another_label_is_missed_and_extra() -> None:
    reference = detections([([0, 0, 10, 10], 0.9, 1)])
    candidate = detections([([0, 0, 10, 10], 0.9, 2)])
    match = match_detections(reference, candidate)
    assert match.missed.tolist() == [0]
    assert match.extra.tolist() == [0]


def test_a_partner_below_the_threshold_still_counts() -> None:
    reference = detections([([0, 0, 10, 10], 0.21, 0)])
    candidate = detections([([0, 0, 10, 10], 0.19, 0)])
    agreement = compare_detections({1: reference}, {1: candidate}, options=MatchOptions(min_score=0.2))
    assert (agreement.missed, agreement.extra, agreement.match_rate) == (0, 0, 1.0)


def test_deltas_are_candidate_minus_reference_and_the_largest_edge() -> None:
    reference = detections([([0, 0, 10, 10], 0.8, 0), ([50, 50, 90, 90], 0.6, 0)])
    candidate = detections([([0, 0, 10, 11], 0.7, 0), ([49, 52, 90, 90], 0.6, 0)])
    agreement = compare_detections({7: reference}, {7: candidate})
    assert agreement.matched == 2
    assert agreement.score_delta.max_abs == pytest.approx(0.1, abs=1e-6)
    assert agreement.score_delta.mean == pytest.approx(-0.05, abs=1e-6)
    assert agreement.box_delta_px.max_abs == pytest.approx(2.0)
    # IoU: 100 / 110, and 1520 / 1638 (the second is 41 wide and 38 high against 40 x 40).
    assert agreement.iou.mean == pytest.approx((100 / 110 + 1520 / (1600 + 41 * 38 - 1520)) / 2)


def test_match_rate_counts_both_sides() -> None:
    reference = detections([([0, 0, 10, 10], 0.8, 0), ([50, 50, 90, 90], 0.6, 0)])
    candidate = detections([([0, 0, 10, 10], 0.8, 0), ([200, 200, 220, 220], 0.9, 0)])
    agreement = compare_detections({1: reference}, {1: candidate})
    assert (agreement.matched, agreement.missed, agreement.extra) == (1, 1, 1)
    assert agreement.match_rate == pytest.approx(0.5)


def test_images_without_detections_agree() -> None:
    agreement = compare_detections({1: detections([])}, {1: detections([])})
    assert agreement.match_rate == 1.0
    assert agreement.empty, "so that no table shows the rate"
    assert agreement.match_interval == (0.0, 1.0)
    assert agreement.score_delta.count == 0


def test_the_share_that_agrees_is_certain_where_every_detection_is_the_same() -> None:
    found = {number: detections([([0, 0, 10, 10], 0.8, 0)]) for number in range(3)}
    moved = {number: detections([([0.5, 0, 10.5, 10], 0.8, 0)]) for number in range(3)}
    assert compare_detections(found, found).match_interval == (1.0, 1.0)
    low, high = compare_detections(found, moved).match_interval
    assert low < 0.6
    assert high == 1.0


def test_other_images_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="same images"):
        compare_detections({1: detections([])}, {2: detections([])})


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="IoU"):
        MatchOptions(iou_threshold=0.0)


def test_distribution_of_known_numbers() -> None:
    summary = Distribution.of(np.arange(-10.0, 11.0))
    assert (summary.count, summary.mean, summary.p50, summary.p95, summary.max_abs) == (21, 0.0, 0.0, 9.0, 10.0)


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
