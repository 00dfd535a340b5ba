"""The quantizers by name, behind one interface: ours, which writes Q/DQ nodes, and NNCF for OpenVINO.

A pair QuantizeLinear/DequantizeLinear rounds a tensor to ``scale * (q - zero_point)`` with an eight-bit ``q``; runtimes
fuse the pairs around a convolution into an integer one.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.calibrate import Calibration
from calibration.dataset import CalibrationImage, CalibrationSet, SampleOptions, collect_images
from calibration.execution import Feeder, Fidelity, compare_models
from calibration.placement import (
    ActivationFormat,
    ConvGraph,
    ConvSite,
    Placement,
    QdqPlan,
    ResultRule,
    WeightRange,
    plan_pairs,
)
from calibration.ranges import Range
from fcos_deploy.core.artifact import OnnxGraph, write_sidecar
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.files import atomic_directory
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_file import save_onnx, with_contract
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = [
    "COMPARED_IMAGES",
    "QUANTIZERS",
    "ActivationScale",
    "NncfOptions",
    "QuantizeRequest",
    "QuantizeResult",
    "QuantizedOnnx",
    "Quantizer",
    "WeightValues",
    "activation_scale",
    "bias_correction",
    "checked_quantization",
    "get_quantizer",
    "quantize_bias",
    "quantize_nncf",
    "quantize_qdq",
    "quantize_weight",
    "quantized_model",
]

onnx = lazy_import("onnx", extra="export")
nncf = lazy_import("nncf", extra="nncf")
ov = lazy_import("openvino", extra="openvino")

Floats = NDArray[np.float32]
# Smallest scale: a channel of zeros must not divide by zero.
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """``real = (integer - zero_point) * scale``; ``zero_point`` is int8 or uint8 and says which the tensor is."""

    scale: np.float32
    zero_point: np.int8 | np.uint8


@dataclass(frozen=True, slots=True)
class WeightValues:
    """values: int8, shape of the weight. scales: (out,) float32, one per output channel."""

    values: NDArray[np.int8]
    scales: Floats

    def dequantized(self) -> Floats:
        """What the runtime computes with."""
        return self.values.astype(np.float32) * self.scales.reshape((-1,) + (1,) * (self.values.ndim - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedOnnx:
    """What was written. ``int8_convolutions``, ``float_convolutions``: names of the nodes.

    ``zero_tensors``: what was zero for every calibration image, for which layers are float.
    """

    path: Path
    placement: Placement
    method: str
    int8_convolutions: tuple[str, ...]
    float_convolutions: tuple[str, ...]
    pairs: int
    fidelity: Fidelity
    zero_tensors: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, str]:
        """For manifests. Noise is that of real images or not told: on anything else ranges do not fit."""
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
            **({"zero_for_every_image": ", ".join(self.zero_tensors)} if self.zero_tensors else {}),
            **{f"sqnr_db_{name}": f"{value:.2f}" for name, value in noise.items()},
        }


def quantize_qdq(
    graph: ConvGraph,
    calibration: Calibration,
    output: Path,
    *,
    placement: Placement,
    ignored_layers: Collection[str] = (),
    images: Sequence[NDArray[np.uint8]] = (),
) -> QuantizedOnnx:
    """Quantize the convolutions of ``graph``; ``ignored_layers`` names layers or nodes that stay float.

    The result is run beside its source on ``images``, (h, w, 3) uint8 RGB each, before it takes its name.

    Raises:
        CalibrationError: the calibration is of another graph, or every layer is ignored.
        ConfigError: an ignored layer that the graph does not have.
        StepCheckError: the result does not run, or gives values that are not finite.
    """
    plan = plan_pairs(graph, placement, ignored_layers=ignored_layers, zero_tensors=calibration.zero_tensors)
    return checked_quantization(plan, quantized_model(plan, calibration), calibration, output, images=images)


def checked_quantization(
    plan: QdqPlan,
    model: Any,
    calibration: Calibration,
    output: Path,
    *,
    images: Sequence[NDArray[np.uint8]] = (),
) -> QuantizedOnnx:
    """Check ``model``, which ``quantized_model`` made of the plan, and write it; see ``quantize_qdq``."""
    graph, placement = plan.graph, plan.placement
    onnx.checker.check_model(model)
    fidelity = compare_models(graph.source, model, images=images)
    save_onnx(model, output)
    quantized = tuple(conv.name for conv in plan.convs)
    return QuantizedOnnx(
        path=output,
        placement=placement,
        method=str(calibration.method),
        int8_convolutions=quantized,
        float_convolutions=tuple(conv.name for conv in graph.convs if conv.name not in set(quantized)),
        pairs=len(plan.readers),
        fidelity=fidelity,
        zero_tensors=calibration.zero_tensors,
    )


def quantized_model(plan: QdqPlan, calibration: Calibration) -> Any:
    """The quantized onnx.ModelProto; ``quantize_qdq`` is this with all its checks.

    Raises:
        CalibrationError: the calibration is of another graph, a range is missing, or weights are not finite.
    """
    calibration.check_graph(plan.graph.source)
    return _Writer(plan, calibration).model()


def activation_scale(limits: Range, kind: ActivationFormat) -> ActivationScale:
    """Symmetric: 127 steps from 0 to amax. Asymmetric: 255 steps from low to high, 0 at a whole number of steps.

    ONNX's definition: q = saturate(round(x / scale) + zero_point). The range holds zero, so that zero is exact.
    """
    if kind is ActivationFormat.S8_SYMMETRIC:
        # -128 is never used: the integers are symmetric, so that 0 is exact and no sum has a term for a zero point.
        return ActivationScale(np.float32(max(limits.amax / 127.0, _TINY)), np.int8(0))
    # The zero point is rounded, so that 0 is exact; both ends of the range then lie up to half a step elsewhere.
    scale = max((limits.high - limits.low) / 255.0, _TINY)
    return ActivationScale(np.float32(scale), np.uint8(np.clip(round(-limits.low / scale), 0, 255)))


def quantize_weight(weight: Floats, kind: WeightRange, *, minimum_scale: Floats | float = 0.0) -> WeightValues:
    """Symmetric, per output channel (axis 0) of ``weight`` (out, in, kh, kw)."""
    rows = weight.reshape(weight.shape[0], -1)
    # Two products that are added in sixteen bits: 255 * 64 * 2 = 32640 fits, 255 * 127 * 2 does not (WeightRange).
    limit = 64 if kind is WeightRange.REDUCED else 127
    scales = np.abs(rows).max(1) / np.float32(limit)
    if kind is WeightRange.PAIRWISE:
        scales = np.maximum(scales, _pair_scales(weight))
    scales = np.maximum(np.maximum(scales, minimum_scale), _TINY).astype(np.float32)
    values = np.clip(np.rint(rows / scales[:, None]), -limit, limit).astype(np.int8)
    return WeightValues(values.reshape(weight.shape), scales)


def _pair_scales(weight: Floats) -> Floats:
    """(out,) scales at which no two neighbouring weights of one sign overflow sixteen bits together.

    Both multiply an unsigned byte: 255 * (a + b) <= 32767 holds for a + b <= 128. Rounding adds at most half to each,
    so that 127 is what the unrounded sum may reach.
    """
    # Kernels walk the input channels innermost and add neighbours; which two meet depends on the kernel's blocking, so
    # both alignments of neighbours count.
    channels = np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    if channels.shape[1] < 2:
        return np.zeros(weight.shape[0], np.float32)
    positive, negative = np.maximum(channels, 0), np.maximum(-channels, 0)
    sums = np.maximum(positive[:, :-1] + positive[:, 1:], negative[:, :-1] + negative[:, 1:])
    scales: Floats = sums.max(1) / np.float32(127)
    return scales


def bias_correction(weight: Floats, values: WeightValues, *, means: Floats) -> Floats:
    """(out,) what the rounding of the weights takes from the mean of each output channel.

    E[W x] - E[Wq x] = sum over inputs of (W - Wq) E[x]: added to the bias, it restores the mean (Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019).

    ``means``: (in,) of the input's channels; without any there is nothing to correct. Padding is left out of account.

    Raises:
        CalibrationError: other means than the convolution has input channels.
    """
    out, per_group = weight.shape[:2]
    if not means.size:
        return np.zeros(out, np.float32)
    if means.size % per_group or out % (means.size // per_group):
        raise CalibrationError(
            f"The calibration has the means of {means.size} channels for weights of shape {weight.shape}.",
            hint="calibrate again",
        )
    lost = (weight - values.dequantized()).reshape(out, per_group, -1).sum(2)
    groups = means.reshape(-1, per_group)
    correction: Floats = (lost * np.repeat(groups, out // len(groups), axis=0)).sum(1)
    return correction


def quantize_bias(bias: Floats, *, input_scale: np.float32, weight_scales: Floats) -> tuple[NDArray[np.int32], Floats]:
    """(out,) int32 and its scales, the products of the input's and the weight's, as integer convolutions need them."""
    # x w = (sx qx) (sw qw) = (sx sw) qx qw: the accumulator counts in units of sx sw, and the bias is added to it.
    scales = (input_scale * weight_scales).astype(np.float32)
    return np.clip(np.rint(bias / scales), -(2**31) + 1, 2**31 - 1).astype(np.int32), scales


class _Writer:
    """Builds the new graph beside the old one."""

    def __init__(self, plan: QdqPlan, calibration: Calibration) -> None:
        self._plan, self._calibration, self._source = plan, calibration, plan.graph.source
        self._convs = {conv.name: conv for conv in plan.convs}
        self._scales: dict[str, ActivationScale] = {}
        for name in plan.readers:
            origin = name
            while origin in plan.scale_of:
                origin = plan.scale_of[origin]
            self._scales[name] = activation_scale(calibration.range_of(origin), plan.placement.activations)
        users: dict[str, list[ConvSite]] = {}
        for conv in plan.convs:
            users.setdefault(conv.weight, []).append(conv)
        self._weights = {
            name: quantize_weight(self._array(name), plan.placement.weights, minimum_scale=self._minimum_scale(convs))
            for name, convs in users.items()
        }
        self._constants: dict[str, Any] = {}

    def model(self) -> Any:
        model = onnx.ModelProto()
        model.CopyFrom(self._source.model)
        nodes = []
        for value in model.graph.input:
            nodes += self._pair(value.name)
        for node in model.graph.node:
            name = node.name or node.output[0]
            for index, tensor in enumerate(node.input):
                readers = self._plan.readers.get(tensor, frozenset())
                if readers is None or name in readers:
                    node.input[index] = f"{tensor}/dequantized"
            if name in self._convs:
                nodes += self._parameters(node, self._convs[name])
            nodes.append(node)
            for output in node.output:
                nodes += self._pair(output)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # which outlive the deletion
        del model.graph.node[:]
        model.graph.node.extend(copies)
        used = {name for node in copies for name in node.input}
        remaining = [tensor for name, tensor in self._plan.graph.initializers.items() if name in used]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*remaining, *self._constants.values()])
        contract = replace(self._source.contract, precision=Precision.INT8, placement=self._plan.placement.name)
        return with_contract(model, contract)

    def _pair(self, tensor: str) -> list[Any]:
        """The two nodes behind a tensor that the plan names."""
        if tensor not in self._plan.readers:
            return []
        scale = self._scales[tensor]
        parameters = [
            self._constant(f"{tensor}/scale", scale.scale),
            self._constant(f"{tensor}/zero", scale.zero_point),
        ]
        make = onnx.helper.make_node
        quantized, result = f"{tensor}/quantized", f"{tensor}/dequantized"
        return [
            make("QuantizeLinear", [tensor, *parameters], [quantized], name=quantized),
            make("DequantizeLinear", [quantized, *parameters], [result], name=result),
        ]

    def _parameters(self, node: Any, conv: ConvSite) -> list[Any]:
        """Weight, and bias where the placement stores it in 32 bits, behind a DequantizeLinear of their own."""
        weight = self._weights[conv.weight]
        nodes = [self._dequantize(node, 1, conv.weight, values=weight.values, scales=weight.scales)]
        if not conv.bias:
            return nodes
        original, means = self._array(conv.weight), self._calibration.tensors[conv.input].means()
        bias = self._array(conv.bias) + bias_correction(original, weight, means=means)
        if self._plan.placement.results is ResultRule.QUANTIZED:
            scale = self._scales[conv.input].scale
            values, scales = quantize_bias(bias, input_scale=scale, weight_scales=weight.scales)
            nodes.append(self._dequantize(node, 2, f"{conv.name}/bias", values=values, scales=scales))
        else:
            node.input[2] = self._constant(f"{conv.name}/bias", bias)
        return nodes

    def _dequantize(
        self, node: Any, index: int, name: str, *, values: NDArray[Any], scales: NDArray[np.float32]
    ) -> Any:
        inputs = [
            self._constant(f"{name}/quantized", values),
            self._constant(f"{name}/scale", scales),
            self._constant(f"{name}/zero", np.zeros(len(scales), values.dtype)),
        ]
        result = f"{node.name or node.output[0]}/{('input', 'weight', 'bias')[index]}"
        node.input[index] = result
        return onnx.helper.make_node("DequantizeLinear", inputs, [result], name=result, axis=0)

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            self._constants[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def _array(self, name: str) -> Floats:
        array: Floats = onnx.numpy_helper.to_array(self._plan.graph.initializers[name])
        if not np.isfinite(array).all():
            raise CalibrationError(f"The weights '{name}' are not finite.", hint="is the checkpoint complete?")
        return array

    def _minimum_scale(self, convs: list[ConvSite]) -> Floats | float:
        """The weight scale of each channel below which a 32-bit bias would overflow."""
        if self._plan.placement.results is not ResultRule.QUANTIZED:
            return 0.0
        # A bias is stored in units of input scale times weight scale: |bias| / (input * weight) <= 2^30 leaves the
        # accumulator, which ends at 2^31, as much room for the products as for the bias.
        needed = [np.abs(self._array(c.bias)) / (self._scales[c.input].scale * 2.0**30) for c in convs if c.bias]
        return np.max(needed, axis=0).astype(np.float32) if needed else 0.0


COMPARED_IMAGES = 2  # of a result with its source: two inferences each


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """One graph to quantize for one consumer.

    ``calibration`` is what the Q/DQ quantizer reads, ``images`` what NNCF measures on; the Q/DQ quantizer compares its
    result with its source on a few of them. ``count`` and ``seed`` choose NNCF's images. ``ignored_layers``: names of
    layers (weights) or nodes that stay in float.
    """

    graph: ConvGraph
    output: Path
    placement: Placement
    calibration: Calibration | None = None
    images: Path | None = None
    count: int | None = None
    seed: int = 0
    ignored_layers: tuple[str, ...] = ()

    @property
    def ranges(self) -> Calibration:
        """The calibration.

        Raises:
            CalibrationError: there is none.
        """
        if self.calibration is None:
            raise CalibrationError(
                "The Q/DQ quantizer needs a calibration.",
                hint=f"fcos-deploy calibrate {self.graph.source.path} --images DIR -o calibration.json",
            )
        return self.calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """Files, the main one first, and what goes into records."""

    files: tuple[Path, ...]
    record: Mapping[str, str]


class Quantizer(ABC):
    """Makes an INT8 artifact from a float ONNX graph."""

    name: str
    suffix: str
    ignores_layers = False  # whether layers can be left in float, which a search for an accuracy goal needs

    @abstractmethod
    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        """Make the artifact.

        Raises:
            MissingDependencyError: a library is not installed.
            CalibrationError: the calibration or the images cannot be used.
            ConfigError: something that this quantizer cannot do.
        """


# OpenVINO reads the result and no other runtime does, as with our own placement for OpenVINO.
_NNCF_PLACEMENT = "openvino"
# OpenVINO's operator types of normalisation, scales, sigmoid and decoding.
_FLOAT_TYPES = frozenset(
    {"MVN", "GroupNormalization", "Multiply", "Subtract", "Sigmoid", "Exp", "Sqrt", "Power", "Divide"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfOptions:
    """The two settings of NNCF that change accuracy most.

    ``overflow_fix``: ``enable`` halves the range of weights, without which processors that lack VNNI saturate;
    ``disable`` uses all of it.
    """

    bias_correction: bool = False
    overflow_fix: str = "enable"


def quantize_nncf(
    source: OnnxGraph,
    images: CalibrationSet,
    output: Path,
    *,
    options: NncfOptions | None = None,
    progress: ProgressFn = no_progress,
) -> QuantizeResult:
    """Quantize a float ONNX graph to an OpenVINO IR (``output`` ends in .xml), for OpenVINO only.

    TensorRT reads NNCF's unsigned scales as signed ones. The settings are not NNCF's defaults, because measurements say
    so (docs/int8.md): ranges are the extremes over all images in place of the mean of each image's extremes, biases are
    not corrected, and nothing is quantized after the last convolutions or around the group norms.

    Raises:
        MissingDependencyError: NNCF or OpenVINO is not installed.
        CalibrationError: an image cannot be read.
        ConfigError: ``output`` has another suffix.
    """
    if output.suffix != ".xml":
        raise ConfigError(f"NNCF writes an OpenVINO IR, '{output}' must end in .xml.")
    options = options or NncfOptions()
    feeder = Feeder(source)
    positions = {image: index for index, image in enumerate(images.images)}

    def feeds(image: CalibrationImage) -> dict[str, Any]:
        progress("calibrating", positions[image] + 1, len(images.images))
        return feeder(image.read(source.contract.preprocess.orientation))

    record = {
        "quantizer": "nncf",
        "nncf": str(nncf.__version__),
        "preset": "mixed",
        "range_estimator": "MINMAX",
        "bias_correction": str(options.bias_correction).lower(),
        "overflow_fix": options.overflow_fix,
        "images": str(len(images.images)),
    }
    model = ov.convert_model(str(source.path))
    with _quiet():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(list(images.images), feeds),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images.images),
            ignored_scope=_ignored_scope(model),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
                disable_bias_correction=not options.bias_correction,
                overflow_fix=nncf.OverflowFix(options.overflow_fix),
            ),
        )
    files = _save_ir(quantized, output)
    contract = replace(source.contract, precision=Precision.INT8, placement=_NNCF_PLACEMENT)
    sidecar = write_sidecar(output, contract, record)
    return QuantizeResult(files=(*files, sidecar), record=record)


def _ignored_scope(model: Any) -> Any:
    """Everything that decodes or normalises, and the additions directly after it; residual additions are not."""
    names = []
    for op in model.get_ordered_ops():
        before = {value.get_node().get_type_name() for value in op.input_values()}
        if op.get_type_name() in _FLOAT_TYPES or (op.get_type_name() == "Add" and before & _FLOAT_TYPES):
            names.append(op.get_friendly_name())
    return nncf.IgnoredScope(names=names, validate=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws its own bars on the terminal and logs at INFO; ours say the same."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logger.setLevel(level)


def _save_ir(model: Any, output: Path) -> tuple[Path, Path]:
    """The .xml and its .bin, complete or not there: the .xml, which makes the artifact visible, comes last."""
    staging = output.with_name(f".{output.stem}.ir")
    with atomic_directory(staging) as folder:
        ov.save_model(model, str(folder / output.name), compress_to_fp16=False)
    weights, xml = (
        (staging / output.name).with_suffix(suffix).replace(output.with_suffix(suffix)) for suffix in (".bin", ".xml")
    )
    staging.rmdir()
    return xml, weights


class _Qdq(Quantizer):
    name, suffix = "qdq", ".onnx"
    ignores_layers = True

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        progress("quantizing", 0, 1)
        options = SampleOptions(count=COMPARED_IMAGES, seed=request.seed, minimum=1)
        orientation = request.graph.source.contract.preprocess.orientation
        images = (
            collect_images(request.images, options=options, orientation=orientation).images if request.images else ()
        )
        result = quantize_qdq(
            request.graph,
            request.ranges,
            request.output,
            placement=request.placement,
            ignored_layers=request.ignored_layers,
            images=[image.read(orientation) for image in images],
        )
        progress("quantizing", 1, 1)
        return QuantizeResult(files=(result.path,), record=result.record)


class _Nncf(Quantizer):
    name, suffix = "nncf", ".xml"

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        if "openvino" not in request.placement.backends:
            raise ConfigError(
                f"An NNCF model is for OpenVINO, not for the placement '{request.placement.name}'.",
                hint="--for openvino, or --quantizer qdq",
            )
        if request.ignored_layers:
            raise ConfigError("The NNCF quantizer takes no layers to ignore.", hint="--quantizer qdq")
        if request.images is None:
            raise CalibrationError("NNCF measures on images itself.", hint="--images DIR")
        images = collect_images(
            request.images,
            options=SampleOptions(count=request.count, seed=request.seed),
            orientation=request.graph.source.contract.preprocess.orientation,
        )
        return quantize_nncf(request.graph.source, images, request.output, progress=progress)


QUANTIZERS: dict[str, Quantizer] = {q.name: q for q in (_Qdq(), _Nncf())}


def get_quantizer(name: str) -> Quantizer:
    """One quantizer.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, sorted(QUANTIZERS))
    return QUANTIZERS[name]
