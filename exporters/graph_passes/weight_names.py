"""Names of weights that a simplifier put together from others."""

from __future__ import annotations

from typing import Any

__all__ = ["name_weights_after_convolutions"]


def name_weights_after_convolutions(model: Any) -> int:  # Any: onnx_ir.Model
    """Call a convolution's weight ``backbone.body.conv1.weight`` when its node is ``backbone.body.conv1/Conv``.

    Requires: nodes named as the export names them; others are left alone. Ensures: names stay unique; only
    initializers that have no module's name get one.
    """
    renamed = 0
    for node in model.graph:
        module, _, operator = (node.name or "").rpartition("/")
        weight = node.inputs[1] if node.op_type == "Conv" and module and operator == "Conv" else None
        if weight is None or not weight.is_initializer() or weight.name.endswith(".weight"):
            continue
        name = f"{module}.weight"
        if name not in model.graph.initializers:
            weight.name = name
            renamed += 1
    return renamed
