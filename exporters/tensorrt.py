"""TensorRT engines, built on the device that runs them, and TensorRT-RTX engines, built on a machine without a GPU.

What differs between the generations of the library is in ``_tensorrt_options``.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters._tensorrt_options import Generation, generation_of, profile_shapes
from fcos_deploy.core.artifact import OnnxGraph, write_sidecar
from fcos_deploy.core.backend import backends_for
from fcos_deploy.core.decode import MAX_TOP_K
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BuildError, ConfigError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult, Exporter
from fcos_deploy.core.files import atomic_file, require_writable, sha256_file
from fcos_deploy.core.progress import ProgressFn
from runtimes._tensorrt_library import LibraryLog, TensorRT, library_log, load_tensorrt, shape_tuple

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["EXPORTER", "EngineExporter", "TensorrtExporter", "TensorrtRtxExporter"]

_LOGGER = logging.getLogger(__name__)
_MIB = 1 << 20
_SIGNAL_SECONDS = 0.1  # how long a Ctrl-C may go unnoticed


class EngineExporter(Exporter):
    """ONNX to an engine, with the library that is imported as ``library``."""

    source = ArtifactKind.ONNX
    library: str

    def build(self, request: BuildRequest) -> BuildResult:
        """Build one engine; write it as the library made it, without a header, and its sidecar.

        Raises:
            MissingDependencyError: the library is not installed.
            BackendLoadError: the ONNX file is damaged, carries no contract, or was quantized for another runtime.
            ConfigError: an option that this library or graph does not allow.
            BuildError: with the builder's last lines.
            KeyboardInterrupt: after the builder has stopped.
        """
        source, options = request.source, request.options
        if source.suffix != ".onnx":
            raise ConfigError(f"An engine is built from an .onnx file, got '{source.name}'.")
        graph = OnnxGraph(source)
        contract = graph.contract
        for backend in backends_for(self.produces):
            backend.check_placement(contract)
            backend.check_operators(source)
        if options.precision not in (None, contract.precision):
            raise ConfigError(
                f"An engine has the precision of its ONNX file: '{source.name}' is {contract.precision}, "
                f"{options.precision} was asked for.",
                hint="fp16: export with '--precision fp16'; int8: 'fcos-deploy quantize'",
            )
        library = load_tensorrt(self.library, extra=self.extra)
        generation = generation_of(library, import_name=self.library)
        generation.check(options)
        require_writable(request.output)
        build = _Build(request, graph, generation=generation, library=library, exporter=self)
        plan = build.run()
        with atomic_file(request.output) as temporary:
            temporary.write_bytes(plan)
        record = {**build.record, "engine_sha256": sha256_file(request.output), "engine_bytes": str(len(plan))}
        return BuildResult(files=(request.output, write_sidecar(request.output, contract, record)), record=record)


class TensorrtExporter(EngineExporter):
    """Builds for the GPU of this machine."""

    name = extra = library = "tensorrt"
    produces = ArtifactKind.TENSORRT_ENGINE


class TensorrtRtxExporter(EngineExporter):
    """Builds for ``options.compute_capabilities``; none given: the library's portable set."""

    name = extra = "tensorrt-rtx"
    library = "tensorrt_rtx"
    produces = ArtifactKind.TENSORRT_RTX_ENGINE


EXPORTER = (TensorrtExporter(), TensorrtRtxExporter())


