"""Times every variant of a bundle, and the PyTorch reference, in turns on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fcos_deploy.accuracy.collect import Target
from fcos_deploy.benchmark.cold_start import ColdStartTask, measure_cold_start
from fcos_deploy.benchmark.measure import TimingOptions
from fcos_deploy.benchmark.run import Benchmark, BenchmarkRequest, BenchmarkResult, BenchmarkTarget, run_benchmark
from fcos_deploy.bundle import BenchmarkFigure, StepOutput
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.backend import PerformanceHint
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.detector import Detector
from fcos_deploy.pipeline.proof import REFERENCE, evaluation_images, reference_target
from fcos_deploy.pipeline.steps import Variant, Workshop

__all__ = ["benchmark_figures", "measure_speed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReferenceTiming(BenchmarkTarget):
    """The checkpoint as it was loaded, with the options that the user gave."""

    target: Target

    def open(self, hint: PerformanceHint) -> Detector:
        return replace(self.target, options=replace(self.target.options, hint=hint)).open()


def measure_speed(shop: Workshop, variants: list[Variant]) -> Benchmark:
    """The reference first, then the variants; the artifact that was evaluated is the one that is timed.

    A run that goes on after an interruption takes what was measured before it.
    """

    def make(_: Path) -> StepOutput:
        return StepOutput(values=to_json(_measured(shop, variants)))

    inputs = {
        "checkpoint": shop.contract.source_sha256,
        "variants": " ".join(f"{v.backend} {v.compute} {v.artifact.sha256}" for v in variants),
        "image": sha256_file(evaluation_images(shop)[0].path),
        "iterations": str(shop.request.benchmark_iterations),
    }
    return from_json(Benchmark, shop.writer.step("speed", inputs=inputs, make=make).values)


def _measured(shop: Workshop, variants: list[Variant]) -> Benchmark:
    reference = _ReferenceTiming(
        model=shop.request.checkpoint, backend=REFERENCE, precision=Precision.FP32, target=reference_target(shop)
    )
    targets = [
        BenchmarkTarget(model=v.path, backend=v.backend, precision=v.precision, options=v.options) for v in variants
    ]
    rounds = max(1, shop.request.benchmark_iterations // 5)
    request = BenchmarkRequest(
        targets=(reference, *targets),
        image=evaluation_images(shop)[0].path,
        timing=TimingOptions(rounds=rounds, throughput_seconds=1.0),
        cold_start=False,
    )
    found = run_benchmark(request, progress=shop.progress)
    return replace(found, results=_with_memory(shop, found.results, variants))


def _with_memory(
    shop: Workshop, results: tuple[BenchmarkResult, ...], variants: list[Variant]
) -> tuple[BenchmarkResult, ...]:
    """The results with the memory that a process of its own takes, the reference first."""
    image = str(evaluation_images(shop)[0].path)
    checkpoint, options = str(shop.request.checkpoint), shop.request.options
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
        shop.progress("memory", index, len(tasks))
        measured.append(replace(result, cold_start=measure_cold_start(task)))
    shop.progress("memory", len(tasks), len(tasks))
    return tuple(measured)


def benchmark_figures(shop: Workshop, variants: list[Variant], found: Benchmark) -> tuple[BenchmarkFigure, ...]:
    """For the manifest: the reference first, then the variants in their order."""
    names = [(shop.request.checkpoint.name, Precision.FP32), *((v.artifact.path, v.precision) for v in variants)]
    device = f"{found.machine.processor}, {found.machine.cores} cores"
    return tuple(
        _figure(artifact, precision, result, device=device)
        for (artifact, precision), result in zip(names, found.results, strict=True)
    )


def _figure(artifact: str, precision: Precision, result: BenchmarkResult, *, device: str) -> BenchmarkFigure:
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
