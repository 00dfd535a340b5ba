"""Calibration: one pass over images, the activation ranges that follow from it, and the files that keep them."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.dataset import (
    CalibrationImage,
    CalibrationSet,
    SampleOptions,
    SetReport,
    collect_images,
    examine_set,
    inspect_images,
    open_images,
)
from calibration.execution import ENGINES, Feeder, default_engine
from calibration.measuring import SAMPLES, measure, open_measuring, read_sample
from calibration.placement import ConvGraph, open_graph
from calibration.ranges import DEFAULT_METHOD, Histogram, Range, RangeMethod, find_range
from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.files import MAX_TEXT_BYTES, atomic_file, read_file, write_text
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.core.progress import ProgressFn, map_ahead, no_progress
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from runtimes._tensorrt_library import calibration_cache_number

__all__ = [
    "Calibration",
    "CalibrationReport",
    "CalibrationRequest",
    "ConvergencePoint",
    "ImageRecord",
    "StatisticsOptions",
    "TensorRanges",
    "calibrate",
    "collect_ranges",
    "load_calibration",
    "save_calibration",
    "write_trt_cache",
]

_LOG = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image that was used: its path below the folder, and the hashes of its file and of its decoded pixels."""

    name: str
    sha256: str
    pixels_sha256: str = ""


@dataclass(frozen=True, slots=True)
class TensorRanges:
    """What was seen of a tensor, and the range that each method finds.

    ``ranges`` is empty for a tensor that is zero for every image: nothing tells a range, so that it stays float.
    ``channel_means``: numbers in one text, so that the file stays readable; empty where they are not known.
    """

    minimum: float
    maximum: float
    zero_share: float
    ranges: dict[str, Range]
    channel_means: str = ""

    def means(self) -> NDArray[np.float32]:
        """(channels,), or (0,) when they are not known.

        Raises:
            CalibrationError: the text is not one of finite numbers.
        """
        try:
            means = np.array(self.channel_means.split(), np.float32)
        except ValueError as error:
            raise CalibrationError("The calibration's channel means are damaged.", hint="calibrate again") from error
        if not np.isfinite(means).all():
            raise CalibrationError("The calibration's channel means are not finite.", hint="calibrate again")
        return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Ranges of the activations of the graph with this hash; ``method`` is the one that a quantizer uses."""

    graph_sha256: str
    method: RangeMethod
    preprocess: PreprocessSpec
    seed: int
    engine: str
    images: tuple[ImageRecord, ...]
    tensors: dict[str, TensorRanges]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            ends = [end for limits in tensor.ranges.values() for end in (limits.low, limits.high, limits.amax)]
            if not np.isfinite([tensor.minimum, tensor.maximum, tensor.zero_share, *ends]).all():
                raise CalibrationError(f"The ranges of tensor '{name}' are not finite.", hint="calibrate again")

    @property
    def zero_tensors(self) -> tuple[str, ...]:
        """Those that are zero for every image."""
        return tuple(name for name, tensor in self.tensors.items() if not tensor.ranges)

    def range_of(self, tensor: str) -> Range:
        """The range to quantize a tensor with.

        Raises:
            CalibrationError: the tensor was not observed.
        """
        ranges = self.tensors[tensor].ranges if tensor in self.tensors else {}
        if self.method not in ranges:
            raise CalibrationError(f"The calibration has no range for tensor '{tensor}'.", hint="calibrate again")
        return ranges[self.method]

    def with_method(self, method: RangeMethod) -> Calibration:
        """The same statistics under another method."""
        return replace(self, method=method)

    def check_graph(self, graph: OnnxGraph) -> None:
        """Refuse a graph that this calibration was not made on.

        Raises:
            CalibrationError: naming both hashes.
        """
        if graph.sha256 != self.graph_sha256:
            raise CalibrationError(
                f"The calibration belongs to the graph {self.graph_sha256[:12]}, '{graph.path}' is "
                f"{graph.sha256[:12]}.",
                hint=f"fcos-deploy calibrate {graph.path} --images DIR -o calibration.json",
            )


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it, atomically."""
    write_text(path, json.dumps(to_json(calibration), indent=1, sort_keys=True) + "\n")


