"""Data sets: COCO annotation files as tools write them, the images that they name, and stratified samples of them.

What has a single meaning is accepted: numbers, ids and flags as text, missing areas. Everything else is refused, with
its place in the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from fcos_deploy.core.errors import ConfigError, brief, some_lines
from fcos_deploy.core.files import decoded_text, read_file
from fcos_deploy.core.gate import Finding, Severity
from fcos_deploy.core.serialize import parse_json

__all__ = [
    "MEDIUM_AREAS",
    "CocoFile",
    "CocoImage",
    "CocoObject",
    "NamedImages",
    "find_named_images",
    "listed_paths",
    "object_stratum",
    "objects_by_image",
    "paths_beside",
    "read_coco",
    "stratified",
]


MEDIUM_AREAS = (32.0**2, 96.0**2)  # square pixels: COCO's objects are small below, and large from the second on

_MAX_BYTES = 512 << 20  # COCO's own training set takes 448 MB
_MAX_OBJECTS = 1_000_000  # and has 860,001

T = TypeVar("T")
_Id = int | str
_Json = dict[str, Any]  # Any: a JSON value has no narrower type


@dataclass(frozen=True, slots=True)
class CocoImage:
    """``name``: as the file has it. ``size``: (height, width), None where the file does not give it."""

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
    """Images in the order of their ids, objects in that of the file, and the categories' names by id.

    Ids are those of the file if all of them are whole numbers; otherwise images or categories are numbered from 1 in
    the order of the file. ``findings``: what was left out or joined.
    """

    images: tuple[CocoImage, ...]
    objects: tuple[CocoObject, ...]
    categories: dict[int, str]
    findings: tuple[Finding, ...] = ()


def read_coco(path: Path) -> CocoFile:
    """Read COCO annotations of boxes.

    Raises:
        ConfigError: the file cannot be read, is not one of COCO annotations, or has entries that contradict one another
            or have no single meaning; the first five are named.
    """
    content = _content(path)
    problems: list[str] = []
    images = _converted(content, "images", _image, problems)
    categories = _converted(content, "categories", _category, problems)
    if not categories and not problems:
        raise ConfigError(f"The categories of '{path}' must be at least one.")
    numbers, places = _numbered([key for key, *_ in images]), {c.key: place for place, c in enumerate(categories)}
    objects = _converted(content, "annotations", lambda entry: _object(entry, numbers, places), problems)
    copies = Counter(key for key, *_ in images)
    problems += [f"'images': {count} have the same id {brief(key)}" for key, count in copies.items() if count > 1]
    names = Counter(key for key, _ in {(category.key, _plain(category.name)) for category in categories})
    problems += [f"'categories': id {brief(key)} has {count} names" for key, count in names.items() if count > 1]
    if problems:
        raise ConfigError(
            "\n".join([f"'{path}' has entries that cannot be used: {len(problems)}.", *some_lines(problems, count=5)]),
            hint="it needs 'images' (id, file_name), 'annotations' (image_id, category_id, bbox) and 'categories'",
        )
    if not images:
        raise ConfigError(f"'{path}' has no images.")
    listed = [CocoImage(numbers[key], name, size) for key, name, size in images]
    classes, joined, findings = _classes(path, categories, used={categories[o.category_id].key for o in objects})
    return CocoFile(
        tuple(sorted(listed, key=lambda image: image.image_id)),
        tuple(dataclasses.replace(o, category_id=joined[categories[o.category_id].key]) for o in objects),
        classes,
        findings,
    )


# What is kept of each object of the file, since outlines of objects take most of its space: what COCO's boxes need, and
# the names by which other formats are recognised.
_MARKS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"shapes", "imagePath"}), "an image's file of labelme"),
    (frozenset({"assets", "tags"}), "a project of VoTT"),
    (frozenset({"frames", "inputTags"}), "a project of VoTT"),
    (frozenset({"items", "categories"}), "Datumaro's own format"),
    (frozenset({"_via_img_metadata"}), "a project of the VGG Image Annotator"),
    (frozenset({"objects", "size"}), "an image's file of Supervisely"),
    (frozenset({"features", "type"}), "GeoJSON"),
    (frozenset({"data", "annotations"}), "tasks of Label Studio"),
    (frozenset({"data", "completions"}), "tasks of Label Studio"),
    (frozenset({"image", "annotations"}), "CreateML's format"),
    (frozenset({"image_id", "score"}), "a list of detections (COCO results), which are no ground truth"),
)
_KEYS = frozenset(
    (
        *("images", "annotations", "categories", "id", "name", "file_name", "coco_url", "height", "width"),
        *("image_id", "category_id", "bbox", "area", "iscrowd", "supercategory"),
        *(name for marks, _ in _MARKS for name in marks),
    )
)
_HEADS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"<", "XML, such as Pascal VOC's or CVAT's own"),
)


def _content(path: Path) -> _Json:
    try:
        text = read_file(path, limit=_MAX_BYTES)
        kind = next((name for head, name in _HEADS if text.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(head)), "")
        if kind:
            raise ValueError(f"it is {kind}")
        content = parse_json(text, keys=_KEYS)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Cannot read the annotations '{path}': {getattr(error, 'strerror', None) or error}.",
            hint="export them as COCO json, in UTF-8",
        ) from error
    entry = content[0] if isinstance(content, list) and content else content
    kind = next((name for marks, name in _MARKS if isinstance(entry, dict) and marks <= entry.keys()), "")
    if not isinstance(content, dict) or (kind and "images" not in content):
        raise ConfigError(
            f"'{path}' is not a file of COCO annotations: it holds {kind or f'a {type(content).__name__}'}.",
            hint="export the annotations as COCO json",
        )
    return content


def _converted(content: _Json, name: str, convert: Callable[[_Json], T], problems: list[str]) -> list[T]:
    """The entries of a list of the file; what is wrong with one of them is added to ``problems``."""
    entries = content.get(name)
    if not isinstance(entries, list):
        problems.append(f"'{name}' must be a list, got {brief(entries)}" if name in content else f"it has no '{name}'")
        return []
    if len(entries) > _MAX_OBJECTS:
        problems.append(f"'{name}' has more than {_MAX_OBJECTS} entries")
        return []
    converted = []
    for position, entry in enumerate(entries):
        place = f"{name}[{position}]"
        if not isinstance(entry, dict):
            problems.append(f"{place} must be an object, got {brief(entry)}")
            continue
        if "id" in entry:
            place += f" (id {brief(entry['id'])})"
        try:
            converted.append(convert(entry))
        except (ValueError, OverflowError) as error:
            problems.append(f"{place}: {error}")
    return converted


@dataclass(frozen=True, slots=True)
class _Category:
    key: _Id
    name: str
    group: str  # its 'supercategory'


def _image(entry: _Json) -> tuple[_Id, str, tuple[int, int] | None]:
    name = entry.get("file_name")
    if name in (None, ""):
        name = entry.get("coco_url")  # LVIS gives this alone
    if not isinstance(name, (str, int)) or isinstance(name, bool) or name == "":
        raise ValueError(f"'file_name' must be text, got {brief(name)}")
    height, width = (_length(entry.get(side), side) for side in ("height", "width"))
    return _key(entry, "id"), str(name), (height, width) if height and width else None


def _length(value: object, name: str) -> int | None:
    """A side of an image; tools that do not know it leave it out or write 0."""
    if value in (None, ""):
        return None
    number = _number(value, name)
    if number < 0 or not number.is_integer():
        raise ValueError(f"'{name}' must be a number of pixels, got {brief(value)}")
    return int(number) or None


def _category(entry: _Json) -> _Category:
    name, group = entry.get("name"), entry.get("supercategory")
    if not isinstance(name, (str, int, float)) or isinstance(name, bool) or not str(name).strip():
        raise ValueError(f"'name' must be text, got {brief(name)}")
    return _Category(_key(entry, "id"), str(name), group if isinstance(group, str) else "")


def _object(entry: _Json, images: Mapping[_Id, int], categories: Mapping[_Id, int]) -> CocoObject:
    """``category_id`` is the place of the category in the file, until all of them are known."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        given = f"a list of {len(box)}" if isinstance(box, list) else brief(box)
        raise ValueError(f"'bbox' must be four numbers (x, y, width, height), got {given}")
    x, y, width, height = (_number(value, "bbox") for value in box)
    # The corners too must be finite: x + width of two large numbers is not.
    if width < 0 or height < 0 or not (math.isfinite(x + width) and math.isfinite(y + height)):
        raise ValueError(f"'bbox' must be x, y, width, height, got {[x, y, width, height]}")
    area = entry.get("area")
    area = width * height if area in (None, "") else _number(area, "area")
    if area < 0 or not math.isfinite(area):
        raise ValueError(f"'area' must not be negative, got {brief(entry.get('area'))}")
    image, category = _key(entry, "image_id"), _key(entry, "category_id")
    for key, kind, known in ((image, "image", images), (category, "category", categories)):
        if key not in known:
            raise ValueError(f"'{kind}_id' is {brief(key)}, and there is no such {kind}")
    crowd = _flag(entry.get("iscrowd"), "iscrowd")
    return CocoObject(images[image], categories[category], (x, y, width, height), area, crowd)


