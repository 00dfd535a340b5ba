"""Scales, zero points and eight-bit weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.cache import Calibration, check_graph
from calibration.execution import Fidelity, compare_models
from calibration.placement import (
    ActivationFormat,
    ConvGraph,
    ConvSite,
    Placement,
    QdqPlan,
    ResultRule,
    WeightRange,
    load_graph,
    plan_pairs,
)
from calibration.ranges import Range
from fcos_deploy.core.contract import METADATA_KEY, contract_to_text, read_contract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import require

__all__ = [
    "ActivationScale",
    "QuantizedOnnx",
    "WeightValues",
    "activation_scale",
    "bias_correction",
    "quantize_bias",
    "quantize_qdq",
    "quantize_weight",
    "quantized_model",
]

Floats = NDArray[np.float32]
# Smallest scale: a channel of zeros must not divide by zero.
_TINY = 1e-12
# Two products of an unsigned byte and weights of one sign whose sum fits sixteen bits: 128 * 255 = 32640.
_PAIR_SUM = 128


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """``real = (integer - zero_point) * scale``; ``zero_point`` is int8 or uint8 and says which the tensor is."""

    scale: np.float32
    zero_point: np.int8 | np.uint8


def activation_scale(found: Range, kind: ActivationFormat) -> ActivationScale:
    """The scale that covers a range."""
    return _SCALES[kind](found)


def _symmetric(found: Range) -> ActivationScale:
    return ActivationScale(np.float32(max(found.amax / 127.0, _TINY)), np.int8(0))


def _asymmetric(found: Range) -> ActivationScale:
    scale = max((found.high - found.low) / 255.0, _TINY)
    return ActivationScale(np.float32(scale), np.uint8(np.clip(round(-found.low / scale), 0, 255)))


_SCALES: dict[ActivationFormat, Callable[[Range], ActivationScale]] = {
    ActivationFormat.S8_SYMMETRIC: _symmetric,
    ActivationFormat.U8_ASYMMETRIC: _asymmetric,
}


@dataclass(frozen=True, slots=True)
class WeightValues:
    """values: int8, shape of the weight. scales: (out,) float32, one per output channel."""

    values: NDArray[np.int8]
    scales: Floats

    def dequantized(self) -> Floats:
        """What the runtime computes with."""
        shape = (-1,) + (1,) * (self.values.ndim - 1)
        return self.values.astype(np.float32) * self.scales.reshape(shape)


def quantize_weight(weight: Floats, kind: WeightRange, *, least_scale: Floats | float = 0.0) -> WeightValues:
    """Symmetric, per output channel (axis 0) of ``weight`` (out, in, kh, kw)."""
    rows = weight.reshape(weight.shape[0], -1)
    scales = np.maximum(np.maximum(_WEIGHT_SCALES[kind](weight), least_scale), _TINY).astype(np.float32)
    limit = 64 if kind is WeightRange.REDUCED else 127
    values = np.clip(np.rint(rows / scales[:, None]), -limit, limit).astype(np.int8)
    return WeightValues(values.reshape(weight.shape), scales)


def _full(weight: Floats) -> Floats:
    return _largest(weight) / np.float32(127)


def _reduced(weight: Floats) -> Floats:
    return _largest(weight) / np.float32(64)


def _largest(weight: Floats) -> Floats:
    largest: Floats = np.abs(weight).reshape(weight.shape[0], -1).max(1)
    return largest


def _pairwise(weight: Floats) -> Floats:
    # Kernels walk the input channels innermost and add neighbours; which two meet depends on the kernel's blocking, so
    # both alignments of neighbours count.
    channels = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    if channels.shape[1] < 2:
        return _full(weight)
    positive, negative = np.maximum(channels, 0), np.maximum(-channels, 0)
    sums = np.maximum(positive[:, :-1] + positive[:, 1:], negative[:, :-1] + negative[:, 1:])
    scales: Floats = np.maximum(_full(weight), sums.max(1) / np.float32(_PAIR_SUM - 1))
    return scales


_WEIGHT_SCALES: dict[WeightRange, Callable[[Floats], Floats]] = {
    WeightRange.FULL: _full,
    WeightRange.REDUCED: _reduced,
    WeightRange.PAIRWISE: _pairwise,
}


def bias_correction(weight: Floats, values: WeightValues, *, means: Floats) -> Floats:
    """(out,) what the rounding of the weights takes from the mean of each output channel.

    ``means``: (in,) of the input's channels; without any there is nothing to correct. Padding is left out of account.

    Raises:
        CalibrationError: other means than the convolution has input channels.
    """
    out, per_group = weight.shape[:2]
    lost = (weight - values.dequantized()).reshape(out, per_group, -1).sum(2)
    if not means.size:
        return np.zeros(out, np.float32)
    if means.size % per_group or out % (means.size // per_group):
        raise CalibrationError(
            f"The calibration has the means of {means.size} channels for weights of shape {weight.shape}.",
            hint="calibrate again",
        )
    groups = means.reshape(-1, per_group)
    correction: Floats = (lost * np.repeat(groups, out // len(groups), axis=0)).sum(1)
    return correction


def quantize_bias(bias: Floats, *, input_scale: np.float32, weight_scales: Floats) -> tuple[NDArray[np.int32], Floats]:
    """(out,) int32 and its scales, the products of the input's and the weight's, as integer convolutions need them."""
    scales = (input_scale * weight_scales).astype(np.float32)
    return np.clip(np.rint(bias / scales), -(2**31) + 1, 2**31 - 1).astype(np.int32), scales


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedOnnx:
    """What was written. ``int8_convolutions``, ``float_convolutions``: names of the nodes."""

    path: Path
    placement: Placement
    method: str
    int8_convolutions: tuple[str, ...]
    float_convolutions: tuple[str, ...]
    pairs: int
    fidelity: Fidelity

    @property
    def record(self) -> dict[str, str]:
        """For manifests. Noise is that of real pictures or not told: on anything else ranges do not fit."""
        noise = self.fidelity.sqnr_db if self.fidelity.images else {}
        return {
            "quantizer": "qdq",
            "placement": self.placement.name,
            "activations": str(self.placement.activations),
            "weights": str(self.placement.weights),
            "method": self.method,
            "int8_convolutions": str(len(self.int8_convolutions)),
            "float_convolutions": ", ".join(self.float_convolutions),
            "pairs": str(self.pairs),
            **{f"sqnr_db_{name}": f"{value:.2f}" for name, value in noise.items()},
        }


def quantize_qdq(
    source: Path,
    calibration: Calibration,
    output: Path,
    *,
    policy: Placement,
    ignored_layers: Collection[str] = (),
    pictures: Sequence[NDArray[np.uint8]] = (),
) -> QuantizedOnnx:
    """Quantize the convolutions of ``source``; ``ignored_layers`` names layers or nodes that stay float.

    Biases take back what the rounding of the weights shifts. The result is run beside its source on ``pictures``,
    (h, w, 3) uint8 RGB each, before it takes its name.

    Raises:
        CalibrationError: the calibration is of another graph, or the graph is not a float one.
        StepCheckError: the result does not run, or gives values that are not finite.
    """
    check_graph(calibration, source)
    contract = read_contract(source)
    if contract.precision is not Precision.FP32:
        raise CalibrationError(f"'{source}' is {contract.precision}.", hint="quantize the fp32 graph")
    graph = load_graph(source)
    plan = plan_pairs(graph, policy, ignored_layers=ignored_layers)
    model = quantized_model(graph, calibration, policy=policy, ignored_layers=ignored_layers)
    _set_contract(model, contract_to_text(replace(contract, precision=Precision.INT8, placement=policy.name)))
    onnx = require("onnx", extra="export")
    onnx.checker.check_model(model)
    fidelity = compare_models(graph.model, model, contract=contract, pictures=pictures)
    with atomic_file(output) as temporary:
        onnx.save(model, str(temporary))
    names = tuple(conv.name for conv in plan.convs)
    return QuantizedOnnx(
        path=output,
        placement=policy,
        method=str(calibration.method),
        int8_convolutions=names,
        float_convolutions=tuple(conv.name for conv in graph.convs if conv.name not in set(names)),
        pairs=len(plan.readers),
        fidelity=fidelity,
    )


def quantized_model(
    graph: ConvGraph,
    calibration: Calibration,
    *,
    policy: Placement,
    ignored_layers: Collection[str] = (),
) -> Any:
    """The quantized onnx.ModelProto, under the source's contract; ``quantize_qdq`` is this with all its checks.

    Raises:
        CalibrationError: nothing would be quantized, or a range is missing.
    """
    plan = plan_pairs(graph, policy, ignored_layers=ignored_layers)
    if not plan.convs:
        raise CalibrationError("Every convolution would stay float.", hint="leave the model in fp32")
    return _Writer(graph, plan, calibration, policy=policy).model()


def _set_contract(model: Any, text: str) -> None:
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = text


class _Writer:
    """Builds the new graph beside the old one."""

    def __init__(
        self,
        graph: ConvGraph,
        plan: QdqPlan,
        calibration: Calibration,
        *,
        policy: Placement,
    ) -> None:
        self._onnx = require("onnx", extra="export")
        self._graph, self._plan, self._policy, self._calibration = graph, plan, policy, calibration
        self._convs = {conv.name: conv for conv in plan.convs}
        self._scales = {name: self._scale(name, calibration) for name in plan.readers}
        self._weights = self._quantized_weights()
        self._new_initializers: dict[str, Any] = {}

    def _scale(self, name: str, calibration: Calibration) -> ActivationScale:
        while name in self._plan.scale_of:
            name = self._plan.scale_of[name]
        return activation_scale(calibration.range_of(name), self._policy.activations)

    def _quantized_weights(self) -> dict[str, WeightValues]:
        by_weight: dict[str, list[ConvSite]] = {}
        for conv in self._plan.convs:
            by_weight.setdefault(conv.weight, []).append(conv)
        return {
            name: quantize_weight(self._array(name), self._policy.weights, least_scale=self._least_scale(convs))
            for name, convs in by_weight.items()
        }

    def _least_scale(self, convs: list[ConvSite]) -> NDArray[np.float32] | float:
        """A bias is stored in 32 bits in units of input times weight scale: the weight scale must not be too small."""
        if self._policy.results is not ResultRule.QUANTIZED:
            return 0.0
        needed = [np.abs(self._array(c.bias)) / (self._scales[c.input].scale * 2.0**30) for c in convs if c.bias]
        return np.max(needed, axis=0).astype(np.float32) if needed else 0.0

    def _array(self, name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self._onnx.numpy_helper.to_array(self._graph.initializers[name])
        return array

    def _bias(self, conv: ConvSite) -> NDArray[np.float32]:
        means = self._calibration.tensors[conv.input].means()
        return self._array(conv.bias) + bias_correction(
            self._array(conv.weight), self._weights[conv.weight], means=means
        )

    def model(self) -> Any:
        model = self._onnx.ModelProto()
        model.CopyFrom(self._graph.model)
        nodes = []
        for value in model.graph.input:
            nodes += self._pair(value.name)
        for node in model.graph.node:
            name = node.name or node.output[0]
            self._rewire(node, name)
            if name in self._convs:
                nodes += self._constants(node, self._convs[name])
            nodes.append(node)
            for output in node.output:
                nodes += self._pair(output)
        nodes = [self._copy(node) for node in nodes]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        self._replace_initializers(model)
        return model

    def _copy(self, node: Any) -> Any:
        copy = self._onnx.NodeProto()
        copy.CopyFrom(node)
        return copy

    def _rewire(self, node: Any, name: str) -> None:
        for index, tensor in enumerate(node.input):
            if tensor in self._plan.readers:
                readers = self._plan.readers[tensor]
                if readers is None or name in readers:
                    node.input[index] = f"{tensor}/dequantized"

    def _pair(self, tensor: str) -> list[Any]:
        if tensor not in self._plan.readers:
            return []
        scale = self._scales[tensor]
        parameters = [
            self._constant(f"{tensor}/scale", scale.scale),
            self._constant(f"{tensor}/zero", scale.zero_point),
        ]
        make = self._onnx.helper.make_node
        quantized, result = f"{tensor}/quantized", f"{tensor}/dequantized"
        return [
            make("QuantizeLinear", [tensor, *parameters], [quantized], name=quantized),
            make("DequantizeLinear", [quantized, *parameters], [result], name=result),
        ]

    def _constants(self, node: Any, conv: ConvSite) -> list[Any]:
        """Weight, and bias where the placement stores it in 32 bits, behind a DequantizeLinear of their own."""
        weight = self._weights[conv.weight]
        nodes = [self._dequantize(node, 1, conv.weight, values=weight.values, scales=weight.scales)]
        if not conv.bias:
            return nodes
        if self._policy.results is ResultRule.QUANTIZED:
            input_scale = self._scales[conv.input].scale
            values, scales = quantize_bias(self._bias(conv), input_scale=input_scale, weight_scales=weight.scales)
            nodes.append(self._dequantize(node, 2, f"{conv.name}/bias", values=values, scales=scales))
        else:
            node.input[2] = self._constant(f"{conv.name}/bias", self._bias(conv))
        return nodes

    def _dequantize(
        self, node: Any, index: int, name: str, *, values: NDArray[Any], scales: NDArray[np.float32]
    ) -> Any:
        inputs = [
            self._constant(f"{name}/quantized", values),
            self._constant(f"{name}/scale", scales),
            self._constant(f"{name}/zero", np.zeros(len(scales), values.dtype)),
        ]
        node.input[index] = f"{node.name or node.output[0]}/{('input', 'weight', 'bias')[index]}"
        return self._onnx.helper.make_node(
            "DequantizeLinear", inputs, [node.input[index]], name=node.input[index], axis=0
        )

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._new_initializers:
            self._new_initializers[name] = self._onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def _replace_initializers(self, model: Any) -> None:
        used = {name for node in model.graph.node for name in node.input}
        remaining = [tensor for name, tensor in self._graph.initializers.items() if name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend(remaining + list(self._new_initializers.values()))
