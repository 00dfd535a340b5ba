"""COCO annotation files: read and checked once, for evaluation and for calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import read_file
from fcos_deploy.core.serialize import parse_json
from fcos_deploy.core.text import brief

__all__ = ["CocoFile", "CocoImage", "CocoObject", "find_coco_images", "is_below", "read_coco"]

_MAX_BYTES = 512 << 20  # COCO's own training set takes 448 MB
_MAX_OBJECTS = 1_000_000  # and has 860,001
# What is kept of each object of the file: outlines of objects take most of its space.
_KEYS = frozenset(
    (
        *("images", "annotations", "categories", "id", "name", "file_name", "height", "width"),
        *("image_id", "category_id", "bbox", "area", "iscrowd"),
    )
)


@dataclass(frozen=True, slots=True)
class CocoImage:
    """``name``: path below the image folder. ``size``: (height, width), None where the file does not give it."""

    image_id: int
    name: str
    size: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class CocoObject:
    """``box``: x, y, width, height in image pixels, finite and not negative in size. ``area`` in square pixels."""

    image_id: int
    category_id: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool


@dataclass(frozen=True, slots=True)
class CocoFile:
    """Images in the order of their ids, objects in that of the file, and the categories' names by id."""

    images: tuple[CocoImage, ...]
    objects: tuple[CocoObject, ...]
    categories: dict[int, str]


def is_below(name: str) -> bool:
    """Whether a file name that a data set gives stays below its folder: not absolute, and no ``..`` in it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def read_coco(path: Path) -> CocoFile:
    """Read COCO annotations of boxes.

    Raises:
        ConfigError: the file cannot be read, is not one of COCO annotations, or contradicts itself.
    """
    try:
        content = parse_json(read_file(path, limit=_MAX_BYTES), keys=_KEYS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the annotations '{path}': {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' is not a file of COCO annotations: it holds a {type(content).__name__}.")
    try:
        images = sorted((_image(entry) for entry in content["images"]), key=lambda image: image.image_id)
        categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        # Names are matched with those of a model, whatever their case.
        if len({name.strip().casefold() for name in categories.values()}) < max(1, len(content["categories"])):
            raise ConfigError(f"The categories of '{path}' must have different ids and names, and be at least one.")
        if len(content["annotations"]) > _MAX_OBJECTS:
            raise ValueError(f"it has more than {_MAX_OBJECTS} annotations")
        objects = tuple(_object(entry) for entry in content["annotations"])
        ids = {image.image_id for image in images}
        if len(ids) < len(images):
            raise ValueError("two images have the same id")
        for item in objects:
            if item.image_id not in ids or item.category_id not in categories:
                raise ValueError(f"no image {item.image_id} or no category {item.category_id}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"'{path}' is not a complete file of COCO annotations: {type(error).__name__} {error}.",
            hint="it needs 'images' (id, file_name), 'annotations' (image_id, category_id, bbox) and 'categories'",
        ) from error
    if not images:
        raise ConfigError(f"'{path}' has no images.")
    _require_below(path, images)
    return CocoFile(tuple(images), objects, categories)


def _require_below(path: Path, images: list[CocoImage]) -> None:
    outside = next((image.name for image in images if not is_below(image.name)), None)
    if outside is not None:
        raise ConfigError(
            f"'{path}' names the image {brief(outside)}, which is not below the folder of the images.",
            hint="make the names relative to the folder that holds all images, and give it with --images",
        )


def find_coco_images(names: Iterable[str], folder: Path, *, annotations: Path) -> dict[str, Path]:
    """Where the images that ``annotations`` names lie, by name; where they should lie when they are not there.

    Beside ``folder`` itself these are the places of COCO's own layout, and of what is often made of it:
    ``annotations/instances_val2017.json`` names the images of ``val2017`` or ``images/val2017``.
    """
    split = annotations.stem.rpartition("_")[2]
    places = (folder, folder / split, folder / "images" / split, folder / "images", folder.parent)
    return {
        name: next((place / name for place in places if _is_file(place / name)), folder / name)
        for name in dict.fromkeys(names)
    }


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that no file can have.
        return False


def _image(entry: dict[str, Any]) -> CocoImage:
    size = (int(entry["height"]), int(entry["width"])) if "height" in entry and "width" in entry else None
    if size is not None and min(size) < 1:
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels")
    return CocoImage(int(entry["id"]), str(entry["file_name"]), size)


def _object(entry: dict[str, Any]) -> CocoObject:
    x, y, width, height = (float(value) for value in entry["bbox"])
    area = float(entry.get("area", width * height))
    # The corners too must be finite: x + width of two large numbers is not.
    if not all(map(math.isfinite, (x, y, x + width, y + height, area))) or width < 0 or height < 0:
        raise ValueError(f"the bbox {entry['bbox']} with area {area} is none (x, y, width, height)")
    crowd = bool(entry.get("iscrowd", 0))
    return CocoObject(int(entry["image_id"]), int(entry["category_id"]), (x, y, width, height), area, crowd)
