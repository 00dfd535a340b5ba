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
_FEW = 10  # detections above a threshold, below which where they lie is chance


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
    seen = sorted({int(label) for found in (*reference, *quantized) for label in found.labels})
    classes = tuple(_class_drift(class_names[label], label, reference, quantized, threshold) for label in seen)
    mine, theirs = _all_scores(reference), _all_scores(quantized)
    return ScoreDrift(
        threshold,
        equivalent_threshold(mine, theirs, threshold=threshold),
        classes,
        tuple((t, equivalent_threshold(mine, theirs, threshold=t)) for t in _THRESHOLDS if (mine > t).sum() >= _FEW),
    )


def _all_scores(found: Sequence[Detections]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *(d.scores for d in found)])


def _class_drift(
    name: str, label: int, reference: Sequence[Detections], quantized: Sequence[Detections], threshold: float
) -> ClassDrift:
    pairs = [
        _matched_scores(_of_class(one, label), _of_class(other, label))
        for one, other in zip(reference, quantized, strict=True)
    ]
    matched = np.concatenate(pairs) if pairs else np.empty((0, 2))
    shift = (matched[:, 1] - matched[:, 0])[matched[:, 0] >= threshold]
    mine, theirs = (_all_scores([_of_class(d, label) for d in found]) for found in (reference, quantized))
    return ClassDrift(
        name,
        len(shift),
        round(float(shift.mean()), 5) if len(shift) else 0.0,
        round(float(np.abs(shift).max()), 5) if len(shift) else 0.0,
        equivalent_threshold(mine, theirs, threshold=threshold),
    )


def _of_class(found: Detections, label: int) -> Detections:
    keep = found.labels == label
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep])


def _matched_scores(one: Detections, other: Detections) -> NDArray[np.float64]:
    """(m, 2) scores of the same objects: each of ``one``, best first, takes the most overlapping one that is left."""
    overlaps = pairwise_iou(one.boxes, other.boxes)
    pairs = []
    for row in range(len(overlaps)):
        if not overlaps.shape[1]:
            break
        column = int(overlaps[row].argmax())
        if overlaps[row, column] >= _SAME_OBJECT:
            pairs.append((one.scores[row], other.scores[column]))
            overlaps[:, column] = -1.0
    return np.array(pairs, np.float64).reshape(-1, 2)


def equivalent_threshold(reference: NDArray[np.float32], quantized: NDArray[np.float32], *, threshold: float) -> float:
    """The threshold on ``quantized`` that as many scores exceed as exceed ``threshold`` in ``reference``.

    It lies halfway between the last score that passes and the first that does not, and is ``threshold`` itself where
    that already does.
    """
    wanted = int((reference > threshold).sum())
    ordered = np.sort(quantized)[::-1].astype(np.float64)
    if int((quantized > threshold).sum()) == wanted or not len(ordered):
        return threshold
    if wanted >= len(ordered):
        return round(float(ordered[-1]) * 0.999, 5)
    above = float(ordered[wanted - 1]) if wanted else 1.0
    return round((above + float(ordered[wanted])) / 2, 5)
