"""COCO annotations and average precision."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos_deploy.accuracy.coco import coco_scores
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    GroundTruth,
    folder_images,
    ground_truth_from_detections,
    label_index,
    load_coco,
)
from fcos_deploy.accuracy.evaluate import evidence_problem
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.gate import Judge


def detections(rows: list[tuple[list[float], float, int]]) -> Detections:
    return Detections(
        np.array([r[0] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows], np.int64),
    )


def ground_truth(rows: list[tuple[list[float], int]], crowd: tuple[bool, ...] = ()) -> GroundTruth:
    boxes = np.array([r[0] for r in rows], np.float64).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return GroundTruth(
        boxes, np.array([r[1] for r in rows], np.int64), areas, np.array(crowd or [False] * len(rows), np.bool_)
    )


def dataset(ground_truths: list[GroundTruth], names: tuple[str, ...] = ("a", "b")) -> Dataset:
    images = tuple(EvaluationImage(i + 1, Path(f"{i}.png")) for i in range(len(ground_truths)))
    return Dataset(images, {i + 1: t for i, t in enumerate(ground_truths)}, names, "test")


def test_perfect_detections_have_ap_1_and_absent_sizes_have_none() -> None:
    boxes = [([0.0, 0.0, 20.0, 20.0], 0), ([30.0, 30.0, 90.0, 90.0], 1)]
    found = detections([(box, 0.9, label) for box, label in boxes])
    scores = coco_scores(dataset([ground_truth(boxes)]), {1: found})
    assert scores.ap == scores.ap50 == scores.ap75 == scores.ar == 1.0
    assert scores.ap_small == scores.ap_medium == 1.0
    assert scores.ap_large is None
    assert (scores.images, scores.objects) == (1, 2)
    assert [c.name for c in scores.per_class] == ["a", "b"]


def test_ap_of_a_case_worked_out_by_hand() -> None:
    """IoU 0.65 counts at 0.50, 0.55, 0.60 and 0.65 of the ten thresholds; the false detection ranks above it.

    Precision is then 1/2 at every recall, so that AP = 4 / 10 * 1/2.
    """
    wanted = ground_truth([([0.0, 0.0, 100.0, 100.0], 0)])
    found = detections([([500, 500, 600, 600], 0.9, 0), ([0, 0, 65, 100], 0.8, 0)])
    scores = coco_scores(dataset([wanted], ("a",)), {1: found})
    assert scores.ap == pytest.approx(0.2)
    assert scores.ap50 == pytest.approx(0.5)
    assert scores.ap75 == 0.0
    assert scores.ar == pytest.approx(0.4)


def test_nothing_found_is_ap_0() -> None:
    scores = coco_scores(dataset([ground_truth([([0, 0, 50, 50], 0)])]), {1: detections([])})
    assert scores.ap == 0.0
    assert scores.per_class[1].ap is None


def test_labels_that_the_data_lacks_are_left_out() -> None:
    found = detections([([0, 0, 50, 50], 0.9, -1), ([0, 0, 50, 50], 0.8, 0)])
    assert coco_scores(dataset([ground_truth([([0, 0, 50, 50], 0)])]), {1: found}).ap == 1.0


def test_evaluator_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    coco_scores(dataset([ground_truth([([0, 0, 50, 50], 0)])]), {1: detections([])})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def coco_file(folder: Path, **changes: object) -> Path:
    content: dict[str, object] = {
        "images": [{"id": 4, "file_name": "x.png"}, {"id": 2, "file_name": "y.png"}],
        "annotations": [{"image_id": 4, "category_id": 9, "bbox": [1, 2, 3, 4], "iscrowd": 1}],
        "categories": [{"id": 9, "name": "cell"}, {"id": 3, "name": "dust"}],
    }
    content.update(changes)
    for name in ("x.png", "y.png"):
        Image.new("RGB", (10, 10)).save(folder / name)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_reads_annotations(tmp_path: Path) -> None:
    data = load_coco(coco_file(tmp_path), images=tmp_path)
    assert [i.image_id for i in data.images] == [2, 4]
    assert data.class_names == ("dust", "cell")
    assert data.ground_truth[4].boxes.tolist() == [[1.0, 2.0, 4.0, 6.0]]
    assert data.ground_truth[4].classes.tolist() == [1]
    assert data.ground_truth[4].areas.tolist() == [12.0]
    assert data.ground_truth[4].crowd.tolist() == [True]
    assert not len(data.ground_truth[2].boxes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "has no images|unknown"),
        ({"categories": []}, "at least one"),
        ({"annotations": [{"image_id": 4, "category_id": 9}]}, "bbox"),
        ({"annotations": [{"image_id": 77, "category_id": 9, "bbox": [0, 0, 1, 1]}]}, "77"),
        ({"images": [{"id": 4, "file_name": "gone.png"}], "annotations": []}, "gone.png"),
        ({"images": [{"id": 4, "file_name": "x.png"}] * 2}, "same id"),
    ],
)
def test_bad_annotations_are_explained(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    if changes == {"images": []}:
        changes = {"images": [], "annotations": []}
    path = coco_file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_coco(path, images=tmp_path)


def test_a_text_file_is_not_annotations(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("hello")
    with pytest.raises(ConfigError, match="Cannot read the annotations"):
        load_coco(tmp_path / "a.json", images=tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        load_coco(tmp_path / "a.json", images=tmp_path)


def test_classes_are_matched_by_name() -> None:
    data = dataset([ground_truth([([0, 0, 5, 5], 1)])], ("wbc", "RBC"))
    assert label_index(("__background__", "rbc", "WBC"), data).tolist() == [-1, 1, 0]


def test_a_class_that_the_model_lacks_is_an_error() -> None:
    data = dataset([ground_truth([([0, 0, 5, 5], 1)])], ("wbc", "rbc"))
    with pytest.raises(ConfigError, match="'rbc', which the model does not know: its classes are 'wbc'"):
        label_index(("wbc",), data)


def test_folder_is_sorted_and_must_have_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "notes.txt"):
        (tmp_path / name).touch()
    assert [(i.image_id, i.path.name) for i in folder_images(tmp_path)] == [(1, "a.PNG"), (2, "b.jpg"), (3, "c.jpeg")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        folder_images(tmp_path / "empty")
    with pytest.raises(ImageError, match="not a folder"):
        folder_images(tmp_path / "gone")


def test_a_reference_agrees_with_itself() -> None:
    found = {1: detections([([0, 0, 50, 50], 0.9, 0), ([9, 9, 70, 60], 0.1, 1)])}
    images = (EvaluationImage(1, Path("1.png")),)
    data = ground_truth_from_detections(images, found, class_names=("a", "b"), min_score=0.3, source="reference")
    assert data.ground_truth[1].classes.tolist() == [0]
    assert coco_scores(data, found).ap == 1.0
    none = ground_truth_from_detections(images, found, class_names=("a", "b"), min_score=0.95, source="reference")
    assert coco_scores(none, found).ap is None
    assert "finds no object" in evidence_problem(none, judge=Judge.POINT)
