"""ONNX to ONNX: a smaller graph, or one in half precision; outputs are compared before anything is returned.

Simplifying is onnxsim, then passes of onnx_ir. The outputs of the graph keep their names, types and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.step_check import Runner, StepCheck, compare, feed_of, onnx_runner, recorded
from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError, ExportError, StepCheckError
from fcos_deploy.core.files import require_writable
from fcos_deploy.core.libraries import lazy_import, require
from fcos_deploy.core.onnx_file import (
    opset_of,
    sampling_nodes,
    save_onnx,
    tensor_bytes,
    with_contract,
    with_outputs,
    without_initializers,
)
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = [
    "LARGE",
    "Simplification",
    "convert_to_fp16",
    "half_precision",
    "merge_batch_norm_into_deform_conv",
    "model_of",
    "name_weights_after_convolutions",
    "put_weights_aside",
    "simplified",
    "simplify_onnx",
    "with_weights_aside",
]

ir = lazy_import("onnx_ir", extra="export")
ir_passes = lazy_import("onnx_ir.passes.common", extra="export")
onnx = lazy_import("onnx", extra="export")
onnxsim = lazy_import("onnxsim", extra="export")

_ROLES = {1: "weight", 2: "bias"}  # of a convolution's inputs


def _constant(value: Any) -> Any | None:
    """The NumPy array of an initializer, None for everything else."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def merge_batch_norm_into_deform_conv(model: Any) -> None:
    """What torch's exporter does for convolutions: scale the weights, and put the shift into the bias.

    Requires: weights and statistics are initializers, the weights of no other node. Ensures: the same values, to the
    rounding of the weights.
    """
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


