"""Which figures keep a gate's limits, and what the message and the JUnit XML of one that does not say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

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
from fcos_deploy.core.errors import AccuracyGateError, ConfigError, InconclusiveError
from fcos_deploy.core.gate import DetectionAgreement, Distribution, Gate, Judge, overall_outcome

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
