"""Where Q/DQ pairs go, one declarative policy per consumer, over the same ranges (spec 2.1, 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from calibration.graph import ConvGraph, ConvSite
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError

__all__ = [
    "PLACEMENTS",
    "ActivationFormat",
    "AddRule",
    "Placement",
    "QdqPlan",
    "ResultRule",
    "WeightRange",
    "placement_for",
    "plan_pairs",
    "weight_range",
]


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
    keep_predictions: bool = False


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
            keep_predictions=True,
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
        raise ConfigError(f"There is no range of weights '{name}'.", hint=f"ranges: {', '.join(known)}")
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


def plan_pairs(graph: ConvGraph, placement: Placement, *, keep_float: Collection[str] = ()) -> QdqPlan:
    """Which tensors get a pair. ``keep_float`` names layers, or single nodes, that stay as they are.

    Raises:
        ConfigError: a name that the graph does not have.
    """
    known = {name for conv in graph.convs for name in (conv.layer, conv.name)}
    unknown = sorted(set(keep_float) - known)
    if unknown:
        raise ConfigError(f"The graph has no layer {unknown}.", hint=f"such as {', '.join(graph.layers[:4])}")
    convs = tuple(c for c in graph.convs if not _stays_float(c, placement, keep_float))
    return _PLANNERS[placement.results](graph, placement, convs)


def _stays_float(conv: ConvSite, placement: Placement, keep_float: Collection[str]) -> bool:
    return conv.layer in keep_float or conv.name in keep_float or (placement.keep_predictions and conv.is_prediction)


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
