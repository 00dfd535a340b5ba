"""Parity of two detectors: the first stage at which one diverges from the reference, and how far it is at each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import Candidates, DecodeSpec, HeadOutputs, decode, level_sizes
from fcos_deploy.core.detections import Detections, postprocess
from fcos_deploy.core.enums import ComputeType, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import DetectionAgreement, agreement_json, compare_detections
from fcos_deploy.core.preprocess import InputDtype, Letterbox, PreprocessSpec, padded_size
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import Detector

__all__ = [
    "Cause",
    "LayerFinding",
    "ParityImage",
    "ParityReport",
    "SeenImage",
    "StageResult",
    "TensorDifference",
    "Tolerance",
    "compare_stages",
    "level_slices",
    "measure_difference",
    "network_input",
    "parity_json",
    "split_levels",
    "tolerance_for",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """``max_abs`` and ``mean_abs`` in the tensor's own unit; ``relative`` is ``max_abs`` over the reference's RMS.

    ``sqnr_db``: signal to difference in decibels, None (infinite) when equal. ``where``: index of the largest
    difference; ``image``: the image that it is on.
    """

    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    sqnr_db: float | None
    where: tuple[int, ...]
    image: str

    @property
    def bits(self) -> float:
        """Mantissa bits that a rounding of this size leaves: log2 of the signal over the difference (both RMS)."""
        return math.inf if self.sqnr_db is None else self.sqnr_db / (20 * math.log10(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What rounding alone may do to a tensor, and to the detections.

    ``relative``: largest difference over RMS. ``min_sqnr_db``: lowest ratio of signal to difference.
    ``min_match_rate``: lowest share of detections that agree, in 0..1.
    """

    relative: float
    min_sqnr_db: float
    min_match_rate: float = 0.98

    def holds(self, difference: TensorDifference) -> bool:
        """Whether the difference can be rounding."""
        enough = difference.sqnr_db is None or difference.sqnr_db >= self.min_sqnr_db
        return enough and difference.relative <= self.relative


# Rounding to k mantissa bits leaves about 6.02 k + 5 dB; a network of fifty layers loses some 10 dB of it.
_BY_COMPUTE: dict[ComputeType, Tolerance] = {
    ComputeType.F32: Tolerance(relative=1e-3, min_sqnr_db=80.0),
    ComputeType.F16: Tolerance(relative=0.1, min_sqnr_db=40.0, min_match_rate=0.97),
    ComputeType.BF16: Tolerance(relative=0.5, min_sqnr_db=22.0, min_match_rate=0.95),
}
_BY_PRECISION: dict[Precision, Tolerance] = {
    Precision.FP32: Tolerance(relative=0.0, min_sqnr_db=math.inf, min_match_rate=1.0),
    Precision.FP16: _BY_COMPUTE[ComputeType.F16],
    Precision.INT8: Tolerance(relative=4.0, min_sqnr_db=10.0, min_match_rate=0.9),
}


def tolerance_for(precision: Precision, compute: ComputeType) -> Tolerance:
    """The wider of what the weights' format and the arithmetic allow."""
    by_precision, by_compute = _BY_PRECISION[precision], _BY_COMPUTE[compute]
    return Tolerance(
        relative=max(by_precision.relative, by_compute.relative),
        min_sqnr_db=min(by_precision.min_sqnr_db, by_compute.min_sqnr_db),
        min_match_rate=min(by_precision.min_match_rate, by_compute.min_match_rate),
    )


