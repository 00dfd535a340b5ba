"""Which images the ranges are measured on: found, sampled, identified, and refused when they are no pictures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.coco_file import read_coco
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CalibrationError, ConfigError, ImageError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.image import IMAGE_SUFFIXES, list_images, read_image
from fcos_deploy.core.serialize import parse_json

__all__ = [
    "Box",
    "CalibrationImage",
    "CalibrationSet",
    "SampleOptions",
    "SetReport",
    "collect_images",
    "examine_set",
    "find_images",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Which of the images to take.

    ``count`` None takes all up to ``DEFAULT_COUNT``. Fewer than ``minimum`` images are refused: ranges of a handful of
    pictures miss the large objects that live in the tails.
    """

    count: int | None = None
    seed: int = 0
    minimum: int = 8

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"The number of calibration images must be at least 1, got {self.count}.")

    @property
    def limit(self) -> int:
        """The largest number of images taken."""
        return DEFAULT_COUNT if self.count is None else self.count


# From 64 to 128 images the demo detector's ranges still move by 1 % in the median (docs/int8.md).
DEFAULT_COUNT = 128


@dataclass(frozen=True, slots=True)
class CalibrationImage:
    """One file; ``name`` is its path below the image folder, with forward slashes."""

    name: str
    path: Path
    sha256: str

    def read(self) -> NDArray[np.uint8]:
        """The pixels: (h, w, 3) uint8 RGB.

        Raises:
            CalibrationError: the file cannot be read, or holds a single colour or noise, on which ranges mean nothing.
        """
        try:
            pixels: NDArray[np.uint8] = read_image(self.path)
        except ImageError as error:
            raise CalibrationError(f"Calibration image: {error.message}", hint="remove the file and repeat") from error
        problem = _why_not_a_photograph(pixels)
        if problem:
            raise CalibrationError(
                f"Calibration image '{self.path}' is {problem}, not a photograph.",
                hint="calibrate on images of what the detector will see",
            )
        return pixels


def _why_not_a_photograph(pixels: NDArray[np.uint8]) -> str:
    if min(pixels.shape[:2]) < 2:
        return "a single row or column of pixels"
    grey = pixels[:512, :512].astype(np.float32).mean(2)
    spread = float(grey.std())
    if spread == 0.0:
        return "a single colour"
    # The difference of two independent pixels has sqrt(2) times the deviation of one. In photographs neighbours are
    # alike: the sharpest and noisiest that were tried stay below 0.8.
    step = float(np.diff(grey, axis=1).std())
    return "noise" if step > 1.25 * spread and pixels.size > 3 * 1024 else ""


@dataclass(frozen=True, slots=True)
class Box:
    """An annotated object: longer side in image pixels, and the image's size."""

    category: int
    longer_side: float
    image_height: int
    image_width: int


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """The chosen images in the order of their names, and how they were chosen."""

    source: Path
    images: tuple[CalibrationImage, ...]
    candidates: int
    seed: int
    annotations: Mapping[str, tuple[Box, ...]] = field(default_factory=dict, repr=False)  # by image name
    categories: Mapping[int, str] = field(default_factory=dict)


def collect_images(
    source: Path, *, annotations: Path | None = None, options: SampleOptions | None = None
) -> CalibrationSet:
    """Choose calibration images from a folder, a list file (one path a line) or a COCO json.

    With annotations the choice covers the combinations of classes and of largest object, otherwise the subfolders. It
    depends on the names, the seed and the annotations only; a larger count contains the smaller one.

    Raises:
        CalibrationError: nothing there, too few images, or a file that is missing.
    """
    options = options or SampleOptions()
    files = find_images(source)
    coco = annotations or (source if source.suffix == ".json" else None)
    labels, categories = _read_objects(coco) if coco else ({}, {})
    strata = {name: _stratum(name, labels.get(name)) for name in files}
    chosen = sorted(_stratified(strata, count=options.limit, seed=options.seed))
    if len(chosen) < options.minimum:
        raise CalibrationError(
            f"'{source}' gives {len(chosen)} calibration images, at least {options.minimum} are needed.",
            hint="100 to 300 images of what the detector will see are best",
        )
    images = tuple(CalibrationImage(name, files[name], _hash(files[name])) for name in chosen)
    boxes = {name: labels[name] for name in chosen if name in labels}
    return CalibrationSet(source, images, len(files), options.seed, boxes, categories)


def find_images(source: Path) -> dict[str, Path]:
    """All images of a folder, list file or COCO json, by name.

    Raises:
        CalibrationError: the source is not there or names no image.
    """
    if not source.exists():
        raise CalibrationError(f"'{source}' is not there.", hint="give a folder of images, a list file or a COCO json")
    if source.is_dir():
        found = {p.relative_to(source).as_posix(): p for p in _in_folder(source)}
    else:
        found = {name: source.parent / name for name in _listed(source)}
    if not found:
        raise CalibrationError(f"'{source}' names no images.", hint="one path a line, or a COCO json")
    return dict(sorted(found.items()))


def _in_folder(source: Path) -> list[Path]:
    try:
        return list_images(source)
    except ImageError as error:
        raise CalibrationError(
            f"'{source}' holds no images.", hint=f"readable kinds: {' '.join(sorted(IMAGE_SUFFIXES))}"
        ) from error


