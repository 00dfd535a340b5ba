"""Stage by stage: where does a deployed detector first diverge from the reference, by how much, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.diagnosis import Cause, Evidence, find_causes
from fcos_deploy.accuracy.matching import DetectionAgreement, MatchOptions, compare_detections
from fcos_deploy.accuracy.stages import (
    SeenImage,
    StageResult,
    Tolerance,
    head_stages,
    host_stages,
    preprocess_stage,
    shows_head,
    tolerance_for,
)
from fcos_deploy.core.backend import ComputeType, Tensors
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox, padded_size
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = ["ParityImage", "ParityOptions", "ParityReport", "StageResult", "compare_stages"]


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
    options: ParityOptions | None = None,
    network: Fcos | None = None,
    progress: ProgressFn = no_progress,
) -> ParityReport:
    """Compare two detectors on some images; the reference must have the raw tail.

    Both should take the same input size and dtype; the candidate's network is given the
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
    stages = [preprocess_stage(seen, reference.contract, candidate.contract)]
    if shows_head(candidate.contract):
        stages += head_stages(seen, reference.contract, tolerance=tolerance)
    stages += host_stages(seen, reference.contract, candidate.contract)
    agreement = compare_detections(
        {i: image.reference_found for i, image in enumerate(seen)},
        {i: image.candidate_found for i, image in enumerate(seen)},
        options=options.matching,
    )
    stages.append(_final_stage(agreement, tolerance))
    report = ParityReport(stages=tuple(stages), agreement=agreement)
    if report.first is None:
        return report
    worst = _worst_image(report.first, seen)
    evidence = _evidence(worst, reference, candidate, network=network)
    return replace(report, causes=tuple(find_causes(report.first.stage, evidence)))


def _worst_image(stage: StageResult, seen: Sequence[SeenImage]) -> SeenImage:
    name = stage.difference.image if stage.difference else ""
    return next((image for image in seen if image.name == name), seen[0])


def _evidence(image: SeenImage, reference: Detector, candidate: Detector, *, network: Fcos | None) -> Evidence:
    return Evidence(
        reference=reference,
        candidate=candidate,
        pixels=image.pixels,
        reference_feeds=image.reference_feeds,
        candidate_feeds=image.candidate_feeds,
        reference_outputs=image.reference_outputs,
        candidate_outputs=image.candidate_outputs,
        letterbox=image.letterbox,
        candidate_found=image.candidate_found,
        network=network,
    )


def _tolerance(candidate: Detector) -> Tolerance:
    compute = candidate.session.description.get("compute", "")
    known = ComputeType(compute) if compute in set(ComputeType) else ComputeType.F32
    return tolerance_for(candidate.contract.precision, known)


def _run(reference: Detector, candidate: Detector, image: ParityImage) -> SeenImage:
    reference_feeds, (letterbox,) = reference.prepare([image.pixels])
    candidate_feeds, candidate_boxes = candidate.prepare([image.pixels])
    fed = dict(candidate_feeds)
    if _same_kind(reference_feeds["images"], candidate_feeds["images"]):
        fed["images"] = reference_feeds["images"]
    reference_outputs, candidate_outputs = reference.infer(reference_feeds), candidate.infer(fed)
    own = candidate.infer(candidate_feeds) if fed["images"] is not candidate_feeds["images"] else candidate_outputs
    return SeenImage(
        image.name,
        image.pixels,
        reference_feeds,
        candidate_feeds,
        reference_outputs,
        candidate_outputs,
        letterbox,
        reference.finish(reference_outputs, [letterbox])[0],
        _finish(candidate, own, candidate_boxes[0], strides=reference.contract.decode.strides),
    )


def _same_kind(first: NDArray[Any], second: NDArray[Any]) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape


def _finish(detector: Detector, outputs: Tensors, letterbox: Letterbox, *, strides: tuple[int, ...]) -> Detections:
    """As the detector does, but with the reference's strides: wrong ones need not even fit the outputs."""
    if detector.contract.decode.strides == strides:
        return detector.finish(outputs, [letterbox])[0]
    contract = replace(detector.contract, decode=replace(detector.contract.decode, strides=strides))
    size = padded_size(letterbox.image_height, letterbox.image_width, contract.preprocess)
    return postprocess(outputs, contract, index=0, input_size=size, letterbox=letterbox)


def _final_stage(agreement: DetectionAgreement, tolerance: Tolerance) -> StageResult:
    detail = (
        f"{agreement.match_rate:.1%} agree ({agreement.missed} missed, {agreement.extra} extra of "
        f"{agreement.reference}), boxes within {agreement.box_delta_px.max_abs:.3g} pixels, "
        f"scores within {agreement.score_delta.max_abs:.3g}"
    )
    return StageResult(stage="detections", passed=agreement.match_rate >= tolerance.min_match_rate, detail=detail)
