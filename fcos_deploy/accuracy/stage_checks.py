"""Whether each stage holds, over all images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.stages import (
    HEAD_OUTPUTS,
    decoded,
    level_slices,
    network_input,
    same_candidates,
    split_levels,
)
from fcos_deploy.accuracy.tensors import TensorDifference, Tolerance, measure_difference
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode_spec import DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox

__all__ = ["SeenImage", "StageResult", "head_stages", "host_stages", "preprocess_stage", "suppression_of"]

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
