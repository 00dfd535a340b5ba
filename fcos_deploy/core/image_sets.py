"""Sets of images: those that a file names, as other tools name them, and a choice that shows what all of them show."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

__all__ = ["NamedImages", "find_in_layout", "find_named_images", "is_below", "object_stratum", "stratified"]

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


def is_below(name: str) -> bool:
    """Whether a file name that a data set gives stays below its folder: not absolute, and no ``..`` in it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def find_in_layout(names: Iterable[str], folder: Path, *, annotations: Path) -> dict[str, Path]:
    """The images that lie in ``folder`` or where COCO's own layout, or what is often made of it, has them, by name.

    ``annotations/instances_val2017.json`` names the images of ``val2017`` or ``images/val2017``.
    """
    split = annotations.stem.rpartition("_")[2]
    places = (folder, folder / split, folder / "images" / split, folder / "images", folder.parent)
    return {
        name: path
        for name in names
        if (path := next((place / name for place in places if is_below(name) and _is_file(place / name)), None))
    }


def find_named_images(names: Iterable[str], folder: Path, *, annotations: Path) -> NamedImages:
    """Find the images that ``annotations`` names in ``folder``: by ``find_in_layout``, or by the end of their names.

    A name that is not in the layout is compared with all files below ``folder`` from its end: the file that shares
    most parts with it is meant, if it is the only one.
    """
    unique = list(dict.fromkeys(names))
    paths = find_in_layout(unique, folder, annotations=annotations)
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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name that no file can have.
        return False


def _plain(part: str) -> str:
    """Names that macOS and Windows take for the same are the same."""
    return unicodedata.normalize("NFC", part).casefold()


def _files_by_name(folder: Path) -> Mapping[str, list[tuple[_Parts, Path]]]:
    files: dict[str, list[tuple[_Parts, Path]]] = defaultdict(list)
    above = tuple(map(_plain, folder.resolve().parts))
    for parent, folders, names in os.walk(folder):
        folders.sort()
        parts = (*above, *map(_plain, Path(parent).relative_to(folder).parts))
        for name in sorted(names):
            files[_plain(name)].append(((*parts, _plain(name)), Path(parent, name)))
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
        parts = tuple(map(_plain, _DRIVE.sub("", text.replace("\\", "/"), count=1).split("/")))
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
