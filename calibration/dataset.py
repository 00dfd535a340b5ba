"""Calibration images: which ones are chosen, how they are read, and what is wrong with the choice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.annotations import (
    CocoObject,
    listed_paths,
    object_stratum,
    objects_by_image,
    paths_beside,
    read_coco,
    stratified,
)
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import CalibrationError, ConfigError, ImageError, some_lines
from fcos_deploy.core.gate import Finding, Severity
from fcos_deploy.core.image import decode_image, image_content, list_images, pixels_sha256, read_image
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.preprocess import resized_size

__all__ = [
    "CalibrationImage",
    "CalibrationSet",
    "ImageFiles",
    "SampleOptions",
    "SetReport",
    "collect_images",
    "examine_set",
    "inspect_images",
    "open_images",
]

# From 64 to 128 images the demo detector's ranges still move by 1 % in the median (docs/int8.md).
_DEFAULT_COUNT = 128
# Below this the demo detector's ranges are more than 2 % from those of 128 images, in the median (docs/int8.md).
_FEW = 32
# How many names a finding or an error lists.
_LISTED = 20
# What an image may hold that tells nothing about activations.
_EMPTY = (_LINE, _COLOUR) = ("a single row or column of pixels", "a single colour")
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
    """One file; ``name`` is its path below the image folder, with forward slashes.

    ``size`` is the (height, width) of the decoded pixels and ``pixels_sha256`` their hash, which a copy in another
    format shares; ``sha256`` is that of the file. ``flaw``: what speaks against a photograph, such as ``a single
    colour``; '' for nothing.
    """

    name: str
    path: Path
    size: tuple[int, int]
    sha256: str
    pixels_sha256: str = ""
    flaw: str = ""

    def read(self, orientation: Orientation = Orientation.EXIF) -> NDArray[np.uint8]:
        """The pixels: (h, w, 3) uint8 RGB, the way up that the model reads files.

        Raises:
            CalibrationError: the file cannot be read.
        """
        try:
            return read_image(self.path, orientation=orientation)
        except ImageError as error:
            raise CalibrationError(f"Calibration image: {error.message}", hint="remove the file and repeat") from error


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """The images of a source and, where annotations of them were given, the objects in them, both by image name."""

    paths: dict[str, Path]
    objects: dict[str, list[CocoObject]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)


def open_images(source: Path, *, annotations: Path | None = None, allow_outside: bool = False) -> ImageFiles:
    """All images of a folder, list file or COCO json; those of a file lie below its folder, or are refused.

    Raises:
        CalibrationError: the source is not there or names no image, or the annotations are of other images.
    """
    if not source.exists():
        raise CalibrationError(
            f"'{source}' does not exist.", hint="give a folder of images, a list file or a COCO json"
        )
    coco = None
    try:
        if source.is_dir():
            paths = {path.relative_to(source).as_posix(): path for path in list_images(source)}
        elif source.suffix.lower() != ".json":
            paths = listed_paths(source, allow_outside=allow_outside)
        else:
            coco = read_coco(source)
            paths = paths_beside(coco, source)
        if not paths:
            raise CalibrationError(f"'{source}' names no images.", hint="a list needs one path per line")
        paths = dict(sorted(paths.items()))
        coco = read_coco(annotations) if annotations else coco
        if coco is None:
            return ImageFiles(paths)
        objects = objects_by_image(coco, paths, source=source, annotations=annotations or source)
    except (ConfigError, ImageError) as error:
        raise CalibrationError(error.message, hint=error.hint) from error
    return ImageFiles(paths, objects, coco.categories)


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """The chosen images in the order of their names, and how they were chosen."""

    source: Path
    images: tuple[CalibrationImage, ...]
    candidates: int
    seed: int
    annotations: Mapping[str, Sequence[CocoObject]] = field(default_factory=dict, repr=False)  # by image name
    categories: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """How many images were chosen, and what is to be said of them."""

    images: int
    candidates: int
    findings: tuple[Finding, ...] = ()

    def lines(self) -> list[str]:
        """For people: the number of images, then one line a finding."""
        return [f"{self.images} of {self.candidates} images", *(finding.line for finding in self.findings)]

    def require_usable(self) -> None:
        """Refuse images on which nothing can be measured.

        Raises:
            CalibrationError: with every finding, those that only warn too.
        """
        if any(finding.severity is Severity.REFUSED for finding in self.findings):
            raise CalibrationError(
                "\n".join(["The images cannot be used.", *(finding.line for finding in self.findings)]),
                hint="give other --calibration-images, or accept an overlap knowingly with --allow-overlap",
            )


def collect_images(
    source: Path,
    *,
    annotations: Path | None = None,
    options: SampleOptions | None = None,
    orientation: Orientation = Orientation.EXIF,
) -> CalibrationSet:
    """Choose calibration images from a folder, a list file (one path a line) or a COCO json.

    With annotations the choice covers the combinations of classes and of largest object, otherwise the subfolders. It
    depends on the names, the seed and the annotations only; a larger count contains the smaller one. ``orientation``:
    which way up the model reads files.

    Raises:
        CalibrationError: nothing there, files that are missing or damaged (all are listed), too few different images,
            or annotations of other images.
    """
    options = options or SampleOptions()
    files = open_images(source, annotations=annotations, allow_outside=options.allow_outside)
    strata = {name: name.rpartition("/")[0] for name in files.paths}
    for name, items in files.objects.items():
        longest = max((max(item.box[2:]) for item in items), default=0.0)
        strata[name] = object_stratum((item.category_id for item in items), longest_side=longest)
    chosen = sorted(stratified(strata, count=options.count or _DEFAULT_COUNT, seed=options.seed))
    images = inspect_images({name: files.paths[name] for name in chosen}, orientation=orientation)
    photographs = {image.pixels_sha256 for image in images if image.flaw not in _EMPTY}
    if len(photographs) < options.minimum:
        different = f", {len(photographs)} of them different photographs" if len(photographs) < len(images) else ""
        raise CalibrationError(
            f"'{source}' gives {len(images)} calibration images{different}, at least {options.minimum} are needed.",
            hint="100 to 300 images of what the detector will see are best",
        )
    objects = {name: files.objects[name] for name in chosen if name in files.objects}
    return CalibrationSet(source, images, len(files.paths), options.seed, objects, files.categories)


def inspect_images(
    files: Mapping[str, Path], *, orientation: Orientation = Orientation.EXIF
) -> tuple[CalibrationImage, ...]:
    """Read every file once, in the order of names: what it holds, and what speaks against a photograph.

    Raises:
        CalibrationError: files that cannot be read or are damaged; all of them are listed.
    """
    problems: list[str] = []

    def inspect(name: str) -> CalibrationImage | str:
        try:
            content = image_content(files[name])
            pixels = decode_image(content, path=files[name], orientation=orientation)
        except ImageError as error:
            return error.message
        height, width, _ = pixels.shape
        file_sha256, flaw = hashlib.sha256(content).hexdigest(), _why_not_a_photograph(pixels)
        return CalibrationImage(name, files[name], (height, width), file_sha256, pixels_sha256(pixels), flaw)

    images = []
    with ThreadPoolExecutor(usable_cpus(), "images") as pool:
        for result in pool.map(inspect, sorted(files)):
            if isinstance(result, str):
                problems.append(result)
            else:
                images.append(result)
    if problems:
        raise CalibrationError(
            "\n".join(
                [f"{len(problems)} of {len(files)} images cannot be used.", *some_lines(problems, count=_LISTED)]
            ),
            hint="get these files again, or remove them",
        )
    return tuple(images)


def examine_set(
    images: CalibrationSet,
    contract: ModelContract,
    *,
    evaluation: Sequence[CalibrationImage] = (),
    allow_overlap: bool = False,
) -> SetReport:
    """Look for copies, overlap with the evaluation set, and classes and pyramid levels that no image shows.

    Images are compared by their decoded pixels, never by name. Classes and levels need annotations.
    """
    findings = [
        *_copies(images.images, of="calibration", severity=Severity.WARNING),
        *_flaws(images.images),
        *_overlap(images.images, evaluation, severity=Severity.WARNING if allow_overlap else Severity.REFUSED),
        *_copies(evaluation, of="evaluation", severity=Severity.INCONCLUSIVE),
    ]

    def warn(kind: str, message: str) -> None:
        findings.append(Finding(kind=kind, severity=Severity.WARNING, message=message))

    different = len({image.pixels_sha256 for image in images.images})
    if different < _FEW:
        warn("few", f"{different} different calibration images: fewer than {_FEW} leave ranges unsettled")
    if images.annotations:
        seen = {item.category_id for items in images.annotations.values() for item in items}
        absent = [name for category, name in images.categories.items() if category not in seen]
        levels = _levels_absent(images, contract)
        unlabelled = len(images.images) - len(images.annotations)
        if unlabelled:
            warn("unlabelled", f"{unlabelled} of {len(images.images)} calibration images are not in the annotations")
        if absent:
            warn("classes-absent", f"no calibration image shows: {', '.join(absent)}")
        if levels:
            warn("levels-absent", f"no object excites the levels of stride {', '.join(map(str, levels))}")
    return SetReport(images=len(images.images), candidates=images.candidates, findings=tuple(findings))


def _copies(images: Sequence[CalibrationImage], *, of: str, severity: Severity) -> Iterator[Finding]:
    """Copies count as several images and tell no more than one."""
    names: dict[str, str] = {}
    pairs = [
        (image.name, first)
        for image in images
        if (first := names.setdefault(image.pixels_sha256, image.name)) != image.name
    ]
    if pairs:
        shown = ", ".join(f"'{name}' is '{first}'" for name, first in pairs[:_LISTED])
        message = f"{len(pairs)} of {len(images)} {of} images are copies of others ({shown})"
        yield Finding(kind=f"{of}-copies", severity=severity, message=message)


def _flaws(images: Sequence[CalibrationImage]) -> Iterator[Finding]:
    for flaw in sorted({image.flaw for image in images if image.flaw}):
        names = [image.name for image in images if image.flaw == flaw]
        message = f"{len(names)} calibration images hold {flaw} ({', '.join(names[:_LISTED])})"
        yield Finding(kind=flaw.rpartition(" ")[2], severity=Severity.WARNING, message=message)


def _overlap(
    images: Sequence[CalibrationImage], evaluation: Sequence[CalibrationImage], *, severity: Severity
) -> Iterator[Finding]:
    contents = {image.pixels_sha256 for image in images}
    shared = [image.name for image in evaluation if image.pixels_sha256 in contents]
    if shared:
        message = (
            f"{len(shared)} of {len(evaluation)} evaluation images are calibration images too "
            f"({', '.join(shared[:_LISTED])}), on which INT8 looks better than it is"
        )
        yield Finding(kind="overlap", severity=severity, message=message)


def _why_not_a_photograph(pixels: NDArray[np.uint8]) -> str:
    """What the image looks like instead; a camera's frame at night may look like noise as well."""
    if min(pixels.shape[:2]) < 2:
        return _LINE
    red, green, blue = np.moveaxis(pixels[:512, :512], 2, 0).astype(np.int16)
    grey = red + green + blue
    spread = float(grey.std(dtype=np.float32))
    if spread == 0.0:
        return _COLOUR
    # The difference of two independent pixels has sqrt(2) times the deviation of one. In photographs neighbours are
    # alike: the sharpest and noisiest that were tried stay below 0.8.
    step = float(np.diff(grey, axis=1).std(dtype=np.float32))
    return "little but noise" if step > 1.25 * spread and pixels.size > 3 * 1024 else ""


def _levels_absent(images: CalibrationSet, contract: ModelContract) -> tuple[int, ...]:
    """Strides of the levels to which FCOS's assignment by size would give no object at its centre."""
    # From an object's centre the farthest side is half the longer one away; here in network-input pixels.
    reaches = []
    for image in images.images:
        height, width = image.size
        scale = resized_size(height, width, contract.preprocess)[0] / height
        reaches += [max(item.box[2:]) / 2 * scale for item in images.annotations.get(image.name, ())]
    strides, absent = contract.decode.strides, []
    for level, stride in enumerate(strides):
        low = strides[level - 1] * _LEVEL_REACH if level else 0.0
        high = stride * _LEVEL_REACH if level + 1 < len(strides) else float("inf")
        if not any(low < reach <= high for reach in reaches):
            absent.append(stride)
    return tuple(absent)
