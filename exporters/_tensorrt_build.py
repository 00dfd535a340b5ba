"""The builder's own words, and what to do about the ones that are known."""

from __future__ import annotations

import json
import logging
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporters._tensorrt_options import (
    BuildMonitor,
    Generation,
    ProfileShapes,
    check_dla,
    generation_of,
    place_on_dla,
    profile_shapes,
)
from fcos_deploy.core.backend import Backend, Session, SessionOptions
from fcos_deploy.core.contract import ModelContract, read_contract, write_sidecar
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import BuildError, ConfigError, DeviceError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult
from fcos_deploy.core.files import atomic_file, sha256_file
from fcos_deploy.core.registry import backends_for
from runtimes._tensorrt_library import LibraryLog, TensorRT, library_log, load_tensorrt, shape_tuple

if TYPE_CHECKING:
    import tensorrt as trt

_NOISE = re.compile(r"^\[?(?:checkMacros\.cpp|.*catchCudaError)")
_SOURCE = re.compile(r"\s*\(?In [\w:~<>]+ at /_src/[^)]*\)?$")

# What the log says, and what mends it. The first that fits is shown.
_HINTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(?i)nms\S* has no runners|NonMaxSuppression"),
        "this library has no NMS operator: export with '--tail candidates', or with the nms tail in its static form",
    ),
    (re.compile(r"Plugin not found|NonZero plugin"), "the graph has an operator that this library does not know"),
    (re.compile(r"K exceeds the maximum"), "lower pre_nms_top_k to 3840 or less per level"),
    (
        re.compile(r"(?i)out of memory|OutOfMemory"),
        "lower the workspace and the optimisation level, close other programs",
    ),
    (re.compile(r"Failed to parse the ONNX model|ParseFromCodedStream"), "the ONNX file is damaged: export it again"),
    (re.compile(r"Non-zero zero point"), "TensorRT takes symmetric int8 only: quantize with the 'portable' placement"),
    (re.compile(r"has type Int32 but must have type"), "biases must not be quantized: use the 'portable' placement"),
    (re.compile(r"HW-specific datatypes"), "the graph has a type that this GPU does not compute in"),
    (re.compile(r"libnvinfer_lean"), "a version-compatible engine needs the lean runtime library beside TensorRT"),
    (
        re.compile(r"driver version is insufficient|no CUDA-capable device"),
        "building needs a GPU here: 'fcos-deploy doctor'",
    ),
)


def build_error(what: str, *, log: LibraryLog, extra_lines: tuple[str, ...] = ()) -> BuildError:
    """An error that ends with the builder's last lines, the cause first."""
    lines = [_SOURCE.sub("", line) for line in (*extra_lines, *log.last_lines()) if not _NOISE.match(line)]
    text = "\n  ".join(dict.fromkeys(lines)) or "it gave no reason"
    hint = next((hint for pattern, hint in _HINTS if pattern.search(text)), "")
    return BuildError(f"{what}:\n  {text}", hint=hint)


