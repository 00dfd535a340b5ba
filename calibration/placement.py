"""What a quantizer has to know of an ONNX graph: its convolutions, its residual additions and what lies between.

Everything is found by structure, never by name, so that any exporter's graph will do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.libraries import require

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
    "load_graph",
    "placement_for",
    "plan_pairs",
    "weight_range",
]

# Operators that move values without changing them: a quantized input gives a quantized output of the same scale.
_COPIES = frozenset({"MaxPool", "Resize"})


@dataclass(frozen=True, slots=True)
class ConvSite:
    """One convolution node.

    ``layer`` is its weight's name: the levels that share a head share it. ``result`` is the tensor after the ReLU that
    directly and alone follows, otherwise ``output``. ``is_prediction``: no other convolution comes after it.
    """

    name: str
    layer: str
    input: str
    output: str
    result: str
    weight: str
    bias: str
    is_prediction: bool


@dataclass(frozen=True, slots=True)
class ResidualAdd:
    """An addition of two activations that a convolution reads later (block residuals, the pyramid's top-down path).

    ``branch`` is the input whose convolution can fuse with the addition, ``skip`` the other.
    """

    name: str
    branch: str
    skip: str
    output: str
    result: str


@dataclass(frozen=True, slots=True)
class ConvGraph:
    """The quantizable part of one ONNX model; ``model`` is not changed by anyone."""

    path: Path
    model: Any  # onnx.ModelProto; the onnx package has no types
    convs: tuple[ConvSite, ...]
    adds: tuple[ResidualAdd, ...]
    copies: tuple[tuple[str, str, str], ...]  # (node, input, output) of the copying operators on the way
    initializers: dict[str, Any] = field(repr=False)  # onnx.TensorProto

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the distinct convolution weights, in graph order."""
        return tuple(dict.fromkeys(conv.layer for conv in self.convs))

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return max((int(o.version) for o in self.model.opset_import if o.domain in {"", "ai.onnx"}), default=0)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return tuple(output.name for output in self.model.graph.output)

    def activations(self) -> tuple[str, ...]:
        """Every tensor that some placement may quantize, in graph order, each once."""
        found: dict[str, None] = {}
        for conv in self.convs:
            found[conv.input] = found[conv.result] = None
        for add in self.adds:
            found[add.branch] = found[add.skip] = found[add.result] = None
        for _, source, result in self.copies:
            found[source] = found[result] = None
        position = {name: i for i, node in enumerate(self.model.graph.node) for name in node.output}
        return tuple(sorted(found, key=lambda name: position.get(name, -1)))


def load_graph(path: Path) -> ConvGraph:
    """Read an ONNX file and find its convolutions.

    Raises:
        CalibrationError: the file is not a complete ONNX model, or has no convolution with constant weights.
    """
    onnx = require("onnx", extra="export")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except FileNotFoundError as error:
        raise CalibrationError(f"'{path}' is not there.") from error
    except Exception as error:
        raise CalibrationError(f"'{path}' is not a complete ONNX model: {error}.", hint="export it again") from error
    graph = _Scan(model).result(path)
    if not graph.convs:
        raise CalibrationError(f"'{path}' has no convolution with constant weights.", hint="simplify it first")
    return graph


class _Scan:
    """One walk over the nodes, in the topological order that ONNX demands."""

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

    def result(self, path: Path) -> ConvGraph:
        convs = tuple(self._site(node) for node in self.nodes if self._is_conv(node))
        adds = tuple(self._add(node) for node in self.nodes if self._is_residual_add(node))
        reached = {name for conv in convs for name in (conv.input, conv.result)}
        reached |= {name for add in adds for name in (add.branch, add.skip, add.result)}
        copies = tuple(
            (self._name(n), n.input[0], n.output[0])
            for n in self.nodes
            if n.op_type in _COPIES and {n.input[0], n.output[0]} <= reached and self._copies_exactly(n)
        )
        return ConvGraph(path, self.model, convs, adds, copies, self.initializers)

    def _is_conv(self, node: Any) -> bool:
        return node.op_type == "Conv" and node.input[1] in self.initializers

    def _is_residual_add(self, node: Any) -> bool:
        constant = any(name in self.initializers for name in node.input)
        if node.op_type != "Add" or constant or node.output[0] not in self.feeds_conv:
            return False
        return all(self.depth.get(name, 0) > 0 for name in node.input)

    @staticmethod
    def _copies_exactly(node: Any) -> bool:
        if node.op_type != "Resize":
            return True
        return all(a.s == b"nearest" for a in node.attribute if a.name == "mode")

    @staticmethod
    def _name(node: Any) -> str:
        return str(node.name or node.output[0])

    def _site(self, node: Any) -> ConvSite:
        output = str(node.output[0])
        return ConvSite(
            name=self._name(node),
            layer=str(node.input[1]),
            input=str(node.input[0]),
            output=output,
            result=self._after_relu(output),
            weight=str(node.input[1]),
            bias=str(node.input[2]) if len(node.input) > 2 else "",
            is_prediction=output not in self.feeds_conv,
        )

    def _add(self, node: Any) -> ResidualAdd:
        first, second = (str(name) for name in node.input)
        # Only a convolution directly before the addition can fuse with it; of two, the one on the longer way.
        branch, skip = sorted((first, second), key=lambda name: (not self._made_by_conv(name), -self.depth[name]))
        return ResidualAdd(self._name(node), branch, skip, str(node.output[0]), self._after_relu(str(node.output[0])))

    def _made_by_conv(self, tensor: str) -> bool:
        return tensor in self.producers and self._is_conv(self.producers[tensor])

    def _after_relu(self, tensor: str) -> str:
        users = self.consumers[tensor]
        alone = len(users) == 1 and users[0].op_type == "Relu" and tensor not in self.graph_outputs
        return str(users[0].output[0]) if alone else tensor

    def _feeds_conv(self) -> set[str]:
        """Tensors from which a convolution can be reached."""
        found: set[str] = set()
        for node in reversed(self.nodes):
            if self._is_conv(node):
                found.add(node.input[0])
            elif not found.isdisjoint(node.output):
                found.update(name for name in node.input if name not in self.initializers)
            if self._is_conv(node) and not found.isdisjoint(node.output):
                found.add(node.input[0])
        return found

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
    """Residual additions: left alone, the skip input quantized (TensorRT fuses it), or the whole addition."""

    NONE = "none"
    SKIP_INPUT = "skip-input"
    WHOLE = "whole"


class WeightRange(StrEnum):
    """Integers that weights may take.

    ``full``: -127 to 127. ``reduced``: -64 to 64. x86 processors without VNNI multiply unsigned activations with signed
    weights by an instruction that adds two products in sixteen bits and saturates: 2 * 255 * 127 overflows, 2 * 255 *
    64 does not. ``pairwise``: full unless two weights that such an instruction adds could overflow; the channel's scale
    is then just large enough that they cannot.
    """

    FULL = "full"
    REDUCED = "reduced"
    PAIRWISE = "pairwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One consumer's rules. ``backends``: whose runtime this placement was measured to be best for."""

    name: str
    backends: tuple[str, ...]
    activations: ActivationFormat
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


def placement_for(backend: str) -> Placement:
    """The placement for a backend or of this name.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if backend in PLACEMENTS:
        return PLACEMENTS[backend]
    found = [p for p in PLACEMENTS.values() if backend in p.backends]
    if not found:
        known = sorted({b for p in PLACEMENTS.values() for b in p.backends} | set(PLACEMENTS))
        raise ConfigError(f"There is no INT8 placement for '{backend}'.", hint=f"choose one of {', '.join(known)}")
    return found[0]


def weight_range(name: str) -> WeightRange | None:
    """A range of weights by name; None, the placement's own, for an empty one.

    Raises:
        ConfigError: naming the ones that exist.
    """
    known = [str(kind) for kind in WeightRange]
    if name and name not in known:
        raise unknown_name("range of weights", name, known)
    return WeightRange(name) if name else None


@dataclass(frozen=True, slots=True)
class QdqPlan:
    """A placement applied to one graph.

    ``readers``: for each tensor that gets a pair, the nodes that read the dequantized value; None means all of them.
    ``scale_of``: for tensors that a copying operator made, the tensor whose scale they take.
    """

    convs: tuple[ConvSite, ...]
    readers: dict[str, frozenset[str] | None]
    scale_of: dict[str, str]


def plan_pairs(graph: ConvGraph, placement: Placement, *, ignored_layers: Collection[str] = ()) -> QdqPlan:
    """Which tensors get a pair. ``ignored_layers`` names layers, or single nodes, that stay as they are.

    Raises:
        ConfigError: a name that the graph does not have.
    """
    known = {name for conv in graph.convs for name in (conv.layer, conv.name)}
    unknown = sorted(set(ignored_layers) - known)
    if unknown:
        raise ConfigError(f"The graph has no layer {unknown}.", hint=f"such as {', '.join(graph.layers[:4])}")
    convs = tuple(c for c in graph.convs if not _stays_float(c, placement, ignored_layers))
    return _PLANNERS[placement.results](graph, placement, convs)


def _stays_float(conv: ConvSite, placement: Placement, ignored_layers: Collection[str]) -> bool:
    return (
        conv.layer in ignored_layers
        or conv.name in ignored_layers
        or (placement.ignore_predictions and conv.is_prediction)
    )


def _plan_inputs(graph: ConvGraph, placement: Placement, convs: tuple[ConvSite, ...]) -> QdqPlan:
    """Pairs on what convolutions and fusing additions read; everybody else keeps reading the float value."""
    readers: dict[str, set[str]] = {}
    for conv in convs:
        readers.setdefault(conv.input, set()).add(conv.name)
    fusing = {conv.output for conv in convs}
    for add in graph.adds:
        if placement.adds is AddRule.SKIP_INPUT and add.branch in fusing:
            readers.setdefault(add.skip, set()).add(add.name)
    return QdqPlan(convs, {name: frozenset(nodes) for name, nodes in readers.items()}, {})


def _plan_results(graph: ConvGraph, placement: Placement, convs: tuple[ConvSite, ...]) -> QdqPlan:
    """Pairs on inputs and results, read by everybody, so that whole chains stay in eight bits."""
    chained = {name for add in graph.adds for name in (add.branch, add.skip)}
    chained |= {source for _, source, _ in graph.copies}
    everywhere = placement.results is ResultRule.QUANTIZED
    paired = dict.fromkeys(conv.input for conv in convs)
    paired |= dict.fromkeys(c.result for c in convs if not c.is_prediction and (everywhere or c.result in chained))
    scale_of: dict[str, str] = {}
    growing = True
    while growing:  # An addition may need the result of a resize that needs the result of an addition.
        before = len(paired)
        for add in graph.adds:
            if placement.adds is AddRule.WHOLE and {add.branch, add.skip} <= set(paired):
                paired[add.result] = None
        for _, source, result in graph.copies:
            if source in paired:
                paired[result] = None
                scale_of[result] = source
        growing = len(paired) > before
    return QdqPlan(convs, dict.fromkeys(paired), scale_of)


_PLANNERS: dict[ResultRule, Callable[[ConvGraph, Placement, tuple[ConvSite, ...]], QdqPlan]] = {
    ResultRule.FLOAT: _plan_inputs,
    ResultRule.CHAINED: _plan_results,
    ResultRule.QUANTIZED: _plan_results,
}
