"""Equal nodes on equal inputs, such as the shape of one tensor asked for by every level."""

from __future__ import annotations

from typing import Any

from fcos_deploy.core.require import require

__all__ = ["merge_same_computations"]


def merge_same_computations(model: Any) -> int:  # Any: onnx_ir.Model
    """Compute once what several nodes compute alike.

    Requires: deterministic operators, which all of ours are. Ensures: the outputs keep their names and values.
    """
    passes = require("onnx_ir.passes.common", extra="export")
    before = len(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)
