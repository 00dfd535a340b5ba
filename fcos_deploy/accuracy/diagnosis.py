"""Why a stage diverges, and at which layer: differing contracts, and the known mistake that reproduces the numbers.

Each trial makes one mistake in the reference on purpose. A mistake is named when the reference with it comes (nearly)
as close to the candidate as rounding allows; nothing is blamed that does not reproduce the numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.parity import (
    Cause,
    LayerFinding,
    ParityReport,
    SeenImage,
    TensorDifference,
    Tolerance,
    level_slices,
    measure_difference,
    network_input,
    split_levels,
)
from fcos_deploy.core.backend import SessionOptions, Tensors, get_backend
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import location_strides
from fcos_deploy.core.enums import ComputeType
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import MatchOptions, compare_detections
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_file import with_outputs
from fcos_deploy.core.preprocess import InputDtype, ResizeFilter, ResizeOrder, preprocess
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = [
    "Layer",
    "OnnxLayers",
    "activation_causes",
    "class_causes",
    "contract_causes",
    "explain",
    "explained",
    "first_diverging_layer",
    "layer_causes",
    "level_causes",
    "padding_causes",
    "pixel_causes",
    "shifted",
]

onnx = lazy_import("onnx", extra="export")

_CONVINCING = 0.9  # share of the squared difference that a mistake must explain
_LIKELY = 0.5  # the same for pixels, where interpolation and padding leave a rest
_BORDER = 4  # pixels at the edges, where a shifted image has no content to compare


@dataclass(frozen=True, slots=True, eq=False)
class _Evidence:
    """The image that diverges most, and both detectors, to try mistakes on.

    ``network``: the reference's PyTorch network, where there is one; with it mistakes inside the network can be tried.
    """

    image: SeenImage
    reference: Detector
    candidate: Detector
    network: Fcos | None = None


def explained(reference: NDArray[Any], candidate: NDArray[Any], trial: NDArray[Any]) -> float:
    """Share of the squared difference that is gone when ``trial`` takes the reference's place; can be negative."""
    before = float(((reference.astype(np.float64) - candidate) ** 2).sum())
    after = float(((trial.astype(np.float64) - candidate) ** 2).sum())
    return 1.0 - after / before if before else 0.0


def explain(
    report: ParityReport, reference: Detector, candidate: Detector, *, network: Fcos | None = None
) -> ParityReport:
    """``report`` on the two detectors with what explains its first divergence; with nothing when nothing known does."""
    if report.first is None:
        return report
    stage, evidence = report.first.stage, _Evidence(report.worst, reference, candidate, network)
    finders = {"preprocess": _preprocess_causes, "decode": _decode_causes, "nms": _decode_causes}
    causes = finders.get(stage, _suppression_causes if stage == "detections" else _head_causes)(evidence)
    return replace(report, causes=tuple(sorted(causes, key=lambda cause: -cause.explained)))


def _best(causes: Sequence[Cause], *, above: float) -> list[Cause]:
    """Those that explain more than ``above``, the best first."""
    return sorted((c for c in causes if c.explained > above), key=lambda c: -c.explained)


# The contracts.


def contract_causes(reference: ModelContract, candidate: ModelContract, *, part: str) -> list[Cause]:
    """What the two contracts say differently of ``preprocess`` or ``decode``, field by field."""
    return [
        Cause(
            name=f"{part}.{name}",
            sentence=f"the {name.rpartition('.')[2].replace('_', ' ').replace('iou', 'IoU')} is "
            f"{_value(actual)} in place of {_value(expected)}",
            explained=1.0,
        )
        for name, expected, actual in _differing_fields(getattr(reference, part), getattr(candidate, part))
    ]


def _differing_fields(reference: Any, candidate: Any) -> Iterator[tuple[str, Any, Any]]:  # Any: dataclasses of one type
    for part in dataclasses.fields(reference):
        first, second = getattr(reference, part.name), getattr(candidate, part.name)
        if dataclasses.is_dataclass(first):
            for name, a, b in _differing_fields(first, second):
                if name != "name":
                    yield f"{part.name}.{name}", a, b
        elif first != second:
            yield part.name, first, second


