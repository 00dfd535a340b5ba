"""From a checkpoint to a bundle that is proven to be the same detector."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.mixed_precision import TRADE_OFF_SUFFIX, read_trade_offs
from fcos_deploy.accuracy.dataset import label_index, load_coco
from fcos_deploy.accuracy.evaluate import Evaluation, Evaluations
from fcos_deploy.accuracy.gate import require_all
from fcos_deploy.benchmark.run import Benchmark
from fcos_deploy.bundle import (
    DEFAULT_GATES,
    Artifact,
    BundleWriter,
    GoldenImage,
    Manifest,
    Provenance,
    RunDefaults,
    StepCache,
    StepOutput,
)
from fcos_deploy.bundle.manifest import BOM_NAME, bill_of_materials
from fcos_deploy.core.backend import all_backends, get_backend
from fcos_deploy.core.enums import ComputeType, NmsForm, Precision, Tail
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.exporter import all_exporters
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Finding, Outcome, Severity, overall_outcome
from fcos_deploy.core.libraries import recorded_versions
from fcos_deploy.core.machine import utc_now
from fcos_deploy.core.progress import ProgressFn, StageClock, StageRecord, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline import proof
from fcos_deploy.pipeline.source import open_source, source_contract
from fcos_deploy.pipeline.steps import (
    Calibrated,
    DeployContext,
    DeployRequest,
    Variant,
    build,
    calibrate,
    export,
    make_for_device,
    open_image_sets,
    quantize,
)
from fcos_deploy.report import ReportData, ReportFile, ReportVariant, write_report

if TYPE_CHECKING:
    from fcos_deploy.model.wrap import WrappedModule

__all__ = ["DEMO_DATA", "Deployment", "backends_to_measure", "check_inputs", "demo_request", "deploy"]


DEMO_DATA = Path(__file__).parent.parent / "demo_data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A finished bundle and the figures behind it; the reference is first in ``benchmark.results``.

    ``stages``: where the ``seconds`` went. ``findings``: what is to be said of the images.
    """

    bundle: Path
    evaluations: Evaluations
    benchmark: Benchmark
    seconds: float
    stages: tuple[StageRecord, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def outcome(self) -> Outcome | None:
        """What judging every variant came to; a bundle that the images cannot decide is inconclusive."""
        return overall_outcome(verdict.outcome for verdict in self.evaluations.verdicts)

    @property
    def rows(self) -> list[Evaluation]:
        """The reference first, then one for each variant."""
        reference = self.evaluations.reference
        return [*([] if reference is None else [reference]), *self.evaluations.candidates]


def deploy(
    request: DeployRequest | WrappedModule,
    *,
    progress: ProgressFn = no_progress,
    **fields: Any,  # Any: the fields of DeployRequest, each of its own type
) -> Deployment:
    """Make the bundle; an interrupted run resumes where it stopped when it is started again.

    ``deploy(wrapped, output=..., calibration_images=...)`` is the request of a wrapped module with these fields.

    A bundle whose accuracy the images cannot decide is made, and its ``outcome`` says so.

    Raises:
        AccuracyGateError: an INT8 variant cannot hold the gate (the bundle is made, with the other artifacts), or
            an engine is not the same detector or the finished bundle fails its own ``verify`` (no bundle is made).
        InconclusiveError: the images show too little to verify an engine by (no bundle is made).
        FcosDeployError: a step failed; what was finished is kept for the next run.
    """
    started, stages = time.perf_counter(), StageClock()
    if not isinstance(request, DeployRequest):
        request = DeployRequest(checkpoint=request, **fields)
    elif fields:
        raise ConfigError(f"Set {', '.join(sorted(fields))} in the DeployRequest, not beside it.")
    backends = backends_to_measure(request)
    with (
        contextlib.closing(open_source(request.checkpoint, options=request.options)) as source,
        BundleWriter(request.output) as writer,
        contextlib.ExitStack() as stack,
    ):
        for name in backends:  # They open each artifact to compare, to evaluate, to time and to verify it.
            stack.enter_context(get_backend(name).keeping_models())
        with stages.stage("images"):
            images = open_image_sets(request, source.contract)
        cache = StepCache(request.cache) if request.cache else None
        context = DeployContext(request, source, source.contract, images, writer, progress, cache, stages)
        variants, calibrations, refused = _make_artifacts(context, backends)
        evaluations = proof.measure_accuracy(context, variants)
        require_all(evaluations.verdicts, allow_inconclusive=True)  # Such a bundle is made, and says so.
        golden_images = proof.golden_images(context, evaluations)
        golden = proof.write_golden(context, golden_images, evaluations)
        benchmark = proof.measure_speed(context, variants)
        manifest = replace(
            _manifest(context, variants, calibrations=calibrations, golden=golden),
            golden_runs=proof.run_golden(
                context, variants, images=golden_images, golden=golden, evaluations=evaluations
            ),
            accuracy=proof.accuracy_figures(context, variants, evaluations),
            benchmark=proof.benchmark_figures(context, variants, benchmark),
        )
        findings = tuple(
            dict.fromkeys(finding for calibrated in calibrations for finding in calibrated.record.findings)
        )
        if source.note:
            findings = (Finding(kind="reference", severity=Severity.WARNING, message=source.note), *findings)
        fallbacks = dict.fromkeys(f"{plan.profile.title}: {plan.fallback}" for plan in request.plans if plan.fallback)
        findings += tuple(Finding(kind="fallback", severity=Severity.WARNING, message=message) for message in fallbacks)
        notes = (*(f"No INT8: {error.message}" for error in refused), *(finding.line for finding in findings))
        _write_report(context, manifest, variants=variants, evaluations=evaluations, benchmark=benchmark, notes=notes)
        _write_bom(context, manifest)

        def replay(folder: Path) -> None:
            with stages.stage("verify"):
                proof.replay_verify(context, folder, variants, images=golden_images, evaluations=evaluations)

        bundle = writer.finish(replace(manifest, stages=stages.records), check=replay)
    if refused:
        in_int8 = any(variant.artifact.precision is Precision.INT8 for variant in variants)
        held = "the other artifacts" if in_int8 else "the float artifacts only"
        raise AccuracyGateError(f"{refused[0].message}\nThe bundle '{bundle}' holds {held}.", hint=refused[0].hint)
    seconds = time.perf_counter() - started
    return Deployment(
        bundle=bundle,
        evaluations=evaluations,
        benchmark=benchmark,
        seconds=seconds,
        stages=stages.records,
        findings=findings,
    )


def check_inputs(request: DeployRequest) -> None:
    """Read what ``deploy`` reads before it makes anything, by the same functions: checkpoint, images, annotations.

    Raises:
        FcosDeployError: as ``deploy`` for these.
    """
    backends_to_measure(request)
    contract = source_contract(request.checkpoint, options=request.options)
    open_image_sets(request, contract)
    if request.images is not None and request.annotations is not None:
        label_index(contract.class_names, load_coco(request.annotations, images=request.images))


def backends_to_measure(request: DeployRequest) -> tuple[str, ...]:
    """Those asked for, those of the device plans that run here as well, or all that this machine builds for and runs.

    Raises:
        ConfigError: a backend was asked for that cannot be built for, or does not run here.
    """
    exporters = sorted(all_exporters())
    for name in request.backends:
        if name not in exporters:
            raise ConfigError(
                f"Nothing can be built for backend '{name}'.", hint=f"choose from: {', '.join(exporters)}"
            )
        if not _runs_here(name):
            problem = get_backend(name).probe().problem or "it has no device"
            raise ConfigError(
                f"Backend '{name}' cannot run here: {problem}",
                hint="fcos-deploy deploy --target PROFILE builds for another device",
            )
    if request.backends:
        return request.backends
    planned = tuple(dict.fromkeys(plan.backend for plan in request.plans if _runs_here(plan.backend)))
    return planned or tuple(name for name in exporters if name in all_backends() and _runs_here(name))


def _runs_here(name: str) -> bool:
    probe = get_backend(name).probe()
    return probe.available and bool(probe.devices)


def _make_artifacts(
    context: DeployContext, backends: tuple[str, ...]
) -> tuple[list[Variant], list[Calibrated], list[AccuracyGateError]]:
    """What is measured here, the calibrations behind it if there is INT8, and why INT8 is missing where it is."""
    request = context.request
    forms = [plan.nms_form for plan in request.plans if plan.tail is Tail.NMS]
    with_int8 = Precision.INT8 in request.precisions
    nms_form = forms[0] if forms else NmsForm.ONNX
    variants: list[Variant] = []
    refused: list[AccuracyGateError] = []
    calibrations: dict[str, Calibrated] = {}
    for name in backends:
        # An engine that a plan makes as well is made once, from the same graph.
        tail = next((plan.tail for plan in request.plans if plan.backend == name), request.tail)
        graphs = {
            precision: export(context, tail=tail, precision=precision, nms_form=nms_form, backend=name)
            for precision in (Precision.FP32, Precision.FP16)
            if precision in request.precisions or (with_int8 and precision is Precision.FP32)
        }
        built = {p: build(context, graphs[p], backend=name) for p in graphs if p in request.precisions}
        variants += built.values()
        if not with_int8:
            continue
        source = graphs[Precision.FP32]
        calibrated = calibrate(context, source)
        calibrations[calibrated.record.path] = calibrated
        try:
            float_variant = built.get(Precision.FP32)
            int8 = quantize(context, source, calibrated=calibrated, consumer=name, float_variant=float_variant)
            variants.append(build(context, int8, backend=name))
        except AccuracyGateError as error:
            refused.append(error)
    if refused and not variants:  # INT8 alone was asked for.
        raise refused[0]
    try:
        for plan in request.plans:
            make_for_device(context, plan)
        if not request.plans and calibrations:
            # The portable INT8 graph, from which other devices build their engines.
            if source.artifact.backend:  # Its form of deformable convolutions is for one runtime only.
                source = export(context, tail=source.tail, nms_form=nms_form)
                calibrated = calibrate(context, source)
                calibrations[calibrated.record.path] = calibrated
            floats = [variant for variant in variants if variant.artifact.precision is Precision.FP32]
            float_variant = max(floats, key=lambda variant: variant.backend == "onnxruntime", default=None)
            quantize(context, source, calibrated=calibrated, consumer="portable", float_variant=float_variant)
    except AccuracyGateError as error:
        refused.append(error)
    variants = proof.with_bf16(variants) if ComputeType.BF16 in request.computes else variants
    return variants, list(calibrations.values()), refused


def _manifest(
    context: DeployContext, variants: list[Variant], *, calibrations: list[Calibrated], golden: tuple[GoldenImage, ...]
) -> Manifest:
    request = context.request
    preferred = next((v for v in reversed(variants) if v.artifact.precision is Precision.INT8), variants[-1])
    int8_gate = replace(DEFAULT_GATES[Precision.INT8], judge=request.judge)
    asked = request.gate
    if asked.max_map_drop is not None:
        int8_gate = replace(
            int8_gate,
            max_map_drop=asked.max_map_drop,
            max_precision_drop=asked.max_precision_drop,
            max_recall_drop=asked.max_recall_drop,
        )
    return Manifest(
        name=request.output.stem,
        contract=context.contract,
        provenance=Provenance(
            checkpoint=context.source.name,
            checkpoint_sha256=context.source.sha256,
            created=_created(context),
            command=request.command,
            platform=platform.platform(),
            tools=recorded_versions(),
            decisions=(*context.contract.decisions, *context.source.decisions),
        ),
        defaults=RunDefaults(
            backend=preferred.backend,
            precision=preferred.artifact.precision,
            profile=", ".join(plan.profile.name for plan in request.plans),
            fallback=tuple(dict.fromkeys(v.backend for v in variants if v.backend != preferred.backend)),
            **{name: getattr(request.session, name) for name in ("compute", "hint", "threads", "streams", "batch")},
        ),
        gates={**DEFAULT_GATES, Precision.INT8: int8_gate},
        golden=golden,
        calibration=tuple(calibrated.record for calibrated in calibrations),
    )


def _write_bom(context: DeployContext, manifest: Manifest) -> None:
    """Leave ``bom.cdx.json``, about all files so far, in the bundle."""
    steps = context.writer.finished
    artifacts = tuple(artifact for step in steps for artifact in step.artifacts)
    models = {artifact.path for artifact in artifacts}
    files = tuple(record for step in steps for record in step.files if record.path not in models)
    text = bill_of_materials(replace(manifest, artifacts=artifacts, files=files))

    def make(folder: Path) -> StepOutput:
        (folder / BOM_NAME).write_text(text, encoding="utf-8")
        return StepOutput()

    context.step("bill-of-materials", stage="report", inputs={"text": text}, make=make)


def _created(context: DeployContext) -> str:
    """When this bundle was begun; a resumed run keeps the moment."""

    def make(_: Path) -> StepOutput:
        return StepOutput(values=utc_now())

    inputs = {"checkpoint": context.source.sha256, "command": context.request.command}
    return str(context.writer.step("created", inputs=inputs, make=make).values)


def demo_request(output: Path) -> DeployRequest:
    """Deploy the bundled blood-cell detector for every backend of this machine.

    Raises:
        ConfigError: this installation came without the demo's data.
    """
    checkpoint = DEMO_DATA / "fcos_bccd.safetensors"
    if not checkpoint.is_file():
        raise ConfigError("This installation has no demo data.", hint="install fcos-deploy from its wheel or a clone")
    return DeployRequest(
        checkpoint=checkpoint,
        output=output,
        calibration_images=DEMO_DATA / "calibration",
        images=DEMO_DATA / "evaluation",
        annotations=DEMO_DATA / "evaluation.json",
        max_map_drop=0.02,  # On these 87 images the intervals of INT8 reach 0.014: one point is too near to be decided.
        command=f"fcos-deploy demo -o {output.name}",
    )


def _write_report(
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
            searches=tuple(
                read_trade_offs(context.writer.path(path)) for path in paths if path.endswith(TRADE_OFF_SUFFIX)
            ),
            created=provenance.created.replace("T", " ").replace("+00:00", " UTC"),
            files=_files(context, manifest, artifacts),
            machine=benchmark.machine,
            contention=benchmark.contention,
            versions={**recorded_versions(), **{tool: v for a in artifacts for tool, v in a.step.tools.items()}},
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
    context.step("report", stage="report", inputs=inputs, make=make)


def _variants(
    context: DeployContext, variants: list[Variant], evaluations: Evaluations, benchmark: Benchmark
) -> tuple[ReportVariant, ...]:
    """The reference, and the variants with the share of each that its runtime really executes in INT8."""
    from calibration.execution import PROFILERS, executed_share

    shown = []
    shares: dict[tuple[Path, str], float | None] = {}  # the same for a model's floats in float32 and in bf16
    reference, *results = benchmark.results
    if evaluations.reference is not None:
        label = f"{context.source.reference().backend} fp32" + (" reference" if context.source.note else "")
        shown.append(ReportVariant(label=label, evaluation=evaluations.reference, result=reference, reference=True))
    for variant, evaluation, result in zip(variants, evaluations.candidates, results, strict=True):
        share = None
        if variant.artifact.precision is Precision.INT8 and variant.backend in PROFILERS:
            key = (variant.model, variant.backend)
            if key not in shares:
                lineage = context.writer.lineage(variant.artifact)
                source = next(artifact for artifact in lineage if artifact.precision is Precision.FP32)
                shares[key] = executed_share(context.conv_graph(source), *key).share
            share = shares[key]
        shown.append(ReportVariant(label=variant.label, evaluation=evaluation, result=result, int8_share=share))
    return tuple(shown)


def _files(context: DeployContext, manifest: Manifest, artifacts: list[Artifact]) -> tuple[ReportFile, ...]:
    """The checkpoint, the calibration that went into the INT8 files, and what was made from them step by step."""
    source = manifest.provenance
    size = context.source.size
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