def load_calibration(path: Path) -> Calibration:
    """Read a calibration; whether it belongs to a graph is checked where both are used.

    Raises:
        CalibrationError: not a calibration file, or of another schema version.
    """
    try:
        content = parse_json(read_file(path, limit=MAX_TEXT_BYTES))
    except OSError as error:
        raise CalibrationError(
            f"Cannot read the calibration '{path}': {error.strerror or error}.",
            hint="'fcos-deploy calibrate' writes one",
        ) from error
    except ValueError as error:
        raise CalibrationError(f"'{path}' is not a calibration file: {error}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CalibrationError(
            f"'{path}' has calibration schema version {version!r}, this fcos-deploy reads {SCHEMA_VERSION}.",
            hint="calibrate again",
        )
    try:
        return from_json(Calibration, content, where="calibration")
    except ConfigError as error:
        raise CalibrationError(f"'{path}' is damaged: {error.message}", hint="calibrate again") from error


_ALGORITHM = "EntropyCalibration2"  # The only one that DLAs take; with a complete cache it computes nothing.


def write_trt_cache(calibration: Calibration, graph: ConvGraph, output: Path, *, version: str) -> None:
    """Write the cache for the float graph that the calibration belongs to and one TensorRT version, such as "10.3.0".

    A header, then one line a tensor in graph order, named as in the ONNX graph, with the scale as the eight hexadecimal
    digits of a big-endian float32. TensorRT refuses a cache of another version than its own.

    Raises:
        ConfigError: a version that has no calibration cache, or is none.
        CalibrationError: the calibration is of another graph.
    """
    header = f"TRT-{calibration_cache_number(version)}-{_ALGORITHM}"
    calibration.check_graph(graph.source)
    zero = set(calibration.zero_tensors)  # TensorRT computes in float what has no scale.
    amax = {name: calibration.range_of(name).amax for name in graph.activations if name not in zero}
    # TensorRT fuses a ReLU, but asks for the scale of what stands before it as well.
    behind = {conv.output: conv.result for conv in graph.convs} | {add.output: add.result for add in graph.adds}
    amax |= {name: amax[result] for name, result in behind.items() if name not in amax and result in amax}
    # Symmetric int8: the largest magnitude becomes 127.
    scales = [f"{name}: {struct.pack('!f', value / 127.0).hex()}" for name, value in amax.items()]
    write_text(output, "\n".join([header, *scales]) + "\n")


_SAVE_INTERVAL = 15.0  # seconds between two saved states
_STEPS = 6  # points of a convergence curve

Histograms = dict[str, Histogram]
Observer = Callable[[int, Histograms], None]  # called with the number of images done


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsOptions:
    """How the pass runs. ``engine``: a name in ``ENGINES``, or ``auto`` for the first of them that is installed.

    Raises:
        ConfigError: there is no such engine.
    """

    method: RangeMethod = DEFAULT_METHOD
    engine: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ("auto", *ENGINES):
            raise unknown_name("calibration engine", self.engine, ("auto", *ENGINES))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """One calibration.

    ``images``, ``evaluation_images``: a folder, list file or COCO json; images that are in both sets are refused, or
    with ``allow_overlap`` reported.
    ``tensorrt_version``: also write a calibration cache for this version of TensorRT.

    Raises:
        ConfigError: that version takes no calibration cache.
    """

    model: Path
    images: Path
    output: Path
    annotations: Path | None = None
    sample: SampleOptions = field(default_factory=SampleOptions)
    evaluation_images: Path | None = None
    allow_overlap: bool = False
    statistics: StatisticsOptions = field(default_factory=StatisticsOptions)
    convergence: bool = False
    tensorrt_version: str = ""

    def __post_init__(self) -> None:
        if self.tensorrt_version:
            calibration_cache_number(self.tensorrt_version)


