"""Parity of two detectors: the first stage, or layer, at which one diverges from the reference, how far, and why."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.diagnosis import Cause, Evidence, find_causes
from fcos_deploy.accuracy.stages import (
    SeenImage,
    StageResult,
    TensorDifference,
    Tolerance,
    detections_stage,
    head_stages,
    host_stages,
    measure_difference,
    preprocess_stage,
    tolerance_for,
)
from fcos_deploy.core.backend import ComputeType, SessionOptions, Tensors
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.matching import DetectionAgreement, agreement_json, compare_detections
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox, padded_size
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import get_backend
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = [
    "Layer",
    "LayerFinding",
    "OnnxLayers",
    "ParityImage",
    "ParityReport",
    "compare_stages",
    "first_diverging_layer",
    "layer_causes",
    "parity_json",
]


onnx = lazy_import("onnx", extra="export")


@dataclass(frozen=True, slots=True, eq=False)
class ParityImage:
    """(h, w, 3) uint8 RGB, and what to call it."""

    name: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All stages in order. ``causes``: what explains the first divergence, the most likely first."""

    stages: tuple[StageResult, ...]
    agreement: DetectionAgreement
    causes: tuple[Cause, ...] = ()

    @property
    def first(self) -> StageResult | None:
        """The first stage that diverges; None when none does."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether every stage holds."""
        return self.first is None


def compare_stages(
    reference: Detector,
    candidate: Detector,
    images: Sequence[ParityImage],
    *,
    tolerance: Tolerance | None = None,
    network: Fcos | None = None,
    progress: ProgressFn = no_progress,
) -> ParityReport:
    """Compare two detectors on some images; the reference must have the raw tail.

    Both should take the same input size and dtype: the candidate's network is given the reference's tensor, so that
    what its own preprocessing does wrong shows in that stage alone. ``tolerance``: None is what the candidate's
    precision and arithmetic allow. With ``network``, the reference's own, mistakes inside the network are tried as
    explanations too.

    Raises:
        ConfigError: no images, or a reference of another tail.
    """
    if not images:
        raise ConfigError("Parity needs at least one image.")
    if reference.contract.tail is not Tail.RAW:
        raise ConfigError(f"The reference must have the raw tail, it has '{reference.contract.tail}'.")
    if tolerance is None:
        compute = candidate.session.description.get("compute", "")
        known = ComputeType(compute) if compute in set(ComputeType) else ComputeType.F32
        tolerance = tolerance_for(candidate.contract.precision, known)
    seen = []
    for done, image in enumerate(images, start=1):
        seen.append(_run(reference, candidate, image))
        progress("parity", done, len(images))
    stages = [preprocess_stage(seen, reference.contract, candidate.contract)]
    if candidate.contract.tail is Tail.RAW:  # The other tails hide the head's outputs.
        stages += head_stages(seen, reference.contract, tolerance=tolerance)
    stages += host_stages(seen, reference.contract, candidate.contract)
    agreement = compare_detections(
        {i: image.reference_detections for i, image in enumerate(seen)},
        {i: image.candidate_detections for i, image in enumerate(seen)},
    )
    stages.append(detections_stage(agreement, tolerance=tolerance))
    report = ParityReport(stages=tuple(stages), agreement=agreement)
    if report.first is None:
        return report
    difference = report.first.difference
    worst = next((image for image in seen if difference and image.name == difference.image), seen[0])
    evidence = Evidence(image=worst, reference=reference, candidate=candidate, network=network)
    return replace(report, causes=tuple(find_causes(report.first.stage, evidence)))


def _run(reference: Detector, candidate: Detector, image: ParityImage) -> SeenImage:
    reference_feeds, (letterbox,) = reference.prepare([image.pixels])
    candidate_feeds, (candidate_letterbox,) = candidate.prepare([image.pixels])
    first, second = reference_feeds["images"], candidate_feeds["images"]
    reference_outputs = reference.infer(reference_feeds)
    own_outputs = candidate_outputs = candidate.infer(candidate_feeds)
    if (first.dtype, first.shape) == (second.dtype, second.shape):
        candidate_outputs = candidate.infer({**candidate_feeds, "images": first})
    return SeenImage(
        name=image.name,
        pixels=image.pixels,
        reference_feeds=reference_feeds,
        candidate_feeds=candidate_feeds,
        reference_outputs=reference_outputs,
        candidate_outputs=candidate_outputs,
        letterbox=letterbox,
        reference_detections=reference.finish(reference_outputs, [letterbox])[0],
        candidate_detections=_finish(
            candidate, own_outputs, candidate_letterbox, strides=reference.contract.decode.strides
        ),
    )


def _finish(detector: Detector, outputs: Tensors, letterbox: Letterbox, *, strides: tuple[int, ...]) -> Detections:
    """As the detector does, but with the reference's strides: wrong ones need not even fit the outputs."""
    if detector.contract.decode.strides == strides:
        return detector.finish(outputs, [letterbox])[0]
    contract = replace(detector.contract, decode=replace(detector.contract.decode, strides=strides))
    size = padded_size(letterbox.image_height, letterbox.image_width, contract.preprocess)
    return postprocess(outputs, contract, index=0, input_size=size, letterbox=letterbox)


def parity_json(report: ParityReport, layer: LayerFinding | None = None) -> dict[str, Any]:
    """All stages, the first that diverges, what explains it, and the first layer that diverges if that was asked."""
    return {
        "passed": report.passed,
        "first": None if report.first is None else report.first.stage,
        "stages": _finite([to_json(stage) for stage in report.stages]),
        "causes": [to_json(cause) for cause in report.causes],
        "agreement": agreement_json(report.agreement),
        "layer": None if layer is None else _finite(to_json(layer)),
    }


def _finite(value: Any) -> Any:  # Any: JSON, which has no infinity
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The first layer at which two ONNX graphs diverge: intermediate outputs are exposed as further outputs of the graph, a
# group of layers at a time, so that only one group is in memory. That also takes them out of the runtime's fusions:
# what is compared was really computed.

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


_OTHER_SHAPE = TensorDifference(
    max_abs=math.inf, mean_abs=math.inf, relative=math.inf, cosine=0.0, sqnr_db=-math.inf, where=(), image=""
)


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
            difference = _OTHER_SHAPE
            if expected[name].shape == actual[name].shape:
                difference = measure_difference(expected[name], actual[name])
            if not tolerance.holds(difference):
                layer = candidate.layer(name)
                causes = layer_causes(reference.layer(name), layer, difference)
                return LayerFinding(
                    layer=name, kind=layer.kind, difference=difference, compared=position, causes=tuple(causes)
                )
        progress("layers", start + len(group), len(common))
    return None


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
