"""Golden images: how they are chosen and kept, and what counts as the same detections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy.accuracy.golden import (
    MIN_EVIDENCE,
    GoldenCheck,
    GoldenResult,
    GoldenStandard,
    check_golden,
    choose_golden,
    compare_golden,
    fingerprint,
    fingerprint_difference,
    make_golden,
    read_golden_image,
)
from fcos_deploy.bundle import DEFAULT_GATES
from fcos_deploy.bundle.manifest import GoldenDetections
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BundleError, ImageError, InconclusiveError
from fcos_deploy.core.gate import Gate, Outcome
from fcos_deploy.core.preprocess import InputDtype, preprocess

Images = list[Detections]


def _images(count: int = 4, *, each: int = 12, seed: int = 0) -> Images:
    """Boxes of 20 to 120 pixels in images of 400, scores far from any threshold, best first, three classes."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        corner, size = generator.uniform(20, 260, (each, 2)), generator.uniform(20, 120, (each, 2))
        boxes = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
        scores = np.sort(generator.uniform(0.4, 0.9, each))[::-1].astype(np.float32)
        images.append(Detections(boxes, scores, np.arange(each) % 3))
    return images


def _noisy(images: Images, *, seed: int) -> Images:
    """As INT8 in other kernels does it: a fifth of a pixel, one percent of a score, and now and then another box."""
    generator = np.random.default_rng(seed)
    noisy = []
    for d in images:
        moves = generator.normal(0, 0.2, d.boxes.shape)
        moves[generator.random(len(d)) < 0.02] *= 40
        scores = d.scores * np.exp(generator.normal(0, 0.01, len(d)))
        noisy.append(_with(d, boxes=d.boxes + moves, scores=scores))
    return noisy


def _with(
    d: Detections,
    *,
    boxes: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    labels: np.ndarray | None = None,
) -> Detections:
    return Detections(
        np.asarray(d.boxes if boxes is None else boxes, np.float32),
        np.asarray(d.scores if scores is None else scores, np.float32),
        np.asarray(d.labels if labels is None else labels, np.int64),
    )


def _standard(contract: ModelContract, reference: Images, baseline: Images | None, *, gate: Gate) -> GoldenStandard:
    return GoldenStandard(
        gate=gate,
        contract=replace(contract, class_names=("red", "white", "platelet")),
        expected=reference,
        certified=baseline,
        same_artifact=baseline is not None,
        paths=[f"{index}.png" for index in range(len(reference))],
        scales=[1.0] * len(reference),
    )


def _check(contract: ModelContract, reference: Images, detected: Images, baseline: Images | None) -> GoldenCheck:
    standard = _standard(contract, reference, baseline, gate=DEFAULT_GATES[Precision.INT8])
    return check_golden(replace(standard, same_artifact=True), detected)


def test_a_gate_without_a_match_rate_lets_detections_go_missing_but_not_move(bundle_contract: ModelContract) -> None:
    reference = _images()
    fewer = [_with(d, boxes=d.boxes[1:], scores=d.scores[1:], labels=d.labels[1:]) for d in reference]
    for detected, outcome in ((fewer, Outcome.PASSED), ([_narrower(d) for d in fewer], Outcome.FAILED)):
        check = check_golden(_standard(bundle_contract, reference, None, gate=Gate(max_score_delta=0.15)), detected)
        assert check.outcome is outcome, check.summary


def _narrower(d: Detections) -> Detections:
    part = (d.boxes[:, 2] - d.boxes[:, 0]) * 0.075
    return _with(d, boxes=d.boxes + np.stack([part, 0 * part, -part, 0 * part], axis=1))


