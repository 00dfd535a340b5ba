"""PyTorch to ONNX: trace the network with its tail, simplify it, and compare every step with PyTorch."""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import importlib
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.rewrite import (
    half_precision,
    merge_batch_norm_into_deform_conv,
    name_weights_after_convolutions,
    put_weights_aside,
    simplified,
    with_weights_aside,
)
from exporters.step_check import Runner, StepCheck, compare, onnx_runner, provoking_feed, recorded
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import DeformForm, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError, ExportError
from fcos_deploy.core.files import require_writable, scratch_directory
from fcos_deploy.core.libraries import lazy_import, require
from fcos_deploy.core.onnx_file import opset_of, save_onnx, with_contract
from fcos_deploy.core.progress import ProgressFn, no_progress

if TYPE_CHECKING:
    from fcos_deploy.checkpoints.load import LoadedCheckpoint
    from fcos_deploy.model.wrap import WrappedModule

__all__ = ["DEFAULT_OPSET", "ExportOptions", "OnnxExport", "export_onnx", "trace"]

torch = lazy_import("torch", extra="export")
onnx = lazy_import("onnx", extra="export")
ir = lazy_import("onnx_ir", extra="export")
ir_passes = lazy_import("onnx_ir.passes.common", extra="export")
onnxscript = lazy_import("onnxscript", extra="export")
tails = lazy_import("fcos_deploy.model.tails", extra="export")  # imports torch
fcos = lazy_import("fcos_deploy.model.fcos", extra="export")  # imports torch

