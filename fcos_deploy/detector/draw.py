"""Draws detections into an image, for people to look at."""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections, label_name
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import lazy_import

__all__ = ["DrawOptions", "class_color", "draw_detections"]

cv2 = lazy_import("cv2")

Color = tuple[int, int, int]  # red, green, blue

_SMALLEST_WITH_TEXT = 80  # pixels of the shorter side: below, the smallest legible label hides the image
_GOLDEN_RATIO = 0.618033988749895


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions:
    """What is drawn. ``line_width`` in pixels; None follows the image's size, as the text always does with the line."""

    score_threshold: float = 0.0
    line_width: int | None = None
    show_labels: bool = True
    show_scores: bool = True

    def __post_init__(self) -> None:
        if self.line_width is not None and self.line_width < 1:
            raise ConfigError(f"The line width must be at least 1 pixel, got {self.line_width}.")


@functools.lru_cache(maxsize=1024)
def class_color(label: int) -> Color:
    """A colour for a class: always the same, far from those of neighbouring labels, legible on light and dark."""
    hue = (0.58 + label * _GOLDEN_RATIO) % 1.0
    lightness = (0.45, 0.6, 0.36)[label // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: NDArray[np.uint8], detections: Detections, names: Sequence[str] = (), *, options: DrawOptions | None = None
) -> NDArray[np.uint8]:
    """A copy of ``image`` (h, w, 3) uint8 RGB with boxes and labels; boxes are in its pixels, the best on top.

    An image too small for legible text gets thin boxes alone.
    """
    options = options or DrawOptions()
    canvas: NDArray[np.uint8] = np.ascontiguousarray(image).copy()
    pen = _Pen.for_image(canvas.shape[:2], width=options.line_width)
    shown = detections.above(options.score_threshold)
    items = list(zip(shown.boxes.tolist(), shown.scores.tolist(), shown.labels.tolist(), strict=True))
    items.sort(key=lambda item: item[1])
    for box, _, label in items:
        _draw_box(canvas, box, color=class_color(label), pen=pen)
    if options.show_labels and pen.outline:
        labels = []
        for box, score, label in items:
            name = label_name(label, names)
            labels.append((f"{name} {score:.2f}" if options.show_scores else name, box, class_color(label)))
        _draw_labels(canvas, labels, pen=pen)
    return canvas


_Label = tuple[str, Sequence[float], Color]  # text; box xyxy, image pixels; colour


@dataclass(frozen=True, slots=True)
class _Pen:
    """Sizes in pixels that fit an image: line width and its dark outline, text scale and thickness, margin of text."""

    width: int
    outline: int
    scale: float
    thickness: int
    margin: int

    @classmethod
    def for_image(cls, size: tuple[int, ...], *, width: int | None) -> _Pen:
        shorter = min(size)
        scale = min(max(shorter / 1100, 0.38), 4.0)
        return cls(
            width=width or max(1, round(shorter / 320)),
            outline=2 if shorter >= _SMALLEST_WITH_TEXT else 0,
            scale=scale,
            thickness=max(1, round(scale * 1.6)),
            margin=max(2, round(scale * 5)),
        )


def _draw_box(canvas: NDArray[np.uint8], box: Sequence[float], *, color: Color, pen: _Pen) -> None:
    if not np.isfinite(box).all():
        return
    height, width = canvas.shape[:2]
    left, top, right, bottom = (
        round(min(max(value, 0), limit - 1)) for value, limit in zip(box, (width, height, width, height), strict=True)
    )
    if pen.outline:  # A thin dark line around the coloured one separates it from any background.
        cv2.rectangle(canvas, (left, top), (right, bottom), (16, 16, 16), pen.width + pen.outline)
    cv2.rectangle(canvas, (left, top), (right, bottom), color, pen.width)


def _draw_labels(canvas: NDArray[np.uint8], labels: Sequence[_Label], *, pen: _Pen) -> None:
    """Write labels, the last one on top and with the first choice of places."""
    taken = np.zeros(canvas.shape[:2], np.bool_)
    places = []
    for text, box, _ in reversed(labels):
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, pen.scale, pen.thickness)
        place = _free_place(box, size=(width + 2 * pen.margin, height + below + pen.margin), taken=taken)
        taken[place] = True
        places.append(place)
    for (text, _, color), (rows, columns) in zip(labels, reversed(places), strict=True):
        canvas[rows, columns] = color
        _, below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, pen.scale, pen.thickness)
        origin = columns.start + pen.margin, rows.stop - below - pen.margin // 2
        ink = _contrast(color)
        cv2.putText(canvas, text, origin, cv2.FONT_HERSHEY_SIMPLEX, pen.scale, ink, pen.thickness, cv2.LINE_AA)


def _free_place(box: Sequence[float], *, size: tuple[int, int], taken: NDArray[np.bool_]) -> tuple[slice, slice]:
    """Rows and columns above the box, inside it at the top, below it, or inside at the bottom; else the first of these.

    A place is moved into the image, and cut only where it is larger than the image.
    """
    left, top, right, bottom = (round(v) if np.isfinite(v) else 0 for v in box)
    width, height = size
    spots = []
    for y in (top - height, top, bottom, bottom - height):
        for x in (left, right - width):
            row, column = max(0, min(y, taken.shape[0] - height)), max(0, min(x, taken.shape[1] - width))
            rows = slice(row, min(row + height, taken.shape[0]))
            spots.append((rows, slice(column, min(column + width, taken.shape[1]))))
    return next((spot for spot in spots if not taken[spot].any()), spots[0])


def _contrast(color: Color) -> Color:
    """Black or white, whichever is legible on this colour (WCAG relative luminance)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)
