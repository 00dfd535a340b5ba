"""Images side by side: what the reference sees, what the variant sees, and where they disagree."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ImageError
from fcos_deploy.core.libraries import require
from fcos_deploy.report.charts import FAIL, MOVED, PASS, WARN
from fcos_deploy.report.data import ImagePanel, PanelBox

__all__ = ["DrawnBox", "DrawnPanel", "draw_panels"]

_MAX_SIDE = 520  # pixels of an embedded image: sharp in a third of the page, small in the file
_QUALITY = 82
_MAX_LABELS = 10  # boxes of a panel whose names still leave the image to be seen
_MOVED = 0.03  # change of a score from which it is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnBox:
    """A rectangle in the embedded image's pixels; the label lies above it, or inside where there is no room."""

    x: float
    y: float
    width: float
    height: float
    color: str
    dash: str
    label: str
    label_y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPanel:
    """An embedded JPEG (base64) with three layers of boxes. ``missed`` and ``extra`` are counts."""

    identifier: str
    name: str
    variant: str
    note: str
    jpeg: str
    width: int
    height: int
    panels: tuple[tuple[str, tuple[DrawnBox, ...]], ...]
    missed: int
    extra: int


def draw_panels(images: tuple[ImagePanel, ...]) -> list[DrawnPanel]:
    """Shrink, encode and lay out each image."""
    return [_draw(image, identifier=f"image-{i}") for i, image in enumerate(images)]


def _draw(image: ImagePanel, *, identifier: str) -> DrawnPanel:
    height, width = image.pixels.shape[:2]
    scale = min(1.0, _MAX_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def boxes(found: tuple[PanelBox, ...], color: str, *, label: bool, dash: str = "") -> tuple[DrawnBox, ...]:
        return tuple(_box(one, scale, color=color, label=label, dash=dash) for one in found)

    few = max(len(image.reference), len(image.candidate)) <= _MAX_LABELS
    missed = tuple(b for b in image.reference if not b.partner)
    extra = tuple(b for b in image.candidate if not b.partner)
    shared = tuple(b for b in image.candidate if b.partner)
    still = tuple(b for b in shared if abs(b.moved) < _MOVED)
    moved = tuple(_shift(b, scale) for b in shared if abs(b.moved) >= _MOVED)
    difference = boxes(still, "#ffffff", label=False, dash="2 3") + moved + boxes(missed, FAIL, label=True)
    return DrawnPanel(
        identifier=identifier,
        name=image.name,
        variant=image.variant,
        note=image.note,
        jpeg=_jpeg(image.pixels, size),
        width=size[0],
        height=size[1],
        panels=(
            ("reference", boxes(image.reference, "#0b5fbd", label=few)),
            (image.variant, boxes(image.candidate, PASS, label=few)),
            ("difference", difference + boxes(extra, WARN, label=True)),
        ),
        missed=len(missed),
        extra=len(extra),
    )


def _box(one: PanelBox, scale: float, *, color: str, label: bool, dash: str) -> DrawnBox:
    x1, y1, x2, y2 = (v * scale for v in one.box)
    return DrawnBox(
        x=round(x1, 1),
        y=round(y1, 1),
        width=round(max(0.0, x2 - x1), 1),
        height=round(max(0.0, y2 - y1), 1),
        color=color,
        dash=dash,
        label=f"{one.name} {one.score:.2f}" if label else "",
        label_y=round(y1 - 4 if y1 > 20 else y1 + 16, 1),
    )


def _shift(one: PanelBox, scale: float) -> DrawnBox:
    """A box that both have, labelled with the change of its score."""
    box = _box(one, scale, color=MOVED, label=True, dash="")
    return replace(box, label=f"{one.moved:+.2f}")


def _jpeg(pixels: NDArray[np.uint8], size: tuple[int, int]) -> str:
    cv2: Any = require("cv2")
    shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", shrunk[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ImageError("An image of the report cannot be encoded as JPEG.")
    return base64.b64encode(data.tobytes()).decode("ascii")
