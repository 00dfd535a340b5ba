"""Benchmark of models on backends: latency, stages, throughput, cold start, and the comparison with an earlier run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.benchmark.measure import (
    ClockReading,
    ColdStart,
    Contention,
    ContentionMeter,
    LatencyStats,
    PowerMeter,
    PowerReading,
    Speedup,
    StageMedians,
    TimingOptions,
    measure_cold_start,
    measure_throughput,
    read_clock,
    time_in_turns,
)
from fcos_deploy.core.artifact import files_of
from fcos_deploy.core.enums import PerformanceHint
from fcos_deploy.core.errors import ConfigError, SlowdownError
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file, write_text
from fcos_deploy.core.machine import MachineFacts, read_machine, usable_cpus
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import parse_json, to_json
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = [
    "TABLE_COLUMNS",
    "BaselineComparison",
    "Benchmark",
    "BenchmarkRequest",
    "BenchmarkResult",
    "benchmark_json",
    "compare_with_baseline",
    "demo_image",
    "doubted_speedup",
    "read_baseline",
    "require_no_slowdown",
    "result_row",
    "run_benchmark",
    "save_benchmark",
    "with_equal_threads",
]


TABLE_COLUMNS = (
    *("backend", "precision", "p50 ms", "p90 ms", "p99 ms", "times", "preprocess", "infer", "decode"),
    *("images/s", "first s", "peak MiB", "file MiB"),
)

# What a session was asked for, and what makes its times comparable with another's; versions may differ.
_SETTINGS = ("device", "compute", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRequest:
    """What to time. ``image``: an image file; None takes one that comes with fcos-deploy.

    ``alone``: those that are also measured alone, all of them by default: for throughput and, with ``cold_start``, in a
    process of their own for their first detection and their peak memory.
    """

    candidates: tuple[DetectorSpec, ...]
    image: Path | None = None
    timing: TimingOptions = field(default_factory=TimingOptions)
    cold_start: bool = True
    alone: tuple[DetectorSpec, ...] | None = None

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("There is nothing to benchmark.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkResult:
    """The figures of one candidate. Times in milliseconds, sizes in bytes; energy is per image at full throughput.

    ``samples_ms`` has every whole detection that was timed, in order; ``rounds_ms`` the fastest of each round.
    ``throughput_fps`` and ``cold_start`` are None where they were not measured.
    """

    model: str
    backend: str
    precision: str
    latency: LatencyStats
    stages: StageMedians
    throughput_fps: float | None
    power: PowerReading
    joules_per_image: float | None
    cold_start: ColdStart | None
    file_bytes: int
    clock: ClockReading
    session: dict[str, str]
    samples_ms: tuple[float, ...]
    rounds_ms: tuple[float, ...] = ()


def doubted_speedup(candidate: BenchmarkResult, *, reference: BenchmarkResult, contention: Contention) -> Speedup:
    """How many times as fast ``candidate`` is, with everything that makes that doubtful: load, spread, threads."""
    speedup = Speedup.of(reference.rounds_ms, candidate.rounds_ms)
    problems = [contention.problem, speedup.problem]
    threads = [result.session.get("threads", "") for result in (reference, candidate)]
    if all(threads) and threads[0] != threads[1]:
        problems.append(f"the reference ran with {threads[0]} threads, this one with {threads[1]}")
    return replace(speedup, problem="; ".join(filter(None, problems)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """All candidates, and where they were timed. ``throttled``: how often cores throttled meanwhile; None: unknown.

    ``contention``: what other programs took of the processors while latencies were measured.
    """

    machine: MachineFacts
    image: str
    results: tuple[BenchmarkResult, ...]
    throttled: int | None
    contention: Contention = field(default_factory=Contention)

    def speedup(self, candidate: BenchmarkResult, *, reference: BenchmarkResult) -> Speedup:
        """How many times as fast ``candidate`` is; see ``doubted_speedup``."""
        return doubted_speedup(candidate, reference=reference, contention=self.contention)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineComparison:
    """One backend and precision against ``latency_ms`` of an earlier run; a ratio above 1 is slower than then."""

    backend: str
    precision: str
    before: Mapping[str, float]
    now: LatencyStats

    @property
    def ratio(self) -> float:
        """Of the medians or of the fastest times, whichever rose less: other load raises only the first."""
        return min(self.now.p50 / self.before["p50"], self.now.minimum / self.before["minimum"])

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}: p50 {self.before['p50']:.2f} -> {self.now.p50:.2f} ms"


def demo_image() -> Path:
    """A photograph that comes with fcos-deploy.

    Raises:
        ConfigError: this installation has none.
    """
    image = min((Path(__file__).parent.parent / "demo_data" / "evaluation").glob("*.jpg"), default=None)
    if image is None:
        raise ConfigError("This installation has no demo images.", hint="give an image with --image")
    return image


def run_benchmark(request: BenchmarkRequest, *, progress: ProgressFn = no_progress) -> Benchmark:
    """Time all candidates in turns, then the throughput and the cold start of each that is measured alone.

    Raises:
        FcosDeployError: a model cannot be opened or run.
    """
    path = request.image or demo_image()
    machine, before = read_machine(), read_clock().throttled
    with contextlib.ExitStack() as stack:
        candidates, detectors = _open_alike(request.candidates, stack)
        image = detectors[0].read(path)
        meter = ContentionMeter()
        meter.start()
        timings = time_in_turns(
            detectors, image, options=request.timing, between_rounds=meter.sample, progress=progress
        )
        contention = meter.stop()
        opened = [(dict(d.session.description), str(d.contract.precision), d.file_bytes) for d in detectors]
    after = read_clock().throttled
    results = []
    for asked, candidate, timing, (session, precision, size) in zip(
        request.candidates, candidates, timings, opened, strict=True
    ):
        alone = request.alone is None or asked in request.alone
        # A network that only this process has cannot start in another one.
        cold = alone and request.cold_start and candidate.opens_file
        throughput, power, clock = None, PowerReading(watts=None, problem="not measured"), read_clock()
        if alone:
            throughput, power, clock = _measure_load(candidate, image, seconds=request.timing.throughput_seconds)
        results.append(
            BenchmarkResult(
                model=candidate.model.name,
                backend=session.get("backend", candidate.backend),
                precision=precision,
                latency=timing.latency(),
                stages=timing.stage_medians(),
                throughput_fps=throughput,
                power=power,
                joules_per_image=power.watts / throughput if power.watts is not None and throughput else None,
                cold_start=measure_cold_start(candidate, path) if cold else None,
                file_bytes=model_bytes(candidate.model) if size is None else size,
                clock=clock,
                session=session,
                samples_ms=tuple(timing.whole),
                rounds_ms=tuple(timing.rounds),
            )
        )
        progress("throughput and cold start", len(results), len(candidates))
    throttled = None if before is None or after is None else after - before
    return Benchmark(
        machine=machine, image=path.name, results=tuple(results), throttled=throttled, contention=contention
    )


def with_equal_threads(candidates: Sequence[DetectorSpec], threads: Sequence[str]) -> tuple[DetectorSpec, ...]:
    """The candidates, with as many threads each; ``threads``: what their sessions say, empty where nobody chooses.

    Left alone one runtime takes every core and another the physical ones. The limit is the fewest that anybody asked
    for, or else the fewest that a runtime takes by itself. What was asked for stays.
    """
    competing = [place for place, count in enumerate(threads) if count]
    if len({threads[place] for place in competing}) < 2:
        return tuple(candidates)
    asked = [count for place in competing if (count := candidates[place].options.threads)]
    limit = min(asked or [usable_cpus(), *(int(count) for count in threads if count.isdigit())])
    return tuple(
        replace(candidate, options=replace(candidate.options, threads=limit))
        if place in competing and candidate.options.threads is None
        else candidate
        for place, candidate in enumerate(candidates)
    )


def _open_alike(
    candidates: Sequence[DetectorSpec], stack: contextlib.ExitStack
) -> tuple[tuple[DetectorSpec, ...], list[Detector]]:
    """The detectors with equal threads, and the candidates as they were opened."""
    detectors = [stack.enter_context(candidate.open(PerformanceHint.LATENCY)) for candidate in candidates]
    alike = with_equal_threads(candidates, [d.session.description.get("threads", "") for d in detectors])
    for place, (before, candidate) in enumerate(zip(candidates, alike, strict=True)):
        if candidate != before:
            detectors[place].close()
            detectors[place] = stack.enter_context(candidate.open(PerformanceHint.LATENCY))
    return alike, detectors


def _measure_load(
    candidate: DetectorSpec, image: NDArray[np.uint8], *, seconds: float
) -> tuple[float, PowerReading, ClockReading]:
    """Images a second, mean power, and the clock at the end, with the runtime opened for throughput."""
    meter = PowerMeter()
    with candidate.open(PerformanceHint.THROUGHPUT) as detector:
        meter.start()
        throughput = measure_throughput(detector, image, seconds=seconds)
        return throughput, meter.stop(), read_clock()


def model_bytes(model: Path) -> int:
    """Size of a model's files: itself, and the weights that belong beside it; a bundle's whole folder."""
    if model.is_dir():
        return sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files_of(model))


def benchmark_json(benchmark: Benchmark) -> list[dict[str, Any]]:
    """One object for each candidate; null where the platform does not tell, with the reason beside it."""
    return [
        {
            "backend": result.backend,
            "precision": result.precision,
            "model": result.model,
            "latency_ms": to_json(result.latency),
            "stages_ms": {**to_json(result.stages), "host_share": result.stages.host_share},
            "throughput_fps": result.throughput_fps,
            "cold_start_s": result.cold_start and result.cold_start.first_detection,
            "cold_start": result.cold_start and to_json(result.cold_start),
            "peak_memory_mib": result.cold_start and result.cold_start.peak_memory_mib,
            "file_bytes": result.file_bytes,
            "power": to_json(result.power),
            "joules_per_image": result.joules_per_image,
            "clock": to_json(result.clock),
            "throttled": benchmark.throttled,
            "contention": to_json(benchmark.contention),
            "session": result.session,
            "machine": to_json(benchmark.machine),
            "image": benchmark.image,
        }
        for result in benchmark.results
    ]


def result_row(result: BenchmarkResult) -> tuple[str, ...]:
    """One line of the table, as ``TABLE_COLUMNS`` names it."""
    cold, latency, stages = result.cold_start, result.latency, result.stages
    return (
        result.backend,
        result.precision,
        *("-" if v is None else f"{v:.2f}" for v in (latency.p50, latency.p90, latency.p99)),
        str(latency.count),
        *(f"{v:.2f}" for v in (stages.preprocess, stages.infer, stages.decode)),
        "-" if result.throughput_fps is None else f"{result.throughput_fps:.1f}",
        "-" if cold is None else f"{cold.first_detection:.2f}",
        "-" if cold is None else f"{cold.peak_memory_mib:.0f}",
        f"{result.file_bytes / 2**20:.1f}",
    )


def save_benchmark(path: Path, benchmark: Benchmark) -> None:
    """Write the JSON, for a later run to be compared with."""
    write_text(path, json.dumps(benchmark_json(benchmark), indent=1, allow_nan=False) + "\n")


def read_baseline(path: Path) -> list[dict[str, Any]]:
    """An earlier run's JSON.

    Raises:
        ConfigError: the file is missing or is not one.
    """
    try:
        content = parse_json(read_file(path, limit=MAX_TEXT_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the baseline '{path}': {error}.") from error
    if not isinstance(content, list) or not all(map(_is_entry, content)):
        raise ConfigError(f"'{path}' is not a benchmark.", hint="write one with 'fcos-deploy benchmark --output FILE'")
    return content


def _is_entry(entry: Any) -> bool:  # Any: a JSON value
    """Whether it names a candidate and has the times that are compared, which nothing can be slower than if NaN."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("backend", "precision")):
        return False
    latency = entry.get("latency_ms")
    times = [latency.get(key) for key in ("p50", "minimum")] if isinstance(latency, dict) else [None]
    return all(isinstance(value, (int, float)) and 0.0 < value < math.inf for value in times)


