"""How the ranges settle as images are added: whether there were enough."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.cache import DEFAULT_METHOD, Calibration, ImageRecord, TensorRanges, save_calibration, write_trt_cache
from calibration.dataset import (
    CalibrationImage,
    CalibrationSet,
    SampleOptions,
    SetReport,
    collect_images,
    examine_set,
)
from calibration.execution import Feeder, Run, Tensors, expose, memory_groups, open_engine, pick_engine
from calibration.placement import ConvGraph, load_graph
from calibration.ranges import Histogram, RangeMethod, all_ranges, find_range
from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.files import atomic_file, sha256_file
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json

__all__ = [
    "CalibrationReport",
    "CalibrationRequest",
    "ConvergencePoint",
    "ConvergenceRecorder",
    "StatisticsOptions",
    "calibrate",
    "collect_histograms",
    "collect_ranges",
    "convergence_curve",
    "range_method",
    "ranges_from",
]

_STEPS = 6


@dataclass(frozen=True, slots=True)
class ConvergencePoint:
    """After ``images`` images, how far the symmetric ranges are from the final ones, as shares of those."""

    images: int
    median_change: float
    largest_change: float


class ConvergenceRecorder:
    """Notes every tensor's range after 1, 2, 4, ... images of a pass."""

    def __init__(self, total: int, *, method: RangeMethod) -> None:
        self._method = method
        self._stops = set(stops(total))
        self._seen: dict[int, dict[str, float]] = {}

    def __call__(self, done: int, histograms: dict[str, Histogram]) -> None:
        """Look at the histograms after ``done`` images."""
        if done in self._stops:
            self._seen[done] = {n: find_range(h, self._method).amax for n, h in histograms.items() if h.amax > 0}

    def curve(self) -> tuple[ConvergencePoint, ...]:
        """One point a stop, the last of which is the final state."""
        return convergence_curve(self._seen)


def stops(total: int) -> Iterator[int]:
    """``total`` and its halves down to one image, at most ``_STEPS`` of them."""
    for _ in range(_STEPS):
        yield total
        if total <= 1:
            return
        total //= 2


def convergence_curve(seen: dict[int, dict[str, float]]) -> tuple[ConvergencePoint, ...]:
    """Compare each stop's ranges with the last stop's."""
    if not seen:
        return ()
    final = seen[max(seen)]
    return tuple(_point(images, seen[images], final) for images in sorted(seen))