_NUMBER = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*", re.ASCII)
_WHOLE = re.compile(r"-?(?:0|[1-9]\d{0,99})", re.ASCII)
_FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True}


def _number(value: object, name: str) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value[:100]):
        value = float(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"'{name}' must be a number, got {brief(value)}")
    return float(value)


def _key(entry: _Json, name: str) -> _Id:
    """An id; ``7``, ``7.0`` and ``"7"`` are the same, ``"007"`` is text."""
    value = entry.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if _WHOLE.fullmatch(text) else text
    raise ValueError(f"'{name}' must be a number or text, got {brief(value)}")


def _flag(value: object, name: str) -> bool:
    if value is None:
        return False
    text = str(int(value)) if isinstance(value, (bool, float)) and value in (0, 1) else brief(value)
    if isinstance(value, str):
        text = value.strip().casefold()
    if text not in _FLAGS:
        raise ValueError(f"'{name}' must be 0 or 1, got {brief(value)}")
    return _FLAGS[text]


_BACKGROUND = frozenset({"background", "_background_", "__background__"})


def _plain(name: str) -> str:
    """Names are matched with those of a model, whatever their case."""
    return name.strip().casefold()


def _classes(
    path: Path, categories: list[_Category], *, used: set[_Id]
) -> tuple[dict[int, str], dict[_Id, int], tuple[Finding, ...]]:
    """Names by number, the numbers of the file's ids, and what was left out or joined."""
    groups = {_plain(category.group) for category in categories if _plain(category.name) != _plain(category.group)}
    findings = []
    # Roboflow writes the name of the data set as a category above the others, other tools a background.
    left_out = [
        category
        for category in categories
        if category.key not in used
        and len(categories) > 1
        and (
            (_plain(category.group) in ("", "none") and _plain(category.name) in groups) or category.name in _BACKGROUND
        )
    ]
    for category in left_out:
        message = f"the category '{category.name}' of '{path.name}' has no object and stands for no class: left out"
        findings.append(Finding(kind="category-left-out", severity=Severity.WARNING, message=message))
    kept = [category for category in categories if category not in left_out]
    numbers = _numbered([category.key for category in kept])
    names: dict[int, str] = {}
    joined: dict[_Id, int] = {}
    for category in sorted(kept, key=lambda category: numbers[category.key]):
        first = next((n for n, name in names.items() if _plain(name) == _plain(category.name)), None)
        if first is None:
            names[numbers[category.key]] = category.name
        else:
            message = f"the category '{category.name}' is in '{path.name}' more than once: taken for one class"
            findings.append(Finding(kind="category-joined", severity=Severity.WARNING, message=message))
        joined[category.key] = numbers[category.key] if first is None else first
    return names, joined, tuple(dict.fromkeys(findings))


