"""Grids and centres of the levels, and decoding against a plain reference of every profile."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_deploy.core.decode import (
    PROFILES,
    Candidates,
    DecodeSpec,
    HeadOutputs,
    ScoreForm,
    decode,
    level_sizes,
    location_centers,
    location_strides,
)
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.errors import TensorMismatchError

pytestmark = pytest.mark.usefixtures("host_path")

SIZE = (64, 96)
STRIDES = (8, 16, 32, 64, 128)


def plain_sigmoid(x: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-x.astype(np.float32)))).astype(np.float32)


def plain_form(form: ScoreForm, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return {ScoreForm.P: p + 0 * q, ScoreForm.PQ: p * q, ScoreForm.SQRT_PQ: np.sqrt(p * q)}[form]


def plain_decode(head: HeadOutputs, spec: DecodeSpec, size: tuple[int, int]) -> Candidates:
    """Level by level, all pairs, sorted by Python."""
    profile, k = spec.profile, spec.pre_nms_top_k
    centers = location_centers(*size, strides=spec.strides, mode=profile.centers)
    start, rows = 0, []
    for height, width in level_sizes(*size, strides=spec.strides):
        end = start + height * width
        p, q = plain_sigmoid(head.cls_logits[start:end]), plain_sigmoid(head.centerness[start:end])
        gate, rank, score = (plain_form(f, p, q) for f in (profile.gate, profile.rank, profile.score))
        allowed = np.ones(end - start, bool)
        if profile.rank_per_location:
            allowed[np.argsort(-rank.max(axis=1), kind="stable")[k:]] = False
        pairs = [
            (i, c) for i, c in np.ndindex(*p.shape) if gate[i, c] > np.float32(spec.score_threshold) and allowed[i]
        ]
        pairs.sort(key=lambda pair: (-rank[pair], pair))
        kept = pairs if profile.rank_per_location else pairs[:k]
        for i, c in kept if profile.sort_by_score else sorted(kept):
            x, y = centers[start + i]
            left, top, right, bottom = head.distances[start + i].astype(np.float32)
            rows.append((x - left, y - top, x + right, y + bottom, score[i, c], c))
        start = end
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Candidates(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def random_head(*, seed: int, classes: int = 6, mean: float = -1.0, size: tuple[int, int] = SIZE) -> HeadOutputs:
    rng = np.random.default_rng(seed)
    count = sum(h * w for h, w in level_sizes(*size, strides=STRIDES))
    return HeadOutputs(
        rng.normal(mean, 2.0, (count, classes)).astype(np.float32),
        rng.uniform(0, 60, (count, 4)).astype(np.float32),
        rng.normal(0.0, 1.5, (count, 1)).astype(np.float32),
    )


def assert_same(found: Candidates, expected: Candidates) -> None:
    np.testing.assert_array_equal(found.channels, expected.channels)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-5)


@pytest.mark.parametrize("name", PROFILES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    mean=st.sampled_from([-8.0, -2.0, 1.0, 6.0]),
    classes=st.sampled_from([1, 3, 20]),
    threshold=st.sampled_from([0.0, 0.001, 0.05, 0.2, 0.5, 0.9]),
    top_k=st.sampled_from([1, 5, 40, 1000]),
)
def test_same_as_plain_decoding(name: str, seed: int, mean: float, classes: int, threshold: float, top_k: int) -> None:
    spec = DecodeSpec(
        profile=PROFILES[name], score_threshold=threshold, iou_threshold=0.6, strides=STRIDES, pre_nms_top_k=top_k
    )
    head = random_head(seed=seed, classes=classes, mean=mean)
    assert_same(decode(head, spec, input_size=SIZE), plain_decode(head, spec, SIZE))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("mean", "spread", "threshold"), [(3, 0.0, 0.01), (3, 0.3, 0.01), (-85, 0.3, 0.0)])
def test_crowded_levels_keep_exactly_the_best(name: str, mean: float, spread: float, threshold: float) -> None:
    """Every pair passes: where p decides, where the centerness does, and where their product leaves float32."""
    rng = np.random.default_rng(3)
    head = random_head(seed=4, classes=80)
    logits = (mean + spread * rng.normal(size=head.cls_logits.shape)).astype(np.float32)
    head = HeadOutputs(logits, head.distances, head.centerness - (12 if threshold == 0 else 0))
    spec = DecodeSpec(
        profile=PROFILES[name], score_threshold=threshold, iou_threshold=0.6, strides=STRIDES, pre_nms_top_k=20
    )
    assert_same(decode(head, spec, input_size=SIZE), plain_decode(head, spec, SIZE))


@pytest.mark.parametrize("name", PROFILES)
def test_ties_at_the_cut_go_by_position(name: str) -> None:
    head = random_head(seed=5, classes=80)
    equal = HeadOutputs(np.full_like(head.cls_logits, 2), head.distances, np.full_like(head.centerness, 1))
    spec = DecodeSpec(profile=PROFILES[name], score_threshold=0.05, iou_threshold=0.6, strides=STRIDES, pre_nms_top_k=7)
    assert_same(decode(equal, spec, input_size=SIZE), plain_decode(equal, spec, SIZE))


@pytest.mark.parametrize("threshold", [0.01, 0.2, 0.5, 0.8])
def test_half_precision_gives_what_its_own_values_say(threshold: float) -> None:
    head = random_head(seed=6)
    half = HeadOutputs(*(a.astype(np.float16) for a in (head.cls_logits, head.distances, head.centerness)))
    widened = HeadOutputs(*(a.astype(np.float32) for a in (half.cls_logits, half.distances, half.centerness)))
    spec = DecodeSpec(
        profile=PROFILES["adelaidet"], score_threshold=threshold, iou_threshold=0.6, strides=STRIDES, pre_nms_top_k=30
    )
    assert_same(decode(half, spec, input_size=SIZE), decode(widened, spec, input_size=SIZE))


@pytest.mark.parametrize("threshold", [0.4999999, 0.5, 0.50000006])
def test_half_precision_around_logit_zero(threshold: float) -> None:
    """Zero of both signs and the smallest halves, where comparing bits as integers changes sides."""
    head = random_head(seed=6, classes=6)
    logits = np.full_like(head.cls_logits, -9).astype(np.float16)
    logits[0] = np.float16([0.0, -0.0, 6e-8, -6e-8, 1e-3, -1e-3])
    head = HeadOutputs(logits, head.distances, head.centerness)
    spec = DecodeSpec(profile=PROFILES["mmdetection"], score_threshold=threshold, iou_threshold=0.6, strides=STRIDES)
    assert_same(decode(head, spec, input_size=SIZE), plain_decode(head, spec, SIZE))


def test_transposed_views_need_no_copy_to_be_right() -> None:
    head = random_head(seed=7)
    views = HeadOutputs(*(np.asfortranarray(a) for a in (head.cls_logits, head.distances, head.centerness)))
    spec = DecodeSpec(profile=PROFILES["detectron2"], score_threshold=0.2, iou_threshold=0.6, strides=STRIDES)
    assert_same(decode(views, spec, input_size=SIZE), decode(head, spec, input_size=SIZE))


def test_infinite_and_undefined_logits_do_not_disturb_others() -> None:
    head = random_head(seed=8)
    spec = DecodeSpec(profile=PROFILES["detectron2"], score_threshold=0.2, iou_threshold=0.6, strides=STRIDES)
    broken = head.cls_logits.copy()
    broken[3, 2], broken[5, 1], broken[7, 0] = np.nan, -np.inf, np.inf
    head = replace(head, cls_logits=broken)
    found = decode(head, spec, input_size=SIZE)
    assert np.isfinite(found.scores).all()
    q = plain_sigmoid(head.centerness[7, 0])
    assert np.isclose(found.scores, np.sqrt(q)).any()


def test_torchvision_steps_of_coarse_levels_are_floored() -> None:
    """64x96 has a 1x1 grid on P7: the centre is at 0, 0; mmdetection's is at 64, 64."""
    head = random_head(seed=9, classes=1)
    head = replace(head, cls_logits=np.full_like(head.cls_logits, -9))
    head.cls_logits[-1] = 3
    spec = DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6, strides=STRIDES)
    (torchvision,) = decode(head, spec, input_size=SIZE).boxes
    (half,) = decode(head, replace(spec, profile=PROFILES["mmdetection"]), input_size=SIZE).boxes
    np.testing.assert_allclose(half - torchvision, 64, atol=1e-4)


