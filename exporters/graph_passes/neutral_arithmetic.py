"""Arithmetic that changes nothing: times one (a std of 1, a box scale of 1), plus or minus nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.graph_passes.rewire import bypass, constant_of

__all__ = ["remove_neutral_arithmetic"]

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Sub": 0.0, "Add": 0.0}
_COMMUTATIVE = {"Mul", "Add"}


def remove_neutral_arithmetic(model: Any) -> int:  # Any: onnx_ir.Model
    """Remove Mul and Div by ones, and Add and Sub of zeros.

    Requires: the constant is an initializer of the same type that broadcasts into the other input's known shape.
    Ensures: every use of a removed node reads the other input, of the same shape and type.
    """
    removed = 0
    for node in list(model.graph):
        if node.op_type in _NEUTRAL and node.domain == "":
            source = _other_input(node)
            if source is not None:
                removed += bypass(model, node, source)
    return removed


def _other_input(node: Any) -> Any | None:
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op_type in _COMMUTATIVE:
        pairs.append((node.inputs[1], node.inputs[0]))
    for source, operand in pairs:
        constant = constant_of(operand)
        if constant is not None and bool(np.all(constant == _NEUTRAL[node.op_type])) and _keeps_shape(source, constant):
            return source
    return None


def _keeps_shape(source: Any, constant: Any) -> bool:
    """Whether broadcasting against ``constant`` leaves the shape of ``source``."""
    if source.shape is None:
        return bool(constant.size == 1 and constant.ndim == 0)
    if constant.ndim > len(source.shape):
        return False
    paired = zip(reversed(list(source.shape)), reversed(constant.shape), strict=False)
    return all(extent in (1, dimension) for dimension, extent in paired)
