"""Pairing the detections of two detectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fcos_deploy.accuracy.matching import Distribution, MatchOptions, assign, compare_detections, match_detections
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError


def detections(rows: list[tuple[list[float], float, int]]) -> Detections:
    return Detections(
        np.array([r[0] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows], np.int64),
    )


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (12, 12), (40, 25)])
@pytest.mark.parametrize("seed", range(4))
def test_assignment_is_as_good_as_scipys(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, shape) * (rng.uniform(size=shape) < 0.4)
    rows, columns = assign(weights)
    best = linear_sum_assignment(weights, maximize=True)
    assert weights[rows, columns].sum() == pytest.approx(weights[best].sum())
    assert len(set(rows)) == len(rows)
    assert len(set(columns)) == len(columns)
    assert (weights[rows, columns] > 0).all()


def test_assignment_beats_a_greedy_choice() -> None:
    weights = np.array([[1.9, 1.8], [1.8, 0.0]])
    rows, columns = assign(weights)
    assert list(zip(rows, columns, strict=True)) == [(0, 1), (1, 0)]


def test_assignment_equals_exhaustive_search() -> None:
    rng = np.random.default_rng(5)
    weights = rng.uniform(0, 2, (5, 5))
    best = max(sum(weights[i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
    rows, columns = assign(weights)
    assert weights[rows, columns].sum() == pytest.approx(best)


def test_nothing_to_assign() -> None:
    rows, columns = assign(np.zeros((0, 4)))
    assert len(rows) == len(columns) == 0


def test_identical_detections_all_match() -> None:
    found = detections([([0, 0, 10, 10], 0.9, 1), ([5, 5, 30, 40], 0.5, 0)])
    match = match_detections(found, found)
    assert match.reference.tolist() == match.candidate.tolist() == [0, 1]
    assert match.iou.tolist() == [1.0, 1.0]
    assert not len(match.missed)
    assert not len(match.invented)


def test_boxes_that_were_clipped_to_a_line_match_themselves() -> None:
    lines = np.array([[0, 5, 0, 9], [3, 12, 8, 12]], np.float32)
    both = Detections(lines, np.array([0.9, 0.8], np.float32), np.array([1, 2]))
    match = match_detections(both, both)
    assert match.iou.tolist() == [1.0, 1.0]


def test_another_label_is_a_miss_and_an_invention() -> None:
    reference = detections([([0, 0, 10, 10], 0.9, 1)])
    candidate = detections([([0, 0, 10, 10], 0.9, 2)])
    match = match_detections(reference, candidate)
    assert match.missed.tolist() == [0]
    assert match.invented.tolist() == [0]


def test_a_partner_below_the_threshold_still_counts() -> None:
    reference = detections([([0, 0, 10, 10], 0.21, 0)])
    candidate = detections([([0, 0, 10, 10], 0.19, 0)])
    agreement = compare_detections({1: reference}, {1: candidate}, options=MatchOptions(min_score=0.2))
    assert (agreement.missed, agreement.invented, agreement.match_rate) == (0, 0, 1.0)


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
    assert (agreement.matched, agreement.missed, agreement.invented) == (1, 1, 1)
    assert agreement.match_rate == pytest.approx(0.5)


def test_images_without_detections_agree() -> None:
    agreement = compare_detections({1: detections([])}, {1: detections([])})
    assert agreement.match_rate == 1.0
    assert agreement.score_delta.count == 0


def test_other_images_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match="same images"):
        compare_detections({1: detections([])}, {2: detections([])})


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="IoU"):
        MatchOptions(iou_threshold=0.0)


def test_distribution_of_known_numbers() -> None:
    summary = Distribution.of(np.arange(-10.0, 11.0))
    assert (summary.count, summary.mean, summary.p50, summary.p95, summary.max_abs) == (21, 0.0, 0.0, 9.0, 10.0)
