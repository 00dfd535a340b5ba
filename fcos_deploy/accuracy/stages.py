"""How far a tensor is from the one that it should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import ComputeType, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import Candidates, DecodeSpec, HeadOutputs, decode, level_sizes
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import InputDtype, Letterbox, PreprocessSpec

__all__ = [
    "HEAD_OUTPUTS",
    "LevelSlice",
    "SeenImage",
    "StageResult",
    "TensorDifference",
    "Tolerance",
    "decoded",
    "head_stages",
    "host_stages",
    "level_slices",
    "measure_difference",
    "network_input",
    "preprocess_stage",
    "same_candidates",
    "split_levels",
    "suppression_of",
    "tolerance_for",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """``max_abs`` and ``mean_abs`` in the tensor's own unit; ``relative`` is ``max_abs`` over the reference's RMS.

    ``sqnr_db``: signal to difference in decibels, infinite (None) when equal; ``bits``: the mantissa bits that a
    rounding of this size leaves. ``where``: index of the largest difference; ``image``: on which image it was.
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
        """log2 of the signal over the difference (both RMS)."""
        return math.inf if self.sqnr_db is None else self.sqnr_db / (20 * math.log10(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What rounding alone may do: to a tensor, and to the detections.

    ``relative``: largest difference over RMS. ``min_sqnr_db``: least signal to difference. ``min_match_rate``: least
    share of detections that agree, in 0..1.
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
    reference: NDArray[Any], candidate: NDArray[Any], *, image: str = "", least_rms: float = 0.0
) -> TensorDifference:
    """Compare two tensors of one shape; what is not finite in one alone counts as infinitely far.

    ``least_rms``: scale that ``relative`` uses at least, for tensors that are (nearly) all zero.
    """
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    both = np.isfinite(a) & np.isfinite(b)
    delta = np.where(both, np.abs(np.where(both, a, 0) - np.where(both, b, 0)), np.where(a == b, 0.0, np.inf))
    worst = int(delta.argmax()) if delta.size else 0
    a, b = np.where(both, a, 0), np.where(both, b, 0)
    signal, noise = float((a * a).sum()), float((delta * delta).sum())
    rms = max(math.sqrt(signal / max(1, a.size)), least_rms, 1e-30)
    norms = math.sqrt(signal) * math.sqrt(float((b * b).sum()))
    largest = float(delta[worst]) if delta.size else 0.0
    return TensorDifference(
        max_abs=largest,
        mean_abs=float(delta.mean()) if delta.size else 0.0,
        relative=largest / rms,
        cosine=float(a @ b) / norms if norms else float(noise == 0),
        sqnr_db=_sqnr(max(signal, least_rms**2 * a.size), noise),
        where=tuple(int(i) for i in np.unravel_index(worst, reference.shape)) if delta.size else (),
        image=image,
    )


def _sqnr(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    return -math.inf if signal == 0 or math.isinf(noise) else 10 * math.log10(signal / noise)


# Name of each output of the raw tail, as people call it.
HEAD_OUTPUTS: dict[str, str] = {"cls_logits": "class", "distances": "box", "centerness": "centerness"}


@dataclass(frozen=True, slots=True)
class LevelSlice:
    """Where a pyramid level lies among the L locations: ``P3`` has stride 8."""

    name: str
    start: int
    stop: int
    rows: int
    columns: int


def level_slices(input_size: tuple[int, int], strides: tuple[int, ...]) -> list[LevelSlice]:
    """The levels of a padded input (H, W), finest first."""
    slices, start = [], 0
    for (rows, columns), stride in zip(level_sizes(*input_size, strides=strides), strides, strict=True):
        slices.append(LevelSlice(f"P{stride.bit_length() - 1}", start, start + rows * columns, rows, columns))
        start += rows * columns
    return slices


def split_levels(outputs: Tensors, levels: Sequence[LevelSlice]) -> Iterator[tuple[LevelSlice, str, NDArray[Any]]]:
    """(level, output name, (n, l, channels)) of the raw tail, in the order in which a network computes them."""
    for level in levels:
        for name in HEAD_OUTPUTS:
            yield level, name, outputs[name][:, level.start : level.stop]


def network_input(tensor: NDArray[Any], spec: PreprocessSpec) -> NDArray[np.float32]:
    """What the first convolution sees of an input tensor (n, 3, H, W): normalised float32, whichever side does it."""
    if spec.input_dtype is InputDtype.FLOAT32:
        return tensor.astype(np.float32, copy=False)
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (spec.mean, spec.std))
    normalized: NDArray[np.float32] = (tensor.astype(np.float32) / np.float32(spec.pixel_scale) - mean) / std
    return normalized


def decoded(outputs: Tensors, spec: DecodeSpec, *, index: int, input_size: tuple[int, int]) -> Candidates:
    """The candidates of one image from the raw tail's outputs, before suppression."""
    head = HeadOutputs(*(outputs[name][index] for name in HEAD_OUTPUTS))
    return decode(head, spec, input_size=input_size)


def same_candidates(first: Candidates, second: Candidates) -> bool:
    """Whether two decodes of the same outputs gave exactly the same."""
    return (
        np.array_equal(first.channels, second.channels)
        and np.array_equal(first.scores, second.scores)
        and np.array_equal(first.boxes, second.boxes)
    )


def shows_head(contract: ModelContract) -> bool:
    """Whether the head's outputs can be seen: behind the other tails they cannot."""
    return contract.tail is Tail.RAW


_PREPROCESS_TOLERANCE = Tolerance(relative=1e-4, min_sqnr_db=90.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage on all images: whether it holds, its largest difference, and a sentence."""

    stage: str
    passed: bool
    detail: str
    difference: TensorDifference | None = None


@dataclass(slots=True, eq=False)
class SeenImage:
    """Everything of one image that stages need: both detectors' tensors and detections."""

    name: str
    pixels: NDArray[np.uint8]
    reference_feeds: Tensors
    candidate_feeds: Tensors
    reference_outputs: Tensors
    candidate_outputs: Tensors
    letterbox: Letterbox
    reference_found: Detections
    candidate_found: Detections

    @property
    def input_size(self) -> tuple[int, int]:
        """Padded (H, W)."""
        height, width = self.reference_feeds["images"].shape[2:]
        return int(height), int(width)


def preprocess_stage(seen: Sequence[SeenImage], reference: ModelContract, candidate: ModelContract) -> StageResult:
    """Whether both prepare the same input, as the first convolution sees it."""
    differences = []
    for image in seen:
        mine = network_input(image.reference_feeds["images"], reference.preprocess)
        theirs = network_input(image.candidate_feeds["images"], candidate.preprocess)
        if mine.shape != theirs.shape:
            detail = f"the input tensor of '{image.name}' is {_by(theirs.shape)}, the reference's {_by(mine.shape)}"
            return StageResult(stage="preprocess", passed=False, detail=detail)
        differences.append(measure_difference(mine, theirs, image=image.name))
    return _tensor_stage("preprocess", differences, tolerance=_PREPROCESS_TOLERANCE, unit="standard deviations")


def head_stages(seen: Sequence[SeenImage], contract: ModelContract, *, tolerance: Tolerance) -> list[StageResult]:
    """Each level's class, box and centerness output, given the reference's input; ``contract`` is the reference's."""
    found: dict[str, list[TensorDifference]] = {}
    units = {"class": "logits", "box": "pixels", "centerness": "logits"}
    for image in seen:
        if image.reference_outputs["cls_logits"].shape != image.candidate_outputs["cls_logits"].shape:
            shapes = [_by(o["cls_logits"].shape) for o in (image.candidate_outputs, image.reference_outputs)]
            detail = f"class logits of '{image.name}' are {shapes[0]}, the reference's {shapes[1]}"
            return [StageResult(stage="head", passed=False, detail=detail)]
        levels = level_slices(image.input_size, contract.decode.strides)
        pairs = zip(
            split_levels(image.reference_outputs, levels), split_levels(image.candidate_outputs, levels), strict=True
        )
        for (level, name, mine), (_, _, theirs) in pairs:
            whole = image.reference_outputs[name].astype(np.float64)
            # A level without any activity must not turn rounding into a large relative difference.
            least = 0.1 * float(np.sqrt((whole * whole).mean()))
            difference = measure_difference(mine, theirs, image=image.name, least_rms=least)
            found.setdefault(f"{level.name} {HEAD_OUTPUTS[name]}", []).append(difference)
    return [
        _tensor_stage(stage, differences, tolerance=tolerance, unit=units[stage.partition(" ")[2]])
        for stage, differences in found.items()
    ]


def _tensor_stage(
    stage: str, differences: Sequence[TensorDifference], *, tolerance: Tolerance, unit: str
) -> StageResult:
    worst = max(differences, key=lambda d: (not tolerance.holds(d), d.relative))
    passed = all(tolerance.holds(d) for d in differences)
    sqnr = "equal" if worst.sqnr_db is None else f"SQNR {worst.sqnr_db:.1f} dB"
    detail = (
        f"max {worst.max_abs:.3g} {unit} ({worst.relative:.2g} of the RMS) at {list(worst.where)} of '{worst.image}', "
        f"mean {worst.mean_abs:.3g}, cosine {worst.cosine:.6f}, {sqnr}"
    )
    return StageResult(stage=stage, passed=passed, detail=detail, difference=worst)


def host_stages(seen: Sequence[SeenImage], reference: ModelContract, candidate: ModelContract) -> list[StageResult]:
    """Decode and suppression of the candidate's contract on the reference's outputs."""
    mine, theirs = reference.decode, candidate.decode
    parts = [
        (decoded(i.reference_outputs, spec, index=0, input_size=i.input_size))
        for i in seen
        for spec in (mine, replace(theirs, strides=mine.strides))
    ]
    different = [i.name for i, a, b in zip(seen, parts[::2], parts[1::2], strict=True) if not same_candidates(a, b)]
    stages = [_stated_otherwise(reference, candidate) or _host_stage("decode", different, count=len(seen))]
    changed = replace(reference, decode=suppression_of(theirs, onto=mine))
    different = [i.name for i in seen if not _same_detections(_finished(i, reference), _finished(i, changed))]
    return [*stages, _host_stage("nms", different, count=len(seen))]


def _stated_otherwise(reference: ModelContract, candidate: ModelContract) -> StageResult | None:
    """What two contracts say of the outputs and no number shows: names of the classes, strides of the levels."""
    for what, mine, theirs in (
        ("strides of the levels", reference.decode.strides, candidate.decode.strides),
        ("labels of the class channels", reference.decode.label_map, candidate.decode.label_map),
        ("class names", reference.class_names, candidate.class_names),
    ):
        if mine != theirs:
            return StageResult(stage="decode", passed=False, detail=f"the {what} differ")
    return None


def _host_stage(stage: str, different: Sequence[str], *, count: int) -> StageResult:
    if different:
        detail = f"differs on {len(different)} of {count} images, first on '{different[0]}'"
    else:
        detail = f"the same on {count} images, given the reference's outputs"
    return StageResult(stage=stage, passed=not different, detail=detail)


def suppression_of(spec: DecodeSpec, *, onto: DecodeSpec) -> DecodeSpec:
    """``onto`` with everything from ``spec`` that acts after decoding: clipping, overlap, limits."""
    theirs = spec.profile
    profile = replace(
        onto.profile,
        clip=theirs.clip,
        nms_space=theirs.nms_space,
        box_filter=theirs.box_filter,
        iou_offset=theirs.iou_offset,
        keep_ties=theirs.keep_ties,
        sort_by_score=theirs.sort_by_score,
    )
    return replace(onto, profile=profile, iou_threshold=spec.iou_threshold, max_detections=spec.max_detections)


def _finished(image: SeenImage, contract: ModelContract) -> Detections:
    return postprocess(
        image.reference_outputs, contract, index=0, input_size=image.input_size, letterbox=image.letterbox
    )


def _same_detections(first: Detections, second: Detections) -> bool:
    return np.array_equal(first.boxes, second.boxes) and np.array_equal(first.labels, second.labels)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
