"""The few numbers that stand beside a report's verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.trade_offs import SUFFIX, TradeOffs, read_trade_offs
from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import Evaluation, Evaluations
from fcos_deploy.accuracy.matching import DetectionMatch, MatchOptions, match_detections
from fcos_deploy.benchmark.run import Benchmark, BenchmarkResult
from fcos_deploy.bundle import Artifact, Manifest, StepOutput
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.image import read_image
from fcos_deploy.core.machine import MachineFacts
from fcos_deploy.core.score_drift import ScoreDrift as MovedScores
from fcos_deploy.core.score_drift import score_drift
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline.steps import DeployContext, Variant
from fcos_deploy.report import (
    ChainLink,
    ClassRow,
    ImagePanel,
    KeyFigure,
    LatencyRow,
    LayerRow,
    MixedPrecisionPart,
    PanelBox,
    PrecisionCurve,
    Provenance,
    ReportData,
    ReportVerdict,
    ScoreDrift,
    TrialPoint,
    VariantRow,
    write_report,
)

__all__ = [
    "ReportParts",
    "Shown",
    "differing_images",
    "key_figures",
    "machine_rows",
    "moved_scores",
    "report_part",
    "report_parts",
    "report_verdict",
    "write_report_step",
]


def key_figures(rows: Sequence[VariantRow]) -> tuple[KeyFigure, ...]:
    """Accuracy lost at most, speed gained, size saved, share in INT8: those that were measured."""
    reference = next((row for row in rows if row.reference), None)
    others = [row for row in rows if not row.reference]
    found = (_drop(others), _speed(reference, others), _size(reference, others), _int8(others))
    return tuple(figure for figure in found if figure is not None)


def _drop(rows: Sequence[VariantRow]) -> KeyFigure | None:
    drops = [(row.drop, row.label) for row in rows if row.drop is not None]
    if not drops:
        return None
    worst, label = max(drops)
    return KeyFigure(f"{100 * max(worst, 0.0):.1f}", f"points of AP lost at most ({label})")


def _speed(reference: VariantRow | None, rows: Sequence[VariantRow]) -> KeyFigure | None:
    timed = [(row.p50_ms, row.label) for row in rows if row.p50_ms is not None]
    if reference is None or reference.p50_ms is None or not timed:
        return None
    best, label = min(timed)
    return KeyFigure(
        f"{reference.p50_ms / best:.1f} times", f"as fast as {reference.label}: {best:.1f} ms an image ({label})"
    )


def _size(reference: VariantRow | None, rows: Sequence[VariantRow]) -> KeyFigure | None:
    sizes = [(row.file_bytes, row.label) for row in rows if row.file_bytes]
    if reference is None or not reference.file_bytes or not sizes:
        return None
    least, label = min(sizes)
    return KeyFigure(f"{least / 2**20:.1f} MiB", f"smallest model ({label}); the checkpoint has {_mib(reference)}")


def _mib(row: VariantRow) -> str:
    return f"{(row.file_bytes or 0) / 2**20:.1f} MiB"


def _int8(rows: Sequence[VariantRow]) -> KeyFigure | None:
    shares = [(row.int8_share, row.label) for row in rows if row.int8_share is not None]
    if not shares:
        return None
    least, label = min(shares)
    return KeyFigure(f"{100 * least:.1f} %", f"of the multiply-accumulates run in INT8 at least ({label})")


_SHOWN = MatchOptions(min_score=0.4)  # what images show; lower scores would cover the image


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One variant as a report shows it; ``speed`` and ``int8_share`` None where they were not measured."""

    label: str
    evaluation: Evaluation
    speed: BenchmarkResult | None = None
    reference: bool = False
    passed: bool | None = None
    int8_share: float | None = None


def differing_images(dataset: Dataset, shown: Sequence[Shown], *, count: int) -> tuple[ImagePanel, ...]:
    """The ``count`` images on which a variant diverges furthest from the reference.

    The worst pair of image and variant first; an image is shown once.
    """
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
    return tuple(_panel(dataset, i, reference=reference, other=shown[j]) for i, j in chosen.items())


