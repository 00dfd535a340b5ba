"""Whether a deployed detector keeps its limits, as sentences, as an error and as JUnit XML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from fcos_deploy.accuracy.intervals import ApInterval
from fcos_deploy.accuracy.matching import DetectionAgreement
from fcos_deploy.core.errors import AccuracyGateError
from fcos_deploy.core.files import write_text
from fcos_deploy.core.gate import Gate

__all__ = ["Verdict", "judge_agreement", "judge_ap", "judge_drop", "require_all", "write_junit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judgement: the limit's name and what it was applied to, the figure, the limit, and a sentence with both."""

    name: str
    subject: str
    passed: bool
    value: float
    limit: float
    message: str


def judge_ap(gate: Gate, ap: float, *, subject: str, images: int) -> list[Verdict]:
    """Judge an AP by itself."""
    if gate.min_ap is None:
        return []
    passed = ap >= gate.min_ap
    message = f"mAP {ap:.3f} ({'>=' if passed else '<'} {gate.min_ap:.3f}) on {images} images"
    return [Verdict(name="min_ap", subject=subject, passed=passed, value=ap, limit=gate.min_ap, message=message)]


def judge_drop(gate: Gate, drop: ApInterval, *, reference_ap: float, subject: str) -> list[Verdict]:
    """Judge how much AP was lost against the reference."""
    if gate.max_map_drop is None:
        return []
    value = drop.high if gate.certain else drop.value
    passed = value <= gate.max_map_drop
    sign = "<=" if passed else ">"
    bound = f", {drop.confidence:.0%} interval {drop.low:+.3f} to {drop.high:+.3f}"
    message = (
        f"mAP {reference_ap:.3f} -> {reference_ap - drop.value:.3f} "
        f"(drop {value:.3f} {sign} {gate.max_map_drop:.3f}{bound}) on {drop.images} images"
    )
    limit = gate.max_map_drop
    return [Verdict(name="max_map_drop", subject=subject, passed=passed, value=value, limit=limit, message=message)]


def judge_agreement(gate: Gate, agreement: DetectionAgreement, *, subject: str) -> list[Verdict]:
    """Judge how far single detections agree with the reference's."""
    scores, boxes = agreement.score_delta, agreement.box_delta_px
    rate = agreement.match_rate
    verdicts = []
    if gate.min_match_rate is not None:
        message = (
            f"{rate:.1%} of the detections agree ({agreement.missed} missed, {agreement.extra} extra; "
            f"at least {gate.min_match_rate:.1%} needed) on {agreement.images} images"
        )
        verdicts.append(
            Verdict(
                name="min_match_rate",
                subject=subject,
                passed=rate >= gate.min_match_rate,
                value=rate,
                limit=gate.min_match_rate,
                message=message,
            )
        )
    # Scores differ to both sides, so 5 % may lie below the 5th percentile and 5 % above the 95th: 90 % lie between.
    spread = max(abs(scores.p5), abs(scores.p95))
    for name, share, value, unit, limit in (
        ("max_score_delta", "90 %", spread, "score", gate.max_score_delta),
        ("max_box_delta_px", "95 %", boxes.p95, "pixels", gate.max_box_delta_px),
    ):
        if limit is not None:
            message = f"{share} of the matched detections differ by at most {value:.4f} {unit} ({limit:.4f} allowed)"
            passed = value <= limit
            verdicts.append(
                Verdict(name=name, subject=subject, passed=passed, value=value, limit=limit, message=message)
            )
    return verdicts


def require_all(verdicts: Sequence[Verdict]) -> None:
    """Raise if one failed.

    Raises:
        AccuracyGateError: with the figures of each one that failed.
    """
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        raise AccuracyGateError(
            "; ".join(f"{verdict.subject}: {verdict.message}" for verdict in failed) + ".",
            hint="keep more layers in float, calibrate with other images, or loosen the gate knowingly",
        )


def write_junit(path: Path, verdicts: Sequence[Verdict], *, suite: str) -> None:
    """Write JUnit XML atomically: one test suite with a test case for every verdict.

    Raises:
        ConfigError: the file cannot be written.
    """
    failures = sum(not verdict.passed for verdict in verdicts)
    root = ElementTree.Element("testsuites")
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0", "skipped": "0"}
    element = ElementTree.SubElement(root, "testsuite", {"name": suite, **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(element, "testcase", {"classname": verdict.subject, "name": verdict.name})
        if not verdict.passed:
            failure = ElementTree.SubElement(case, "failure", {"message": verdict.message, "type": "AccuracyGateError"})
            failure.text = f"{verdict.name}: {verdict.value:.6g}, limit {verdict.limit:.6g}"
        ElementTree.SubElement(case, "system-out").text = verdict.message
    ElementTree.indent(root)
    write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")
