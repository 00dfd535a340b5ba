"""Which layer first diverges: two networks, layer by layer, a group of layers at a time.

A group's outputs are all that is in memory. In an ONNX graph they are exposed as further outputs, which also takes
them out of the runtime's fusions, so that what is compared was really computed.
"""

from __future__ import annotations

import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.diagnosis import Cause
from fcos_deploy.accuracy.stages import TensorDifference, Tolerance, measure_difference
from fcos_deploy.core.backend import ComputeType, SessionOptions, Tensors
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import require
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import get_backend

if TYPE_CHECKING:
    pass
    from fcos_deploy.model.fcos import Fcos

__all__ = ["Layer", "LayerFinding", "LayerSource", "OnnxLayers", "TorchLayers", "first_diverging_layer", "layer_causes"]

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
    """The first layer whose output diverges, and how far; ``compared`` layers before it held."""

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


def first_diverging_layer(
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
    """Why the first diverging layer diverges: its operator, its settings, its weights, or else its arithmetic."""
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


_WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_SHAPE_OPS = frozenset(
    {"Constant", "ConstantOfShape", "Shape", "Identity", "Cast", "DequantizeLinear", "QuantizeLinear"}
)


class TorchLayers(LayerSource):
    """A PyTorch network; a module of the shared head is a layer once for every pyramid level (``name@P3``).

    ``feeds["images"]`` is the normalised image (n, 3, H, W) float32. ``session`` settles the arithmetic.
    """

    def __init__(self, network: Fcos, *, options: SessionOptions | None = None) -> None:
        self._torch = require("torch", extra="export")
        self._network = network.eval()
        self._options = options or SessionOptions()
        self._modules = {
            name: module
            for name, module in network.named_modules()
            if not list(module.children()) and not isinstance(module, (self._torch.nn.ReLU, self._torch.nn.Identity))
        }
        self._names: list[str] = []

    @property
    def names(self) -> Sequence[str]:
        """Found by running the network once on a small image."""
        if not self._names:
            self._trace(np.zeros((1, 3, 256, 256), np.float32), keep=frozenset())
        return self._names

    def outputs(self, names: Sequence[str], feeds: Tensors) -> Tensors:
        """One run of the network, keeping these layers' outputs."""
        return self._trace(feeds["images"], keep=frozenset(names))

    def layer(self, name: str) -> Layer:
        """Stride, padding, dilation and groups of convolutions; weights and biases where there are any."""
        module = self._modules[name.partition("@")[0]]
        settings = {
            key: str(getattr(module, key))
            for key in ("stride", "padding", "dilation", "groups")
            if hasattr(module, key)
        }
        names = {"weight": "weights", "bias": "bias", "running_mean": "running mean", "running_var": "running variance"}
        tensors = {part: getattr(module, attribute, None) for attribute, part in names.items()}
        constants = {part: t.detach().float().numpy() for part, t in tensors.items() if t is not None}
        return Layer(name, type(module).__name__, settings, constants)

    def _trace(self, images: NDArray[np.float32], *, keep: frozenset[str]) -> Tensors:
        calls: dict[str, int] = {}
        kept: Tensors = {}
        order: list[str] = []
        dtypes = {ComputeType.BF16: self._torch.bfloat16, ComputeType.F16: self._torch.float16}
        low = dtypes.get(self._options.compute)

        def hook(name: str, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            label = f"{name}@P{calls[name] + 2}" if name.startswith("head.") else name
            order.append(label)
            if label in keep:
                kept[label] = output.detach().float().numpy().copy()

        handles = [
            module.register_forward_hook(lambda _m, _i, output, name=name: hook(name, output))
            for name, module in self._modules.items()
        ]
        try:
            with self._torch.inference_mode(), self._torch.autocast("cpu", enabled=low is not None, dtype=low):
                self._network(self._torch.from_numpy(np.require(images, requirements=["C", "W"])))
        finally:
            for handle in handles:
                handle.remove()
        self._names = order
        return kept


class OnnxLayers(LayerSource):
    """An ONNX graph on a backend that reads ONNX files; a layer is named after its first output."""

    def __init__(self, path: Path, *, backend: str = "onnxruntime", options: SessionOptions | None = None) -> None:
        self._onnx = require("onnx", extra="export")
        self._model = self._onnx.load(str(path))
        self._backend = backend
        self._options = options or SessionOptions()
        self._weights = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._nodes = {node.output[0]: node for node in self._model.graph.node if node.op_type not in _SHAPE_OPS}
        self._names = [name for name in self._nodes if name in self._float_tensors()]

    @property
    def names(self) -> Sequence[str]:
        """Of all nodes with a float output."""
        return self._names

    def outputs(self, names: Sequence[str], feeds: Tensors) -> Tensors:
        """One run of a copy of the graph that has these outputs."""
        copy = self._onnx.ModelProto()
        copy.CopyFrom(self._model)
        known = {output.name for output in copy.graph.output}
        for name in names:
            if name not in known:
                copy.graph.output.append(
                    self._onnx.helper.make_tensor_value_info(name, self._float_tensors()[name], None)
                )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exposed.onnx"
            self._onnx.save(copy, str(path))
            with get_backend(self._backend).open(path, self._options) as session:
                found = session.run({spec.name: feeds[spec.name] for spec in session.inputs})
        return {name: found[name].astype(np.float32) for name in names}

    def layer(self, name: str) -> Layer:
        """Operator, attributes and constants: weights and bias of a convolution, or just "constant"."""
        node = self._nodes[name]
        settings = {a.name: str(self._onnx.helper.get_attribute_value(a)) for a in node.attribute}
        parts = ("input", "weights", "bias") if node.op_type in _WEIGHTED_OPS else ("input", "constant", "constant 2")
        constants = {
            part: self._onnx.numpy_helper.to_array(self._weights[source]) if source in self._weights else None
            for part, source in zip(parts, node.input, strict=False)  # a bias is optional
            if source
        }
        return Layer(name, node.op_type, settings, constants)

    def _float_tensors(self) -> dict[str, int]:
        """Element types of the float tensors, by shape inference."""
        if not hasattr(self, "_types"):
            inferred = self._onnx.shape_inference.infer_shapes(self._model)
            floats = {self._onnx.TensorProto.FLOAT, self._onnx.TensorProto.FLOAT16}
            infos = [*inferred.graph.value_info, *inferred.graph.output]
            types = {info.name: info.type.tensor_type.elem_type for info in infos}
            self._types: dict[str, int] = {name: kind for name, kind in types.items() if kind in floats}
        return self._types
