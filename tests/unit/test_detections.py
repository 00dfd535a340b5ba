"""Detections are checked when they are made."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError, MissingDependencyError

BOXES = np.float32([[0, 1, 2, 3], [4, 5, 6, 7]])
SCORES = np.float32([0.75, 0.25])
LABELS = np.int64([1, 9])


@pytest.mark.parametrize(
    ("boxes", "scores", "labels"),
    [
        (BOXES.astype(np.float64), SCORES, LABELS),
        (BOXES, SCORES.astype(np.float16), LABELS),
        (BOXES, SCORES, LABELS.astype(np.int32)),
        (BOXES[:1], SCORES, LABELS),
        (BOXES[:, :3], SCORES, LABELS),
        (BOXES, SCORES[:, None], LABELS),
        (BOXES, SCORES, LABELS[:1]),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"must be float32\[n, 4\], float32\[n\] and int64\[n\], got"):
        Detections(boxes, scores, labels)


def test_above_includes_the_score_itself() -> None:
    found = Detections(BOXES, SCORES, LABELS)
    assert len(found) == 2
    assert found.above(0.25).labels.tolist() == [1, 9]
    assert found.above(0.2500001).boxes.tolist() == [[0, 1, 2, 3]]
    assert len(found.above(0.9)) == 0


def test_list_for_json_names_what_it_can() -> None:
    found = Detections(BOXES, SCORES, LABELS).to_list(("red", "white"))
    assert json.loads(json.dumps(found)) == [
        {"box": [0.0, 1.0, 2.0, 3.0], "score": 0.75, "label": 1, "name": "white"},
        {"box": [4.0, 5.0, 6.0, 7.0], "score": 0.25, "label": 9, "name": "9"},
    ]


def test_supervision_gets_the_same_boxes_and_names() -> None:
    """Where it is not installed, the way to get it is said."""
    detections = Detections(np.float32([[1, 2, 30, 40]]), np.float32([0.75]), np.int64([1]))
    try:
        import supervision
    except ModuleNotFoundError:
        with pytest.raises(MissingDependencyError) as refused:
            detections.to_supervision(("red", "white"))
        assert refused.value.hint == "pip install supervision"
        return
    result = detections.to_supervision(("red", "white"))
    assert isinstance(result, supervision.Detections)
    assert np.array_equal(result.xyxy, detections.boxes)
    assert (result.confidence.tolist(), result.class_id.tolist()) == ([0.75], [1])
    assert result.data["class_name"].tolist() == ["white"]