DEFAULT_OPSET = 17  # docs/export.md has the measurements
_DEFORM_CONV = 19  # the first opset that has DeformConv
_OPSETS = range(16, 24)
_TRACED_OPSET = 18  # the exporter's own; older ones are converted afterwards, newer ones are asked for directly
_NATIVE_GROUP_NORM = 21  # the first opset whose GroupNormalization has a scale for every channel, as torch's has
_TOLERANCE = 1e-3  # relative; torch and ONNX Runtime sum convolutions in different orders
_OPEN_SIZE = (256, 320)  # example height and width where the graph leaves them open


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """``batch`` None leaves the batch open. ``nms_boxes`` is how many candidates the static form of NMS looks at.

    ``opset`` None is ``DEFAULT_OPSET``, or the first that has DeformConv where ``deform_form`` asks for it and the
    network has such layers.
    """

    opset: int | None = None
    tail: Tail = Tail.RAW
    batch: int | None = 1
    simplify: bool = True
    precision: Precision = Precision.FP32
    nms_form: NmsForm = NmsForm.ONNX
    nms_boxes: int = 1000
    deform_form: DeformForm = DeformForm.GRID_SAMPLE

    def __post_init__(self) -> None:
        if self.opset is not None and self.opset not in _OPSETS:
            raise ConfigError(
                f"Opset {self.opset} is not supported.",
                hint=f"choose {_OPSETS.start} to {_OPSETS.stop - 1}; docs/export.md says who reads which",
            )
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"The batch must be at least 1, got {self.batch}.", hint="--batch N, or --batch dynamic")
        if self.precision is Precision.INT8:
            raise ConfigError("An export is fp32 or fp16.", hint="INT8 is made by 'fcos-deploy quantize'")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """What was written, and what was measured on the way. ``parameter_bytes``: the weights' own size, each once."""

    path: Path
    contract: ModelContract
    opset: int
    nodes: int
    file_bytes: int
    parameter_bytes: int
    seconds: float
    checks: tuple[StepCheck, ...] = field(default=())

    def summary(self) -> str:
        """One line a check for people."""
        head = f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.file_bytes / 1e6:.2f} MB"
        return "\n".join([head, *(f"  {check}" for check in self.checks)])

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return {
            "path": str(self.path),
            "tail": str(self.contract.tail),
            "precision": str(self.contract.precision),
            "opset": self.opset,
            "nodes": self.nodes,
            "bytes": self.file_bytes,
            "parameter_bytes": self.parameter_bytes,
            "seconds": round(self.seconds, 3),
            "checks": [str(check) for check in self.checks],
        }


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Tracing makes millions of objects that stay; looking for garbage among them takes a tenth of the time.

    Collection belongs to the whole process: other threads are without it as well until the export is done.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def export_onnx(
    loaded: LoadedCheckpoint | WrappedModule,
    output: Path,
    *,
    options: ExportOptions | None = None,
    progress: ProgressFn = no_progress,
) -> OnnxExport:
    """Write ``loaded`` as an ONNX file that carries its contract; ``loaded`` stays as it is.

    Raises:
        ConfigError: impossible options, or a folder that cannot be written.
        ExportError: torch cannot export the model.
        StepCheckError: the graph, or a step on the way to it, does not give PyTorch's numbers.
    """
    options = options or ExportOptions()
    started = time.perf_counter()
    require_writable(output)
    form = options.nms_form if options.tail is Tail.NMS else NmsForm.ONNX
    contract = replace(loaded.contract, tail=options.tail, nms_form=form, precision=Precision.FP32)
    label, steps = "export to ONNX", 4
    progress(label, 0, steps)
    suppression = tails.StaticNms(boxes=options.nms_boxes) if form is NmsForm.STATIC else None
    network = _copied_without_weights(loaded.model).to(device="cpu").float()
    opset = _opset_for(network, options)
    # With what the detections are made from, which the checks look at: ready detections hide small differences, and
    # suppression turns a rounding that swaps two scores into another detection.
    module = tails.ExportableFcos(network, contract, suppression=suppression, with_sources=True).eval()
    feeds = _feeds(contract, batch=options.batch, image_sizes="image_sizes" in module.input_names)
    with scratch_directory(output) as folder:
        model = trace(
            module,
            tuple(torch.from_numpy(feeds[0][name].copy()) for name in module.input_names),
            opset=opset,
            dynamic_batch=options.batch is None,
            size_divisor=contract.preprocess.size_divisor if contract.preprocess.canvas is None else None,
            folder=folder,
        )
        progress(label, 1, steps)
        expected = recorded(_torch_runner(module), feeds)
        del module, network
        run = recorded(onnx_runner(model, folder=folder), feeds)
        checks = [compare(expected, run, feeds, step="export", tolerance=_TOLERANCE, contract=contract)]
        progress(label, 2, steps)
        if options.simplify:
            model, check = simplified(model, feeds, run=run, contract=contract, folder=folder)
            checks.append(check)
        progress(label, 3, steps)
        if options.precision is Precision.FP16:
            model, check = half_precision(model, feeds, contract=contract, folder=folder)
            checks.append(check)
            contract = replace(contract, precision=Precision.FP16)
        record = {"exporter": f"torch {torch.__version__} dynamo", "checks": "; ".join(map(str, checks))}
        model = with_contract(_without_extra_outputs(model, contract), contract, record=record)
        save_onnx(model, output, folder=folder)
    progress(label, steps, steps)
    return OnnxExport(
        path=output,
        contract=contract,
        opset=opset_of(model),
        nodes=len(model.graph.node),
        file_bytes=output.stat().st_size,
        parameter_bytes=sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        seconds=time.perf_counter() - started,
        checks=tuple(checks),
    )