def _numbered(keys: list[_Id]) -> Mapping[_Id, int]:
    """Numbers for ids: themselves, or, if one of them is text, their places from 1 on."""
    whole: dict[_Id, int] = {key: key for key in keys if isinstance(key, int)}
    unique = dict.fromkeys(keys)
    return whole if len(whole) == len(unique) else {key: place for place, key in enumerate(unique, start=1)}


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DRIVE = re.compile(r"^[A-Za-z]:")
_Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamedImages:
    """Where the images lie, by name.

    ``paths`` has those that were found, ``by_tail`` those of them that only the end of their name tells. ``ambiguous``:
    names that fit several files, or files that fit several names, with the files.
    """

    paths: dict[str, Path]
    by_tail: tuple[str, ...] = ()
    ambiguous: dict[str, tuple[Path, ...]] = field(default_factory=dict)


def _is_below(name: str) -> bool:
    """Whether a file name that a data set gives stays below its folder: not absolute, and no ``..`` in it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _find_in_layout(names: Iterable[str], folder: Path, *, annotations: Path) -> dict[str, Path]:
    """The images that lie in ``folder`` or where COCO's own layout, or what is often made of it, has them, by name.

    ``annotations/instances_val2017.json`` names the images of ``val2017`` or ``images/val2017``.
    """
    split = annotations.stem.rpartition("_")[2]
    places = (folder, folder / split, folder / "images" / split, folder / "images", folder.parent)
    return {
        name: path
        for name in names
        if (path := next((place / name for place in places if _is_below(name) and _is_file(place / name)), None))
    }


def find_named_images(names: Iterable[str], folder: Path, *, annotations: Path) -> NamedImages:
    """Find the images that ``annotations`` names in ``folder``: in COCO's own layout, or by the end of their names.

    A name that is not in the layout is compared with all files below ``folder`` from its end: the file that shares
    most parts with it is meant, if it is the only one.
    """
    unique = list(dict.fromkeys(names))
    paths = _find_in_layout(unique, folder, annotations=annotations)
    missing = [name for name in unique if name not in paths]
    if not missing:
        return NamedImages(paths)
    files = _files_by_name(folder)
    ambiguous: dict[str, tuple[Path, ...]] = {}
    claimed: dict[Path, list[str]] = defaultdict(list)
    for name in missing:
        candidates = _longest_tail(name, files)
        if len(candidates) == 1:
            claimed[candidates[0]].append(name)
        elif candidates:
            ambiguous[name] = candidates
    direct = set(paths.values())
    for path, owners in claimed.items():
        if len(owners) == 1 and path not in direct:
            paths[owners[0]] = path
        else:
            ambiguous |= dict.fromkeys(owners, (path,))
    return NamedImages(paths, tuple(name for owners in claimed.values() for name in owners if name in paths), ambiguous)


def paths_beside(coco: CocoFile, path: Path) -> dict[str, Path]:
    """Where the images of the COCO json ``path`` lie, by name, when nothing else says where to look.

    Raises:
        ConfigError: one of them is not there.
    """
    names = [image.name for image in coco.images]
    paths = _find_in_layout(names, path.parent.parent, annotations=path)
    paths |= _find_in_layout(names, path.parent, annotations=path)
    if len(paths) < len(set(names)):
        paths |= find_named_images(names, path.parent, annotations=path).paths
    missing = [name for name in names if name not in paths]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(names)} images of '{path}' are not in '{path.parent}': the first is "
            f"{brief(missing[0])}.",
            hint="give the folder of the images as --images, and the json as --annotations",
        )
    return {name: paths[name] for name in names}


def listed_paths(source: Path, *, allow_outside: bool = False) -> dict[str, Path]:
    """The files that a list names, one path a line, by these names; they lie below its folder, or are refused.

    Raises:
        ConfigError: the file is no such list, or names a file that is not below its folder.
    """
    try:
        text = decoded_text(read_file(source, limit=_MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{source}' is neither a list of images nor a COCO json: {error}.") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    outside = next((name for name in names if not (allow_outside or _is_below(name))), None)
    if outside is not None:
        raise ConfigError(
            f"'{source}' names the file {brief(outside)}, which is not below '{source.parent}'.",
            hint="put the list into the folder of the images, or allow it: calibrate --allow-outside",
        )
    # Windows writes backslashes, which are part of a name here: only where there is no such file.
    return {
        name: path if (path := source.parent / name).exists() else source.parent / name.replace("\\", "/")
        for name in names
    }


def objects_by_image(
    coco: CocoFile, files: Mapping[str, Path], *, source: Path, annotations: Path
) -> dict[str, list[CocoObject]]:
    """The objects in the images ``files`` of ``source``, by the names that these have there.

    Raises:
        ConfigError: none of the files is in the annotations.
    """
    names = {path: name for name, path in files.items()}
    folder = source if source.is_dir() else source.parent
    paths = find_named_images((image.name for image in coco.images), folder, annotations=annotations).paths
    own = {
        image.image_id: image.name if image.name in files else names.get(paths.get(image.name, Path()), "")
        for image in coco.images
    }
    objects: dict[str, list[CocoObject]] = {name: [] for name in own.values() if name}
    if not objects:
        raise ConfigError(
            f"None of the {len(files)} images of '{source}' is in '{annotations}': it names '{coco.images[0].name}', "
            f"'{source.name}' holds '{next(iter(files))}'.",
            hint="give the annotations that belong to these images, or none",
        )
    for item in coco.objects:
        if own[item.image_id]:
            objects[own[item.image_id]].append(item)
    return objects


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that no file can have.
        return False


def _plain_part(part: str) -> str:
    """Names that macOS and Windows take for the same are the same."""
    return unicodedata.normalize("NFC", part).casefold()


def _files_by_name(folder: Path) -> Mapping[str, list[tuple[_Parts, Path]]]:
    files: dict[str, list[tuple[_Parts, Path]]] = defaultdict(list)
    above = tuple(map(_plain_part, folder.resolve().parts))
    for parent, folders, names in os.walk(folder):
        folders.sort()
        parts = (*above, *map(_plain_part, Path(parent).relative_to(folder).parts))
        for name in sorted(names):
            files[_plain_part(name)].append(((*parts, _plain_part(name)), Path(parent, name)))
    return files


def _longest_tail(name: str, files: Mapping[str, list[tuple[_Parts, Path]]]) -> tuple[Path, ...]:
    """The files with the longest end in common with ``name``; several where that does not decide."""
    best: dict[Path, int] = {}
    for parts in _readings(name):
        for file_parts, path in files.get(parts[-1], ()):
            pairs = zip(reversed(parts), reversed(file_parts), strict=False)
            common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            best[path] = max(best.get(path, 0), common)
    longest = max(best.values(), default=0)
    return tuple(path for path, length in best.items() if length == longest)


def _readings(name: str) -> list[_Parts]:
    """The parts of a name as it is and, where it may be a URL, as that; without drive, root and ``..``."""
    texts = [name]
    if _SCHEME.match(name) or name.startswith("/data/local-files/"):
        url = urlsplit(name)
        texts = [url.path, *parse_qs(url.query).get("d", [])]  # Label Studio's local files: '/data/local-files/?d=NAME'
    texts += [decoded for text in texts if (decoded := unquote(text)) != text]
    readings = []
    for text in texts:
        parts = tuple(map(_plain_part, _DRIVE.sub("", text.replace("\\", "/"), count=1).split("/")))
        parts = tuple(part for part in parts if part not in ("", ".", ".."))
        readings += [parts] if parts else []
    return readings


Key = TypeVar("Key", str, int)


def object_stratum(classes: Iterable[int], *, longest_side: float) -> str:
    """An image's combination of classes, and the octave of its largest object's longer side: one pyramid level each."""
    return f"{'+'.join(map(str, sorted(set(classes))))}@{int(math.log2(max(longest_side, 1.0)))}"


def stratified(strata: Mapping[Key, str], *, count: int, seed: int) -> list[Key]:
    """``count`` keys in proportion to their strata, and at least one of every stratum while there is room.

    The k-th of n members of a stratum ranks at (k + 0.5) / n, its first at 0. The ``count`` lowest ranks of all strata
    then are the first of each, and after that the same share of each; a larger count only adds keys.
    """
    members: dict[str, list[Key]] = defaultdict(list)
    for key in sorted(strata):
        members[strata[key]].append(key)
    ranked = []
    for index, (stratum, keys) in enumerate(sorted(members.items())):
        order = np.random.default_rng([seed, index]).permutation(len(keys))
        for place, member in enumerate(order):
            share = 0.0 if place == 0 else (place + 0.5) / len(keys)
            ranked.append((share, -len(keys), stratum, keys[member]))
    return [key for *_, key in sorted(ranked)[:count]]
