"""Whether a deployed detector keeps its limits: verdicts as sentences, as an error and as JUnit XML."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from fcos_deploy.accuracy.coco import ApInterval
from fcos_deploy.accuracy.operating_point import OperatingDrop
from fcos_deploy.core.errors import AccuracyGateError, InconclusiveError
from fcos_deploy.core.files import write_text
from fcos_deploy.core.gate import DetectionAgreement, Gate, Judge, Outcome, interval_outcome, overall_outcome

__all__ = [
    "Outcome",
    "Verdict",
    "judge_agreement",
    "judge_ap",
    "judge_drop",
    "judge_operating_drop",
    "overall_outcome",
    "require_all",
    "verdict_line",
    "write_junit",
]

# Times as many images: beyond, the figure lies on the limit, and no data set of a realistic size decides.
_HOPELESS = 100
# Resamples below which the ends of an interval, the 25th of a thousand, are themselves a matter of chance.
_MIN_RESAMPLES = 200
# Pairs from which on the largest difference bounds the 95th percentile with 97.5 % confidence: 0.95 ** 72 < 0.025.
_PERCENTILE_PAIRS = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judgement: the limit's name, what it was applied to, the outcome, and a sentence with the figures.

    ``value``, with its interval from ``low`` to ``high``, was held to ``limit``; None where there is no such figure.
    ``judge`` says whether the interval or the value decided. ``more_images``: how many more images like these would
    decide what is inconclusive; None where more images don't help.
    """

    name: str
    subject: str
    outcome: Outcome
    value: float | None
    limit: float
    message: str
    judge: Judge = Judge.INTERVAL
    low: float | None = None
    high: float | None = None
    more_images: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the limit was shown to hold."""
        return self.outcome is Outcome.PASSED


@dataclass(frozen=True, slots=True)
class _Limit:
    """One limit of a gate, and what it is applied to."""

    gate: Gate
    name: str
    subject: str

    @property
    def value(self) -> float:
        """What must be kept."""
        value: float = getattr(self.gate, self.name)
        return value

    def verdict(self, outcome: Outcome, value: float | None, message: str) -> Verdict:
        """On ``value``."""
        return Verdict(
            name=self.name,
            subject=self.subject,
            outcome=outcome,
            value=value,
            limit=self.value,
            message=message,
            judge=self.gate.judge,
        )

    def undecided(self, problem: str, value: float | None) -> Verdict:
        """Because of ``problem``."""
        return self.verdict(
            Outcome.INCONCLUSIVE, value if value is not None and math.isfinite(value) else None, problem
        )

    def decided(
        self, value: float, bounds: tuple[float, float], message: str, *, images: int, at_least: bool
    ) -> Verdict:
        """By the interval ``bounds``, with it and, where that leaves it open, how many more images would decide it."""
        low, high = bounds
        outcome = (
            interval_outcome(-high, -low, at_most=-self.value)
            if at_least
            else interval_outcome(low, high, at_most=self.value)
        )
        verdict = replace(self.verdict(outcome, value, message), low=low, high=high)
        if outcome is not Outcome.INCONCLUSIVE:
            return verdict
        # The interval's width falls with the square root of the number of images, so the side of it that crosses the
        # limit has to shrink by the ratio of its distance from the value to the limit's.
        margin = self.value - value
        reach = high - value if margin > 0 else value - low
        if reach >= abs(margin) * math.sqrt(_HOPELESS):
            advice = "the measured figure is too near to the limit for more images to decide"
            return replace(verdict, message=f"{message}; {advice}")
        more = max(1, math.ceil(images * ((reach / margin) ** 2 - 1)))
        return replace(
            verdict, message=f"{message}; about {more} more images like these would decide it", more_images=more
        )


def judge_ap(
    gate: Gate, ap: float | None, *, subject: str, images: int, interval: ApInterval | None = None, problem: str = ""
) -> list[Verdict]:
    """Judge an AP by itself; ``problem`` is why the data cannot decide, if it cannot."""
    if gate.min_ap is None:
        return []
    limit, bounds = _Limit(gate, "min_ap", subject), _bounds(gate, ap, interval)
    problem = problem or _missing(ap, bounds)
    if problem or ap is None or bounds is None:
        return [limit.undecided(problem, ap)]
    message = f"mAP {ap:.3f} ({_by(gate, interval)}; at least {gate.min_ap:.3f} needed) on {images} images"
    return [limit.decided(ap, bounds, message, images=images, at_least=True)]


def judge_drop(
    gate: Gate, drop: ApInterval | None, *, reference_ap: float | None, subject: str, problem: str = ""
) -> list[Verdict]:
    """Judge how much AP was lost against the reference; ``problem`` is why the data cannot decide, if it cannot."""
    if gate.max_map_drop is None:
        return []
    loss = None if reference_ap is None else drop
    return [_judge_loss(_Limit(gate, "max_map_drop", subject), loss, problem=problem, what="mAP", of=reference_ap)]


def judge_operating_drop(
    gate: Gate, share: str, loss: OperatingDrop | None, *, class_names: Sequence[str], subject: str, problem: str = ""
) -> list[Verdict]:
    """Judge how much ``share`` (``precision`` or ``recall``) is lost at the score thresholds of the classes."""
    limit = _Limit(gate, f"max_{share}_drop", subject)
    if getattr(gate, limit.name) is None:
        return []
    if loss is None:
        return [
            limit.undecided(problem or f"nothing is detected at the operating point, so that there is no {share}", None)
        ]
    what = f"{share} at the operating point"
    verdict = _judge_loss(limit, loss.drop, problem=problem, what=what, of=loss.reference)
    drops = [(drop, name) for drop, name in zip(loss.by_class, class_names, strict=True) if drop is not None]
    largest, worst = max(drops)
    if problem or verdict.passed or len(drops) < 2 or largest <= 0:
        return [verdict]
    return [replace(verdict, message=f"{verdict.message}; most of '{worst}' ({largest:+.3f})")]


def _judge_loss(limit: _Limit, drop: ApInterval | None, *, problem: str, what: str, of: float | None) -> Verdict:
    """``what`` is lost, of which the reference has ``of``."""
    value = drop.value if drop else None
    bounds = _bounds(limit.gate, value, drop)
    problem = problem or _missing(value, bounds)
    if problem or drop is None or of is None or bounds is None:
        return limit.undecided(problem, value)
    message = (
        f"{what} {of:.3f} -> {of - drop.value:.3f} (drop {drop.value:+.3f}, {_by(limit.gate, drop)}; "
        f"at most {limit.value:.3f} allowed) on {drop.images} images"
    )
    return limit.decided(drop.value, bounds, message, images=drop.images, at_least=False)


def _bounds(gate: Gate, value: float | None, interval: ApInterval | None) -> tuple[float, float] | None:
    """What must keep the limit; None without a figure, or without the interval that was asked for."""
    if value is None or not math.isfinite(value):
        return None
    if gate.judge is Judge.POINT:
        return value, value
    return (interval.low, interval.high) if interval is not None and interval.resamples >= _MIN_RESAMPLES else None


def _missing(value: float | None, bounds: tuple[float, float] | None) -> str:
    """Why there is nothing to judge; empty when there is."""
    if bounds is not None:
        return ""
    if value is None:
        return "there is no object in the data, so that there is no AP"
    return (
        f"there is no confidence interval with fewer than {_MIN_RESAMPLES} resamples (--resamples); "
        "--judge point judges the measured figure alone"
    )


def _by(gate: Gate, interval: ApInterval | None) -> str:
    bound = ""
    if interval is not None and interval.resamples:
        bound = f"{interval.confidence:.0%} interval {interval.low:+.3f} to {interval.high:+.3f}"
    point = "judged by the point estimate" if gate.judge is Judge.POINT else ""
    return ", ".join(filter(None, (point, bound)))


def judge_agreement(gate: Gate, agreement: DetectionAgreement, *, subject: str, problem: str = "") -> list[Verdict]:
    """Judge how far single detections agree with the reference's."""
    verdicts = []
    if gate.min_match_rate is not None:
        verdicts.append(_judge_match_rate(_Limit(gate, "min_match_rate", subject), agreement, problem=problem))
    # Scores differ to both sides, so 5 % may lie below the 5th percentile and 5 % above the 95th: 90 % lie between.
    scores, boxes = agreement.score_delta, agreement.box_delta_px
    spread = max(abs(scores.p5), abs(scores.p95))
    needed = _PERCENTILE_PAIRS if gate.judge is Judge.INTERVAL else 1
    if not problem and scores.count < needed:
        problem = f"{scores.count} matched detections are too few for a percentile ({needed} needed)"
    for name, share, value, unit in (
        ("max_score_delta", "90 %", spread, "score"),
        ("max_box_delta_px", "95 %", boxes.p95, "pixels"),
    ):
        limit = _Limit(gate, name, subject)
        if getattr(gate, name) is None:
            continue
        if problem:
            verdicts.append(limit.undecided(problem, value))
            continue
        outcome = Outcome.PASSED if value <= limit.value else Outcome.FAILED
        message = f"{share} of the matched detections differ by at most {value:.4f} {unit} ({limit.value:.4f} allowed)"
        verdicts.append(limit.verdict(outcome, value, message))
    return verdicts