def _opset_for(network: Any, options: ExportOptions) -> int:
    """The opset to export, once the deformable layers of ``network`` have the form that was asked for.

    Raises:
        ConfigError: an opset without DeformConv was asked for as well.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, fcos.DeformConv2d)]
    as_operator = bool(layers) and options.deform_form is DeformForm.OPERATOR
    for layer in layers:
        layer.as_operator = as_operator
    opset = options.opset or (_DEFORM_CONV if as_operator else DEFAULT_OPSET)
    if as_operator and opset < _DEFORM_CONV:
        raise ConfigError(
            f"ONNX has the operator DeformConv from opset {_DEFORM_CONV} on, not in {opset}.",
            hint=f"--opset {_DEFORM_CONV}, or --deform-form {DeformForm.GRID_SAMPLE}",
        )
    return opset


def _copied_without_weights(model: Any) -> Any:
    """A copy that shares the weights which need no conversion: nothing changes those."""
    tensors = (*model.parameters(), *model.buffers())
    as_needed = [t for t in tensors if t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in as_needed})


def _feeds(contract: ModelContract, *, batch: int | None, image_sizes: bool) -> list[Tensors]:
    """A feed of the traced example's shape; where axes are open, of a single image and of another size as well."""
    height, width = contract.preprocess.canvas or _OPEN_SIZE
    channels = contract.preprocess.channels
    count = batch or 2  # of an open batch not 1, which torch would take for a constant
    shapes = [(count, channels, height, width)]
    if batch is None:
        shapes.append((1, channels, height, width))
    if contract.preprocess.canvas is None:
        # 160x384 where sizes are multiples of 32, 161x385 where they may be any number.
        divisor = contract.preprocess.size_divisor
        rows, columns = (max(side // divisor, 1) * divisor for side in (height // 2 + 33, width + 65))
        shapes.append((count, channels, rows, columns))
    dtype = contract.preprocess.input_dtype.value
    return [provoking_feed(shape, dtype=dtype, image_sizes=image_sizes) for shape in shapes]


def _torch_runner(module: Any) -> Runner:
    def run(feeds: Tensors) -> Tensors:
        with torch.inference_mode():
            tensors = module(*(torch.from_numpy(feeds[name]) for name in module.input_names))
        return {name: tensor.numpy() for name, tensor in zip(module.output_names, tensors, strict=True)}

    return run


def _without_extra_outputs(model: Any, contract: ModelContract) -> Any:
    """The graph without the outputs that only the checks looked at; what only they needed goes with them."""
    outputs = [output for output in model.graph.output if output.name in contract.outputs]
    if len(outputs) == len(model.graph.output):
        return model
    trimmed = ir.from_proto(model)
    names = {output.name for output in outputs}
    kept = [value for value in trimmed.graph.outputs if value.name in names]
    trimmed.graph.outputs[:] = kept
    return ir.to_proto(ir_passes.RemoveUnusedNodesPass()(trimmed).model)


def trace(
    module: Any,
    example: tuple[Any, ...],
    *,
    opset: int,
    dynamic_batch: bool,
    size_divisor: int | None = None,
    folder: Path | None = None,
) -> Any:
    """The ``onnx.ModelProto`` of ``module``, an ``ExportableFcos`` in eval mode.

    ``size_divisor``: height and width are open, in multiples of it; None: fixed. ``folder``: where the weights are
    written to, in place of the model, which refers to them.
    Every weight is one initializer, however many levels use it. BatchNorm is folded into convolutions. Names of nodes
    and tensors say which module made them, with the level's number where a module runs once a level.

    Raises:
        ExportError: torch cannot trace the model, or the opset cannot express it.
    """
    traced_opset = max(opset, _TRACED_OPSET)
    graph = _program(module, example, opset=traced_opset, dynamic_batch=dynamic_batch, divisor=size_divisor).model
    _fold(graph)
    _name_after_modules(graph)
    name_weights_after_convolutions(graph)
    _shorten_dimensions(graph)
    # Stack traces of the exporting machine are a seventh of a small file, and show its folders.
    ir_passes.ClearMetadataAndDocStringPass()(graph)
    graph.metadata_props.clear()
    graph.producer_name, graph.producer_version = "fcos-deploy", ""
    if folder is not None:
        put_weights_aside(graph, folder, name="weights")
    if opset < traced_opset:
        _write_as_before(graph)
        model = _in_older_opset(ir.to_proto(graph), opset)
    else:
        model = ir.to_proto(graph)
    # What was inferred for tensors inside: runtimes infer it themselves, and trust it even where two open axes that
    # torch could not tell apart got one name.
    del model.graph.value_info[:]
    return model


def _write_as_before(model: Any) -> None:
    """Write what came with opset 18 as older opsets have it, where ONNX's converter cannot."""
    for node in list(model.graph):
        if node.op_type == "Split" and "num_outputs" in node.attributes:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            sizes = [output.shape[axis] for output in node.outputs if output.shape is not None]
            if len(sizes) == len(node.outputs) and all(isinstance(size, int) for size in sizes):
                name = f"{node.outputs[0].name}.sizes"
                value = ir.Value(name=name, const_value=ir.tensor(sizes, dtype=ir.DataType.INT64, name=name))
                model.graph.register_initializer(value)
                node.resize_inputs(2)
                node.replace_input_with(1, value)
                node.attributes.pop("num_outputs")
        elif node.op_type == "Mish":
            (source,) = node.inputs
            soft = ir.node("Softplus", [source])
            tanh = ir.node("Tanh", soft.outputs)
            product = ir.node("Mul", [source, *tanh.outputs])
            parts = [soft, tanh, product]
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], parts, node.outputs, product.outputs)


