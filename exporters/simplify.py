"""Simplifies a graph: onnxsim, then our own passes; outputs are compared before anything is returned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.graph_passes import PASSES
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
    "Simplification",
    "model_of",
    "put_weights_aside",
    "rewrite_onnx",
    "simplified",
    "simplify_onnx",
    "with_weights_aside",
]

onnx = lazy_import("onnx", extra="export")
ir = lazy_import("onnx_ir", extra="export")
ir_passes = lazy_import("onnx_ir.passes.common", extra="export")
onnxsim = lazy_import("onnxsim", extra="export")

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
