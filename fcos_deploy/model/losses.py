"""The three losses of FCOS: focal, GIoU and centerness (spec 11)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot

from fcos_deploy.model.targets import Targets, centerness_target

__all__ = ["FcosLosses", "fcos_losses", "focal_loss", "giou_loss"]


class FcosLosses(NamedTuple):
    """Scalars; their sum is what is minimised."""

    classification: Tensor
    box: Tensor
    centerness: Tensor


def focal_loss(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the sigmoid focal loss over logits (..., classes) with 0/1 targets of the same shape."""
    probability = logits.sigmoid()
    log_correct = torch.where(targets > 0, logsigmoid(logits), logsigmoid(-logits))
    wrong = torch.where(targets > 0, 1 - probability, probability)
    weight = torch.where(targets > 0, alpha, 1 - alpha)
    return -(weight * wrong**gamma * log_correct).sum()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU of boxes given as distances (p, 4) from a common location -> (p,)."""
    low = torch.minimum(predicted, target)
    high = torch.maximum(predicted, target)
    intersection = (low[:, 0] + low[:, 2]) * (low[:, 1] + low[:, 3])
    hull = (high[:, 0] + high[:, 2]) * (high[:, 1] + high[:, 3])
    union = _area(predicted) + _area(target) - intersection
    iou = intersection / union.clamp(min=1e-6)
    return 1 - iou + (hull - union) / hull.clamp(min=1e-6)


def _area(distances: Tensor) -> Tensor:
    return (distances[:, 0] + distances[:, 2]) * (distances[:, 1] + distances[:, 3])


def fcos_losses(cls_logits: Tensor, distances: Tensor, centerness: Tensor, *, targets: list[Targets]) -> FcosLosses:
    """Losses of a batch, each divided by the number of positive locations.

    Args:
        cls_logits: (n, L, classes). distances: (n, L, 4) in pixels. centerness: (n, L, 1).
        targets: one ``Targets`` an image.
    """
    labels = torch.stack([t.labels for t in targets])
    positive = labels >= 0
    wanted = torch.stack([t.distances for t in targets])[positive]
    count = max(1, len(wanted))
    classes = one_hot(labels.clamp(min=0), cls_logits.shape[-1]) * positive[..., None]
    centers = centerness_target(wanted)
    return FcosLosses(
        focal_loss(cls_logits, classes) / count,
        giou_loss(distances[positive], wanted).sum() / count,
        binary_cross_entropy_with_logits(centerness[positive][:, 0], centers, reduction="sum") / count,
    )