def test_nothing_passes() -> None:
    spec = DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.99, iou_threshold=0.6, strides=STRIDES)
    found = decode(random_head(seed=1, mean=-20), spec, input_size=SIZE)
    assert found.boxes.shape == (0, 4)
    assert found.scores.shape == found.channels.shape == (0,)


def test_locations_that_do_not_fit_the_input_are_refused() -> None:
    spec = DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6, strides=STRIDES)
    with pytest.raises(TensorMismatchError, match="64x128 input must have"):
        decode(random_head(seed=1), spec, input_size=(64, 128))


# Padded input -> grid and step (x, y) of P6 and P7 in torchvision.
TORCHVISION_STEPS = {
    (800, 1088): (((13, 17), (64, 61)), ((7, 9), (120, 114))),
    (800, 1216): (((13, 19), (64, 61)), ((7, 10), (121, 114))),
    (800, 1344): (((13, 21), (64, 61)), ((7, 11), (122, 114))),
    (608, 800): (((10, 13), (61, 60)), ((5, 7), (114, 121))),
    (640, 1280): (((10, 20), (64, 64)), ((5, 10), (128, 128))),
}


@pytest.mark.parametrize(("size", "expected"), TORCHVISION_STEPS.items())
def test_torchvision_steps_are_floored_ratios(size: tuple[int, int], expected: tuple[object, ...]) -> None:
    sizes = level_sizes(*size, strides=STRIDES)
    centers = location_centers(*size, strides=STRIDES, mode=CenterMode.TORCHVISION)
    start = sum(h * w for h, w in sizes[:3])
    levels = []
    for rows, columns in sizes[3:]:
        level = centers[start : start + rows * columns].reshape(rows, columns, 2)
        assert level[0, 0].tolist() == [0, 0]
        levels.append(((rows, columns), (int(level[0, 1, 0]), int(level[1, 0, 1]))))
        start += rows * columns
    assert tuple(levels) == expected


