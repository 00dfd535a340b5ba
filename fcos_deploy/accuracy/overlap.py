"""How much boxes overlap."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["detection_iou", "pairwise_iou"]

# In image pixels. The overlap of boxes that are thinner than a pixel, or were clipped to a line, says nothing.
_SAME_EDGE = 0.1


def pairwise_iou(
    first: NDArray[Any], second: NDArray[Any], *, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Intersection over union of boxes xyxy, (n, 4) and (m, 4) -> (n, m) float64; 0 where both lack area.

    Where ``crowd`` (m,) is set, the intersection is divided by the area of the first box alone, as COCO does.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clip(min=0.0).prod(2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1)[:, None], (b[:, 2:] - b[:, :2]).prod(1)[None]
    union = area_a + area_b - intersection
    if crowd is not None:
        union = np.where(crowd[None], area_a, union)
    iou: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def detection_iou(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """As ``pairwise_iou``, (n, 4) and (m, 4) -> (n, m) float64; but 1 where all four edges agree within 0.1 pixels."""
    edges = np.abs(first[:, None] - second[None]).max(2, initial=0.0)
    return np.where(edges <= _SAME_EDGE, 1.0, pairwise_iou(first, second))
