"""What a parsed network holds, and what a weakly typed build must be told about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fcos_deploy.core.tensorrt_library import TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["has_half_tensors", "has_quantize_layers", "keep_plugins_float"]


def keep_plugins_float(library: Any, config: trt.IBuilderConfig, network: trt.INetworkDefinition) -> None:
    """Coordinates in half precision are off by half a pixel: a weakly typed build must not choose it for plug-ins."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        if layer.type == library.LayerType.PLUGIN_V2:
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
