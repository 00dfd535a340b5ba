"""Large weights kept out of a graph while somebody works on it who copies it many times and never looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcos_deploy.core.require import require

__all__ = ["LARGE", "with_weights_aside"]

LARGE = 65536  # bytes; smaller ones may be shapes or factors, which a rewriting looks at


def with_weights_aside(model: Any, rewrite: Callable[[Any], Any]) -> Any:
    """What ``rewrite`` makes of ``model``, an ``onnx.ModelProto`` that is left as it is.

    ``rewrite`` gets the graph with an input in place of every initializer of more than ``LARGE`` bytes.
    """
    onnx = require("onnx", extra="export")
    lean = onnx.ModelProto()
    lean.CopyFrom(model)
    graph = lean.graph
    large = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.raw_data) > LARGE}
    small = [tensor for tensor in model.graph.initializer if tensor.name not in large]
    del graph.initializer[:]
    graph.initializer.extend(small)
    for name, tensor in large.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    result = rewrite(lean)
    inputs = [value for value in result.graph.input if value.name not in large]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    result.graph.initializer.extend(large.values())
    return result