def test_half_centers_lie_in_the_middle_of_cells_row_by_row() -> None:
    centers = location_centers(32, 64, strides=(16, 32), mode=CenterMode.HALF)
    level = [[x, y] for y in (8, 24) for x in (8, 24, 40, 56)]
    assert centers.dtype == np.float32
    assert centers.tolist() == [*level, [16, 16], [48, 16]]


@given(height=st.integers(1, 60), width=st.integers(1, 60))
def test_each_level_is_half_of_the_finer_one_rounded_up(height: int, width: int) -> None:
    """The convolutions with stride 2 and padding 1 that make the levels."""
    sizes = level_sizes(height * 32, width * 32, strides=STRIDES)
    for (fine_h, fine_w), coarse in itertools.pairwise(sizes):
        assert coarse == ((fine_h + 1) // 2, (fine_w + 1) // 2)


@pytest.mark.parametrize("mode", CenterMode)
def test_centers_and_strides_have_one_entry_a_location(mode: CenterMode) -> None:
    count = sum(h * w for h, w in level_sizes(96, 160, strides=STRIDES))
    assert location_centers(96, 160, strides=STRIDES, mode=mode).shape == (count, 2)
    strides = location_strides(96, 160, strides=STRIDES)
    assert strides.shape == (count,)
    assert strides[0] == 8
    assert strides[-1] == 128
