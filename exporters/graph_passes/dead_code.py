"""Nodes and constants that no output needs."""

from __future__ import annotations

from typing import Any

from fcos_deploy.core.require import require

__all__ = ["remove_dead_code"]


def remove_dead_code(model: Any) -> int:  # Any: onnx_ir.Model
    """Remove what no output needs, and Identity nodes.

    Requires: nothing. Ensures: every node and initializer left has a path to an output.
    """
    passes = require("onnx_ir.passes.common", extra="export")
    before = len(model.graph) + len(model.graph.initializers)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    return before - len(model.graph) - len(model.graph.initializers)
