"""Passes over a graph (``onnx_ir.Model``, changed in place) that simplify what onnxsim leaves.

Each returns how many changes it made, and says what it requires of the graph and what it ensures. The outputs of the
graph keep their names, types and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fcos_deploy.core.libraries import lazy_import

__all__ = [
    "PASSES",
    "merge_batch_norm_into_deform_conv",
    "merge_duplicate_tensors",
    "merge_same_computations",
    "name_weights_after_convolutions",
    "remove_dead_code",
    "remove_neutral_arithmetic",
    "simplify_open_reshapes",
]

ir = lazy_import("onnx_ir", extra="export")
ir_passes = lazy_import("onnx_ir.passes.common", extra="export")

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Sub": 0.0, "Add": 0.0}
_COMMUTATIVE = {"Mul", "Add"}
_KEEP_BATCH = frozenset({
    "Add", "BatchNormalization", "Cast", "Clip", "Conv", "Div", "Exp", "GroupNormalization", "InstanceNormalization",
    "MaxPool", "Mul", "Relu", "Resize", "Sigmoid", "Sqrt", "Sub", "Where",
})  # fmt: skip
_ROLES = {1: "weight", 2: "bias"}  # of a convolution's inputs


def remove_dead_code(model: Any) -> int:
    """Remove what no output needs, and Identity nodes.

    Requires: nothing. Ensures: every node and initializer left has a path to an output.
    """
    before = len(model.graph) + len(model.graph.initializers)
    ir_passes.IdentityEliminationPass()(model)
    ir_passes.RemoveUnusedNodesPass()(model)
    return before - len(model.graph) - len(model.graph.initializers)


def merge_duplicate_tensors(model: Any) -> int:
    """Store equal initializers once.

    Requires: nothing. Ensures: byte-equal tensors of one type and shape are one initializer.
    """
    before = len(model.graph.initializers)
    ir_passes.DeduplicateInitializersPass()(model)
    return before - len(model.graph.initializers)


def remove_neutral_arithmetic(model: Any) -> int:
    """Remove Mul and Div by ones, and Add and Sub of zeros.

    Requires: the constant is an initializer of the same type that broadcasts into the other input's known shape.
    Ensures: every use of a removed node reads the other input, of the same shape and type.
    """
    removed = 0
    for node in list(model.graph):
        if node.op_type not in _NEUTRAL or node.domain != "" or node.outputs[0].is_graph_output():
            continue
        pairs = [tuple(node.inputs)]
        if node.op_type in _COMMUTATIVE:
            pairs.append(pairs[0][::-1])
        source = next((x for x, operand in pairs if _changes_nothing(operand, x, neutral=_NEUTRAL[node.op_type])), None)
        if source is not None:
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            removed += 1
    return removed


def _constant(value: Any) -> Any | None:
    """The NumPy array of an initializer, None for everything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def _changes_nothing(operand: Any, source: Any, *, neutral: float) -> bool:
    """Whether ``operand`` is a constant full of ``neutral`` against which ``source`` keeps its shape."""
    constant = _constant(operand)
    if constant is None or not np.all(constant == neutral):
        return False
    if source.shape is None:
        return bool(constant.size == 1 and constant.ndim == 0)
    if constant.ndim > len(source.shape):
        return False
    paired = zip(reversed(list(source.shape)), reversed(constant.shape), strict=False)
    return all(extent in (1, dimension) for dimension, extent in paired)


def simplify_open_reshapes(model: Any) -> int:
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
                name = "shape" + "".join(f"_{n}" for n in shape).replace("-", "m")
                if name not in model.graph.initializers:
                    value = ir.Value(name=name, const_value=ir.tensor(np.array(shape, np.int64), name=name))
                    value.shape, value.dtype = ir.Shape((len(shape),)), ir.DataType.INT64
                    model.graph.initializers[name] = value
                node.replace_input_with(1, model.graph.initializers[name])
                node.attributes.pop("allowzero", None)  # With it, 0 would mean no elements.
                changed += 1
    return changed


def _constant_shape(concat: Any) -> tuple[int, ...] | None:
    """What the node puts together, 0 for the batch and -1 for one size that is computed; None where that is not so."""
    if concat is None or concat.op_type != "Concat" or not _is_batch(concat.inputs[0]):
        return None
    sizes: list[int] = [0]
    for part in concat.inputs[1:]:
        constant = _constant(part)
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
        elif node.op_type == "Reshape":
            return _reshape_keeps_batch(node) and _has_batch_axis(node.inputs[0])
        elif node.op_type == "Transpose" and node.attributes["perm"].as_ints()[0] == 0:
            value = node.inputs[0]
        else:
            return False
    return value is not None


def _reshape_keeps_batch(node: Any) -> bool:
    constant = _constant(node.inputs[1])
    if constant is not None:
        return bool(constant[0] == 0)
    shape = node.inputs[1].producer()
    if shape is None or shape.op_type != "Shape":
        return _constant_shape(shape) is not None
    start = shape.attributes.get("start")
    return (start is None or start.as_int() == 0) and _has_batch_axis(shape.inputs[0])


def merge_same_computations(model: Any) -> int:
    """Compute once what several nodes compute alike.

    Requires: deterministic operators, which all of ours are. Ensures: the outputs keep their names and values.
    """
    before = len(model.graph)
    ir_passes.CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)


def merge_batch_norm_into_deform_conv(model: Any) -> int:
    """What torch's exporter does for convolutions: scale the weights, and put the shift into the bias.

    Requires: weights and statistics are initializers, the weights of no other node. Ensures: the same values, to the
    rounding of the weights.
    """
    merged = 0
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.op_type == "BatchNormalization" else None
        if source is None or source.op_type != "DeformConv" or len(source.outputs[0].uses()) != 1:
            continue
        gamma, beta, mean, variance = map(_constant, node.inputs[1:])
        weight, bias = (_constant(source.inputs[i]) if i < len(source.inputs) else None for i in (1, 3))
        if gamma is None or beta is None or mean is None or variance is None or weight is None:
            continue
        if len(source.inputs[1].uses()) != 1:
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        factor = gamma / np.sqrt(variance + epsilon)
        shift = beta + ((0.0 if bias is None else bias) - mean) * factor
        source.resize_inputs(max(4, len(source.inputs)))
        name = source.inputs[1].name
        names = (name, f"{name.removesuffix('.weight')}.bias")
        arrays = (weight * factor.reshape(-1, 1, 1, 1), shift)
        for position, full, array in zip((1, 3), names, arrays, strict=True):
            value = ir.Value(name=full, const_value=ir.tensor(array.astype(np.float32), name=full))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
            source.replace_input_with(position, value)
            model.graph.initializers.pop(full, None)
            model.graph.initializers[full] = value
        node.outputs[0].replace_all_uses_with(source.outputs[0])
        model.graph.remove(node, safe=True)
        merged += 1
    return merged


def name_weights_after_convolutions(model: Any) -> int:
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
            role = _ROLES.get(position)
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
