"""Images side by side: what the reference sees, what a variant sees, and where they disagree."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.predictions import DetectionRun
from fcos_deploy.core.detections import Detections, label_name
from fcos_deploy.core.errors import ImageError
from fcos_deploy.core.image import read_image
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.matching import DetectionMatch, MatchOptions, match_detections
from fcos_deploy.report.data import ReportData

__all__ = ["ImagePanel", "PanelBox", "image_panels"]

cv2 = lazy_import("cv2")

_MATCHING = MatchOptions(min_score=0.4)  # also what is drawn: boxes of lower scores would cover the image
_MAX_SIDE = 520  # pixels of an embedded image: sharp in a third of the page, small in the file
_JPEG_QUALITY = 82
_MAX_LABELS = 10  # boxes whose names still leave the image to be seen
_MOVED = 0.03  # change of a score from which it is shown
_BLUE, _GREEN, _RED, _ORANGE, _VIOLET, _WHITE = "#0b5fbd", "#1a7f4b", "#b3261e", "#b26a00", "#6d28d9", "#ffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelBox:
    """A rectangle in the embedded image's pixels; the label lies above it, or inside where there is no room."""

    x: float
    y: float
    width: float
    height: float
    color: str
    label: str = ""
    label_y: float
    dash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePanel:
    """An embedded JPEG (base64) with three layers of boxes.

    ``missed``: the number of the reference's detections that the variant lacks; ``extra``: of those it has alone.
    """

    identifier: str
    name: str
    variant: str
    note: str
    jpeg: str
    width: int
    height: int
    layers: tuple[tuple[str, tuple[PanelBox, ...]], ...]
    missed: int
    extra: int


def image_panels(data: ReportData, *, count: int = 4) -> list[ImagePanel]:
    """The ``count`` images on which a variant disagrees most with the reference, worst first.

    An image is shown once, with the variant that disagrees most. Nothing is shown without a reference.

    Raises:
        ImageError: an image can no longer be read.
    """
    if data.reference is None or not data.candidates:
        return []
    run = data.reference.evaluation.run
    worst = []
    for image in data.dataset.images:
        reference = run.detections[image.image_id]
        comparisons = [
            _compare(variant.label, reference, variant.evaluation.run.detections[image.image_id])
            for variant in data.candidates
        ]
        worst.append((image, max(comparisons, key=lambda comparison: comparison.disagreement)))
    worst.sort(key=lambda entry: -entry[1].disagreement)
    return [
        _draw(comparison, image.path, run=run, identifier=f"image-{index}")
        for index, (image, comparison) in enumerate(worst[:count])
    ]


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """A variant's detections on one image beside the reference's.

    changes: (pairs,) float32, score of the candidate minus that of the reference.
    """

    variant: str
    reference: Detections
    candidate: Detections
    match: DetectionMatch
    changes: NDArray[np.float32]
    disagreement: float


def _compare(variant: str, reference: Detections, candidate: Detections) -> _Comparison:
    match = match_detections(reference, candidate, options=_MATCHING)
    changes = candidate.scores[match.candidate] - reference.scores[match.reference]
    alone = np.concatenate([reference.scores[match.missed], candidate.scores[match.extra]])
    # A pair counts a tenth of its change of score and of the overlap that it lacks; a box without a partner, its score.
    disagreement = float(alone.sum() + 0.1 * np.abs(changes).sum() + 0.1 * (1 - match.iou).sum())
    return _Comparison(variant, reference, candidate, match, changes, disagreement)


def _draw(comparison: _Comparison, path: Path, *, run: DetectionRun, identifier: str) -> ImagePanel:
    pixels = read_image(path, orientation=run.orientation)
    scale = min(1.0, _MAX_SIDE / max(pixels.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    shrunk = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    encoded, jpeg = cv2.imencode(".jpg", shrunk[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not encoded:
        raise ImageError("An image of the report cannot be encoded as JPEG.")
    largest = float(np.abs(comparison.changes).max(initial=0.0))
    return ImagePanel(
        identifier=identifier,
        name=path.name,
        variant=comparison.variant,
        note=f"Scores of pairs differ by up to {largest:.3f}. Shown: scores of at least {_MATCHING.min_score}.",
        jpeg=base64.b64encode(jpeg.tobytes()).decode("ascii"),
        width=width,
        height=height,
        layers=_layers(comparison, names=run.names, scale=scale),
        missed=len(comparison.match.missed),
        extra=len(comparison.match.extra),
    )


def _layers(
    comparison: _Comparison, *, names: tuple[str, ...], scale: float
) -> tuple[tuple[str, tuple[PanelBox, ...]], ...]:
    """The boxes of the reference, those of the variant, and their difference."""
    reference, candidate, match = comparison.reference, comparison.candidate, comparison.match

    def named(detections: Detections, i: int, color: str) -> PanelBox:
        name = label_name(int(detections.labels[i]), names)
        return _box(detections, i, scale=scale, color=color, label=f"{name} {detections.scores[i]:.2f}")

    def all_boxes(detections: Detections, color: str) -> tuple[PanelBox, ...]:
        shown = np.flatnonzero(detections.scores >= _MATCHING.min_score).tolist()
        return tuple(
            named(detections, i, color) if few else _box(detections, i, scale=scale, color=color) for i in shown
        )

    few = max(int((d.scores >= _MATCHING.min_score).sum()) for d in (reference, candidate)) <= _MAX_LABELS
    unchanged, moved = [], []
    for i, change in sorted(zip(match.candidate.tolist(), comparison.changes.tolist(), strict=True)):
        if candidate.scores[i] < _MATCHING.min_score:
            continue
        if abs(change) < _MOVED:
            unchanged.append(_box(candidate, i, scale=scale, color=_WHITE, dash="2 3"))
        else:
            moved.append(_box(candidate, i, scale=scale, color=_VIOLET, label=f"{change:+.2f}"))
    missed = [named(reference, i, _RED) for i in match.missed]
    extra = [named(candidate, i, _ORANGE) for i in match.extra]
    return (
        ("reference", all_boxes(reference, _BLUE)),
        (comparison.variant, all_boxes(candidate, _GREEN)),
        ("difference", (*unchanged, *moved, *missed, *extra)),
    )


def _box(detections: Detections, i: int, *, scale: float, color: str, label: str = "", dash: str = "") -> PanelBox:
    x1, y1, x2, y2 = (float(v) * scale for v in detections.boxes[i])
    return PanelBox(
        x=round(x1, 1),
        y=round(y1, 1),
        width=round(max(0.0, x2 - x1), 1),
        height=round(max(0.0, y2 - y1), 1),
        color=color,
        label=label,
        label_y=round(y1 - 4 if y1 > 20 else y1 + 16, 1),
        dash=dash,
    )
