"""What is plainly wrong with annotations, found before any model runs: boxes of another format, unit or image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.coco_file import MEDIUM_AREAS, CocoFile
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.gate import Finding, Severity
from fcos_deploy.core.image import image_size

__all__ = ["AnnotationSummary", "annotated_frame", "check_annotations", "check_geometry", "summarize_annotations"]

_BORDER_PX = 2.0  # boxes may reach over the border by what annotation tools round
_FEW = 0.01  # share of objects that may be wrong without a verdict on the rest being in doubt
_NEAR_BORDER = 8  # objects from which centres in place of corners are told


def check_annotations(coco: CocoFile, paths: Mapping[str, Path]) -> tuple[Finding, ...]:
    """What the file alone shows, and ``paths``, where its images lie by name, as far as they were found."""
    boxes = _boxes(coco)
    width, height = boxes[:, 2], boxes[:, 3]
    areas = np.array([item.area for item in coco.objects], np.float64)
    findings = list(coco.findings)

    def add(kind: str, count: int, message: str, *, spoils_ap: bool = True) -> None:
        if count:
            doubtful = spoils_ap and count > _FEW * len(boxes)
            severity = Severity.INCONCLUSIVE if doubtful else Severity.WARNING
            findings.append(Finding(kind=kind, severity=severity, message=message))

    copies = Counter((item.image_id, item.category_id, item.box) for item in coco.objects)
    copied = sum(count - 1 for count in copies.values())
    empty = int((width * height == 0).sum())
    narrow = int(((width < 1) | (height < 1)).sum()) - empty
    # Rounding aside; boxes without area have their own finding.
    unlike = (areas > 1.05 * width * height + 2) | ((areas == 0) & (width * height > 4))
    unlike_areas = int((unlike & (width >= 1) & (height >= 1)).sum())
    add("copies", copied, f"{copied} of {len(boxes)} objects are copies of others (same image, class and box)")
    add("empty", empty, f"{empty} of {len(boxes)} objects have a width or height of 0, so that none can be detected")
    add("narrow", narrow, f"{narrow} of {len(boxes)} objects are narrower than a pixel", spoils_ap=False)
    add(
        "areas",
        unlike_areas,
        f"{unlike_areas} of {len(boxes)} objects have an area that is larger than their box, or 0: AP of small, "
        "medium and large objects goes by it",
        spoils_ap=False,
    )
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
