"""Latency of detectors in turns, and throughput of one: the measurements and their summaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

__all__ = ["LatencyStats", "Speedup", "StageMedians", "Timing", "TimingOptions", "measure_throughput", "time_in_turns"]

_BEYOND = 2  # times beyond a percentile that make it one
# Spread of the rounds' ratios, as largest quartile over smallest, from which on a single number is no summary.
_MAX_SPREAD = 1.3

_BATCH = 16  # images of one call when throughput is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyStats:
    """Milliseconds of ``count`` requests that follow one another; other load disturbs ``minimum`` least.

    ``p90`` and ``p99`` are None where fewer than 20 or 200 requests were timed: at least two must lie beyond, or the
    percentile is the largest time by another name.
    """

    mean: float
    p50: float
    p90: float | None
    p99: float | None
    minimum: float
    maximum: float
    count: int

    @staticmethod
    def of(milliseconds: NDArray[np.float64]) -> LatencyStats:
        """Summarise (n,) times.

        Raises:
            ConfigError: there are none.
        """
        if not len(milliseconds):
            raise ConfigError("There are no times to summarise.", hint="measure at least one iteration")
        p50, p90, p99 = (float(v) for v in np.percentile(milliseconds, [50, 90, 99]))
        return LatencyStats(
            mean=float(milliseconds.mean()),
            p50=p50,
            p90=p90 if len(milliseconds) >= _BEYOND / 0.10 else None,
            p99=p99 if len(milliseconds) >= _BEYOND / 0.01 else None,
            minimum=float(milliseconds.min()),
            maximum=float(milliseconds.max()),
            count=len(milliseconds),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMedians:
    """Median milliseconds of each stage of one image."""

    preprocess: float
    infer: float
    decode: float

    @property
    def host_share(self) -> float:
        """Share of the time that is not the network, in 0..1."""
        total = self.preprocess + self.infer + self.decode
        return 1.0 - self.infer / total if total else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """How many times as fast as another: ``ratio`` of the two's fastest rounds.

    ``low`` and ``high``: quartiles of the ratio within single rounds, in which both ran right after one another.
    ``problem``: why the ratio is no figure to quote; empty when it is one.
    """

    ratio: float
    low: float
    high: float
    problem: str = ""

    @staticmethod
    def of(reference_ms: Sequence[float], candidate_ms: Sequence[float]) -> Speedup:
        """From the fastest milliseconds of each round, in the same order.

        Other programs only ever add time, so the fastest round of each is the one that they disturbed least.

        Raises:
            ConfigError: the two were not timed in the same rounds.
        """
        if len(reference_ms) != len(candidate_ms) or not len(reference_ms):
            raise ConfigError("A speed-up needs two that were timed in turns, in the same rounds.")
        ratios = np.array(reference_ms) / np.array(candidate_ms)
        low, high = (float(v) for v in np.percentile(ratios, [25, 75]))
        ratio = min(reference_ms) / min(candidate_ms)
        problem = ""
        if high > _MAX_SPREAD * low or not low / _MAX_SPREAD <= ratio <= high * _MAX_SPREAD:
            problem = f"the ratio differs between rounds: {ratios.min():.1f} to {ratios.max():.1f} times"
        return Speedup(ratio=ratio, low=low, high=high, problem=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingOptions:
    """``rounds`` of ``block`` detections each; the first of a block is not counted.

    Runtimes keep threads spinning and caches warm: in the first detection of a block both still belong to the runtime
    before it. ``warmup`` detections of each detector come before everything.
    """

    rounds: int = 20
    block: int = 6
    warmup: int = 5
    throughput_seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.block < 2:
            raise ConfigError(f"A benchmark needs 1 round of 2 detections, got {self.rounds} of {self.block}.")


@dataclass(slots=True)
class Timing:
    """Milliseconds of one detector, as they come in; ``whole`` is ``detect`` from pixels to detections.

    ``rounds`` has the fastest of each round.
    """

    whole: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    stages: list[tuple[float, float, float]] = field(default_factory=list)

    def latency(self) -> LatencyStats:
        """Of whole detections."""
        return LatencyStats.of(np.array(self.whole))

    def stage_medians(self) -> StageMedians:
        """Of the stages, which were timed in detections of their own."""
        preprocess, infer, decode = (float(v) for v in np.median(np.array(self.stages), axis=0))
        return StageMedians(preprocess=preprocess, infer=infer, decode=decode)


def time_in_turns(
    detectors: Sequence[Detector],
    image: NDArray[np.uint8],
    *,
    options: TimingOptions,
    between_rounds: Callable[[], None] = lambda: None,
    progress: ProgressFn = no_progress,
) -> list[Timing]:
    """Time every detector on (h, w, 3) uint8 RGB, a block of each in every round; the order turns round too.

    ``between_rounds`` is called after each round, when nothing is timed.
    """
    timings = [Timing() for _ in detectors]
    for detector in detectors:
        for _ in range(options.warmup):
            detector.detect(image)
    for turn in range(options.rounds):
        for position in range(len(detectors)):
            index = (position + turn) % len(detectors)
            _time_block(detectors[index], image, block=options.block, timing=timings[index])
        between_rounds()
        progress("latency", turn + 1, options.rounds)
    return timings


def _time_block(detector: Detector, image: NDArray[np.uint8], *, block: int, timing: Timing) -> None:
    detector.detect(image)
    for _ in range(block - 1):
        started = time.perf_counter()
        detector.detect(image)
        timing.whole.append(1000 * (time.perf_counter() - started))
    timing.rounds.append(min(timing.whole[-(block - 1) :]))
    marks = [time.perf_counter()]
    feeds, letterboxes = detector.prepare([image])
    marks.append(time.perf_counter())
    outputs = detector.session.borrow(feeds)
    marks.append(time.perf_counter())
    detector.finish(outputs, letterboxes)
    marks.append(time.perf_counter())
    preprocess, infer, decode = (1000 * float(seconds) for seconds in np.diff(marks))
    timing.stages.append((preprocess, infer, decode))


def measure_throughput(detector: Detector, image: NDArray[np.uint8], *, seconds: float) -> float:
    """Images a second with as many requests at a time as the runtime takes, measured for at least ``seconds``."""
    images = [image] * _BATCH
    detector.detect_batch(images)
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        detector.detect_batch(images)
        done += _BATCH
    return done / spent
