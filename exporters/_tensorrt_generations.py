"""What differs between TensorRT 8.6, 10, 11 and TensorRT-RTX when an engine is built: one class per generation.

Everything that all of them share is in ``_tensorrt_build``. Enumerations are used by name, never by number: the numbers
move between versions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, cast

from exporters._tensorrt_calibration import cache_only_calibrator, check_calibration_cache
from exporters._tensorrt_network import has_half_tensors, has_quantize_layers, keep_plugins_float
from exporters._tensorrt_progress import BuildMonitor
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions
from fcos_deploy.core.tensorrt_library import TensorRT, register_plugins
from fcos_deploy.core.version import parse_version

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Generation", "Tensorrt8", "Tensorrt10", "Tensorrt11", "TensorrtRtx", "generation_of"]


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

    def require_plugin(self, builder: trt.Builder, logger: trt.ILogger, *, name: str) -> None:
        """Make a plug-in known to the parser.

        Raises:
            ConfigError: this library does not have it.
        """
        register_plugins(self.trt, logger)
        if self.plugin_creator(builder.get_plugin_registry(), name) is None:
            raise ConfigError(
                f"{self.label} {self.trt.__version__} has no plug-in '{name}'.",
                hint="export with '--tail candidates', or '--nms-form onnx' (TensorRT-RTX: static)",
            )

    def plugin_creator(self, registry: trt.IPluginRegistry, name: str) -> object | None:
        """What makes a plug-in, None where it is not known."""
        creator: object | None = registry.get_creator(name, "1", "")
        return creator

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
            keep_plugins_float(self.trt, config, network)
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

    def plugin_creator(self, registry: trt.IPluginRegistry, name: str) -> object | None:
        """By the name that the call has until 10."""
        creator: object | None = registry.get_plugin_creator(name, "1", "")
        return creator

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
