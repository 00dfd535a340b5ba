"""Measured against a reference: the variants of a bundle, models of any kind, and parity by stages or layers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.mixed_precision import find_trade_offs
from calibration.placement import placement_for
from fcos_deploy.accuracy.dataset import EvaluationImage, folder_images
from fcos_deploy.accuracy.diagnosis import OnnxLayers, explain, first_diverging_layer
from fcos_deploy.accuracy.evaluate import (
    Evaluation,
    EvaluationRequest,
    Evaluations,
    evaluate,
    judge_evaluation,
    widened_evaluation,
)
from fcos_deploy.accuracy.golden import choose_golden, detection_errors, image_scale, make_golden, read_golden_image
from fcos_deploy.accuracy.operating_point import OperatingGoal
from fcos_deploy.accuracy.parity import (
    LayerFinding,
    ParityImage,
    ParityReport,
    Tolerance,
    compare_stages,
    tolerance_for,
)
from fcos_deploy.accuracy.verify import VerifyOptions, require_verified, verify_bundle
from fcos_deploy.benchmark.measure import Contention, TimingOptions
from fcos_deploy.benchmark.run import Benchmark, BenchmarkRequest, model_bytes, run_benchmark
from fcos_deploy.bundle import (
    AccuracyFigure,
    Artifact,
    BenchmarkFigure,
    GoldenDetections,
    GoldenImage,
    GoldenRun,
    StepOutput,
    open_bundle,
)
from fcos_deploy.bundle.device_layer import machine_words
from fcos_deploy.checkpoints.rules import UNKNOWN_CLASS_NAMES
from fcos_deploy.core.artifact import kinds_of
from fcos_deploy.core.backend import SessionOptions, all_backends, get_backend
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, ComputeType, Precision, Tail
from fcos_deploy.core.errors import ConfigError, DeviceError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Gate, overall_outcome, undecided_because
from fcos_deploy.core.image import read_image
from fcos_deploy.core.libraries import recorded_versions, require
from fcos_deploy.core.machine import read_machine
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.detector import Detector, DetectorSpec
from fcos_deploy.pipeline.steps import DeployContext, DeployRequest, Variant
from fcos_deploy.report import ReportData, ReportFile, ReportVariant

if TYPE_CHECKING:
    from fcos_deploy.checkpoints.load import LoadedCheckpoint

__all__ = [
    "Comparison",
    "ComparisonRequest",
    "ParityRequest",
    "accuracy_figures",
    "benchmark_figures",
    "check_parity",
    "compare_models",
    "comparison_report",
    "find_layer",
    "golden_images",
    "in_bf16",
    "measure_accuracy",
    "measure_speed",
    "replay_verify",
    "run_golden",
    "with_bf16",
    "write_golden",
]

# A float32 artifact computes what PyTorch computes: a drop that shows in the third decimal, or without annotations one
# detection of 200 that has no partner, is a fault, not rounding.
_FP32_MAP_DROP, _FP32_MATCH_RATE = 0.0005, 0.995
# The first detection of a block warms up too. From 20 times on there is a 90th percentile: four blocks.
_TIMING = TimingOptions(rounds=6, warmup=0, throughput_seconds=0.5, settled_after=4)


def in_bf16(variant: Variant) -> Variant | None:
    """The same artifact in bf16; None where the backend or this processor does not compute in it."""
    twin = replace(variant, options=replace(variant.options, compute=ComputeType.BF16))
    try:
        twin.open().close()
    except (ConfigError, DeviceError):
        return None
    return twin


def with_bf16(variants: list[Variant]) -> list[Variant]:
    """Each variant, and where it can be the same in bf16 behind it."""
    return [run for variant in variants for run in (variant, in_bf16(variant)) if run is not None]


def measure_accuracy(context: DeployContext, variants: list[Variant]) -> Evaluations:
    """Evaluate the reference and every variant on all images, and judge each one's drop.

    An interrupted run resumes where it stopped.
    """
    request = context.request
    with context.stages.stage("accuracy"):
        evaluations = evaluate(
            EvaluationRequest(
                candidates=tuple(variants),
                images=request.images or request.calibration_images,
                annotations=request.annotations,
                reference=context.source.reference(),
                sample=request.sample,
                operating_goal=request.operating_goal,
                predictions=context.predictions,
                runs=context.runs,
                dataset=context.images.annotated,
                earlier=tuple(context.evaluations.values()),
            ),
            progress=context.progress,
        )
    judged, note = [], context.source.note
    for variant, measured in zip(variants, evaluations.candidates, strict=True):
        exact = variant.artifact.precision is Precision.FP32 and variant.compute is ComputeType.F32
        gate = _exact_gate(request) if exact else request.gate
        evaluation = widened_evaluation(measured, _choices(context, variant.artifact))
        verdicts = judge_evaluation(
            gate,
            evaluation,
            dataset=evaluations.dataset,
            reference=evaluations.reference,
            subject=f"{evaluation.run.subject} ({variant.compute})" + (note and f"; {note}"),
            # Float artifacts are made without calibration images.
            problem=undecided_because(context.images.findings) if variant.artifact.precision is Precision.INT8 else "",
        )
        judged.append(replace(evaluation, verdicts=verdicts))
    return replace(evaluations, candidates=tuple(judged))


def _exact_gate(request: DeployRequest) -> Gate:
    """What a float32 artifact has to keep, or what was asked for if that is less; without annotations no AP is lost."""
    asked = request.gate
    if request.annotations is None:
        return replace(asked, min_match_rate=max(_FP32_MATCH_RATE, asked.min_match_rate or 0.0))
    drop = _FP32_MAP_DROP if asked.max_map_drop is None else min(_FP32_MAP_DROP, asked.max_map_drop)
    return replace(asked, max_map_drop=drop)


def _choices(context: DeployContext, artifact: Artifact) -> int:
    """From how many graphs a search chose, on the images of the evaluation, the one that ``artifact`` was made from."""
    records = [origin.step.config for origin in context.writer.lineage(artifact)]
    return next((int(record["choices"]) for record in records if "choices" in record), 1)


def accuracy_figures(
    context: DeployContext, variants: list[Variant], evaluations: Evaluations
) -> tuple[AccuracyFigure, ...]:
    """For the manifest: the reference first, then the variants in their order."""
    rows: list[tuple[str, Precision, Evaluation]] = []
    if evaluations.reference is not None:
        rows.append((context.source.name, Precision.FP32, evaluations.reference))
    for variant, evaluation in zip(variants, evaluations.candidates, strict=True):
        rows.append((variant.artifact.path, variant.artifact.precision, evaluation))
    figures, note = [], context.source.note
    for artifact, precision, evaluation in rows:
        scores, drop = evaluation.scores, evaluation.drop
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
        metrics = {name: getattr(scores, name) for name in names}
        for share in ("precision", "recall"):  # means over the classes that have a threshold
            values = [value.value for point in evaluation.operating_points if (value := getattr(point, share))]
            metrics[f"operating_{share}"] = float(np.mean(values)) if values else None
        figures.append(
            AccuracyFigure(
                artifact=artifact,
                backend=evaluation.run.backend,
                precision=precision,
                dataset="annotated" if context.request.annotations else "reference detections",
                images=scores.images,
                metrics={name: value for name, value in metrics.items() if value is not None},
                drop=drop.value if drop else None,
                drop_interval=(drop.low, drop.high) if drop else None,
                outcome=overall_outcome(verdict.outcome for verdict in evaluation.verdicts),
                verdicts=tuple(
                    f"{verdict.name}: {verdict.message}" + (note and f"; {note}") for verdict in evaluation.verdicts
                ),
                score_drift=evaluation.score_drift,
                thresholds={p.name: round(p.score, 6) for p in evaluation.operating_points if p.score is not None},
                details=dict(evaluation.run.description),
            )
        )
    return tuple(figures)


def golden_images(context: DeployContext, evaluations: Evaluations) -> tuple[EvaluationImage, ...]:
    """The evaluation images that carry most evidence.

    Raises:
        InconclusiveError: the images show too little to verify an engine by.
    """
    images, detections = evaluations.dataset.images, _reference_detections(evaluations)
    chosen = choose_golden([detections[image.image_id] for image in images], decode=context.contract.decode)
    return tuple(images[index] for index in chosen)


def _reference_detections(evaluations: Evaluations) -> Mapping[int, Detections]:
    if evaluations.reference is None:  # Excluded: a deployment is always measured against its checkpoint.
        raise ConfigError("Golden detections need the reference.")
    return evaluations.reference.run.detections


def write_golden(
    context: DeployContext, images: tuple[EvaluationImage, ...], evaluations: Evaluations
) -> tuple[GoldenImage, ...]:
    """Keep the images, with what the reference was seen to detect in them."""
    paths = [image.path for image in images]

    def make(folder: Path) -> StepOutput:
        contract, detections = context.contract, _reference_detections(evaluations)
        pixels = [read_image(path, orientation=contract.preprocess.orientation) for path in paths]
        seen = [detections[image.image_id] for image in images]
        records = make_golden(pixels, seen, folder=folder, contract=contract)
        return StepOutput(values=[to_json(record) for record in records])

    inputs = {
        "checkpoint": context.source.sha256,
        "contract": repr(context.contract),
        "images": " ".join(sha256_file(path) for path in paths),
        **recorded_versions(),
    }
    step = context.step("golden", stage="golden images", inputs=inputs, make=make)
    return tuple(from_json(GoldenImage, value) for value in step.values)


def run_golden(
    context: DeployContext,
    variants: list[Variant],
    *,
    images: tuple[EvaluationImage, ...],
    golden: tuple[GoldenImage, ...],
    evaluations: Evaluations,
) -> tuple[GoldenRun, ...]:
    """What every variant detects in the golden images, and every graph from which a device builds its engine.

    An engine on a device is compared with these: they have the same rounding, which the reference has not. The golden
    images are copies of evaluation images, pixel for pixel: what was evaluated is not run again, and stands for the
    graph that it was built from where that is rounded alike.
    """
    specs = [(variant.artifact, variant) for variant in variants]
    graphs = [a for step in context.writer.finished for a in step.artifacts if a.kind is ArtifactKind.ONNX]
    runs_onnx = "onnxruntime" in all_backends() and get_backend("onnxruntime").probe().available
    for graph in graphs:
        if graph.path in {variant.artifact.path for variant in variants}:
            continue
        built = _rounded_alike(graph, variants)
        if built is None and runs_onnx:
            path = context.writer.path(graph.path)
            built = Variant(model=path, backend="onnxruntime", precision=graph.precision, artifact=graph)
        if built is not None:
            specs.append((graph, built))

    def make(_: Path) -> StepOutput:
        scales = [image_scale(context.contract, (image.height, image.width)) for image in golden]
        reference = [image.detections.to_detections() for image in golden]
        runs = []
        for artifact, spec in specs:
            detected = _evaluated(context, spec, images=images, evaluations=evaluations)
            if detected is None:
                copies = [read_golden_image(context.writer.path(g.path).read_bytes(), g) for g in golden]
                with spec.open() as detector:
                    detected = [detector.detect(copy) for copy in copies]
            runs.append(_golden_run(artifact, spec, reference, detected, scales=scales))
        return StepOutput(values=to_json(runs))

    inputs = {
        "golden": json.dumps(to_json(golden), sort_keys=True),
        "artifacts": " ".join(f"{_what_runs(spec)} {artifact.sha256}" for artifact, spec in specs),
        **recorded_versions(),
        **machine_words(read_machine()),
    }
    step = context.step("golden-runs", stage="golden images", inputs=inputs, make=make)
    return tuple(from_json(GoldenRun, value) for value in step.values)


def _rounded_alike(graph: Artifact, variants: list[Variant]) -> Variant | None:
    """What was built from ``graph`` and detects what every engine of it does, to rounding; None without one.

    Float32 is held to the reference's detections in every runtime. Of INT8 that is so where one backend alone can
    build from the graph.
    """
    single = graph.placement and placement_for(graph.placement).backends
    for variant in variants:
        built = variant.artifact
        same = (built.parent, built.precision) == (graph.sha256, graph.precision)
        alike = graph.precision is Precision.FP32 or single == (variant.backend,)
        if same and alike and variant.compute is ComputeType.F32:
            return variant
    return None


def _evaluated(
    context: DeployContext, variant: Variant, *, images: tuple[EvaluationImage, ...], evaluations: Evaluations
) -> list[Detections] | None:
    """What these very files detected in the images when they were evaluated; None if they have not run."""
    run = context.runs.get(variant, evaluations.dataset.images)
    return None if run is None else [run.detections[image.image_id] for image in images]


def _golden_run(
    artifact: Artifact, spec: Variant, reference: list[Detections], detected: list[Detections], *, scales: list[float]
) -> GoldenRun:
    edges, scores = detection_errors(reference, detected, scales=scales)
    errors = {
        f"{name}_p{percent}": round(float(np.percentile(values[np.isfinite(values)], percent)), 6)
        for name, values in (("edge_px", edges), ("score", scores))
        for percent in (50, 90)
        if np.isfinite(values).any()
    }
    return GoldenRun(
        artifact=artifact.path,
        backend=spec.backend,
        precision=artifact.precision,
        compute=spec.compute,
        detections=tuple(map(GoldenDetections.from_detections, detected)),
        errors=errors,
    )


def replay_verify(
    context: DeployContext,
    folder: Path,
    variants: list[Variant],
    *,
    images: tuple[EvaluationImage, ...],
    evaluations: Evaluations,
) -> None:
    """Verify the finished bundle in ``folder`` as a device will, with every variant that runs here.

    Every file is opened from the bundle and detects in the golden ``images``. A second variant of a file on the same
    backend, which differs in the compute type only, is opened too; what the same bytes detected when they were
    evaluated is judged again.

    Raises:
        AccuracyGateError: it does not hold, or has too little evidence.
    """
    ran = set[tuple[str, str]]()
    with open_bundle(folder) as bundle:
        for variant in variants:
            seen = None
            if (variant.backend, variant.artifact.sha256) in ran:
                seen = _evaluated(context, variant, images=images, evaluations=evaluations)
            options = VerifyOptions(
                backend=variant.backend,
                precision=variant.artifact.precision,
                session=variant.options,
                detected={} if seen is None else {variant.artifact.sha256: tuple(seen)},
            )
            record = verify_bundle(bundle, options=options, progress=context.progress)
            require_verified(record)
            ran.add((record.backend, record.artifact_sha256))


def measure_speed(context: DeployContext, variants: list[Variant]) -> Benchmark:
    """The reference first, then the variants; the artifact that was evaluated is the one that is timed.

    Throughput, first detection and memory are measured of what each backend runs by default, the last of its variants
    that computes in the bundle's own type. A run that was interrupted afterwards takes these times, and measures
    nothing again.
    """
    image = context.images.evaluation[0].path

    def make(_: Path) -> StepOutput:
        request = BenchmarkRequest(
            candidates=(context.source.reference(), *variants),
            image=image,
            timing=_TIMING,
            alone=tuple({v.backend: v for v in variants if v.compute is context.request.session.compute_type}.values()),
        )
        return StepOutput(values=to_json(run_benchmark(request, progress=context.progress)))

    inputs = {
        "checkpoint": context.source.sha256,
        "variants": " ".join(map(_what_runs, variants)),
        "image": sha256_file(image),
        "timing": repr(_TIMING),
        **recorded_versions(),
        **machine_words(read_machine()),
    }
    return from_json(Benchmark, context.step("speed", stage="speed", inputs=inputs, make=make).values)


def _what_runs(variant: Variant) -> str:
    """What the figures of a variant depend on: its file, how it runs, and the runtime."""
    version = get_backend(variant.backend).probe().version
    return f"{variant.backend} {version} {variant.options} {variant.artifact.sha256}"


def benchmark_figures(
    context: DeployContext, variants: list[Variant], benchmark: Benchmark
) -> tuple[BenchmarkFigure, ...]:
    """For the manifest: the reference first, then the variants in their order."""
    artifacts = [
        (context.source.name, Precision.FP32),
        *((variant.artifact.path, variant.artifact.precision) for variant in variants),
    ]
    return tuple(
        BenchmarkFigure(
            artifact=artifact,
            backend=result.backend,
            precision=precision,
            device=f"{benchmark.machine.processor}, {benchmark.machine.cores} cores",
            metrics={
                "total_p50_ms": result.latency.p50,
                **({} if result.latency.p90 is None else {"total_p90_ms": result.latency.p90}),
                **({} if result.latency.p99 is None else {"total_p99_ms": result.latency.p99}),
                "preprocess_p50_ms": result.stages.preprocess,
                "infer_p50_ms": result.stages.infer,
                "decode_p50_ms": result.stages.decode,
                **({} if result.throughput_fps is None else {"throughput_fps": result.throughput_fps}),
                **({"peak_memory_mib": result.cold_start.peak_memory_mib} if result.cold_start else {}),
            },
            details=dict(result.session),
        )
        for (artifact, precision), result in zip(artifacts, benchmark.results, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """``reference`` is what the candidates are compared with. ``timing`` None leaves speed out.

    ``operating_goal``: as in ``EvaluationRequest``.
    """

    reference: DetectorSpec
    candidates: tuple[DetectorSpec, ...]
    images: Path
    annotations: Path | None = None
    gate: Gate = field(default_factory=Gate)
    timing: TimingOptions | None = None
    limit: int | None = None
    resamples: int = 1000
    operating_goal: OperatingGoal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The measurements; in ``benchmark`` the reference is first."""

    request: ComparisonRequest
    evaluations: Evaluations
    benchmark: Benchmark | None

    @property
    def all(self) -> list[Evaluation]:
        """The reference, then the candidates."""
        reference = self.evaluations.reference
        return ([reference] if reference else []) + list(self.evaluations.candidates)


