"""Deep-learning accelerators of Xavier and Orin: which layers they take, and which fall back to the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exporters._tensorrt_profiles import ProfileShapes
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BuildError, ConfigError
from fcos_deploy.core.exporter import BuildOptions
from fcos_deploy.core.tensorrt_library import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["place_on_dla"]


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