_ASIDE = "fcos_deploy.aside"  # a domain that ONNX's converter passes over


def _in_older_opset(model: Any, opset: int) -> Any:
    """The onnx.ModelProto of opset 18 in an older one.

    Raises:
        ExportError: the opset cannot express it.
    """
    # The converter refuses these from opset 18, whose one difference is an attribute or an input that they do not have.
    same = [
        node
        for node in model.graph.node
        if (node.op_type == "Split" and len(node.input) == 2) or (node.op_type == "Pad" and len(node.input) < 4)
    ]
    for node in same:
        node.domain = _ASIDE
    if same:
        model.opset_import.add(domain=_ASIDE, version=1)
    converter = require("onnx.version_converter", extra="export")
    try:
        model = with_weights_aside(model, lambda lean: converter.convert_version(lean, opset))
    except RuntimeError as error:
        raise ExportError(
            f"The graph cannot be expressed in opset {opset}: {error}.", hint=f"--opset {_TRACED_OPSET}"
        ) from error
    for node in model.graph.node:
        if node.domain == _ASIDE:
            node.domain = ""
        # The converter moves a reduction's axes back into its attributes, and leaves one that came with opset 18.
        kept = [item for item in node.attribute if item.name != "noop_with_empty_axes"]
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum" and len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    imports = [entry for entry in model.opset_import if entry.domain != _ASIDE]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    return model


def _program(module: Any, example: tuple[Any, ...], *, opset: int, dynamic_batch: bool, divisor: int | None) -> Any:
    """Torch's ONNXProgram of the module, with operators as ``_translations`` writes them."""
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=1024)} if dynamic_batch else {}
    other_inputs = [dict(axes) for _ in example[1:]]
    if divisor is not None:
        # Sizes up to the coarsest stride make a level of one row, which torch traces as a constant unless it can rule
        # them out; multiples of 32 it does not look into.
        minimum, limit = 1 if divisor % 32 == 0 else 128 // divisor + 1, 16384 // divisor
        rows, columns = (divisor * torch.export.Dim(name, min=minimum, max=limit) for name in ("rows", "columns"))
        axes |= {2: rows, 3: columns}
    shapes = (axes, *other_inputs) if axes else None

    def translate(program: Any) -> Any:
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=list(module.input_names),
            output_names=list(module.output_names),
            dynamic_shapes=shapes,
            custom_translation_table=_translations(opset=opset),
            optimize=False,
            verbose=False,
        )

    try:
        with _quiet(), _promoted_as_traced(), torch.no_grad():
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            return _translated_as_traced(program, translate) or translate(program)
    except Exception as error:  # torch wraps every failure of a traced model in types of its own
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ExportError(f"torch cannot export this model: {lines[-1].strip()}") from error


def _translated_as_traced(program: Any, translate: Callable[[Any], Any]) -> Any:
    """What ``translate`` makes of the program without decomposing it, None where an operator has no translation.

    Decomposing traces the program a second time, which takes as long as the first, to split up operators that ONNX has
    no counterpart of and to undo changes in place; operators of either kind are refused here. An FCOS has none.
    """
    decompose = program.run_decompositions
    program.run_decompositions = lambda *_arguments, **_options: program
    try:
        return translate(program)
    except torch.onnx.OnnxExporterError:
        return None
    finally:
        program.run_decompositions = decompose