def _judge_match_rate(limit: _Limit, agreement: DetectionAgreement, *, problem: str) -> Verdict:
    if not problem and agreement.empty:
        problem = "neither detector finds anything in these images, so that nothing can agree"
    if problem:
        return limit.undecided(problem, None)
    rate, bounds, judged_by = agreement.match_rate, agreement.match_interval, ""
    if limit.gate.judge is Judge.POINT:
        bounds, judged_by = (rate, rate), "judged by the point estimate"
    message = (
        f"{rate:.1%} of the detections agree ({agreement.missed} missed, {agreement.extra} extra; "
        f"{judged_by or f'95% interval {bounds[0]:.1%} to {bounds[1]:.1%}'}; "
        f"at least {limit.value:.1%} needed) on {agreement.images} images"
    )
    return limit.decided(rate, bounds, message, images=agreement.images, at_least=True)


def verdict_line(verdict: Verdict) -> str:
    """The verdict as every command prints it: its word, its subject, its sentence."""
    return f"{verdict.outcome.upper()}  {verdict.subject}: {verdict.message}"


# What helps where a limit of this name is undecided; for the others it is more images.
_UNDECIDED = {
    "max_latency_ms": "measure again on a quiet machine",
    "min_throughput": "measure again on a quiet machine",
    "max_watts": "leave --max-watts out",
}