def measure_difference(
    reference: NDArray[Any], candidate: NDArray[Any], *, image: str = "", min_rms: float = 0.0
) -> TensorDifference:
    """Compare two tensors of one shape; what is not finite in only one of them counts as infinitely far.

    ``min_rms``: the smallest scale that ``relative`` and ``sqnr_db`` use, for tensors that are (nearly) all zero.
    """
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    finite = np.isfinite(a) & np.isfinite(b)
    same = a == b  # before the values that are not finite are replaced: inf equals inf
    a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
    delta = np.where(finite, np.abs(a - b), np.where(same, 0.0, np.inf))
    worst = int(delta.argmax()) if delta.size else 0
    signal, noise = float((a * a).sum()), float((delta * delta).sum())
    norms = math.sqrt(signal) * math.sqrt(float((b * b).sum()))
    largest = float(delta[worst]) if delta.size else 0.0
    power = max(signal, min_rms**2 * a.size)
    sqnr_db = None
    if noise:
        sqnr_db = -math.inf if power == 0 or math.isinf(noise) else 10 * math.log10(power / noise)
    return TensorDifference(
        max_abs=largest,
        mean_abs=float(delta.mean()) if delta.size else 0.0,
        relative=largest / max(math.sqrt(signal / max(1, a.size)), min_rms, 1e-30),
        cosine=float(a @ b) / norms if norms else float(noise == 0),
        sqnr_db=sqnr_db,
        where=tuple(int(i) for i in np.unravel_index(worst, reference.shape)) if delta.size else (),
        image=image,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage on all images: whether it holds, its largest difference, and a sentence."""

    stage: str
    passed: bool
    detail: str
    difference: TensorDifference | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SeenImage:
    """One image through both detectors. ``pixels``: (h, w, 3) uint8 RGB.

    ``candidate_outputs`` come from the reference's input tensor, ``candidate_detections`` from the candidate's own.
    """

    name: str
    pixels: NDArray[np.uint8]
    reference_feeds: Tensors
    candidate_feeds: Tensors
    reference_outputs: Tensors
    candidate_outputs: Tensors
    letterbox: Letterbox
    reference_detections: Detections
    candidate_detections: Detections

    @property
    def input_size(self) -> tuple[int, int]:
        """Padded (H, W)."""
        height, width = self.reference_feeds["images"].shape[2:]
        return int(height), int(width)

    def finish(self, contract: ModelContract) -> Detections:
        """The detections that ``contract`` makes of the reference's outputs."""
        outputs, size = self.reference_outputs, self.input_size
        return postprocess(outputs, contract, index=0, input_size=size, letterbox=self.letterbox)


def network_input(tensor: NDArray[Any], spec: PreprocessSpec) -> NDArray[np.float32]:
    """What the first convolution sees of an input tensor (n, 3, H, W): normalised float32, whichever side does it."""
    if spec.input_dtype is InputDtype.FLOAT32:
        return tensor.astype(np.float32, copy=False)
    mean, std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in (spec.mean, spec.std))
    normalized: NDArray[np.float32] = (tensor.astype(np.float32) / np.float32(spec.pixel_scale) - mean) / std
    return normalized


def level_slices(input_size: tuple[int, int], strides: tuple[int, ...]) -> dict[str, slice]:
    """Where each pyramid level lies among the L locations of a padded input (H, W); ``P3`` has stride 8."""
    ends = np.cumsum([0, *(rows * columns for rows, columns in level_sizes(*input_size, strides=strides))]).tolist()
    return {f"P{s.bit_length() - 1}": slice(a, b) for s, a, b in zip(strides, ends[:-1], ends[1:], strict=True)}


# Outputs of the raw tail: how people call each one, and its unit.
_HEAD_OUTPUTS = {
    "cls_logits": ("class", "logits"),
    "distances": ("box", "pixels"),
    "centerness": ("centerness", "logits"),
}


def split_levels(outputs: Tensors, levels: dict[str, slice]) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """("P3 class", output name, (n, l, channels)) ... of the raw tail, in the order of computation."""
    for level, where in levels.items():
        for name, (kind, _) in _HEAD_OUTPUTS.items():
            yield f"{level} {kind}", name, outputs[name][:, where]


# Float arithmetic in another order moves a normalised pixel by a few units in the last place (1e-6), far below this.
_PREPROCESS_TOLERANCE = Tolerance(relative=1e-4, min_sqnr_db=90.0)


