"""Simplifies a graph: onnxsim, then our own passes; outputs are compared before anything is returned.

A pass changes an ``onnx_ir.Model`` in place, returns how many changes it made, and says what it requires of the graph
and what it ensures. The outputs of the graph keep their names, types and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.step_check import Runner, StepCheck, compare, feed_of, onnx_runner, recorded
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ExportError
from fcos_deploy.core.files import require_writable
from fcos_deploy.core.libraries import lazy_import, require
from fcos_deploy.core.onnx_graph import OnnxGraph, opset_of, save_onnx, tensor_bytes, without_initializers
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = [
    "LARGE",
    "PASSES",
    "Simplification",
    "merge_batch_norm_into_deform_conv",
    "merge_duplicate_tensors",
    "merge_same_computations",
    "model_of",
    "name_weights_after_convolutions",
    "put_weights_aside",
    "remove_dead_code",
    "remove_neutral_arithmetic",
    "rewrite_onnx",
    "simplified",
    "simplify_onnx",
    "simplify_open_reshapes",
    "with_weights_aside",
]

ir = lazy_import("onnx_ir", extra="export")
ir_passes = lazy_import("onnx_ir.passes.common", extra="export")
onnx = lazy_import("onnx", extra="export")
onnxsim = lazy_import("onnxsim", extra="export")

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


# (onnx.ModelProto, its contract, feeds for the comparison) -> the new model and the result of the comparison.
Rewrite = Callable[[Any, ModelContract, list[Tensors]], tuple[Any, StepCheck]]

LARGE = 65536  # bytes; smaller tensors may be shapes or factors, which a rewriting looks at

# Folding constants changes the order of a few float32 operations; a rounding in front of a quantizer may then move a
# value by one step of its scale.
_TOLERANCES = {Precision.FP32: 1e-4, Precision.FP16: 1e-2, Precision.INT8: 5e-1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplification:
    """What was written: number of nodes and bytes before and after, and the largest difference measured."""

    path: Path
    nodes_before: int
    nodes: int
    bytes_before: int
    file_bytes: int
    opset: int
    seconds: float
    check: StepCheck

    def summary(self) -> str:
        """One line for people."""
        sizes = f"{self.bytes_before / 1e6:.2f} -> {self.file_bytes / 1e6:.2f} MB"
        return f"{self.path}: {self.nodes_before} -> {self.nodes} nodes, {sizes}; {self.check}"

    def to_json(self) -> dict[str, str | int | float]:
        """For machines."""
        return {
            "path": str(self.path),
            "nodes_before": self.nodes_before,
            "nodes": self.nodes,
            "bytes_before": self.bytes_before,
            "bytes": self.file_bytes,
            "opset": self.opset,
            "seconds": round(self.seconds, 3),
            "check": str(self.check),
        }


def simplify_onnx(source: Path, output: Path, *, progress: ProgressFn = no_progress) -> Simplification:
    """Write a graph of at most the same size with the same outputs, opset, open axes and contract.

    Raises:
        BackendLoadError: ``source`` is not a complete ONNX model, or carries no contract.
        ExportError: onnxsim cannot read the graph.
        ConfigError: ``output`` cannot be written.
        StepCheckError: the result does not compute what its source does.
    """

    def rewrite(model: Any, contract: ModelContract, feeds: list[Tensors]) -> tuple[Any, StepCheck]:
        return simplified(model, feeds, contract=contract)

    return rewrite_onnx(source, output, step="simplify", rewrite=rewrite, progress=progress)


def rewrite_onnx(
    source: Path, output: Path, *, step: str, rewrite: Rewrite, progress: ProgressFn = no_progress
) -> Simplification:
    """Write what ``rewrite`` makes of the graph of ``source``; an input that provokes differences is drawn for it.

    Raises:
        BackendLoadError: ``source`` is not a complete ONNX model, or carries no contract.
        ConfigError: ``output`` cannot be written.
    """
    started = time.perf_counter()
    progress(step, 0, 2)
    require_writable(output)
    graph = OnnxGraph(source)
    model, contract = graph.model, graph.contract
    feeds = [feed_of(contract, {name: shape for name, _, shape in map(_interface, model.graph.input)})]
    progress(step, 1, 2)
    result, check = rewrite(model, contract, feeds)
    save_onnx(result, output)
    progress(step, 2, 2)
    return Simplification(
        path=output,
        nodes_before=len(model.graph.node),
        nodes=len(result.graph.node),
        bytes_before=model.ByteSize(),
        file_bytes=output.stat().st_size,
        opset=opset_of(result),
        seconds=time.perf_counter() - started,
        check=check,
    )


def simplified(
    model: Any,
    feeds: list[Tensors],
    *,
    contract: ModelContract | None = None,
    run: Runner | None = None,
    folder: Path | None = None,
) -> tuple[Any, StepCheck]:
    """A smaller graph with the same outputs on ``feeds``; ``model`` (onnx.ModelProto) is left as it is.

    What would be larger than its source is not used. ``contract``: that of ``model``, an fp32 graph without one;
    ``run`` gives the outputs of ``model``, where the caller has them; ``folder`` has the weights that are not in it.
    Raises as ``simplify_onnx`` does.
    """
    # onnxsim folds whatever is constant, and a folded Expand or Range may be larger than what computed it.
    smaller = _with_own_passes(_with_onnxsim(model), folder)
    result = smaller if smaller.ByteSize() <= model.ByteSize() else _with_own_passes(model, folder)
    for value, declared in zip(result.graph.output, model.graph.output, strict=True):
        value.type.CopyFrom(declared.type)  # onnxsim writes the sizes that it inferred over open axes.
    for kind in ("input", "output"):
        before, after = ([_interface(value) for value in getattr(m.graph, kind)] for m in (model, result))
        if before != after:
            raise ExportError(f"Simplifying changed the {kind}s from {before} to {after}.", hint="--no-simplify")
    if opset_of(model) != opset_of(result):
        raise ExportError(f"Simplifying changed the opset from {opset_of(model)} to {opset_of(result)}.")
    tolerance = _TOLERANCES[contract.precision if contract else Precision.FP32]
    expected = run or recorded(onnx_runner(model, folder=folder), feeds)
    actual = onnx_runner(result, folder=folder)
    check = compare(expected, actual, feeds, step="simplify", tolerance=tolerance, contract=contract)
    return result, check


def _with_onnxsim(model: Any) -> Any:
    try:
        # check_n: its own comparison takes random images, and no second input. Larger results of constant nodes are
        # left to the runtime, which folds them when it loads.
        return with_weights_aside(
            model, lambda lean: onnxsim.simplify(lean, check_n=0, tensor_size_threshold=f"{LARGE // 1024}KB")[0]
        )
    except Exception as error:  # onnxsim raises whatever its C++ core reports
        raise ExportError(f"onnxsim cannot simplify this graph: {error}.", hint="--no-simplify") from error


def _with_own_passes(model: Any, folder: Path | None) -> Any:
    graph = model_of(model, folder)
    # As onnx.shape_inference does by default, without the weights.
    ir_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(graph)
    while sum(run(graph) for run in PASSES):
        pass  # One pass may make room for another, which is over when none changes anything.
    result = ir.to_proto(graph)
    del result.graph.output[:]
    result.graph.output.extend(model.graph.output)  # Inference names open axes anew ("unk__5").
    del result.graph.value_info[:]  # Inferred again by whoever reads the file; half the size of a small one.
    return result


def put_weights_aside(model: Any, folder: Path, *, name: str) -> None:
    """Write the larger weights of an ``onnx_ir.Model`` to the file ``name`` in ``folder``, to which it then refers."""
    external_data = require("onnx_ir.external_data", extra="export")
    external_data.unload_from_model(model, folder, name, size_threshold_bytes=LARGE)


def model_of(proto: Any, folder: Path | None) -> Any:
    """The ``onnx_ir.Model`` of an ``onnx.ModelProto``, with the weights in ``folder`` that it refers to."""
    model = ir.from_proto(proto)
    if folder is not None:
        require("onnx_ir.external_data", extra="export").set_base_dir(model.graph, folder)
    return model


def _interface(value: Any) -> tuple[str, int, tuple[int | None, ...]]:
    """Name, element type and shape, None for an open axis."""
    tensor = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return value.name, tensor.elem_type, shape


def with_weights_aside(model: Any, rewrite: Callable[[Any], Any]) -> Any:
    """What ``rewrite`` makes of ``model``, an ``onnx.ModelProto`` that is left as it is.

    ``rewrite`` gets the graph with an input in place of every initializer of more than ``LARGE`` bytes. Tools that
    copy a graph many times and never look at its weights then take a fraction of the time.
    """
    lean = without_initializers(model)
    graph = lean.graph
    large = {tensor.name: tensor for tensor in model.graph.initializer if tensor_bytes(tensor) > LARGE}
    small = [tensor for tensor in model.graph.initializer if tensor.name not in large]
    graph.initializer.extend(small)
    for name, tensor in large.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    result = rewrite(lean)
    inputs = [value for value in result.graph.input if value.name not in large]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    result.graph.initializer.extend(large.values())
    return result
