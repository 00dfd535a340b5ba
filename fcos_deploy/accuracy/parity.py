"""Stage by stage: where does a deployed detector first depart from the reference, by how much, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.causes import Cause
from fcos_deploy.accuracy.diagnosis import Evidence, find_causes
from fcos_deploy.accuracy.matching import DetectionAgreement, MatchOptions, compare_detections
from fcos_deploy.accuracy.stages import (
    HEAD_OUTPUTS,
    decoded,
    level_slices,
    network_input,
    same_candidates,
    shows_head,
    split_levels,
)
from fcos_deploy.accuracy.tensors import TensorDifference, Tolerance, measure_difference, tolerance_for
from fcos_deploy.core.backend import ComputeType, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode_spec import DecodeSpec
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = [
    "ParityImage",
    "ParityOptions",
    "ParityReport",
    "StageResult",
    "aligned_contract",
    "compare_stages",
    "suppression_of",
]

_PREPROCESS_TOLERANCE = Tolerance(relative=1e-4, min_sqnr_db=90.0)


@dataclass(frozen=True, slots=True, eq=False)
class ParityImage:
    """(h, w, 3) uint8 RGB, and what to call it."""

    name: str
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """``tolerance`` None: what the candidate's precision and arithmetic allow. ``matching``: of final detections."""

    tolerance: Tolerance | None = None
    matching: MatchOptions = field(default_factory=MatchOptions)
    min_match_rate: float = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage on all images: whether it holds, its largest difference, and a sentence."""

    stage: str
    passed: bool
    detail: str
    difference: TensorDifference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All stages in order. ``causes``: what explains the first departure, the most likely first."""

    stages: tuple[StageResult, ...]
    agreement: DetectionAgreement
    causes: tuple[Cause, ...] = ()

    @property
    def first(self) -> StageResult | None:
        """The first stage that departs; None when none does."""
        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def passed(self) -> bool:
        """Whether every stage holds."""
        return self.first is None


@dataclass(slots=True, eq=False)
class _Image:
    """Everything of one image that stages need."""

    name: str
    reference_feeds: Tensors
    candidate_feeds: Tensors
    reference_outputs: Tensors
    candidate_outputs: Tensors
    letterbox: Letterbox
    reference_found: Detections
    candidate_found: Detections

    @property
    def input_size(self) -> tuple[int, int]:
        height, width = self.reference_feeds["images"].shape[2:]
        return int(height), int(width)


def compare_stages(
    reference: Detector,
    candidate: Detector,
    images: Sequence[ParityImage],
    *,
    options: ParityOptions | None = None,
    network: Fcos | None = None,
    progress: ProgressFn = no_progress,
) -> ParityReport:
    """Compare two detectors on some images; the reference must have the raw tail.

    Both should take the same input size and dtype (``aligned_contract``); the candidate's network is given the
    reference's tensor, so that what its own preprocessing does wrong shows in that stage alone. With ``network``, the
    reference's own, mistakes inside the network are tried as explanations too.

    Raises:
        ConfigError: no images, or a reference whose head cannot be seen.
    """
    if not images:
        raise ConfigError("Parity needs at least one image.")
    if not shows_head(reference.contract):
        raise ConfigError(f"The reference must have the raw tail, it has '{reference.contract.tail}'.")
    options = options or ParityOptions()
    tolerance = options.tolerance or _tolerance(candidate)
    seen = []
    for done, image in enumerate(images, start=1):
        seen.append(_run(reference, candidate, image))
        progress("parity", done, len(images))
    stages = [_preprocess_stage(seen, reference.contract, candidate.contract)]
    if shows_head(candidate.contract):
        stages += _head_stages(seen, reference.contract, tolerance=tolerance)
    stages += _host_stages(seen, reference.contract, candidate.contract)
    agreement = compare_detections(
        {i: image.reference_found for i, image in enumerate(seen)},
        {i: image.candidate_found for i, image in enumerate(seen)},
        options=options.matching,
    )
    stages.append(_final_stage(agreement, options))
    report = ParityReport(stages=tuple(stages), agreement=agreement)
    if report.first is None:
        return report
    worst = _worst_image(report.first, seen)
    evidence = _evidence(worst, reference, candidate, network=network)
    return replace(report, causes=tuple(find_causes(report.first.stage, evidence)))


def _worst_image(stage: StageResult, seen: Sequence[_Image]) -> _Image:
    name = stage.difference.image if stage.difference else ""
    return next((image for image in seen if image.name == name), seen[0])


def _evidence(image: _Image, reference: Detector, candidate: Detector, *, network: Fcos | None) -> Evidence:
    return Evidence(
        reference=reference,
        candidate=candidate,
        reference_feeds=image.reference_feeds,
        candidate_feeds=image.candidate_feeds,
        reference_outputs=image.reference_outputs,
        candidate_outputs=image.candidate_outputs,
        letterbox=image.letterbox,
        candidate_found=image.candidate_found,
        network=network,
    )


