"""Latency of detectors in turns, throughput and cold start of one, and meanwhile the machine's clock and power.

Run as a program, this module is the process of a cold start; it reads from stdin which model opens and what it detects
on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import BackendError, ConfigError, FcosDeployError
from fcos_deploy.core.machine import kernel_text, usable_cpus
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = [
    "ClockReading",
    "ColdStart",
    "Contention",
    "ContentionMeter",
    "LatencyStats",
    "PowerMeter",
    "PowerReading",
    "Speedup",
    "StageMedians",
    "Timing",
    "TimingOptions",
    "measure_cold_start",
    "measure_throughput",
    "module_command",
    "peak_memory_mib",
    "read_clock",
    "time_in_turns",
]


_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockReading:
    """Mean clock of the cores in MHz, and how often they were throttled since the start of the machine."""

    mhz: float | None
    throttled: int | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerReading:
    """Mean watts over a measurement, from ``source``; None with the reason in ``problem``."""

    watts: float | None
    source: str = ""
    problem: str = ""


def read_clock(root: Path = _ROOT) -> ClockReading:
    """The clock at this moment."""
    cpus = root / "sys/devices/system/cpu"
    kilohertz = [_number(path) for path in sorted(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))]
    known = [value / 1000 for value in kilohertz if value is not None]
    if not known:  # A virtual machine without cpufreq.
        lines = kernel_text(root / "proc/cpuinfo").splitlines()
        known = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    counts = [_number(path) for path in sorted(cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))]
    throttled = [int(count) for count in counts if count is not None]
    missing = [] if known else ["no clock in sysfs or cpuinfo"]
    missing += [] if throttled else ["no throttle counters in sysfs (virtual machine or not an Intel processor)"]
    return ClockReading(
        mhz=sum(known) / len(known) if known else None,
        throttled=sum(throttled) if throttled else None,
        problem="; ".join(missing),
    )


# Shares of the processors' time that others may take before a comparison of runtimes is doubtful: one that waits for
# all of its threads stands still when a single one is displaced. Of the other threads that run or wait to, half a one
# on average is a program that computes half of the time.
_MAX_OTHERS, _MAX_STOLEN, _MAX_QUEUED = 0.10, 0.03, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """Shares (0..1) of the processors' time that ``others`` used, and that the hypervisor gave away (``stolen``).

    ``queued``: threads of other programs that ran or waited to run, on average over the moments that were sampled.
    None: the system does not tell.
    """

    others: float | None = None
    stolen: float | None = None
    queued: float | None = None

    @property
    def problem(self) -> str:
        """Who disturbed the measurement; empty when nobody is known to have."""
        parts = []
        if self.others is not None and self.others > _MAX_OTHERS:
            parts.append(f"other programs used {self.others:.0%} of the processors")
        if self.stolen is not None and self.stolen > _MAX_STOLEN:
            parts.append(f"the hypervisor took {self.stolen:.0%} of their time")
        if self.queued is not None and self.queued > _MAX_QUEUED:
            parts.append(f"{self.queued:.1f} threads of other programs ran or waited to")
        return " and ".join(parts)


@dataclass(slots=True)
class ContentionMeter:
    """What others took of the processors between ``start`` and ``stop``, from Linux' counters in ``/proc/stat``.

    ``sample`` looks at the run queue, which tells who waits; call it now and then, between what is timed.
    """

    root: Path = _ROOT
    _ticks: tuple[int, ...] = field(default=(), init=False)
    _own: float = field(default=0.0, init=False)
    _queued: list[int] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Begin the measurement."""
        self._ticks, self._own, self._queued = self._read(), time.process_time(), []
        self.sample()

    def sample(self) -> None:
        """Count the threads that run or wait to, and are not this process's."""
        lines = (line.split() for line in kernel_text(self.root / "proc/stat").splitlines())
        running = next((int(words[1]) for words in lines if words[:1] == ["procs_running"]), None)
        if running is not None:
            self._queued.append(max(0, running - self._own_running()))

    def _own_running(self) -> int:
        """Runtimes leave threads that spin for a while."""
        # The name, in brackets, may hold anything; the state follows it (proc(5)).
        stats = (kernel_text(path) for path in (self.root / "proc/self/task").glob("*/stat"))
        return sum(stat.rpartition(")")[2].split()[:1] == ["R"] for stat in stats)

    def stop(self) -> Contention:
        """End it; the shares since ``start``."""
        self.sample()
        own = time.process_time() - self._own
        queued = round(sum(self._queued) / len(self._queued), 2) if self._queued else None
        # user, nice, system, idle, iowait, irq, softirq, steal (proc(5)); guests are counted in user already.
        ticks = [after - before for before, after in zip(self._ticks, self._read(), strict=False)]
        if len(ticks) < 8 or sum(ticks) <= 0:
            return Contention(queued=queued)
        total, idle, stolen = sum(ticks), ticks[3] + ticks[4], ticks[7]
        busy = total - idle - stolen
        others = max(0.0, busy - own * os.sysconf("SC_CLK_TCK")) / total
        return Contention(others=round(others, 4), stolen=round(stolen / total, 4), queued=queued)

    def _read(self) -> tuple[int, ...]:
        first = kernel_text(self.root / "proc/stat").partition("\n")[0].split()
        return tuple(int(count) for count in first[1:9]) if first[:1] == ["cpu"] else ()


