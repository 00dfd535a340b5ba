"""Options of a TensorRT build, and how each generation of the library takes them.

``Generation`` holds every builder call that differs between TensorRT 8.6, 10, 11 and TensorRT-RTX.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, SizeRange
from fcos_deploy.core.libraries import parse_version
from runtimes._tensorrt_library import TensorRT, calibration_cache_number

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]

_OPTIMIZATION_LEVELS = range(6)
_CACHE_HEADER = re.compile(r"TRT-(\d+)-(EntropyCalibration2|MinMaxCalibration)\s*")
_CACHE_ENTRY = re.compile(r".+: [0-9a-fA-F]{1,8}\s*")


class ProfileShapes(NamedTuple):
    """Min, opt and max shape of one input, as in an optimization profile; all equal where the input is static."""

    minimum: Shape
    opt: Shape
    maximum: Shape

    @property
    def dynamic(self) -> bool:
        """Whether the shape may vary."""
        return self.minimum != self.maximum

    def __str__(self) -> str:
        return "/".join("x".join(map(str, shape)) for shape in self)


def profile_shapes(
    inputs: Mapping[str, tuple[int | None, ...]], *, options: BuildOptions, size_divisor: int
) -> dict[str, ProfileShapes]:
    """Shapes of every input of the graph, ``None`` in ``inputs`` being a dynamic axis.

    Axis 0 is the batch; axes 2 and 3 of an image tensor are its height and width.

    Raises:
        ConfigError: a range is empty, missing, given for a fixed axis, or not a multiple of ``size_divisor``.
    """
    ranges: dict[int, tuple[str, SizeRange | None]] = {
        0: ("batch", options.batch),
        2: ("height", options.height_range),
        3: ("width", options.width_range),
    }
    for axis, (label, sizes) in ranges.items():
        if sizes is None:
            continue
        if axis and any(size % size_divisor for size in sizes):
            raise ConfigError(f"The {label} range {tuple(sizes)} must hold multiples of {size_divisor}.")
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise ConfigError(f"The {label} range must be 1 <= min <= opt <= max, got {'/'.join(map(str, sizes))}.")
    shapes = {}
    for name, shape in inputs.items():
        axes = [_axis_range(name, n, *ranges.get(axis, (f"axis {axis}", None))) for axis, n in enumerate(shape)]
        shapes[name] = ProfileShapes(*zip(*axes, strict=True))
    return shapes


def _axis_range(name: str, size: int | None, label: str, sizes: SizeRange | None) -> SizeRange:
    """Range of one axis of input ``name``; ``size`` is the graph's, ``sizes`` what the build asks for."""
    if size is None:
        if sizes is None:
            raise ConfigError(
                f"The {label} of input '{name}' is dynamic in the ONNX file, and no range was given for it.",
                hint=f"give the min, opt and max {label}, or export with a fixed input size",
            )
        return sizes
    if sizes is not None and set(sizes) != {size}:
        raise ConfigError(
            f"The {label} of input '{name}' is fixed to {size} in the ONNX file, the build asks for "
            f"{'/'.join(map(str, sizes))}.",
            hint=f"ask for {size}, or export with a dynamic {label}",
        )
    return SizeRange(size, size, size)


def check_calibration_cache(path: Path, *, version: str) -> None:
    """Refuse a cache that TensorRT would silently ignore: another version's, or one that is not in its format.

    Line 1 is ``TRT-<number>-EntropyCalibration2``; the others are ``tensor: float32 scale in hexadecimal``.

    Raises:
        ConfigError: naming the line.
    """
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    header = _CACHE_HEADER.fullmatch(lines[0]) if lines else None
    if header is None:
        raise ConfigError(f"'{path}' is not a TensorRT calibration cache: its first line is not 'TRT-...'.")
    expected = calibration_cache_number(version)
    if int(header[1]) != expected:
        raise ConfigError(
            f"'{path}' was written for version {header[1]}, this TensorRT is {expected} and would ignore it.",
            hint="write the cache again for this version with 'fcos-deploy calibrate'",
        )
    for number, line in enumerate(lines[1:], start=2):
        if line and not _CACHE_ENTRY.fullmatch(line):
            raise ConfigError(f"Line {number} of '{path}' is not 'tensor: scale in hexadecimal': '{line[:60]}'.")


