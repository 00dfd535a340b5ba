"""The report of a deployment: joins what was measured with where it came from."""

from __future__ import annotations

import json
from pathlib import Path

from fcos_deploy.accuracy.evaluate import Evaluations
from fcos_deploy.benchmark.run import Benchmark
from fcos_deploy.bundle import Artifact, Manifest, StepOutput
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline.report_pictures import Shown
from fcos_deploy.pipeline.reporting import machine_rows, report_parts, report_verdict
from fcos_deploy.pipeline.steps import Variant, Workshop
from fcos_deploy.pipeline.trade_offs import SUFFIX, TradeOffs, read_trade_offs, report_part
from fcos_deploy.report import ChainLink, Provenance, ReportData, write_report

__all__ = ["write_report_step"]


def write_report_step(
    shop: Workshop,
    manifest: Manifest,
    *,
    variants: list[Variant],
    evaluations: Evaluations,
    speed: Benchmark,
    notes: tuple[str, ...] = (),
) -> None:
    """Leave ``report.html`` and ``report.md`` in the bundle."""

    def make(folder: Path) -> StepOutput:
        shop.progress("report", 0, 1)
        parts = report_parts(evaluations.dataset, _shown(shop, variants, evaluations, speed))
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
            pictures=parts.pictures,
            mixed=tuple(report_part(found) for found in _searches(shop)),
            provenance=_provenance(shop, manifest, speed),
            notes=notes,
        )
        write_report(data, folder / "report.html")
        shop.progress("report", 1, 1)
        return StepOutput()

    inputs = {
        "manifest": json.dumps(to_json(manifest)),
        "files": " ".join(record.sha256 for step in shop.writer.finished for record in step.files),
        "images": f"{shop.request.images} {shop.request.annotations}",
        "notes": " ".join(notes),
    }
    shop.writer.step("report", inputs=inputs, make=make)


def _shown(shop: Workshop, variants: list[Variant], evaluations: Evaluations, speed: Benchmark) -> list[Shown]:
    reference = evaluations.reference
    shown = []
    if reference is not None:
        shown.append(Shown(label="pytorch fp32", evaluation=reference, speed=speed.results[0], reference=True))
    for variant, evaluation, timed in zip(variants, evaluations.targets, speed.results[1:], strict=True):
        label = f"{variant.backend} {variant.precision}" + (f" {variant.compute}" if variant.extra else "")
        passed = all(verdict.passed for verdict in evaluation.verdicts)
        share = int8_share(shop, variant)
        shown.append(Shown(label=label, evaluation=evaluation, speed=timed, passed=passed, int8_share=share))
    return shown


def int8_share(shop: Workshop, variant: Variant) -> float | None:
    """Share of the convolutions' multiply-accumulates that the runtime executes in INT8; None: it cannot be asked."""
    from calibration.executed import PROFILERS, executed_share

    if variant.precision is not Precision.INT8 or variant.backend not in PROFILERS:
        return None
    return executed_share(shop.graph, variant.path, variant.backend).share


def _searches(shop: Workshop) -> list[TradeOffs]:
    """What the searches for mixed precision of this deployment found."""
    names = (record.path for step in shop.writer.finished for record in step.files)
    return [read_trade_offs(shop.writer.path(name)) for name in names if name.endswith(SUFFIX)]


def _provenance(shop: Workshop, manifest: Manifest, speed: Benchmark) -> Provenance:
    source = manifest.provenance
    artifacts = [artifact for step in shop.writer.finished for artifact in step.artifacts]
    return Provenance(
        created=source.created.replace("T", " ").replace("+00:00", " UTC"),
        chain=_chain(shop, manifest, artifacts),
        versions=tuple(sorted({item for a in artifacts for item in a.step.tools.items()})),
        machine=machine_rows(speed.machine),
        commands=(source.command,) if source.command else (),
        decisions=tuple((d.name, d.value, d.source) for d in source.decisions),
    )


def _chain(shop: Workshop, manifest: Manifest, artifacts: list[Artifact]) -> tuple[ChainLink, ...]:
    """The checkpoint, what was made from it step by step, and the calibration that went into the INT8 files."""
    source = manifest.provenance
    names = {source.checkpoint_sha256: source.checkpoint, **{a.sha256: a.path for a in artifacts}}
    links = [ChainLink(path=source.checkpoint, kind="checkpoint", sha256=source.checkpoint_sha256, size=_size(shop))]
    for record in manifest.calibration:
        path = shop.writer.path(record.path)
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


def _size(shop: Workshop) -> int:
    return shop.request.checkpoint.stat().st_size