FAULTS = {
    "score differs by -1": lambda d, _: _with(d, scores=d.scores * 0.9),
    "shift in x differs by +": lambda d, _: _with(d, boxes=d.boxes + 2),
    "shift in y differs by +": lambda d, _: _with(d, boxes=d.boxes + 0.5),
    "width differs by -1": lambda d, _: _narrower(d),
    "stretch in x differs by": lambda d, _: _with(d, boxes=200 + (d.boxes - 200) * 1.01),
    "detections of '0.png' are missing": lambda d, _: _with(d, boxes=d.boxes[:, [1, 0, 3, 2]]),
    "detections of '1.png' are missing": lambda d, _: _with(d, boxes=d.boxes / 2),
    "detections of class 'white' are missing": lambda d, _: _with(d, labels=(d.labels + 1) % 3),
    "nothing is detected in '2.png'": lambda d, index: d.above(1.0) if index == 2 else d,
    "shift in x in 'white' differs": lambda d, _: _with(d, boxes=d.boxes + 2 * (d.labels == 1)[:, None]),
    "shift in x in '3.png' differs": lambda d, index: _with(d, boxes=d.boxes + 2 * (index == 3)),
    "shift in x in 'boxes of 64 to 128 px' differs": lambda d, _: _with(d, boxes=d.boxes + (_sides(d) > 64)),
    "shift in x in 'the 12 smallest boxes' differs": lambda d, _: _with(d, boxes=d.boxes + (_sides(d) < 95)),
    "shift in x in 'the 12 largest boxes' differs": lambda d, _: _with(d, boxes=d.boxes + (_sides(d) > 95)),
    "detections of boxes of 32 to 64 px are missing": lambda d, _: _with(d, boxes=d.boxes + 60 * (_sides(d) < 64)),
}


def _sides(d: Detections) -> np.ndarray:
    """(n, 1): the longer side of each box."""
    return (d.boxes[:, 2:] - d.boxes[:, :2]).max(1, keepdims=True)


@pytest.mark.parametrize("noise", [False, True], ids=["same kernels", "other kernels"])
@pytest.mark.parametrize("problem", FAULTS)
def test_planted_faults_are_found_and_named(problem: str, noise: bool, bundle_contract: ModelContract) -> None:
    reference = _images()
    baseline = _noisy(reference, seed=1)
    honest = _noisy(reference, seed=2) if noise else baseline
    damaged = [FAULTS[problem](d, index) for index, d in enumerate(honest)]
    check = _check(bundle_contract, reference, damaged, baseline)
    assert check.outcome is Outcome.FAILED
    assert any(problem in told for told in check.problems), check.problems


def test_a_third_of_a_pixel_is_found_where_the_kernels_are_the_same(bundle_contract: ModelContract) -> None:
    baseline = _noisy(_images(), seed=1)
    moved = [_with(d, boxes=d.boxes + 0.3) for d in baseline]
    assert _check(bundle_contract, _images(), moved, baseline).outcome is Outcome.FAILED


@pytest.mark.parametrize(("each", "outcome"), [(8, Outcome.FAILED), (11, Outcome.PASSED)])
def test_a_list_that_is_cut_off_earlier_is_found(each: int, outcome: Outcome, bundle_contract: ModelContract) -> None:
    """All that are gone score less than what the limit cut off might have scored."""
    reference = [_with(d, scores=np.linspace(0.5, 0.48, 12)) for d in _images()]
    contract = replace(bundle_contract, decode=replace(bundle_contract.decode, max_detections=12))
    cut = [_with(d, boxes=d.boxes[:each], scores=d.scores[:each], labels=d.labels[:each]) for d in reference]
    check = _check(contract, reference, cut, reference)
    assert check.outcome is outcome
    assert each == 11 or check.problems[0] == "8 detections in '0.png', where 12 are certified"


def test_boxes_that_scatter_more_than_certified_are_found(bundle_contract: ModelContract) -> None:
    """No quantity is biased, and all boxes are matched: only their distance from the reference's shows it."""
    reference, generator = _images(), np.random.default_rng(3)
    scattered = [_with(d, boxes=d.boxes + generator.choice([-1.5, 1.5], d.boxes.shape)) for d in reference]
    check = _check(bundle_contract, reference, scattered, _noisy(reference, seed=1))
    assert check.outcome is Outcome.FAILED
    assert any("box edges are more than" in told for told in check.problems), check.problems


@pytest.mark.parametrize("baseline", [True, False], ids=["with baseline", "against the reference"])
def test_honest_engines_pass(baseline: bool, bundle_contract: ModelContract) -> None:
    """INT8 noise in each of 50 draws, among them pairs that are 8 pixels apart."""
    reference = _images()
    certified = _noisy(reference, seed=1000) if baseline else None
    outcomes = [
        _check(bundle_contract, reference, _noisy(reference, seed=seed), certified).outcome for seed in range(50)
    ]
    assert outcomes.count(Outcome.FAILED) == 0
    assert outcomes.count(Outcome.PASSED) >= 45


