"""From what was measured to the data of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import Evaluation, Evaluations
from fcos_deploy.benchmark.machine import MachineFacts
from fcos_deploy.benchmark.run import BenchmarkResult
from fcos_deploy.core.score_drift import ScoreDrift as MovedScores
from fcos_deploy.core.score_drift import score_drift
from fcos_deploy.pipeline.key_figures import key_figures
from fcos_deploy.pipeline.report_pictures import Shown, differing_pictures
from fcos_deploy.report import (
    ClassRow,
    KeyFigure,
    LatencyRow,
    Picture,
    PrecisionCurve,
    ReportVerdict,
    ScoreDrift,
    VariantRow,
)

__all__ = ["ReportParts", "machine_rows", "moved_scores", "report_parts", "report_verdict"]

_EQUAL = 0.0005  # AP: equal to three decimals


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportParts:
    """The parts of ``ReportData`` that follow from evaluations and timings, under its names."""

    data: str
    variants: tuple[VariantRow, ...]
    figures: tuple[KeyFigure, ...]
    classes: tuple[ClassRow, ...]
    curves: tuple[PrecisionCurve, ...]
    drifts: tuple[ScoreDrift, ...]
    latencies: tuple[LatencyRow, ...]
    pictures: tuple[Picture, ...]


def report_parts(dataset: Dataset, shown: Sequence[Shown], *, pictures: int = 4) -> ReportParts:
    """Rows, curves and the ``pictures`` images on which a variant departs furthest from the reference."""
    rows = tuple(_row(one) for one in shown)
    return ReportParts(
        data=_data_sentence(dataset, shown[0].evaluation),
        variants=rows,
        figures=key_figures(rows),
        classes=_classes(dataset, shown),
        curves=tuple(_curves(shown)),
        drifts=tuple(
            ScoreDrift(variant=one.label, pairs=one.evaluation.agreement.score_pairs, moved=_moved(shown, one))
            for one in shown
            if one.evaluation.agreement is not None
        ),
        latencies=tuple(_latency(one.label, one.speed) for one in shown if one.speed is not None),
        pictures=differing_pictures(dataset, shown, count=pictures),
    )


def moved_scores(reference: Evaluation, other: Evaluation) -> MovedScores | None:
    """How far the scores of ``other`` are from the reference's on the same images; None: their classes differ."""
    if reference.run.names != other.run.names:
        return None
    mine, theirs = reference.run.detections, other.run.detections
    numbers = sorted(mine)
    return score_drift(
        [mine[number] for number in numbers],
        [theirs[number] for number in numbers],
        class_names=reference.run.names,
    )


def _moved(shown: Sequence[Shown], one: Shown) -> MovedScores | None:
    reference = next((other for other in shown if other.reference), None)
    return moved_scores(reference.evaluation, one.evaluation) if reference is not None else None


def report_verdict(evaluations: Evaluations) -> ReportVerdict:
    """Passed when every gate holds; None when nothing was judged."""
    verdicts = evaluations.verdicts
    failed = [v for v in verdicts if not v.passed]
    details = tuple(f"{v.subject}: {v.message}." for v in (failed or verdicts))
    if failed:
        subjects = sorted({v.subject for v in failed})
        return ReportVerdict(passed=False, headline=f"Not the same detector: {', '.join(subjects)}.", details=details)
    passed = True if verdicts else None
    agreed = _agreement_sentence(evaluations)
    return ReportVerdict(passed=passed, headline=agreed, details=details)


def _agreement_sentence(evaluations: Evaluations) -> str:
    drops = [t.drop.value for t in evaluations.targets if t.drop is not None]
    count = evaluations.targets[0].scores.images
    if not drops:
        return f"Measured on {count} images; there was no reference to compare with."
    worst = max(drops)
    every = "The variant is" if len(drops) == 1 else f"All {len(drops)} variants are"
    if worst < _EQUAL:
        return f"{every} as accurate as the reference on {count} images."
    bound = math.ceil(1000 * worst) / 1000  # Not rounded down: the sentence says "within".
    return f"{every} within {bound:.3f} AP of the reference on {count} images."


def _data_sentence(dataset: Dataset, first: Evaluation) -> str:
    return (
        f"{first.scores.images} images with {first.scores.objects} objects of {len(dataset.class_names)} classes "
        f"({', '.join(dataset.class_names[:8])}{', …' if len(dataset.class_names) > 8 else ''}); "
        f"truth: {Path(dataset.source).name}."
    )


def _row(one: Shown) -> VariantRow:
    scores, interval, drop = one.evaluation.scores, one.evaluation.interval, one.evaluation.drop
    speed, agreement = one.speed, one.evaluation.agreement
    latency = speed.latency if speed else None
    return VariantRow(
        label=one.label,
        backend=one.evaluation.run.backend,
        precision=one.evaluation.run.precision,
        artifact=one.evaluation.run.model,
        reference=one.reference,
        passed=one.passed,
        ap=scores.ap,
        ap_interval=(interval.low, interval.high) if interval else None,
        ap50=scores.ap50,
        ap75=scores.ap75,
        drop=drop.value if drop else None,
        drop_interval=(drop.low, drop.high) if drop and drop.resamples else None,
        match_rate=agreement.match_rate if agreement else None,
        p50_ms=latency.p50 if latency else None,
        p90_ms=latency.p90 if latency else None,
        p99_ms=latency.p99 if latency else None,
        throughput_fps=speed.throughput_fps if speed else None,
        file_bytes=speed.file_bytes if speed else None,
        peak_memory_mib=speed.cold_start.peak_memory_mib if speed and speed.cold_start else None,
        int8_share=one.int8_share,
    )


def _classes(dataset: Dataset, shown: Sequence[Shown]) -> tuple[ClassRow, ...]:
    return tuple(
        ClassRow(name=name, ap=tuple(one.evaluation.scores.per_class[k].ap for one in shown))
        for k, name in enumerate(dataset.class_names)
    )


def _curves(shown: Sequence[Shown]) -> list[PrecisionCurve]:
    return [
        PrecisionCurve(variant=one.label, class_name=scores.name, precision=scores.precision)
        for one in shown
        for scores in one.evaluation.scores.per_class
        if scores.precision
    ]


def _latency(label: str, speed: BenchmarkResult) -> LatencyRow:
    stages = speed.stages
    return LatencyRow(
        variant=label,
        samples_ms=speed.samples_ms,
        preprocess_ms=stages.preprocess,
        infer_ms=stages.infer,
        decode_ms=stages.decode,
    )


def machine_rows(machine: MachineFacts, extra: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
    """What a report says of the machine."""
    rows = {
        "processor": machine.processor,
        "cores used": str(machine.cores),
        "memory": f"{machine.memory_mib} MiB",
        "system": machine.system,
        "load before": "unknown" if machine.load is None else f"{machine.load:.2f}",
        **(extra or {}),
    }
    return tuple(rows.items())
