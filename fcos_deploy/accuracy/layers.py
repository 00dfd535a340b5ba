"""The first layer at which two ONNX graphs diverge, and what differs in it.

Intermediate outputs are exposed as further outputs of the graph, a group of layers at a time, so that only one group
is in memory. That also takes them out of the runtime's fusions: what is compared was really computed.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.diagnosis import Cause
from fcos_deploy.accuracy.stages import TensorDifference, Tolerance, measure_difference
from fcos_deploy.core.backend import SessionOptions, Tensors
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import get_backend

__all__ = ["Layer", "LayerFinding", "OnnxLayers", "first_diverging_layer", "layer_causes"]

onnx = lazy_import("onnx", extra="export")

_GROUP = 16  # layers whose outputs are in memory at a time
_SAME_CONSTANT = 1e-6  # relative RMS: the same numbers, folded in another order
_SPELLED_OUT = 4  # constants of so few values are shown
_MANTISSA_BITS = ((7.0, 10.5, "bf16"), (10.5, 15.0, "f16 or tf32"))  # effective bits after one layer
_WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_SHAPE_OPS = frozenset(
    {"Constant", "ConstantOfShape", "Shape", "Identity", "Cast", "DequantizeLinear", "QuantizeLinear"}
)


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
    """The first layer whose output diverges, and how far; ``compared`` layers before it held."""

    layer: str
    kind: str
    difference: TensorDifference
    compared: int
    causes: tuple[Cause, ...]


class OnnxLayers:
    """An ONNX graph on a backend that reads ONNX files; a layer is named after its first output.

    ``names``: the nodes with a float output, in the order in which they are computed.
    """

    def __init__(self, path: Path, *, backend: str = "onnxruntime", options: SessionOptions | None = None) -> None:
        self._model = onnx.load(str(path))
        self._backend = backend
        self._options = options or SessionOptions()
        self._weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._nodes = {node.output[0]: node for node in self._model.graph.node if node.op_type not in _SHAPE_OPS}
        inferred = onnx.shape_inference.infer_shapes(self._model).graph
        types = {info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.output)}
        floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
        self._types = {name: types[name] for name in self._nodes if types.get(name) in floats}
        self.names = list(self._types)

    def outputs(self, names: list[str], feeds: Tensors) -> Tensors:
        """The float32 outputs of some layers, by one run of a copy of the graph that has them as outputs."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        exposed = {output.name for output in copy.graph.output}
        copy.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, self._types[name], None) for name in names if name not in exposed
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exposed.onnx"
            onnx.save(copy, str(path))
            with get_backend(self._backend).open(path, self._options) as session:
                outputs = session.run({spec.name: feeds[spec.name] for spec in session.inputs})
        return {name: outputs[name].astype(np.float32) for name in names}

    def layer(self, name: str) -> Layer:
        """Operator, attributes and constants: weights and bias of a convolution, or just "constant"."""
        node = self._nodes[name]
        settings = {a.name: str(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        parts = ("input", "weights", "bias") if node.op_type in _WEIGHTED_OPS else ("input", "constant", "constant 2")
        constants = {
            part: onnx.numpy_helper.to_array(self._weights[source]) if source in self._weights else None
            for part, source in zip(parts, node.input, strict=False)  # a bias is optional
            if source
        }
        return Layer(name, node.op_type, settings, constants)


def first_diverging_layer(
    reference: OnnxLayers,
    candidate: OnnxLayers,
    feeds: Tensors,
    *,
    tolerance: Tolerance,
    progress: ProgressFn = no_progress,
) -> LayerFinding | None:
    """Compare the layers that both graphs have, in order, on the same ``feeds``; None when none diverges.

    Raises:
        ConfigError: the two have no layer in common.
    """
    known = set(candidate.names)
    common = [name for name in reference.names if name in known]
    if not common:
        raise ConfigError(
            "The two networks have no layer of the same name.", hint="compare graphs that come from one export"
        )
    for start in range(0, len(common), _GROUP):
        group = common[start : start + _GROUP]
        expected, actual = reference.outputs(group, feeds), candidate.outputs(group, feeds)
        for position, name in enumerate(group, start=start):
            difference = _compare(expected[name], actual[name])
            if not tolerance.holds(difference):
                layer = candidate.layer(name)
                causes = layer_causes(reference.layer(name), layer, difference)
                return LayerFinding(
                    layer=name, kind=layer.kind, difference=difference, compared=position, causes=tuple(causes)
                )
        progress("layers", start + len(group), len(common))
    return None


def _compare(reference: NDArray[Any], candidate: NDArray[Any]) -> TensorDifference:
    if reference.shape == candidate.shape:
        return measure_difference(reference, candidate)
    return TensorDifference(
        max_abs=math.inf, mean_abs=math.inf, relative=math.inf, cosine=0.0, sqnr_db=-math.inf, where=(), image=""
    )


def layer_causes(reference: Layer, candidate: Layer, difference: TensorDifference) -> list[Cause]:
    """Why the first diverging layer diverges: its operator, its settings, its weights, or else its arithmetic."""

    def cause(name: str, text: str) -> Cause:
        return Cause(name=name, sentence=f"{candidate.name}: {text}", explained=1.0)

    if reference.kind != candidate.kind:
        return [cause("operator", f"the operator is {candidate.kind} in place of {reference.kind}")]
    causes = [
        cause(f"layer.{key}", f"{key} is {candidate.settings.get(key)} in place of {value}")
        for key, value in reference.settings.items()
        if candidate.settings.get(key) != value
    ]
    for part in dict.fromkeys([*reference.constants, *candidate.constants]):
        change = _constant_change(reference, candidate, part)
        if change:
            causes.append(cause(part, f"the {part} {change}"))
    if causes:
        return causes
    bits = difference.bits
    for low, high, kind in _MANTISSA_BITS:
        if low <= bits < high:
            return [cause("compute-type", f"same settings and weights, about {bits:.0f} bits of mantissa ({kind})")]
    return [cause("arithmetic", f"same settings and weights, another result (SQNR {difference.sqnr_db or 0:.0f} dB)")]


def _constant_change(reference: Layer, candidate: Layer, part: str) -> str:
    """How a constant differs, as the end of a sentence; empty when it is the same or nothing can be said."""
    if part not in candidate.constants:
        return "of the reference is missing"
    if part not in reference.constants:
        return "is one that the reference does not have"
    expected, actual = reference.constants[part], candidate.constants[part]
    if expected is None or actual is None:
        return ""
    if expected.size != actual.size:
        return f"has {actual.size} values in place of {expected.size}"
    a, b = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    change = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(a)), 1e-30)
    if change <= _SAME_CONSTANT:
        return ""
    if a.size <= _SPELLED_OUT:
        new, old = (", ".join(f"{value:.4g}" for value in values) for values in (b, a))
        return f"is {new} in place of {old}"
    return f"differ{'' if expected.ndim > 1 else 's'} from the reference's by {change:.2%} (RMS)"
