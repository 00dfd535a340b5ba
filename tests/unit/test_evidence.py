"""Data that cannot decide anything is told from data that can."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.accuracy.coco import coco_scores, match_dataset
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    GroundTruth,
    check_frame,
    count_copies,
    load_coco,
)
from fcos_deploy.accuracy.evaluate import baseline_problem, evidence_problem
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Judge

pytest.importorskip("faster_coco_eval")

NAMES = ("red", "white")


def annotated(*, images: int = 12, classes: tuple[int, ...] = (0, 0, 1)) -> Dataset:
    corner = np.array([[40.0 * k, 30.0] for k in range(len(classes))]).reshape(-1, 2)
    boxes = np.concatenate([corner, corner + 30], 1)
    truth = GroundTruth(boxes, np.array(classes, np.int64), np.full(len(boxes), 900.0), np.zeros(len(boxes), np.bool_))
    every = tuple(EvaluationImage(n, Path(f"{n}.png")) for n in range(images))
    return Dataset(every, dict.fromkeys(range(images), truth), NAMES, "a.json")


def detected(dataset: Dataset) -> dict[int, Detections]:
    """Exactly the objects, with a score of 0.8."""
    return {
        number: Detections(
            truth.boxes.astype(np.float32), np.full(len(truth.boxes), 0.8, np.float32), truth.classes.copy()
        )
        for number, truth in dataset.ground_truth.items()
    }


@pytest.mark.parametrize(
    ("dataset", "problem", "by_point"),
    [
        (annotated(), "", True),
        (annotated(classes=()), "hold no object in these 12 images", False),
        (replace(annotated(classes=()), annotated=False), "the reference finds no object", False),
        (annotated(images=1), "1 images are too few for a confidence interval", True),
        (annotated(images=9), "9 images are too few", True),
        (annotated(classes=(0, 0)), "no image shows an object of 'white'", True),
        (replace(annotated(), copies=3), "3 of the 12 images are copies of others", True),
    ],
)
def test_what_cannot_be_judged_says_why(dataset: Dataset, problem: str, by_point: bool) -> None:
    found = evidence_problem(dataset, judge=Judge.INTERVAL)
    assert problem in found
    assert bool(found) is bool(problem)
    assert (evidence_problem(dataset, judge=Judge.POINT) == "") is by_point


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda boxes, classes: (boxes, classes), ""),
        (lambda boxes, classes: (boxes, 1 - classes), "of its 24 detections of 'red'"),
        (lambda boxes, classes: (boxes * 2, classes), "0 lie on an annotated one"),
        (lambda boxes, classes: (boxes / 4, classes), "0 lie on an annotated one"),
        (lambda boxes, classes: (boxes[:, [1, 0, 3, 2]], classes), "0 lie on an annotated one"),
        (lambda boxes, classes: (np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), classes), "lie on"),
    ],
)
def test_annotations_that_contradict_the_reference_are_no_baseline(damage, problem: str) -> None:
    """Swapped names, twice the size, another scale, swapped axes, xyxy for xywh."""
    dataset = annotated()
    detections = detected(dataset)
    truth = dataset.ground_truth[0]
    boxes, classes = damage(truth.boxes, truth.classes)
    changed = replace(truth, boxes=boxes, classes=classes)
    damaged = replace(dataset, ground_truth=dict.fromkeys(dataset.ground_truth, changed))
    found = baseline_problem(
        damaged, match_dataset(damaged, detections), detections=detections, ap=coco_scores(damaged, detections).ap
    )
    assert problem in found
    assert bool(found) is bool(problem)


@pytest.mark.parametrize(("wrong", "problem"), [(1, ""), (4, "of 4 of the 12 images, such as '0.png'"), (8, "of 8 of")])
@pytest.mark.parametrize("empty", [False, True], ids=["another scale", "without annotations"])
def test_annotations_of_some_images_that_fit_no_detection_are_no_baseline(
    wrong: int, problem: str, empty: bool
) -> None:
    dataset = annotated(classes=(0,) * 10 + (1,) * 5)
    detections, truth = detected(dataset), dataset.ground_truth[0]
    other = annotated(classes=()).ground_truth[0] if empty else replace(truth, boxes=truth.boxes / 4)
    damaged = replace(dataset, ground_truth={**dataset.ground_truth, **dict.fromkeys(range(wrong), other)})
    told = baseline_problem(damaged, match_dataset(damaged, detections), detections=detections, ap=0.5)
    assert problem in told
    assert bool(told) is bool(problem)


@pytest.mark.parametrize(("width", "height", "problem"), [(30, 24, ""), (24, 30, "36 of 36 annotated boxes are wide")])
def test_width_and_height_swapped_are_no_baseline(width: float, height: float, problem: str) -> None:
    """The overlap of nearly square boxes stays high, and so does AP."""
    dataset = annotated()
    truth = dataset.ground_truth[0]
    seen = replace(truth, boxes=np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + (30, 24)], 1))
    detections = detected(replace(dataset, ground_truth=dict.fromkeys(dataset.ground_truth, seen)))
    given = replace(truth, boxes=np.concatenate([truth.boxes[:, :2], truth.boxes[:, :2] + (width, height)], 1))
    damaged = replace(dataset, ground_truth=dict.fromkeys(dataset.ground_truth, given))
    told = baseline_problem(damaged, match_dataset(damaged, detections), detections=detections, ap=0.5)
    assert problem in told
    assert bool(told) is bool(problem)


def test_files_of_the_same_bytes_are_copies(tmp_path: Path) -> None:
    for name, content in (("a", b"11"), ("b", b"22"), ("c", b"11"), ("d", b"333"), ("e", b"11")):
        (tmp_path / name).write_bytes(content)
    images = [EvaluationImage(n, path) for n, path in enumerate(sorted(tmp_path.iterdir()))]
    assert count_copies(images) == 2


def test_a_reference_that_finds_next_to_nothing_is_no_baseline() -> None:
    dataset = annotated()
    none = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    detections = dict.fromkeys(dataset.ground_truth, none)
    assert "the AP of the reference is 0.000" in baseline_problem(dataset, match_dataset(dataset, detections), ap=0.0)


@pytest.mark.parametrize(
    ("size", "orientation", "box", "message"),
    [
        ((80, 60), 1, (10, 10, 20, 20), ""),
        ((60, 80), 6, (10, 10, 20, 20), ""),
        ((80, 60), 6, (10, 10, 20, 20), ""),
        ((60, 80), 1, (10, 10, 20, 20), "'1.jpg' of 60x80 pixels .* the file has 80x60: .* swapped"),
        ((160, 120), 1, (10, 10, 20, 20), "'1.jpg' of 160x120 pixels"),
        (None, 1, (10, 10, 75, 20), r"1 of the 1 boxes .* outside .* \[10.0, 10.0, 75.0, 20.0\] in '1.jpg'"),
        (None, 1, (60, 40, 80, 60), "outside"),
        (None, 1, (-5, 0, 20, 20), "outside"),
        (None, 1, (60.5, 40.2, 20, 20), ""),
        (None, 1, (0.1, 0.2, 0.5, 0.5), "look like shares"),
    ],
)
def test_annotations_are_held_to_the_images_as_they_are_decoded(
    size: tuple[int, int] | None, orientation: int, box: tuple[float, ...], message: str, tmp_path: Path
) -> None:
    """``size`` is the annotation file's width and height; the stored image is 80 pixels wide and 60 high."""
    image_module = pytest.importorskip("PIL.Image")
    exif = image_module.Exif()
    exif[0x0112] = orientation
    image_module.new("RGB", (80, 60)).save(tmp_path / "1.jpg", exif=exif)
    image = {"id": 1, "file_name": "1.jpg", **({"width": size[0], "height": size[1]} if size else {})}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box}
    content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "red"}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    if not message:
        (record,) = load_coco(path, images=tmp_path).images
        fits = {(60, 80): Orientation.EXIF, (80, 60): Orientation.STORED}
        assert record.frame is (fits[size] if size and orientation == 6 else None)
        for frame in Orientation if record.frame else ():
            with pytest.raises(ConfigError, match="annotated") if frame is not record.frame else nullcontext():
                check_frame([record], frame)
        return
    with pytest.raises(ConfigError, match=message):
        load_coco(path, images=tmp_path)
