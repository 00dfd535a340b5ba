"""Which location learns which box: FCOS target assignment with centre sampling (spec 11)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Targets", "assign_targets", "centerness_target"]

CENTER_RADIUS = 1.5  # strides (FCOS, journal version)


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
        centers: (L, 2), strides: (L,), from ``fcos_deploy.core.locations``.
    """
    if not len(boxes):
        return Targets(torch.full((len(centers),), -1), torch.zeros(len(centers), 4))
    distances = torch.cat([centers[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - centers[:, None]], 2)
    inside = distances.amin(2) > 0
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = (centers[:, None] - middle[None]).abs().amax(2) < CENTER_RADIUS * strides[:, None]
    longest = distances.amax(2)
    lower = torch.where(strides == strides.min(), 0.0, 4.0 * strides)
    upper = torch.where(strides == strides.max(), torch.inf, 8.0 * strides)
    in_range = (longest > lower[:, None]) & (longest <= upper[:, None])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
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