def _disagreement(reference: Detections, candidate: Detections) -> float:
    match = match_detections(reference, candidate, options=_SHOWN)
    scores = np.concatenate([reference.scores[match.missed], candidate.scores[match.extra]])
    moved = np.abs(reference.scores[match.reference] - candidate.scores[match.candidate])
    return float(scores.sum() + 0.1 * moved.sum() + 0.1 * (1 - match.iou).sum())


def _panel(dataset: Dataset, index: int, *, reference: Shown, other: Shown) -> ImagePanel:
    image = dataset.images[index]
    mine = reference.evaluation.run.detections[image.image_id]
    theirs = other.evaluation.run.detections[image.image_id]
    match = match_detections(mine, theirs, options=_SHOWN)
    names = reference.evaluation.run.names
    return ImagePanel(
        name=image.path.name,
        variant=other.label,
        pixels=read_image(image.path),
        reference=_boxes(mine, names, alone=match.missed, moved={}),
        candidate=_boxes(theirs, names, alone=match.extra, moved=_score_changes(mine, theirs, match)),
        note=_note(mine, theirs, match),
    )


def _note(mine: Detections, theirs: Detections, match: DetectionMatch) -> str:
    largest = max(map(abs, _score_changes(mine, theirs, match).values()), default=0.0)
    return f"Scores of pairs differ by up to {largest:.3f}. Shown: scores of at least {_SHOWN.min_score}."


def _score_changes(mine: Detections, theirs: Detections, match: DetectionMatch) -> dict[int, float]:
    """Of each detection of the candidate that has a partner: its score minus the partner's."""
    change = theirs.scores[match.candidate] - mine.scores[match.reference]
    return dict(zip(match.candidate.tolist(), change.tolist(), strict=True))


def _boxes(
    found: Detections, names: tuple[str, ...], *, alone: NDArray[np.int64], moved: Mapping[int, float]
) -> tuple[PanelBox, ...]:
    lonely = set(alone.tolist())
    return tuple(
        PanelBox(
            box=(float(x1), float(y1), float(x2), float(y2)),
            score=float(found.scores[i]),
            name=names[found.labels[i]] if 0 <= found.labels[i] < len(names) else str(found.labels[i]),
            partner=i not in lonely,
            moved=moved.get(i, 0.0),
        )
        for i in np.flatnonzero(found.scores >= _SHOWN.min_score).tolist()
        for x1, y1, x2, y2 in [found.boxes[i]]
    )


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
    images: tuple[ImagePanel, ...]


def report_parts(dataset: Dataset, shown: Sequence[Shown], *, images: int = 4) -> ReportParts:
    """Rows, curves and the ``images`` images on which a variant diverges furthest from the reference."""
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
        images=differing_images(dataset, shown, count=images),
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
    drops = [t.drop.value for t in evaluations.candidates if t.drop is not None]
    count = evaluations.candidates[0].scores.images
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
        f"ground truth: {Path(dataset.source).name}."
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


def write_report_step(
    context: DeployContext,
    manifest: Manifest,
    *,
    variants: list[Variant],
    evaluations: Evaluations,
    speed: Benchmark,
    notes: tuple[str, ...] = (),
) -> None:
    """Leave ``report.html`` and ``report.md`` in the bundle."""

    def make(folder: Path) -> StepOutput:
        context.progress("report", 0, 1)
        parts = report_parts(evaluations.dataset, _shown(context, variants, evaluations, speed))
        data = ReportData(
            title=manifest.name,
            verdict=report_verdict(evaluations),
            data=parts.data,
            variants=parts.variants,
            figures=parts.figures,
            classes=parts.classes,
            curves=parts.curves,
            drifts=parts.drifts,
            latencies=parts.latencies,
            images=parts.images,
            mixed=tuple(report_part(found) for found in _searches(context)),
            provenance=_provenance(context, manifest, speed),
            notes=notes,
        )
        write_report(data, folder / "report.html")
        context.progress("report", 1, 1)
        return StepOutput()

    inputs = {
        "manifest": json.dumps(to_json(manifest)),
        "files": " ".join(record.sha256 for step in context.writer.finished for record in step.files),
        "images": f"{context.request.images} {context.request.annotations}",
        "notes": " ".join(notes),
    }
    context.writer.step("report", inputs=inputs, make=make)


