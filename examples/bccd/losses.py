"""Training FCOS: which location learns which box (with centre sampling), and the three losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot

__all__ = ["FcosLosses", "Targets", "assign_targets", "centerness_target", "fcos_losses", "focal_loss", "giou_loss"]

_CENTER_RADIUS = 1.5  # strides, as in torchvision (center_sampling_radius)


class Targets(NamedTuple):
    """One image's targets for all L locations.

    labels: (L,) int64, class index, or -1 for background.
    distances: (L, 4) float32, left, top, right, bottom in network-input pixels; zeros for background.
    """

    labels: Tensor
    distances: Tensor


def assign_targets(boxes: Tensor, labels: Tensor, *, centers: Tensor, strides: Tensor) -> Targets:
    """Give every location the smallest box that it may predict.

    A location may predict a box that contains it, whose centre is within 1.5 strides on both axes, and whose
    largest distance lies in the level's range: (4, 8] strides, without lower bound on the finest level and without
    upper bound on the coarsest.

    Args:
        boxes: (g, 4) float32 xyxy, network-input pixels. labels: (g,) int64.
        centers: (L, 2), strides: (L,), from ``fcos_deploy.core.decode``.
    """
    if not len(boxes):
        return Targets(torch.full((len(centers),), -1), torch.zeros(len(centers), 4))
    distances = torch.cat([centers[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - centers[:, None]], 2)
    inside = distances.amin(2) > 0
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = (centers[:, None] - middle[None]).abs().amax(2) < _CENTER_RADIUS * strides[:, None]
    longest = distances.amax(2)
    lower = torch.where(strides == strides.min(), 0.0, 4.0 * strides)
    upper = torch.where(strides == strides.max(), torch.inf, 8.0 * strides)
    in_range = (longest > lower[:, None]) & (longest <= upper[:, None])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    # The smallest box that a location may predict wins; one that it may not predict costs infinitely much.
    cost = torch.where(inside & near & in_range, areas[None], torch.inf)
    smallest, index = cost.min(1)
    positive = smallest.isfinite()
    chosen = distances[torch.arange(len(centers)), index]
    return Targets(torch.where(positive, labels[index], -1), torch.where(positive[:, None], chosen, 0.0))


def centerness_target(distances: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of positive distances (p, 4) -> (p,)."""
    horizontal, vertical = distances[:, 0::2], distances[:, 1::2]
    ratio = horizontal.amin(1) / horizontal.amax(1) * (vertical.amin(1) / vertical.amax(1))
    return ratio.clamp(min=0.0).sqrt()


class FcosLosses(NamedTuple):
    """Scalars; their sum is what is minimised."""

    classification: Tensor
    box: Tensor
    centerness: Tensor


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the sigmoid focal loss over logits (..., classes) with 0/1 targets of the same shape."""
    probability = logits.sigmoid()
    # Not log(sigmoid): for a logit of -100 that is the log of 0.
    log_correct = torch.where(targets > 0, logsigmoid(logits), logsigmoid(-logits))
    wrong = torch.where(targets > 0, 1 - probability, probability)
    weight = torch.where(targets > 0, alpha, 1 - alpha)
    return -(weight * wrong**gamma * log_correct).sum()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of boxes given as distances (p, 4) from a common location -> (p,)."""
    # The location lies in both boxes. The shorter distance to each side therefore bounds their intersection, the longer
    # one the smallest box around both.
    intersection, hull, predicted_area, target_area = (
        (d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3])
        for d in (torch.minimum(predicted, target), torch.maximum(predicted, target), predicted, target)
    )
    union = predicted_area + target_area - intersection
    iou = intersection / union.clamp(min=1e-6)
    return 1 - iou + (hull - union) / hull.clamp(min=1e-6)


def fcos_losses(cls_logits: Tensor, distances: Tensor, centerness: Tensor, *, targets: list[Targets]) -> FcosLosses:
    """Losses of a batch, each divided by the number of positive locations.

    Args:
        cls_logits: (n, L, classes). distances: (n, L, 4) in pixels. centerness: (n, L, 1).
        targets: one ``Targets`` an image.
    """
    labels = torch.stack([t.labels for t in targets])
    positive = labels >= 0
    target_distances = torch.stack([t.distances for t in targets])[positive]
    count = max(1, len(target_distances))
    classes = one_hot(labels.clamp(min=0), cls_logits.shape[-1]) * positive[..., None]
    centers = centerness_target(target_distances)
    return FcosLosses(
        focal_loss(cls_logits, classes) / count,
        giou_loss(distances[positive], target_distances).sum() / count,
        binary_cross_entropy_with_logits(centerness[positive][:, 0], centers, reduction="sum") / count,
    )
