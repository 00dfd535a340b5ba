"""Finds what explains a departure: known mistakes are made in the reference until one reproduces the candidate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.causes import (
    Cause,
    activation_causes,
    class_causes,
    contract_causes,
    explained,
    level_causes,
    outputs_explained,
    picture_place_causes,
    pixel_causes,
)
from fcos_deploy.accuracy.matching import MatchOptions, compare_detections
from fcos_deploy.accuracy.stages import level_slices, network_input, split_levels
from fcos_deploy.accuracy.trials import Evidence, rounded_networks, tried_mistakes, tried_resizing
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.locations import location_strides
from fcos_deploy.core.postprocess import postprocess

__all__ = ["Evidence", "find_causes"]

_CONVINCING = 0.9
# Least ratio of two powers of rounding noise: in the median 3 dB, in each output 10 dB.
_SAME_NOISE, _SIMILAR_NOISE = 0.5, 0.1


def find_causes(stage: str, evidence: Evidence) -> list[Cause]:
    """What explains that ``stage`` is the first to depart, the most likely first; empty when nothing known does."""
    finders = {"preprocess": _preprocess_causes, "decode": _contract_decode, "nms": _contract_decode}
    found = finders.get(stage, _final_causes if stage == "detections" else _head_causes)(evidence)
    return sorted(found, key=lambda cause: -cause.explained)


def _preprocess_causes(evidence: Evidence) -> list[Cause]:
    causes = contract_causes(evidence.reference.contract, evidence.candidate.contract, part="preprocess")
    mine, theirs = evidence.reference.contract.preprocess, evidence.candidate.contract.preprocess
    first = network_input(evidence.reference_feeds["images"], mine)[0]
    second = network_input(evidence.candidate_feeds["images"], theirs)[0]
    if first.shape != second.shape:
        return causes
    # Padding is not part of the picture, and follows another rule.
    height, width = evidence.letterbox.resized_height, evidence.letterbox.resized_width
    mine_seen, theirs_seen = first[:, :height, :width], second[:, :height, :width]
    causes += pixel_causes(mine_seen, theirs_seen) + picture_place_causes(first, second)
    for name, sentence, tensor in tried_resizing(evidence):
        share = explained(mine_seen, theirs_seen, network_input(tensor[None], mine)[0, :, :height, :width])
        if share > _CONVINCING:
            causes.append(Cause(name=name, sentence=sentence, explained=share))
    return causes


def _contract_decode(evidence: Evidence) -> list[Cause]:
    mine, theirs = evidence.reference.contract, evidence.candidate.contract
    causes = contract_causes(mine, theirs, part="decode")
    if mine.class_names != theirs.class_names:
        text = f"the class names are {', '.join(theirs.class_names)} in place of {', '.join(mine.class_names)}"
        causes.append(Cause(name="class_names", sentence=text, explained=1.0))
    return causes


def _head_causes(evidence: Evidence) -> list[Cause]:
    mine, theirs = evidence.reference_outputs, evidence.candidate_outputs
    strides = evidence.reference.contract.decode.strides
    causes = _declared_compute(evidence)
    if mine["cls_logits"].shape == theirs["cls_logits"].shape:
        causes += level_causes(mine, theirs, level_slices(evidence.input_size, strides))
        per_location = location_strides(*evidence.input_size, strides=strides)
        causes += activation_causes(mine["distances"], theirs["distances"], per_location)
        causes += class_causes(mine["cls_logits"], theirs["cls_logits"], evidence.reference.contract.class_names)
        for name, sentence, outputs in tried_mistakes(evidence):
            share = outputs_explained(mine, theirs, outputs)
            if share > _CONVINCING:
                causes.append(Cause(name=name, sentence=sentence, explained=share))
    return causes or _rounding_causes(evidence)


def _declared_compute(evidence: Evidence) -> list[Cause]:
    mine = evidence.reference.session.description.get("compute", "")
    theirs = evidence.candidate.session.description.get("compute", "")
    if not theirs or mine == theirs:
        return []
    return [
        Cause(
            name="compute-type",
            sentence=f"the candidate computes in {theirs} in place of {mine}",
            explained=1.0,
        )
    ]


def _rounding_causes(evidence: Evidence) -> list[Cause]:
    """Whether the differences are as large, in every level and output, as those of a smaller float type."""
    noise = _noise(evidence, evidence.candidate_outputs)
    causes = []
    for compute, outputs in rounded_networks(evidence):
        expected = _noise(evidence, outputs)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(np.minimum(noise / expected, expected / noise))
        if ratio.min() >= _SIMILAR_NOISE and np.median(ratio) >= _SAME_NOISE:
            text = (
                f"the differences are as large as those of rounding to {compute} in place of f32: "
                f"{_decibels(noise)} dB below the values in the median, {_decibels(expected)} dB with {compute}"
            )
            causes.append(Cause(name="compute-type", sentence=text, explained=float(np.median(ratio))))
    return causes


def _noise(evidence: Evidence, outputs: Tensors) -> NDArray[np.float64]:
    """Power of the difference over that of the reference, of each level and output."""
    levels = level_slices(evidence.input_size, evidence.reference.contract.decode.strides)
    pairs = zip(split_levels(evidence.reference_outputs, levels), split_levels(outputs, levels), strict=True)
    powers = []
    for (_, name, mine), (_, _, theirs) in pairs:
        whole = float((evidence.reference_outputs[name].astype(np.float64) ** 2).mean())
        difference = mine.astype(np.float64) - theirs
        powers.append(float((difference * difference).mean()) / max(whole, 1e-30))
    return np.array(powers)


def _decibels(noise: NDArray[np.float64]) -> str:
    return f"{-10 * np.log10(max(float(np.median(noise)), 1e-30)):.0f}"


def _final_causes(evidence: Evidence) -> list[Cause]:
    """Whether another overlap threshold of the suppression reproduces the candidate's detections."""
    contract = evidence.reference.contract
    causes = []
    before = _agreement(evidence, contract)
    for threshold in np.arange(0.3, 0.95, 0.05):
        spec = replace(contract.decode, iou_threshold=round(float(threshold), 2))
        share = _agreement(evidence, replace(contract, decode=spec))
        if share > max(before, _CONVINCING):
            text = (
                f"the suppression in the graph behaves as with an IoU threshold of {spec.iou_threshold}, "
                f"the contract says {contract.decode.iou_threshold}"
            )
            causes.append(Cause(name="decode.iou_threshold", sentence=text, explained=share))
    return causes + _contract_decode(evidence)


def _agreement(evidence: Evidence, contract: ModelContract) -> float:
    found = postprocess(
        evidence.reference_outputs, contract, index=0, input_size=evidence.input_size, letterbox=evidence.letterbox
    )
    options = MatchOptions(iou_threshold=0.9, min_score=0.0)
    return compare_detections({0: found}, {0: evidence.candidate_found}, options=options).match_rate
