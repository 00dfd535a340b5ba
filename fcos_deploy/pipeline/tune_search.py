"""The half of a search that is about times: what is asked for, and what each configuration takes on this machine.

Times are cheap, and grow with the input size, so that one measurement decides for all sizes on one side of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.accuracy.operating_point import OperatingGoal
from fcos_deploy.benchmark.measure import (
    ContentionMeter,
    LatencyStats,
    PowerMeter,
    TimingOptions,
    measure_cold_start,
    measure_throughput,
    time_in_turns,
)
from fcos_deploy.core.artifact import files_of
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, PerformanceHint, Precision, Tail
from fcos_deploy.core.errors import BackendError, BuildError, ConfigError, ExportError, FcosDeployError
from fcos_deploy.core.files import sha256_file, write_text
from fcos_deploy.core.gate import Gate, Judge
from fcos_deploy.core.libraries import library_versions
from fcos_deploy.core.machine import MachineFacts, usable_cpus
from fcos_deploy.core.progress import ProgressFn
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from fcos_deploy.core.trust import Trust, own_folder
from fcos_deploy.detector import DetectorSpec
from fcos_deploy.pipeline.tune_models import Configuration, InputSize, TuneModels

if TYPE_CHECKING:
    from fcos_deploy.model.wrap import WrappedModule

__all__ = ["Measured", "Search", "Trials", "TuneRequest"]

_TIMING = TimingOptions(rounds=5, block=5, warmup=2)  # 20 times, the fewest that have a 90th percentile
_THROUGHPUT_SECONDS, _POWER_SECONDS = 1.0, 2.0
_THREADS_SLOWER = 1.15  # than the best; those that are slower by less are tried at other sizes too
_AS_LARGE = 1.1  # the most pixels, as a multiple, with which a size may be faster than a smaller one
_BATCHES = (1, 4)
# Of one size, such as one without a top level, or of one runtime: the others are searched all the same.
_NOT_HERE = (ExportError, BuildError, BackendError, MemoryError)


def _reason(error: FcosDeployError | MemoryError) -> str:
    return error.message if isinstance(error, FcosDeployError) else "there is not enough memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What is searched: ``model`` over ``sizes``, ``backends``, ``precisions`` and so on; empty: the default.

    Axes for throughput are also ``streams`` (requests at a time) and ``batches`` (images of one).
    The limits are the goal: with ``max_latency_ms`` (or ``min_throughput``, images a second) the highest AP within it,
    with ``min_ap`` alone the fastest that reaches it, without any the front. ``throughput`` measures images a second
    in place of the latency of one image. ``percentile``: 50 or 90, which latency has to keep the limit.
    ``calibration_images``: needed for INT8. Without ``annotations`` the model's own detections at its own size stand
    for the ground truth. The limits of a loss, ``operating_goal``, ``judge``, ``tail`` and ``opset`` are as in a
    deployment; without a ``tail`` a graph keeps its own.
    ``max_memory_mib`` (peak of a new process) and ``max_watts`` (at full load, where the system tells it) restrict what
    may be chosen. ``own_ranges``: INT8 is calibrated at every size, not once. ``trust``: what a bundle must be.
    """

    model: Path | WrappedModule
    output: Path
    images: Path
    annotations: Path | None = None
    calibration_images: Path | None = None
    max_latency_ms: float | None = None
    min_throughput: float | None = None
    min_ap: float | None = None
    max_memory_mib: float | None = None
    max_watts: float | None = None
    throughput: bool = False
    percentile: int = 50
    sizes: tuple[InputSize, ...] = ()
    backends: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()
    computes: tuple[ComputeType, ...] = ()
    threads: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    options: CheckpointOptions = field(default_factory=CheckpointOptions)
    max_map_drop: float | None = None
    max_precision_drop: float | None = None
    max_recall_drop: float | None = None
    min_match_rate: float | None = None
    operating_goal: OperatingGoal | None = None
    judge: Judge = Judge.INTERVAL
    tail: Tail | None = None
    opset: int | None = None
    allow_overlap: bool = False
    calibration_count: int | None = None
    own_ranges: bool = False
    seed: int = 0
    trust: Trust = field(default_factory=Trust)
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("max_latency_ms", "min_throughput", "max_memory_mib", "max_watts"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a positive number, got {value}.")
        self._require_one_goal()
        if max(self.threads, default=0) > usable_cpus():
            raise ConfigError(f"{max(self.threads)} threads are more than the {usable_cpus()} processors here.")
        if ComputeType.F16 in self.computes:
            raise ConfigError(
                "Float layers are tried in f32 and in bf16.", hint="leave --compute f16 out, or give --precision fp16"
            )
        if self.min_ap is not None and self.annotations is None:
            raise ConfigError("An AP cannot be asked for without annotations.", hint="give --annotations FILE")
        if Precision.INT8 in self.precisions and self.calibration_images is None:
            raise ConfigError("INT8 needs images to calibrate on.", hint="give --calibration-images PATH")
        _ = Gate(min_ap=self.min_ap)  # which refuses what is no share of 1

    def _require_one_goal(self) -> None:
        """Refuse, with ConfigError, what is of latency beside what is of throughput."""
        if self.max_latency_ms is not None and self.measures_throughput:
            raise ConfigError(
                "A limit on latency and one on throughput are two different goals.",
                hint="give --max-latency-ms, or --throughput with --min-throughput",
            )
        if not self.measures_throughput and (self.streams or self.batches):
            raise ConfigError(
                "Several images at a time are for throughput.",
                hint="give --throughput, or leave --streams and --batch out",
            )
        if self.percentile not in {50, 90}:
            raise ConfigError(f"The percentile must be 50 or 90, got {self.percentile}.")
        if self.measures_throughput and self.percentile != 50:
            raise ConfigError("Percentiles are of the latency, not of throughput.", hint="leave --percentile out")

    @property
    def measures_throughput(self) -> bool:
        """Whether images a second are measured."""
        return self.throughput or self.min_throughput is not None

    @property
    def max_ms(self) -> float | None:
        """The most milliseconds an image may take, as its latency or between two."""
        return 1000 / self.min_throughput if self.min_throughput else self.max_latency_ms

    @property
    def has_goal(self) -> bool:
        """Whether there is a limit, so that one configuration is chosen."""
        limits = (self.max_ms, self.min_ap, self.max_memory_mib, self.max_watts)
        return any(limit is not None for limit in limits)

    @property
    def wants_fastest(self) -> bool:
        """Whether the AP is given and the time is open; otherwise the highest AP is looked for."""
        return self.max_ms is None and self.min_ap is not None

    @property
    def goal(self) -> str:
        """As a sentence."""
        unit = "p90" if self.percentile == 90 else "median"
        limits = []
        if self.min_throughput is not None:
            limits.append(f"at least {self.min_throughput:g} images/s")
        if self.max_latency_ms is not None:
            limits.append(f"at most {self.max_latency_ms:g} ms an image ({unit})")
        if self.min_ap is not None:
            limits.append(f"AP of at least {self.min_ap:g}")
        if self.max_memory_mib is not None:
            limits.append(f"at most {self.max_memory_mib:g} MiB of memory")
        if self.max_watts is not None:
            limits.append(f"at most {self.max_watts:g} W")
        if not limits:
            return "The front of AP against " + ("throughput." if self.throughput else "latency.")
        best = "the fastest" if self.wants_fastest else "the highest AP"
        return f"Asked for: {best} with {' and '.join(limits)}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The time of a configuration; ``throughput`` in images a second where that was measured.

    ``problem``: who disturbed the measurement; empty when nobody is known to have. ``deployed``: of its bundle, in
    which layers may have gone back to float, and not of what the search made.
    """

    latency: LatencyStats
    throughput: float | None = None
    problem: str = ""
    deployed: bool = False

    def ms(self, percentile: int) -> float:
        """What the limit is held to."""
        if self.throughput is not None:
            return 1000 / self.throughput
        return self.latency.p90 or self.latency.maximum if percentile == 90 else self.latency.p50


class Trials:
    """Measured times, each in a file that is named after everything that it depends on."""

    def __init__(self, folder: Path, *, machine: MachineFacts, image: Path) -> None:
        self._folder = own_folder(folder)
        self._facts = {
            "processor": machine.processor,
            "cores": machine.cores,
            "system": platform.platform(),
            "image": sha256_file(image),
            **library_versions("fcos-deploy", "numpy", "opencv-python-headless"),
        }

    def path(self, spec: DetectorSpec, *, throughput: bool) -> Path:
        """Where the time of what ``spec`` opens is kept."""
        facts = {
            **self._facts,
            "files": [sha256_file(path) for path in files_of(spec.model)],
            "backend": spec.backend,
            "version": get_backend(spec.backend).probe().version,
            "session": to_json(spec.options),
            "timing": to_json(_TIMING),
            "throughput": throughput,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / f"time-{key[:32]}.json"

    @staticmethod
    def keep(measured: Measured, path: Path) -> None:
        """Write it."""
        write_text(path, json.dumps(to_json(measured)) + "\n")

    @staticmethod
    def load(path: Path) -> Measured | None:
        """None where there is none, a damaged one, or one that other programs disturbed, which is measured again."""
        try:
            measured = from_json(Measured, parse_json(path.read_bytes()))
        except (OSError, ValueError, ConfigError):
            return None
        return None if measured.problem else measured


class Search:
    """The state of a search over times."""

    def __init__(
        self,
        request: TuneRequest,
        models: TuneModels,
        *,
        image: Path,
        trials: Trials,
        progress: ProgressFn,
    ) -> None:
        self.request, self.models, self._trials, self._progress = request, models, trials, progress
        self._path = image
        with models.reference().open() as detector:
            self._image = detector.read(image)
        height, width = self._image.shape[:2]
        self.sizes = sorted(models.sizes, key=lambda size: size.pixels(height, width))
        self._pixels = [size.pixels(height, width) for size in self.sizes]
        self.measured: dict[Configuration, Measured] = {}
        self.pruned: dict[Configuration, str] = {}
        self.refused: dict[str, str] = {}  # engines whose bundle could not be made, and why
        self._loads: dict[Configuration, str] = {}  # what is too much of memory or power, '' for nothing
        self.power_problem = ""  # why the limit on power cannot be judged
        self._lines: list[Configuration] = []

    def _all_lines(self) -> Iterable[Configuration]:
        request, cpus = self.request, usable_cpus()
        threads, loads = request.threads or (cpus, max(1, cpus // 2)), [(1, 1)]
        if request.measures_throughput:
            threads = request.threads or (cpus,)
            streams = request.streams or (1, max(1, cpus // 2), cpus)
            loads = list(itertools.product(sorted({*streams}, reverse=True), sorted({*(request.batches or _BATCHES)})))
        for precision, backend, compute, count, (parallel, batch) in itertools.product(
            self.models.precisions,
            self.models.backends,
            request.computes or (ComputeType.F32, ComputeType.BF16),
            sorted({*threads}, reverse=True),
            loads,
        ):
            if parallel <= count and (batch == 1 or self.models.takes_batches(backend)):
                yield Configuration(
                    size=InputSize(0, 0),
                    backend=backend,
                    precision=precision,
                    compute=compute,
                    threads=count,
                    streams=parallel,
                    batch=batch,
                    hint=PerformanceHint.THROUGHPUT if request.measures_throughput else PerformanceHint.LATENCY,
                )

    def ms(self, configuration: Configuration) -> float:
        """What a measured configuration takes."""
        return self.measured[configuration].ms(self.request.percentile)

    def cost(self, configuration: Configuration) -> str:
        """What a measured configuration takes, in the unit of the limits."""
        ms = self.ms(configuration)
        return f"{1000 / ms:.1f} images/s" if self.request.measures_throughput else f"{ms:.1f} ms"

    def fits(self, configuration: Configuration) -> bool:
        """Whether it keeps the limit on time, if there is one."""
        return self.request.max_ms is None or self.ms(configuration) <= self.request.max_ms

    def _excess(self, configuration: Configuration) -> str:
        """What is beyond a limit: its time, memory or power; '' for nothing."""
        return self._load_excess(configuration) if self.fits(configuration) else self.cost(configuration)

    def _keeps(self, configuration: Configuration) -> bool:
        """Whether it was measured within the limits, and its bundle not refused."""
        known = configuration in self.measured and configuration.engine not in self.refused
        return known and not self._excess(configuration)

    def probe(self, index: int, lines: Sequence[Configuration]) -> None:
        """Time the configurations of one size, in turns; those that are known are taken from disk."""
        size = self.sizes[index]
        asked = [replace(line, size=size) for line in lines if line in self._lines]
        asked = [c for c in asked if c not in self.measured and c not in self.pruned]
        opened: list[tuple[Configuration, DetectorSpec, Path]] = []
        for configuration in asked:
            try:
                if not self._computes(configuration):
                    continue
                spec = self.models.open_as(configuration)
            except _NOT_HERE as error:
                self._prune(configuration.line, [index], f"cannot be made: {_reason(error)}")
                continue
            path = self._trials.path(spec, throughput=self.request.measures_throughput)
            known = self._trials.load(self._deployed_path(path)) or self._trials.load(path)
            if known is not None:
                self.measured[configuration] = known
            else:
                opened.append((configuration, spec, path))
        if opened:
            self._time(opened)
        self._screen(size)

    def _computes(self, configuration: Configuration) -> bool:
        """Whether its runtime computes in its format here; otherwise its line is dropped, and named if asked for."""
        if self.models.computes(configuration):
            return True
        self._lines.remove(configuration.line)
        if self.request.computes:
            reason = f"it does not compute in {configuration.compute} here"
            self._prune(configuration.line, range(len(self.sizes)), reason)
        return False

    def _time(self, opened: Sequence[tuple[Configuration, DetectorSpec, Path]]) -> None:
        try:
            results = self._measure(opened)
        except _NOT_HERE as error:
            if len(opened) > 1:  # Which one it is shows by itself.
                for trial in opened:
                    self._time([trial])
                return
            configuration = opened[0][0]
            self._prune(configuration.line, [self.sizes.index(configuration.size)], f"cannot be run: {_reason(error)}")
            return
        for (configuration, _, path), measured in zip(opened, results, strict=True):
            self._trials.keep(measured, path)
            self.measured[configuration] = measured

    def _measure(self, opened: Sequence[tuple[Configuration, DetectorSpec, Path]]) -> list[Measured]:
        """In turns, with nothing else in this process."""
        meter = ContentionMeter()
        with contextlib.ExitStack() as stack:
            detectors = [stack.enter_context(spec.open()) for _, spec, _ in opened]
            label = f"time at {opened[0][0].size}"
            meter.start()
            timings = time_in_turns(
                detectors,
                self._image,
                options=_TIMING,
                between_rounds=meter.sample,
                progress=lambda _, done, total: self._progress(label, done, total),
            )
            throughput: list[float | None] = [None] * len(opened)
            if self.request.measures_throughput:
                throughput = [measure_throughput(d, self._image, seconds=_THROUGHPUT_SECONDS) for d in detectors]
            problem = meter.stop().problem
        return [
            Measured(latency=timing.latency(), throughput=rate, problem=problem)
            for timing, rate in zip(timings, throughput, strict=True)
        ]

    def time_bundle(self, configuration: Configuration, bundle: Path) -> Measured:
        """What the bundle takes as it opens by default, which is as ``configuration`` says.

        A time beyond the limit takes the place of the search's own: ``run`` then looks at what that one had pruned. It
        is kept unless other programs may be the reason for it.
        """
        (measured,) = self._measure([(configuration, DetectorSpec(model=bundle), bundle)])
        measured = replace(measured, deployed=True)
        if measured.ms(self.request.percentile) > (self.request.max_ms or math.inf) and not measured.problem:
            trial = self.models.open_as(configuration)
            path = self._trials.path(trial, throughput=self.request.measures_throughput)
            self._trials.keep(measured, self._deployed_path(path))
            self.measured[configuration] = measured
        return measured

    def _deployed_path(self, path: Path) -> Path:
        """Where the time of the bundle is kept: other limits on its accuracy may leave other layers in float."""
        return path.with_name(f"{path.stem}-deployed-{self.models.gate_key}.json")

    def _screen(self, size: InputSize) -> None:
        """Drop threads, streams and batches that are slow at one size, at the sizes at which they cannot be better.

        More threads gain more the more there is to compute: where they do not pay, they do not at smaller sizes, and
        where fewer are slower, they are at larger ones. Under a limit on memory or power the slower ones that take less
        stay, and are compared with the best that keeps it.
        """
        limited = self.request.max_memory_mib is not None or self.request.max_watts is not None
        groups: dict[tuple[str, int], list[Configuration]] = {}
        for configuration in sorted(self.measured, key=self.ms):
            if configuration.size == size:
                groups.setdefault((configuration.backend, configuration.fidelity), []).append(configuration)
        at = self.sizes.index(size)
        for group in groups.values():
            best = next((c for c in group if not self._load_excess(c)), group[-1])
            for slow in group:
                takes_less = slow.threads < best.threads or slow.streams * slow.batch < best.streams * best.batch
                if self.ms(slow) > _THREADS_SLOWER * self.ms(best) and not (limited and takes_less):
                    smaller = range(at) if slow.threads >= best.threads else range(0)
                    larger = range(at + 1, len(self.sizes)) if slow.threads <= best.threads else range(0)
                    reason = f"{self.cost(slow)} at {size}, where {best.how} has {self.cost(best)}"
                    self._prune(slow.line, (*smaller, *larger), reason)

    def _prune(self, line: Configuration, indices: Iterable[int], reason: str) -> None:
        for index in indices:
            configuration = replace(line, size=self.sizes[index])
            if configuration not in self.measured:
                self.pruned.setdefault(configuration, reason)

    def run(self) -> None:
        """Time what the goal needs: every size without a limit on time, otherwise a bisection along each line.

        What is measured is not measured again.

        Raises:
            ConfigError: no configuration could be made, or the axes leave none.
        """
        self.pruned.clear()
        self._lines = list(self._all_lines())
        if not self._lines:
            raise ConfigError(
                "Nothing can be tried: --streams is above the number of threads, or no "
                "backend takes this model in batches.",
                hint="give --streams 1 --batch 1",
            )
        if self.request.max_ms is None:
            middle = len(self.sizes) // 2  # first, for what it says of threads at the others
            for index in sorted(range(len(self.sizes)), key=lambda index: abs(index - middle)):
                self.probe(index, self._lines)
        else:
            families: dict[tuple[int, str], list[Configuration]] = {}
            for line in self._lines:
                families.setdefault((line.fidelity, line.artifact), []).append(line)
            for _, lines in sorted(families.items(), key=lambda family: family[0]):
                self._search_family(lines)
        if not self.measured:
            reasons = "; ".join(f"{c}: {reason}" for c, reason in list(self.pruned.items())[:1])
            raise ConfigError(f"No configuration can be made. {reasons}", hint="try other sizes with --size")

    def _search_family(self, lines: Sequence[Configuration]) -> None:
        """Time ``lines``, which detect alike, at the largest size that keeps the limits and at the smaller ones.

        A size at which a more exact precision keeps them is left to that one.
        """
        sizes = {(c.backend, c.precision): c.size for c in self.measured}
        lines = [
            line
            for line in lines
            if (line.backend, line.precision) not in sizes
            or self._computes(replace(line, size=sizes[line.backend, line.precision]))
        ]
        if not lines:
            return
        first = lines[0]
        exact = {c.size for c in self.measured if replace(first, size=c.size).approximates(c) and self._keeps(c)}
        for line in lines:
            taken = [index for index, size in enumerate(self.sizes) if size in exact]
            self._prune(line, taken, "a more exact precision keeps the limit at this size")
        indices = [index for index, size in enumerate(self.sizes) if size not in exact]
        low = self._bisect(lines, indices)
        for index in indices[low + 1 :]:  # what no slow size has ruled out, since it has about as many pixels
            self.probe(index, lines)
        for index in reversed(indices[:low]):
            self._time_below(lines, index)

    def _bisect(self, lines: Sequence[Configuration], indices: Sequence[int]) -> int:
        """Find the position in ``indices`` of the largest size at which a line keeps the limits; -1 for none.

        Lines that do not at one size are not tried at larger ones.
        """
        low, high = -1, len(indices)
        while high - low > 1 and lines:
            middle = (low + high) // 2
            index = indices[middle]
            self.probe(index, lines)
            lines = [line for line in lines if line in self._lines]
            timed = [c for line in lines if (c := replace(line, size=self.sizes[index])) in self.measured]
            fitting = [c.line for c in timed if not self._excess(c)]
            larger = [i for i in indices[middle + 1 :] if self._pixels[i] > _AS_LARGE * self._pixels[index]]
            for slow in (c for c in timed if c.line not in fitting):
                self._prune(slow.line, larger, f"{self._excess(slow)} at {slow.size} already")
            if timed and not fitting:
                high = middle
            else:  # Where nothing can be made of a size, smaller ones are not likelier to be made.
                low, lines = middle, fitting or lines
        return low

    def _time_below(self, lines: Sequence[Configuration], index: int) -> None:
        """A size below one that keeps the limits keeps them too; the line is timed that is fastest near it."""
        near: dict[Configuration, Configuration] = {}  # of each line, what was measured at the nearest size

        def distance(configuration: Configuration) -> tuple[int, float]:
            return abs(self.sizes.index(configuration.size) - index), self.ms(configuration)

        for configuration in sorted((c for c in self.measured if c.line in lines), key=distance):
            near.setdefault(configuration.line, configuration)
        reason = ""
        for line in (*near, *(line for line in lines if line not in near)):
            if reason:
                self._prune(line, [index], reason)
                continue
            self.probe(index, [line])
            if self._keeps(here := replace(line, size=self.sizes[index])):
                reason = f"{line.how} is faster at {near.get(line, here).size}"

    def fastest_by_artifact(self) -> dict[str, Configuration]:
        """Of all that are evaluated alike and keep the limit, the fastest; the slower ones are pruned."""
        fastest: dict[str, Configuration] = {}
        for configuration in sorted(self.measured, key=self.ms):
            if configuration.artifact in fastest or configuration.engine in self.refused:
                continue
            if not self.fits(configuration):
                continue
            if excess := self._load_excess(configuration):
                self.pruned.setdefault(configuration, excess)
            else:
                fastest[configuration.artifact] = configuration
        for index, size in enumerate(self.sizes):
            at_size = [c for c in fastest.values() if c.size == size]
            for c in at_size:
                exact = next((e for e in at_size if c.approximates(e) and self.ms(e) <= self.ms(c)), None)
                if exact is not None:
                    self.pruned.setdefault(c, f"not faster than {exact.format} at {self.sizes[index]}")
                    del fastest[c.artifact]
        return fastest

    def _load_excess(self, configuration: Configuration) -> str:
        """Its memory or power, if that is beyond the limit; what the system does not tell is left open."""
        if configuration not in self._loads:
            self._loads[configuration] = self._measured_excess(configuration)
        return self._loads[configuration]

    def _measured_excess(self, configuration: Configuration) -> str:
        request = self.request
        if request.max_memory_mib is not None:
            memory = measure_cold_start(self.models.open_as(configuration), self._path).peak_memory_mib
            if memory > request.max_memory_mib:
                return f"{memory:.0f} MiB of memory"
        if request.max_watts is not None and not self.power_problem:
            meter = PowerMeter()
            with self.models.open_as(configuration).open() as detector:
                meter.start()
                measure_throughput(detector, self._image, seconds=_POWER_SECONDS)
                power = meter.stop()
            self.power_problem = power.problem if power.watts is None else ""
            if power.watts is not None and power.watts > request.max_watts:
                return f"{power.watts:.1f} W at full load"
        return ""
