"""Evaluation images and their ground truth, from COCO annotations or from a reference's detections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.annotation_checks import annotated_frame, check_annotations, check_geometry
from fcos_deploy.core.coco_file import CocoFile, CocoObject, read_coco
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Finding, Severity
from fcos_deploy.core.image import list_images
from fcos_deploy.core.image_names import NamedImages, find_named_images
from fcos_deploy.core.strata import object_stratum, stratified

__all__ = [
    "Dataset",
    "EvaluationImage",
    "GroundTruth",
    "check_frame",
    "count_copies",
    "folder_images",
    "ground_truth_from_detections",
    "label_index",
    "load_coco",
]

_SPELLED_OUT = 5  # how many file or class names an error spells out


@dataclass(frozen=True, slots=True)
class EvaluationImage:
    """One image: its id in the annotations, and its file.

    ``frame``: the one way up in which the annotations fit the file; None where both do.
    """

    image_id: int
    path: Path
    frame: Orientation | None = None


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
    ``annotated``. ``findings``: what is to be said of the annotations. ``copies``: how many of the files are copies of
    others.
    """

    images: tuple[EvaluationImage, ...]
    ground_truth: Mapping[int, GroundTruth]
    class_names: tuple[str, ...]
    source: str
    annotated: bool = True
    findings: tuple[Finding, ...] = ()
    copies: int = 0

    def first(self, count: int | None) -> Dataset:
        """The same data, cut to the first ``count`` images; None keeps all."""
        return self._of(self.images[:count])

    def sample(self, count: int | None) -> Dataset:
        """``count`` images with classes and object sizes as in all of them; None keeps all."""
        if count is None:
            return self
        strata = {}
        for image_id, objects in self.ground_truth.items():
            sides = (objects.boxes[:, 2:] - objects.boxes[:, :2]).max(initial=0.0)
            strata[image_id] = object_stratum(objects.classes.tolist(), longest_side=float(sides))
        chosen = set(stratified(strata, count=count, seed=0))
        return self._of(tuple(image for image in self.images if image.image_id in chosen))

    def _of(self, images: tuple[EvaluationImage, ...]) -> Dataset:
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
    located = find_named_images((image.name for image in coco.images), images, annotations=annotations)
    _require_located(annotations, coco, located, images=images)
    frames = {image.image_id: annotated_frame(located.paths[image.name], image.size) for image in coco.images}
    sizes = {image_id: size for image_id, (size, _) in frames.items()}
    findings = (*check_annotations(coco, located.paths), *_tails(located, images), *check_geometry(coco, sizes))
    refused = next((finding for finding in findings if finding.severity is Severity.REFUSED), None)
    if refused is not None:
        raise ConfigError(f"'{annotations}' does not fit its images: {refused.message}.", hint=_HINTS[refused.kind])
    positions = {category: position for position, category in enumerate(sorted(coco.categories))}
    objects: dict[int, list[CocoObject]] = {image.image_id: [] for image in coco.images}
    for item in coco.objects:
        objects[item.image_id].append(item)
    return Dataset(
        tuple(
            EvaluationImage(image.image_id, located.paths[image.name], frames[image.image_id][1])
            for image in coco.images
        ),
        {image_id: _ground_truth(items, positions) for image_id, items in objects.items()},
        tuple(coco.categories[category] for category in positions),
        str(annotations),
        findings=findings,
    )


_HINTS = {
    "orientation": "give the images as they were annotated, with their EXIF orientation",
    "size": "give the images that were annotated, at their size, with --images",
    "shares": "COCO boxes are x, y, width, height in pixels",
    "outside": "COCO boxes are x, y, width, height in pixels of the image as it is: check the format, or clip them",
}


def _require_located(annotations: Path, coco: CocoFile, located: NamedImages, *, images: Path) -> None:
    missing = [image.name for image in coco.images if image.name not in located.paths]
    if not missing:
        return
    unclear = next(iter(located.ambiguous.items()), None)
    raise ConfigError(
        f"{len(missing)} of the {len(coco.images)} images of '{annotations}' are not in '{images}': {_some(missing)}."
        + (f" '{unclear[0]}' may be {_some(map(str, unclear[1]))}, or another name may." if unclear else ""),
        hint="give the folder that holds them with --images: names are looked for below it, by their end",
    )


def _tails(located: NamedImages, images: Path) -> Iterator[Finding]:
    if located.by_tail:
        first = located.by_tail[0]
        message = (
            f"{len(located.by_tail)} of {len(located.paths)} images were found by the end of their names: "
            f"'{first}' is '{located.paths[first].relative_to(images)}' in '{images}'"
        )
        yield Finding(kind="names", severity=Severity.WARNING, message=message)


def _ground_truth(items: Sequence[CocoObject], positions: Mapping[int, int]) -> GroundTruth:
    boxes = np.array([item.box for item in items], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # x, y, width, height -> xyxy
    return GroundTruth(
        boxes,
        classes=np.array([positions[item.category_id] for item in items], np.int64),
        areas=np.array([item.area for item in items], np.float64),
        crowd=np.array([item.crowd for item in items], np.bool_),
    )


def check_frame(images: Sequence[EvaluationImage], orientation: Orientation) -> None:
    """Refuse a detector that reads images another way up than they were annotated.

    Raises:
        ConfigError: with the first of these images.
    """
    others = [image for image in images if image.frame not in (None, orientation)]
    if others:
        read, annotated = "as they are stored", "turned as their EXIF orientation says"
        if orientation is Orientation.EXIF:
            read, annotated = annotated, read
        raise ConfigError(
            f"The model reads images {read}, and {len(others)} of them are annotated {annotated}, the first "
            f"'{others[0].path.name}': width and height are swapped.",
            hint=f"annotate them the way up that the model reads them, or export it with --orientation "
            f"{others[0].frame} if it was trained that way",
        )


def count_copies(images: Sequence[EvaluationImage]) -> int:
    """How many of the files hold the same bytes as one before them."""
    by_size: dict[int, list[Path]] = {}
    for image in images:
        by_size.setdefault(image.path.stat().st_size, []).append(image.path)
    return sum(
        len(paths) - len({path if len(paths) == 1 else sha256_file(path) for path in paths})
        for paths in by_size.values()
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
