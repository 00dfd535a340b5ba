"""Reshapes whose shape is put together from sizes at run time, though 0 and -1 would say it."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.graph_passes.rewire import constant_of
from fcos_deploy.core.require import require

__all__ = ["simplify_open_reshapes"]


_KEEP_BATCH = frozenset({
    "Add", "BatchNormalization", "Cast", "Clip", "Conv", "Div", "Exp", "GroupNormalization", "InstanceNormalization",
    "MaxPool", "Mul", "Relu", "Resize", "Sigmoid", "Sqrt", "Sub", "Where",
})  # fmt: skip


def simplify_open_reshapes(model: Any) -> int:  # Any: onnx_ir.Model
    """Give ``Reshape(x, Concat(batch, ..., computed, ...))`` the constant shape ``[0, ..., -1, ...]``.

    Requires: the first size is the batch of a graph input, and the first axis of ``x`` is that batch because every
    operator on the way keeps it; of the other sizes at most one is not constant.
    Ensures: the same elements in the same order and shape.
    """
    changed = 0
    for node in list(model.graph):
        if node.op_type == "Reshape" and node.domain == "":
            shape = _constant_shape(node.inputs[1].producer())
            if shape is not None and _has_batch_axis(node.inputs[0]):
                node.replace_input_with(1, _initializer(model, shape))
                node.attributes.pop("allowzero", None)  # With it, 0 would mean no elements.
                changed += 1
    return changed


def _constant_shape(concat: Any) -> tuple[int, ...] | None:
    if concat is None or concat.op_type != "Concat" or not _is_batch(concat.inputs[0]):
        return None
    sizes: list[int] = [0]
    for part in concat.inputs[1:]:
        constant = constant_of(part)
        if constant is not None:
            sizes.extend(int(n) for n in constant)
        elif part.shape is not None and list(part.shape) == [1]:
            sizes.append(-1)
        else:
            return None
    fits = sizes.count(-1) <= 1 and 0 not in sizes[1:]
    return tuple(sizes) if fits else None


def _is_batch(size: Any) -> bool:
    """Whether ``size`` is the (1,) length of the first axis of a graph input."""
    shape = size.producer()
    if shape is None or shape.op_type != "Shape" or not shape.inputs[0].is_graph_input():
        return False
    start, end = (shape.attributes.get(name) for name in ("start", "end"))
    return end is not None and end.as_int() == 1 and (start is None or start.as_int() == 0)


def _has_batch_axis(value: Any) -> bool:
    """Whether the first axis of ``value`` is the batch, judged by the operators that lead from the input to it."""
    while value is not None and not value.is_graph_input():
        node = value.producer()
        if node is None:
            return False
        if node.op_type in _KEEP_BATCH:
            # Of several operands, one with a batch axis gives the result one: the others broadcast.
            operands = [i for i in node.inputs if i is not None and not i.is_initializer()]
            if len(operands) > 1:
                return any(_has_batch_axis(i) for i in operands)
            value = operands[0] if operands else None
        elif _permutes_or_reshapes_behind_batch(node):
            value = node.inputs[0]
        else:
            return False
    return value is not None


def _permutes_or_reshapes_behind_batch(node: Any) -> bool:
    if node.op_type == "Transpose":
        return bool(node.attributes["perm"].as_ints()[0] == 0)
    return bool(node.op_type == "Reshape") and _reshape_keeps_batch(node)


def _reshape_keeps_batch(node: Any) -> bool:
    constant = constant_of(node.inputs[1])
    if constant is not None:
        return bool(constant[0] == 0)
    shape = node.inputs[1].producer()
    if shape is None or shape.op_type != "Shape":
        return _constant_shape(shape) is not None
    start = shape.attributes.get("start")
    return (start is None or start.as_int() == 0) and _has_batch_axis(shape.inputs[0])


def _initializer(model: Any, shape: tuple[int, ...]) -> Any:
    ir = require("onnx_ir", extra="export")
    name = "shape" + "".join(f"_{n}" for n in shape).replace("-", "m")
    found = model.graph.initializers.get(name)
    if found is None:
        found = ir.Value(name=name, const_value=ir.tensor(np.array(shape, np.int64), name=name))
        found.shape, found.dtype = ir.Shape((len(shape),)), ir.DataType.INT64
        model.graph.initializers[name] = found
    return found
