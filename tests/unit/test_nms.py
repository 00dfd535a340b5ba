"""Suppression against a plain reference, and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_deploy.core.decode import best_first
from fcos_deploy.core.detections import Suppression, suppress

pytestmark = pytest.mark.usefixtures("host_path")


def plain_iou(a: list[float], b: list[float], *, offset: float) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(width, 0.0) * max(height, 0.0)
    area_a, area_b = ((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    union = area_a + area_b - inter
    return inter / union if union > 0 else 0.0


def plain_suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, rule: Suppression) -> list[int]:
    corners = boxes.astype(float).tolist()
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        overlaps = (
            plain_iou(corners[index], corners[k], offset=rule.iou_offset) for k in kept if labels[k] == labels[index]
        )
        if not any(iou > rule.iou_threshold for iou in overlaps):
            kept.append(index)
    if len(kept) > rule.limit:
        last = scores[kept[rule.limit - 1]]
        kept = [k for k in kept if scores[k] >= last] if rule.keep_ties else kept[: rule.limit]
    return kept


def random_boxes(count: int, *, seed: int, spread: float = 200.0, whole: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, spread, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(0, 80, (count, 2))), axis=1)
    return (boxes.round() if whole else boxes).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 420),
    classes=st.sampled_from([1, 2, 5, 80]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([5.0, 60.0, 400.0]),
    whole=st.booleans(),
    levels=st.sampled_from([0, 3, 10]),
    threshold=st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.95, 1.0]),
    offset=st.sampled_from([0.0, 1.0]),
    limit=st.sampled_from([1, 7, 100, 1000]),
    keep_ties=st.booleans(),
)
def test_same_as_plain_greedy_suppression(
    count: int,
    classes: int,
    seed: int,
    spread: float,
    whole: bool,
    levels: int,
    threshold: float,
    offset: float,
    limit: int,
    keep_ties: bool,
) -> None:
    """Few distinct scores and whole coordinates make ties and overlaps of exactly the threshold frequent."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(count, seed=seed, spread=spread, whole=whole)
    scores = rng.random(count).astype(np.float32)
    if levels:
        scores = (scores * levels).round().astype(np.float32) / np.float32(levels)
    labels = rng.integers(0, classes, count)
    rule = Suppression(iou_threshold=threshold, limit=limit, iou_offset=offset, keep_ties=keep_ties)
    found = suppress(boxes, scores, labels=labels, rule=rule)
    assert found.tolist() == plain_suppress(boxes, scores, labels, rule)


def test_long_chain_over_several_blocks() -> None:
    """Each box overlaps the next one only, so that every second stays; which ones, hangs on all before."""
    left = np.arange(1000, dtype=np.float32) * 10
    boxes = np.stack((left, np.zeros(1000), left + 15, np.full(1000, 10.0)), axis=1).astype(np.float32)
    scores = np.linspace(1, 0.1, 1000, dtype=np.float32)
    rule = Suppression(iou_threshold=0.15, limit=1000)  # they overlap by 5 / 25
    kept = suppress(boxes, scores, labels=np.zeros(1000, np.int64), rule=rule)
    assert kept.tolist() == list(range(0, 1000, 2))


def test_overlap_of_exactly_the_threshold_stays() -> None:
    # 3 of 5 pixels in common: 0.6, which float32 rounds up.
    boxes = np.float32([[0, 0, 4, 1], [1, 0, 5, 1]])
    rule = Suppression(iou_threshold=0.6, limit=10)
    assert suppress(boxes, np.float32([0.9, 0.8]), labels=np.int64([0, 0]), rule=rule).tolist() == [0, 1]


def test_offset_counts_pixels_as_tianzhi_does() -> None:
    # Without the offset 8 / 12, with it 9 * 2 / (11 * 2 + 11 * 2 - 9 * 2) = 18 / 26.
    boxes = np.float32([[0, 0, 10, 1], [2, 0, 12, 1]])
    scores, labels = np.float32([0.9, 0.8]), np.int64([0, 0])
    plain, counted = (Suppression(iou_threshold=0.68, limit=10, iou_offset=o) for o in (0.0, 1.0))
    assert suppress(boxes, scores, labels=labels, rule=plain).tolist() == [0, 1]
    assert suppress(boxes, scores, labels=labels, rule=counted).tolist() == [0]


def test_far_apart_coordinates_do_not_cost_precision() -> None:
    """The offset trick adds label * max_coordinate, which moves borderline overlaps; this must not happen here."""
    base = np.float32([[1000, 1000, 1010.001, 1010.001], [1000.002, 1000, 1010.003, 1010.001]])
    boxes = np.concatenate((base, base, np.float32([[0, 0, 60000, 60000]])))
    labels = np.int64([0, 0, 79, 79, 5])
    scores = np.float32([0.9, 0.8, 0.7, 0.6, 0.5])
    rule = Suppression(iou_threshold=0.9998, limit=10)
    assert suppress(boxes, scores, labels=labels, rule=rule).tolist() == plain_suppress(boxes, scores, labels, rule)


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = np.float32([[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]])
    rule = Suppression(iou_threshold=0.1, limit=10)
    kept = suppress(boxes, np.float32([0.9, 0.8, 0.7]), labels=np.int64([0, 0, 0]), rule=rule)
    assert kept.tolist() == [0, 1, 2]


def test_ties_with_the_last_one_stay_on_request() -> None:
    boxes = random_boxes(5, seed=1, spread=10_000)
    scores, labels = np.float32([0.9, 0.5, 0.5, 0.5, 0.4]), np.zeros(5, np.int64)
    cut, tied = (Suppression(iou_threshold=0.5, limit=2, keep_ties=k) for k in (False, True))
    assert suppress(boxes, scores, labels=labels, rule=cut).tolist() == [0, 1]
    assert suppress(boxes, scores, labels=labels, rule=tied).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", [None, 1, 10, 499, 500, 900])
def test_best_first_is_stable(limit: int | None) -> None:
    scores = np.random.default_rng(0).integers(0, 20, 500).astype(np.float32) / 7
    expected = np.argsort(-scores, kind="stable")[:limit]
    assert best_first(scores, limit=limit).tolist() == expected.tolist()