def compare_with_baseline(benchmark: Benchmark, baseline: Sequence[dict[str, Any]]) -> list[BaselineComparison]:
    """Pair the candidates of both: the first of a backend and precision with the first, the second with the second.

    Raises:
        ConfigError: the baseline lacks a candidate, or was measured on another processor or with other settings.
    """
    earlier = _numbered([(entry["backend"], entry["precision"]) for entry in baseline])
    now = _numbered([(result.backend, result.precision) for result in benchmark.results])
    missing = [
        f"'{backend} {precision}'" for backend, precision, place in now if (backend, precision, place) not in earlier
    ]
    if missing:
        known = sorted({f"'{backend} {precision}'" for backend, precision, _ in earlier})
        raise ConfigError(
            f"The baseline has nothing to compare {', '.join(missing)} with; it has {', '.join(known) or 'nothing'}.",
            hint="give the --backend and --precision of the baseline, or measure a new one with --output",
        )
    pairs = [(baseline[earlier[key]], benchmark.results[place]) for key, place in now.items()]
    for entry, result in pairs:
        _require_comparable(entry, result, processor=benchmark.machine.processor)
    return [
        BaselineComparison(
            backend=result.backend, precision=result.precision, before=entry["latency_ms"], now=result.latency
        )
        for entry, result in pairs
    ]