@contextlib.contextmanager
def _promoted_as_traced() -> Iterator[None]:
    """Torch's exporter takes tensors from the trace where it looks for operands whose types differ.

    It would compute the shapes of all of them once more, a third of the export of a graph with open sizes; what it
    changes itself is still computed.
    """
    try:
        pass_: Any = importlib.import_module("torch.onnx._internal.fx.passes.type_promotion")
        promoting = pass_._TypePromotionInterpreter
    except (ImportError, AttributeError):  # another torch may do it otherwise
        yield
        return

    class Traced(torch.fx.Interpreter):  # type: ignore[misc, name-defined]  # torch is imported lazily
        unchanged: tuple[Any, ...] = ()

        def run_node(self, node: Any) -> Any:
            if "val" in node.meta and (node, node.target, node.args, node.kwargs) == self.unchanged:
                return node.meta["val"]
            return super().run_node(node)

    # Torch's calls of super().run_node are those of Traced here; the base is known when it runs.
    class Promoting(promoting, Traced):  # type: ignore[misc, valid-type]
        def run_node(self, node: Any) -> Any:
            self.unchanged = (node, node.target, node.args, node.kwargs)
            return super().run_node(node)

    pass_._TypePromotionInterpreter = Promoting
    try:
        yield
    finally:
        pass_._TypePromotionInterpreter = promoting


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's own remarks, none of which a user can act on."""
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
    rules = require("onnxscript.rewriter.rules.common", extra="export")
    ir_passes.InlinePass()(model)
    require("onnxscript.optimizer", extra="export").fold_constants(model)
    needed = (
        rules.fuse_batchnorm_into_conv_rule,
        rules.materialize_reshape_shape_rule,
        rules.mul_by_1_rule,
        rules.squeeze_reshape_1d_rule,
    )
    require("onnxscript.rewriter", extra="export").rewrite(model, needed)
    merge_batch_norm_into_deform_conv(model)
    for clean in (
        ir_passes.RemoveUnusedNodesPass(),
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        ir_passes.DeduplicateInitializersPass(),
        ir_passes.CommonSubexpressionEliminationPass(),
        ir_passes.OutputFixPass(),
        ir_passes.NameFixPass(),
    ):
        clean(model)


def _name_after_modules(model: Any) -> None:
    """Rename nodes and tensors to ``head.regression_head.conv.0/Conv_2``: the third call, so level P5."""
    outputs = {id(value) for value in model.graph.outputs}
    for initializer in list(model.graph.initializers.values()):
        initializer.name = initializer.name.removeprefix("model.")
    seen: collections.Counter[str] = collections.Counter()
    for node in model.graph:
        scope = _module_of(node)
        base = f"{scope}/{node.op_type}" if scope else node.op_type
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        seen[base] += 1
        for position, value in enumerate(node.outputs):
            if id(value) not in outputs:
                value.name = node.name + "_output" + (str(position) if position else "")


def _module_of(node: Any) -> str:
    """Name of the module that computed the node, ``head.conv``; empty for the network itself."""
    # A convolution's own name is in its weight's: one that a BatchNorm was folded into was recorded under the latter.
    weight = node.inputs[1].name if node.op_type in {"Conv", "DeformConv"} and node.inputs[1] is not None else ""
    if weight and ".weight" in weight:
        return str(weight.rpartition(".weight")[0])
    # torch records "['', 'model', 'model.head.conv', 'conv2d_3']": the modules from the outermost in, then the call.
    names = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    modules = [name for name in names[:-1] if name and not name.startswith("_empty_nn_module_stack")]
    return modules[-1].removeprefix("model").removeprefix(".") if modules else ""


def _shorten_dimensions(model: Any) -> None:
    """Name open axes ``batch``, ``height``, ``width``; forget the expressions that torch derives from them."""
    sizes = {"32*rows": "height", "32*columns": "width"}
    inputs = {id(value) for value in model.graph.inputs}
    for value in [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]:
        if value.shape is None or all(isinstance(dimension, int) for dimension in value.shape):
            continue
        names = sizes if id(value) in inputs else {}
        dimensions = [d if isinstance(d, int) else names.get(str(d.value), str(d.value)) for d in value.shape]
        value.shape = ir.Shape([d if isinstance(d, int) or d.isidentifier() else None for d in dimensions])