def _preprocess_stage(seen: Sequence[SeenImage], reference: ModelContract, candidate: ModelContract) -> StageResult:
    """Whether both prepare the same input, as the first convolution sees it."""
    differences = []
    for image in seen:
        expected = network_input(image.reference_feeds["images"], reference.preprocess)
        tensor = network_input(image.candidate_feeds["images"], candidate.preprocess)
        if expected.shape != tensor.shape:
            shapes = f"is {_by(tensor.shape)}, the reference's {_by(expected.shape)}"
            return StageResult(stage="preprocess", passed=False, detail=f"the input tensor of '{image.name}' {shapes}")
        differences.append(measure_difference(expected, tensor, image=image.name))
    return _tensor_stage("preprocess", differences, tolerance=_PREPROCESS_TOLERANCE, unit="standard deviations")


def _head_stages(seen: Sequence[SeenImage], contract: ModelContract, *, tolerance: Tolerance) -> list[StageResult]:
    """Each level's class, box and centerness output, given the reference's input; ``contract`` is the reference's."""
    differences: dict[str, list[TensorDifference]] = {}
    units: dict[str, str] = {}
    for image in seen:
        if image.reference_outputs["cls_logits"].shape != image.candidate_outputs["cls_logits"].shape:
            shapes = [_by(o["cls_logits"].shape) for o in (image.candidate_outputs, image.reference_outputs)]
            detail = f"class logits of '{image.name}' are {shapes[0]}, the reference's {shapes[1]}"
            return [StageResult(stage="head", passed=False, detail=detail)]
        levels = level_slices(image.input_size, contract.decode.strides)
        candidate = split_levels(image.candidate_outputs, levels)
        for (stage, name, expected), (*_, values) in zip(
            split_levels(image.reference_outputs, levels), candidate, strict=True
        ):
            whole = image.reference_outputs[name].astype(np.float64)
            # A level without any activity must not turn rounding into a large relative difference.
            floor = 0.1 * float(np.sqrt((whole * whole).mean()))
            difference = measure_difference(expected, values, image=image.name, min_rms=floor)
            differences.setdefault(stage, []).append(difference)
            units[stage] = _HEAD_OUTPUTS[name][1]
    return [_tensor_stage(stage, d, tolerance=tolerance, unit=units[stage]) for stage, d in differences.items()]


def _tensor_stage(
    stage: str, differences: Sequence[TensorDifference], *, tolerance: Tolerance, unit: str
) -> StageResult:
    worst = max(differences, key=lambda d: (not tolerance.holds(d), d.relative))
    sqnr = "equal" if worst.sqnr_db is None else f"SQNR {worst.sqnr_db:.1f} dB"
    detail = (
        f"max {worst.max_abs:.3g} {unit} ({worst.relative:.2g} of the RMS) at {list(worst.where)} of '{worst.image}', "
        f"mean {worst.mean_abs:.3g}, cosine {worst.cosine:.6f}, {sqnr}"
    )
    return StageResult(stage=stage, passed=tolerance.holds(worst), detail=detail, difference=worst)


def _host_stages(seen: Sequence[SeenImage], reference: ModelContract, candidate: ModelContract) -> list[StageResult]:
    """Decoding and suppression by the candidate's contract, on the reference's outputs."""
    # What two contracts say of the outputs and no number shows.
    stated = {
        "strides of the levels": (reference.decode.strides, candidate.decode.strides),
        "labels of the class channels": (reference.decode.label_map, candidate.decode.label_map),
        "class names": (reference.class_names, candidate.class_names),
    }
    differing = next((what for what, (expected, actual) in stated.items() if expected != actual), "")
    spec = replace(candidate.decode, strides=reference.decode.strides)
    decoded = [
        image.name
        for image in seen
        if not _same(_decode(image, reference.decode), _decode(image, spec), "channels", "scores", "boxes")
    ]
    changed = replace(reference, decode=_suppression_of(candidate.decode, onto=reference.decode))
    finished = [i.name for i in seen if not _same(i.finish(reference), i.finish(changed), "boxes", "labels")]
    return [
        StageResult(stage="decode", passed=False, detail=f"the {differing} differ")
        if differing
        else _host_result("decode", decoded, count=len(seen)),
        _host_result("nms", finished, count=len(seen)),
    ]