def aligned_contract(reference: ModelContract, candidate: ModelContract) -> ModelContract:
    """The reference's contract for the candidate's input size and dtype, with the raw tail.

    A checkpoint's own contract may want float input whose size follows the image, where the candidate was exported for
    uint8 on a fixed canvas. What means something to the network (channel order, mean, std) stays the reference's own.
    """
    theirs = candidate.preprocess
    mine = replace(
        reference.preprocess,
        height=theirs.height,
        width=theirs.width,
        shortest=theirs.shortest,
        longest=theirs.longest,
        size_rule=theirs.size_rule,
        input_dtype=theirs.input_dtype,
        resize_order=theirs.resize_order,
        resize_filter=theirs.resize_filter,
    )
    return replace(reference, preprocess=mine, tail=Tail.RAW)


def _tolerance(candidate: Detector) -> Tolerance:
    compute = candidate.session.description.get("compute", "")
    known = ComputeType(compute) if compute in set(ComputeType) else ComputeType.F32
    return tolerance_for(candidate.contract.precision, known)


def _run(reference: Detector, candidate: Detector, image: ParityImage) -> _Image:
    reference_feeds, (letterbox,) = reference.prepare([image.pixels])
    candidate_feeds, candidate_boxes = candidate.prepare([image.pixels])
    fed = dict(candidate_feeds)
    if _same_kind(reference_feeds["images"], candidate_feeds["images"]):
        fed["images"] = reference_feeds["images"]
    reference_outputs, candidate_outputs = reference.infer(reference_feeds), candidate.infer(fed)
    own = candidate.infer(candidate_feeds) if fed["images"] is not candidate_feeds["images"] else candidate_outputs
    return _Image(
        image.name,
        reference_feeds,
        candidate_feeds,
        reference_outputs,
        candidate_outputs,
        letterbox,
        reference.finish(reference_outputs, [letterbox])[0],
        candidate.finish(own, candidate_boxes)[0],
    )


def _same_kind(first: NDArray[Any], second: NDArray[Any]) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape


def _preprocess_stage(seen: Sequence[_Image], reference: ModelContract, candidate: ModelContract) -> StageResult:
    differences = []
    for image in seen:
        mine = network_input(image.reference_feeds["images"], reference.preprocess)
        theirs = network_input(image.candidate_feeds["images"], candidate.preprocess)
        if mine.shape != theirs.shape:
            detail = f"the input tensor of '{image.name}' is {_by(theirs.shape)}, the reference's {_by(mine.shape)}"
            return StageResult(stage="preprocess", passed=False, detail=detail)
        differences.append(measure_difference(mine, theirs, image=image.name))
    return _tensor_stage("preprocess", differences, tolerance=_PREPROCESS_TOLERANCE, unit="standard deviations")


def _head_stages(seen: Sequence[_Image], contract: ModelContract, *, tolerance: Tolerance) -> list[StageResult]:
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


def _host_stages(seen: Sequence[_Image], reference: ModelContract, candidate: ModelContract) -> list[StageResult]:
    """Decode and suppression of the candidate's contract on the reference's outputs."""
    mine, theirs = reference.decode, candidate.decode
    parts = [
        (decoded(i.reference_outputs, spec, index=0, input_size=i.input_size))
        for i in seen
        for spec in (mine, replace(theirs, strides=mine.strides))
    ]
    different = [i.name for i, a, b in zip(seen, parts[::2], parts[1::2], strict=True) if not same_candidates(a, b)]
    stages = [_host_stage("decode", different, count=len(seen))]
    changed = replace(reference, decode=suppression_of(theirs, onto=mine))
    different = [i.name for i in seen if not _same_detections(_finished(i, reference), _finished(i, changed))]
    return [*stages, _host_stage("nms", different, count=len(seen))]


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


def _finished(image: _Image, contract: ModelContract) -> Detections:
    return postprocess(
        image.reference_outputs, contract, index=0, input_size=image.input_size, letterbox=image.letterbox
    )


def _same_detections(first: Detections, second: Detections) -> bool:
    return np.array_equal(first.boxes, second.boxes) and np.array_equal(first.labels, second.labels)


def _final_stage(agreement: DetectionAgreement, options: ParityOptions) -> StageResult:
    detail = (
        f"{agreement.match_rate:.1%} agree ({agreement.missed} missed, {agreement.invented} invented of "
        f"{agreement.reference}), boxes within {agreement.box_delta_px.max_abs:.3g} pixels, "
        f"scores within {agreement.score_delta.max_abs:.3g}"
    )
    return StageResult(stage="detections", passed=agreement.match_rate >= options.min_match_rate, detail=detail)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
