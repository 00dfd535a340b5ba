"""Parity of two detectors: the first stage at which the candidate diverges from the reference, by how much, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.diagnosis import Cause, Evidence, find_causes
from fcos_deploy.accuracy.layers import LayerFinding
from fcos_deploy.accuracy.stages import (
    SeenImage,
    StageResult,
    Tolerance,
    detections_stage,
    head_stages,
    host_stages,
    preprocess_stage,
    tolerance_for,
)
from fcos_deploy.core.backend import ComputeType, Tensors
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.matching import DetectionAgreement, agreement_json, compare_detections
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox, padded_size
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = ["ParityImage", "ParityReport", "compare_stages", "parity_json"]


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
