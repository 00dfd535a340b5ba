"""Evaluation images and their ground truth, from COCO annotations or a reference's detections.

What is plainly wrong with annotations, boxes of another format, unit or image, is said before any model runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.annotations import (
    MEDIUM_AREAS,
    CocoFile,
    CocoObject,
    NamedImages,
    find_named_images,
    object_stratum,
    read_coco,
    stratified,
)
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError, some_names
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Finding, Severity
from fcos_deploy.core.image import image_size, list_images

__all__ = [
    "AnnotationSummary",
    "Dataset",
    "EvaluationImage",
    "GroundTruth",
    "annotated_frame",
    "check_annotations",
    "check_frame",
    "check_geometry",
    "count_copies",
    "folder_images",
    "ground_truth_from_detections",
    "label_index",
    "load_coco",
    "summarize_annotations",
]

_BORDER_PX = 2.0  # boxes may reach over the border by what annotation tools round
_FEW = 0.01  # share of objects that may be wrong without a verdict on the rest being in doubt
_NEAR_BORDER = 8  # objects from which centres in place of corners are told


def check_annotations(coco: CocoFile, paths: Mapping[str, Path]) -> tuple[Finding, ...]:
    """What the file alone shows, and ``paths``, where its images lie by name, as far as they were found."""
    boxes = _boxes(coco)
    width, height = boxes[:, 2], boxes[:, 3]
    areas = np.array([item.area for item in coco.objects], np.float64)
    findings = list(coco.findings)
    copies = Counter((item.image_id, item.category_id, item.box) for item in coco.objects)
    empty = int((width * height == 0).sum())
    # Rounding aside; boxes without area have their own finding.
    unlike = (areas > 1.05 * width * height + 2) | ((areas == 0) & (width * height > 4))
    for kind, count, message in (
        ("copies", sum(copies.values()) - len(copies), "are copies of others (same image, class and box)"),
        ("empty", empty, "have a width or height of 0, so that none can be detected"),
        ("narrow", int(((width < 1) | (height < 1)).sum()) - empty, "are narrower than a pixel"),
        (
            "areas",
            int((unlike & (width >= 1) & (height >= 1)).sum()),
            "have an area that is larger than their box, or 0: AP of small, medium and large objects goes by it",
        ),
    ):
        if count:
            spoils_ap = kind in ("copies", "empty") and count > _FEW * len(boxes)
            severity = Severity.INCONCLUSIVE if spoils_ap else Severity.WARNING
            sentence = f"{count} of {len(boxes)} objects {message}"
            findings.append(Finding(kind=kind, severity=severity, message=sentence))
    if len(boxes) and all(item.crowd for item in coco.objects):
        message = f"all {len(boxes)} objects are crowds (iscrowd), in which detections are neither right nor wrong"
        findings.append(Finding(kind="crowds", severity=Severity.INCONCLUSIVE, message=message))
    files = Counter(path.resolve() for path in paths.values())
    twice = [path.name for path, count in files.items() if count > 1]
    repeated = [name for name, count in Counter(image.name for image in coco.images).items() if count > 1]
    if twice or repeated:
        message = f"'{(twice or repeated)[0]}' is listed as more than one image ({len(twice or repeated)} such files)"
        findings.append(Finding(kind="images-twice", severity=Severity.INCONCLUSIVE, message=message))
    return tuple(findings)


def annotated_frame(path: Path, size: tuple[int, int] | None) -> tuple[tuple[int, int], Orientation | None]:
    """Which way up ``size``, (height, width), fits an image file; None where both ways do, or neither.

    Returns with it the file's (height, width) that way up, or upright.
    """
    upright, stored = (image_size(path, orientation=frame) for frame in (Orientation.EXIF, Orientation.STORED))
    if upright == stored or size not in (upright, stored):
        return upright, None
    return size, Orientation.EXIF if size == upright else Orientation.STORED


def check_geometry(coco: CocoFile, sizes: Mapping[int, tuple[int, int]]) -> Iterator[Finding]:
    """What does not fit images of ``sizes``, (height, width) by id as they are decoded; or their own size in the file.

    Boxes of another frame give every model an AP near 0.
    """
    for image in coco.images:
        actual = sizes.get(image.image_id, image.size)
        if image.size is not None and actual is not None and image.size != actual:
            swapped = image.size == actual[::-1]
            yield Finding(
                kind="orientation" if swapped else "size",
                severity=Severity.REFUSED,
                message=f"'{image.name}' of {image.size[1]}x{image.size[0]} pixels (width x height) is annotated, "
                f"the file has {actual[1]}x{actual[0]}"
                + (": width and height are swapped, as an EXIF orientation does" if swapped else ""),
            )
            return
    boxes = _boxes(coco)
    if len(boxes) and boxes.max() <= 1.0:
        message = "no box is larger than a pixel: they look like shares of the image's size"
        yield Finding(kind="shares", severity=Severity.REFUSED, message=message)
        return
    known = {image.image_id: size for image in coco.images if (size := sizes.get(image.image_id, image.size))}
    rows = [row for row, item in enumerate(coco.objects) if item.image_id in known]
    if not rows:
        return
    boxes = boxes[rows]
    heights, widths = np.array([known[coco.objects[row].image_id] for row in rows], np.float64).T
    outside = ~_are_inside(boxes, widths, heights)
    if outside.any():
        first = coco.objects[rows[int(outside.argmax())]]
        name = next(image.name for image in coco.images if image.image_id == first.image_id)
        size = known[first.image_id]
        yield Finding(
            kind="outside",
            severity=Severity.REFUSED,
            message=f"{int(outside.sum())} of the {len(coco.objects)} boxes lie outside their images: the first is "
            f"{[round(value, 1) for value in first.box]} in '{name}', which has {size[1]}x{size[0]} pixels"
            + _other_format(boxes, widths, heights),
        )
    elif _look_like_centres(boxes, widths, heights):
        message = "the boxes lie as if x and y were their centres: COCO's are the upper left corner"
        yield Finding(kind="centres", severity=Severity.INCONCLUSIVE, message=message)


_Column = NDArray[np.float64]


def _boxes(coco: CocoFile) -> NDArray[np.float64]:
    return np.array([item.box for item in coco.objects], np.float64).reshape(-1, 4)


def _are_inside(boxes: NDArray[np.float64], widths: _Column, heights: _Column) -> NDArray[np.bool_]:
    x, y, width, height = boxes.T
    low = np.minimum(x, y) >= -_BORDER_PX
    inside: NDArray[np.bool_] = low & (x + width <= widths + _BORDER_PX) & (y + height <= heights + _BORDER_PX)
    return inside


def _other_format(boxes: NDArray[np.float64], widths: _Column, heights: _Column) -> str:
    """The format in which all boxes are inside, as the end of a sentence; empty if there is none."""
    x, y, right, lower = boxes.T
    corners = np.stack([x, y, right - x, lower - y], 1)
    if (corners[:, 2:] >= 0).all() and _are_inside(corners, widths, heights).all():
        return ". They look like x1, y1, x2, y2"
    centred = np.stack([x - right / 2, y - lower / 2, right, lower], 1)
    if _are_inside(centred, widths, heights).all():
        return ". They look like centre x, centre y, width, height"
    return ""


def _look_like_centres(boxes: NDArray[np.float64], widths: _Column, heights: _Column) -> bool:
    """Whether boxes come near the right and the lower border, and none is nearer than half its size to the others.

    Where objects lie alike towards both borders that has a chance of 1 in 2 ** count, for each axis.
    """
    for start, size, length in ((boxes[:, 0], boxes[:, 2], widths), (boxes[:, 1], boxes[:, 3], heights)):
        near = length - start - size < size / 2 - 1
        if (start < size / 2 - 1).any() or near.sum() < _NEAR_BORDER:
            return False
    return True


@dataclass(frozen=True, slots=True)
class AnnotationSummary:
    """``facts``: lines for people. ``classes``: name, objects, images with one, and median box, one row a class."""

    facts: tuple[tuple[str, str], ...]
    classes: tuple[tuple[str, int, int, str], ...]


def summarize_annotations(coco: CocoFile) -> AnnotationSummary:
    """How many images, objects and classes there are, and how large."""
    boxes = _boxes(coco)
    areas = np.array([item.area for item in coco.objects], np.float64)
    in_image = Counter(item.image_id for item in coco.objects)
    sizes = sorted({image.size for image in coco.images if image.size}, key=lambda size: size[0] * size[1])
    facts = [
        ("images", f"{len(coco.images)}, {len(coco.images) - len(in_image)} of them without an object"),
        ("image sizes", " to ".join(f"{w}x{h}" for h, w in sizes[:: max(1, len(sizes) - 1)][:2]) or "not given"),
        ("objects", f"{len(boxes)}, {sum(item.crowd for item in coco.objects)} of them crowds"),
        ("classes", str(len(coco.categories))),
    ]
    if len(boxes):
        small, medium, large = np.bincount(np.digitize(areas, MEDIUM_AREAS), minlength=3)
        sides = np.percentile(boxes[:, 2:].max(1), (5, 50, 95))
        facts += [
            ("objects an image", f"{len(boxes) / len(coco.images):.1f}, at most {max(in_image.values())}"),
            ("small, medium, large", f"{small}, {medium}, {large}"),
            ("longer side", f"{sides[1]:.0f} pixels in the median, {sides[0]:.0f} to {sides[2]:.0f} for 9 of 10"),
        ]
    rows = []
    for category, name in coco.categories.items():
        own = [item for item in coco.objects if item.category_id == category]
        median = np.median([item.box[2:] for item in own], axis=0) if own else None
        shape = "" if median is None else f"{median[0]:.0f}x{median[1]:.0f}"
        rows.append((name, len(own), len({item.image_id for item in own}), shape))
    return AnnotationSummary(tuple(facts), tuple(rows))


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
        f"{len(missing)} of the {len(coco.images)} images of '{annotations}' are not in '{images}': "
        f"{some_names(missing)}."
        + (f" '{unclear[0]}' may be {some_names(map(str, unclear[1]))}, or another name may." if unclear else ""),
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
            f"{dataset.source} has objects of {some_names(unknown)}, which the model does not know: "
            f"its classes are {some_names(model_names)}.",
            hint="give the model its class names when it is exported (--classes), or the annotations that belong to it",
        )
    return index


def _plain(name: str) -> str:
    return name.strip().casefold()
