"""What a report shows: the measurements of each variant, the origin of its files, and the summary of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from calibration.mixed_precision import TradeOffs
from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import Evaluation
from fcos_deploy.benchmark.measure import Contention, Speedup
from fcos_deploy.benchmark.run import BenchmarkResult, doubted_speedup
from fcos_deploy.core.contract import Decision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Outcome, overall_outcome
from fcos_deploy.core.machine import MachineFacts

__all__ = [
    "ReportData",
    "ReportFile",
    "ReportVariant",
    "ReportVerdict",
    "dataset_sentence",
    "key_figures",
    "report_verdict",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportVariant:
    """One artifact on one backend. ``result`` None: it was not timed.

    ``int8_share``: share (0..1) of the convolutions' multiply-accumulates that the runtime executes in INT8; None: the
    runtime does not tell, or the artifact is not INT8.
    """

    label: str
    evaluation: Evaluation
    result: BenchmarkResult | None = None
    reference: bool = False
    int8_share: float | None = None

    @property
    def outcome(self) -> Outcome | None:
        """What judging this variant came to; None: nothing was judged."""
        return overall_outcome(verdict.outcome for verdict in self.evaluation.verdicts)

    @property
    def p50_ms(self) -> float | None:
        """Median latency of one image in milliseconds."""
        return self.result.latency.p50 if self.result else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFile:
    """A file behind the report: its size in bytes, and the step that made it from ``parent``."""

    path: str
    kind: str
    sha256: str
    size: int
    parent: str = ""
    step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """A whole report.

    ``variants`` were evaluated on ``dataset``; one of them may be the reference of the others. ``searches``: those for
    mixed precision. ``machine``: where the variants were timed, ``contention``: what else ran there. ``decisions``:
    what the checkpoint does not tell. ``command`` makes it all again. ``notes``: sentences that belong beside the
    verdict.
    """

    title: str
    dataset: Dataset
    variants: tuple[ReportVariant, ...]
    searches: tuple[TradeOffs, ...] = ()
    created: str = ""
    files: tuple[ReportFile, ...] = ()
    machine: MachineFacts | None = None
    contention: Contention = field(default_factory=Contention)
    versions: Mapping[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    command: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        labels = [variant.label for variant in self.variants]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"A report needs variants with different labels, got {labels}.")

    @property
    def reference(self) -> ReportVariant | None:
        """What the others are compared with."""
        return next((variant for variant in self.variants if variant.reference), None)

    def speedup(self, variant: ReportVariant) -> Speedup | None:
        """How many times as fast as the reference; None where one of the two was not timed."""
        reference = self.reference
        if reference is None or reference.result is None or variant.result is None:
            return None
        return doubted_speedup(variant.result, reference=reference.result, contention=self.contention)

    @property
    def candidates(self) -> tuple[ReportVariant, ...]:
        """All but the reference."""
        return tuple(variant for variant in self.variants if not variant.reference)


_EQUAL = 0.0005  # AP: equal to three decimals


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportVerdict:
    """``headline``: a sentence that can be signed; ``details``: what it rests on; ``outcome`` None: nothing judged."""

    outcome: Outcome | None
    headline: str
    details: tuple[str, ...]


def report_verdict(data: ReportData) -> ReportVerdict:
    """Of all candidates together; where not all passed, the headline and the details are about those that did not."""
    verdicts = [verdict for variant in data.candidates for verdict in variant.evaluation.verdicts]
    outcome = overall_outcome(verdict.outcome for verdict in verdicts)
    decisive = [verdict for verdict in verdicts if verdict.outcome is outcome]
    details = tuple(f"{verdict.subject}: {verdict.message}." for verdict in decisive)
    subjects = ", ".join(sorted({verdict.subject for verdict in decisive}))
    headline = {
        Outcome.FAILED: f"Not the same detector: {subjects}.",
        Outcome.INCONCLUSIVE: f"These images cannot decide whether it is the same detector: {subjects}.",
    }
    if outcome in headline:
        return ReportVerdict(outcome=outcome, headline=headline[outcome], details=details)
    return ReportVerdict(outcome=outcome, headline=_agreement_sentence(data), details=details)


def _agreement_sentence(data: ReportData) -> str:
    images = data.variants[0].evaluation.scores.images
    rates = _match_rates(data)
    if rates and not data.dataset.annotated:
        subject = "the variant's" if len(rates) == 1 else f"those of each of {len(rates)} variants"
        share = math.floor(1000 * min(rates)[0]) / 10  # Rounded down: the sentence says "at least".
        return f"At least {share:.1f} % of the reference's detections and {subject} agree on {images} images."
    drops = [v.evaluation.drop for v in data.candidates if v.evaluation.drop is not None]
    if not drops:
        return f"Measured on {images} images; there was no reference to compare with."
    # What the images show is the upper end of the interval; without one, only what was measured.
    shown = all(drop.resamples for drop in drops)
    largest = max(drop.high if shown else drop.value for drop in drops)
    subject = "The variant is" if len(drops) == 1 else f"All {len(drops)} variants are"
    basis = "by the 95 % interval" if shown else "as measured, without an interval"
    if largest < _EQUAL:
        return f"{subject} as accurate as the reference on {images} images, {basis}."
    bound = math.ceil(1000 * largest) / 1000  # Rounded up: the sentence says "within".
    return f"{subject} within {bound:.3f} AP of the reference on {images} images, {basis}."


def _match_rates(data: ReportData) -> list[tuple[float, str]]:
    """The share of detections that agree with the reference's, and the variant."""
    agreements = [(v.evaluation.agreement, v.label) for v in data.candidates]
    return [(agreement.match_rate, label) for agreement, label in agreements if agreement and not agreement.empty]


