"""INT8 that keeps AP can still move the scores: by how much, and which threshold gives the float model's detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.boxes import pairwise_iou
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError

__all__ = ["ClassDrift", "ScoreDrift", "equivalent_threshold", "score_drift"]

_SAME_OBJECT = 0.5  # IoU from which two detections of one class are the same object
_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # at which applications operate
_FEW = 10  # with fewer detections above a threshold, its equivalent is chance


@dataclass(frozen=True, slots=True)
class ClassDrift:
    """Of one class: matched detections, mean and largest |shift| of their scores, and the equivalent threshold."""

    name: str
    matched: int
    mean_shift: float
    largest_shift: float
    threshold: float


@dataclass(frozen=True, slots=True)
class ScoreDrift:
    """``threshold``: on INT8 scores it lets as many detections pass as ``float_threshold`` on the float model's.

    ``equivalents``: the same for other thresholds, as pairs (on float scores, on INT8 scores).
    """

    float_threshold: float
    threshold: float
    classes: tuple[ClassDrift, ...]
    equivalents: tuple[tuple[float, float], ...] = ()


def score_drift(
    reference: Sequence[Detections],
    quantized: Sequence[Detections],
    *,
    class_names: Sequence[str],
    threshold: float = 0.3,
) -> ScoreDrift:
    """Compare detections of the same images, which must reach well below ``threshold``.

    ``class_names`` by label; classes of which neither has a detection are left out.

    Raises:
        ConfigError: the numbers of images differ.
    """
    if len(reference) != len(quantized):
        raise ConfigError(f"The same images are needed: {len(reference)} and {len(quantized)} were given.")
    seen = sorted({int(label) for detections in (*reference, *quantized) for label in detections.labels})
    classes = tuple(_class_drift(class_names[label], label, reference, quantized, threshold) for label in seen)
    before, after = _all_scores(reference), _all_scores(quantized)
    operating = [t for t in _THRESHOLDS if (before > t).sum() >= _FEW]
    return ScoreDrift(
        threshold,
        equivalent_threshold(before, after, threshold=threshold),
        classes,
        tuple((t, equivalent_threshold(before, after, threshold=t)) for t in operating),
    )


def _all_scores(images: Sequence[Detections]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *(detections.scores for detections in images)])


def _class_drift(
    name: str, label: int, reference: Sequence[Detections], quantized: Sequence[Detections], threshold: float
) -> ClassDrift:
    before, after = ([_of_class(detections, label) for detections in images] for images in (reference, quantized))
    matched = np.concatenate([np.empty((0, 2)), *map(_matched_scores, before, after)])
    shift = (matched[:, 1] - matched[:, 0])[matched[:, 0] >= threshold]
    return ClassDrift(
        name,
        len(shift),
        round(float(shift.mean()), 5) if len(shift) else 0.0,
        round(float(np.abs(shift).max()), 5) if len(shift) else 0.0,
        equivalent_threshold(_all_scores(before), _all_scores(after), threshold=threshold),
    )


def _of_class(detections: Detections, label: int) -> Detections:
    keep = detections.labels == label
    return Detections(detections.boxes[keep], detections.scores[keep], detections.labels[keep])


def _matched_scores(reference: Detections, quantized: Detections) -> NDArray[np.float64]:
    """(m, 2) scores of the same objects: each of ``reference``, best first, takes the best overlap that is left."""
    overlaps = pairwise_iou(reference.boxes, quantized.boxes)
    pairs = []
    for row in range(len(overlaps) if overlaps.shape[1] else 0):
        column = int(overlaps[row].argmax())
        if overlaps[row, column] >= _SAME_OBJECT:
            pairs.append((reference.scores[row], quantized.scores[column]))
            overlaps[:, column] = -1.0
    return np.array(pairs, np.float64).reshape(-1, 2)


def equivalent_threshold(reference: NDArray[np.float32], quantized: NDArray[np.float32], *, threshold: float) -> float:
    """The threshold on ``quantized`` that as many scores exceed as exceed ``threshold`` in ``reference``.

    It lies halfway between the last score that passes and the first that does not, and is ``threshold`` itself where
    that already does.
    """
    passing = int((reference > threshold).sum())
    ordered = np.sort(quantized)[::-1].astype(np.float64)
    if int((quantized > threshold).sum()) == passing or not len(ordered):
        return threshold
    if passing >= len(ordered):
        return round(float(ordered[-1]) * 0.999, 5)
    above = float(ordered[passing - 1]) if passing else 1.0
    return round((above + float(ordered[passing])) / 2, 5)
