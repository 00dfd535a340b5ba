"""The one step that passes share: a tensor takes another's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fcos_deploy.core.libraries import require

__all__ = [
    "PASSES",
    "bypass",
    "constant_of",
    "merge_duplicate_tensors",
    "merge_same_computations",
    "name_weights_after_convolutions",
    "remove_dead_code",
    "remove_neutral_arithmetic",
    "simplify_open_reshapes",
]


def bypass(model: Any, node: Any, source: Any) -> bool:  # Any: onnx_ir types, of an optional dependency
    """Let ``source`` take the place of the only output of ``node``, and remove the node.

    Returns:
        False, with nothing changed, when the output is one of the graph's and ``source`` cannot take its name.
    """
    (output,) = node.outputs
    if output.is_graph_output():
        return False
    output.replace_all_uses_with(source)
    model.graph.remove(node, safe=True)
    return True


def constant_of(value: Any) -> Any | None:
    """The NumPy array of an initializer, None for everything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def remove_dead_code(model: Any) -> int:  # Any: onnx_ir.Model
    """Remove what no output needs, and Identity nodes.

    Requires: nothing. Ensures: every node and initializer left has a path to an output.
    """
    passes = require("onnx_ir.passes.common", extra="export")
    before = len(model.graph) + len(model.graph.initializers)
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    return before - len(model.graph) - len(model.graph.initializers)


def merge_duplicate_tensors(model: Any) -> int:  # Any: onnx_ir.Model
    """Store equal initializers once.

    Requires: nothing. Ensures: byte-equal tensors of one type and shape are one initializer.
    """
    passes = require("onnx_ir.passes.common", extra="export")
    before = len(model.graph.initializers)
    passes.DeduplicateInitializersPass()(model)
    return before - len(model.graph.initializers)


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


def merge_same_computations(model: Any) -> int:  # Any: onnx_ir.Model
    """Compute once what several nodes compute alike.

    Requires: deterministic operators, which all of ours are. Ensures: the outputs keep their names and values.
    """
    passes = require("onnx_ir.passes.common", extra="export")
    before = len(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)


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


PASSES: tuple[Callable[[Any], int], ...] = (  # Any: onnx_ir.Model, of an optional dependency
    remove_neutral_arithmetic,
    simplify_open_reshapes,
    merge_same_computations,
    merge_duplicate_tensors,
    remove_dead_code,
    name_weights_after_convolutions,
)