def test_too_few_detections_decide_nothing(bundle_contract: ModelContract) -> None:
    reference = _images(1, each=MIN_EVIDENCE - 1)
    check = _check(bundle_contract, reference, reference, reference)
    assert check.outcome is Outcome.INCONCLUSIVE
    assert check.problems == ("only 7 detections could be compared, 8 are needed",)
    with pytest.raises(InconclusiveError, match="detects 7 objects"):
        choose_golden(reference, decode=bundle_contract.decode)


def test_where_all_scores_are_near_the_threshold_the_better_half_is_held(bundle_contract: ModelContract) -> None:
    threshold = bundle_contract.decode.score_threshold
    near = [_with(d, scores=threshold + 0.04 * d.scores) for d in _images()]
    assert _check(bundle_contract, near, near, near).outcome is Outcome.PASSED
    moved = [_with(d, boxes=d.boxes + 0.5) for d in near]
    assert _check(bundle_contract, near, moved, near).outcome is Outcome.FAILED


def test_golden_images_show_every_class(bundle_contract: ModelContract) -> None:
    """Twenty images show one class, and a last one another: it is chosen, with three to seven of the rest."""
    images = [_with(d, labels=np.zeros(len(d))) for d in _images(20)]
    images.append(_with(_images(1, seed=5)[0], labels=np.full(12, 2)))
    chosen = choose_golden(images, decode=bundle_contract.decode)
    assert 20 in chosen
    assert 4 <= len(chosen) <= 8


GATE = Gate(min_iou=0.8, max_score_delta=0.1)


def _compared(contract: ModelContract, expected: Detections, detected: Detections) -> GoldenResult:
    """By ``GATE``, from a score of 0.3 on."""
    contract = replace(contract, decode=replace(contract.decode, score_threshold=0.2))
    (result,) = compare_golden(_standard(contract, [expected], None, gate=GATE), [detected])
    return result


def _image() -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:90, 0:120]
    return np.stack([rows * 2, columns * 2, rows + columns], 2).astype(np.uint8)


def _detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


@pytest.mark.parametrize("dtype", list(InputDtype))
def test_one_level_of_rounding_in_single_pixels_is_tolerated(bundle_contract: ModelContract, dtype: InputDtype) -> None:
    spec = replace(bundle_contract.preprocess, input_dtype=dtype)
    tensor, _ = preprocess(_image(), spec)
    wanted = fingerprint(tensor)
    assert fingerprint_difference(wanted, wanted, spec=spec) == 0.0
    level = 1.0 if dtype is InputDtype.UINT8 else 1.0 / (spec.pixel_scale * max(spec.std))
    rounded = tensor.copy()
    rounded[:, ::7, ::7] = (rounded[:, ::7, ::7] + level).astype(tensor.dtype)
    assert 0 < fingerprint_difference(fingerprint(rounded), wanted, spec=spec) < 0.5


@pytest.mark.parametrize("dtype", list(InputDtype))
def test_swapped_channels_and_a_shift_are_no_rounding(bundle_contract: ModelContract, dtype: InputDtype) -> None:
    spec = replace(bundle_contract.preprocess, input_dtype=dtype)
    tensor, _ = preprocess(_image(), spec)
    wanted = fingerprint(tensor)
    assert fingerprint_difference(fingerprint(tensor[::-1]), wanted, spec=spec) > 5
    assert fingerprint_difference(fingerprint(np.roll(tensor, 1, axis=2)), wanted, spec=spec) > 0.5


def test_another_shape_or_dtype_is_infinitely_far(bundle_contract: ModelContract) -> None:
    spec = bundle_contract.preprocess
    tensor, _ = preprocess(_image(), spec)
    for other in (tensor[:, :32], tensor.astype(np.float32)):
        assert fingerprint_difference(fingerprint(other), fingerprint(tensor), spec=spec) == float("inf")


