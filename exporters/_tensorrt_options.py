"""Optimisation profiles: the smallest, usual and largest shape of every dynamic input."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BuildError, ConfigError
from fcos_deploy.core.exporter import BatchRange, BuildOptions
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.core.progress import ProgressFn
from runtimes._tensorrt_library import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProfileShapes:
    """Shapes of one input; all equal where the input is static."""

    minimum: Shape
    optimal: Shape
    maximum: Shape

    @property
    def dynamic(self) -> bool:
        """Whether the input has an axis that may vary in the graph."""
        return self.minimum != self.maximum or self.minimum != self.optimal

    def __str__(self) -> str:
        return "/".join("x".join(map(str, shape)) for shape in (self.minimum, self.optimal, self.maximum))


def profile_shapes(
    inputs: Mapping[str, tuple[int | None, ...]], *, options: BuildOptions, size_divisor: int
) -> dict[str, ProfileShapes]:
    """Shapes of every input of the graph, ``None`` in ``inputs`` being a dynamic axis.

    Axis 0 is the batch; axes 2 and 3 of an image tensor are its height and width.

    Raises:
        ConfigError: a range is empty, missing, given for a fixed axis, or not a multiple of ``size_divisor``.
    """
    batch = _batch(options.batch)
    height = _size("height", options.height_range, size_divisor=size_divisor)
    width = _size("width", options.width_range, size_divisor=size_divisor)
    ranges = {0: ("batch", batch), 2: ("height", height), 3: ("width", width)}
    return {name: _input_shapes(name, shape, ranges=ranges) for name, shape in inputs.items()}


def _input_shapes(
    name: str, shape: tuple[int | None, ...], *, ranges: Mapping[int, tuple[str, Shape | None]]
) -> ProfileShapes:
    axes = [_axis(name, size, what=ranges.get(axis, (f"axis {axis}", None))) for axis, size in enumerate(shape)]
    minimum, optimal, maximum = zip(*axes, strict=True)
    return ProfileShapes(minimum, optimal, maximum)


def _axis(name: str, size: int | None, *, what: tuple[str, Shape | None]) -> Shape:
    label, wanted = what
    if size is None and wanted is None:
        raise ConfigError(
            f"The {label} of input '{name}' is dynamic in the ONNX file, and no range was given for it.",
            hint=f"give the smallest, usual and largest {label}, or export with a fixed input size",
        )
    if size is None:
        return wanted or ()
    if wanted is not None and set(wanted) != {size}:
        raise ConfigError(
            f"The {label} of input '{name}' is fixed to {size} in the ONNX file, the build asks for "
            f"{'/'.join(map(str, wanted))}.",
            hint=f"ask for {size}, or export with a dynamic {label}",
        )
    return size, size, size


def _batch(batch: BatchRange) -> Shape:
    return _ordered("batch", (batch.minimum, batch.optimal, batch.maximum))


def _size(label: str, wanted: Shape | None, *, size_divisor: int) -> Shape | None:
    if wanted is None:
        return None
    if any(size % size_divisor for size in wanted):
        raise ConfigError(f"The {label} range {wanted} must hold multiples of {size_divisor}.")
    return _ordered(label, wanted)


def _ordered(label: str, wanted: Shape) -> Shape:
    minimum, optimal, maximum = wanted
    if not 1 <= minimum <= optimal <= maximum:
        raise ConfigError(
            f"The {label} range must be 1 <= smallest <= usual <= largest, got {minimum}/{optimal}/{maximum}."
        )
    return wanted


class BuildMonitor:
    """Turns the builder's nested phases into one bar, and a request to stop into the answer that stops it.

    The bar follows the outermost phase; its label names the phase that is running.
    """

    def __init__(self, progress: ProgressFn) -> None:
        self._progress = progress
        self._steps: dict[str, int] = {}
        self._outermost = ""
        self._stop = threading.Event()
        self.failure: BaseException | None = None

    def stop(self) -> None:
        """Ask the builder to give up at its next step."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether ``stop`` was called, or the progress function raised."""
        return self._stop.is_set()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins; one without a parent is what the bar measures."""
        if not parent_phase:
            self._outermost = phase_name
        self._steps[phase_name] = num_steps
        self._report(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step is done; False stops the build."""
        self._report(phase_name, step + 1)
        return not self.stopped

    def phase_finish(self, phase_name: str) -> None:
        """A phase ends, perhaps early."""
        self._report(phase_name, self._steps.get(phase_name, 0))

    def _report(self, phase_name: str, done: int) -> None:
        if phase_name != self._outermost:
            return
        try:
            self._progress(phase_name, done, self._steps[phase_name])
        except BaseException as error:  # noqa: BLE001  (an exception must not travel through the builder's C++ frames)
            self.failure = error
            self.stop()

    def binding(self, library: Any) -> Any:  # Any: a subclass of a class that is known at run time only
        """The object to hand to ``IBuilderConfig.progress_monitor``."""
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

        return Monitor()