def key_figures(data: ReportData) -> list[tuple[str, str]]:
    """Numbers with their units, and what each is: accuracy lost, speed and size gained, share in INT8."""
    figures = []
    drops = [(v.evaluation.drop, v.label) for v in data.candidates if v.evaluation.drop is not None]
    rates = _match_rates(data)
    if rates and not data.dataset.annotated:
        rate, label = min(rates)
        figures.append((f"{100 * rate:.1f} %", f"of the detections agree with the reference's ({label})"))
    elif drops:
        drop, label = max(drops, key=lambda item: item[0].value)
        reach = f"; the interval reaches {100 * drop.high:.1f}" if drop.resamples else ""
        figures.append((f"{100 * max(drop.value, 0.0):.1f}", f"points of AP lost as measured ({label}){reach}"))
    reference = data.reference
    timed = [(speedup, v) for v in data.candidates if (speedup := data.speedup(v)) is not None]
    if reference and timed:
        speedup, variant = max(timed, key=lambda item: item[0].ratio)
        meaning = f"as fast as {reference.label}: {variant.p50_ms:.1f} ms an image ({variant.label})"
        if speedup.problem:
            figures.append(("no speed-up", f"that could be quoted: {speedup.problem}"))
        else:
            figures.append((f"{speedup.ratio:.1f} times", meaning))
    sizes = [(v.result.file_bytes, v.label) for v in data.candidates if v.result and v.result.file_bytes]
    if reference and reference.result and reference.result.file_bytes and sizes:
        size, label = min(sizes)
        checkpoint = f"{reference.result.file_bytes / 2**20:.1f} MiB"
        meaning = f"smallest model ({label}); the checkpoint has {checkpoint}"
        figures.append((f"{size / 2**20:.1f} MiB", meaning))
    shares = [(v.int8_share, v.label) for v in data.candidates if v.int8_share is not None]
    if shares:
        share, label = min(shares)
        meaning = f"of the multiply-accumulates run in INT8 at least ({label})"
        figures.append((f"{100 * share:.1f} %", meaning))
    return figures


def dataset_sentence(data: ReportData) -> str:
    """The evaluation images, their objects and classes, and where the ground truth comes from."""
    scores, names = data.variants[0].evaluation.scores, data.dataset.class_names
    return (
        f"{scores.images} images with {scores.objects} objects of {len(names)} classes "
        f"({', '.join(names[:8])}{', …' if len(names) > 8 else ''}); "
        + (
            f"ground truth: {Path(data.dataset.source).name}."
            if data.dataset.annotated
            else "no annotations: the reference's own detections stand for the ground truth."
        )
    )