def _translations(*, opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """How operators are written in ONNX: ours, and those of torch that its exporter would decompose first."""
    require("fcos_deploy.model.tails", extra="export")  # registers ours, as does the network it imports
    own, aten = torch.ops.fcos_deploy, torch.ops.aten
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        own.nms_keep.default: _nms_keep,
        own.divide.default: _divide,
        own.deform_conv.default: _deform_conv,
        aten.batch_norm.default: _batch_norm,
        aten.detach_.default: _itself,
        aten.flatten.using_ints: _flatten,
        aten.to.dtype: _cast,
    }
    if opset < _NATIVE_GROUP_NORM:
        table[aten.group_norm.default] = _group_norm
    return table


def _itself(tensor: Any) -> Any:
    return onnxscript.opset18.Identity(tensor)


def _cast(tensor: Any, dtype: int, non_blocking: bool = False, copy: bool = False) -> Any:  # noqa: ARG001
    return onnxscript.opset18.Cast(tensor, to=dtype)


def _flatten(tensor: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """One Reshape that copies the axes in front, where torch's exporter would compute their sizes of an open batch."""
    op, rank = onnxscript.opset18, max(len(tensor.shape), 1)
    sizes = op.Constant(value_ints=[0] * (start_dim % rank) + [-1])
    after = end_dim % rank + 1
    return op.Reshape(tensor, sizes if after == rank else op.Concat(sizes, op.Shape(tensor, start=after), axis=0))


def _batch_norm(  # noqa: PLR0917  (the operator's own signature)
    images: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool = False,  # noqa: ARG001  (what is exported is in eval mode)
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    op = onnxscript.opset18
    return op.BatchNormalization(images, weight, bias, mean, variance, epsilon=eps)


def _group_norm(  # noqa: PLR0917  (the operator's own signature)
    images: Any,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    """InstanceNormalization with each group as one channel: what torch's exporter writes, less what it works out."""
    op = onnxscript.opset18
    ones, zeros = (op.Constant(value_floats=[value] * groups) for value in (1.0, 0.0))
    grouped = op.Reshape(images, op.Constant(value_ints=[0, groups, -1]))
    result = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(images))
    inner = op.Constant(value_ints=list(range(1, len(images.shape) - 1)))
    result = result if weight is None else op.Mul(result, op.Unsqueeze(weight, inner))
    return result if bias is None else op.Add(result, op.Unsqueeze(bias, inner))


def _deform_conv(  # noqa: PLR0917  (the operator's own signature)
    images: Any,
    weight: Any,
    offsets: Any,
    bias: Any = None,
    mask: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    deform_groups: int = 1,
) -> Any:
    return onnxscript.opset19.DeformConv(
        *(images, weight, offsets, bias, mask),
        dilations=list(dilation),
        group=groups,
        kernel_shape=list(weight.shape[2:]),
        offset_group=deform_groups,
        pads=[*padding, *padding],
        strides=list(stride),
    )


def _divide(index: Any, divisor: int) -> Any:
    op = onnxscript.opset18
    return op.Div(index, op.Constant(value_int=divisor))


def _nms_keep(  # noqa: PLR0917  (the operator's own signature)
    boxes: Any, scores: Any, labels: Any, classes: int, iou_threshold: float, limit: int
) -> Any:
    """NonMaxSuppression once over (n, classes, K) scores, and its list of survivors as a mask of fixed shape.

    A score plane of its own for each class keeps suppression exact: moving classes apart by adding to
    coordinates, as most exports do, costs their last bits.
    """
    op = onnxscript.opset18
    channel = onnx.helper.make_tensor("channels", onnx.TensorProto.INT64, [1, classes, 1], list(range(classes)))
    axis = op.Constant(value_ints=[1])
    of_class = op.Equal(op.Unsqueeze(labels, axis), op.Constant(value=channel))
    planes = op.Where(of_class, op.Unsqueeze(scores, axis), op.Constant(value_float=-1.0))
    selected = op.NonMaxSuppression(
        boxes,
        planes,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
        center_point_box=0,
    )
    image_and_row = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(selected, start=0, end=1))
    mask = op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), image_and_row, ones)
    return op.Greater(mask, op.Constant(value_float=0.5))