@dataclass(frozen=True, slots=True)
class ConvergencePoint:
    """After ``images`` images, how far the symmetric ranges are from the final ones, as shares of those."""

    images: int
    median_change: float
    largest_change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What was written, and what is to be said of the images."""

    output: str
    method: RangeMethod
    tensors: int
    images: SetReport
    zero_tensors: tuple[str, ...] = ()
    convergence: tuple[ConvergencePoint, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        return [
            *self.images.lines(),
            *(f"zero for every image, so that its layers stay in float: {name}" for name in self.zero_tensors),
            f"{self.tensors} tensors, method {self.method}: {self.output}",
            *(
                f"{p.images:5d} images: ranges differ from the final ones by {p.median_change:.2%} in the median, "
                f"{p.largest_change:.1%} at most"
                for p in self.convergence
            ),
        ]


def calibrate(request: CalibrationRequest, *, progress: ProgressFn = no_progress) -> CalibrationReport:
    """Choose images, measure, write. An interrupted run resumes from a hidden file beside the output.

    Raises:
        BackendLoadError: the graph cannot be read.
        CalibrationError: images or statistics that cannot be used.
        ConfigError: an output that cannot be written.
    """
    graph, method = open_graph(request.model), request.statistics.method
    orientation = graph.source.contract.preprocess.orientation
    images = collect_images(
        request.images, annotations=request.annotations, options=request.sample, orientation=orientation
    )
    others = open_images(request.evaluation_images).paths if request.evaluation_images else {}
    evaluation = inspect_images(others, orientation=orientation)
    report = examine_set(images, graph.source.contract, evaluation=evaluation, allow_overlap=request.allow_overlap)
    report.require_usable()
    recorder = _ConvergenceRecorder(len(images.images), method=method) if request.convergence else None
    calibration = collect_ranges(
        graph,
        images,
        options=request.statistics,
        state=request.output.with_name(f".{request.output.stem}.state.npz"),
        progress=progress,
        observer=recorder,
    )
    save_calibration(calibration, request.output)
    if request.tensorrt_version:
        cache = request.output.with_suffix(".cache")
        write_trt_cache(calibration, graph, cache, version=request.tensorrt_version)
    return CalibrationReport(
        output=str(request.output),
        method=method,
        tensors=len(calibration.tensors),
        images=report,
        zero_tensors=calibration.zero_tensors,
        convergence=recorder.curve() if recorder else (),
    )


class _ConvergenceRecorder:
    """Notes every tensor's range after 1, 2, 4, ... images of a pass: whether there were enough."""

    def __init__(self, total: int, *, method: RangeMethod) -> None:
        self._method = method
        self._stops = {total >> halvings for halvings in range(_STEPS)} - {0}
        self._amax: dict[int, dict[str, float]] = {}

    def __call__(self, done: int, histograms: Histograms) -> None:
        if done in self._stops:
            self._amax[done] = {n: find_range(h, self._method).amax for n, h in histograms.items() if h.amax > 0}

    def curve(self) -> tuple[ConvergencePoint, ...]:
        """One point a stop, compared with the last, which is the final state."""
        points = []
        for images, ranges in sorted(self._amax.items()):
            final = self._amax[max(self._amax)]
            changes = [abs(ranges[name] / value - 1.0) for name, value in final.items() if name in ranges]
            points.append(
                ConvergencePoint(images, round(float(np.median(changes)), 5), round(float(np.max(changes)), 5))
            )
        return tuple(points)


def collect_ranges(
    graph: ConvGraph,
    images: CalibrationSet,
    *,
    options: StatisticsOptions | None = None,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
    observer: Observer | None = None,
) -> Calibration:
    """Measure the ranges of a float graph's activations on calibration images.

    ``state`` is a file in which an interrupted pass keeps what it has; it goes when the pass is complete. ``observer``
    sees the histograms after every image.

    Raises:
        CalibrationError: an unreadable image, NaN or infinity, nothing but zeros in every tensor.
    """
    options = options or StatisticsOptions()
    key = _key(graph, images)
    statistics = _load_state(state, key, graph.activations)
    if statistics is None or options.engine not in {"auto", statistics.engine}:
        statistics = _Statistics(options.engine, 0, {name: Histogram() for name in graph.activations})
    histograms, saved = statistics.histograms, time.monotonic()
    with (
        _Pass(graph, engine=statistics.engine, options=options) as calibration_pass,
        ThreadPoolExecutor(1, "images") as reader,
    ):
        remaining = images.images[statistics.done :]
        prepared = zip(remaining, map_ahead(reader, calibration_pass.feeds, remaining), strict=True)
        for index, (image, feeds) in enumerate(prepared, statistics.done):
            progress("calibrating", index, len(images.images))
            calibration_pass.add(feeds, image, histograms)
            if observer is not None:
                observer(index + 1, histograms)
            if state is not None and time.monotonic() - saved >= _SAVE_INTERVAL:
                _save_state(state, key, _Statistics(calibration_pass.engine, index + 1, histograms))
                saved = time.monotonic()
    progress("calibrating", len(images.images), len(images.images))
    calibration = Calibration(
        graph_sha256=graph.source.sha256,
        method=options.method,
        preprocess=graph.source.contract.preprocess,
        seed=images.seed,
        engine=calibration_pass.engine,
        images=tuple(ImageRecord(image.name, image.sha256, image.pixels_sha256) for image in images.images),
        tensors={name: _tensor_ranges(name, histogram) for name, histogram in histograms.items()},
    )
    if len(calibration.zero_tensors) == len(calibration.tensors):
        raise CalibrationError(
            f"Every tensor is zero for all {len(images.images)} images.",
            hint="is the checkpoint trained, and do the images fit it?",
        )
    if state is not None:
        state.unlink(missing_ok=True)
    return calibration


