"""Finds what explains a departure: known mistakes are made in the reference until one reproduces the candidate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.causes import (
    Cause,
    activation_causes,
    contract_causes,
    level_causes,
    outputs_explained,
    pixel_causes,
    shifted,
)
from fcos_deploy.accuracy.matching import MatchOptions, compare_detections
from fcos_deploy.accuracy.stages import level_slices, network_input
from fcos_deploy.core.backend import SessionOptions, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.locations import location_strides
from fcos_deploy.core.network import BoxActivation
from fcos_deploy.core.postprocess import postprocess
from fcos_deploy.core.preprocess import Letterbox
from fcos_deploy.core.preprocess_spec import InputDtype
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = ["Evidence", "find_causes"]

_CONVINCING = 0.9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """One image as both detectors saw it, and the reference itself, to try mistakes on.

    ``network``: the reference's PyTorch network, where there is one; with it mistakes inside the network can be tried.
    """

    reference: Detector
    candidate: Detector
    reference_feeds: Tensors
    candidate_feeds: Tensors
    reference_outputs: Tensors
    candidate_outputs: Tensors
    letterbox: Letterbox
    candidate_found: Detections
    network: Fcos | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        """Padded (H, W)."""
        height, width = self.reference_feeds["images"].shape[2:]
        return int(height), int(width)


def find_causes(stage: str, evidence: Evidence) -> list[Cause]:
    """What explains that ``stage`` is the first to depart, the most likely first; empty when nothing known does."""
    finders = {"preprocess": _preprocess_causes, "decode": _contract_decode, "nms": _contract_decode}
    found = finders.get(stage, _final_causes if stage == "detections" else _head_causes)(evidence)
    return sorted(found, key=lambda cause: -cause.explained)


def _preprocess_causes(evidence: Evidence) -> list[Cause]:
    mine, theirs = evidence.reference.contract, evidence.candidate.contract
    causes = contract_causes(mine, theirs, part="preprocess")
    first = network_input(evidence.reference_feeds["images"], mine.preprocess)[0]
    second = network_input(evidence.candidate_feeds["images"], theirs.preprocess)[0]
    if first.shape != second.shape:
        return causes
    # Padding is not part of the picture, and follows another rule.
    height, width = evidence.letterbox.resized_height, evidence.letterbox.resized_width
    return causes + pixel_causes(first[:, :height, :width], second[:, :height, :width])


def _contract_decode(evidence: Evidence) -> list[Cause]:
    return contract_causes(evidence.reference.contract, evidence.candidate.contract, part="decode")


def _head_causes(evidence: Evidence) -> list[Cause]:
    mine, theirs = evidence.reference_outputs, evidence.candidate_outputs
    strides = evidence.reference.contract.decode.strides
    causes = _compute_causes(evidence)
    if mine["cls_logits"].shape == theirs["cls_logits"].shape:
        causes += level_causes(mine, theirs, level_slices(evidence.input_size, strides))
        per_location = location_strides(*evidence.input_size, strides=strides)
        causes += activation_causes(mine["distances"], theirs["distances"], per_location)
        for name, sentence, outputs in _tried(evidence):
            share = outputs_explained(mine, theirs, outputs)
            if share > _CONVINCING:
                causes.append(Cause(name=name, sentence=sentence, explained=share))
    return causes


def _compute_causes(evidence: Evidence) -> list[Cause]:
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


def _tried(evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Mistakes made in the reference, and what it then gives."""
    images = evidence.reference_feeds["images"]
    run = evidence.reference.infer
    swapped = np.ascontiguousarray(images[:, ::-1])
    yield "channel-order", "the graph swaps the colour channels (RGB/BGR)", run({"images": swapped})
    for dx, dy in ((0.5, 0.5), (-0.5, -0.5)):
        moved = _moved(images, dx, dy)
        text = f"the graph shifts the image by {dx:+.1f} pixels to the right and {dy:+.1f} down"
        yield "shift", text, run({"images": moved})
    if evidence.network is not None:
        yield from _network_variants(evidence.network, evidence)


def _moved(images: NDArray[np.generic], dx: float, dy: float) -> NDArray[np.generic]:
    moved = np.stack([shifted(image.astype(np.float32), dx, dy) for image in images])
    return moved.round().astype(images.dtype) if images.dtype == np.dtype(InputDtype.UINT8.value) else moved


def _network_variants(network: Fcos, evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """The reference's weights in networks that load them as well, and are silently wrong."""
    from fcos_deploy.model.fcos import Fcos

    config = network.config
    other = BoxActivation.EXP if config.box_activation is BoxActivation.RELU else BoxActivation.RELU
    places = {True: "first 1x1", False: "3x3"}
    variants = (
        (
            "stride-placement",
            f"the bottlenecks' stride is on the {places[not config.stride_in_1x1]} convolution (stride_in_1x1 differs)",
            replace(config, stride_in_1x1=not config.stride_in_1x1),
        ),
        (
            "activation",
            f"the box activation is {other} in place of {config.box_activation}",
            replace(config, box_activation=other),
        ),
        (
            "centerness-branch",
            "the centerness comes from the other tower",
            replace(config, centerness_on_reg=not config.centerness_on_reg),
        ),
    )
    for name, text, changed in variants:
        variant = Fcos(changed)
        variant.load_state_dict(network.state_dict())
        with Detector.of_network(variant.eval(), evidence.reference.contract, options=_options(evidence)) as detector:
            yield name, text, detector.infer(evidence.reference_feeds)


def _options(evidence: Evidence) -> SessionOptions:
    threads = evidence.reference.session.description.get("threads", "")
    return SessionOptions(threads=int(threads) if threads.isdigit() else None)


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
