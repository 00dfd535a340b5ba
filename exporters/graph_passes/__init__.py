"""What onnxsim leaves in an FCOS graph: one pass a file, each saying what it requires and what it ensures.

A pass takes an ``onnx_ir.Model``, changes it, and returns how many nodes or tensors it removed or renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exporters.graph_passes.dead_code import remove_dead_code
from exporters.graph_passes.duplicate_tensors import merge_duplicate_tensors
from exporters.graph_passes.neutral_arithmetic import remove_neutral_arithmetic
from exporters.graph_passes.open_reshapes import simplify_open_reshapes
from exporters.graph_passes.same_computation import merge_same_computations
from exporters.graph_passes.weight_names import name_weights_after_convolutions

__all__ = ["PASSES"]

PASSES: tuple[Callable[[Any], int], ...] = (  # Any: onnx_ir.Model, of an optional dependency
    remove_neutral_arithmetic,
    simplify_open_reshapes,
    merge_same_computations,
    merge_duplicate_tensors,
    remove_dead_code,
    name_weights_after_convolutions,
)