@dataclass(slots=True)
class PowerMeter:
    """Energy between ``start`` and ``stop``, from RAPL (Intel, AMD) or the INA3221 sensors of a Jetson.

    RAPL counts energy; the Jetson's sensors tell the power of the moment, read at the start and the end.
    """

    root: Path = _ROOT
    _started: float = field(default=0.0, init=False)
    _energy: dict[Path, float] = field(default_factory=dict, init=False)
    _watts: float | None = field(default=None, init=False)

    def start(self) -> None:
        """Begin the measurement."""
        self._started = time.perf_counter()
        self._energy = self._rapl()
        self._watts = self._jetson_watts()

    def stop(self) -> PowerReading:
        """End it; the mean power since ``start``."""
        seconds = time.perf_counter() - self._started
        energy, watts = self._rapl(), self._jetson_watts()
        if self._energy and seconds > 0 and energy.keys() == self._energy.keys():
            joules = 0.0
            for path, microjoules in energy.items():
                rise = microjoules - self._energy[path]
                if rise < 0:  # The counter started again at 0 after its largest value.
                    rise += _number(path.with_name("max_energy_range_uj")) or 0.0
                joules += rise / 1e6
            return PowerReading(watts=joules / seconds, source="RAPL packages")
        if self._watts is not None and watts is not None:
            return PowerReading(watts=(self._watts + watts) / 2, source="INA3221")
        problem = "neither RAPL nor an INA3221 sensor on this machine"
        if self._rapl_counters():
            problem = (
                "RAPL is there but only root may read it (sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj)"
            )
        return PowerReading(watts=None, problem=problem)

    def _rapl_counters(self) -> list[Path]:
        return sorted((self.root / "sys/class/powercap").glob("intel-rapl:[0-9]/energy_uj"))

    def _rapl(self) -> dict[Path, float]:
        """Microjoules of each processor package whose counter can be read."""
        values = {path: _number(path) for path in self._rapl_counters()}
        return {path: value for path, value in values.items() if value is not None}

    def _jetson_watts(self) -> float | None:
        """Sum over the INA3221 rails: millivolts times milliamperes; None without such a sensor."""
        rails = []
        for name in sorted((self.root / "sys/class/hwmon").glob("hwmon*/name")):
            if kernel_text(name) == "ina3221":
                for channel in (1, 2, 3):
                    volts = _number(name.with_name(f"in{channel}_input"))
                    amperes = _number(name.with_name(f"curr{channel}_input"))
                    if volts is not None and amperes is not None:
                        rails.append(volts * amperes / 1e6)
        return sum(rails) if rails else None


def _number(path: Path) -> float | None:
    text = kernel_text(path)
    return float(text) if text.lstrip("-").isdigit() else None


_BEYOND = 2  # times beyond a percentile that make it one
# Spread of the rounds' ratios, as largest quartile over smallest: from the first on a single number is no summary, and
# up to the second more rounds would not move it.
_MAX_SPREAD, _SETTLED_SPREAD = 1.3, 1.1

