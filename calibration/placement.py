"""Where quantization goes: the convolutions and residual additions of a graph, and each consumer's rules for them.

The quantizable part of a graph is found by structure, never by name, so that any exporter's graph will do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.enums import Precision, StrEnum
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.onnx_file import sampling_nodes

__all__ = [
    "PLACEMENTS",
    "ActivationFormat",
    "AddRule",
    "ConvGraph",
    "ConvSite",
    "Placement",
    "QdqPlan",
    "ResidualAdd",
    "ResultRule",
    "WeightRange",
    "open_graph",
    "placement_for",
    "plan_pairs",
]


@dataclass(frozen=True, slots=True)
class ConvSite:
    """One convolution node.

    ``layer`` is its weight's name: the levels that share a head share it. ``activation`` is the one that directly and
    alone follows, as ONNX names it, and ``result`` the tensor after it; without one '' and ``output``.
    ``is_prediction``: no other convolution comes after it. ``stays_float``: it is deformable (the
    operator DeformConv), or gives the offsets of one that is.
    """

    name: str
    layer: str
    input: str
    output: str
    activation: str
    result: str
    weight: str
    bias: str
    is_prediction: bool
    stays_float: bool = False


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """An addition of two activations that a convolution reads later (block residuals, the pyramid's top-down path).

    ``branch`` is the input whose convolution can fuse with the addition, ``skip`` the other.
    """

    name: str
    branch: str
    skip: str
    output: str
    activation: str
    result: str


# What a range cuts off anyway: rounding the tensor behind them to eight bits makes them free of charge.
_CLIPPING = ("Relu", "Clip")
# Of one tensor, element by element. Swish also stands for its form before opset 24: x * Sigmoid(x).
_ACTIVATIONS = (*_CLIPPING, "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish")
# Activations that are written as a product of a tensor with its own gate.
_GATED = {"Sigmoid": "Swish", "HardSigmoid": "HardSwish"}


@dataclass(frozen=True, slots=True)
class ConvGraph:
    """The quantizable part of one float ONNX graph.

    copies: (node, input, output) of the copying operators between convolutions and additions.
    initializers: the constants, onnx.TensorProto by name.
    activations: every tensor that some placement may quantize, in graph order, each once.
    """

    source: OnnxGraph
    convs: tuple[ConvSite, ...]
    adds: tuple[ResidualAdd, ...]
    copies: tuple[tuple[str, str, str], ...]
    initializers: dict[str, Any] = field(repr=False)
    activations: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the distinct convolution weights, in graph order."""
        return tuple(dict.fromkeys(conv.layer for conv in self.convs))


def open_graph(path: Path) -> ConvGraph:
    """Open a float ONNX file and find its convolutions.

    Raises:
        BackendLoadError: the file is missing, damaged, or carries no contract.
        CalibrationError: the graph is not float, or has no convolution with constant weights.
    """
    source = OnnxGraph(path)
    model = source.model
    if source.contract.precision is not Precision.FP32:
        raise CalibrationError(f"'{path}' is {source.contract.precision}.", hint="give the fp32 graph")
    scan = _Scan(model)
    convs = tuple(scan.site(node) for node in scan.nodes if scan.is_conv(node))
    if not convs:
        raise CalibrationError(f"'{path}' has no convolution with constant weights.", hint="simplify it first")
    adds = tuple(scan.add(node) for node in scan.nodes if scan.is_residual_add(node))
    ends = dict.fromkeys(name for conv in convs for name in (conv.input, conv.result))
    sites: tuple[ConvSite | ResidualAdd, ...] = (*convs, *adds)
    # Not every placement fuses these.
    ends |= dict.fromkeys(site.output for site in sites if site.activation not in _CLIPPING)
    ends |= dict.fromkeys(name for add in adds for name in (add.branch, add.skip, add.result))
    copies = tuple(
        (scan.name(node), node.input[0], node.output[0])
        for node in scan.nodes
        if scan.copies_exactly(node) and {node.input[0], node.output[0]} <= set(ends)
    )
    position = {name: index for index, node in enumerate(scan.nodes) for name in node.output}
    activations = tuple(sorted(ends, key=lambda name: position.get(name, -1)))
    return ConvGraph(source, convs, adds, copies, scan.initializers, activations)


class _Scan:
    """What can be asked of single nodes. ONNX demands nodes in topological order, which the walks here rely on."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.consumers[name].append(node)
        self.graph_outputs = {output.name for output in model.graph.output}
        self.feeds_conv = self._feeds_conv()
        self.depth = self._conv_depth()
        self.sampling = sampling_nodes(model)

    def is_conv(self, node: Any) -> bool:
        return node.op_type in {"Conv", "DeformConv"} and node.input[1] in self.initializers

    def is_residual_add(self, node: Any) -> bool:
        constant = any(name in self.initializers for name in node.input)
        if node.op_type != "Add" or constant or node.output[0] not in self.feeds_conv:
            return False
        return all(self.depth.get(name, 0) > 0 for name in node.input)

    @staticmethod
    def copies_exactly(node: Any) -> bool:
        """Whether a quantized input gives a quantized output of the same scale: values move and do not change."""
        if node.op_type == "Resize":
            return all(attribute.s == b"nearest" for attribute in node.attribute if attribute.name == "mode")
        return bool(node.op_type == "MaxPool")

    @staticmethod
    def name(node: Any) -> str:
        return str(node.name or node.output[0])

    def site(self, node: Any) -> ConvSite:
        output = str(node.output[0])
        activation, result = self._activation(output)
        return ConvSite(
            name=self.name(node),
            layer=str(node.input[1]),
            input=str(node.input[0]),
            output=output,
            activation=activation,
            result=result,
            weight=str(node.input[1]),
            bias=str(node.input[2]) if node.op_type == "Conv" and len(node.input) > 2 else "",
            is_prediction=output not in self.feeds_conv,
            stays_float=output in self.sampling,
        )

    def add(self, node: Any) -> ResidualAdd:
        first, second = (str(name) for name in node.input)
        # Only a convolution directly before the addition can fuse with it; of two, the one on the longer way.
        made_by_conv = {name: name in self.producers and self.is_conv(self.producers[name]) for name in (first, second)}
        branch, skip = sorted((first, second), key=lambda name: (not made_by_conv[name], -self.depth[name]))
        output = str(node.output[0])
        return ResidualAdd(self.name(node), branch, skip, output, *self._activation(output))

    def _activation(self, tensor: str) -> tuple[str, str]:
        """The activation that directly and alone reads a tensor, and its result; '' and the tensor where none does."""
        users = self.consumers[tensor]
        if tensor in self.graph_outputs or not users:
            return "", tensor
        first, *others = users
        if not others:
            constant = all(not name or name in self.initializers for name in first.input[1:])
            return (first.op_type, str(first.output[0])) if first.op_type in _ACTIVATIONS and constant else ("", tensor)
        gate, product = sorted(users[:2], key=lambda node: node.op_type == "Mul")
        if len(users) == 2 and gate.op_type in _GATED and product.op_type == "Mul":
            gated = set(product.input) == {tensor, gate.output[0]} and len(self.consumers[gate.output[0]]) == 1
            return (_GATED[gate.op_type], str(product.output[0])) if gated else ("", tensor)
        return "", tensor

    def _feeds_conv(self) -> set[str]:
        """Tensors from which a convolution can be reached."""
        reaching: set[str] = set()
        for node in reversed(self.nodes):
            if node.op_type == "Conv" and self.is_conv(node):
                reaching.add(node.input[0])
            elif not reaching.isdisjoint(node.output):
                reaching.update(name for name in node.input if name not in self.initializers)
        return reaching

    def _conv_depth(self) -> dict[str, int]:
        """Most convolutions on any way from the image to each tensor."""
        depth: dict[str, int] = defaultdict(int)
        for node in self.nodes:
            here = max((depth[name] for name in node.input if name), default=0) + (node.op_type == "Conv")
            for name in node.output:
                depth[name] = here
        return depth


class ActivationFormat(StrEnum):
    """Eight-bit format of activations; weights are always signed, symmetric and per output channel."""

    S8_SYMMETRIC = "s8-symmetric"
    U8_ASYMMETRIC = "u8-asymmetric"


class ResultRule(StrEnum):
    """What leaves a quantized convolution.

    ``float``. ``quantized``: wherever another convolution reads it later. ``chained``: only where a convolution, an
    addition or a copy reads it next, so that norms read floats.
    """

    FLOAT = "float"
    CHAINED = "chained"
    QUANTIZED = "quantized"


class AddRule(StrEnum):
    """Of residual additions, the skip input is quantized (TensorRT fuses the rest), or the whole addition."""

    SKIP_INPUT = "skip-input"
    WHOLE = "whole"


class WeightRange(StrEnum):
    """Integers that weights may take.

    ``full``: -127 to 127. ``reduced``: -64 to 64. x86 processors without VNNI multiply unsigned activations with signed
    weights by an instruction (PMADDUBSW) that adds two products in sixteen bits and saturates at 32767: 2 * 255 * 127 =
    64770 overflows, 2 * 255 * 64 = 32640 does not. ``pairwise``: full unless two weights that such an instruction adds
    could overflow; the channel's scale is then just large enough that they cannot.
    """

    FULL = "full"
    REDUCED = "reduced"
    PAIRWISE = "pairwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One consumer's rules. ``backends``: whose runtime this placement was measured to be best for.

    ``fuses``: the activations, as ONNX names them, that the runtime computes within the convolution before them.
    Nothing is quantized in between.
    """

    name: str
    backends: tuple[str, ...]
    activations: ActivationFormat
    fuses: tuple[str, ...] = _ACTIVATIONS
    # Safe on every processor, at less than one bit's cost; a GPU would take FULL as well (docs/int8.md).
    weights: WeightRange = WeightRange.PAIRWISE
    results: ResultRule = ResultRule.FLOAT
    adds: AddRule = AddRule.SKIP_INPUT
    ignore_predictions: bool = False


PLACEMENTS: dict[str, Placement] = {
    placement.name: placement
    for placement in (
        Placement(
            name="portable",
            backends=("tensorrt", "tensorrt-rtx"),
            activations=ActivationFormat.S8_SYMMETRIC,
        ),
        Placement(
            name="onnxruntime-cpu",
            backends=("onnxruntime",),
            activations=ActivationFormat.U8_ASYMMETRIC,
            fuses=_CLIPPING,  # QLinearConv has no activation but the ends of its result's range.
            results=ResultRule.QUANTIZED,
            adds=AddRule.WHOLE,
            ignore_predictions=True,
        ),
        Placement(
            name="openvino",
            backends=("openvino",),
            activations=ActivationFormat.U8_ASYMMETRIC,
            results=ResultRule.CHAINED,
            adds=AddRule.WHOLE,
        ),
    )
}


def placement_for(consumer: str, *, weights: str = "") -> Placement:
    """The placement for a backend or of this name; ``weights`` names another range of weights than its own.

    Raises:
        ConfigError: naming the ones that exist.
    """
    named = {**{backend: p for p in PLACEMENTS.values() for backend in p.backends}, **PLACEMENTS}
    if consumer not in named:
        raise ConfigError(
            f"There is no INT8 placement for '{consumer}'.", hint=f"choose one of {', '.join(sorted(named))}"
        )
    ranges = [str(kind) for kind in WeightRange]
    if weights and weights not in ranges:
        raise unknown_name("range of weights", weights, ranges)
    return replace(named[consumer], weights=WeightRange(weights)) if weights else named[consumer]


@dataclass(frozen=True, slots=True)
class QdqPlan:
    """A placement applied to one graph.

    convs: the convolutions that compute in eight bits.
    readers: for each tensor that gets a Q/DQ pair, the nodes that read the dequantized value; None means all of them.
    scale_of: for tensors that a copying operator wrote, the tensor whose scale they take.
    """

    graph: ConvGraph
    placement: Placement
    convs: tuple[ConvSite, ...]
    readers: dict[str, frozenset[str] | None]
    scale_of: dict[str, str]


def plan_pairs(
    graph: ConvGraph,
    placement: Placement,
    *,
    ignored_layers: Collection[str] = (),
    zero_tensors: Collection[str] = (),
) -> QdqPlan:
    """Which tensors get a Q/DQ pair. ``ignored_layers`` names layers, or single nodes, that stay in float.

    ``zero_tensors`` have no range and get no pair; the convolutions that read or write them stay in float.

    Raises:
        ConfigError: a name that the graph does not have.
        CalibrationError: nothing would be quantized.
    """
    unknown = sorted(set(ignored_layers) - {name for conv in graph.convs for name in (conv.layer, conv.name)})
    if unknown:
        raise ConfigError(f"The graph has no layer {unknown}.", hint=f"such as {', '.join(graph.layers[:4])}")
    convs = tuple(
        conv
        for conv in graph.convs
        if not (placement.ignore_predictions and conv.is_prediction)
        and not conv.stays_float
        and conv.layer not in ignored_layers
        and conv.name not in ignored_layers
        and not {conv.input, conv.output, conv.result} & set(zero_tensors)
    )
    if not convs:
        raise CalibrationError("Every convolution would stay float.", hint="leave the model in fp32")
    if placement.results is ResultRule.FLOAT:
        plan = QdqPlan(graph, placement, convs, _pairs_on_inputs(graph, placement, convs), {})
    else:
        plan = _pairs_on_results(graph, placement, convs)
    return replace(plan, readers={name: nodes for name, nodes in plan.readers.items() if name not in zero_tensors})


def _pairs_on_inputs(
    graph: ConvGraph, placement: Placement, convs: tuple[ConvSite, ...]
) -> dict[str, frozenset[str] | None]:
    """Pairs on what convolutions and fusing additions read; everybody else keeps reading the float value."""
    readers: dict[str, set[str]] = {}
    for conv in convs:
        readers.setdefault(conv.input, set()).add(conv.name)
    fusing = {conv.output for conv in convs}
    for add in graph.adds:
        if placement.adds is AddRule.SKIP_INPUT and add.branch in fusing:
            readers.setdefault(add.skip, set()).add(add.name)
    return {name: frozenset(nodes) for name, nodes in readers.items()}


def _pairs_on_results(graph: ConvGraph, placement: Placement, convs: tuple[ConvSite, ...]) -> QdqPlan:
    """Pairs on inputs and results, read by everybody, so that whole chains stay in eight bits."""
    chained = {name for add in graph.adds for name in (add.branch, add.skip)}
    chained |= {source for _, source, _ in graph.copies}
    everywhere = placement.results is ResultRule.QUANTIZED
    paired = dict.fromkeys(conv.input for conv in convs)
    for conv in convs:
        if not conv.is_prediction and (everywhere or conv.result in chained):
            paired |= dict.fromkeys(_written_by(conv, placement))
    scale_of: dict[str, str] = {}
    growing = True
    while growing:  # An addition may need the result of a resize that needs the result of an addition.
        before = len(paired)
        for add in graph.adds:
            if placement.adds is AddRule.WHOLE and {add.branch, add.skip} <= set(paired):
                paired |= dict.fromkeys(_written_by(add, placement))
        for _, source, result in graph.copies:
            if source in paired:
                paired[result] = None
                scale_of[result] = source
        growing = len(paired) > before
    return QdqPlan(graph, placement, convs, dict.fromkeys(paired), scale_of)


def _written_by(site: ConvSite | ResidualAdd, placement: Placement) -> tuple[str, ...]:
    """What leaves the kernel of a convolution or addition, and what leaves an activation that it does not fuse."""
    fused = not site.activation or site.activation in placement.fuses
    return (site.result,) if fused else (site.output, site.result)