def _numbered(names: Sequence[tuple[str, str]]) -> dict[tuple[str, str, int], int]:
    """Backend, precision and how many came before of the same -> place."""
    return {(*name, names[:place].count(name)): place for place, name in enumerate(names)}


def _require_comparable(entry: dict[str, Any], result: BenchmarkResult, *, processor: str) -> None:
    measured_on = entry.get("machine", {}).get("processor")
    if measured_on != processor:
        raise ConfigError(
            f"The baseline was measured on '{measured_on}', this machine is '{processor}'.",
            hint="measure a baseline here",
        )
    before, now = entry.get("session", {}), result.session
    changed = [f"{s} {before[s]} then, {now.get(s)} now" for s in _SETTINGS if s in before and before[s] != now.get(s)]
    if changed:
        raise ConfigError(
            f"The baseline of {result.backend} was measured otherwise: {'; '.join(changed)}.",
            hint="give the same --device, --compute and --threads",
        )


def require_no_slowdown(comparisons: Sequence[BaselineComparison], *, tolerance: float) -> None:
    """Raise if a candidate got slower by more than ``tolerance`` (0.1 is 10 %).

    Raises:
        SlowdownError: with the figures.
    """
    slower = [c for c in comparisons if c.ratio > 1.0 + tolerance]
    if slower:
        figures = "; ".join(f"{item} ({item.ratio:.2f} times)" for item in slower)
        raise SlowdownError(
            f"Slower than the baseline by more than {tolerance:.0%}: {figures}.",
            hint="repeat on a quiet machine; the fastest times are slower too, not the medians alone",
        )
