"""fp32 ONNX -> fp16 ONNX: the network in half precision, everything around it and all inputs and outputs in float32.

Runtimes of today take the precision from the graph (TensorRT 11 has no fp16 flag), so the casts stand in the file.
onnxruntime's converter was tried: between two nodes that it is told to leave alone it still rounds to half and back,
which costs decoded boxes a quarter of a pixel (docs/export.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.simplify import Simplification, model_of, put_weights_aside, rewrite_onnx
from exporters.step_check import StepCheck, compare, onnx_runner, recorded
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError, ExportError, StepCheckError
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_graph import sampling_nodes, with_contract
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["convert_to_fp16", "half_precision"]

onnx = lazy_import("onnx", extra="export")
ir = lazy_import("onnx_ir", extra="export")

_TOLERANCE = 3e-2  # relative; half precision keeps 11 bits, and some hundred layers add up their roundings
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

    return rewrite_onnx(source, output, step="convert to fp16", rewrite=rewrite, progress=progress)


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
        tolerance=_TOLERANCE,
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
        shown = onnx.ModelProto()
        shown.CopyFrom(model)
        del shown.graph.output[:]
        group = names[start : start + _TENSORS_AT_ONCE]
        shown.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in group)
        run = onnx_runner(shown, folder=folder)
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
