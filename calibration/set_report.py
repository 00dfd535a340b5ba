"""What is wrong with a calibration set: duplicates, overlap with the evaluation, classes and levels never excited."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from calibration.data import Box, CalibrationSet, find_images
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.contract import ModelContract

__all__ = ["SetReport", "examine_set"]

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