def keep_nms_float(library: TensorRT, config: trt.IBuilderConfig, network: trt.INetworkDefinition) -> None:
    """Coordinates in half precision are off by half a pixel: a weakly typed build must not choose it for NMS."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        if layer.type == library.LayerType.NMS:
            config.set_flag(library.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            layer.precision = library.DataType.FLOAT


def has_quantize_layers(library: TensorRT, network: trt.INetworkDefinition) -> bool:
    """Whether the parsed network has Q or DQ layers."""
    wanted = (library.LayerType.QUANTIZE, library.LayerType.DEQUANTIZE)
    return any(network.get_layer(index).type in wanted for index in range(network.num_layers))


def has_half_tensors(library: TensorRT, network: trt.INetworkDefinition) -> bool:
    """Whether any tensor of the parsed network is fp16."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return any(layer.get_output(i).dtype == library.DataType.HALF for layer in layers for i in range(layer.num_outputs))


_HEADER = re.compile(r"TRT-(\d+)-(EntropyCalibration2|MinMaxCalibration)\s*")
_ENTRY = re.compile(r".+: [0-9a-fA-F]{1,8}\s*")


def check_calibration_cache(path: Path, *, version: tuple[int, ...]) -> None:
    """Refuse a cache that TensorRT would silently ignore: another version's, or one that is not in its format.

    Line 1 is ``TRT-<number>-EntropyCalibration2``; the number is 1000 major + 100 minor + patch up to 8, and
    10000 major + 100 minor + patch from 10.

    Raises:
        ConfigError: naming the line.
    """
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise ConfigError(f"'{path}' is not a TensorRT calibration cache: its first line is not 'TRT-...'.")
    major, minor, patch = (*version, 0, 0)[:3]
    expected = (10000 if major >= 10 else 1000) * major + 100 * minor + patch
    if int(header.group(1)) != expected:
        raise ConfigError(
            f"'{path}' was written for version {header.group(1)}, this TensorRT is {expected} and would ignore it.",
            hint="write the cache again for this version with 'fcos-deploy calibrate'",
        )
    for number, line in enumerate(lines[1:], start=2):
        if line and not _ENTRY.fullmatch(line):
            raise ConfigError(f"Line {number} of '{path}' is not 'tensor: scale in hexadecimal': '{line[:60]}'.")


def cache_only_calibrator(library: Any, path: Path) -> trt.IInt8EntropyCalibrator2:  # Any: gone in the stubs of 11
    """A calibrator that has a cache and no data, so that ranges are ours or the build fails."""
    content = path.read_bytes()

    class CacheOnly(library.IInt8EntropyCalibrator2):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            library.IInt8EntropyCalibrator2.__init__(self)

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> None:
            del names

        def read_calibration_cache(self) -> bytes:
            return content

        def write_calibration_cache(self, cache: bytes) -> None:
            del cache

    return CacheOnly()


def check_dla(builder: trt.Builder, options: BuildOptions, *, shapes: Mapping[str, ProfileShapes]) -> None:
    """Refuse a core that is not there, and shapes that a DLA cannot have.

    Raises:
        ConfigError: naming the rule.
    """
    core, cores = options.dla_core, builder.num_DLA_cores
    if core is not None and not 0 <= core < cores:
        raise ConfigError(
            f"DLA core {core} was asked for, this TensorRT reports {cores} cores.",
            hint="build for the GPU; DLA is left out of TensorRT 10.8 to 11.3 and of every Orin Nano",
        )
    if any(shape.dynamic for shape in shapes.values()):
        raise ConfigError("A DLA takes fixed shapes only.", hint="give one batch size and one input size")


def place_on_dla(
    library: TensorRT,
    config: trt.IBuilderConfig,
    network: trt.INetworkDefinition,
    *,
    options: BuildOptions,
    precision: Precision,
) -> list[str]:
    """Put what fits on the DLA; returns the names of the layers that fall back to the GPU.

    Raises:
        ConfigError: an fp32 graph without a calibration cache; DLAs compute fp16 and int8 only.
        BuildError: strict mode, and a layer does not fit.
    """
    if precision is Precision.FP32 and options.calibration_cache is None:
        raise ConfigError(
            "A DLA computes in fp16 or int8 only, this ONNX file is fp32.",
            hint="build the fp16 file, or give a calibration cache",
        )
    config.default_device_type = library.DeviceType.DLA
    config.DLA_core = options.dla_core or 0
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


