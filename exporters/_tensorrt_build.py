"""One builder for TensorRT and TensorRT-RTX: ONNX file to plain engine file, with its contract in a json beside it."""

from __future__ import annotations

import json
import logging
import platform
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters._tensorrt_dla import check_dla, place_on_dla
from exporters._tensorrt_errors import build_error
from exporters._tensorrt_generations import Generation, generation_of
from exporters._tensorrt_layers import parse_layer_list, precision_counts
from exporters._tensorrt_profiles import ProfileShapes, profile_shapes
from exporters._tensorrt_progress import BuildMonitor
from exporters._tensorrt_timing import read_timing_cache, save_timing_cache, timing_cache_file
from fcos_deploy.core.atomic import atomic_file, sha256_file
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import read_contract, write_sidecar
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult
from fcos_deploy.core.onnx_interface import EFFICIENT_NMS, onnx_interface
from fcos_deploy.core.registry import backends_for
from fcos_deploy.core.tensorrt_library import LibraryLog, TensorRT, library_log, load_tensorrt, shape_tuple

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["EngineBuild", "EngineTarget", "build_engine", "write_engine"]

_LOGGER = logging.getLogger(__name__)
_MIB = 1 << 20
_OPTIMIZATION_LEVELS = range(6)
_SIGNAL_SECONDS = 0.1  # how long a Ctrl-C may go unnoticed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTarget:
    """Which library builds, and what it makes."""

    import_name: str
    extra: str
    kind: ArtifactKind


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """An engine in memory, and how it was made."""

    plan: bytes
    record: dict[str, str]


def build_engine(request: BuildRequest, *, target: EngineTarget) -> BuildResult:
    """Build one engine and write it.

    Raises:
        MissingDependencyError: the library is not installed.
        BackendLoadError: the ONNX file is damaged, carries no contract, or was quantized for another runtime.
        ConfigError: an option that this library or graph does not allow.
        BuildError: with the builder's last lines.
        KeyboardInterrupt: after the builder has stopped.
    """
    contract = checked_contract(request.source, target=target, options=request.options)
    library = load_tensorrt(target.import_name, extra=target.extra)
    generation = generation_of(library, import_name=target.import_name)
    check_options(request.options, generation=generation)
    require_writable(request.output)
    build = _Build(request, contract=contract, generation=generation, library=library, target=target)
    return write_engine(build.run(), request=request, contract=contract)


def write_engine(build: EngineBuild, *, request: BuildRequest, contract: ModelContract) -> BuildResult:
    """Write the plan as it is, without a header, and its sidecar."""
    with atomic_file(request.output) as temporary:
        temporary.write_bytes(build.plan)
    record = {**build.record, "engine_sha256": sha256_file(request.output), "engine_bytes": str(len(build.plan))}
    sidecar = write_sidecar(request.output, contract, record)
    return BuildResult(files=(request.output, sidecar), record=record)


def checked_contract(source: Path, *, target: EngineTarget, options: BuildOptions) -> ModelContract:
    """The ONNX file's contract.

    Raises:
        BackendLoadError: the file is damaged, carries no contract, or was quantized for another runtime.
        ConfigError: another precision was asked for than the file's.
    """
    if source.suffix != ".onnx":
        raise ConfigError(f"An engine is built from an .onnx file, got '{source.name}'.")
    contract = read_contract(source)
    for backend in backends_for(target.kind):
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
        target: EngineTarget,
    ) -> None:
        self._request = request
        self._options = request.options
        self._contract = contract
        self._generation = generation
        self._trt = library
        self._target = target
        self._record: dict[str, str] = {}
        self._timing_file: Path | None = None
        self._devices = [device for backend in backends_for(target.kind) for device in backend.probe().devices]

    def run(self) -> EngineBuild:
        """Parse, configure, build, describe."""
        started = time.perf_counter()
        with library_log(self._trt) as (logger, log):
            builder = self._trt.Builder(logger)
            if EFFICIENT_NMS in onnx_interface(self._request.source).operators:
                self._generation.require_plugin(builder, logger, name=EFFICIENT_NMS)
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
            "builder": self._target.import_name,
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
