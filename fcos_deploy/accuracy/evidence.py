"""Whether data can decide anything: enough images, objects of every class, a reference that fits the annotations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.intervals import ClassMatches
from fcos_deploy.core.gate import Judge

__all__ = ["baseline_problem", "evidence_problem"]

# Fewer do not show how much images differ: of few images a bootstrap interval is too narrow, of one it has no width.
_MIN_IMAGES = 10
# Reference AP below which no relative limit means anything: a drop of 0.01 would be a fifth of it.
_MIN_REFERENCE_AP = 0.05
# A class is suspect when the reference is at least this sure of this many detections of it, on average ...
_SURE_SCORE, _SURE_DETECTIONS = 0.3, 10
# ... and not even this fraction of what their scores promise is right at IoU 0.5.
_KEPT_PROMISE = 0.25
_SPELLED_OUT = 5


def evidence_problem(dataset: Dataset, *, judge: Judge) -> str:
    """Why no figure over this data can be judged, as half a sentence; empty when it can."""
    truths = [dataset.ground_truth[image.image_id] for image in dataset.images]
    counts = np.zeros(len(dataset.class_names), np.int64)
    for boxes in truths:
        counts += np.bincount(boxes.classes[~boxes.crowd], minlength=len(counts))
    if not counts.any():
        what = "the annotations hold" if dataset.annotated else "the reference finds"
        return f"{what} no object in these {len(dataset.images)} images"
    if judge is Judge.POINT:
        return ""
    if len(dataset.images) < _MIN_IMAGES:
        return (
            f"{len(dataset.images)} images are too few for a confidence interval (at least {_MIN_IMAGES} are needed); "
            "--judge point judges the measured figure alone"
        )
    unseen = [name for name, count in zip(dataset.class_names, counts, strict=True) if not count]
    if dataset.annotated and unseen:
        names = ", ".join(f"'{name}'" for name in unseen[:_SPELLED_OUT])
        more = f" and {len(unseen) - _SPELLED_OUT} more classes" if len(unseen) > _SPELLED_OUT else ""
        return f"no image shows an object of {names}{more}, so that nothing is known about them"
    return ""


def baseline_problem(dataset: Dataset, matches: Sequence[ClassMatches], *, ap: float | None) -> str:
    """Why the reference's own figures contradict the annotations, as half a sentence; empty when they fit.

    matches: the reference's detections of each class. Annotations in another unit, of other images or with swapped
    names give every model an AP near 0, and a loss near 0 with it.
    """
    if ap is None or not dataset.annotated:
        return ""
    for name, match in zip(dataset.class_names, matches, strict=True):
        judged = (match.scores >= _SURE_SCORE) & ~match.ignored[0]
        promised, kept = float(match.scores[judged].sum()), int(match.correct[0][judged].sum())
        if judged.sum() >= _SURE_DETECTIONS and kept < _KEPT_PROMISE * promised:
            return (
                f"the reference does not fit the annotations: of its {judged.sum()} detections of '{name}' with a "
                f"score of at least {_SURE_SCORE} (mean {promised / judged.sum():.2f}) {kept} lie on an annotated one; "
                "check the boxes' format, the class names and that the file belongs to these images"
            )
    if ap < _MIN_REFERENCE_AP:
        return (
            f"the reference's own AP is {ap:.3f}, too low to compare with; "
            "check the boxes' format, the class names and that the file belongs to these images"
        )
    return ""