_PASSES = (
    *("CommonSubexpressionEliminationPass", "DeduplicateInitializersPass"),
    *("IdentityEliminationPass", "RemoveUnusedNodesPass"),
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
    return _rewritten(
        source,
        output,
        step="simplify",
        rewrite=lambda model, contract, feeds: simplified(model, feeds, contract=contract),
        progress=progress,
    )


def _rewritten(source: Path, output: Path, *, step: str, rewrite: Rewrite, progress: ProgressFn) -> Simplification:
    """Write what ``rewrite`` makes of the graph of ``source``; an input that provokes differences is drawn for it."""
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
    smaller = _with_passes(_with_onnxsim(model), folder)
    result = smaller if smaller.ByteSize() <= model.ByteSize() else _with_passes(model, folder)
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


def _with_passes(model: Any, folder: Path | None) -> Any:
    graph = model_of(model, folder)
    # As onnx.shape_inference does by default, without the weights.
    ir_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(graph)
    while any(getattr(ir_passes, name)()(graph).modified for name in _PASSES):
        pass  # One pass may make room for another, which is over when none changes anything.
    name_weights_after_convolutions(graph)
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


# ---- fp32 to fp16: the network in half precision, everything around it and all inputs and outputs in float32 ----
# Runtimes of today take the precision from the graph (TensorRT 11 has no fp16 flag), so the casts stand in the file.
# onnxruntime's converter was tried: between two nodes that it is told to leave alone it still rounds to half and back,
# which costs decoded boxes a quarter of a pixel (docs/export.md).

_HALF_TOLERANCE = 3e-2  # relative; half precision keeps 11 bits, and some hundred layers add up their roundings
_ROW_SHARE = 0.1  # of candidates that change places, or cross the gate or another box's overlap, with that
_LARGEST = 65504.0  # the largest finite half precision number: (2 - 2**-10) * 2**15
_TENSORS_AT_ONCE = 32  # that are looked at in one run: bounds the memory
# The weights of these are half, but only these inputs: the others are sizes, scales and limits.
_FLOAT_INPUTS = {"Resize": (0,), "Clip": (0, 1, 2)}
_READ_NO_VALUES = {"Shape", "Size"}


def convert_to_fp16(source: Path, output: Path, *, progress: ProgressFn = no_progress) -> Simplification:
    """Write ``source`` with its network in half precision; inputs and outputs keep their types.

    Raises:
        BackendLoadError: ``source`` is not a complete ONNX model, or carries no contract.
        ExportError: a weight exceeds half precision.
        ConfigError: ``source`` is not fp32, or ``output`` cannot be written.
        StepCheckError: the result is further from its source than half precision explains.
    """

    def rewrite(model: Any, contract: ModelContract, feeds: list[Tensors]) -> tuple[Any, StepCheck]:
        result, check = half_precision(model, feeds, contract=contract)
        return with_contract(result, replace(contract, precision=Precision.FP16)), check

    return _rewritten(source, output, step="convert to fp16", rewrite=rewrite, progress=progress)


def half_precision(
    model: Any, feeds: list[Tensors], *, contract: ModelContract, folder: Path | None = None
) -> tuple[Any, StepCheck]:
    """``model`` (onnx.ModelProto, left as it is) with its network in half precision, compared on ``feeds``.

    ``folder`` has the weights that are not in it.

    Half are the convolutions and what lies between them. In float32 stay the normalisation of pixels in front, and
    behind the last convolutions everything: scale, exp, sigmoid, sqrt, decoding, ranking and suppression. Between them
    it is the sampling of deformable convolutions with their offsets. Raises as ``convert_to_fp16`` does.
    """
    if contract.precision is not Precision.FP32:
        raise ConfigError(f"Only an fp32 graph becomes fp16, this one is {contract.precision}.")
    graph = model_of(onnx.shape_inference.infer_shapes(model), folder)
    sampling = sampling_nodes(model)
    half = {node for node in _half_nodes(graph) if node.outputs[0].name not in sampling}
    values = (value for node in graph.graph if node in half for value in node.outputs)
    names = [value.name for value in values if value.dtype == ir.DataType.FLOAT]
    _Halving(graph, half).run()
    _require_in_range(model, names, feeds, folder)
    if folder is not None:
        put_weights_aside(graph, folder, name="weights.fp16")
    result = ir.to_proto(graph)
    del result.graph.value_info[:]
    del result.graph.output[:]
    result.graph.output.extend(model.graph.output)
    check = compare(
        recorded(onnx_runner(model, folder=folder), feeds),
        onnx_runner(result, folder=folder),
        feeds,
        step="convert to fp16",
        tolerance=_HALF_TOLERANCE,
        row_share=_ROW_SHARE,
        contract=contract,
    )
    return result, check


def _require_in_range(model: Any, names: list[str], feeds: list[Tensors], folder: Path | None) -> None:
    """Look at the float32 values themselves: a runtime may compute half nodes in float32 and never show an overflow.

    Raises:
        StepCheckError: a tensor that becomes half leaves its range.
    """
    for start in range(0, len(names), _TENSORS_AT_ONCE):
        run = onnx_runner(with_outputs(model, names[start : start + _TENSORS_AT_ONCE]), folder=folder)
        for feed in feeds:
            for name, array in run(feed).items():
                reach = float(np.abs(array).max(initial=0.0))
                if not reach <= _LARGEST:
                    raise StepCheckError(
                        f"Step 'convert to fp16': tensor '{name}' reaches {reach:.3g}, half precision ends at "
                        f"{_LARGEST:g}.",
                        hint="use --precision fp32",
                    )


def _half_nodes(model: Any) -> set[Any]:
    """Convolutions, and nodes with a convolution both before and after them."""
    nodes = list(model.graph)  # in topological order
    after: set[Any] = set()
    for node in nodes:
        if node.op_type == "Conv" or any(n in after for n in node.predecessors()):
            after.add(node)
    before: set[Any] = set()
    for node in reversed(nodes):
        if node.op_type == "Conv" or any(n in before for n in node.successors()):
            before.add(node)
    return after & before


class _Halving:
    """Turns a set of nodes to half precision in place, with one cast a tensor where the two formats meet."""

    def __init__(self, model: Any, half: set[Any]) -> None:
        self._graph = model.graph
        self._half = half
        self._halved: dict[int, Any] = {}  # id of a float32 value -> its half copy

    def run(self) -> None:
        """Convert inputs and weights, then outputs; drop the float32 weights that nothing reads any more."""
        nodes = [node for node in self._graph if node in self._half]
        for node in nodes:
            for index in _FLOAT_INPUTS.get(node.op_type, range(len(node.inputs))):
                value = node.inputs[index] if index < len(node.inputs) else None
                if value is None or value.producer() in self._half or value.dtype != ir.DataType.FLOAT:
                    continue
                if id(value) not in self._halved:
                    self._halved[id(value)] = self._weight(value) if value.is_initializer() else self._cast(value)
                node.replace_input_with(index, self._halved[id(value)])
        for node in nodes:
            for value in node.outputs:
                if value.dtype in (ir.DataType.FLOAT, None) and node.op_type not in _READ_NO_VALUES:
                    self._halve_output(value)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]

    def _weight(self, value: Any) -> Any:
        """A new initializer, ``value`` rounded to half precision."""
        array = value.const_value.numpy()
        if not bool(np.all(np.abs(array) <= _LARGEST)):
            raise ExportError(
                f"Weight '{value.name}' reaches {np.abs(array).max():.3g}, half precision ends at {_LARGEST:g}.",
                hint="use --precision fp32",
            )
        name = f"{value.name}.fp16"
        half = ir.Value(name=name, const_value=ir.tensor(array.astype(np.float16), name=name))
        half.shape, half.dtype = value.shape, ir.DataType.FLOAT16
        self._graph.initializers[name] = half
        return half

    def _cast(self, value: Any) -> Any:
        """``value`` in half precision, cast right behind the node that computes it."""
        node = _cast_node(value, to=ir.DataType.FLOAT16, name=f"{value.name}/to_fp16")
        if value.producer() is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(value.producer(), node)
        return node.outputs[0]

    def _halve_output(self, value: Any) -> None:
        """Make ``value`` half; nodes that stay in float32 read it cast back."""
        outside = [
            (use.node, use.idx)
            for use in value.uses()
            if use.node not in self._half and use.node.op_type not in _READ_NO_VALUES
        ]
        value.dtype = ir.DataType.FLOAT16
        if not outside and not value.is_graph_output():
            return
        back = _cast_node(value, to=ir.DataType.FLOAT, name=f"{value.name}/to_fp32")
        self._graph.insert_after(value.producer(), back)
        for node, index in outside:
            node.replace_input_with(index, back.outputs[0])
        if value.is_graph_output():
            # The cast takes the output's place and its name, so that the interface stays as it was.
            position = next(i for i, output in enumerate(self._graph.outputs) if output is value)
            back.outputs[0].name, value.name = value.name, f"{value.name}.fp16"
            self._graph.outputs[position] = back.outputs[0]


def _cast_node(value: Any, *, to: Any, name: str) -> Any:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], name=name)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = f"{name}_output", to, value.shape
    return node
