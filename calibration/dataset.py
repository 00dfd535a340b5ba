"""Calibration images: which ones are chosen, how they are read, and what is wrong with the choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.coco_file import is_below, read_coco
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CalibrationError, ConfigError, ImageError
from fcos_deploy.core.files import read_file, sha256_file
from fcos_deploy.core.image import IMAGE_SUFFIXES, list_images, read_image
from fcos_deploy.core.preprocess import resized_size
from fcos_deploy.core.serialize import parse_json
from fcos_deploy.core.text import brief

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

_LARGEST_LIST = 512 << 20  # bytes
# From 64 to 128 images the demo detector's ranges still move by 1 % in the median (docs/int8.md).
_DEFAULT_COUNT = 128
# Below this the demo detector's ranges are more than 2 % from those of 128 images, in the median (docs/int8.md).
_FEW = 32
# Largest distance from a location to a side that a level regresses, in units of its stride: 64 pixels at stride 8 up to
# 512 at stride 64 (Tian et al., "FCOS", ICCV 2019, m_i of multi-level prediction).
_LEVEL_REACH = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """How many images to take, and with which random seed.

    ``count`` None takes up to 128. Fewer than ``minimum`` images are refused: ranges of a handful of images miss the
    large objects, which live in the tails. ``allow_outside``: a list may name files that are not below its folder.
    """

    count: int | None = None
    seed: int = 0
    minimum: int = 8
    allow_outside: bool = False

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"The number of calibration images must be at least 1, got {self.count}.")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """What is wrong with a choice of images; empty tuples are good news.

    ``duplicates``: pairs of names with the same content. ``overlap``: images that the evaluation set has as well.
    ``classes_absent``: classes that no image shows. ``levels_absent``: strides of the pyramid levels that no object
    excites. ``few``: too few images for ranges to settle.
    """

    images: int
    candidates: int
    duplicates: tuple[tuple[str, str], ...] = ()
    overlap: tuple[str, ...] = ()
    classes_absent: tuple[str, ...] = ()
    levels_absent: tuple[int, ...] = ()
    few: bool = False

    def lines(self) -> list[str]:
        """For people: one line a finding, the number of images first."""
        lines = [f"{self.images} of {self.candidates} images"]
        lines += [f"duplicate: '{second}' is the same file as '{first}'" for first, second in self.duplicates]
        if self.overlap:
            shown = ", ".join(self.overlap[:3])
            lines.append(f"overlap: {len(self.overlap)} images are in the evaluation set too ({shown})")
        if self.classes_absent:
            lines.append(f"no image shows: {', '.join(self.classes_absent)}")
        if self.levels_absent:
            lines.append(f"no object excites the levels of stride {', '.join(map(str, self.levels_absent))}")
        if self.few:
            lines.append(f"few images: fewer than {_FEW} leave ranges unsettled")
        return lines


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
    files = find_images(source, allow_outside=options.allow_outside)
    coco = annotations or (source if source.suffix == ".json" else None)
    labels, categories = _read_objects(coco) if coco else ({}, {})
    strata = {name: _stratum(name, labels.get(name)) for name in files}
    chosen = sorted(_stratified(strata, count=options.count or _DEFAULT_COUNT, seed=options.seed))
    if len(chosen) < options.minimum:
        raise CalibrationError(
            f"'{source}' gives {len(chosen)} calibration images, at least {options.minimum} are needed.",
            hint="100 to 300 images of what the detector will see are best",
        )
    images = tuple(CalibrationImage(name, files[name], _hash(files[name])) for name in chosen)
    boxes = {name: labels[name] for name in chosen if name in labels}
    return CalibrationSet(source, images, len(files), options.seed, boxes, categories)


def find_images(source: Path, *, allow_outside: bool = False) -> dict[str, Path]:
    """All images of a folder, list file or COCO json, by name; those of a file lie below its folder, or are refused.

    Raises:
        CalibrationError: the source is not there or names no image.
    """
    if not source.exists():
        raise CalibrationError(f"'{source}' is not there.", hint="give a folder of images, a list file or a COCO json")
    if source.is_dir():
        try:
            paths = {path.relative_to(source).as_posix(): path for path in list_images(source)}
        except ImageError as error:
            raise CalibrationError(
                f"'{source}' holds no images.", hint=f"readable kinds: {' '.join(sorted(IMAGE_SUFFIXES))}"
            ) from error
    else:
        paths = {name: source.parent / name for name in _listed(source)}
        outside = next((name for name in paths if not allow_outside and not is_below(name)), None)
        if outside is not None:
            raise CalibrationError(
                f"'{source}' names the file {brief(outside)}, which is not below '{source.parent}'.",
                hint="put the list into the folder of the images, or allow it: calibrate --allow-outside",
            )
    if not paths:
        raise CalibrationError(f"'{source}' names no images.", hint="one path a line, or a COCO json")
    return dict(sorted(paths.items()))


def examine_set(images: CalibrationSet, contract: ModelContract, *, evaluation_images: Path | None = None) -> SetReport:
    """Look for duplicates, overlap with the evaluation set, and classes and pyramid levels that no image shows.

    Images are compared by content, never by name. Classes and levels need annotations.

    Raises:
        CalibrationError: the evaluation set cannot be read.
    """
    by_hash: dict[str, list[str]] = defaultdict(list)
    for image in images.images:
        by_hash[image.sha256].append(image.name)
    evaluation = {sha256_file(p) for p in find_images(evaluation_images).values()} if evaluation_images else set()
    boxes = [box for of_image in images.annotations.values() for box in of_image]
    seen = {box.category for box in boxes}
    return SetReport(
        images=len(images.images),
        candidates=images.candidates,
        duplicates=tuple((names[0], again) for names in by_hash.values() for again in names[1:]),
        overlap=tuple(image.name for image in images.images if image.sha256 in evaluation),
        classes_absent=tuple(name for category, name in images.categories.items() if category not in seen),
        levels_absent=_levels_absent(boxes, contract) if images.annotations else (),
        few=len(images.images) < _FEW,
    )


def _listed(source: Path) -> list[str]:
    try:
        text = read_file(source, limit=_LARGEST_LIST).decode("utf-8")
        if source.suffix == ".json":
            return [str(entry["file_name"]) for entry in parse_json(text)["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"'{source}' is neither a list of images nor a COCO json: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


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
    """``count`` names in proportion to their strata, and at least one of every stratum while there is room.

    The k-th of n members of a stratum ranks at (k + 0.5) / n, its first at 0. The ``count`` lowest ranks of all strata
    then are the first of each, and after that the same share of each; a larger count only adds names.
    """
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


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"Cannot read the calibration image '{path}': {reason}.") from error


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


def _levels_absent(boxes: Sequence[Box], contract: ModelContract) -> tuple[int, ...]:
    """Strides of the levels to which FCOS's assignment by size would give no object at its centre."""
    # From an object's centre the farthest side is half the longer one away; here in network-input pixels.
    reaches = []
    for box in boxes:
        resized_height, _ = resized_size(box.image_height, box.image_width, contract.preprocess)
        reaches.append(box.longer_side / 2 * resized_height / box.image_height)
    strides, absent = contract.decode.strides, []
    for level, stride in enumerate(strides):
        low = strides[level - 1] * _LEVEL_REACH if level else 0.0
        high = stride * _LEVEL_REACH if level + 1 < len(strides) else float("inf")
        if not any(low < reach <= high for reach in reaches):
            absent.append(stride)
    return tuple(absent)
