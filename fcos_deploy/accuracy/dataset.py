"""Evaluation images, and the boxes that are true on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.image import list_images
from fcos_deploy.core.serialize import parse_json

__all__ = [
    "Dataset",
    "EvaluationImage",
    "GroundTruth",
    "folder_images",
    "ground_truth_from_detections",
    "label_index",
    "load_coco",
]

_NAMED = 5  # how many file or class names an error spells out


@dataclass(frozen=True, slots=True)
class EvaluationImage:
    """One image: its number in the annotations, and where it lies."""

    image_id: int
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """What is true of one image.

    boxes: (n, 4) float64 xyxy, image pixels. classes: (n,) int64, positions in ``Dataset.class_names``.
    areas: (n,) float64, square pixels (of the object, which decides whether it is small, medium or large).
    crowd: (n,) bool, regions in which detections are neither right nor wrong.
    """

    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images in the order of their numbers, what is true of each, and the names of the classes.

    ``source`` says where the ground truth comes from: a file of annotations, or another model.
    """

    images: tuple[EvaluationImage, ...]
    ground_truth: Mapping[int, GroundTruth]
    class_names: tuple[str, ...]
    source: str

    def first(self, count: int | None) -> Dataset:
        """The same data, cut to the first ``count`` images; None keeps all."""
        images = self.images[:count]
        ground_truth = {image.image_id: self.ground_truth[image.image_id] for image in images}
        return Dataset(images, ground_truth, self.class_names, self.source)


def load_coco(annotations: Path, *, images: Path) -> Dataset:
    """Read annotations in COCO's format and find their images.

    All images of the file belong to the data set, those without an object too.

    Raises:
        ConfigError: the file is not one of COCO annotations, contradicts itself, or names images that are not there.
    """
    content = _read_json(annotations)
    try:
        names = _category_names(content["categories"], where=annotations)
        entries = sorted(content["images"], key=lambda entry: int(entry["id"]))
        records = tuple(EvaluationImage(int(e["id"]), images / str(e["file_name"])) for e in entries)
        ground_truth = _collect_ground_truth(content["annotations"], records, names=names)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"'{annotations}' is not a complete file of COCO annotations: {type(error).__name__} {error}.",
            hint="it needs 'images' (id, file_name), 'annotations' (image_id, category_id, bbox) and 'categories'",
        ) from error
    _check_images(records, annotations=annotations, folder=images)
    return Dataset(records, ground_truth, tuple(name for _, name in sorted(names.items())), str(annotations))


def folder_images(folder: Path) -> tuple[EvaluationImage, ...]:
    """The images of a folder and its subfolders, sorted by path and numbered from 1.

    Raises:
        ImageError: the folder is missing, or has no images.
    """
    return tuple(EvaluationImage(number, path) for number, path in enumerate(list_images(folder), start=1))


def ground_truth_from_detections(
    images: Sequence[EvaluationImage],
    detections: Mapping[int, Detections],
    *,
    class_names: tuple[str, ...],
    min_score: float,
    source: str,
) -> Dataset:
    """Take a reference's detections for the ground truth, those with at least ``min_score``.

    The AP of a model on such a data set is its agreement with the reference: 1 for the reference itself.

    Raises:
        ConfigError: when nothing was detected, so that there is nothing to agree with.
    """
    kept = {number: found.above(min_score) for number, found in detections.items()}
    if not any(len(found) for found in kept.values()):
        raise ConfigError(
            f"The reference finds nothing with a score of at least {min_score} on these {len(images)} images.",
            hint="give images that show the objects, or a lower --reference-score",
        )
    return Dataset(tuple(images), {n: _detections_ground_truth(d) for n, d in kept.items()}, class_names, source)


def label_index(model_names: tuple[str, ...], dataset: Dataset) -> NDArray[np.int64]:
    """Position in ``dataset.class_names`` of each label of the model, (labels,) int64; -1 where the data lacks it.

    Raises:
        ConfigError: when the data has objects of a class that the model does not know.
    """
    positions = {_plain(name): position for position, name in enumerate(dataset.class_names)}
    index = np.array([positions.get(_plain(name), -1) for name in model_names], np.int64)
    if model_names == dataset.class_names:  # Names that occur twice ('N/A' among COCO's 91) keep their places.
        index = np.arange(len(model_names))
    occurring = {int(c) for ground_truth in dataset.ground_truth.values() for c in ground_truth.classes}
    unknown = [dataset.class_names[c] for c in sorted(occurring - set(index.tolist()))]
    if unknown:
        raise ConfigError(
            f"{dataset.source} has objects of {_some(unknown)}, which the model does not know: "
            f"its classes are {_some(model_names)}.",
            hint="give the model its class names when it is exported (--classes), or the annotations that belong to it",
        )
    return index


def _plain(name: str) -> str:
    return name.strip().casefold()


def _some(names: Iterable[str]) -> str:
    names = [f"'{name}'" for name in names]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the annotations '{path}': {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' is not a file of COCO annotations: it holds a {type(content).__name__}.")
    return content


def _category_names(categories: list[dict[str, Any]], *, where: Path) -> dict[int, str]:
    names = {int(c["id"]): str(c["name"]) for c in categories}
    if len({_plain(name) for name in names.values()}) < len(categories) or not names:
        raise ConfigError(f"The categories of '{where}' must have different ids and names, and be at least one.")
    return names


def _collect_ground_truth(
    annotations: list[dict[str, Any]], images: Sequence[EvaluationImage], *, names: Mapping[int, str]
) -> dict[int, GroundTruth]:
    position = {category: index for index, category in enumerate(sorted(names))}
    rows: dict[int, list[tuple[list[float], int, float, bool]]] = {image.image_id: [] for image in images}
    if len(rows) < len(images):
        raise ValueError("two images have the same id")
    for annotation in annotations:
        x, y, width, height = (float(v) for v in annotation["bbox"])
        area = float(annotation.get("area", width * height))
        crowd = bool(annotation.get("iscrowd", 0))
        box = [x, y, x + width, y + height]
        if not all(map(math.isfinite, (*box, area))) or width < 0 or height < 0:
            raise ValueError(f"the bbox {annotation['bbox']} with area {area} is none (x, y, width, height)")
        rows[int(annotation["image_id"])].append((box, position[int(annotation["category_id"])], area, crowd))
    return {image_id: _ground_truth(found) for image_id, found in rows.items()}


def _ground_truth(rows: list[tuple[list[float], int, float, bool]]) -> GroundTruth:
    return GroundTruth(
        np.array([r[0] for r in rows], np.float64).reshape(-1, 4),
        np.array([r[1] for r in rows], np.int64),
        np.array([r[2] for r in rows], np.float64),
        np.array([r[3] for r in rows], np.bool_),
    )


def _detections_ground_truth(found: Detections) -> GroundTruth:
    boxes = found.boxes.astype(np.float64)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return GroundTruth(boxes, found.labels.astype(np.int64), areas, np.zeros(len(found), np.bool_))


def _check_images(images: Sequence[EvaluationImage], *, annotations: Path, folder: Path) -> None:
    if not images:
        raise ConfigError(f"'{annotations}' has no images.")
    missing = [image.path.name for image in images if not _is_there(image.path)]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(images)} images of '{annotations}' are not in '{folder}': {_some(missing)}.",
            hint="give the folder that holds them with --images",
        )


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that no file can have.
        return False
