"""Evaluation images and their ground truth, from COCO annotations or from a reference's detections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.coco_file import CocoFile, CocoObject, find_coco_images, read_coco
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.image import image_size, list_images

__all__ = [
    "Dataset",
    "EvaluationImage",
    "GroundTruth",
    "folder_images",
    "ground_truth_from_detections",
    "label_index",
    "load_coco",
]

_BORDER_PX = 2.0
_SPELLED_OUT = 5  # how many file or class names an error spells out


@dataclass(frozen=True, slots=True)
class EvaluationImage:
    """One image: its id in the annotations, and its file."""

    image_id: int
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """The objects of one image.

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
    """Images in the order of their ids, the ground truth by image id, and the names of the classes.

    ``source`` says where the ground truth comes from: a file of annotations, or another model, which is then not
    ``annotated``.
    """

    images: tuple[EvaluationImage, ...]
    ground_truth: Mapping[int, GroundTruth]
    class_names: tuple[str, ...]
    source: str
    annotated: bool = True

    def first(self, count: int | None) -> Dataset:
        """The same data, cut to the first ``count`` images; None keeps all."""
        images = self.images[:count]
        return replace(self, images=images, ground_truth={i.image_id: self.ground_truth[i.image_id] for i in images})


def load_coco(annotations: Path, *, images: Path) -> Dataset:
    """Read annotations in COCO's format and find their images.

    All images of the file belong to the data set, those without an object too.

    Raises:
        ConfigError: the file is not one of COCO annotations, contradicts itself, names images that are not there, or
            does not fit them: another size, or boxes outside.
        ImageError: an image cannot be read.
    """
    coco = read_coco(annotations)
    paths = find_coco_images((image.name for image in coco.images), images, annotations=annotations)
    records = tuple(EvaluationImage(image.image_id, paths[image.name]) for image in coco.images)
    missing = [record.path.name for record in records if not _exists(record.path)]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(records)} images of '{annotations}' are not in '{images}': {_some(missing)}.",
            hint="give the folder that holds them with --images",
        )
    _check_geometry(annotations, coco, paths)
    positions = {category: position for position, category in enumerate(sorted(coco.categories))}
    objects: dict[int, list[CocoObject]] = {record.image_id: [] for record in records}
    for item in coco.objects:
        objects[item.image_id].append(item)
    ground_truth = {image_id: _ground_truth(items, positions) for image_id, items in objects.items()}
    return Dataset(records, ground_truth, tuple(coco.categories[c] for c in positions), str(annotations))


def _check_geometry(annotations: Path, coco: CocoFile, paths: Mapping[str, Path]) -> None:
    """Hold sizes and boxes to the images as they are decoded: boxes of another frame give every model an AP near 0."""
    sizes: dict[int, tuple[int, int]] = {}
    for image in coco.images:
        sizes[image.image_id] = actual = image_size(paths[image.name])
        if image.size is not None and image.size != actual:
            swapped = image.size == actual[::-1]
            raise ConfigError(
                f"'{annotations}' is for a '{image.name}' of {image.size[1]}x{image.size[0]} pixels (width x height), "
                f"the file has {actual[1]}x{actual[0]}"
                + (": width and height are swapped, as an EXIF orientation does." if swapped else "."),
                hint="images are turned as their EXIF orientation says: annotate the upright images"
                if swapped
                else "give the images that were annotated, at their size, with --images",
            )
    if coco.objects and max(max(item.box) for item in coco.objects) <= 1.0:
        raise ConfigError(
            f"No box of '{annotations}' is larger than a pixel: they look like shares of the image's size.",
            hint="COCO boxes are x, y, width, height in pixels",
        )
    outside = [item for item in coco.objects if not _is_inside(item, sizes[item.image_id])]
    if outside:
        (height, width), box = sizes[outside[0].image_id], [round(value, 1) for value in outside[0].box]
        name = next(image.name for image in coco.images if image.image_id == outside[0].image_id)
        raise ConfigError(
            f"{len(outside)} of the {len(coco.objects)} boxes of '{annotations}' lie outside their images: the first "
            f"is {box} in '{name}', which has {width}x{height} pixels.",
            hint="COCO boxes are x, y, width, height in pixels of the image as it is: check the format, or clip them",
        )


def _is_inside(item: CocoObject, size: tuple[int, int]) -> bool:
    """Boxes may reach over the border by what annotation tools round."""
    x, y, width, height = item.box
    return min(x, y) >= -_BORDER_PX and x + width <= size[1] + _BORDER_PX and y + height <= size[0] + _BORDER_PX


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that no file can have.
        return False


def _ground_truth(items: Sequence[CocoObject], positions: Mapping[int, int]) -> GroundTruth:
    boxes = np.array([item.box for item in items], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # x, y, width, height -> xyxy
    return GroundTruth(
        boxes,
        classes=np.array([positions[item.category_id] for item in items], np.int64),
        areas=np.array([item.area for item in items], np.float64),
        crowd=np.array([item.crowd for item in items], np.bool_),
    )


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

    The AP of a model on such a data set is its agreement with the reference: 1 for the reference itself. Where nothing
    was detected there is no object, and no AP.
    """
    kept = {number: objects.above(min_score) for number, objects in detections.items()}
    ground_truth = {}
    for number, objects in kept.items():
        boxes = objects.boxes.astype(np.float64)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        ground_truth[number] = GroundTruth(boxes, objects.labels, areas, np.zeros(len(objects), np.bool_))
    return Dataset(tuple(images), ground_truth, class_names, source, annotated=False)


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
    quoted = [f"'{name}'" for name in names]
    more = f" and {len(quoted) - _SPELLED_OUT} more" if len(quoted) > _SPELLED_OUT else ""
    return ", ".join(quoted[:_SPELLED_OUT]) + more
