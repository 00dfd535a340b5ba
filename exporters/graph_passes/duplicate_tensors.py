"""Constants that are stored twice."""

from __future__ import annotations

from typing import Any

from fcos_deploy.core.require import require

__all__ = ["merge_duplicate_tensors"]


def merge_duplicate_tensors(model: Any) -> int:  # Any: onnx_ir.Model
    """Store equal initializers once.

    Requires: nothing. Ensures: byte-equal tensors of one type and shape are one initializer.
    """
    passes = require("onnx_ir.passes.common", extra="export")
    before = len(model.graph.initializers)
    passes.DeduplicateInitializersPass()(model)
    return before - len(model.graph.initializers)
