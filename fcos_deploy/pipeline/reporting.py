"""From what was measured to the data of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import Evaluation, Evaluations
from fcos_deploy.accuracy.matching import DetectionMatch, MatchOptions, match_detections
from fcos_deploy.benchmark.machine import MachineFacts
from fcos_deploy.benchmark.run import Benchmark, BenchmarkResult
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.image_io import read_image
from fcos_deploy.report import (
    ClassRow,
    LatencyRow,
    Picture,
    PictureBox,
    PrecisionCurve,
    ReportVerdict,
    ScoreDrift,
    VariantRow,
)

__all__ = ["ReportParts", "Shown", "machine_rows", "report_parts", "report_verdict"]

_EQUAL = 0.0005  # AP: equal to three decimals
_PICTURED = MatchOptions(min_score=0.4)  # what pictures show; lower scores would cover the image


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One variant as a report shows it; ``speed`` and ``int8_share`` None where they were not measured."""

    label: str
    evaluation: Evaluation
    speed: BenchmarkResult | None = None
    reference: bool = False
    passed: bool | None = None
    int8_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportParts:
    """The parts of ``ReportData`` that follow from evaluations and timings, under its names."""

    data: str
    variants: tuple[VariantRow, ...]
    classes: tuple[ClassRow, ...]
    curves: tuple[PrecisionCurve, ...]
    drifts: tuple[ScoreDrift, ...]
    latencies: tuple[LatencyRow, ...]
    pictures: tuple[Picture, ...]


def report_parts(dataset: Dataset, shown: Sequence[Shown], *, pictures: int = 4) -> ReportParts:
    """Rows, curves and the ``pictures`` images on which a variant departs furthest from the reference."""
    return ReportParts(
        data=_data_sentence(dataset, shown[0].evaluation),
        variants=tuple(_row(one) for one in shown),
        classes=_classes(dataset, shown),
        curves=tuple(_curves(shown)),
        drifts=tuple(
            ScoreDrift(variant=one.label, pairs=one.evaluation.agreement.score_pairs)
            for one in shown
            if one.evaluation.agreement is not None
        ),
        latencies=tuple(_latency(one.label, one.speed) for one in shown if one.speed is not None),
        pictures=_pictures(dataset, shown, count=pictures),
    )


def report_verdict(evaluations: Evaluations, benchmark: Benchmark | None) -> ReportVerdict:
    """Passed when every gate holds; None when nothing was judged."""
    verdicts = evaluations.verdicts
    failed = [v for v in verdicts if not v.passed]
    details = tuple(f"{v.subject}: {v.message}." for v in (failed or verdicts))
    speed = _speed_sentence(benchmark)
    if failed:
        subjects = sorted({v.subject for v in failed})
        return ReportVerdict(passed=False, headline=f"Not the same detector: {', '.join(subjects)}.", details=details)
    passed = True if verdicts else None
    agreed = _agreement_sentence(evaluations)
    return ReportVerdict(passed=passed, headline=agreed, details=(*details, *([speed] if speed else [])))


def _agreement_sentence(evaluations: Evaluations) -> str:
    drops = [t.drop.value for t in evaluations.targets if t.drop is not None]
    count = evaluations.targets[0].scores.images
    if not drops:
        return f"Measured on {count} images; there was no reference to compare with."
    worst = max(drops)
    every = "The variant is" if len(drops) == 1 else f"All {len(drops)} variants are"
    if worst < _EQUAL:
        return f"{every} as accurate as the reference on {count} images."
    return f"{every} within {worst:.3f} AP of the reference on {count} images."


def _speed_sentence(benchmark: Benchmark | None) -> str:
    if benchmark is None or len(benchmark.results) < 2:
        return ""
    first, *others = benchmark.results
    best = min(others, key=lambda result: result.latency.p50)
    ratio = first.latency.p50 / best.latency.p50
    return (
        f"Fastest: {best.backend} {best.precision}, {best.latency.p50:.1f} ms an image (median), "
        f"{ratio:.1f} times as fast as {first.backend} {first.precision} on the same machine."
    )


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


def _pictures(dataset: Dataset, shown: Sequence[Shown], *, count: int) -> tuple[Picture, ...]:
    """The worst pair of image and variant first; an image is shown once."""
    reference = next((one for one in shown if one.reference), None)
    if reference is None:
        return ()
    mine = reference.evaluation.run.detections
    ranked = sorted(
        (
            (_disagreement(mine[image.image_id], other.evaluation.run.detections[image.image_id]), i, j)
            for i, image in enumerate(dataset.images)
            for j, other in enumerate(shown)
            if not other.reference
        ),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    chosen: dict[int, int] = {}
    for _, i, j in ranked:
        if len(chosen) < count:
            chosen.setdefault(i, j)
    return tuple(_picture(dataset, i, reference=reference, other=shown[j]) for i, j in chosen.items())


def _disagreement(reference: Detections, candidate: Detections) -> float:
    match = match_detections(reference, candidate, options=_PICTURED)
    scores = np.concatenate([reference.scores[match.missed], candidate.scores[match.invented]])
    moved = np.abs(reference.scores[match.reference] - candidate.scores[match.candidate])
    return float(scores.sum() + 0.1 * moved.sum() + 0.1 * (1 - match.iou).sum())


def _picture(dataset: Dataset, index: int, *, reference: Shown, other: Shown) -> Picture:
    image = dataset.images[index]
    mine = reference.evaluation.run.detections[image.image_id]
    theirs = other.evaluation.run.detections[image.image_id]
    match = match_detections(mine, theirs, options=_PICTURED)
    names = reference.evaluation.run.names
    return Picture(
        name=image.path.name,
        variant=other.label,
        pixels=read_image(image.path),
        reference=_boxes(mine, names, alone=match.missed, least=_PICTURED.min_score),
        candidate=_boxes(theirs, names, alone=match.invented, least=_PICTURED.min_score),
        note=_note(mine, theirs, match),
    )


def _note(mine: Detections, theirs: Detections, match: DetectionMatch) -> str:
    moved = np.abs(mine.scores[match.reference] - theirs.scores[match.candidate])
    largest = float(moved.max(initial=0.0))
    return f"Scores of pairs differ by up to {largest:.3f}. Shown: scores of at least {_PICTURED.min_score}."


def _boxes(
    found: Detections, names: tuple[str, ...], *, alone: NDArray[np.int64], least: float
) -> tuple[PictureBox, ...]:
    lonely = set(alone.tolist())
    return tuple(
        PictureBox(
            box=(float(x1), float(y1), float(x2), float(y2)),
            score=float(found.scores[i]),
            name=names[found.labels[i]] if 0 <= found.labels[i] < len(names) else str(found.labels[i]),
            partner=i not in lonely,
        )
        for i in np.flatnonzero(found.scores >= least).tolist()
        for x1, y1, x2, y2 in [found.boxes[i]]
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