def compare_models(request: ComparisonRequest, *, progress: ProgressFn = no_progress) -> Comparison:
    """Evaluate all on the same images, then time them in turns.

    Raises:
        FcosDeployError: as evaluating and benchmarking do.
    """
    evaluations = evaluate(
        EvaluationRequest(
            candidates=request.candidates,
            images=request.images,
            annotations=request.annotations,
            reference=request.reference,
            gate=request.gate,
            limit=request.limit,
            resamples=request.resamples,
            operating_goal=request.operating_goal,
        ),
        progress=progress,
    )
    benchmark = None
    if request.timing is not None:
        image = evaluations.dataset.images[0].path
        benchmark = run_benchmark(
            BenchmarkRequest(candidates=(request.reference, *request.candidates), image=image, timing=request.timing),
            progress=progress,
        )
    return Comparison(request=request, evaluations=evaluations, benchmark=benchmark)


def comparison_report(comparison: Comparison, *, title: str, command: str = "") -> ReportData:
    """The data of a report on a comparison that ``command`` made."""
    results = comparison.benchmark.results if comparison.benchmark else (None,) * len(comparison.all)
    models = [spec.model for spec in (comparison.request.reference, *comparison.request.candidates)]
    return ReportData(
        title=title,
        dataset=comparison.evaluations.dataset,
        variants=tuple(
            ReportVariant(
                label=label,
                evaluation=evaluation,
                result=result,
                reference=evaluation is comparison.evaluations.reference,
            )
            for label, evaluation, result in zip(_labels(comparison.all), comparison.all, results, strict=True)
        ),
        searches=find_trade_offs(models[1:]),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        files=tuple(map(_report_file, dict.fromkeys(models))),
        machine=comparison.benchmark.machine if comparison.benchmark else None,
        contention=comparison.benchmark.contention if comparison.benchmark else Contention(),
        versions=recorded_versions(),
        command=command,
    )


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Backend and precision, with the model's name where that is not enough."""
    short = [evaluation.run.subject for evaluation in evaluations]
    long = [f"{e.run.subject} {e.run.model}" for e in evaluations]
    labels = [s if short.count(s) == 1 else name for s, name in zip(short, long, strict=True)]
    return [f"{label} ({i})" if labels.index(label) != i else label for i, label in enumerate(labels)]


