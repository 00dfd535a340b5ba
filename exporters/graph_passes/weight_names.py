"""Names of weights that a simplifier put together from others."""

from __future__ import annotations

from typing import Any

__all__ = ["name_weights_after_convolutions"]

_INPUTS = {1: "weight", 2: "bias"}


def name_weights_after_convolutions(model: Any) -> int:  # Any: onnx_ir.Model
    """Call what ``backbone.body.conv1/Conv`` reads ``backbone.body.conv1.weight`` and ``backbone.body.conv1.bias``.

    Requires: nodes named as the export names them; others are left alone. Ensures: names stay unique; only
    initializers that have no module's name get one.
    """
    renamed = 0
    for node in model.graph:
        module, _, operator = (node.name or "").rpartition("/")
        if node.op_type != "Conv" or operator != "Conv" or not module:
            continue
        for position, value in enumerate(node.inputs):
            role = _INPUTS.get(position)
            if role is None or value is None or not value.is_initializer() or value.name.endswith(f".{role}"):
                continue
            name = f"{module}.{role}"
            if name not in model.graph.initializers:
                value.name = name
                renamed += 1
    return renamed
