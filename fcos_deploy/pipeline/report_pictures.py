"""What a report shows of a variant, and the images on which it departs furthest from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import Evaluation
from fcos_deploy.accuracy.matching import DetectionMatch, MatchOptions, match_detections
from fcos_deploy.benchmark.run import BenchmarkResult
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.image_io import read_image
from fcos_deploy.report import Picture, PictureBox

__all__ = ["Shown", "differing_pictures"]

_PICTURED = MatchOptions(min_score=0.4)  # what pictures show; lower scores would cover the image


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """One variant as a report shows it; ``speed`` and ``int8_share`` None where they were not measured."""

    label: str
    evaluation: Evaluation
    speed: BenchmarkResult | None = None
    reference: bool = False
    passed: bool | None = None
    int8_share: float | None = None


def differing_pictures(dataset: Dataset, shown: Sequence[Shown], *, count: int) -> tuple[Picture, ...]:
    """The ``count`` images on which a variant departs furthest from the reference.

    The worst pair of image and variant first; an image is shown once.
    """
    reference = next((one for one in shown if one.reference), None)
    if reference is None:
        return ()
    mine = reference.evaluation.run.detections
    ranked = sorted(
        (
            (_disagreement(mine[image.image_id], other.evaluation.run.detections[image.image_id]), i, j)
            for i, image in enumerate(dataset.images)
            for j, other in enumerate(shown)
            if not other.reference
        ),
        key=lambda entry: (-entry[0], entry[1], entry[2]),
    )
    chosen: dict[int, int] = {}
    for _, i, j in ranked:
        if len(chosen) < count:
            chosen.setdefault(i, j)
    return tuple(_picture(dataset, i, reference=reference, other=shown[j]) for i, j in chosen.items())


def _disagreement(reference: Detections, candidate: Detections) -> float:
    match = match_detections(reference, candidate, options=_PICTURED)
    scores = np.concatenate([reference.scores[match.missed], candidate.scores[match.invented]])
    moved = np.abs(reference.scores[match.reference] - candidate.scores[match.candidate])
    return float(scores.sum() + 0.1 * moved.sum() + 0.1 * (1 - match.iou).sum())


def _picture(dataset: Dataset, index: int, *, reference: Shown, other: Shown) -> Picture:
    image = dataset.images[index]
    mine = reference.evaluation.run.detections[image.image_id]
    theirs = other.evaluation.run.detections[image.image_id]
    match = match_detections(mine, theirs, options=_PICTURED)
    names = reference.evaluation.run.names
    return Picture(
        name=image.path.name,
        variant=other.label,
        pixels=read_image(image.path),
        reference=_boxes(mine, names, alone=match.missed, moved={}),
        candidate=_boxes(theirs, names, alone=match.invented, moved=_score_changes(mine, theirs, match)),
        note=_note(mine, theirs, match),
    )


def _note(mine: Detections, theirs: Detections, match: DetectionMatch) -> str:
    largest = max(map(abs, _score_changes(mine, theirs, match).values()), default=0.0)
    return f"Scores of pairs differ by up to {largest:.3f}. Shown: scores of at least {_PICTURED.min_score}."


def _score_changes(mine: Detections, theirs: Detections, match: DetectionMatch) -> dict[int, float]:
    """Of each detection of the candidate that has a partner: its score minus the partner's."""
    change = theirs.scores[match.candidate] - mine.scores[match.reference]
    return dict(zip(match.candidate.tolist(), change.tolist(), strict=True))


def _boxes(
    found: Detections, names: tuple[str, ...], *, alone: NDArray[np.int64], moved: Mapping[int, float]
) -> tuple[PictureBox, ...]:
    lonely = set(alone.tolist())
    return tuple(
        PictureBox(
            box=(float(x1), float(y1), float(x2), float(y2)),
            score=float(found.scores[i]),
            name=names[found.labels[i]] if 0 <= found.labels[i] < len(names) else str(found.labels[i]),
            partner=i not in lonely,
            moved=moved.get(i, 0.0),
        )
        for i in np.flatnonzero(found.scores >= _PICTURED.min_score).tolist()
        for x1, y1, x2, y2 in [found.boxes[i]]
    )
