"""Which figures keep a gate's limits, and what the message and the JUnit XML of one that does not say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fcos_deploy.accuracy.gate import Verdict, judge_agreement, judge_ap, judge_drop, require_all, write_junit
from fcos_deploy.accuracy.intervals import ApInterval
from fcos_deploy.accuracy.matching import DetectionAgreement, Distribution
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.gate import Gate


def interval(value: float, low: float, high: float) -> ApInterval:
    return ApInterval(value=value, low=low, high=high, standard_error=0.01, confidence=0.95, resamples=1000, images=500)


def agreement(rate: float, score: float, box: float) -> DetectionAgreement:
    def spread(size: float) -> Distribution:
        return Distribution(count=9, mean=0.0, p5=-size, p50=0.0, p95=size / 2, max_abs=2 * size)

    return DetectionAgreement(
        images=3,
        reference=10,
        candidate=10,
        matched=9,
        missed=1,
        extra=1,
        match_rate=rate,
        score_delta=spread(score),
        box_delta_px=Distribution(count=9, mean=box, p5=0.0, p50=box, p95=box, max_abs=box),
        iou=spread(0.0),
    )


def test_message_has_the_figures() -> None:
    verdicts = judge_drop(
        Gate(max_map_drop=0.01), interval(0.041, 0.03, 0.05), reference_ap=0.412, subject="openvino int8"
    )
    with pytest.raises(AccuracyGateError) as caught:
        require_all(verdicts)
    assert caught.value.exit_code == 4
    assert caught.value.message == (
        "openvino int8: mAP 0.412 -> 0.371 (drop 0.041 > 0.010, 95% interval +0.030 to +0.050) on 500 images."
    )


def test_a_gain_passes() -> None:
    (verdict,) = judge_drop(Gate(max_map_drop=0.0), interval(-0.002, -0.01, 0.01), reference_ap=0.4, subject="x")
    assert verdict.passed
    require_all([verdict])


def test_certain_judges_the_end_of_the_interval() -> None:
    drop = interval(0.005, -0.002, 0.012)
    (easy,) = judge_drop(Gate(max_map_drop=0.01), drop, reference_ap=0.4, subject="x")
    (strict,) = judge_drop(Gate(max_map_drop=0.01, certain=True), drop, reference_ap=0.4, subject="x")
    assert easy.passed
    assert not strict.passed
    assert strict.value == 0.012


def test_nothing_asked_is_nothing_judged() -> None:
    assert judge_ap(Gate(), 0.4, subject="x", images=3) == []
    assert judge_drop(Gate(), interval(1, 1, 1), reference_ap=1.0, subject="x") == []
    assert judge_agreement(Gate(), agreement(0.1, 0.5, 50), subject="x") == []


def test_minimum_ap() -> None:
    (verdict,) = judge_ap(Gate(min_ap=0.5), 0.49, subject="x", images=3)
    assert not verdict.passed
    assert verdict.message == "mAP 0.490 (< 0.500) on 3 images"


def test_agreement_limits() -> None:
    gate = Gate(min_match_rate=0.99, max_score_delta=0.02, max_box_delta_px=1.0)
    judged = {v.name: v.passed for v in judge_agreement(gate, agreement(0.9, 0.03, 0.5), subject="x")}
    assert judged == {"min_match_rate": False, "max_score_delta": False, "max_box_delta_px": True}
    assert all(v.passed for v in judge_agreement(gate, agreement(1.0, 0.02, 1.0), subject="x"))


@pytest.mark.parametrize(("name", "value"), [("max_map_drop", 1.5), ("min_ap", -0.1), ("max_box_delta_px", -1.0)])
def test_limits_are_checked(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Gate(**{name: value})


def verdict(passed: bool, message: str) -> Verdict:
    return Verdict(name="max_map_drop", subject="openvino int8", passed=passed, value=0.04, limit=0.01, message=message)


def test_junit_has_a_case_for_every_verdict(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    write_junit(path, [verdict(True, "fine"), verdict(False, 'drop 0.04 > 0.01 & "more" <em>')], suite="evaluate")
    (suite,) = ElementTree.parse(path).getroot()
    assert suite.attrib == {"name": "evaluate", "tests": "2", "failures": "1", "errors": "0", "skipped": "0"}
    good, bad = suite
    assert good.find("failure") is None
    assert bad.attrib == {"classname": "openvino int8", "name": "max_map_drop"}
    failure = bad.find("failure")
    assert failure is not None
    assert failure.attrib["message"] == 'drop 0.04 > 0.01 & "more" <em>'
    assert failure.text == "max_map_drop: 0.04, limit 0.01"