def _value(value: Any) -> str:  # Any: whatever a contract's field holds
    return str(value.value).upper() if isinstance(value, Enum) and len(value.value) == 3 else str(value)


def _decode_causes(evidence: _Evidence) -> list[Cause]:
    reference, candidate = evidence.reference.contract, evidence.candidate.contract
    causes = contract_causes(reference, candidate, part="decode")
    if reference.class_names != candidate.class_names:
        names = f"{', '.join(candidate.class_names)} in place of {', '.join(reference.class_names)}"
        causes.append(Cause(name="class_names", sentence=f"the class names are {names}", explained=1.0))
    return causes


# The input tensor.


def _preprocess_causes(evidence: _Evidence) -> list[Cause]:
    image, spec = evidence.image, evidence.reference.contract.preprocess
    causes = contract_causes(evidence.reference.contract, evidence.candidate.contract, part="preprocess")
    reference = network_input(image.reference_feeds["images"], spec)[0]
    candidate = network_input(image.candidate_feeds["images"], evidence.candidate.contract.preprocess)[0]
    if reference.shape != candidate.shape:
        return causes
    size = image.letterbox.resized_height, image.letterbox.resized_width
    causes += padding_causes(reference, candidate, size=size)
    # Padding follows another rule than the image's own pixels.
    content = (slice(None), slice(size[0]), slice(size[1]))
    causes += pixel_causes(reference[content], candidate[content])
    for resize in (ResizeFilter.CV2, ResizeFilter.PIL):
        possible = spec.resize_order is ResizeOrder.RESIZE_FIRST or resize is not ResizeFilter.PIL
        if resize is not spec.resize_filter and possible:
            tensor, _ = preprocess(image.pixels, replace(spec, resize_filter=resize))
            share = explained(reference[content], candidate[content], network_input(tensor[None], spec)[0][content])
            text = f"the image is resized as by '{resize}' in place of '{spec.resize_filter}'"
            causes.append(Cause(name="resize-filter", sentence=text, explained=share))
    return [cause for cause in causes if cause.name != "resize-filter" or cause.explained > _CONVINCING]


def pixel_causes(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> list[Cause]:
    """Known mistakes in a normalised image (c, h, w), without padding, that turn the reference into the candidate."""
    scaled, scales, offsets = _fit_channels(reference, candidate)
    factors, moves = ", ".join(f"{s:.3f}" for s in scales), ", ".join(f"{o:+.3f}" for o in offsets)
    normalised = f"mean or std differ: channels are scaled by {factors} and moved by {moves} standard deviations"
    trials = [("normalisation", normalised, scaled)]
    if len(reference) > 1:
        swapped, _, _ = _fit_channels(reference[::-1], candidate)
        trials.insert(0, ("channel-order", "the colour channels are swapped (RGB/BGR)", swapped))
    # Half a pixel: centres of pixels taken for their corners. One: an index that starts at 1.
    for dx, dy in itertools.product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=2):
        text = f"the image is shifted by {dx:+.1f} pixels to the right and {dy:+.1f} down"
        trials.append(("shift", text, shifted(reference, dx, dy)))
    inner = (slice(None), slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER))
    causes = [
        Cause(name=name, sentence=text, explained=explained(reference[inner], candidate[inner], trial[inner]))
        for name, text, trial in trials
    ]
    likely = _best(causes, above=_LIKELY)
    return list({cause.name: cause for cause in reversed(likely)}.values())[::-1]  # the best shift only


def _fit_channels(
    trial: NDArray[np.float32], candidate: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """``trial`` scaled and moved channel by channel to come nearest to ``candidate``, the scales, and the offsets.

    Least squares of a line: scale = covariance / variance, offset = mean of the candidate - scale * mean of the trial.
    """
    x, y = (image.reshape(len(image), -1).astype(np.float64) for image in (trial, candidate))
    mean_x, mean_y = x.mean(1), y.mean(1)
    covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).mean(1)
    variance = x.var(1)
    scales = np.divide(covariance, variance, out=np.ones(len(variance)), where=variance > 0)
    offsets = mean_y - scales * mean_x
    fitted = trial * scales[:, None, None] + offsets[:, None, None]
    return fitted.astype(np.float32), scales, offsets