def _report_file(path: Path) -> ReportFile:
    hashed = path / "manifest.json" if path.is_dir() else path
    kind = "bundle (hash of its manifest)" if path.is_dir() else path.suffix.lstrip(".") or str(kinds_of(path)[0])
    return ReportFile(path=path.name, kind=kind, sha256=sha256_file(hashed), size=model_bytes(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRequest:
    """``strict``: judge by what float32 allows, whatever the candidate's precision.

    ``options``: how the checkpoint is to be read; size and dtype of its input are those of the candidate.
    """

    candidate: DetectorSpec
    checkpoint: Path
    images: Path
    count: int = 4
    strict: bool = False
    options: CheckpointOptions = field(default_factory=CheckpointOptions)

    @property
    def tolerance(self) -> Tolerance | None:
        """None leaves it to the candidate's own precision."""
        return tolerance_for(Precision.FP32, ComputeType.F32) if self.strict else None


def check_parity(request: ParityRequest, *, progress: ProgressFn = no_progress) -> ParityReport:
    """Compare a model with the checkpoint that it was made from.

    Raises:
        FcosDeployError: one of the two cannot be opened or run, or there are no images.
    """
    options = SessionOptions(threads=request.candidate.options.threads)
    with request.candidate.open() as candidate:
        loaded = _load_like(request, candidate.contract)
        with Detector.of_network(loaded.model, loaded.contract, options=options) as reference:
            images = _images(request, reference)
            report = compare_stages(reference, candidate, images, tolerance=request.tolerance, progress=progress)
            return explain(report, reference, candidate, network=loaded.model)


def find_layer(request: ParityRequest, *, progress: ProgressFn = no_progress) -> LayerFinding | None:
    """The first layer of an ONNX graph that diverges from the same export of the checkpoint; None when none does.

    Raises:
        ConfigError: the model is not an ONNX file.
    """
    model = request.candidate.model
    if model.suffix != ".onnx":
        raise ConfigError(
            f"Layers can be compared in ONNX files only, '{model.name}' is not one.",
            hint="give the ONNX file that the engine was built from, with --backend",
        )
    from exporters.torch_onnx import ExportOptions, export_onnx

    with request.candidate.open() as candidate:
        source = _load_like(request, candidate.contract)
        feeds, _ = candidate.prepare([_images(request, candidate)[0].pixels])
        backend = candidate.session.description["backend"]
    options = request.candidate.options
    tolerance = request.tolerance or tolerance_for(candidate.contract.precision, options.compute_type)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.onnx"
        export_onnx(source, path, options=ExportOptions(tail=candidate.contract.tail), progress=progress)
        return first_diverging_layer(
            OnnxLayers(path, options=SessionOptions(threads=options.threads)),
            OnnxLayers(model, backend=backend, options=options),
            feeds,
            tolerance=tolerance,
            progress=progress,
        )


def _load_like(request: ParityRequest, candidate: ModelContract) -> LoadedCheckpoint:
    """The checkpoint for the candidate's input size and dtype, with the raw tail; all else by its own rules.

    Where the checkpoint has no class names, and none were given, the candidate's are believed.
    """
    spec = candidate.preprocess
    options = replace(
        request.options,
        input_size=spec.canvas,
        shortest=spec.shortest,
        longest=spec.longest,
        input_dtype=spec.input_dtype,
    )
    module = require("fcos_deploy.checkpoints.load", extra="export")
    loaded: LoadedCheckpoint = module.load_checkpoint(request.checkpoint, options=options)
    contract = replace(loaded.contract, tail=Tail.RAW)
    known = any(d.name == "class_names" and d.source != UNKNOWN_CLASS_NAMES for d in contract.decisions)
    if not known and len(contract.class_names) == len(candidate.class_names):
        contract = replace(contract, class_names=candidate.class_names)
    return replace(loaded, contract=contract)


def _images(request: ParityRequest, detector: Detector) -> Sequence[ParityImage]:
    """The first images of the folder, as ``detector`` reads files."""
    images = folder_images(request.images)[: request.count]
    return [ParityImage(image.path.name, detector.read(image.path)) for image in images]