class Generation(ABC):
    """Builder calls that exist in some versions only. ``check`` refuses what this generation cannot honour."""

    label: str

    def __init__(self, library: TensorRT) -> None:
        # Any: each generation has names that the stubs of 10.13 lack; the API table test checks them instead.
        self.trt: Any = library

    def check(self, options: BuildOptions) -> None:
        """Refuse options that this generation does not have.

        Raises:
            ConfigError: naming the option and the reason.
        """
        if options.compute_capabilities:
            raise ConfigError(
                f"{self.label} builds for the GPU it runs on, so compute capabilities cannot be chosen.",
                hint="build on the device, or use the backend 'tensorrt-rtx'",
            )

    def typed(self, options: BuildOptions) -> bool:
        """Whether the network takes its types from the ONNX file alone."""
        return options.calibration_cache is None

    @abstractmethod
    def network_flags(self, *, typed: bool) -> int:
        """The argument of ``Builder.create_network``."""

    def prepare_parser(self, parser: trt.OnnxParser) -> None:
        """Set the parser flags that the portable graph needs."""
        del parser

    def set_types(self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions) -> None:
        """Set precision flags where the types do not come from the ONNX file alone."""
        del config, network, options

    def set_monitor(self, config: trt.IBuilderConfig, monitor: BuildMonitor) -> None:
        """Report progress, where the version can."""
        config.progress_monitor = monitor.binding(self.trt)

    def set_compatibility(self, config: trt.IBuilderConfig, options: BuildOptions) -> None:
        """Make the engine loadable by other versions or on other GPUs."""
        if options.version_compatible:
            config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def set_compute_capabilities(self, config: trt.IBuilderConfig, options: BuildOptions) -> str:
        """Choose GPUs to build for; returns them for the record."""
        del config, options
        return ""

    def set_timing_cache(self, config: trt.IBuilderConfig, content: bytes) -> trt.ITimingCache:
        """Start from a timing cache (empty: a new one)."""
        cache = config.create_timing_cache(content)
        if cache is None or not config.set_timing_cache(cache, False):
            raise ConfigError("The timing cache does not fit this TensorRT and GPU.", hint="delete the file")
        return cache


class _WeaklyTyped(Generation):
    """Versions with precision flags and calibrators."""

    def _set_legacy_types(
        self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions
    ) -> None:
        """The flags that make a weakly typed build compute what the graph says, and what a cache adds to it."""
        quantized = has_quantize_layers(self.trt, network)
        if quantized and options.calibration_cache is not None:
            raise ConfigError(
                "A calibration cache goes with an unquantized ONNX file, this one has Q/DQ nodes.",
                hint="pass the fp32 ONNX file, or leave the cache out",
            )
        if quantized or options.calibration_cache is not None:
            config.set_flag(self.trt.BuilderFlag.INT8)
        if has_half_tensors(self.trt, network) or options.dla_core is not None:
            config.set_flag(self.trt.BuilderFlag.FP16)  # A DLA computes fp16 and int8 only.
            keep_nms_float(self.trt, config, network)
        if options.calibration_cache is not None:
            version = parse_version(self.trt.__version__)
            check_calibration_cache(options.calibration_cache, version=version)
            config.int8_calibrator = cache_only_calibrator(self.trt, options.calibration_cache)


class Tensorrt8(_WeaklyTyped):
    """TensorRT 8.6 (JetPack 6.0): no strong typing, no progress monitor, explicit batch by flag."""

    label = "TensorRT 8"

    def typed(self, options: BuildOptions) -> bool:
        """8.6 has no strong typing."""
        del options
        return False

    def network_flags(self, *, typed: bool) -> int:
        """Explicit batch, which the ONNX parser needs before 10."""
        del typed
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)

    def prepare_parser(self, parser: trt.OnnxParser) -> None:
        """The plug-in InstanceNormalization of 8.6 cannot be used in version-compatible engines; the native one can."""
        parser.set_flag(self.trt.OnnxParserFlag.NATIVE_INSTANCENORM)

    def set_types(self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions) -> None:
        """Set the flags of what the graph contains."""
        self._set_legacy_types(config, network, options)
        # Several contexts on one profile, which is how the runtime serves several threads; always on since 10.
        config.set_preview_feature(self.trt.PreviewFeature.PROFILE_SHARING_0806, True)

    def set_monitor(self, config: trt.IBuilderConfig, monitor: BuildMonitor) -> None:
        """8.6 does not report progress."""
        del config, monitor


class Tensorrt10(_WeaklyTyped):
    """TensorRT 10 (JetPack 6.1 to 7): strongly typed, weakly only for a calibration cache or a DLA."""

    label = "TensorRT 10"

    def typed(self, options: BuildOptions) -> bool:
        """Weak typing is left for what strong typing cannot express: implicit INT8, and a DLA's choice of types."""
        return options.calibration_cache is None and options.dla_core is None

    def network_flags(self, *, typed: bool) -> int:
        """Strong typing by its name; its number differs between versions."""
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0

    def set_types(self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions) -> None:
        """Nothing for a strongly typed network, whose flags would be refused."""
        if not self.typed(options):
            self._set_legacy_types(config, network, options)

    def set_timing_cache(self, config: trt.IBuilderConfig, content: bytes) -> trt.ITimingCache:
        """Editable where the version can (10.8 and later)."""
        make_timing_cache_editable(self.trt, config)
        return super().set_timing_cache(config, content)


