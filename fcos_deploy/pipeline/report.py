"""Writes the report of a deployment into its bundle."""

from __future__ import annotations

import json
from pathlib import Path

from calibration.trade_offs import SUFFIX, read_trade_offs
from fcos_deploy.accuracy.evaluate import Evaluations
from fcos_deploy.benchmark.run import Benchmark
from fcos_deploy.bundle import Artifact, Manifest, StepOutput
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.model_files import graph_file
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline.steps import DeployContext, Variant
from fcos_deploy.report import ReportData, ReportFile, ReportVariant, write_report

__all__ = ["write_report_step"]


def write_report_step(
    context: DeployContext,
    manifest: Manifest,
    *,
    variants: list[Variant],
    evaluations: Evaluations,
    benchmark: Benchmark,
    notes: tuple[str, ...] = (),
) -> None:
    """Leave ``report.html`` and ``report.md`` in the bundle."""

    def make(folder: Path) -> StepOutput:
        context.progress("report", 0, 1)
        provenance = manifest.provenance
        paths = [record.path for step in context.writer.finished for record in step.files]
        artifacts = [artifact for step in context.writer.finished for artifact in step.artifacts]
        data = ReportData(
            title=manifest.name,
            dataset=evaluations.dataset,
            variants=_variants(context, variants, evaluations, benchmark),
            searches=tuple(read_trade_offs(context.writer.path(path)) for path in paths if path.endswith(SUFFIX)),
            created=provenance.created.replace("T", " ").replace("+00:00", " UTC"),
            files=_files(context, manifest, artifacts),
            machine=benchmark.machine,
            contention=benchmark.contention,
            versions={tool: version for a in artifacts for tool, version in a.step.tools.items()},
            decisions=provenance.decisions,
            command=provenance.command,
            notes=notes,
        )
        write_report(data, folder / "report.html")
        context.progress("report", 1, 1)
        return StepOutput()

    inputs = {
        "manifest": json.dumps(to_json(manifest)),
        "files": " ".join(record.sha256 for step in context.writer.finished for record in step.files),
        "images": context.images.evaluation_key,
        "notes": " ".join(notes),
    }
    context.writer.step("report", inputs=inputs, make=make)


def _variants(
    context: DeployContext, variants: list[Variant], evaluations: Evaluations, benchmark: Benchmark
) -> tuple[ReportVariant, ...]:
    """The reference, and the variants with the share of each that its runtime really executes in INT8."""
    from calibration.execution import PROFILERS, executed_share
    from calibration.placement import open_graph

    shown = []
    reference, *results = benchmark.results
    if evaluations.reference is not None:
        shown.append(
            ReportVariant(label="pytorch fp32", evaluation=evaluations.reference, result=reference, reference=True)
        )
    float_graph = context.writer.path(graph_file(Precision.FP32, tail=Tail.RAW))
    for variant, evaluation, result in zip(variants, evaluations.candidates, results, strict=True):
        share = None
        if variant.artifact.precision is Precision.INT8 and variant.backend in PROFILERS:
            share = executed_share(open_graph(float_graph), variant.model, variant.backend).share
        shown.append(ReportVariant(label=variant.label, evaluation=evaluation, result=result, int8_share=share))
    return tuple(shown)


def _files(context: DeployContext, manifest: Manifest, artifacts: list[Artifact]) -> tuple[ReportFile, ...]:
    """The checkpoint, the calibration that went into the INT8 files, and what was made from them step by step."""
    source = manifest.provenance
    size = context.request.checkpoint.stat().st_size
    files = [ReportFile(path=source.checkpoint, kind="checkpoint", sha256=source.checkpoint_sha256, size=size)]
    for record in manifest.calibration:
        path, kind = context.writer.path(record.path), f"ranges over {len(record.images)} images"
        files.append(ReportFile(path=record.path, kind=kind, sha256=sha256_file(path), size=path.stat().st_size))
    names = {source.checkpoint_sha256: source.checkpoint, **{a.sha256: a.path for a in artifacts}}
    for artifact in artifacts:
        files.append(
            ReportFile(
                path=artifact.path,
                kind=str(artifact.kind),
                sha256=artifact.sha256,
                size=artifact.size,
                parent=names.get(artifact.parent, artifact.parent[:12]),
                step=artifact.step.name,
            )
        )
    return tuple(files)
