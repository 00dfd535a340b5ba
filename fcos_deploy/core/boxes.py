"""How much boxes overlap. The graph tails compute the same in torch, as operators to export (``model/tails.py``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["box_iou", "pairwise_iou"]

_TINY = 1e-300  # keeps 0 / 0, the overlap of boxes without area, at 0


def box_iou(
    first: NDArray[Any], second: NDArray[Any], *, offset: float = 0.0, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Intersection over union of boxes xyxy, broadcast: (..., 4) and (..., 4) -> (...) float64; 0 without area.

    ``offset`` is added to widths and heights, of the intersection too: 1 where coordinates are those of pixels that
    belong to the box (tianzhi's FCOS, as Caffe's Faster R-CNN did). Where ``crowd`` (...) is set, the intersection is
    divided by the area of the first box alone, as COCO does with ``iscrowd`` (pycocotools, maskApi.c: bbIou).
    """
    a, b = (np.moveaxis(boxes, -1, 0).astype(np.float64, copy=False) for boxes in (first, second))
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + offset
    np.maximum(sides, 0.0, out=sides)
    intersection = sides[0] * sides[1]
    area_a, area_b = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    union = area_a + area_b - intersection
    if crowd is not None:
        union = np.where(crowd, area_a, union)
    iou: NDArray[np.float64] = intersection / np.maximum(union, _TINY)
    return iou


def pairwise_iou(
    first: NDArray[Any], second: NDArray[Any], *, offset: float = 0.0, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """As ``box_iou``, of every pair: (n, 4) and (m, 4) -> (n, m) float64; ``crowd`` (m,)."""
    return box_iou(first[:, None], second[None], offset=offset, crowd=crowd)