_NAME = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: ")
_SECTION = re.compile(
    r"\b(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName|StreamId|Metadata)|$)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# What TensorRT calls a convolution: its own layers, and Myelin's.
_CONVOLUTION_KINDS = frozenset({"correlation", "CaskConvolution", "convolution", "CaskGemmConvolution"})


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer; types in TensorRT's words (Float, Half, Int8, UInt8, ...), ONNX nodes by their names."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]


def parse_layer_list(text: str) -> list[EngineLayer]:
    """The layers of a ``Layers:`` message, in execution order; lines of another form are not layers."""
    return [layer for line in text.splitlines() if (layer := _layer(line.strip())) is not None]


def _layer(line: str) -> EngineLayer | None:
    head = _NAME.match(line)
    if head is None:
        return None
    types = {key: tuple(_DATATYPE.findall(body)) for key, body in _SECTION.findall(line)}
    return EngineLayer(
        name=head["name"],
        kind=head["kind"],
        inputs=types.get("Inputs", ()),
        constants=types.get("Constants", ()),
        outputs=types.get("Outputs", ()),
        onnx_nodes=tuple(_ONNX_LAYER.findall(line)),
    )


def convolutions(layers: Iterable[EngineLayer]) -> list[EngineLayer]:
    """The layers that compute a convolution."""
    return [layer for layer in layers if layer.kind in _CONVOLUTION_KINDS]


def precision_counts(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many convolutions take which type as their input."""
    counts: dict[str, int] = {}
    for layer in convolutions(layers):
        key = layer.inputs[0] if layer.inputs else "unknown"
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))


def timing_cache_file(place: Path, *, version: str, devices: Sequence[str]) -> Path:
    """``place`` if it names a file; in a folder the file of this device and TensorRT, to whom timings belong."""
    if place.suffix or place.is_file():
        return place
    device = re.sub(r"[^A-Za-z0-9.]+", "-", devices[0] if devices else "unknown-gpu").strip("-")
    return place / f"{device}.tensorrt-{version}.timing"


def read_timing_cache(path: Path) -> bytes:
    """The file's contents; empty, which starts a new cache, where there is none yet."""
    return path.read_bytes() if path.is_file() else b""


def save_timing_cache(path: Path, *, config: trt.IBuilderConfig) -> None:
    """Write what the build measured, together with what another build wrote in the meantime."""
    measured = config.get_timing_cache()
    others = read_timing_cache(path)
    if others:
        # False: another device's timings are refused, which leaves ours as they are.
        measured.combine(config.create_timing_cache(others), False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(bytes(memoryview(measured.serialize())))


_LOGGER = logging.getLogger(__name__)
_MIB = 1 << 20
_OPTIMIZATION_LEVELS = range(6)
_SIGNAL_SECONDS = 0.1  # how long a Ctrl-C may go unnoticed


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderLibrary:
    """Which library builds, and what it makes."""

    import_name: str
    extra: str
    kind: ArtifactKind


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """An engine in memory, and how it was made."""

    plan: bytes
    record: dict[str, str]


def build_engine(request: BuildRequest, *, builder: BuilderLibrary) -> BuildResult:
    """Build one engine and write it.

    Raises:
        MissingDependencyError: the library is not installed.
        BackendLoadError: the ONNX file is damaged, carries no contract, or was quantized for another runtime.
        ConfigError: an option that this library or graph does not allow.
        BuildError: with the builder's last lines.
        KeyboardInterrupt: after the builder has stopped.
    """
    contract = checked_contract(request.source, builder=builder, options=request.options)
    library = load_tensorrt(builder.import_name, extra=builder.extra)
    generation = generation_of(library, import_name=builder.import_name)
    check_options(request.options, generation=generation)
    require_writable(request.output)
    build = _Build(request, contract=contract, generation=generation, library=library, builder=builder)
    return write_engine(build.run(), request=request, contract=contract)


def write_engine(build: EngineBuild, *, request: BuildRequest, contract: ModelContract) -> BuildResult:
    """Write the plan as it is, without a header, and its sidecar."""
    with atomic_file(request.output) as temporary:
        temporary.write_bytes(build.plan)
    record = {**build.record, "engine_sha256": sha256_file(request.output), "engine_bytes": str(len(build.plan))}
    sidecar = write_sidecar(request.output, contract, record)
    return BuildResult(files=(request.output, sidecar), record=record)


def checked_contract(source: Path, *, builder: BuilderLibrary, options: BuildOptions) -> ModelContract:
    """The ONNX file's contract.

    Raises:
        BackendLoadError: the file is damaged, carries no contract, or was quantized for another runtime.
        ConfigError: another precision was asked for than the file's.
    """
    if source.suffix != ".onnx":
        raise ConfigError(f"An engine is built from an .onnx file, got '{source.name}'.")
    contract = read_contract(source)
    for backend in backends_for(builder.kind):
        backend.check_placement(contract)
    if options.precision not in (None, contract.precision):
        raise ConfigError(
            f"An engine has the precision of its ONNX file: '{source.name}' is {contract.precision}, "
            f"{options.precision} was asked for.",
            hint="fp16: export with '--precision fp16'; int8: 'fcos-deploy quantize'",
        )
    return contract


def check_options(options: BuildOptions, *, generation: Generation) -> None:
    """Refuse values out of range, and what the generation cannot honour."""
    generation.check(options)
    if options.precision is not None:
        raise ConfigError("An engine has the types of its ONNX file.", hint="export the ONNX file in that precision")
    level = options.optimization_level
    if level is not None and level not in _OPTIMIZATION_LEVELS:
        raise ConfigError(f"The optimisation level must be 0 to 5, got {level}.")
    if options.workspace_mib is not None and options.workspace_mib < 1:
        raise ConfigError(f"The workspace must be at least 1 MiB, got {options.workspace_mib}.")
    if options.dla_strict and options.dla_core is None:
        raise ConfigError("DLA strict mode was asked for without a DLA core.", hint="give --dla-core 0")
    if options.calibration_cache is not None and not options.calibration_cache.is_file():
        raise ConfigError(f"The calibration cache '{options.calibration_cache}' is not there.")


def require_writable(output: Path) -> None:
    """Find out before a build of minutes, not after it, that the result cannot be written."""
    if output.is_dir():
        raise ConfigError(f"Cannot write '{output}': it is a folder.", hint="name a file")
    probe = output.with_name(f".{output.name}.probe")
    with atomic_file(probe) as temporary:
        temporary.write_bytes(b"")
    probe.unlink()


class _Build:
    """The steps of one build, with the library's objects that must live until it ends."""

    def __init__(
        self,
        request: BuildRequest,
        *,
        contract: ModelContract,
        generation: Generation,
        library: TensorRT,
        builder: BuilderLibrary,
    ) -> None:
        self._request = request
        self._options = request.options
        self._contract = contract
        self._generation = generation
        self._trt = library
        self._builder_library = builder
        self._record: dict[str, str] = {}
        self._timing_file: Path | None = None
        self._devices = [device for backend in backends_for(builder.kind) for device in backend.probe().devices]

    def run(self) -> EngineBuild:
        """Parse, configure, build, describe."""
        started = time.perf_counter()
        with library_log(self._trt) as (logger, log):
            builder = self._trt.Builder(logger)
            network = self._network(builder)
            parser = self._trt.OnnxParser(network, logger)  # owns the weights until the build has ended
            self._parse(parser, log=log)
            config = builder.create_builder_config()
            self._configure(builder, config, network, log=log)
            plan = self._serialize(builder, config, network, log=log)
            if self._timing_file is not None:
                save_timing_cache(self._timing_file, config=config)
        self._describe(log, seconds=time.perf_counter() - started)
        return EngineBuild(plan=plan, record=self._record)

    def _network(self, builder: trt.Builder) -> trt.INetworkDefinition:
        typed = self._generation.typed(self._options)
        self._record["typing"] = "strong" if typed else "weak"
        return builder.create_network(self._generation.network_flags(typed=typed))

    def _parse(self, parser: trt.OnnxParser, *, log: LibraryLog) -> None:
        self._generation.prepare_parser(parser)
        if not parser.parse_from_file(str(self._request.source)):
            lines = tuple(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise build_error(
                f"{self._generation.label} cannot read '{self._request.source}'", log=log, extra_lines=lines
            )

    def _configure(
        self, builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, *, log: LibraryLog
    ) -> None:
        options = self._options
        shapes = self._shapes(network)
        self._add_profile(builder, config, shapes=shapes, log=log)
        self._generation.set_types(config, network, options)
        self._generation.set_compatibility(config, options)
        self._record["compute_capabilities"] = self._generation.set_compute_capabilities(config, options)
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if not options.tf32:
            config.clear_flag(self._trt.BuilderFlag.TF32)
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        if options.dla_core is not None:
            check_dla(builder, options, shapes=shapes)
            fallback = place_on_dla(self._trt, config, network, options=options, precision=self._contract.precision)
            self._record["dla_fallback_layers"] = json.dumps(fallback)
        self._set_timing_cache(config)

    def _shapes(self, network: trt.INetworkDefinition) -> dict[str, ProfileShapes]:
        inputs = (network.get_input(index) for index in range(network.num_inputs))
        sizes = {tensor.name: tuple(None if n < 0 else n for n in shape_tuple(tensor.shape)) for tensor in inputs}
        shapes = profile_shapes(sizes, options=self._options, size_divisor=self._contract.preprocess.size_divisor)
        self._record["shapes"] = json.dumps({name: str(shape) for name, shape in shapes.items()})
        self._dynamic = any(None in size for size in sizes.values())
        return shapes

    def _add_profile(
        self, builder: trt.Builder, config: trt.IBuilderConfig, *, shapes: Mapping[str, ProfileShapes], log: LibraryLog
    ) -> None:
        if not self._dynamic:
            return
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            limits = (self._trt.Dims(list(sizes)) for sizes in (shape.minimum, shape.optimal, shape.maximum))
            profile.set_shape(name, *limits)
        if config.add_optimization_profile(profile) < 0:
            raise build_error(f"{self._generation.label} refused the optimisation profile", log=log)

    def _set_timing_cache(self, config: trt.IBuilderConfig) -> None:
        if self._options.timing_cache is None:
            return
        self._timing_file = timing_cache_file(
            self._options.timing_cache, version=self._trt.__version__, devices=self._devices
        )
        content = read_timing_cache(self._timing_file)
        self._generation.set_timing_cache(config, content)
        self._record["timing_cache"] = f"{self._timing_file.name}, {len(content)} bytes at the start"

    def _serialize(
        self, builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, *, log: LibraryLog
    ) -> bytes:
        """Build in a thread of its own, so that Ctrl-C reaches this one while the builder works."""
        monitor = BuildMonitor(self._request.progress)
        self._generation.set_monitor(config, monitor)
        watched = threading.Event()

        def serialize() -> trt.IHostMemory | None:
            watched.wait()  # An interrupt that comes while this thread starts must meet somebody who passes it on.
            return builder.build_serialized_network(network, config)

        with ThreadPoolExecutor(1, "tensorrt-build") as pool:
            try:
                building = pool.submit(serialize)
                watched.set()
                while not building.done():
                    wait([building], timeout=_SIGNAL_SECONDS)
            except KeyboardInterrupt:
                monitor.stop()  # Leaving the block waits for the builder, which gives up at its next step.
                watched.set()
                raise
        if monitor.failure is not None:
            raise monitor.failure
        plan = building.result()
        if plan is None:
            raise build_error(f"{self._generation.label} cannot build '{self._request.source.name}'", log=log)
        return bytes(plan)  # type: ignore[call-overload, no-any-return, unused-ignore]  # a buffer, which the stubs do not say

    def _describe(self, log: LibraryLog, *, seconds: float) -> None:
        layers = parse_layer_list(log.layer_lists[-1]) if log.layer_lists else []
        self._record |= {
            "builder": self._builder_library.import_name,
            "version": self._trt.__version__,
            "built_on": self._devices[0] if self._devices else "no GPU",
            "platform": f"{platform.system()} {platform.machine()}",
            "onnx_sha256": sha256_file(self._request.source),
            "options": json.dumps(_plain(self._options), sort_keys=True),
            "seconds": f"{seconds:.2f}",
            "layers": str(len(layers)),
            "convolution_inputs": json.dumps(precision_counts(layers)),
            "warnings": json.dumps(log.warnings()[:20]),
        }
        _LOGGER.info("built %s in %.1f s", self._request.output.name, seconds)


def _plain(options: BuildOptions) -> dict[str, str]:
    """Options that differ from their defaults, as text."""
    default = BuildOptions()
    names = BuildOptions.__dataclass_fields__
    return {name: str(getattr(options, name)) for name in names if getattr(options, name) != getattr(default, name)}


_WARM_UP, _REPEATS = 10, 50


def build_best(request: BuildRequest, *, builder: BuilderLibrary) -> BuildResult:
    """One build, or the fastest of ``options.builds``.

    Raises:
        ConfigError: fewer than one build, or several with a timing cache, which makes them all the same.
        DeviceError: several builds, and no GPU to measure them on.
    """
    count = request.options.builds
    if count == 1:
        return build_engine(request, builder=builder)
    if count < 1:
        raise ConfigError(f"The number of builds must be at least 1, got {count}.")
    if request.options.timing_cache is not None:
        raise ConfigError("Several builds from one timing cache are all the same.", hint="leave one of the two out")
    backend = _measuring_backend(builder)
    require_writable(request.output)
    with tempfile.TemporaryDirectory(prefix=".builds-", dir=request.output.parent) as folder:
        return _fastest(request, builder=builder, backend=backend, folder=Path(folder))


@dataclass(frozen=True, slots=True)
class _Candidate:
    result: BuildResult
    milliseconds: float


def _fastest(request: BuildRequest, *, builder: BuilderLibrary, backend: Backend, folder: Path) -> BuildResult:
    candidates = []
    for index in range(request.options.builds):
        output = folder / f"{index}{request.output.suffix}"
        single = replace(request, output=output, options=replace(request.options, builds=1))
        result = build_engine(single, builder=builder)
        with backend.open(output, SessionOptions()) as session:
            candidates.append(_Candidate(result, _median_milliseconds(session, usual=usual_shapes(result.record))))
    best = min(candidates, key=lambda candidate: candidate.milliseconds)
    times = [round(candidate.milliseconds, 4) for candidate in candidates]
    return _move(best.result, request=request, times=times)


def _move(result: BuildResult, *, request: BuildRequest, times: list[float]) -> BuildResult:
    engine, sidecar = result.files
    record = {**result.record, "build_milliseconds": json.dumps(times)}
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    content["record"] = record
    sidecar.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    target_sidecar = request.output.with_suffix(".json")
    engine.replace(request.output)
    sidecar.replace(target_sidecar)
    return BuildResult(files=(request.output, target_sidecar), record=record)


def _measuring_backend(builder: BuilderLibrary) -> Backend:
    for backend in backends_for(builder.kind):
        probe = backend.probe()
        if probe.available:
            return backend
        raise DeviceError(f"Several builds are compared by measuring them: {probe.problem}", hint="build once")
    raise DeviceError("No runtime is installed that could measure several builds.", hint="build once")


def usual_shapes(record: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The middle shape of each input's profile, from a build's record."""
    shapes: dict[str, str] = json.loads(record["shapes"])
    return {name: tuple(int(n) for n in text.split("/")[1].split("x")) for name, text in shapes.items()}


def _median_milliseconds(session: Session, *, usual: Mapping[str, tuple[int, ...]]) -> float:
    feeds = {spec.name: np.zeros(usual[spec.name], dtype=spec.dtype) for spec in session.inputs}
    for _ in range(_WARM_UP):
        session.run(feeds)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        session.run(feeds)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