def _shown(context: DeployContext, variants: list[Variant], evaluations: Evaluations, speed: Benchmark) -> list[Shown]:
    reference = evaluations.reference
    shown = []
    if reference is not None:
        shown.append(Shown(label="pytorch fp32", evaluation=reference, speed=speed.results[0], reference=True))
    for variant, evaluation, timed in zip(variants, evaluations.candidates, speed.results[1:], strict=True):
        label = f"{variant.backend} {variant.precision}" + (f" {variant.compute}" if variant.extra else "")
        passed = all(verdict.passed for verdict in evaluation.verdicts)
        share = int8_share(context, variant)
        shown.append(Shown(label=label, evaluation=evaluation, speed=timed, passed=passed, int8_share=share))
    return shown


def int8_share(context: DeployContext, variant: Variant) -> float | None:
    """Share of the convolutions' multiply-accumulates that the runtime executes in INT8; None: it cannot be asked."""
    from calibration.execution import PROFILERS, executed_share

    if variant.precision is not Precision.INT8 or variant.backend not in PROFILERS:
        return None
    return executed_share(context.graph, variant.path, variant.backend).share


def _searches(context: DeployContext) -> list[TradeOffs]:
    """What the searches for mixed precision of this deployment found."""
    names = (record.path for step in context.writer.finished for record in step.files)
    return [read_trade_offs(context.writer.path(name)) for name in names if name.endswith(SUFFIX)]


def _provenance(context: DeployContext, manifest: Manifest, speed: Benchmark) -> Provenance:
    source = manifest.provenance
    artifacts = [artifact for step in context.writer.finished for artifact in step.artifacts]
    return Provenance(
        created=source.created.replace("T", " ").replace("+00:00", " UTC"),
        chain=_chain(context, manifest, artifacts),
        versions=tuple(sorted({item for a in artifacts for item in a.step.tools.items()})),
        machine=machine_rows(speed.machine),
        commands=(source.command,) if source.command else (),
        decisions=tuple((d.name, d.value, d.source) for d in source.decisions),
    )


def _chain(context: DeployContext, manifest: Manifest, artifacts: list[Artifact]) -> tuple[ChainLink, ...]:
    """The checkpoint, what was made from it step by step, and the calibration that went into the INT8 files."""
    source = manifest.provenance
    names = {source.checkpoint_sha256: source.checkpoint, **{a.sha256: a.path for a in artifacts}}
    links = [
        ChainLink(
            path=source.checkpoint, kind="checkpoint", sha256=source.checkpoint_sha256, size=_size_report_step(context)
        )
    ]
    for record in manifest.calibration:
        path = context.writer.path(record.path)
        kind = f"ranges over {len(record.images)} images"
        links.append(ChainLink(path=record.path, kind=kind, sha256=sha256_file(path), size=path.stat().st_size))
    links += [
        ChainLink(
            path=a.path,
            kind=str(a.kind),
            sha256=a.sha256,
            size=a.size,
            parent=names.get(a.parent, a.parent[:12]),
            step=a.step.name,
        )
        for a in artifacts
    ]
    return tuple(links)


def _size_report_step(context: DeployContext) -> int:
    return context.request.checkpoint.stat().st_size


def report_part(found: TradeOffs) -> MixedPrecisionPart:
    """What a report shows of them."""
    trials = tuple(
        TrialPoint(
            float_layers=len(timed.trial.ignored_layers),
            int8_share=timed.trial.int8_share,
            ap=timed.trial.score,
            p50_ms=timed.p50_ms,
            chosen=timed.trial.ignored_layers == found.ignored_layers,
        )
        for timed in found.trials
    )
    layers = tuple(
        LayerRow(
            layer=item.layer.removesuffix(".weight"),
            classes=item.effect.classes,
            boxes=item.effect.boxes,
            centerness=item.effect.centerness,
            ignored=item.layer in found.ignored_layers,
        )
        for item in found.ranking
    )
    return MixedPrecisionPart(
        placement=found.placement,
        backend=found.backend,
        max_drop=found.max_drop,
        float_ap=found.float_score,
        float_p50_ms=found.float_p50_ms,
        trials=trials,
        layers=layers,
    )