_BATCH = 16  # the most images of one call when throughput is measured; fewer where the network is slow


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
    ``settled_after``: rounds from which on no more follow once every ratio to the first detector is settled; None: all.
    """

    rounds: int = 20
    block: int = 6
    warmup: int = 5
    throughput_seconds: float = 3.0
    settled_after: int | None = None

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
        """Of the stages of the same detections."""
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
        if options.settled_after is not None and turn + 1 >= options.settled_after and _settled(timings):
            progress("latency", options.rounds, options.rounds)
            break
    return timings


def _settled(timings: Sequence[Timing]) -> bool:
    """Whether the quartiles of every ratio to the first lie close together, around the ratio of the fastest rounds.

    How large a ratio is does not stop the rounds, only how far it still spreads, so that stopping favours nobody.
    """
    speedups = [Speedup.of(timings[0].rounds, timing.rounds) for timing in timings[1:]]
    return all(not s.problem and s.high <= _SETTLED_SPREAD * s.low for s in speedups)


def _time_block(detector: Detector, image: NDArray[np.uint8], *, block: int, timing: Timing) -> None:
    detector.detect(image)
    for _ in range(block - 1):
        started = time.perf_counter()
        _, stages = detector.detect_timed(image)
        timing.whole.append(1000 * (time.perf_counter() - started))
        preprocess, infer, decode = (1000 * seconds for seconds in stages)
        timing.stages.append((preprocess, infer, decode))
    timing.rounds.append(min(timing.whole[-(block - 1) :]))


def measure_throughput(detector: Detector, image: NDArray[np.uint8], *, seconds: float) -> float:
    """Images a second with as many full requests at a time as the runtime takes, measured for at least ``seconds``."""
    streams = min(usable_cpus(), _BATCH)  # a runtime on processors opens no more by itself
    opened = time.perf_counter()
    detector.detect_batch([image] * streams)
    fitting = math.ceil(seconds * streams / (time.perf_counter() - opened))
    images = [image] * max(streams * detector.batch, min(_BATCH, max(2 * streams, fitting)))
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        detector.detect_batch(images)
        done += len(images)
    return done / spent


_COLD_TIMEOUT = 600.0  # seconds; opening a large model may compile it
_COLD_REPEATS = 5  # detections before the peak memory is read: allocators reach their final size in the first few


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """Seconds from the start of the process: until our code runs, the model is open, the first image is detected.

    ``peak_memory_mib`` is the largest resident memory of the process, runtime and Python included, in 1024 ** 2 bytes.
    """

    imported: float
    opened: float
    first_detection: float
    peak_memory_mib: float


def measure_cold_start(spec: DetectorSpec, image: Path) -> ColdStart:
    """Start a process that opens the model of ``spec`` and detects on an image file.

    Raises:
        BackendError: the process failed; the message has the last line of what it printed.
    """
    command = module_command("fcos_deploy.benchmark.measure")
    # By stdin: class names may be longer than an argument can be. Of a loaded network the file is opened anew.
    parts = {name: to_json(getattr(spec, name)) for name in ("model", "backend", "precision", "options")}
    asked = json.dumps({"spec": parts, "image": str(image)})
    started = time.monotonic_ns()  # One clock for all processes of the machine.
    try:
        # S603: the command is this interpreter and this module; the task is data.
        result = subprocess.run(  # noqa: S603
            command, input=asked, capture_output=True, text=True, timeout=_COLD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"The first detection of '{spec.model}' took more than {_COLD_TIMEOUT:.0f} s.") from error
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BackendError(f"The process for the cold start of '{spec.model}' failed: {last}")
    marks = json.loads(result.stdout.splitlines()[-1])
    seconds = {name: (marks[name] - started) / 1e9 for name in ("imported", "opened", "first_detection")}
    return ColdStart(**seconds, peak_memory_mib=marks["peak_memory_mib"])


# Python 3.10 has no ``-P``. ``-c`` puts '' (the working directory) first, and this takes it away before it imports.
_WITHOUT_CURRENT_FOLDER = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; module = sys.argv.pop(1); "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *, version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """The command that runs ``module`` with this interpreter, as ``python -m`` would.

    ``python -m`` alone imports from the working directory first, so that a ``numpy.py`` in a folder of downloaded
    models would be run. ``PYTHONPATH`` is honoured.
    """
    if version >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _WITHOUT_CURRENT_FOLDER, module]


def peak_memory_mib() -> float:
    """Largest resident memory of this process, in 1024 ** 2 bytes.

    Not ``ru_maxrss`` where it can be avoided: Linux keeps that one across exec, so that a child of a large process
    would report its parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    resource = importlib.import_module("resource")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def _start_cold(asked: dict[str, Any]) -> dict[str, float]:  # Any: JSON values
    marks: dict[str, float] = {"imported": time.monotonic_ns()}
    with from_json(DetectorSpec, asked["spec"]).open() as detector:
        marks["opened"] = time.monotonic_ns()
        image = detector.read(Path(asked["image"]))
        detector.detect(image)
        marks["first_detection"] = time.monotonic_ns()
        for _ in range(_COLD_REPEATS):
            detector.detect(image)
    marks["peak_memory_mib"] = peak_memory_mib()
    return marks


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_start_cold(json.load(sys.stdin))) + "\n")
    except FcosDeployError as error:
        sys.exit(f"{error.message} {error.hint}")