def require_all(verdicts: Sequence[Verdict], *, allow_inconclusive: bool = False) -> None:
    """Raise unless all passed.

    Raises:
        AccuracyGateError: with the figures of each one that failed.
        InconclusiveError: none failed, and the data cannot decide some, which was not allowed.
    """
    overall = overall_outcome(verdict.outcome for verdict in verdicts)
    subjects: dict[str, list[str]] = defaultdict(list)  # by what is said of them, which is often the same of all
    for verdict in verdicts:
        if verdict.outcome is overall:
            subjects[verdict.message].append(verdict.subject)
    sentences = "; ".join(f"{', '.join(names)}: {message}" for message, names in subjects.items()) + "."
    if overall is Outcome.FAILED:
        raise AccuracyGateError(
            sentences, hint="keep more layers in float, calibrate with other images, or loosen the gate knowingly"
        )
    if overall is Outcome.INCONCLUSIVE and not allow_inconclusive:
        more_images = "give more annotated images with --images and --annotations"
        advice = dict.fromkeys(_UNDECIDED.get(v.name, more_images) for v in verdicts if v.outcome is overall)
        raise InconclusiveError(
            f"Inconclusive: {sentences}", hint=f"{', '.join(advice)}, or accept it with --allow-inconclusive"
        )


def write_junit(path: Path, verdicts: Sequence[Verdict], *, suite: str, allow_inconclusive: bool = False) -> None:
    """Write JUnit XML atomically: one test suite with a test case for every verdict.

    An inconclusive one is an error (the test could not be made), or skipped where that is allowed.

    Raises:
        ConfigError: the file cannot be written.
    """
    tags = {
        Outcome.PASSED: "",
        Outcome.FAILED: "failure",
        Outcome.INCONCLUSIVE: "skipped" if allow_inconclusive else "error",
    }
    occurring = Counter(tags[verdict.outcome] for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(occurring["failure"]), "errors": str(occurring["error"])}
    root = ElementTree.Element("testsuites")
    element = ElementTree.SubElement(root, "testsuite", {"name": suite, **counts, "skipped": str(occurring["skipped"])})
    for verdict in verdicts:
        tag = tags[verdict.outcome]
        case = ElementTree.SubElement(element, "testcase", {"classname": verdict.subject, "name": verdict.name})
        if tag:
            kind = InconclusiveError if verdict.outcome is Outcome.INCONCLUSIVE else AccuracyGateError
            child = ElementTree.SubElement(case, tag, {"message": verdict.message, "type": kind.__name__})
            figure = "no figure" if verdict.value is None else f"{verdict.value:.6g}"
            child.text = f"{verdict.name}: {verdict.outcome}, {figure}, limit {verdict.limit:.6g}"
        ElementTree.SubElement(case, "system-out").text = f"{verdict.outcome}: {verdict.message}"
    ElementTree.indent(root)
    write_text(path, ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n")
