"""Benchmarks a model on several backends."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.benchmark.cold_start import ColdStart, ColdStartTask, measure_cold_start
from fcos_deploy.benchmark.machine import (
    ClockReading,
    MachineFacts,
    PowerMeter,
    PowerReading,
    machine_facts,
    read_clock,
)
from fcos_deploy.benchmark.measure import Timing, TimingOptions, measure_throughput, time_in_turns
from fcos_deploy.benchmark.stats import LatencyStats, StageMedians
from fcos_deploy.core.backend import PerformanceHint, SessionOptions
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.image_io import read_image
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

__all__ = ["Benchmark", "BenchmarkRequest", "BenchmarkResult", "BenchmarkTarget", "demo_image", "run_benchmark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkTarget:
    """A model on a backend at a precision; empty and None mean the detector's own choice."""

    model: Path
    backend: str = ""
    precision: Precision | None = None
    options: SessionOptions = field(default_factory=SessionOptions)

    def open(self, hint: PerformanceHint) -> Detector:
        """Load it for ``hint``; the caller closes."""
        options = replace(self.options, hint=hint)
        return Detector.open(self.model, backend=self.backend, precision=self.precision, options=options)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRequest:
    """What to time. ``image``: a picture file; None takes one that comes with fcos-deploy.

    ``cold_start``: also start a process for each target, for its first detection and its peak memory.
    """

    targets: tuple[BenchmarkTarget, ...]
    image: Path | None = None
    timing: TimingOptions = field(default_factory=TimingOptions)
    cold_start: bool = True

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("There is nothing to benchmark.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """One target. Times in milliseconds, sizes in bytes; energy is per image at full throughput.

    ``samples_ms`` has every whole detection that was timed, in order.
    """

    model: str
    backend: str
    precision: str
    latency: LatencyStats
    stages: StageMedians
    throughput_fps: float
    power: PowerReading
    joules_per_image: float | None
    cold_start: ColdStart | None
    file_bytes: int
    clock: ClockReading
    session: dict[str, str]
    samples_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """All targets, and where they were timed. ``throttled`` counts the cores' throttling meanwhile; None: unknown."""

    machine: MachineFacts
    image: str
    results: tuple[BenchmarkResult, ...]
    throttled: int | None


def demo_image() -> Path:
    """A photograph that comes with fcos-deploy.

    Raises:
        ConfigError: this installation has none.
    """
    folder = Path(__file__).parent.parent / "demo_data" / "evaluation"
    images = sorted(folder.glob("*.jpg"))
    if not images:
        raise ConfigError("This installation has no demo images.", hint="give a picture with --image")
    return images[0]


def run_benchmark(request: BenchmarkRequest, *, progress: ProgressFn = no_progress) -> Benchmark:
    """Time all targets in turns, then the throughput and the cold start of each.

    Raises:
        FcosDeployError: a model cannot be opened or run.
    """
    path = request.image or demo_image()
    image = read_image(path)
    facts, before = machine_facts(), read_clock()
    with contextlib.ExitStack() as stack:
        detectors = [stack.enter_context(target.open(PerformanceHint.LATENCY)) for target in request.targets]
        timings = time_in_turns(detectors, image, options=request.timing, progress=progress)
        sessions = [dict(detector.session.description) for detector in detectors]
        precisions = [str(detector.contract.precision) for detector in detectors]
    clock = read_clock()
    results = []
    for index, target in enumerate(request.targets):
        named = {"session": sessions[index], "precision": precisions[index]}
        results.append(_finish_target(target, timings[index], image=image, path=path, request=request, **named))
        progress("throughput and cold start", index + 1, len(request.targets))
    return Benchmark(machine=facts, image=path.name, results=tuple(results), throttled=_rise(before, clock))


def _finish_target(
    target: BenchmarkTarget,
    timing: Timing,
    *,
    image: NDArray[np.uint8],
    path: Path,
    request: BenchmarkRequest,
    session: Any,
    precision: Any,
) -> BenchmarkResult:
    meter = PowerMeter()
    with target.open(PerformanceHint.THROUGHPUT) as detector:
        meter.start()
        throughput, _ = measure_throughput(detector, image, seconds=request.timing.throughput_seconds)
        power, clock = meter.stop(), read_clock()
    return BenchmarkResult(
        model=target.model.name,
        backend=session.get("backend", target.backend),
        precision=precision,
        latency=timing.latency(),
        stages=timing.stage_medians(),
        throughput_fps=throughput,
        power=power,
        joules_per_image=power.watts / throughput if power.watts is not None else None,
        cold_start=measure_cold_start(_cold_task(target, path)) if request.cold_start else None,
        file_bytes=model_bytes(target.model),
        clock=clock,
        session=session,
        samples_ms=tuple(timing.whole),
    )


def _cold_task(target: BenchmarkTarget, image: Path) -> ColdStartTask:
    return ColdStartTask(
        model=str(target.model),
        image=str(image),
        backend=target.backend,
        precision=str(target.precision or ""),
        device=target.options.device,
        compute=str(target.options.compute),
        threads=target.options.threads,
        public_keys=tuple(map(str, target.options.public_keys)),
        allow_fallback=target.options.allow_fallback,
        checkpoint=target.options.checkpoint,
    )


def model_bytes(model: Path) -> int:
    """Size of a model's files: itself, and the weights that belong beside it; a bundle's whole folder."""
    if model.is_dir():
        return sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    companions: Sequence[Path] = (model.with_suffix(".bin"), model.with_name(model.name + ".data"))
    return sum(path.stat().st_size for path in (model, *companions) if path.is_file())


def _rise(before: ClockReading, after: ClockReading) -> int | None:
    if before.throttled is None or after.throttled is None:
        return None
    return after.throttled - before.throttled
