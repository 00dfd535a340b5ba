"""Which classes are taken for which, and the images with most faults, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.accuracy.operating_point import Thresholds, confusion, confusion_json
from fcos_deploy.core.detections import Detections

NAMES = ("cell", "dust", "fibre")
A, B, C, D = ((10.0 * k, 0.0, 10.0 * k + 8.0, 8.0) for k in (0, 2, 4, 6))


def objects(*items: tuple[tuple[float, ...], int], crowd: int = 0) -> GroundTruth:
    """Boxes and classes; the last ``crowd`` are crowds."""
    boxes = np.array([box for box, _ in items], np.float64).reshape(-1, 4)
    classes = np.array([label for _, label in items], np.int64)
    return GroundTruth(boxes, classes, np.full(len(items), 64.0), np.arange(len(items)) >= len(items) - crowd)


def detected(*items: tuple[tuple[float, ...], float, int]) -> Detections:
    boxes, scores, labels = ([item[k] for item in items] for k in range(3))
    return Detections(np.float32(boxes).reshape(-1, 4), np.float32(scores), np.array(labels, np.int64))


def test_what_is_taken_for_what() -> None:
    truth = {
        1: objects((A, 0), (B, 0), (C, 1)),
        2: objects((A, 0), (D, 1), crowd=1),
        3: objects((A, 0)),
    }
    found = {
        # The better score on A is dust, but A goes to the cell that is there as well. B is taken for dust. C is missed,
        # as its score is not above the threshold. D is extra. A class that is not annotated does not count.
        1: detected((A, 0.9, 1), (A, 0.8, 0), (B, 0.7, 1), (D, 0.6, 0), (D, 0.6, 7), (C, 0.5, 1)),
        2: detected(
            (A, 0.9, 0), (D, 0.9, 1), (C, 0.9, 2)
        ),  # In a crowd of its class, and of a class without threshold.
        3: detected((A, 0.9, 0)),
    }
    images = tuple(EvaluationImage(number, Path(f"{number}.png")) for number in truth)
    dataset = Dataset(images, truth, NAMES, "by hand")
    result = confusion(dataset, found, Thresholds(scores=(0.5, 0.5, None), origin="test"))
    assert result.counts.tolist() == [
        [3, 1, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
    ]
    (worst,) = result.worst
    assert (worst.image_id, len(worst.missed.boxes), len(worst.extra), len(worst.correct)) == (1, 2, 3, 1)
    content = confusion_json(result)
    assert {"object": "cell", "detected": "dust", "count": 1} in content["confusion"]
    assert {"object": "dust", "detected": None, "count": 1} in content["confusion"]
    assert content["worst_images"] == [{"image_id": 1, "missed": 2, "extra": 3}]


def test_of_equal_overlaps_the_last_object_is_taken_as_coco_does() -> None:
    left, middle, right = ((x, 0.0, x + 8.0, 8.0) for x in (0.0, 1.0, 2.0))
    dataset = Dataset((EvaluationImage(1, Path("1.png")),), {1: objects((left, 0), (right, 0))}, NAMES, "by hand")
    result = confusion(dataset, {1: detected((middle, 0.9, 0))}, Thresholds(scores=(0.5,) * 3, origin="test"))
    assert result.worst[0].missed.boxes.tolist() == [list(left)]