def test_images_come_back_pixel_by_pixel(bundle_contract: ModelContract, tmp_path: Path) -> None:
    (golden,) = make_golden(
        [_image()], [_detections((1, 2, 30, 40, 0.5, 1))], folder=tmp_path, contract=bundle_contract
    )
    np.testing.assert_array_equal(read_golden_image((tmp_path / golden.path).read_bytes(), golden), _image())
    assert golden.detections.to_detections().boxes.tolist() == [[1, 2, 30, 40]]


def test_images_without_a_single_detection_prove_nothing(bundle_contract: ModelContract, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="prove nothing"):
        make_golden([_image()], [_detections()], folder=tmp_path, contract=bundle_contract)


def test_a_png_that_claims_another_size_is_not_decoded(bundle_contract: ModelContract, tmp_path: Path) -> None:
    (golden,) = make_golden(
        [_image()], [_detections((1, 2, 30, 40, 0.5, 1))], folder=tmp_path, contract=bundle_contract
    )
    path = tmp_path / golden.path
    path.write_bytes(path.read_bytes()[:16] + (1 << 20).to_bytes(4, "big") * 2 + path.read_bytes()[24:])
    with pytest.raises(ImageError, match="must be 90x120, got 1048576x1048576"):
        read_golden_image(path.read_bytes(), golden)
    path.write_bytes(b"GIF89a")
    with pytest.raises(ImageError, match="not a PNG"):
        read_golden_image(path.read_bytes(), golden)


def test_the_same_detections_match(bundle_contract: ModelContract) -> None:
    found = _detections((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.6, 1))
    result = _compared(bundle_contract, found, found)
    assert (result.expected, result.detected, result.missed, result.extra) == (2, 2, 0, 0)
    assert (result.lowest_iou, result.largest_score_difference) == (1.0, 0.0)


@pytest.mark.parametrize(
    "other",
    [
        (0, 0, 10, 10, 0.9, 1),  # another class
        (4, 0, 14, 10, 0.9, 0),  # IoU 6 / 14
        (0, 0, 10, 10, 0.7, 0),  # score off by 0.2
    ],
)
def test_another_class_place_or_score_is_missed_and_extra(
    bundle_contract: ModelContract, other: tuple[float, float, float, float, float, int]
) -> None:
    result = _compared(bundle_contract, _detections((0, 0, 10, 10, 0.9, 0)), _detections(other))
    assert (result.missed, result.extra) == (1, 1)


def test_a_box_clipped_to_a_line_is_its_own_counterpart(bundle_contract: ModelContract) -> None:
    line = _detections((0, 5, 0, 10, 0.9, 0), (3, 3, 3.2, 3.1, 0.8, 0))
    moved = _detections((0.01, 5, 0.01, 10.02, 0.9, 0), (3.02, 3, 3.2, 3.12, 0.8, 0))
    result = _compared(bundle_contract, line, moved)
    assert (result.missed, result.extra, result.lowest_iou) == (0, 0, 1.0)


def test_a_detection_below_the_floor_may_come_or_go(bundle_contract: ModelContract) -> None:
    wanted = _detections((0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.25, 0))
    found = _detections((0, 0, 10, 10, 0.9, 0), (80, 80, 90, 90, 0.28, 0))
    result = _compared(bundle_contract, wanted, found)
    assert (result.expected, result.missed, result.extra) == (1, 0, 0)


def test_one_that_falls_below_the_floor_still_is_a_counterpart(bundle_contract: ModelContract) -> None:
    result = _compared(bundle_contract, _detections((0, 0, 10, 10, 0.31, 0)), _detections((0, 0, 10, 10, 0.25, 0)))
    assert (result.expected, result.detected, result.missed) == (1, 0, 0)


def test_two_for_one_counts_as_one_extra(bundle_contract: ModelContract) -> None:
    wanted = _detections((0, 0, 10, 10, 0.9, 0))
    found = _detections((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 9.5, 0.85, 0))
    assert _compared(bundle_contract, wanted, found).extra == 1


def test_nothing_on_either_side_is_no_failure_of_the_image(bundle_contract: ModelContract) -> None:
    result = _compared(bundle_contract, _detections(), _detections())
    assert (result.expected, result.detected, result.lowest_iou) == (0, 0, 1.0)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(BundleError):
        GoldenDetections(boxes=((0, 0, 1, 1),), scores=(), labels=(1,))