def shifted(image: NDArray[np.float32], dx: float, dy: float) -> NDArray[np.float32]:
    """(c, h, w) moved by (right, down) pixels, bilinearly; the edge is repeated."""
    rows = np.clip(np.arange(image.shape[1]) - dy, 0, image.shape[1] - 1)
    columns = np.clip(np.arange(image.shape[2]) - dx, 0, image.shape[2] - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, image.shape[1] - 1), np.minimum(left + 1, image.shape[2] - 1)
    down = (rows - top).astype(np.float32)[None, :, None]
    across = (columns - left).astype(np.float32)[None, None, :]
    lines = image[:, top] * (1 - down) + image[:, bottom] * down
    moved: NDArray[np.float32] = lines[:, :, left] * (1 - across) + lines[:, :, right] * across
    return moved


def padding_causes(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], *, size: tuple[int, int]
) -> list[Cause]:
    """Whether an image of ``size`` (h, w) is padded on another side of its canvas (3, H, W), or on both."""
    free = [canvas - content for canvas, content in zip(reference.shape[1:], size, strict=True)]
    places = itertools.product(*(sorted({0, space // 2, space}) for space in free))
    causes = [
        Cause(
            name="padding",
            sentence=f"the image lies {right:+d} pixels to the right and {down:+d} down: it is padded on another side",
            # What leaves the canvas on one side is padding, and comes back on the other.
            explained=explained(reference, candidate, np.roll(reference, (down, right), axis=(1, 2))),
        )
        for down, right in places
        if (down, right) != (0, 0)
    ]
    return _best(causes, above=_LIKELY)[:1]


# The head's outputs.


def _head_causes(evidence: _Evidence) -> list[Cause]:
    reference, candidate = evidence.image.reference_outputs, evidence.image.candidate_outputs
    causes = []
    computed, used = (d.session.description.get("compute", "") for d in (evidence.reference, evidence.candidate))
    if used and used != computed:
        text = f"the candidate computes in {used} in place of {computed}"
        causes.append(Cause(name="compute-type", sentence=text, explained=1.0))
    if reference["cls_logits"].shape != candidate["cls_logits"].shape:
        return causes
    contract, size = evidence.reference.contract, evidence.image.input_size
    strides = contract.decode.strides
    causes += level_causes(reference, candidate, level_slices(size, strides))
    causes += activation_causes(
        reference["distances"], candidate["distances"], location_strides(*size, strides=strides)
    )
    causes += class_causes(reference["cls_logits"], candidate["cls_logits"], contract.channel_names)
    for name, sentence, outputs in itertools.chain(_input_mistakes(evidence), _network_mistakes(evidence)):
        share = _outputs_explained(reference, candidate, outputs)
        if share > _CONVINCING:
            causes.append(Cause(name=name, sentence=sentence, explained=share))
    return causes or _rounding_causes(evidence)


def _outputs_explained(reference: Tensors, candidate: Tensors, trial: Tensors) -> float:
    """The smallest of ``explained`` over all outputs that differ at all."""
    shares = [
        explained(reference[name], candidate[name], trial[name])
        for name in reference
        if not np.allclose(reference[name], candidate[name], rtol=1e-5, atol=1e-6)
    ]
    return min(shares, default=0.0)


def level_causes(reference: Tensors, candidate: Tensors, levels: dict[str, slice]) -> list[Cause]:
    """Whether the candidate's outputs are the reference's with two pyramid levels swapped, or all in reverse."""
    names = list(levels)
    orders = {"the levels come coarsest first": names[::-1]}
    for first, second in itertools.combinations(names, 2):
        swap = {first: second, second: first}
        orders[f"the levels {second} and {first} are swapped"] = [swap.get(name, name) for name in names]
    places = {name: np.arange(where.start, where.stop) for name, where in levels.items()}
    causes = []
    for sentence, order in orders.items():
        index = np.concatenate([places[name] for name in order])
        share = _outputs_explained(reference, candidate, {name: array[:, index] for name, array in reference.items()})
        causes.append(Cause(name="levels", sentence=sentence, explained=share))
    return _best(causes, above=_CONVINCING)[:1]


def class_causes(reference: NDArray[Any], candidate: NDArray[Any], names: Sequence[str]) -> list[Cause]:
    """Whether the candidate's class logits (n, L, C) are the reference's with the classes in another order."""
    expected, actual = (logits.reshape(-1, len(names)).astype(np.float64) for logits in (reference, candidate))
    # Squared distance of every pair of columns: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
    distance = (expected**2).sum(0)[:, None] + (actual**2).sum(0)[None] - 2 * expected.T @ actual
    order = distance.argmin(0).tolist()  # the reference's channel that each of the candidate's is nearest to
    moved = [f"'{names[source]}' in place of '{names[at]}'" for at, source in enumerate(order) if at != source]
    share = explained(expected, actual, expected[:, order])
    if len(set(order)) < len(names) or not moved or share <= _CONVINCING:
        return []
    channels = ", ".join(moved[:4]) + (" ..." if len(moved) > 4 else "")
    text = f"the classes are in another order: the channels give {channels}"
    return [Cause(name="classes", sentence=text, explained=share)]


def _undo_exp(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(np.log(np.maximum(distances, 1e-9)), 0)


_ACTIVATIONS: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]] = {
    # From one activation's distances and the stride to what the other would have given, where that can be known.
    "exp in place of relu": lambda distances, stride: np.exp(distances / stride),
    "exp in place of relu (times the stride)": lambda distances, stride: np.exp(distances / stride) * stride,
    "relu in place of exp": lambda distances, stride: _undo_exp(distances) * stride,
    "relu in place of exp (without the stride)": lambda distances, _: _undo_exp(distances),
}


def activation_causes(reference: NDArray[Any], candidate: NDArray[Any], strides: NDArray[np.float32]) -> list[Cause]:
    """Whether the candidate's distances (n, L, 4) have another activation; ``strides`` (L,) of the locations."""
    known = (reference > 0) & (candidate > 0)  # Where relu gave 0, its argument is lost.
    causes = []
    for name, turn in _ACTIVATIONS.items():
        with np.errstate(over="ignore"):
            trial = turn(reference.astype(np.float64), strides[None, :, None].astype(np.float64))
        usable = known & np.isfinite(trial)
        if usable.any():
            share = explained(reference[usable], candidate[usable], trial[usable])
            causes.append(Cause(name="activation", sentence=f"the box activation is {name}", explained=share))
    return _best(causes, above=_CONVINCING)


def _input_mistakes(evidence: _Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Mistakes in the first layers of the graph, made on the input: name, sentence, and the head's outputs."""
    images = evidence.image.reference_feeds["images"]
    swapped = np.ascontiguousarray(images[:, ::-1])
    yield (
        "channel-order",
        "the graph swaps the colour channels (RGB/BGR)",
        evidence.reference.infer({"images": swapped}),
    )
    for move in (0.5, -0.5):
        moved = np.stack([shifted(image.astype(np.float32), move, move) for image in images])
        if images.dtype == np.dtype(InputDtype.UINT8.value):
            moved = moved.round().astype(images.dtype)
        text = f"the graph shifts the image by {move:+.1f} pixels to the right and {move:+.1f} down"
        yield "shift", text, evidence.reference.infer({"images": moved})


# (pixel scale, mean, std) as people use them, beside those of the model itself.
_NORMALISATIONS: dict[str, tuple[float, tuple[float, float, float], tuple[float, float, float]]] = {
    "does not normalise": (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "only scales to 0..1": (255.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "scales to -1..1": (255.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "normalises with torchvision's mean and std": (255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "normalises with Caffe's mean": (1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "normalises with detectron2's mean": (1.0, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "normalises with mmdetection's mean and std": (1.0, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def _network_mistakes(evidence: _Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Other normalisations in the graph, and another place of the stride: the same weights fit, silently wrong."""
    network, contract, feeds = evidence.network, evidence.reference.contract, evidence.image.reference_feeds
    if network is None:
        return
    spec = contract.preprocess
    if spec.input_dtype is InputDtype.UINT8:  # For float input the host normalises, and the input tensor shows it.
        reverse = spec.pixel_scale, spec.mean[::-1], spec.std[::-1]
        trials = {**_NORMALISATIONS, "has mean and std in the opposite order of the channels": reverse}
        as_float = contract.with_preprocess(replace(spec, input_dtype=InputDtype.FLOAT32))
        with Detector.of_network(network, as_float, options=_options(evidence)) as detector:
            for text, (scale, mean, std) in trials.items():
                trial = replace(spec, pixel_scale=scale, mean=mean[: spec.channels], std=std[: spec.channels])
                if trial != spec:
                    images = network_input(feeds["images"], trial)
                    yield "normalisation", f"the graph {text}", detector.infer({"images": images})
    from fcos_deploy.model.fcos import Fcos

    place = "3x3" if network.config.stride_in_1x1 else "first 1x1"
    variant = Fcos(replace(network.config, stride_in_1x1=not network.config.stride_in_1x1))
    variant.load_state_dict(network.state_dict())
    with Detector.of_network(variant.eval(), contract, options=_options(evidence)) as detector:
        text = f"the bottlenecks' stride is on the {place} convolution (stride_in_1x1 differs)"
        yield "stride-placement", text, detector.infer(feeds)


def _options(evidence: _Evidence) -> SessionOptions:
    threads = evidence.reference.session.description.get("threads", "")
    return SessionOptions(threads=int(threads) if threads.isdigit() else None)


# Smallest ratio of two powers of rounding noise that count as the same: 3 dB in the median, 10 dB in each output.
_SAME_NOISE, _SIMILAR_NOISE = 0.5, 0.1


def _rounding_causes(evidence: _Evidence) -> list[Cause]:
    """Whether the differences are as large, in every level and output, as those of a smaller float type."""
    if evidence.network is None:
        return []
    noise = _noise(evidence, evidence.image.candidate_outputs)
    causes = []
    for compute in (ComputeType.BF16, ComputeType.F16):
        options = replace(_options(evidence), compute=compute)
        with Detector.of_network(evidence.network, evidence.reference.contract, options=options) as detector:
            expected = _noise(evidence, detector.infer(evidence.image.reference_feeds))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(np.minimum(noise / expected, expected / noise))
        if ratio.min() >= _SIMILAR_NOISE and np.median(ratio) >= _SAME_NOISE:
            actual_db, expected_db = (-10 * np.log10(max(float(np.median(n)), 1e-30)) for n in (noise, expected))
            text = (
                f"the differences are as large as those of rounding to {compute} in place of f32: "
                f"{actual_db:.0f} dB below the values in the median, {expected_db:.0f} dB with {compute}"
            )
            causes.append(Cause(name="compute-type", sentence=text, explained=float(np.median(ratio))))
    return causes


def _noise(evidence: _Evidence, outputs: Tensors) -> NDArray[np.float64]:
    """Power of the difference over that of the reference, of each level and output."""
    reference = evidence.image.reference_outputs
    levels = level_slices(evidence.image.input_size, evidence.reference.contract.decode.strides)
    powers = {name: float((values.astype(np.float64) ** 2).mean()) for name, values in reference.items()}
    pairs = zip(split_levels(reference, levels), split_levels(outputs, levels), strict=True)
    return np.array(
        [((a.astype(np.float64) - b) ** 2).mean() / max(powers[name], 1e-30) for (_, name, a), (*_, b) in pairs]
    )


# The final detections.


def _suppression_causes(evidence: _Evidence) -> list[Cause]:
    """Whether another overlap threshold of the suppression reproduces the candidate's detections."""
    contract, image = evidence.reference.contract, evidence.image
    options = MatchOptions(iou_threshold=0.9, min_score=0.0)

    def agreement(trial: ModelContract) -> float:
        detections = image.finish(trial)
        return compare_detections({0: detections}, {0: image.candidate_detections}, options=options).match_rate

    before, causes = agreement(contract), []
    for threshold in np.arange(0.3, 0.95, 0.05).round(2).tolist():
        share = agreement(replace(contract, decode=replace(contract.decode, iou_threshold=threshold)))
        if share > max(before, _CONVINCING):
            text = (
                f"the suppression in the graph behaves as with an IoU threshold of {threshold}, "
                f"the contract says {contract.decode.iou_threshold}"
            )
            causes.append(Cause(name="decode.iou_threshold", sentence=text, explained=share))
    return causes + _decode_causes(evidence)


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
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "exposed.onnx"
            onnx.save(with_outputs(self._model, names, types=self._types), str(path))
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