def _tensor_ranges(name: str, histogram: Histogram) -> TensorRanges:
    methods = RangeMethod if histogram.amax else ()
    try:
        ranges = {str(method): find_range(histogram, method) for method in methods}
    except CalibrationError as error:
        raise CalibrationError(f"Tensor '{name}': {error.message}", hint="does the float model work?") from error
    share = round(histogram.zeros / histogram.elements, 6)
    means = " ".join(f"{mean:.6g}" for mean in histogram.channel_means)
    return TensorRanges(histogram.minimum, histogram.maximum, share, ranges, means)


class _Pass(ExitStack):
    """The graph, opened so that it measures its own tensors: one inference an image, whatever the image's size."""

    def __init__(self, graph: ConvGraph, *, engine: str, options: StatisticsOptions) -> None:
        super().__init__()
        model, threads = graph.source.model, options.threads
        self._feeder = Feeder(graph.source)
        self._orientation = graph.source.contract.preprocess.orientation
        # The graph's inputs are known without an inference.
        inputs = {value.name for value in model.graph.input}
        self._inputs = [name for name in graph.activations if name in inputs]
        self._inner = [name for name in graph.activations if name not in inputs]
        self.engine = default_engine() if engine == "auto" else engine
        self._session = self.enter_context(open_measuring(self.engine, model, tensors=self._inner, threads=threads))
        self._pool = self.enter_context(ThreadPoolExecutor(threads or usable_cpus(), "histograms"))
        _LOG.info("calibrating: %d tensors, 1 inference an image, on %s", len(graph.activations), self.engine)

    def feeds(self, image: CalibrationImage) -> Tensors:
        """The graph's inputs for an image."""
        return self._feeder(image.read(self._orientation))

    def add(self, feeds: Tensors, image: CalibrationImage, histograms: Histograms) -> None:
        """Count every tensor's values for one image."""
        outputs = self._session.borrow(feeds)

        def count(name: str) -> None:
            try:
                histograms[name].add(measure(feeds[name]) if name in feeds else read_sample(outputs, name))
            except CalibrationError as error:
                raise CalibrationError(
                    f"Tensor '{name}' for the image '{image.path}': {error.message}.",
                    hint="does the float model work on this image?",
                ) from error

        # Counting releases the interpreter's lock; every tensor has a histogram of its own.
        list(self._pool.map(count, (*self._inputs, *self._inner)))


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What a pass has after ``done`` images."""

    engine: str
    done: int
    histograms: Histograms


def _key(graph: ConvGraph, images: CalibrationSet) -> str:
    """Hash of everything that the histograms depend on, but for the engine; the graph holds its preprocessing."""
    parts = {
        "graph": graph.source.sha256,
        "images": [image.sha256 for image in images.images],
        "samples": SAMPLES,
        "version": 4,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _save_state(state: Path, key: str, statistics: _Statistics) -> None:
    arrays: dict[str, Any] = {
        "key": np.array(key),
        "done": np.array(statistics.done),
        "engine": np.array(statistics.engine),
    }
    for name, histogram in statistics.histograms.items():
        arrays |= {f"{name}\n{part}": value for part, value in histogram.state().items()}
    with atomic_file(state) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def _load_state(state: Path | None, key: str, names: tuple[str, ...]) -> _Statistics | None:
    """None where there is none, or one of other inputs, or a damaged one: the pass then starts again."""
    if state is None or not state.is_file():
        return None
    try:
        with state.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            parts = ("positive", "negative", "channels", "numbers", "counts")
            histograms = {n: Histogram.from_state({p: arrays[f"{n}\n{p}"] for p in parts}) for n in names}
            return _Statistics(str(arrays["engine"]), int(arrays["done"]), histograms)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