def _point(images: int, ranges: dict[str, float], final: dict[str, float]) -> ConvergencePoint:
    changes: Sequence[float] = [abs(ranges[name] / value - 1.0) for name, value in final.items() if name in ranges]
    return ConvergencePoint(images, round(float(np.median(changes)), 5), round(float(np.max(changes)), 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsOptions:
    """How the pass runs.

    ``memory``: bytes of intermediate tensors that one inference hands out; less memory means more inferences an image.
    ``samples``: values of one tensor of one image that enter its histogram, evenly spaced; extremes are always exact.
    ``save_every``: seconds between two saved states.
    """

    method: RangeMethod = DEFAULT_METHOD
    engine: str = "auto"
    threads: int | None = None
    memory: int = 512 << 20
    samples: int = 1 << 17
    save_every: float = 15.0

    def __post_init__(self) -> None:
        if self.memory < 1 or self.samples < 1 or self.save_every < 0:
            raise ConfigError("memory and samples must be at least 1, save_every at least 0.")


_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

Histograms = dict[str, Histogram]
Observer = Callable[[int, Histograms], None]  # called with the number of images done


def collect_ranges(
    source: Path,
    images: CalibrationSet,
    *,
    options: StatisticsOptions | None = None,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
    observer: Observer | None = None,
) -> Calibration:
    """Measure the ranges of a float ONNX graph on calibration images.

    ``state`` is a file in which an interrupted pass keeps what it has; it goes when the pass is complete. ``observer``
    sees the histograms after every image.

    Raises:
        CalibrationError: a graph that is not float, an unreadable image, NaN or infinity, a tensor that is always zero.
    """
    options = _with_engine(source, images, options or StatisticsOptions(), state=state)
    histograms = collect_histograms(source, images, options=options, state=state, progress=progress, observer=observer)
    calibration = ranges_from(histograms, source=source, images=images, options=options)
    if state is not None:
        state.unlink(missing_ok=True)
    return calibration


def ranges_from(
    histograms: Histograms, *, source: Path, images: CalibrationSet, options: StatisticsOptions
) -> Calibration:
    """The ranges by every method, bound to the graph's hash."""
    tensors = {}
    for name, histogram in histograms.items():
        try:
            ranges = all_ranges(histogram)
        except CalibrationError as error:
            raise CalibrationError(
                f"Tensor '{name}' of '{source}': {error.message} ({len(images.images)} images, first "
                f"'{images.images[0].path}').",
                hint="is the checkpoint trained, and do the images fit it?",
            ) from error
        share = round(histogram.zeros / histogram.elements, 6)
        means = " ".join(f"{mean:.6g}" for mean in histogram.channel_means)
        tensors[name] = TensorRanges(histogram.minimum, histogram.maximum, share, ranges, means)
    return Calibration(
        graph_sha256=sha256_file(source),
        method=options.method,
        preprocess=read_contract(source).preprocess,
        seed=images.seed,
        engine=options.engine,
        images=tuple(ImageRecord(image.name, image.sha256) for image in images.images),
        tensors=tensors,
        overrides={},
    )


def collect_histograms(
    source: Path,
    images: CalibrationSet,
    *,
    options: StatisticsOptions,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
    observer: Observer | None = None,
) -> Histograms:
    """Histograms of all quantizable tensors, by name in graph order.

    Raises:
        CalibrationError: as ``collect_ranges``.
    """
    options = _with_engine(source, images, options, state=state)
    graph = load_graph(source)
    key = _key(source, images, options)
    done, histograms = _resume(state, key, graph.activations())
    saved = time.monotonic()
    with closing(_Pass(graph, _float_contract(source), options=options)) as walk:
        for index, image in enumerate(images.images[done:], done):
            progress("calibrating", index, len(images.images))
            walk.add(image, histograms)
            if observer is not None:
                observer(index + 1, histograms)
            if state is not None and time.monotonic() - saved >= options.save_every:
                _save(state, key, options.engine, done=index + 1, histograms=histograms)
                saved = time.monotonic()
    progress("calibrating", len(images.images), len(images.images))
    return histograms


def _float_contract(source: Path) -> ModelContract:
    contract = read_contract(source)
    if contract.precision is not Precision.FP32:
        raise CalibrationError(f"'{source}' is {contract.precision}.", hint="calibrate the fp32 graph")
    return contract


def _with_engine(
    source: Path, images: CalibrationSet, options: StatisticsOptions, *, state: Path | None
) -> StatisticsOptions:
    """``auto`` becomes the engine of the pass that is to be resumed, otherwise the fastest on the first image."""
    if options.engine != "auto":
        return options
    engine = _saved_engine(state)
    if not engine:
        graph, contract = load_graph(source), _float_contract(source)
        feeds = Feeder(graph.model, contract)(images.images[0].read())
        first = expose(graph.model, _groups(graph, options)[0])
        engine = pick_engine(first, feeds, images=len(images.images), threads=options.threads)
    return replace(options, engine=engine)


class _Pass:
    """The graph, opened once for each group of tensors."""

    def __init__(self, graph: ConvGraph, contract: ModelContract, *, options: StatisticsOptions) -> None:
        self._feeder = Feeder(graph.model, contract)
        self._samples = options.samples
        inputs = {value.name for value in graph.model.graph.input}
        self._inputs = [name for name in graph.activations() if name in inputs]
        self._runs: Sequence[Run] = [
            open_engine(options.engine, expose(graph.model, group), threads=options.threads)
            for group in _groups(graph, options)
        ]
        self._pool = ThreadPoolExecutor(options.threads or usable_cpus(), "histograms")

    def close(self) -> None:
        self._pool.shutdown()

    def add(self, image: CalibrationImage, histograms: Histograms) -> None:
        feeds = self._feeder(image.read())
        self._count({name: feeds[name] for name in self._inputs}, image, histograms)
        for run in self._runs:
            self._count(run(feeds), image, histograms)

    def _count(self, tensors: Tensors, image: CalibrationImage, histograms: Histograms) -> None:
        def count(name: str) -> None:
            try:
                histograms[name].add(tensors[name], samples=self._samples)
            except CalibrationError as error:
                raise CalibrationError(
                    f"Tensor '{name}' for the image '{image.path}': {error.message}.",
                    hint="does the float model work on this image?",
                ) from error

        # Counting releases the interpreter's lock; every tensor has a histogram of its own.
        for _ in self._pool.map(count, tensors):
            pass


def _groups(graph: ConvGraph, options: StatisticsOptions) -> list[list[str]]:
    """Tensors that one inference hands out together; the graph's inputs are known without one."""
    inputs = {value.name for value in graph.model.graph.input}
    names = [name for name in graph.activations() if name not in inputs]
    return memory_groups(graph.model, names, memory=options.memory)


def _key(source: Path, images: CalibrationSet, options: StatisticsOptions) -> str:
    """Hash of everything that the histograms depend on."""
    settings = {k: v for k, v in asdict(options).items() if k in {"samples", "engine"}}
    parts = {
        "graph": sha256_file(source),
        "images": [image.sha256 for image in images.images],
        "preprocess": to_json(read_contract(source).preprocess),
        "settings": settings,
        "version": 2,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _save(state: Path, key: str, engine: str, *, done: int, histograms: Histograms) -> None:
    arrays: dict[str, Any] = {"key": np.array(key), "done": np.array(done), "engine": np.array(engine)}
    for name, histogram in histograms.items():
        arrays |= {f"{name}\n{part}": value for part, value in histogram.state().items()}
    with atomic_file(state) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def _saved_engine(state: Path | None) -> str:
    if state is None or not state.is_file():
        return ""
    try:
        with state.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return str(arrays["engine"])
    except _DAMAGED:
        return ""


def _resume(state: Path | None, key: str, names: Sequence[str]) -> tuple[int, Histograms]:
    """Images done and their histograms; a state of other inputs, or a damaged one, starts again."""
    fresh = {name: Histogram() for name in names}
    if state is None or not state.is_file():
        return 0, fresh
    try:
        with state.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return 0, fresh
            parts = ("positive", "negative", "channels", "numbers", "counts")
            found = {n: Histogram.from_state({p: arrays[f"{n}\n{p}"] for p in parts}) for n in names}
            return int(arrays["done"]), found
    except _DAMAGED:
        return 0, fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """One calibration; ``method`` empty means the default."""

    model: Path
    images: Path
    output: Path
    annotations: Path | None = None
    method: str = ""
    count: int | None = None
    seed: int = 0
    evaluation_images: Path | None = None
    engine: str = "auto"
    threads: int | None = None
    convergence: bool = False
    minimum: int = 8
    tensorrt_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What was made, and what is to be said of the images."""

    output: str
    method: RangeMethod
    tensors: int
    images: SetReport
    convergence: tuple[ConvergencePoint, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        found = [*self.images.lines(), f"{self.tensors} tensors, method {self.method}: {self.output}"]
        found += [
            f"{p.images:5d} images: ranges differ from the final ones by {p.median_change:.2%} in the median, "
            f"{p.largest_change:.1%} at most"
            for p in self.convergence
        ]
        return found


def range_method(name: str) -> RangeMethod:
    """A method by name, the default for an empty one.

    Raises:
        ConfigError: naming the ones that exist.
    """
    known = [str(method) for method in RangeMethod]
    if name and name not in known:
        raise unknown_name("range method", name, known)
    return RangeMethod(name) if name else DEFAULT_METHOD


def calibrate(request: CalibrationRequest, *, progress: ProgressFn = no_progress) -> CalibrationReport:
    """Choose images, measure, write. An interrupted run resumes from a hidden file beside the output.

    Raises:
        CalibrationError: images or statistics that cannot be used.
        ConfigError: an unknown method or engine, or an output that cannot be written.
    """
    method = range_method(request.method)
    contract = read_contract(request.model)
    sample = SampleOptions(count=request.count, seed=request.seed, minimum=request.minimum)
    images = collect_images(request.images, annotations=request.annotations, options=sample)
    report = examine_set(images, contract, evaluation_images=request.evaluation_images)
    recorder = ConvergenceRecorder(len(images.images), method=method) if request.convergence else None
    calibration: Calibration = collect_ranges(
        request.model,
        images,
        options=StatisticsOptions(method=method, engine=request.engine, threads=request.threads),
        state=request.output.with_name(f".{request.output.stem}.state.npz"),
        progress=progress,
        observer=recorder,
    )
    save_calibration(calibration, request.output)
    if request.tensorrt_version:
        cache = request.output.with_suffix(".cache")
        write_trt_cache(calibration, request.model, cache, version=request.tensorrt_version)
    return CalibrationReport(
        output=str(request.output),
        method=method,
        tensors=len(calibration.tensors),
        images=report,
        convergence=recorder.curve() if recorder else (),
    )
