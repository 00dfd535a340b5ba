"""The nms tail: clip, suppress class by class and pad to a fixed number of detections (spec 10.3, 10.4)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fcos_deploy.core.decode_spec import BoxClip, BoxFilter, DecodeSpec, NmsSpace
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.model.candidates import Candidates

__all__ = ["GreedyNms", "Suppression", "greedy_keep", "suppress"]


class Suppression(Protocol):
    """Which candidates survive: a (n, K) bool mask; only those with a score above 0 take part."""

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Tensor:
        """``limit``: the most detections that will be kept of an image."""
        ...


def suppress(
    candidates: Candidates, image_sizes: Tensor | None, *, spec: DecodeSpec, suppression: Suppression
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (n, D, 4), scores (n, D), labels (n, D) int32 and their count (n, 1) int32, D = ``max_detections``.

    Boxes stay in network-input pixels. Rows after the count are zeros with label -1. Order: best score first, or
    candidate order where the profile does not sort.

    Raises:
        ConfigError: the profile works in image pixels and ``image_sizes`` is None.
    """
    profile = spec.profile
    boxes = _clip(candidates.boxes, image_sizes, clip=profile.clip)
    measured = _in_nms_space(boxes, image_sizes, spec=spec)
    scores = candidates.scores
    if profile.box_filter is BoxFilter.BEFORE_NMS:
        shortest = (measured[..., 2:] - measured[..., :2]).amin(2)
        scores = torch.where(shortest > 0, scores, -1.0)
    keep = suppression(
        candidates._replace(boxes=measured, scores=scores), iou_threshold=spec.iou_threshold, limit=spec.max_detections
    )
    return _pad(candidates._replace(boxes=boxes, scores=torch.where(keep, scores, -1.0)), spec=spec)


def _sizes(image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Resized and original size, each (n, 1, 4) float32 as width, height, width, height."""
    if image_sizes is None:
        raise ConfigError("This profile clips or suppresses in image pixels.", hint="give image_sizes")
    resized, original = (
        torch.index_select(image_sizes, 1, torch.tensor(columns, device=image_sizes.device)).unsqueeze(1)
        for columns in ([1, 0, 1, 0], [3, 2, 3, 2])
    )
    return resized, original


def _clip(boxes: Tensor, image_sizes: Tensor | None, *, clip: BoxClip) -> Tensor:
    if clip is BoxClip.NONE:
        return boxes
    resized, _ = _sizes(image_sizes)
    limit = resized - 1.0 if clip is BoxClip.IMAGE_MINUS_ONE else resized
    return torch.minimum(boxes.clamp(min=0.0), limit)


def _in_nms_space(boxes: Tensor, image_sizes: Tensor | None, *, spec: DecodeSpec) -> Tensor:
    """Boxes in the pixels in which overlaps are measured, widened by the profile's ``iou_offset``."""
    if spec.profile.nms_space is NmsSpace.ORIGINAL:
        resized, original = _sizes(image_sizes)
        boxes = boxes * (original / resized)
    if spec.profile.iou_offset:
        # Widths and heights of x2 - x1 + offset are those of a box whose far corner lies offset further.
        boxes = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device) * spec.profile.iou_offset
    return boxes


def _pad(survivors: Candidates, *, spec: DecodeSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Rows that lose against every survivor, so that there are always enough to choose from.
    filler = torch.full_like(survivors.scores[:, :1], -1.0).expand(-1, spec.max_detections)
    scores, chosen = torch.topk(torch.cat((survivors.scores, filler), 1), spec.max_detections, dim=1)
    if not spec.profile.sort_by_score:
        position = torch.where(scores > 0, -chosen.to(torch.float32), -torch.inf)
        order = torch.topk(position, spec.max_detections, dim=1).indices
        scores, chosen = torch.gather(scores, 1, order), torch.gather(chosen, 1, order)
    valid = scores > 0
    chosen = torch.where(valid, chosen, 0)
    boxes = torch.gather(survivors.boxes, 1, chosen.unsqueeze(2).expand(-1, -1, 4))
    labels = torch.gather(survivors.labels, 1, chosen)
    return (
        torch.where(valid.unsqueeze(2), boxes, 0.0),
        torch.where(valid, scores, 0.0),
        torch.where(valid, labels, -1).to(torch.int32),
        valid.sum(1, keepdim=True).to(torch.int32),
    )


def greedy_keep(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of each class of each image, exact.

    boxes: (n, K, 4) float32 xyxy. scores: (n, K) float32; those not above 0 take no part. labels: (n, K) int64.

    Returns:
        (n, K) bool. Of two equal scores the earlier one goes first; suppressed if IoU > ``iou_threshold``, strictly.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(scores.shape[0]):
        order = torch.argsort(scores[image], descending=True, stable=True)
        rest = order[scores[image][order] > 0]
        while len(rest):
            best, rest = rest[0], rest[1:]
            keep[image, best] = True
            overlap = _iou(boxes[image, best], boxes[image, rest]) > iou_threshold
            rest = rest[~(overlap & (labels[image, rest] == labels[image, best]))]
    return keep


def _iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box (4,) with others (m, 4), xyxy -> (m,)."""
    sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    inter = sides[:, 0] * sides[:, 1]
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - inter
    return inter / union


@torch.library.custom_op("fcos_deploy::nms_keep", mutates_args=())
def _nms_keep(  # noqa: PLR0917  (operators of torch take their arguments by position)
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: int,  # noqa: ARG001  (needed where it becomes ONNX NonMaxSuppression)
    iou_threshold: float,
    limit: int,  # noqa: ARG001  (likewise)
) -> Tensor:
    """``greedy_keep`` as one opaque operator, which the exporter writes as ONNX NonMaxSuppression."""
    return greedy_keep(boxes, scores, labels, iou_threshold)


@_nms_keep.register_fake
def _(_boxes: Tensor, scores: Tensor, *_: object) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


class GreedyNms:
    """Suppression by the reference algorithm; ONNX NonMaxSuppression when exported."""

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Tensor:
        """(n, K) bool."""
        boxes, scores, labels, classes = candidates
        keep: Tensor = torch.ops.fcos_deploy.nms_keep(boxes, scores, labels, classes, iou_threshold, limit)
        return keep
