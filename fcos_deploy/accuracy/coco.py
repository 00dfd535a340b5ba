"""Average precision and recall by COCO's protocol, computed by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.libraries import require

__all__ = ["ClassScores", "CocoScores", "coco_scores"]

RECALL_POINTS = tuple(float(v) for v in np.linspace(0.0, 1.0, 101))
MAX_DETECTIONS = 100  # of one image, by COCO's protocol
_AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """One class: AP, AP at IoU 0.5, and recall, all in 0..1; None where the data has no object of it.

    ``precision`` has the interpolated precision at IoU 0.5 at recall 0, 0.01, ..., 1.
    """

    name: str
    ap: float | None
    ap50: float | None
    ar: float | None
    precision: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoScores:
    """AP and AR in 0..1, over all images; None where the data has no such object.

    ``ap`` is the mean over IoU 0.50, 0.55, ..., 0.95; small, medium and large objects are below 32 x 32, below
    96 x 96 and above, in image pixels; ``ar`` is the recall with at most 100 detections an image.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar: float | None
    images: int
    objects: int
    per_class: tuple[ClassScores, ...]


def coco_scores(dataset: Dataset, detections: Mapping[int, Detections]) -> CocoScores:
    """Evaluate detections whose labels are positions in ``dataset.class_names`` (others are left out).

    Raises:
        MissingDependencyError: faster-coco-eval is not installed.
    """
    library = require("faster_coco_eval", extra="eval")
    ground_truth = library.COCO(_ground_truth_json(dataset))
    results = ground_truth.loadRes(_detections_json(dataset, detections))
    # The library prints through the function that it is given; its results are read from `eval`.
    evaluator = library.COCOeval_faster(ground_truth, results, iouType="bbox", print_function=lambda *_: None)
    evaluator.params.maxDets = [1, 10, MAX_DETECTIONS]
    evaluator.evaluate()
    evaluator.accumulate()
    return _summary(dataset, evaluator.eval["precision"], evaluator.eval["recall"])


def _summary(dataset: Dataset, precision: NDArray[np.float64], recall: NDArray[np.float64]) -> CocoScores:
    # precision: (IoU, recall, class, area, max detections), recall: without the second; -1 where undefined.
    precision, recall = np.asarray(precision)[..., -1], np.asarray(recall)[..., -1]
    by_area = {area: _mean(precision[:, :, :, i]) for i, area in enumerate(_AREAS)}
    every = precision[..., 0]
    classes = tuple(
        ClassScores(
            name=name,
            ap=_mean(every[:, :, k]),
            ap50=_mean(every[0, :, k]),
            ar=_mean(recall[:, k, 0]),
            precision=tuple(float(p) for p in every[0, :, k] if p >= 0),
        )
        for k, name in enumerate(dataset.class_names)
    )
    return CocoScores(
        ap=by_area["all"],
        ap50=_mean(every[0]),
        ap75=_mean(every[5]),
        ap_small=by_area["small"],
        ap_medium=by_area["medium"],
        ap_large=by_area["large"],
        ar=_mean(recall[..., 0]),
        images=len(dataset.images),
        objects=sum(int((~ground_truth.crowd).sum()) for ground_truth in dataset.ground_truth.values()),
        per_class=classes,
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _ground_truth_json(dataset: Dataset) -> dict[str, Any]:
    """Images are numbered from 1: the evaluator takes neither ids of 17 digits nor negative ones."""
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(dataset.images, start=1):
        ground_truth = dataset.ground_truth[image.image_id]
        rows = (
            _xywh(ground_truth.boxes),
            ground_truth.classes.tolist(),
            ground_truth.areas.tolist(),
            ground_truth.crowd.tolist(),
        )
        for box, category, area, crowd in zip(*rows, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCO's matching takes 0 for "no match".
                    "image_id": number,
                    "category_id": category + 1,
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return {
        "images": [{"id": number} for number, _ in enumerate(dataset.images, start=1)],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(dataset.class_names)],
    }


def _detections_json(dataset: Dataset, detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    known, rows = range(len(dataset.class_names)), []
    for number, image in enumerate(dataset.images, start=1):
        detected = detections[image.image_id]
        columns = _xywh(detected.boxes), detected.scores.tolist(), detected.labels.tolist()
        rows += [
            {"image_id": number, "category_id": label + 1, "bbox": box, "score": score}
            for box, score, label in zip(*columns, strict=True)
            if label in known
        ]
    return rows


def _xywh(boxes: NDArray[Any]) -> list[list[float]]:
    """(n, 4) xyxy to n lists of x, y, width, height; in float64, as the evaluator computes."""
    exact = boxes.astype(np.float64)
    exact[:, 2:] -= exact[:, :2]
    listed: list[list[float]] = exact.tolist()
    return listed