class Generation(ABC):
    """Builder calls that exist in some versions only. ``check`` refuses what this generation cannot honour."""

    label: str
    has_calibrators = False

    def __init__(self, library: TensorRT) -> None:
        # Any: each generation has names that the stubs of 10.13 lack; the API table test checks them instead.
        self.trt: Any = library

    def check(self, options: BuildOptions) -> None:
        """Refuse values out of range, and options that this generation does not have.

        Raises:
            ConfigError: naming the option and the reason.
        """
        if options.calibration_cache is not None and not self.has_calibrators:
            raise ConfigError(
                f"{self.label} has no calibrators, INT8 must be in the ONNX file as Q/DQ nodes.",
                hint="run 'fcos-deploy quantize' and build its ONNX file without a calibration cache",
            )
        level = options.optimization_level
        if level is not None and level not in _OPTIMIZATION_LEVELS:
            raise ConfigError(f"The optimization level must be 0 to 5, got {level}.")
        if options.workspace_mib is not None and options.workspace_mib < 1:
            raise ConfigError(f"The workspace must be at least 1 MiB, got {options.workspace_mib}.")
        if options.dla_strict and options.dla_core is None:
            raise ConfigError("DLA strict mode was asked for without a DLA core.", hint="give --dla-core 0")
        if options.calibration_cache is not None and not options.calibration_cache.is_file():
            raise ConfigError(f"The calibration cache '{options.calibration_cache}' does not exist.")
        if options.compute_capabilities:
            raise ConfigError(
                f"{self.label} builds for the GPU it runs on, so compute capabilities cannot be chosen.",
                hint="build on the device, or use the backend 'tensorrt-rtx'",
            )

    def typed(self, options: BuildOptions) -> bool:
        """Whether the network takes its types from the ONNX file alone."""
        return options.calibration_cache is None

    def network_flags(self, *, typed: bool) -> int:
        """The argument of ``Builder.create_network``. A flag's number differs between versions, so by its name."""
        return 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0

    def prepare_parser(self, parser: trt.OnnxParser) -> None:
        """Set the parser flags that the portable graph needs."""
        del parser

    def set_types(self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions) -> None:
        """Set precision flags where the types do not come from the ONNX file alone."""
        del config, network, options

    def set_compatibility(self, config: trt.IBuilderConfig, options: BuildOptions) -> None:
        """Make the engine loadable by other versions or on other GPUs."""
        if options.version_compatible:
            config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:  # on compute capability 8.0 and later, at some cost in speed
            config.hardware_compatibility_level = self.trt.HardwareCompatibilityLevel.AMPERE_PLUS

    def set_compute_capabilities(self, config: trt.IBuilderConfig, options: BuildOptions) -> str:
        """Choose GPUs to build for; returns them for the record."""
        del config, options
        return ""

    def set_timing_cache(self, config: trt.IBuilderConfig, content: bytes) -> None:
        """Start from a timing cache (empty: a new one)."""
        flag = self.trt.BuilderFlag.__members__.get("EDITABLE_TIMING_CACHE")  # timings can be read and pinned: 10.8
        if flag is not None:
            config.set_flag(flag)
        cache = config.create_timing_cache(content)
        # False: another device's timings are refused instead of being used as if they were this one's.
        if cache is None or not config.set_timing_cache(cache, False):
            raise ConfigError("The timing cache does not fit this TensorRT and GPU.", hint="delete the file")


