"""From an ``ExportableFcos`` to an ONNX graph: traced, constants folded, named after the modules."""

from __future__ import annotations

import collections
import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from exporters._onnx_operators import translations
from exporters._weights_aside import with_weights_aside
from exporters.graph_passes.weight_names import name_weights_after_convolutions
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ExportError
from fcos_deploy.core.require import require

__all__ = ["OPSETS", "Axes", "trace"]

OPSETS = range(17, 24)
_TRACED_OPSET = 18  # the exporter's own; older ones are converted afterwards, newer ones are asked for directly


class Axes(StrEnum):
    """Axes of the input that the graph leaves open, beside the batch."""

    FIXED = "fixed"
    DYNAMIC = "dynamic"


def trace(module: Any, example: tuple[Any, ...], *, opset: int, dynamic_batch: bool, size: Axes) -> Any:
    """The ``onnx.ModelProto`` of ``module``, an ``ExportableFcos`` in eval mode.

    Every weight is one initializer, however many levels use it. BatchNorm is folded into convolutions. Names of nodes
    and tensors say which module made them, with the level's number where a module runs once a level.

    Raises:
        ExportError: torch cannot trace the model, or the opset cannot be had.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"Opset {opset} is not supported.", hint=f"choose {OPSETS.start} to {OPSETS.stop - 1}; see docs/export.md"
        )
    program = _program(module, example, opset=max(opset, _TRACED_OPSET), dynamic_batch=dynamic_batch, size=size)
    _fold(program.model)
    _name_after_modules(program.model)
    name_weights_after_convolutions(program.model)
    _shorten_dimensions(program.model)
    _drop_metadata(program.model)
    model = _to_proto(program.model)
    if opset < _TRACED_OPSET:
        model = _lower(model, opset)
    # What was inferred for tensors inside: runtimes infer it themselves, and trust it even where two open axes that
    # torch could not tell apart got one name.
    del model.graph.value_info[:]
    return model


def _program(module: Any, example: tuple[Any, ...], *, opset: int, dynamic_batch: bool, size: Axes) -> Any:
    torch = require("torch", extra="export")
    shapes = _dynamic_shapes(len(example), dynamic_batch=dynamic_batch, size=size)

    def translated(program: Any) -> Any:
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(module.input_names),
            output_names=list(module.output_names),
            dynamic_shapes=shapes,
            custom_translation_table=translations(opset=opset),
            optimize=False,
            verbose=False,
        )

    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            return _translated_as_traced(program, translated) or translated(program)
    except Exception as error:  # torch wraps every failure of a traced model in types of its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ExportError(f"torch cannot export this model: {lines[-1].strip()}") from error


def _translated_as_traced(program: Any, translated: Callable[[Any], Any]) -> Any:
    """What ``translated`` makes of the program without decomposing it, None where an operator has no translation.

    Decomposing traces the program a second time, which takes as long as the first, to split up operators that ONNX has
    no counterpart of and to undo changes in place; operators of either kind are refused here. An FCOS has none.
    """
    torch = require("torch", extra="export")
    decompose = program.run_decompositions
    program.run_decompositions = lambda *_arguments, **_options: program
    try:
        return translated(program)
    except torch.onnx.OnnxExporterError:
        return None
    finally:
        program.run_decompositions = decompose


def _dynamic_shapes(inputs: int, *, dynamic_batch: bool, size: Axes) -> tuple[dict[int, Any], ...] | None:
    torch = require("torch", extra="export")
    axes: dict[int, Any] = {}
    if dynamic_batch:
        axes[0] = torch.export.Dim("batch", min=1, max=1024)
    if size is Axes.DYNAMIC:
        axes[2] = 32 * torch.export.Dim("rows", min=1, max=512)
        axes[3] = 32 * torch.export.Dim("columns", min=1, max=512)
    if not axes:
        return None
    return (axes, *({k: v for k, v in axes.items() if k == 0} for _ in range(inputs - 1)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own remarks, none of which a user can act on."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        # torch 2.13 deprecates a check that its own exporter still makes.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # It renames dynamic axes to the names given, which is what was asked for.
        warnings.filterwarnings("ignore", message=".*# The axis name.*", category=UserWarning)
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _fold(model: Any) -> None:
    """Constants, shapes and BatchNorm: what an FCOS needs of all that torch looks for with ``optimize=True``."""
    passes = require("onnx_ir.passes.common", extra="export")
    rules = require("onnxscript.rewriter.rules.common", extra="export")
    passes.InlinePass()(model)
    require("onnxscript.optimizer", extra="export").fold_constants(model)
    needed = (
        rules.fuse_batchnorm_into_conv_rule,
        rules.materialize_reshape_shape_rule,
        rules.mul_by_1_rule,
        rules.squeeze_reshape_1d_rule,
    )
    require("onnxscript.rewriter", extra="export").rewrite(model, needed)
    for clean in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        clean(model)


def _name_after_modules(model: Any) -> None:
    """Rename nodes and tensors to ``head.regression_head.conv.0/Conv_2``: the third call, so level P5."""
    outputs = {id(value) for value in model.graph.outputs}
    for initializer in list(model.graph.initializers.values()):
        initializer.name = initializer.name.removeprefix("model.")
    seen: collections.Counter[str] = collections.Counter()
    for node in model.graph:
        scope = _weight_owner(node) or _scope(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        for position, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = node.name + "_output" + (str(position) if position else "")


def _weight_owner(node: Any) -> str:
    """The convolution's module, by its weight: one that a BatchNorm was folded into was recorded under the latter."""
    weight = node.inputs[1] if node.op_type == "Conv" else None
    return weight.name.rpartition(".weight")[0] if weight is not None and weight.name else ""


def _scope(recorded: str) -> str:
    """``"['', 'model', 'model.head.conv', 'conv2d_3']"`` -> ``head.conv``."""
    names = re.findall(r"'([^']*)'", recorded)
    modules = [name for name in names[:-1] if name and not name.startswith("_empty_nn_module_stack")]
    return modules[-1].removeprefix("model").removeprefix(".") if modules else ""


def _shorten_dimensions(model: Any) -> None:
    """Name open axes ``batch``, ``height``, ``width``; forget the expressions that torch derives from them."""
    ir = require("onnx_ir", extra="export")
    names = {"32*rows": "height", "32*columns": "width"}
    inputs = {id(value) for value in model.graph.inputs}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is None or all(isinstance(d, int) for d in value.shape):
            continue
        short = [_short(d, names, keep=id(value) in inputs) for d in value.shape]
        value.shape = ir.Shape(short)


def _short(dimension: Any, names: dict[str, str], *, keep: bool) -> int | str | None:
    if isinstance(dimension, int):
        return dimension
    text = str(dimension.value)
    if text in names and keep:
        return names[text]
    return text if text.isidentifier() else None


def _drop_metadata(model: Any) -> None:
    """Stack traces of the exporting machine are a seventh of a small file, and nobody's business."""
    passes = require("onnx_ir.passes.common", extra="export")
    passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "fcos-deploy", ""


def _to_proto(model: Any) -> Any:
    return require("onnx_ir", extra="export").to_proto(model)


def _lower(model: Any, opset: int) -> Any:
    converter = require("onnx.version_converter", extra="export")
    try:
        return with_weights_aside(model, lambda lean: converter.convert_version(lean, opset))
    except RuntimeError as error:
        raise ExportError(
            f"The graph cannot be expressed in opset {opset}: {error}.", hint=f"--opset {_TRACED_OPSET}"
        ) from error