def _listed(source: Path) -> list[str]:
    try:
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".json":
            return [str(entry["file_name"]) for entry in parse_json(text)["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"'{source}' is neither a list of images nor a COCO json: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"Cannot read the calibration image '{path}': {reason}.") from error


def _read_objects(path: Path) -> tuple[dict[str, tuple[Box, ...]], dict[int, str]]:
    """Objects by image name, and class names by category."""
    try:
        coco = read_coco(path)
    except ConfigError as error:
        raise CalibrationError(error.message, hint=error.hint) from error
    images = {image.image_id: image for image in coco.images}
    boxes: dict[str, list[Box]] = {image.name: [] for image in coco.images}
    for item in coco.objects:
        image = images[item.image_id]
        if image.size is None:
            raise CalibrationError(f"'{path}' does not give the height and width of '{image.name}'.")
        boxes[image.name].append(Box(item.category_id, max(item.box[2:]), *image.size))
    return {name: tuple(items) for name, items in boxes.items()}, coco.categories


def _stratum(name: str, items: tuple[Box, ...] | None) -> str:
    if items is None:
        return name.rpartition("/")[0]
    classes = "+".join(str(c) for c in sorted({item.category for item in items}))
    # Octaves of the largest object's longer side: one pyramid level each.
    largest = max((item.longer_side for item in items), default=0.0)
    return f"{classes}@{int(np.log2(max(largest, 1.0)))}"


def _stratified(strata: Mapping[str, str], *, count: int, seed: int) -> list[str]:
    """Names in proportion to their strata, and of every stratum at least one while there is room."""
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(strata):
        members[strata[name]].append(name)
    ranked = []
    for index, (stratum, names) in enumerate(sorted(members.items())):
        order = np.random.default_rng([seed, index]).permutation(len(names))
        for place, member in enumerate(order):
            share = 0.0 if place == 0 else (place + 0.5) / len(names)
            ranked.append((share, -len(names), stratum, names[member]))
    return [name for *_, name in sorted(ranked)[:count]]


# Below this the demo detector's ranges are more than 2 % from those of 128 images, in the median (docs/int8.md).
_FEW = 32
# Largest distance from a location to a side that a level regresses, in units of its stride (FCOS, section 3.2).
_LEVEL_REACH = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """Findings; empty tuples are good news. ``levels_absent`` are strides in network-input pixels."""

    images: int
    candidates: int
    duplicates: tuple[tuple[str, str], ...] = ()
    overlap: tuple[str, ...] = ()
    classes_absent: tuple[str, ...] = ()
    levels_absent: tuple[int, ...] = ()
    few: bool = False

    def lines(self) -> list[str]:
        """One line a finding, the number of images first."""
        found = [f"{self.images} of {self.candidates} images"]
        found += [f"duplicate: '{second}' is the same file as '{first}'" for first, second in self.duplicates]
        if self.overlap:
            shown = ", ".join(self.overlap[:3])
            found.append(f"overlap: {len(self.overlap)} images are in the evaluation set too ({shown})")
        if self.classes_absent:
            found.append(f"no image shows: {', '.join(self.classes_absent)}")
        if self.levels_absent:
            found.append(f"no object excites the levels of stride {', '.join(map(str, self.levels_absent))}")
        if self.few:
            found.append(f"few images: fewer than {_FEW} leave ranges unsettled")
        return found


def examine_set(images: CalibrationSet, contract: ModelContract, *, evaluation_images: Path | None = None) -> SetReport:
    """Compare by content, never by name.

    Raises:
        CalibrationError: the evaluation set cannot be read.
    """
    by_hash: dict[str, list[str]] = defaultdict(list)
    for image in images.images:
        by_hash[image.sha256].append(image.name)
    evaluation = {sha256_file(p) for p in find_images(evaluation_images).values()} if evaluation_images else set()
    return SetReport(
        images=len(images.images),
        candidates=images.candidates,
        duplicates=tuple((names[0], other) for names in by_hash.values() for other in names[1:]),
        overlap=tuple(image.name for image in images.images if image.sha256 in evaluation),
        classes_absent=_classes_absent(images),
        levels_absent=_levels_absent(images, contract) if images.annotations else (),
        few=len(images.images) < _FEW,
    )


def _classes_absent(images: CalibrationSet) -> tuple[str, ...]:
    seen = {box.category for boxes in images.annotations.values() for box in boxes}
    return tuple(name for category, name in images.categories.items() if category not in seen)


def _levels_absent(images: CalibrationSet, contract: ModelContract) -> tuple[int, ...]:
    """Strides of levels to which FCOS's assignment by size would give no object at its centre."""
    strides = contract.decode.strides
    reaches = [_reach(box, contract) for boxes in images.annotations.values() for box in boxes]
    absent = []
    for level, stride in enumerate(strides):
        low = strides[level - 1] * _LEVEL_REACH if level else 0.0
        high = stride * _LEVEL_REACH if level + 1 < len(strides) else float("inf")
        if not any(low < reach <= high for reach in reaches):
            absent.append(stride)
    return tuple(absent)


def _reach(box: Box, contract: ModelContract) -> float:
    """Half the longer side of an object, in network-input pixels."""
    height, width = box.image_height, box.image_width
    spec = contract.preprocess
    if spec.height is not None and spec.width is not None:
        scale = min(spec.height / height, spec.width / width)
    else:
        scale = min((spec.shortest or 1) / min(height, width), (spec.longest or 1) / max(height, width))
    return box.longer_side / 2 * scale
