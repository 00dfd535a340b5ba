"""Which layer first departs: two networks, layer by layer, a group of layers at a time.

A group's outputs are all that is in memory. In an ONNX graph they are exposed as further outputs, which also takes
them out of the runtime's fusions, so that what is compared was really computed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.causes import Cause
from fcos_deploy.accuracy.tensors import TensorDifference, Tolerance, measure_difference
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress

if TYPE_CHECKING:
    pass

__all__ = ["Layer", "LayerFinding", "LayerSource", "first_departing_layer", "layer_causes"]

_GROUP = 16  # layers whose outputs are in memory at a time
_SAME_CONSTANT = 1e-6  # relative RMS: the same numbers, folded in another order
_SPELLED_OUT = 4  # constants of so few values are shown
_MANTISSA_BITS = ((7.0, 10.5, "bf16"), (10.5, 15.0, "f16 or tf32"))  # effective bits after one layer


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What a layer is: its operator, its settings as text, and its constants by what they are ("weights", "bias").

    A constant is None where the graph computes it, as quantized weights are.
    """

    name: str
    kind: str
    settings: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, NDArray[Any] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFinding:
    """The first layer whose output departs, and how far; ``compared`` layers before it held."""

    layer: str
    kind: str
    difference: TensorDifference
    compared: int
    causes: tuple[Cause, ...]


class LayerSource(ABC):
    """A network whose layers can be looked at."""

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of all layers, in the order in which they are computed."""

    @abstractmethod
    def outputs(self, names: Sequence[str], feeds: Tensors) -> Tensors:
        """The outputs of some layers; every name is one of ``names``."""

    @abstractmethod
    def layer(self, name: str) -> Layer:
        """What a layer is."""


def first_departing_layer(
    reference: LayerSource,
    candidate: LayerSource,
    feeds: tuple[Tensors, Tensors],
    *,
    tolerance: Tolerance,
    progress: ProgressFn = no_progress,
) -> LayerFinding | None:
    """Compare the layers that both have, in order; ``feeds`` of the reference and of the candidate.

    Raises:
        ConfigError: the two have no layer in common.
    """
    theirs = set(candidate.names)
    common = [name for name in reference.names if name in theirs]
    if not common:
        raise ConfigError(
            "The two networks have no layer of the same name.", hint="compare graphs that come from one export"
        )
    for start in range(0, len(common), _GROUP):
        group = common[start : start + _GROUP]
        mine, other = reference.outputs(group, feeds[0]), candidate.outputs(group, feeds[1])
        for position, name in enumerate(group):
            difference = _compare(mine[name], other[name])
            if not tolerance.holds(difference):
                causes = layer_causes(reference.layer(name), candidate.layer(name), difference)
                return LayerFinding(
                    layer=name,
                    kind=candidate.layer(name).kind,
                    difference=difference,
                    compared=start + position,
                    causes=tuple(causes),
                )
        progress("layers", min(start + _GROUP, len(common)), len(common))
    return None


def _compare(reference: NDArray[Any], candidate: NDArray[Any]) -> TensorDifference:
    if reference.shape == candidate.shape:
        return measure_difference(reference, candidate)
    return TensorDifference(
        max_abs=math.inf, mean_abs=math.inf, relative=math.inf, cosine=0.0, sqnr_db=-math.inf, where=(), image=""
    )


def layer_causes(reference: Layer, candidate: Layer, difference: TensorDifference) -> list[Cause]:
    """Why the first departing layer departs: its operator, its settings, its weights, or else its arithmetic."""
    if reference.kind != candidate.kind:
        text = f"{candidate.name}: the operator is {candidate.kind} in place of {reference.kind}"
        return [Cause(name="operator", sentence=text, explained=1.0)]
    causes = [
        Cause(
            name=f"layer.{key}",
            sentence=f"{candidate.name}: {key} is {candidate.settings.get(key)} in place of {value}",
            explained=1.0,
        )
        for key, value in reference.settings.items()
        if candidate.settings.get(key) != value
    ]
    for part in dict.fromkeys([*reference.constants, *candidate.constants]):
        change = _part_change(reference, candidate, part)
        if change:
            causes.append(Cause(name=part, sentence=f"{candidate.name}: the {part} {change}", explained=1.0))
    return causes or _arithmetic_causes(candidate, difference)


def _arithmetic_causes(layer: Layer, difference: TensorDifference) -> list[Cause]:
    bits = difference.bits
    for low, high, name in _MANTISSA_BITS:
        if low <= bits < high:
            text = f"{layer.name}: same settings and weights, computed with about {bits:.0f} bits of mantissa ({name})"
            return [Cause(name="compute-type", sentence=text, explained=1.0)]
    text = f"{layer.name}: same settings and weights, another result (SQNR {difference.sqnr_db or 0:.0f} dB)"
    return [Cause(name="arithmetic", sentence=text, explained=1.0)]


def _part_change(reference: Layer, candidate: Layer, part: str) -> str:
    """How a constant differs, as the end of a sentence; empty when it is the same or nothing can be said."""
    if part not in candidate.constants:
        return "of the reference is missing"
    if part not in reference.constants:
        return "is one that the reference does not have"
    mine, theirs = reference.constants[part], candidate.constants[part]
    return "" if mine is None or theirs is None else _constant_change(mine, theirs)


def _constant_change(mine: NDArray[Any], theirs: NDArray[Any]) -> str:
    if mine.size != theirs.size:
        return f"has {theirs.size} values in place of {mine.size}"
    a, b = mine.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    change = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(a)), 1e-30)
    if change <= _SAME_CONSTANT:
        return ""
    if a.size <= _SPELLED_OUT:
        return f"is {_numbers(b)} in place of {_numbers(a)}"
    return f"differ{'' if mine.ndim > 1 else 's'} from the reference's by {change:.2%} (RMS)"


def _numbers(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