class Tensorrt11(Generation):
    """TensorRT 11: strongly typed only, no calibrators, no precision flags."""

    label = "TensorRT 11"

    def check(self, options: BuildOptions) -> None:
        """Refuse calibration caches too."""
        super().check(options)
        refuse_calibration_cache(self.label, options)

    def network_flags(self, *, typed: bool) -> int:
        """Strongly typed, said by name although 11 knows nothing else."""
        del typed
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def set_timing_cache(self, config: trt.IBuilderConfig, content: bytes) -> trt.ITimingCache:
        """Always editable in 11."""
        config.set_flag(self.trt.BuilderFlag.EDITABLE_TIMING_CACHE)
        return super().set_timing_cache(config, content)


class TensorrtRtx(Generation):
    """TensorRT-RTX: the surface of 11 for desktop GPUs, without DLA, plug-ins, timing cache or compatibility modes."""

    label = "TensorRT-RTX"

    def check(self, options: BuildOptions) -> None:
        """Refuse what TensorRT-RTX does not have, and unknown compute capabilities."""
        refuse_calibration_cache(self.label, options)
        lacks = {
            "a DLA": options.dla_core is not None,
            "version-compatible engines": options.version_compatible,
            "hardware-compatible engines (name several compute capabilities instead)": options.hardware_compatible,
            "a timing cache (it compiles for the GPU at load time, see the session's cache_dir)": bool(
                options.timing_cache
            ),
        }
        for what, asked in lacks.items():
            if asked:
                raise ConfigError(f"{self.label} does not have {what}.", hint="leave the option out")
        for capability in options.compute_capabilities:
            self._capability(capability)

    def network_flags(self, *, typed: bool) -> int:
        """Strongly typed."""
        del typed
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def set_compute_capabilities(self, config: trt.IBuilderConfig, options: BuildOptions) -> str:
        """Build ahead of time for these GPUs; none given: the library's own portable set."""
        chosen = [self._capability(text) for text in options.compute_capabilities]
        if not chosen:
            return "portable"
        rtx_config = cast(Any, config)  # Any: the stubs are TensorRT's, which cannot choose
        rtx_config.num_compute_capabilities = len(chosen)
        for index, capability in enumerate(chosen):
            if not rtx_config.set_compute_capability(capability, index):
                raise ConfigError(
                    f"{self.label} refused compute capability {options.compute_capabilities[index]}.",
                    hint=f"it knows {', '.join(self.capabilities())}",
                )
        return ",".join(options.compute_capabilities)

    def capabilities(self) -> list[str]:
        """What can be built for, as ``"8.6"``."""
        names = [n for n in self.trt.ComputeCapability.__members__ if n.startswith("SM")]
        return [f"{number[:-1]}.{number[-1]}" for number in (name[2:] for name in names)]

    def _capability(self, text: str) -> Any:  # Any: a member of an enumeration that only RTX has
        member = f"SM{text.replace('.', '')}"
        if text not in self.capabilities():
            raise ConfigError(
                f"{self.label} cannot build for compute capability '{text}'.",
                hint=f"it knows {', '.join(self.capabilities())}; Jetson engines are built on the Jetson",
            )
        return self.trt.ComputeCapability.__members__[member]


def make_timing_cache_editable(library: Any, config: trt.IBuilderConfig) -> None:  # Any: a flag that 10.3 lacks
    """Keep timings that can be read and pinned, in versions that have the flag."""
    flag = library.BuilderFlag.__members__.get("EDITABLE_TIMING_CACHE")
    if flag is not None:
        config.set_flag(flag)


def refuse_calibration_cache(label: str, options: BuildOptions) -> None:
    """Raise ConfigError where calibrators are gone."""
    if options.calibration_cache is not None:
        raise ConfigError(
            f"{label} has no calibrators, INT8 must be in the ONNX file as Q/DQ nodes.",
            hint="run 'fcos-deploy quantize' and build its ONNX file without a calibration cache",
        )


def generation_of(library: TensorRT, *, import_name: str) -> Generation:
    """The generation of an imported library."""
    if import_name == "tensorrt_rtx":
        return TensorrtRtx(library)
    major = parse_version(library.__version__)[0]
    # Majors after 11 are taken for 11 until a table of their names says otherwise.
    generation: type[Generation] = {8: Tensorrt8, 9: Tensorrt10, 10: Tensorrt10}.get(major, Tensorrt11)
    return generation(library)
