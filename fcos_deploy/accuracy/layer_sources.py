"""Networks whose layers can be looked at: PyTorch modules and ONNX graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.layers import Layer, LayerSource
from fcos_deploy.core.backend import ComputeType, SessionOptions, Tensors
from fcos_deploy.core.registry import backend
from fcos_deploy.core.require import require

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = ["OnnxLayers", "TorchLayers"]

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
            with backend(self._backend).open(path, self._options) as session:
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
