"""Which figures keep a gate's limits and what one that does not says; pairs of detections, and how scores move."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.accuracy.coco import ApInterval
from fcos_deploy.accuracy.gate import (
    Outcome,
    Verdict,
    judge_agreement,
    judge_ap,
    judge_drop,
    require_all,
    verdict_line,
    write_junit,
)
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import AccuracyGateError, ConfigError, InconclusiveError
from fcos_deploy.core.gate import (
    DetectionAgreement,
    Distribution,
    Gate,
    Judge,
    MatchOptions,
    compare_detections,
    equivalent_threshold,
    match_detections,
    overall_outcome,
    score_drift,
)

POINT = Judge.POINT


def interval(value: float, low: float, high: float, *, resamples: int = 1000) -> ApInterval:
    return ApInterval(
        value=value, low=low, high=high, standard_error=0.01, confidence=0.95, resamples=resamples, images=500
    )


def agreement(rate: float, score: float, box: float, *, pairs: int = 100) -> DetectionAgreement:
    def spread(size: float) -> Distribution:
        return Distribution(count=pairs, mean=0.0, p5=-size, p50=0.0, p95=size / 2, max_abs=2 * size)

    return DetectionAgreement(
        images=3,
        reference=10,
        candidate=10,
        matched=9,
        missed=1,
        extra=1,
        match_rate=rate,
        match_interval=(rate - 0.02, min(1.0, rate + 0.02)),
        score_delta=spread(score),
        box_delta_px=Distribution(count=9, mean=box, p5=0.0, p50=box, p95=box, max_abs=box),
        iou=spread(0.0),
    )


def test_message_has_the_figures() -> None:
    verdicts = judge_drop(
        Gate(max_map_drop=0.01), interval(0.041, 0.03, 0.05), reference_ap=0.412, subject="openvino int8"
    )
    assert verdict_line(verdicts[0]).startswith("FAILED  openvino int8: mAP 0.412 -> 0.371 (drop +0.041, ")
    with pytest.raises(AccuracyGateError) as caught:
        require_all(verdicts, allow_inconclusive=True)
    assert caught.value.exit_code == 4
    assert caught.value.message == (
        "openvino int8: mAP 0.412 -> 0.371 (drop +0.041, 95% interval +0.030 to +0.050; at most 0.010 allowed) "
        "on 500 images."
    )


@pytest.mark.parametrize(
    ("low", "value", "high", "outcome", "by_point"),
    [
        (-0.004, 0.002, 0.009, "passed", "passed"),
        (-0.002, 0.005, 0.012, "inconclusive", "passed"),
        (0.008, 0.012, 0.016, "inconclusive", "failed"),
        (0.011, 0.015, 0.019, "failed", "failed"),
        (0.0, 0.0, 0.0, "passed", "passed"),
    ],
)
def test_the_whole_interval_decides_and_the_point_only_by_name(
    low: float, value: float, high: float, outcome: str, by_point: str
) -> None:
    """And an AP is held to its minimum in the same way."""
    drop = interval(value, low, high)
    for judge, expected in ((Judge.INTERVAL, outcome), (POINT, by_point)):
        (verdict,) = judge_drop(Gate(max_map_drop=0.01, judge=judge), drop, reference_ap=0.4, subject="x")
        assert (verdict.outcome, verdict.judge) == (expected, judge)
        assert ("judged by the point estimate" in verdict.message) is (judge is POINT)
        ap = interval(0.5 - value, 0.5 - high, 0.5 - low)
        gate = Gate(min_ap=0.49, judge=judge)
        (verdict,) = judge_ap(gate, ap.value, subject="x", images=500, interval=ap)
        assert verdict.outcome == expected


def test_inconclusive_says_how_many_more_images_decide() -> None:
    """0.005 is half of what is left to the limit: the upper half of the interval, 0.010, has to halve, so n x 4."""
    (verdict,) = judge_drop(Gate(max_map_drop=0.01), interval(0.005, -0.004, 0.015), reference_ap=0.4, subject="x")
    assert verdict.more_images == 1500
    assert verdict.message.endswith("; about 1500 more images like these would decide it")
    with pytest.raises(InconclusiveError, match="about 1500 more") as caught:
        require_all([verdict])
    assert caught.value.exit_code == 4
    with pytest.raises(InconclusiveError, match=r"^Inconclusive: openvino, onnxruntime: mAP 0\.400") as caught:
        require_all([replace(verdict, subject=name) for name in ("openvino", "onnxruntime")])  # one reason, said once
    assert caught.value.message.count("1500 more") == 1
    require_all([verdict], allow_inconclusive=True)
    (near,) = judge_drop(Gate(max_map_drop=0.01), interval(0.0099, -0.004, 0.02), reference_ap=0.4, subject="x")
    assert near.more_images is None
    assert "too near to the limit" in near.message


@pytest.mark.parametrize("judge", list(Judge))
def test_every_limit_that_was_asked_for_yields_a_verdict(judge: Judge) -> None:
    """Without an object there is no figure at all, and without resamples none that an interval could be made of."""
    gate = Gate(max_map_drop=0.01, min_ap=0.1, min_match_rate=0.9, max_score_delta=0.1, judge=judge)
    few = agreement(1.0, 0.0, 0.0, pairs=0)
    nothing = replace(few, reference=0, candidate=0, matched=0, missed=0, extra=0)
    verdicts = [
        *judge_drop(gate, None, reference_ap=None, subject="x"),
        *judge_ap(gate, None, subject="x", images=3),
        *judge_agreement(gate, nothing, subject="x"),
    ]
    assert [v.name for v in verdicts] == ["max_map_drop", "min_ap", "min_match_rate", "max_score_delta"]
    assert {v.outcome for v in verdicts} == {Outcome.INCONCLUSIVE}
    assert all(len(v.message) > 20 for v in verdicts)
    decided = judge is POINT
    for resamples in (0, 1, 50):
        drop = interval(0.0, 0.0, 0.0, resamples=resamples)
        (verdict,) = judge_drop(Gate(max_map_drop=0.01, judge=judge), drop, reference_ap=0.4, subject="x")
        assert verdict.passed is decided


def test_nothing_asked_is_nothing_judged() -> None:
    assert judge_ap(Gate(), 0.4, subject="x", images=3) == []
    assert judge_drop(Gate(), interval(1, 1, 1), reference_ap=1.0, subject="x") == []
    assert judge_agreement(Gate(), agreement(0.1, 0.5, 50), subject="x") == []
    assert overall_outcome([]) is None


def test_the_worst_outcome_is_the_overall_one() -> None:
    passed, failed, unknown = Outcome.PASSED, Outcome.FAILED, Outcome.INCONCLUSIVE
    assert overall_outcome([passed, unknown, failed]) is failed
    assert overall_outcome([passed, unknown]) is unknown
    assert overall_outcome([passed]) is passed


def test_agreement_limits() -> None:
    gate = Gate(min_match_rate=0.95, max_score_delta=0.02, max_box_delta_px=1.0)
    judged = {v.name: v.outcome for v in judge_agreement(gate, agreement(0.9, 0.03, 0.5), subject="x")}
    assert judged == {"min_match_rate": "failed", "max_score_delta": "failed", "max_box_delta_px": "passed"}
    assert all(v.passed for v in judge_agreement(gate, agreement(0.99, 0.02, 1.0), subject="x"))
    few = {v.name: v.outcome for v in judge_agreement(gate, agreement(0.96, 0.0, 0.0, pairs=9), subject="x")}
    assert set(few.values()) == {Outcome.INCONCLUSIVE}


@pytest.mark.parametrize(("name", "value"), [("max_map_drop", 1.5), ("min_ap", -0.1), ("max_box_delta_px", -1.0)])
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Gate(**{name: value})


def verdict(outcome: Outcome, message: str) -> Verdict:
    return Verdict(
        name="max_map_drop", subject="openvino int8", outcome=outcome, value=0.04, limit=0.01, message=message
    )


@pytest.mark.parametrize(("allowed", "tag"), [(False, "error"), (True, "skipped")])
def test_junit_has_a_case_for_every_verdict(allowed: bool, tag: str, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    sentence = 'drop 0.04 > 0.01 & "more" <em>'
    verdicts = [verdict(outcome, sentence) for outcome in Outcome]
    write_junit(path, verdicts, suite="evaluate", allow_inconclusive=allowed)
    (suite,) = ElementTree.parse(path).getroot()
    counts = {"errors": "0", "skipped": "0", "errors" if tag == "error" else tag: "1"}
    assert suite.attrib == {"name": "evaluate", "tests": "3", "failures": "1", **counts}
    good, bad, unknown = suite
    assert [child.tag for child in good] == ["system-out"]
    assert bad.attrib == {"classname": "openvino int8", "name": "max_map_drop"}
    failure = bad.find("failure")
    assert failure is not None
    assert failure.attrib["message"] == sentence
    assert failure.text == "max_map_drop: failed, 0.04, limit 0.01"
    assert unknown.find(tag) is not None
    assert unknown.findtext("system-out") == f"inconclusive: {sentence}"


# ---- pairs of detections ----


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
