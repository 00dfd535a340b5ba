"""Measures every variant of a bundle against the PyTorch reference: accuracy, speed, golden images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fcos_deploy.accuracy.dataset import EvaluationImage, folder_images, load_coco
from fcos_deploy.accuracy.evaluate import Evaluation, EvaluationRequest, Evaluations, evaluate
from fcos_deploy.accuracy.gate import judge_drop
from fcos_deploy.benchmark.cold_start import ColdStartTask, measure_cold_start
from fcos_deploy.benchmark.measure import TimingOptions
from fcos_deploy.benchmark.run import Benchmark, BenchmarkRequest, BenchmarkResult, run_benchmark
from fcos_deploy.bundle import AccuracyFigure, BenchmarkFigure, GoldenImage, StepOutput, make_golden
from fcos_deploy.checkpoints.load import LoadedCheckpoint
from fcos_deploy.core.backend import ComputeType, PerformanceHint
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.errors import ConfigError, DeviceError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.image import read_image
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.detector import Detector, DetectorSpec
from fcos_deploy.pipeline.report import moved_scores
from fcos_deploy.pipeline.steps import DeployContext, Variant

__all__ = [
    "REFERENCE",
    "ReferenceSpec",
    "accuracy_figures",
    "benchmark_figures",
    "evaluation_images",
    "max_drop",
    "measure_accuracy",
    "measure_speed",
    "reference_spec",
    "with_bf16",
    "write_golden",
]

REFERENCE = "pytorch"
# Any drop beyond the third decimal in float is a fault, not rounding.
FP32_MAP_DROP = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSpec(DetectorSpec):
    """The checkpoint as it was loaded, with the options that the user gave."""

    loaded: LoadedCheckpoint

    def open(self, hint: PerformanceHint | None = None) -> Detector:
        """The PyTorch network behind the same preprocessing as every artifact."""
        options = self.options if hint is None else replace(self.options, hint=hint)
        return Detector.of_network(self.loaded.model, self.loaded.contract, options=options)


def reference_spec(context: DeployContext) -> ReferenceSpec:
    """PyTorch eager in float32, post-processing on the host."""
    loaded = replace(context.loaded, contract=replace(context.contract, tail=Tail.RAW))
    return ReferenceSpec(model=context.request.checkpoint, backend=REFERENCE, precision=Precision.FP32, loaded=loaded)


def evaluation_images(context: DeployContext) -> tuple[EvaluationImage, ...]:
    """The images that prove the accuracy, in a fixed order."""
    request = context.request
    if request.images is not None and request.annotations is not None:
        return load_coco(request.annotations, images=request.images).images
    return folder_images(request.images or request.calibration_images)


def measure_accuracy(context: DeployContext, variants: list[Variant]) -> Evaluations:
    """Evaluate the reference and every variant on all images, and judge each one's drop.

    An interrupted run goes on where it was.
    """
    request = context.request
    wanted = EvaluationRequest(
        candidates=_specs(variants),
        images=request.images or request.calibration_images,
        annotations=request.annotations,
        reference=reference_spec(context),
        predictions=context.writer.scratch / "predictions",
    )
    found = evaluate(wanted, progress=context.progress)
    pairs = zip(variants, found.candidates, strict=True)
    return replace(found, candidates=tuple(_judged(context, v, e, found.reference) for v, e in pairs))


def _specs(variants: list[Variant]) -> tuple[DetectorSpec, ...]:
    return tuple(
        DetectorSpec(model=v.path, backend=v.backend, precision=v.precision, options=v.options) for v in variants
    )


def _judged(
    context: DeployContext, variant: Variant, evaluation: Evaluation, reference: Evaluation | None
) -> Evaluation:
    if reference is None or reference.scores.ap is None or evaluation.drop is None:
        raise ConfigError(
            "No object in the evaluation images, so that no accuracy can be proven.", hint="give other --images"
        )
    gate = Gate(max_map_drop=max_drop(context, variant))
    subject = f"{evaluation.run.subject} ({variant.compute})"
    verdicts = judge_drop(gate, evaluation.drop, reference_ap=reference.scores.ap, subject=subject)
    return replace(evaluation, verdicts=tuple(verdicts))


def max_drop(context: DeployContext, variant: Variant) -> float:
    """The most AP that a variant may lose."""
    exact = variant.precision is Precision.FP32 and variant.compute is ComputeType.F32
    return FP32_MAP_DROP if exact else context.request.max_map_drop


def with_bf16(variants: list[Variant]) -> list[Variant]:
    """The variants, and again in bf16 where the backend and this processor compute in it."""
    return [run for v in variants for run in (v, *_in_bf16(v))]


def _in_bf16(variant: Variant) -> tuple[Variant, ...]:
    run = replace(variant, compute=ComputeType.BF16)
    try:
        Detector.open(run.path, backend=run.backend, options=run.options).close()
    except (ConfigError, DeviceError):
        return ()
    return (run,)


def accuracy_figures(context: DeployContext, variants: list[Variant], found: Evaluations) -> tuple[AccuracyFigure, ...]:
    """For the manifest: the reference first, then the variants in their order."""
    dataset = "annotated" if context.request.annotations else "reference detections"
    rows = [(context.request.checkpoint.name, Precision.FP32, found.reference)] if found.reference else []
    rows += [(v.artifact.path, v.precision, e) for v, e in zip(variants, found.candidates, strict=True)]
    return tuple(
        _figure(artifact, precision, evaluation, dataset=dataset, reference=found.reference)
        for artifact, precision, evaluation in rows
        if evaluation is not None
    )


def _figure(
    artifact: str, precision: Precision, evaluation: Evaluation, *, dataset: str, reference: Evaluation | None
) -> AccuracyFigure:
    scores = evaluation.scores
    metrics = {"ap": scores.ap, "ap50": scores.ap50, "ap75": scores.ap75}
    drop = evaluation.drop
    return AccuracyFigure(
        artifact=artifact,
        backend=evaluation.run.backend,
        precision=precision,
        dataset=dataset,
        images=scores.images,
        metrics={name: value for name, value in metrics.items() if value is not None},
        drop=drop.value if drop else None,
        drop_interval=(drop.low, drop.high) if drop else None,
        score_drift=moved_scores(reference, evaluation) if reference and evaluation is not reference else None,
        details=dict(evaluation.run.description),
    )


def write_golden(context: DeployContext) -> tuple[GoldenImage, ...]:
    """A few evaluation images, evenly spaced, with what the reference sees in them."""
    images = evaluation_images(context)
    count = min(context.request.golden_count, len(images))
    chosen = [images[i * len(images) // count].path for i in range(count)]

    def make(folder: Path) -> StepOutput:
        with reference_spec(context).open() as detector:
            contract = detector.contract
            records = make_golden(map(read_image, chosen), folder=folder, contract=contract, detect=detector.detect)
        return StepOutput(values=[to_json(record) for record in records])

    inputs = {
        "checkpoint": context.contract.source_sha256,
        "contract": repr(context.contract),
        "images": " ".join(str(path.name) for path in chosen),
    }
    step = context.writer.step("golden", inputs=inputs, make=make)
    return tuple(from_json(GoldenImage, value) for value in step.values)


def measure_speed(context: DeployContext, variants: list[Variant]) -> Benchmark:
    """The reference first, then the variants; the artifact that was evaluated is the one that is timed.

    A run that goes on after an interruption takes what was measured before it.
    """

    def make(_: Path) -> StepOutput:
        return StepOutput(values=to_json(_measured(context, variants)))

    inputs = {
        "checkpoint": context.contract.source_sha256,
        "variants": " ".join(f"{v.backend} {v.compute} {v.artifact.sha256}" for v in variants),
        "image": sha256_file(evaluation_images(context)[0].path),
        "iterations": str(context.request.benchmark_iterations),
    }
    return from_json(Benchmark, context.writer.step("speed", inputs=inputs, make=make).values)


def _measured(context: DeployContext, variants: list[Variant]) -> Benchmark:
    rounds = max(1, context.request.benchmark_iterations // 5)
    request = BenchmarkRequest(
        candidates=(reference_spec(context), *_specs(variants)),
        image=evaluation_images(context)[0].path,
        timing=TimingOptions(rounds=rounds, throughput_seconds=1.0),
        cold_start=False,
    )
    found = run_benchmark(request, progress=context.progress)
    return replace(found, results=_with_memory(context, found.results, variants))


def _with_memory(
    context: DeployContext, results: tuple[BenchmarkResult, ...], variants: list[Variant]
) -> tuple[BenchmarkResult, ...]:
    """The results with the memory that a process of its own takes, the reference first."""
    image = str(evaluation_images(context)[0].path)
    checkpoint, options = str(context.request.checkpoint), context.request.options
    tasks = [
        ColdStartTask(model=checkpoint, image=image, backend=REFERENCE, checkpoint=options),
        *(
            ColdStartTask(
                model=str(v.path), image=image, backend=v.backend, precision=str(v.precision), compute=str(v.compute)
            )
            for v in variants
        ),
    ]
    measured = []
    for index, (task, result) in enumerate(zip(tasks, results, strict=True)):
        context.progress("memory", index, len(tasks))
        measured.append(replace(result, cold_start=measure_cold_start(task)))
    context.progress("memory", len(tasks), len(tasks))
    return tuple(measured)


def benchmark_figures(context: DeployContext, variants: list[Variant], found: Benchmark) -> tuple[BenchmarkFigure, ...]:
    """For the manifest: the reference first, then the variants in their order."""
    names = [(context.request.checkpoint.name, Precision.FP32), *((v.artifact.path, v.precision) for v in variants)]
    device = f"{found.machine.processor}, {found.machine.cores} cores"
    return tuple(
        _figure_speed(artifact, precision, result, device=device)
        for (artifact, precision), result in zip(names, found.results, strict=True)
    )


def _figure_speed(artifact: str, precision: Precision, result: BenchmarkResult, *, device: str) -> BenchmarkFigure:
    latency, stages = result.latency, result.stages
    return BenchmarkFigure(
        artifact=artifact,
        backend=result.backend,
        precision=precision,
        device=device,
        metrics={
            "total_p50_ms": latency.p50,
            "total_p90_ms": latency.p90,
            "total_p99_ms": latency.p99,
            "preprocess_p50_ms": stages.preprocess,
            "infer_p50_ms": stages.infer,
            "decode_p50_ms": stages.decode,
            "throughput_fps": result.throughput_fps,
            **({"peak_memory_mib": result.cold_start.peak_memory_mib} if result.cold_start else {}),
        },
        details=dict(result.session),
    )