class _WeaklyTyped(Generation):
    """Versions with precision flags and calibrators."""

    has_calibrators = True

    def _set_precision_flags(
        self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions
    ) -> None:
        """The flags that make a weakly typed build compute what the graph says, and what a cache adds to it."""
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        quantizers = (self.trt.LayerType.QUANTIZE, self.trt.LayerType.DEQUANTIZE)
        quantized = any(layer.type in quantizers for layer in layers)
        if quantized and options.calibration_cache is not None:
            raise ConfigError(
                "A calibration cache goes with an unquantized ONNX file, this one has Q/DQ nodes.",
                hint="pass the fp32 ONNX file, or leave the cache out",
            )
        if quantized or options.calibration_cache is not None:
            config.set_flag(self.trt.BuilderFlag.INT8)
        outputs = (layer.get_output(index) for layer in layers for index in range(layer.num_outputs))
        half = any(tensor.dtype == self.trt.DataType.HALF for tensor in outputs)
        if half or options.dla_core is not None:  # A DLA computes fp16 and int8 only.
            config.set_flag(self.trt.BuilderFlag.FP16)
            # The builder may now choose half precision anywhere. Coordinates in half precision are off by half a
            # pixel, so NMS keeps float.
            for layer in layers:
                if layer.type == self.trt.LayerType.NMS:
                    config.set_flag(self.trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
                    layer.precision = self.trt.DataType.FLOAT
        if options.calibration_cache is not None:
            check_calibration_cache(options.calibration_cache, version=self.trt.__version__)
            config.int8_calibrator = self._cache_only_calibrator(options.calibration_cache)

    def _cache_only_calibrator(self, path: Path) -> trt.IInt8EntropyCalibrator2:
        """A calibrator that has a cache and no data, so that ranges are ours or the build fails."""
        content = path.read_bytes()
        library = self.trt

        class CacheOnly(library.IInt8EntropyCalibrator2):  # type: ignore[misc, name-defined]  # known at run time only
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
        self._set_precision_flags(config, network, options)
        # Several contexts on one profile, which is how the runtime serves several threads; always on since 10.
        config.set_preview_feature(self.trt.PreviewFeature.PROFILE_SHARING_0806, True)


class Tensorrt10(_WeaklyTyped):
    """TensorRT 10 (JetPack 6.1 to 7): strongly typed, weakly only for a calibration cache or a DLA."""

    label = "TensorRT 10"

    def typed(self, options: BuildOptions) -> bool:
        """Weak typing is left for what strong typing cannot express: implicit INT8, and a DLA's choice of types."""
        return options.calibration_cache is None and options.dla_core is None

    def set_types(self, config: trt.IBuilderConfig, network: trt.INetworkDefinition, options: BuildOptions) -> None:
        """Nothing for a strongly typed network, whose flags would be refused."""
        if not self.typed(options):
            self._set_precision_flags(config, network, options)


class Tensorrt11(Generation):
    """TensorRT 11: strongly typed only, no calibrators, no precision flags."""

    label = "TensorRT 11"


class TensorrtRtx(Generation):
    """TensorRT-RTX: the surface of 11 for desktop GPUs, without DLA, plug-ins, timing cache or compatibility modes."""

    label = "TensorRT-RTX"

    def check(self, options: BuildOptions) -> None:
        """Refuse what TensorRT-RTX does not have, and unknown compute capabilities."""
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
        known = self._capabilities()
        for capability in options.compute_capabilities:
            if capability not in known:
                raise ConfigError(
                    f"{self.label} cannot build for compute capability '{capability}'.",
                    hint=f"it knows {', '.join(known)}; Jetson engines are built on the Jetson",
                )
        super().check(replace(options, compute_capabilities=()))

    def set_compute_capabilities(self, config: trt.IBuilderConfig, options: BuildOptions) -> str:
        """Build ahead of time for these GPUs; none given: the library's own portable set."""
        if not options.compute_capabilities:
            return "portable"
        known = self._capabilities()
        rtx_config = cast(Any, config)  # Any: the stubs are TensorRT's, which cannot choose
        rtx_config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            if not rtx_config.set_compute_capability(known[capability], index):
                raise ConfigError(
                    f"{self.label} refused compute capability {capability}.", hint=f"it knows {', '.join(known)}"
                )
        return ",".join(options.compute_capabilities)

    def _capabilities(self) -> dict[str, Any]:  # Any: members of an enumeration that only RTX has
        """What can be built for, by names such as ``"8.6"`` (the member SM86)."""
        members = self.trt.ComputeCapability.__members__.items()
        return {f"{name[2:-1]}.{name[-1]}": member for name, member in members if name.startswith("SM")}


def generation_of(library: TensorRT, *, import_name: str) -> Generation:
    """The generation of an imported library."""
    if import_name == "tensorrt_rtx":
        return TensorrtRtx(library)
    major = parse_version(library.__version__)[0]
    # Majors after 11 are taken for 11 until a table of their names says otherwise.
    generation: type[Generation] = {8: Tensorrt8, 9: Tensorrt10, 10: Tensorrt10}.get(major, Tensorrt11)
    return generation(library)
