"""What is taken for what at the score thresholds, and the images with the most faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset, GroundTruth
from fcos_deploy.accuracy.operating_point import Thresholds
from fcos_deploy.core.detections import Detections, pairwise_iou

__all__ = ["Confusion", "FaultyImage", "confusion", "confusion_json"]

_IOU = 0.5
_WORST = 10  # images


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FaultyImage:
    """An image with its ``missed`` objects, and its ``extra`` and right (``correct``) detections.

    Labels are positions in the class names of the data set. An object that is detected as another class is missed, and
    the detection is extra.
    """

    image_id: int
    missed: GroundTruth
    extra: Detections
    correct: Detections

    @property
    def faults(self) -> int:
        """Missed objects and extra detections."""
        return len(self.missed.boxes) + len(self.extra)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Confusion:
    """counts: (classes + 1, classes + 1) int64, objects of a row's class that are detected as a column's.

    The last column are objects that are missed, the last row detections of nothing. ``worst``: most faults first.
    """

    class_names: tuple[str, ...]
    counts: NDArray[np.int64]
    worst: tuple[FaultyImage, ...]


def confusion(dataset: Dataset, detections: Mapping[int, Detections], thresholds: Thresholds) -> Confusion:
    """Pair the detections above the thresholds with the objects, by an IoU of at least 0.5.

    Pairs of one class come first, as COCO makes them; what is left is then paired whatever its class. Labels are
    positions in ``dataset.class_names``; a class without a threshold has no detections.
    """
    nothing = len(dataset.class_names)
    limits = np.array([np.inf if score is None else score for score in thresholds.scores])
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    faulty = []
    for image in dataset.images:
        objects, detected = dataset.ground_truth[image.image_id], _above(detections[image.image_id], limits)
        partner, in_crowd = _pair(objects, detected)
        correct = np.zeros(len(detected), np.bool_)
        paired = np.flatnonzero(partner >= 0)
        correct[paired] = objects.classes[partner[paired]] == detected.labels[paired]
        np.add.at(counts, (objects.classes[partner[paired]], detected.labels[paired]), 1)
        taken = np.isin(np.arange(len(objects.classes)), partner)
        missed = ~objects.crowd
        counts[:-1, nothing] += np.bincount(objects.classes[missed & ~taken], minlength=nothing)
        extra = ~correct & ~in_crowd
        counts[nothing, :-1] += np.bincount(detected.labels[extra & (partner < 0)], minlength=nothing)
        missed[partner[correct]] = False
        if extra.any() or missed.any():
            faulty.append(
                FaultyImage(
                    image_id=image.image_id,
                    missed=GroundTruth(*(getattr(objects, n)[missed] for n in ("boxes", "classes", "areas", "crowd"))),
                    extra=_chosen(detected, extra),
                    correct=_chosen(detected, correct),
                )
            )
    worst = sorted(faulty, key=lambda image: -image.faults)[:_WORST]
    return Confusion(class_names=dataset.class_names, counts=counts, worst=tuple(worst))


def confusion_json(confused: Confusion) -> dict[str, Any]:  # Any: JSON
    """The cells that are not 0, and the worst images by id."""
    names: list[str | None] = [*confused.class_names, None]
    rows, columns = np.nonzero(confused.counts)
    return {
        "confusion": [
            {"object": names[row], "detected": names[column], "count": int(confused.counts[row, column])}
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ],
        "worst_images": [
            {"image_id": image.image_id, "missed": len(image.missed.boxes), "extra": len(image.extra)}
            for image in confused.worst
        ],
    }


def _above(detections: Detections, limits: NDArray[np.float64]) -> Detections:
    known = (detections.labels >= 0) & (detections.labels < len(limits))
    limit = np.append(limits, np.inf)[np.where(known, detections.labels, -1)]
    return _chosen(detections, detections.scores > limit)


def _chosen(detections: Detections, mask: NDArray[np.bool_]) -> Detections:
    return Detections(detections.boxes[mask], detections.scores[mask], detections.labels[mask])


def _pair(objects: GroundTruth, detected: Detections) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(d,) position of each detection's object, -1 without one; and (d,) which of these lie in a crowd of their class.

    Each detection, best score first, takes the free object that it overlaps most.
    """
    partner = np.full(len(detected), -1)
    if not len(objects.boxes):
        return partner, np.zeros(len(detected), np.bool_)
    iou = pairwise_iou(detected.boxes, objects.boxes, crowd=objects.crowd)
    alike = detected.labels[:, None] == objects.classes[None]
    in_crowd = (iou * (alike & objects.crowd)).max(1, initial=0.0) >= _IOU
    free = ~objects.crowd
    order = np.argsort(-detected.scores, kind="stable")
    for allowed in (alike, np.broadcast_to(~in_crowd[:, None], alike.shape)):
        for row in order:
            if partner[row] >= 0:
                continue
            overlap = np.where(free & allowed[row], iou[row], -1.0)
            # Of equal overlaps COCO takes the last.
            best = len(overlap) - 1 - int(overlap[::-1].argmax())
            if overlap[best] >= _IOU:
                partner[row], free[best] = best, False
    return partner, in_crowd & (partner < 0)
