"""What the comparison of golden detections finds, and what it lets pass."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_deploy.accuracy.golden_check import MIN_EVIDENCE, GoldenCheck, check_golden, choose_golden
from fcos_deploy.bundle import DEFAULT_GATES
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import InconclusiveError
from fcos_deploy.core.gate import Gate, Outcome

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


def _check(contract: ModelContract, reference: Images, detected: Images, baseline: Images | None) -> GoldenCheck:
    return check_golden(
        reference,
        detected,
        baseline=baseline,
        same_artifact=True,
        gate=DEFAULT_GATES[Precision.INT8],
        decode=contract.decode,
        names=("red", "white", "platelet"),
        paths=[f"{index}.png" for index in range(len(reference))],
        scales=[1.0] * len(reference),
    )


def test_a_gate_without_a_match_rate_lets_detections_go_missing_but_not_move(bundle_contract: ModelContract) -> None:
    reference = _images()
    fewer = [_with(d, boxes=d.boxes[1:], scores=d.scores[1:], labels=d.labels[1:]) for d in reference]
    for detected, outcome in ((fewer, Outcome.PASSED), ([_narrower(d) for d in fewer], Outcome.FAILED)):
        check = check_golden(
            reference,
            detected,
            baseline=None,
            same_artifact=False,
            gate=Gate(max_score_delta=0.15),
            decode=bundle_contract.decode,
            names=("red", "white", "platelet"),
            paths=[f"{index}.png" for index in range(len(reference))],
            scales=[1.0] * len(reference),
        )
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
}


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