class _Build:
    """One build; ``record`` collects what it was made of."""

    def __init__(
        self,
        request: BuildRequest,
        graph: OnnxGraph,
        *,
        generation: Generation,
        library: TensorRT,
        exporter: EngineExporter,
    ) -> None:
        self._request = request
        self._options = request.options
        self._contract = graph.contract
        self._generation = generation
        self._trt = library
        self._devices = [device for backend in backends_for(exporter.produces) for device in backend.probe().devices]
        self.record = {
            "builder": exporter.library,
            "version": library.__version__,
            "built_on": self._devices[0] if self._devices else "no GPU",
            "platform": f"{platform.system()} {platform.machine()}",
            "onnx_sha256": graph.sha256,
            "options": json.dumps(request.options.changed, sort_keys=True),
        }

    def run(self) -> bytes:
        """Parse, configure, build; returns the engine as its bytes."""
        started = time.perf_counter()
        typed = self._generation.typed(self._options)
        self.record["typing"] = "strong" if typed else "weak"
        with library_log(self._trt) as (logger, log):
            builder = self._trt.Builder(logger)
            network = builder.create_network(self._generation.network_flags(typed=typed))
            parser = self._trt.OnnxParser(network, logger)  # owns the weights until the build has ended
            self._generation.prepare_parser(parser)
            if not parser.parse_from_file(str(self._request.source)):
                lines = tuple(parser.get_error(index).desc() for index in range(parser.num_errors))
                raise _build_error(f"{self._generation.label} cannot read '{self._request.source}'", log, *lines)
            config = builder.create_builder_config()
            self._configure(builder, config, network, log=log)
            timing_file = self._set_timing_cache(config)
            plan = self._serialize(builder, config, network, log=log)
            if timing_file is not None:
                save_timing_cache(timing_file, config=config)
        layers = parse_layer_list(log.layer_lists[-1]) if log.layer_lists else []
        seconds = time.perf_counter() - started
        self.record |= {
            "seconds": f"{seconds:.2f}",
            "layers": str(len(layers)),
            "convolution_inputs": json.dumps(convolution_inputs(layers)),
            "warnings": json.dumps(list(log.warnings)[:20]),
        }
        _LOGGER.info("built %s in %.1f s", self._request.output.name, seconds)
        return plan

    def _configure(
        self, builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, *, log: LibraryLog
    ) -> None:
        options, generation = self._options, self._generation
        tensors = (network.get_input(index) for index in range(network.num_inputs))
        sizes = {tensor.name: tuple(None if n < 0 else n for n in shape_tuple(tensor.shape)) for tensor in tensors}
        shapes = profile_shapes(sizes, options=options, size_divisor=self._contract.preprocess.size_divisor)
        self.record["shapes"] = json.dumps({name: str(shape) for name, shape in shapes.items()})
        if any(None in size for size in sizes.values()):
            profile = builder.create_optimization_profile()
            for name, shape in shapes.items():
                profile.set_shape(name, *(self._trt.Dims(list(limit)) for limit in shape))
            if config.add_optimization_profile(profile) < 0:
                raise _build_error(f"{generation.label} refused the optimization profile", log)
        generation.set_types(config, network, options)
        generation.set_compatibility(config, options)
        self.record["compute_capabilities"] = generation.set_compute_capabilities(config, options)
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if not options.tf32:  # TensorRT's default: it rounds the inputs of fp32 convolutions to 10 bits of mantissa
            config.clear_flag(self._trt.BuilderFlag.TF32)
        config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED  # types in the log's layer list
        if options.dla_core is not None:
            if any(shape.dynamic for shape in shapes.values()):
                raise ConfigError("A DLA takes fixed shapes only.", hint="give one batch size and one input size")
            precision = self._contract.precision
            fallback = place_on_dla(builder, config, network, library=self._trt, options=options, precision=precision)
            self.record["dla_fallback_layers"] = json.dumps(fallback)

    def _set_timing_cache(self, config: trt.IBuilderConfig) -> Path | None:
        """Start from the cache that the options name; returns its file, to be written when the build has ended."""
        if self._options.timing_cache is None:
            return None
        file = timing_cache_file(self._options.timing_cache, version=self._trt.__version__, devices=self._devices)
        content = file.read_bytes() if file.is_file() else b""
        self._generation.set_timing_cache(config, content)
        self.record["timing_cache"] = f"{file.name}, {len(content)} bytes at the start"
        return file

    def _serialize(
        self, builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, *, log: LibraryLog
    ) -> bytes:
        """Build in a thread of its own, so that Ctrl-C reaches this one while the builder works."""
        monitor = BuildMonitor(self._request.progress)
        monitor.attach(config, self._trt)
        watched = threading.Event()

        def serialize() -> trt.IHostMemory | None:
            watched.wait()  # Not before the other thread is where it hands an interrupt on to the monitor.
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
            raise _build_error(f"{self._generation.label} cannot build '{self._request.source.name}'", log)
        return bytes(plan)  # type: ignore[call-overload, no-any-return, unused-ignore]  # a buffer, which the stubs do not say


