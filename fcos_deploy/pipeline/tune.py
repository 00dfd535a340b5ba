"""From a budget to a configuration: input size, backend, precision and threads, measured on this machine.

Times first: they are cheap, and grow with the input size, so that one measurement decides for all sizes on one side of
it. Accuracy only for what the times leave, in a race on growing subsets of the images. Every trial is kept by its
content, so that an interrupted search goes on and a widened one measures what is new.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.dataset import SampleOptions
from fcos_deploy.accuracy.coco import Contender, RaceRules, Standing, race, widened_for_selection
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    folder_images,
    ground_truth_from_detections,
    label_index,
    load_coco,
)
from fcos_deploy.accuracy.gate import Verdict, judge_ap
from fcos_deploy.accuracy.predictions import collect_detections
from fcos_deploy.benchmark.measure import (
    ContentionMeter,
    LatencyStats,
    PowerMeter,
    TimingOptions,
    measure_cold_start,
    measure_throughput,
    time_in_turns,
)
from fcos_deploy.bundle.selection import select_artifact
from fcos_deploy.bundle.store import is_bundle, open_trusted
from fcos_deploy.core.artifact import files_of
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, PerformanceHint, Precision
from fcos_deploy.core.errors import (
    AccuracyGateError,
    BudgetError,
    ConfigError,
    ExportError,
    FcosDeployError,
    InconclusiveError,
)
from fcos_deploy.core.files import sha256_file, write_text
from fcos_deploy.core.gate import Gate, Judge, Outcome
from fcos_deploy.core.libraries import library_versions
from fcos_deploy.core.machine import MachineFacts, read_machine, usable_cpus
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from fcos_deploy.core.trust import Trust, own_folder
from fcos_deploy.detector import DetectorSpec
from fcos_deploy.pipeline.deploy import Deployment, backends_to_measure, deploy
from fcos_deploy.pipeline.source import source_contract
from fcos_deploy.pipeline.steps import DeployRequest, open_image_sets
from fcos_deploy.pipeline.tune_models import Configuration, InputSize, TuneModels
from fcos_deploy.report.tuning import PointStatus, TunedPoint, TuningData, front_of

if TYPE_CHECKING:
    from fcos_deploy.model.wrap import WrappedModule

__all__ = ["Answer", "Search", "TuneRequest", "Tuning", "open_search", "tune"]

_TIMING = TimingOptions(rounds=5, block=5, warmup=2)  # 20 times, the fewest that have a 90th percentile
_THROUGHPUT_SECONDS, _POWER_SECONDS = 1.0, 2.0
# Thread counts that are slower than the best by more at the first size that is measured are not tried at others.
_THREADS_SLOWER = 1.15
_NEXT = 2
# What stands for the accuracy of what, the better one first: fp16 and INT8 approximate what fp32 computes.
_FIDELITY = (Precision.FP32, Precision.FP16, Precision.INT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What is searched: ``model`` over ``sizes``, ``backends``, ``precisions`` and ``threads``; empty: the default.

    The limits are the goal: with ``max_latency_ms`` (or ``min_throughput``, images a second) the highest AP within it,
    with ``min_ap`` alone the fastest that reaches it, without any the front. ``throughput`` measures images a second
    in place of the latency of one image. ``percentile``: 50 or 90, which latency has to keep the limit.
    ``calibration_images``: needed for INT8. Without ``annotations`` the model's own detections at its own size stand
    for the ground truth. ``max_map_drop`` and ``judge`` are as in a deployment.
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
    threads: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()
    options: CheckpointOptions = field(default_factory=CheckpointOptions)
    max_map_drop: float | None = None
    judge: Judge = Judge.INTERVAL
    allow_overlap: bool = False
    calibration_count: int | None = None
    own_ranges: bool = False
    seed: int = 0
    trust: Trust = field(default_factory=Trust)
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("max_latency_ms", "min_throughput", "max_memory_mib", "max_watts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}.")
        if self.max_latency_ms is not None and self.measures_throughput:
            raise ConfigError(
                "A limit on latency and one on throughput are two different goals.",
                hint="give --max-latency-ms, or --throughput with --min-throughput",
            )
        if self.percentile not in {50, 90}:
            raise ConfigError(f"The percentile must be 50 or 90, got {self.percentile}.")
        if self.min_ap is not None and self.annotations is None:
            raise ConfigError("An AP cannot be asked for without annotations.", hint="give --annotations FILE")
        if Precision.INT8 in self.precisions and self.calibration_images is None:
            raise ConfigError("INT8 needs images to calibrate on.", hint="give --calibration-images PATH")
        _ = Gate(min_ap=self.min_ap)  # which refuses what is no share of 1

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
        if not limits:
            return "The front of AP against " + ("throughput." if self.throughput else "latency.")
        if self.max_memory_mib is not None:
            limits.append(f"at most {self.max_memory_mib:g} MiB of memory")
        if self.max_watts is not None:
            limits.append(f"at most {self.max_watts:g} W")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A finished search: ``data`` is what its page shows; ``deployment`` the bundle of the chosen one, if there is one.

    ``verdicts``: on ``min_ap`` of the chosen one, and on its time in the bundle. ``failure``: why there is no bundle
    although there is a limit.
    """

    data: TuningData
    chosen: TunedPoint | None
    deployment: Deployment | None
    verdicts: tuple[Verdict, ...]
    seconds: float
    failure: FcosDeployError | None = None