def _decode(image: SeenImage, spec: DecodeSpec) -> Candidates:
    head = HeadOutputs(*(image.reference_outputs[name][0] for name in _HEAD_OUTPUTS))
    return decode(head, spec, input_size=image.input_size)


def _same(first: object, second: object, *arrays: str) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in arrays)


def _suppression_of(spec: DecodeSpec, *, onto: DecodeSpec) -> DecodeSpec:
    """``onto`` with everything from ``spec`` that acts after decoding: clipping, overlap, limits."""
    after = ("clip", "nms_space", "box_filter", "iou_offset", "keep_ties", "sort_by_score")
    profile = replace(onto.profile, **{name: getattr(spec.profile, name) for name in after})
    return replace(
        onto,
        profile=profile,
        iou_threshold=spec.iou_threshold,
        max_detections=spec.max_detections,
        class_agnostic=spec.class_agnostic,
        min_box_size=spec.min_box_size,
    )


def _host_result(stage: str, different: Sequence[str], *, count: int) -> StageResult:
    if different:
        detail = f"differs on {len(different)} of {count} images, first on '{different[0]}'"
    else:
        detail = f"the same on {count} images, given the reference's outputs"
    return StageResult(stage=stage, passed=not different, detail=detail)


def _detections_stage(agreement: DetectionAgreement, *, tolerance: Tolerance) -> StageResult:
    """The final detections of the two, each from its own input."""
    share = "neither detects anything" if agreement.empty else f"{agreement.match_rate:.1%} agree"
    detail = (
        f"{share} ({agreement.missed} missed, {agreement.extra} extra of "
        f"{agreement.reference}), boxes within {agreement.box_delta_px.max_abs:.3g} pixels, "
        f"scores within {agreement.score_delta.max_abs:.3g}"
    )
    return StageResult(stage="detections", passed=agreement.match_rate >= tolerance.min_match_rate, detail=detail)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A mistake by name, in a sentence, and how much of the squared difference it explains (1 is all of it).

    Rounding cannot be repeated number by number: there ``explained`` is the ratio of its power to what is expected.
    """

    name: str
    sentence: str
    explained: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFinding:
    """The first layer whose output diverges, and how far; ``compared`` layers before it held."""

    layer: str
    kind: str
    difference: TensorDifference
    compared: int
    causes: tuple[Cause, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ParityImage:
    """(h, w, 3) uint8 RGB, and what to call it."""

    name: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All stages in order. ``worst``: the image that diverges most at the first stage that diverges.

    ``causes``: what explains that divergence, the most likely first (``diagnosis.explain``).
    """

    stages: tuple[StageResult, ...]
    agreement: DetectionAgreement
    worst: SeenImage
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
    progress: ProgressFn = no_progress,
) -> ParityReport:
    """Compare two detectors on some images; the reference must have the raw tail.

    Both should take the same input size and dtype: the candidate's network is given the reference's tensor, so that
    what its own preprocessing does wrong shows in that stage alone. ``tolerance``: None is what the candidate's
    precision and arithmetic allow.

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
    stages = [_preprocess_stage(seen, reference.contract, candidate.contract)]
    if candidate.contract.tail is Tail.RAW:  # The other tails hide the head's outputs.
        stages += _head_stages(seen, reference.contract, tolerance=tolerance)
    stages += _host_stages(seen, reference.contract, candidate.contract)
    agreement = compare_detections(
        {i: image.reference_detections for i, image in enumerate(seen)},
        {i: image.candidate_detections for i, image in enumerate(seen)},
    )
    stages.append(_detections_stage(agreement, tolerance=tolerance))
    report = ParityReport(stages=tuple(stages), agreement=agreement, worst=seen[0])
    difference = report.first and report.first.difference
    worst = next((image for image in seen if difference and image.name == difference.image), seen[0])
    return replace(report, worst=worst)


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