class BuildMonitor:
    """Turns the builder's nested phases into one bar, and a request to stop into the answer that stops it.

    The bar follows the outermost phase, the one without a parent.
    """

    def __init__(self, progress: ProgressFn) -> None:
        self._progress = progress
        self._phase = ""
        self._total = 0
        self._stop = threading.Event()
        self.failure: BaseException | None = None

    def stop(self) -> None:
        """Ask the builder to give up at its next step."""
        self._stop.set()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins."""
        if not parent_phase:
            self._phase, self._total = phase_name, num_steps
        self._report(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step is done; False stops the build."""
        self._report(phase_name, step + 1)
        return not self._stop.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """A phase ends, perhaps early."""
        self._report(phase_name, self._total)

    def _report(self, phase_name: str, done: int) -> None:
        if phase_name != self._phase:
            return
        try:
            self._progress(phase_name, done, self._total)
        except BaseException as error:  # noqa: BLE001  (an exception must not travel through the builder's C++ frames)
            self.failure = error
            self.stop()

    def attach(self, config: trt.IBuilderConfig, library: Any) -> None:  # Any: 8.6 does not have the class
        """Follow a build, where the version reports progress."""
        if not hasattr(library, "IProgressMonitor"):
            return
        monitor = self

        class Monitor(library.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
            def __init__(self) -> None:
                library.IProgressMonitor.__init__(self)

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                monitor.phase_start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return monitor.step_complete(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                monitor.phase_finish(phase_name)

        config.progress_monitor = Monitor()


def place_on_dla(
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    network: trt.INetworkDefinition,
    *,
    library: TensorRT,
    options: BuildOptions,
    precision: Precision,
) -> list[str]:
    """Put what fits on the DLA; returns the names of the layers that fall back to the GPU.

    Raises:
        ConfigError: a core that is not there, or an fp32 graph without a calibration cache.
        BuildError: strict mode, and a layer does not fit.
    """
    core, cores = options.dla_core or 0, builder.num_DLA_cores
    if not 0 <= core < cores:
        raise ConfigError(
            f"DLA core {core} was asked for, this TensorRT reports {cores} cores.",
            hint="build for the GPU; DLA is left out of TensorRT 10.8 to 11.3 and of every Orin Nano",
        )
    if precision is Precision.FP32 and options.calibration_cache is None:
        raise ConfigError(
            "A DLA computes in fp16 or int8 only, this ONNX file is fp32.",
            hint="build the fp16 file, or give a calibration cache",
        )
    # Everything is meant for the DLA, and what it cannot run goes back to the GPU.
    config.default_device_type = library.DeviceType.DLA
    config.DLA_core = core
    if not options.dla_strict:
        config.set_flag(library.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    fallback = [layer.name for layer in layers if not config.can_run_on_DLA(layer)]
    if fallback and options.dla_strict:
        raise BuildError(
            f"{len(fallback)} of {len(layers)} layers do not fit the DLA, the first: {', '.join(fallback[:5])}.",
            hint="leave strict mode out to run them on the GPU",
        )
    return fallback


def timing_cache_file(place: Path, *, version: str, devices: Sequence[str]) -> Path:
    """``place`` if it names a file; in a folder the file of this device and TensorRT, to whom timings belong."""
    if place.suffix or place.is_file():
        return place
    device = re.sub(r"[^A-Za-z0-9.]+", "-", devices[0] if devices else "unknown-gpu").strip("-")
    return place / f"{device}.tensorrt-{version}.timing"


def save_timing_cache(path: Path, *, config: trt.IBuilderConfig) -> None:
    """Write what the build measured, together with what another build wrote in the meantime."""
    measured = config.get_timing_cache()
    if path.is_file():
        # False: another device's timings are refused, which leaves ours as they are.
        measured.combine(config.create_timing_cache(path.read_bytes()), False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(bytes(memoryview(measured.serialize())))


# The builder's list of an engine's layers, as it logs it with detailed profiling verbosity.
_LAYER = re.compile(r"^Name: .*?, LayerType: (?P<kind>[^,]+), Inputs: \[(?P<inputs>.*?)\](?=, (?:Constants|Outputs)|$)")
_DATATYPE = re.compile(r"Datatype: (\w+)")
# What TensorRT calls a convolution: its own layers, and those of Myelin, its compiler of fused kernels.
_CONVOLUTION_KINDS = frozenset({"correlation", "CaskConvolution", "convolution", "CaskGemmConvolution"})


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer; types of its inputs in TensorRT's words (Float, Half, Int8, UInt8, ...)."""

    kind: str
    inputs: tuple[str, ...]


def parse_layer_list(text: str) -> list[EngineLayer]:
    """The layers of a ``Layers:`` message, in execution order; lines of another form are not layers."""
    matches = filter(None, (_LAYER.match(line.strip()) for line in text.splitlines()))
    return [EngineLayer(match["kind"], tuple(_DATATYPE.findall(match["inputs"]))) for match in matches]


def convolution_inputs(layers: Sequence[EngineLayer]) -> dict[str, int]:
    """How many convolutions take which type as their input."""
    kinds = (layer.inputs[0] if layer.inputs else "unknown" for layer in layers if layer.kind in _CONVOLUTION_KINDS)
    return dict(sorted(Counter(kinds).items()))


# What the log says, and what to do about it. The first that fits is shown.
_HINTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"(?i)nms\S* has no runners|NonMaxSuppression"),
        "this library has no NMS operator: export with '--tail candidates', or with '--tail nms --nms-form static'",
    ),
    (re.compile(r"Plugin not found|NonZero plugin"), "the graph has an operator that this library does not know"),
    (re.compile(r"K exceeds the maximum"), f"lower pre_nms_top_k to {MAX_TOP_K} or less per level"),
    (
        re.compile(r"(?i)out of memory|OutOfMemory"),
        "lower the workspace and the optimization level, close other programs",
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
# Lines without a cause, and the places in the library's sources behind those that have one.
_NOISE = re.compile(r"^\[?(?:checkMacros\.cpp|.*catchCudaError)")
_SOURCE = re.compile(r"\s*\(?In [\w:~<>]+ at /_src/[^)]*\)?$")


def _build_error(what: str, log: LibraryLog, *parser_lines: str) -> BuildError:
    """An error that ends with the builder's last lines, the cause first."""
    lines = [_SOURCE.sub("", line) for line in (*parser_lines, *log.last_lines()) if not _NOISE.match(line)]
    text = "\n  ".join(dict.fromkeys(lines)) or "it gave no reason"
    hint = next((hint for pattern, hint in _HINTS if pattern.search(text)), "")
    return BuildError(f"{what}:\n  {text}", hint=hint)