class _Trials:
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
            "session": [spec.options.threads, spec.options.streams, str(spec.options.hint)],
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
        """None where there is none, or a damaged one."""
        try:
            return from_json(Measured, parse_json(path.read_bytes()))
        except (OSError, ValueError, ConfigError):
            return None


class Search:
    """The state of a search over times."""

    def __init__(
        self,
        request: TuneRequest,
        models: TuneModels,
        *,
        image: Path,
        trials: _Trials,
        progress: ProgressFn,
    ) -> None:
        self.request, self.models, self._trials, self._progress = request, models, trials, progress
        self._path = image
        with models.reference().open() as detector:
            self._image = detector.read(image)
        height, width = self._image.shape[:2]
        self.sizes = sorted(models.sizes, key=lambda size: size.pixels(height, width))
        self.measured: dict[Configuration, Measured] = {}
        self.pruned: dict[Configuration, str] = {}
        self.refused: dict[str, str] = {}  # engines whose bundle could not be made, and why
        self._loads: dict[Configuration, str] = {}  # what is too much of memory or power, '' for nothing
        self.power_problem = ""  # why the limit on power cannot be judged
        self._lines: list[Configuration] = []
        self._screened: set[tuple[str, Precision]] = set()

    def _all_lines(self) -> Iterable[Configuration]:
        request, cpus = self.request, usable_cpus()
        hint = PerformanceHint.THROUGHPUT if request.measures_throughput else PerformanceHint.LATENCY
        threads = request.threads or ((cpus,) if request.measures_throughput else tuple({cpus, max(1, cpus // 2)}))
        streams = request.streams or (tuple({1, max(1, cpus // 2), cpus}) if request.measures_throughput else (1,))
        for precision in self.models.precisions:
            for backend in self.models.backends:
                for count in sorted(threads, reverse=True):
                    for parallel in sorted(streams, reverse=True):
                        if parallel <= count:
                            yield Configuration(
                                size=self.sizes[0],
                                backend=backend,
                                precision=precision,
                                threads=count,
                                streams=parallel,
                                hint=hint,
                            ).line

    def ms(self, configuration: Configuration) -> float:
        """What a measured configuration takes."""
        return self.measured[configuration].ms(self.request.percentile)

    def fits(self, configuration: Configuration) -> bool:
        """Whether it keeps the limit on time, if there is one."""
        return self.request.max_ms is None or self.ms(configuration) <= self.request.max_ms

    def probe(self, index: int, lines: Sequence[Configuration]) -> None:
        """Time the configurations of one size, in turns; those that are known are taken from disk."""
        size = self.sizes[index]
        asked = [replace(line, size=size) for line in lines]
        asked = [c for c in asked if c not in self.measured and c not in self.pruned]
        opened: list[tuple[Configuration, DetectorSpec, Path]] = []
        for configuration in asked:
            try:
                spec = self.models.open_as(configuration)
            except ExportError as error:  # A size that the network does not take, such as one without a top level.
                self._prune(configuration.line, [index], f"cannot be made: {error.message}")
                continue
            path = self._trials.path(spec, throughput=self.request.measures_throughput)
            known = self._trials.load(self._deployed_path(path)) or self._trials.load(path)
            if known is not None:
                self.measured[configuration] = known
            else:
                opened.append((configuration, spec, path))
        if opened:
            self._time(opened)
        self._screen_threads(size)

    def _time(self, opened: Sequence[tuple[Configuration, DetectorSpec, Path]]) -> None:
        for (configuration, _, path), measured in zip(opened, self._measure(opened), strict=True):
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
        """What the bundle's own artifact takes, opened as ``configuration`` says.

        A time beyond the limit takes the place of the search's own: ``run`` then looks at what that one had pruned. It
        is kept unless other programs may be the reason for it.
        """
        trial = self.models.open_as(configuration)
        spec = replace(trial, model=bundle)
        (measured,) = self._measure([(configuration, spec, bundle)])
        measured = replace(measured, deployed=True)
        if measured.ms(self.request.percentile) > (self.request.max_ms or math.inf) and not measured.problem:
            path = self._trials.path(trial, throughput=self.request.measures_throughput)
            self._trials.keep(measured, self._deployed_path(path))
            self.measured[configuration] = measured
        return measured

    def _deployed_path(self, path: Path) -> Path:
        """Where the time of the bundle is kept: other limits on its accuracy may leave other layers in float."""
        return path.with_name(f"{path.stem}-deployed-{self.models.gate_key}.json")

    def _screen_threads(self, size: InputSize) -> None:
        """Drop the thread and stream counts that are slow at the first size that a backend and precision run at."""
        groups: dict[tuple[str, Precision], list[Configuration]] = {}
        for configuration in self.measured:
            if configuration.size == size:
                groups.setdefault((configuration.backend, configuration.precision), []).append(configuration)
        for key, group in groups.items():
            if key in self._screened:
                continue
            self._screened.add(key)
            best = min(group, key=self.ms)
            for slow in group:
                if self.ms(slow) > _THREADS_SLOWER * self.ms(best):
                    reason = f"{self.ms(slow):.1f} ms at {size}, where {best.how} takes {self.ms(best):.1f}"
                    self._prune(slow.line, range(len(self.sizes)), reason)
                    self._lines.remove(slow.line)

    def _prune(self, line: Configuration, indices: Iterable[int], reason: str) -> None:
        for index in indices:
            configuration = replace(line, size=self.sizes[index])
            if configuration not in self.measured:
                self.pruned.setdefault(configuration, reason)

    def run(self) -> None:
        """Time what the goal needs: every size without a limit on time, otherwise a bisection along each line.

        What is measured is not measured again.

        Raises:
            ConfigError: no configuration could be made.
        """
        self.pruned.clear()
        self._screened.clear()
        self._lines = list(self._all_lines())
        if self.request.max_ms is None:
            for index in range(len(self.sizes)):
                self.probe(index, self._lines)
        else:
            largest = -1  # the largest size at which a more exact precision keeps the limit
            for precision in [p for p in _FIDELITY if p in self.models.precisions]:
                largest = max(largest, self._bisect(precision, above=largest))
        if not self.measured:
            reasons = "; ".join(f"{c}: {reason}" for c, reason in list(self.pruned.items())[:1])
            raise ConfigError(f"No configuration can be made. {reasons}", hint="try other sizes with --size")

    def _bisect(self, precision: Precision, *, above: int) -> int:
        """Find along each line of ``precision`` the largest size that keeps the limit, above the index ``above``.

        Returns the index of the largest of all.
        """
        bounds: dict[Configuration, tuple[int, int]] = {
            line: (above, len(self.sizes)) for line in self._lines if line.precision is precision
        }
        if above >= 0:
            for line in bounds:
                self._prune(line, range(above + 1), "a more exact precision keeps the limit at this size")
        while open_lines := {line: ends for line, ends in bounds.items() if ends[1] - ends[0] > 1}:
            middles = Counter((low + high) // 2 for low, high in open_lines.values())
            index = min(middles, key=lambda middle: (-middles[middle], middle))
            self.probe(index, [line for line, (low, high) in open_lines.items() if low < index < high])
            for line, (low, high) in open_lines.items():
                configuration = replace(line, size=self.sizes[index])
                if line not in self._lines:
                    del bounds[line]
                elif low < index < high and configuration not in self.measured:
                    bounds[line] = (index, high)  # Smaller ones are not likelier to be made.
                elif low < index < high and self.fits(configuration):
                    bounds[line] = (index, high)
                elif low < index < high:
                    bounds[line] = (low, index)
                    reason = f"{self.sizes[index]} takes {self.ms(configuration):.1f} ms already"
                    self._prune(line, range(index + 1, len(self.sizes)), reason)
        best = max((low for low, _ in bounds.values()), default=above)
        self._time_below(bounds, best=best, above=above)
        return best

    def _time_below(self, bounds: Mapping[Configuration, tuple[int, int]], *, best: int, above: int) -> None:
        """The sizes below keep the limit too; there only the line is timed that is fastest where it was."""
        for index in range(best - 1, above, -1):
            if any(c.size == self.sizes[index] and c.line in bounds for c in self.measured):
                continue
            fitting = [c for c in self.measured if c.line in bounds and self.fits(c)]
            if not fitting:
                return
            near = min(fitting, key=lambda c: (abs(self.sizes.index(c.size) - index), self.ms(c)))
            self.probe(index, [near.line])
            for line in bounds:
                self._prune(line, [index], f"{near.how} is faster at {near.size}")

    def fastest_by_artifact(self) -> dict[str, Configuration]:
        """Of all that are evaluated alike and keep the limit, the fastest; the slower ones are pruned."""
        fastest: dict[str, Configuration] = {}
        for configuration in sorted(self.measured, key=self.ms):
            if configuration.artifact in fastest or configuration.engine in self.refused:
                continue
            if self.fits(configuration) and self._affordable(configuration):
                fastest[configuration.artifact] = configuration
        for index, size in enumerate(self.sizes):
            at_size = [c for c in fastest.values() if c.size == size]
            for c in at_size:
                exact = [e for e in at_size if _FIDELITY.index(e.precision) < _FIDELITY.index(c.precision)]
                if any(self.ms(e) <= self.ms(c) for e in exact):
                    self.pruned.setdefault(c, f"not faster than fp32 at {self.sizes[index]}")
                    del fastest[c.artifact]
        return fastest

    def _affordable(self, configuration: Configuration) -> bool:
        """Whether it keeps the limits on memory and power; what the system does not tell is left open."""
        if configuration not in self._loads:
            self._loads[configuration] = self._excess(configuration)
        if self._loads[configuration]:
            self.pruned.setdefault(configuration, self._loads[configuration])
        return not self._loads[configuration]

    def _excess(self, configuration: Configuration) -> str:
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


def tune(request: TuneRequest, *, progress: ProgressFn = no_progress) -> Tuning:
    """Search, make the bundle of what was chosen, and leave ``tune.json`` with all that was measured.

    That nothing keeps the limits is a ``failure`` of the answer, whose figures are of use all the same.

    Raises:
        ConfigError: an axis without a value that works here.
        FcosDeployError: as deploying.
    """
    started = time.perf_counter()
    with open_search(request, progress=progress) as (search, answer):
        search.run()
        answer.race()
        deployment, on_time, failure = _deploy_best(search, answer, request.output / "bundle", progress=progress)
    shutil.rmtree(request.output / "trials" / "work", ignore_errors=True)  # What it holds is in the cache of steps.
    data = answer.data()
    if deployment is not None:
        data = replace(data, notes=(*data.notes, _load_sentence(deployment)))
    write_text(request.output / "tune.json", json.dumps(to_json(data), indent=1) + "\n")
    return Tuning(
        data=data,
        chosen=next((point for point in data.points if point.status is PointStatus.CHOSEN), None),
        deployment=deployment,
        verdicts=answer.verdicts + on_time,
        seconds=time.perf_counter() - started,
        failure=failure,
    )


@contextlib.contextmanager
def open_search(request: TuneRequest, *, progress: ProgressFn = no_progress) -> Iterator[tuple[Search, Answer]]:
    """The two halves of a search, over the trials in the folder of the request.

    Raises:
        ConfigError: the folder is another one's, or an axis has no value that works here.
    """
    if request.output.exists() and not (request.output / "trials").is_dir() and any(request.output.iterdir()):
        raise ConfigError(f"'{request.output}' exists and is not the folder of a search.", hint="choose another output")
    folder = own_folder(request.output / "trials")
    with contextlib.ExitStack() as stack:
        models = stack.enter_context(
            contextlib.closing(_open_models(request, folder=folder, stack=stack, progress=progress))
        )
        dataset = _dataset(request, models, folder=folder, progress=progress)
        image = dataset.images[0].path
        trials = _Trials(folder / "times", machine=read_machine(), image=image)
        search = Search(request, models, image=image, trials=trials, progress=progress)
        yield search, Answer(search, dataset, folder=folder / "predictions", progress=progress)


def _load_sentence(deployment: Deployment) -> str:
    """What the chosen one takes beside time: memory of a new process, and power where the system tells it."""
    result = deployment.benchmark.results[1]  # behind the reference
    power, cold = result.power, result.cold_start
    parts = [] if cold is None else [f"{cold.peak_memory_mib:.0f} MiB of memory in a new process"]
    if power.watts is None:
        parts.append(f"power is not known ({power.problem})")
    else:
        parts.append(f"{power.watts:.1f} W at full load ({power.source})")
    return f"The chosen one: {' and '.join(parts)}."


def _time_verdict(request: TuneRequest, chosen: Configuration, measured: Measured, *, limit: float) -> Verdict:
    """The limit on time, held to what the bundle takes: layers may have gone back to float in it."""
    ms = measured.ms(request.percentile)
    message = f"{ms:.1f} ms an image as deployed, at most {limit:g} asked for"
    outcome = Outcome.PASSED
    if ms > limit:
        outcome = Outcome.INCONCLUSIVE if measured.problem else Outcome.FAILED
        message += f"; {measured.problem}" if measured.problem else ""
    name = "min_throughput" if request.min_throughput else "max_latency_ms"
    subject = f"{chosen.backend} {chosen.precision}"
    return Verdict(name=name, subject=subject, outcome=outcome, value=ms, limit=limit, message=message)


def _deploy_best(
    search: Search, answer: Answer, output: Path, *, progress: ProgressFn
) -> tuple[Deployment | None, tuple[Verdict, ...], FcosDeployError | None]:
    """The bundle of the best that can be deployed, verdicts on its time; or why there is none.

    After one that cannot be deployed, or is too slow as it was, the search goes on: what was pruned for it may be the
    best now.
    """
    while True:
        try:
            chosen = answer.choose()
        except BudgetError as error:
            return None, (), error
        if chosen is None:
            return None, (), None
        try:
            deployment = deploy(search.models.deploy_request(chosen, output), progress=progress)
        except InconclusiveError as error:
            return None, (), error
        except AccuracyGateError as error:
            search.refused[chosen.engine] = error.message
        else:
            limit = search.request.max_ms
            if limit is None:
                return deployment, (), None
            measured = search.time_bundle(chosen, deployment.bundle)
            verdict = _time_verdict(search.request, chosen, measured, limit=limit)
            if verdict.outcome is not Outcome.FAILED:
                return deployment, (verdict,), None
            shutil.rmtree(deployment.bundle)
        search.run()
        answer.race()


def _open_models(
    request: TuneRequest, *, folder: Path, stack: contextlib.ExitStack, progress: ProgressFn
) -> TuneModels:
    model = request.model
    if isinstance(model, Path) and is_bundle(model):
        # Its float graph takes the place of the checkpoint, which a device does not have, and neither PyTorch.
        bundle = stack.enter_context(open_trusted(model, request.trust))
        readers = {ArtifactKind.ONNX: "onnxruntime"}
        selection = select_artifact(bundle, precisions=(Precision.FP32,), readers=readers, purpose="tuning")
        model = bundle.path(selection.artifact.path)
    precisions = request.precisions or (
        (Precision.FP32, Precision.INT8) if request.calibration_images else (Precision.FP32,)
    )
    deployment = DeployRequest(
        checkpoint=model,
        output=folder / "work" / "own",
        calibration_images=request.calibration_images or request.images,
        backends=request.backends,
        precisions=precisions,
        options=request.options,
        images=request.images,
        annotations=request.annotations,
        max_map_drop=request.max_map_drop,
        judge=request.judge,
        # Without INT8 nothing is calibrated, on whatever images.
        allow_overlap=request.allow_overlap or request.calibration_images is None,
        calibration_count=request.calibration_count,
        seed=request.seed,
        command=request.command,
    )
    backends = backends_to_measure(deployment)
    images = open_image_sets(
        deployment.calibration_images,
        source_contract(model, options=request.options),
        images=request.images,
        annotations=request.annotations,
        sample=SampleOptions(count=request.calibration_count, seed=request.seed),
        allow_overlap=deployment.allow_overlap,
    )
    return TuneModels(
        deployment,
        images,
        folder=folder,
        sizes=request.sizes,
        backends=backends,
        own_ranges=request.own_ranges,
        progress=progress,
    )


def _dataset(request: TuneRequest, models: TuneModels, *, folder: Path, progress: ProgressFn) -> Dataset:
    """The annotated images; without annotations what the model detects in them at its own size."""
    if request.annotations is not None:
        return load_coco(request.annotations, images=request.images)
    images = folder_images(request.images)
    run = collect_detections(models.reference(), images, folder=own_folder(folder / "predictions"), progress=progress)
    return ground_truth_from_detections(
        images, run.detections, class_names=run.names, min_score=0.3, source=f"The model '{run.model}'"
    )


class Answer:
    """What the race leaves, and the choice among it."""

    def __init__(self, search: Search, dataset: Dataset, *, folder: Path, progress: ProgressFn) -> None:
        self._search, self._dataset, self._folder, self._progress = search, dataset, folder, progress
        self._request = search.request
        self.standings: dict[Configuration, Standing] = {}
        self._racing: list[Configuration] = []
        self._chosen: Configuration | None = None
        self._nearest: Configuration | None = None
        self.verdicts: tuple[Verdict, ...] = ()

    def race(self) -> None:
        """Evaluate what the times leave, or, where they leave nothing, the nearest."""
        candidates = list(self._search.fastest_by_artifact().values())
        self._nearest = None
        if not candidates and not self._search.refused:
            self._nearest = min(self._search.measured, key=self._search.ms)
            candidates = [self._nearest]
        contenders = [
            Contender(name=c.artifact, cost=self._search.ms(c), detect=functools.partial(self._detect, c))
            for c in candidates
        ]
        rules = RaceRules(
            min_ap=self._request.min_ap if self._request.wants_fastest else None,
            by_cost=not self._request.has_goal,
            judge=self._request.judge,
        )
        standings = race(contenders, self._dataset, rules=rules)
        self.standings |= zip(candidates, standings, strict=True)
        self._racing = candidates

    def _detect(self, configuration: Configuration, images: Sequence[EvaluationImage]) -> Mapping[int, Detections]:
        """What it detects; kept by content, so that what an earlier search has run is not run again."""
        spec = self._search.models.open_as(configuration)
        run = collect_detections(spec, images, folder=own_folder(self._folder), progress=self._progress)
        return run.relabelled(label_index(run.names, self._dataset))

    def _ap(self, configuration: Configuration) -> float:
        interval = self.standings[configuration].interval
        return interval.value if interval else 0.0

    @property
    def _ranked(self) -> list[Configuration]:
        """Those that ran on all images, the best for the goal first."""
        finished = [c for c in self._racing if not self.standings[c].reason]
        if self._request.wants_fastest:
            order = (Outcome.PASSED, Outcome.INCONCLUSIVE, Outcome.FAILED)
            return sorted(
                finished,
                key=lambda c: (
                    order.index(self._verdicts(c)[0].outcome),
                    self._search.ms(c) if self._verdicts(c)[0].passed else -self._ap(c),
                ),
            )
        return sorted(finished, key=lambda c: (-self._ap(c), self._search.ms(c)))

    def _verdicts(self, configuration: Configuration) -> tuple[Verdict, ...]:
        """On the AP that was asked for, widened because the configuration was chosen among others on these images."""
        standing, gate = self.standings[configuration], Gate(min_ap=self._request.min_ap, judge=self._request.judge)
        interval = standing.interval and widened_for_selection(standing.interval, standing.choices)
        verdicts = judge_ap(
            gate,
            interval.value if interval else None,
            subject=str(configuration),
            images=standing.images,
            interval=interval,
        )
        limit, problem = self._request.max_watts, self._search.power_problem
        if limit is not None and problem:
            verdicts.append(
                Verdict(
                    name="max_watts",
                    subject=str(configuration),
                    outcome=Outcome.INCONCLUSIVE,
                    value=None,
                    limit=limit,
                    message=problem,
                )
            )
        return tuple(verdicts)

    def choose(self) -> Configuration | None:
        """The best that is not refused; None without a limit.

        Raises:
            BudgetError: there is none.
        """
        self._chosen = None
        if not self._request.has_goal:
            return None
        ranked = self._ranked
        if self._nearest is not None or not ranked:
            raise BudgetError(
                f"No configuration keeps the limits. {self._nearest_sentence()}",
                hint="allow more time, or try smaller inputs with --size",
            )
        best = ranked[0]
        verdicts = self._verdicts(best)
        if any(verdict.outcome is Outcome.FAILED for verdict in verdicts):
            self._nearest = best
            raise BudgetError(
                f"No configuration keeps the limits. {self._nearest_sentence()}",
                hint="lower --min-ap, or allow more time",
            )
        self._chosen, self.verdicts = best, verdicts
        return best

    def _nearest_sentence(self) -> str:
        nearest = self._nearest
        if nearest is None:
            left = [f"{engine}: {reason}" for engine, reason in self._search.refused.items()]
            return "; ".join(left) or "Nothing could be measured."
        standing = self.standings.get(nearest)
        ap = f", AP {standing.interval.value:.3f}" if standing and standing.interval else ""
        beyond = "as deployed" if self._search.measured[nearest].deployed else self._search.pruned.get(nearest, "")
        return f"The nearest is {nearest}: {self._search.ms(nearest):.1f} ms{ap}{beyond and f', {beyond}'}."

    def data(self) -> TuningData:
        """Everything that the page shows."""
        request, search = self._request, self._search
        everything = sorted(
            {**search.measured, **search.pruned},
            key=lambda c: (search.sizes.index(c.size), _FIDELITY.index(c.precision), c.backend, -c.threads, -c.streams),
        )
        points = tuple(map(self.point, everything))
        front = {p.label for p in front_of(points)}
        points = tuple(
            replace(p, status=PointStatus.FRONT)
            if p.label in front and p.status is PointStatus.MEASURED and not request.has_goal
            else p
            for p in points
        )
        machine = read_machine()
        problem = next((m.problem for m in search.measured.values() if m.problem), "")
        notes = [n for n in (search.models.note, problem and f"Times are doubtful: {problem}.") if n]
        if not self._dataset.annotated:
            notes.append("No annotations: AP is agreement with the model's own detections at its own size.")
        if request.calibration_images is None:
            notes.append("INT8 was not tried: it needs --calibration-images.")
        return TuningData(
            title=request.model.name if isinstance(request.model, Path) else type(request.model.model).__name__,
            goal=request.goal,
            answer=self._sentence(),
            points=points,
            max_ms=request.max_ms,
            min_ap=request.min_ap,
            facts={
                "processor": f"{machine.processor}, {machine.cores} cores",
                "system": machine.system,
                "images": f"{len(self._dataset.images)}, ground truth: {Path(self._dataset.source).name}",
                "image that was timed": self._dataset.images[0].path.name,
                **{name: get_backend(name).probe().version for name in search.models.backends},
            },
            notes=tuple(notes),
            command=request.command,
        )

    def _sentence(self) -> str:
        if self._chosen is None:
            return self._nearest_sentence() if self._request.has_goal else "No limit was given, so nothing was chosen."
        interval = self.standings[self._chosen].interval
        if interval is None:  # Excluded: what is chosen was evaluated.
            return str(self._chosen)
        return (
            f"{self._chosen}: {self._search.ms(self._chosen):.1f} ms, AP {interval.value:.3f} "
            f"({interval.low:.3f} to {interval.high:.3f})."
        )

    def point(self, configuration: Configuration) -> TunedPoint:
        """A row of the table."""
        measured = self._search.measured.get(configuration)
        standing = self.standings.get(configuration)
        interval = standing.interval if standing else None
        status, reason = self._status(configuration)
        figures: dict[str, Any] = {}  # Any: figures of several types
        if measured is not None:
            figures = {
                "p50_ms": measured.latency.p50,
                "p90_ms": measured.latency.p90,
                "images_per_second": measured.throughput,
            }
        if interval is not None and standing is not None:
            figures |= {"ap": interval.value, "ap_low": interval.low, "ap_high": interval.high}
            figures["images"] = standing.images
        return TunedPoint(
            size=str(configuration.size),
            runtime=configuration.how,
            backend=configuration.backend,
            precision=configuration.precision,
            threads=configuration.threads,
            streams=configuration.streams,
            status=status,
            reason=reason,
            **figures,
        )

    def _status(self, configuration: Configuration) -> tuple[PointStatus, str]:
        search, measured = self._search, self._search.measured.get(configuration)
        standing = self.standings.get(configuration)
        if configuration == self._chosen:
            return PointStatus.CHOSEN, ""
        if configuration.engine in search.refused:
            return PointStatus.PRUNED, f"refused when it was deployed: {search.refused[configuration.engine]}"
        if measured is not None and measured.deployed and not search.fits(configuration):
            return PointStatus.PRUNED, f"{search.ms(configuration):.1f} ms in its bundle, beyond the limit"
        if standing is not None and standing.reason:
            return PointStatus.PRUNED, standing.reason
        if configuration in self._racing:
            following = [c for c in self._ranked if c != self._chosen][:_NEXT]
            is_next = self._chosen is not None and configuration in following
            status = PointStatus.NEXT if is_next else PointStatus.MEASURED
            return status, search.pruned.get(configuration, "")
        if configuration in search.pruned:
            return PointStatus.PRUNED, search.pruned[configuration]
        if not search.fits(configuration):
            return PointStatus.PRUNED, f"{search.ms(configuration):.1f} ms, beyond the limit"
        return PointStatus.PRUNED, "another runtime or thread count is faster with the same detections"
