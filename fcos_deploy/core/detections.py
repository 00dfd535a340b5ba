"""Boxes, scores and labels of one image, and how much boxes overlap."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError, MissingDependencyError

__all__ = ["Detections", "box_iou", "label_name", "pairwise_iou"]


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What a detector returns for one image, best score first.

    boxes: (n, 4) float32 xyxy, in image pixels unless said otherwise.
    scores: (n,) float32 in 0..1. labels: (n,) int64.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.scores)
        fits = self.boxes.shape == (count, 4) and self.scores.shape == (count,) and self.labels.shape == (count,)
        typed = [a.dtype.name for a in (self.boxes, self.scores, self.labels)] == ["float32", "float32", "int64"]
        if not (fits and typed):
            got = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (self.boxes, self.scores, self.labels))
            raise ConfigError(f"Detections must be float32[n, 4], float32[n] and int64[n], got {got}.")

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """Those with at least this score."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def to_list(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """``[{"box": [x1, y1, x2, y2], "score", "label", "name"}]``; a label without a name gets its number."""
        return [
            {
                "box": [float(v) for v in box],
                "score": float(score),
                "label": int(label),
                "name": label_name(label, names),
            }
            for box, score, label in zip(self.boxes, self.scores, self.labels, strict=True)
        ]

    def to_supervision(self, names: tuple[str, ...] = ()) -> Any:  # Any: the library has no stubs here
        """A ``supervision.Detections``; with ``names`` the class names are in its ``data["class_name"]``.

        Raises:
            MissingDependencyError: supervision is not installed. It is no extra: it brings an OpenCV of its own.
        """
        try:
            supervision = importlib.import_module("supervision")
        except ModuleNotFoundError as error:
            raise MissingDependencyError("'supervision' is not installed.", hint="pip install supervision") from error
        data = {"class_name": np.array([label_name(int(label), names) for label in self.labels])} if names else {}
        return supervision.Detections(
            xyxy=self.boxes, confidence=self.scores, class_id=self.labels.astype(int, copy=False), data=data
        )


_TINY = 1e-300  # keeps 0 / 0, the overlap of boxes without area, at 0


def label_name(label: int, names: Sequence[str]) -> str:
    """The name of a label; one without a name gets its number."""
    return names[label] if 0 <= label < len(names) else str(label)


def box_iou(
    first: NDArray[Any], second: NDArray[Any], *, offset: float = 0.0, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Intersection over union of boxes xyxy, broadcast: (..., 4) and (..., 4) -> (...) float64; 0 without area.

    ``offset`` is added to widths and heights, of the intersection too: 1 where coordinates are those of pixels that
    belong to the box (tianzhi's FCOS, as Caffe's Faster R-CNN did). Where ``crowd`` (...) is set, the intersection is
    divided by the area of the first box alone, as COCO does with ``iscrowd`` (pycocotools, maskApi.c: bbIou).

    The graph tails compute the same in torch, as operators to export (``model/tails.py``).
    """
    a, b = (np.moveaxis(boxes, -1, 0).astype(np.float64, copy=False) for boxes in (first, second))
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + offset
    np.maximum(sides, 0.0, out=sides)  # negative for boxes apart, and two negatives would make a positive area
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
