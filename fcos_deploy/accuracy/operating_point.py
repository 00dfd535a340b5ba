"""Operating points: the score threshold of each class, and the precision, recall and confusion there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import ApInterval, ClassMatches, drop_interval, resample_weights
from fcos_deploy.accuracy.dataset import Dataset, GroundTruth
from fcos_deploy.core.detections import Detections, pairwise_iou
from fcos_deploy.core.errors import ConfigError, some_names
from fcos_deploy.core.gate import equivalent_threshold, share_interval

__all__ = [
    "OPERATING_COLUMNS",
    "Confusion",
    "FaultyImage",
    "OperatingCounts",
    "OperatingDrop",
    "OperatingGoal",
    "OperatingPoint",
    "Share",
    "Thresholds",
    "carried_thresholds",
    "chosen_thresholds",
    "confusion",
    "confusion_json",
    "equivalent_thresholds",
    "operating_counts",
    "operating_drops",
    "operating_points",
    "operating_problem",
    "operating_rows",
]

OPERATING_COLUMNS = ("class", "chosen by", "score", "precision", "recall", "F1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingGoal:
    """What a threshold is chosen for: the best F1, or a smallest precision or recall (0..1) with most of the other."""

    precision: float | None = None
    recall: float | None = None

    def __post_init__(self) -> None:
        if self.precision is not None and self.recall is not None:
            raise ConfigError(
                "A score threshold is chosen for a precision or for a recall.",
                hint="give --at-precision or --at-recall",
            )
        for name, value in (("precision", self.precision), ("recall", self.recall)):
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigError(f"The {name} must be in (0, 1], got {value}.", hint=f"--at-{name} 0.95, for example")

    @staticmethod
    def asked(*, precision: float | None, recall: float | None) -> OperatingGoal | None:
        """The goal with one of these; None where neither is given."""
        return None if precision is None and recall is None else OperatingGoal(precision=precision, recall=recall)

    @staticmethod
    def require_annotations(goal: OperatingGoal | None, annotations: Path | None) -> None:
        """Refuse, with ConfigError, a goal where there is nothing to measure it on."""
        if goal is not None and annotations is None:
            raise ConfigError(
                "A precision or recall for score thresholds needs annotations.",
                hint="give --annotations FILE, or leave --at-precision and --at-recall out",
            )

    def __str__(self) -> str:
        if self.precision is not None:
            return f"precision {self.precision:g}"
        return "best F1" if self.recall is None else f"recall {self.recall:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share in 0..1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """One class at its threshold, at IoU 0.5. ``goal``: what the threshold was chosen for, or where it comes from.

    ``score``: detections with more are kept; it lies halfway between two scores that were seen. None, with the rest:
    for the ``reason``, such as that no threshold reaches the goal.
    """

    name: str
    goal: str
    reason: str = ""
    score: float | None = None
    precision: Share | None = None
    recall: Share | None = None
    f1: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """``scores``: of each class, None where there is none. ``origin``: what they were chosen for, or whose they are.

    ``carried``: by a bundle, so that they were given and not chosen on these images.
    """

    scores: tuple[float | None, ...]
    origin: str
    carried: bool = False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OperatingCounts:
    """What the thresholds keep of a run, so that two runs on the same images can be compared.

    right, kept, objects: (classes, images) int64, the right ones of the kept detections and of the objects; those in a
    crowd are in neither. matches: all detections, to count them at other thresholds.
    """

    thresholds: Thresholds
    right: NDArray[np.int64]
    kept: NDArray[np.int64]
    objects: NDArray[np.int64]
    matches: tuple[ClassMatches, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingDrop:
    """By how much a share (0..1) at the operating point, the mean over the classes, is below the reference's.

    ``reference``: its own share. ``by_class``: the drop of each class, None where a share is not defined.
    """

    reference: float
    drop: ApInterval
    by_class: tuple[float | None, ...]


def chosen_thresholds(matches: Sequence[ClassMatches], *, goal: OperatingGoal) -> Thresholds:
    """The thresholds that reach the goal on these images."""
    return Thresholds(scores=tuple(_chosen_score(match, goal) for match in matches), origin=str(goal))


def equivalent_thresholds(reference: OperatingCounts, matches: Sequence[ClassMatches]) -> Thresholds:
    """Thresholds that let as many detections of each class pass as the reference's do.

    They keep its operating point when scores drift. They look at no annotation, so that nothing is fitted to chance:
    of best F1, which is flat, each model's own choice would trade recall for precision.
    """
    scores = [
        None if score is None else equivalent_threshold(_counted(before)[0], _counted(match)[0], threshold=score)
        for score, before, match in zip(reference.thresholds.scores, reference.matches, matches, strict=True)
    ]
    return Thresholds(scores=tuple(scores), origin=f"{reference.thresholds.origin} of the reference")


def carried_thresholds(scores: Mapping[str, float], class_names: Sequence[str]) -> Thresholds:
    """Those that a bundle carries, by class name."""
    known = {name.casefold(): score for name, score in scores.items()}
    return Thresholds(
        scores=tuple(known.get(name.casefold()) for name in class_names), origin="the bundle", carried=True
    )


def operating_points(
    matches: Sequence[ClassMatches], class_names: Sequence[str], thresholds: Thresholds
) -> tuple[OperatingPoint, ...]:
    """One point for each class, at its threshold."""
    classes = zip(matches, class_names, thresholds.scores, strict=True)
    return tuple(_point(match, name, score, origin=thresholds.origin) for match, name, score in classes)


def operating_counts(matches: Sequence[ClassMatches], thresholds: Thresholds) -> OperatingCounts:
    """What the thresholds keep; nothing of a class without one."""
    right, kept = [], []
    for match, score in zip(matches, thresholds.scores, strict=True):
        scores, correct, image = _counted(match)
        passing = scores > (np.inf if score is None else score)
        right.append(np.bincount(image[passing & correct], minlength=len(match.positives)))
        kept.append(np.bincount(image[passing], minlength=len(match.positives)))
    return OperatingCounts(
        thresholds=thresholds,
        right=np.stack(right),
        kept=np.stack(kept),
        objects=np.stack([match.positives for match in matches]),
        matches=tuple(matches),
    )


def operating_problem(reference: OperatingCounts, candidate: OperatingCounts, class_names: Sequence[str]) -> str:
    """Why the two cannot be compared at an operating point, as half a sentence; empty when they can."""
    present = reference.objects.sum(1) > 0
    for counts in (reference, candidate):
        lacking = [
            name
            for name, score, seen in zip(class_names, counts.thresholds.scores, present, strict=True)
            if seen and score is None
        ]
        if lacking:
            return f"there is no score threshold of {some_names(lacking)} ({counts.thresholds.origin})"
    return ""


def operating_drops(
    reference: OperatingCounts, candidate: OperatingCounts, *, resamples: int, seed: int, same_outputs: bool
) -> tuple[OperatingDrop | None, OperatingDrop | None]:
    """Of precision and of recall, the means over the classes that have objects, with paired bootstrap intervals.

    ``same_outputs``: as in ``paired_ap_drop``. None: no class has objects, or nothing is kept.
    """
    images = reference.objects.shape[1]
    weights = np.ones((1, images), np.float32)
    if resamples:
        weights = resample_weights(images, resamples=resamples, seed=seed)
    return (
        _drop(weights, (reference.right, reference.kept), (candidate.right, candidate.kept), same_outputs),
        _drop(weights, (reference.right, reference.objects), (candidate.right, candidate.objects), same_outputs),
    )


_Counted = tuple[NDArray[np.int64], NDArray[np.int64]]  # what is right, and of how many; (classes, images) each


def _drop(
    weights: NDArray[np.float32], reference: _Counted, candidate: _Counted, same_outputs: bool
) -> OperatingDrop | None:
    before, after = _shares(weights, *reference), _shares(weights, *candidate)
    defined = np.isfinite(before) & np.isfinite(after)
    # A class is compared where both shares are defined, in the data as it is and in a resample.
    classes = defined.sum(1)
    totals = np.where(defined, before - after, 0.0).sum(1)
    values = np.divide(totals, classes, out=np.full(len(totals), np.nan), where=classes > 0)
    if not classes[0]:
        return None
    due, images = reference[1].sum(1)[defined[0]], weights.shape[1]
    if len(values) > 1:
        # One that is lost, or is wrong, costs its share of the class that has fewest.
        cost = 0.0 if same_outputs else float(1 / due.min() / classes[0])
        drop = drop_interval(values, images=images, object_share=cost)
    else:
        drop = ApInterval.point(float(values[0]), images=images)
    return OperatingDrop(
        reference=float(before[0][defined[0]].mean()),
        drop=drop,
        by_class=tuple(float(b - a) if d else None for b, a, d in zip(before[0], after[0], defined[0], strict=True)),
    )


def _shares(weights: NDArray[np.float32], right: NDArray[np.int64], due: NDArray[np.int64]) -> NDArray[np.float64]:
    """(resamples, classes): the share of ``due`` that is right; NaN where nothing is due."""
    totals = (weights @ due.T.astype(np.float32)).astype(np.float64)  # whole numbers, exact up to 2 ** 24
    hits = (weights @ right.T.astype(np.float32)).astype(np.float64)
    shares: NDArray[np.float64] = np.divide(hits, totals, out=np.full(totals.shape, np.nan), where=totals > 0)
    return shares


def operating_rows(points: Sequence[OperatingPoint]) -> list[tuple[str, ...]]:
    """Lines of a table, as ``OPERATING_COLUMNS`` names it."""
    return [
        (
            point.name,
            f"{point.goal}: {point.reason}" if point.reason else point.goal,
            _number(point.score),
            *(f"{s.value:.3f} ({s.low:.3f} to {s.high:.3f})" if s else "-" for s in (point.precision, point.recall)),
            _number(point.f1),
        )
        for point in points
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counted(match: ClassMatches) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Scores, best first, which detections are right at IoU 0.5, and their images.

    Detections in a crowd are neither right nor wrong.
    """
    counted = ~match.ignored[0]
    return match.scores[counted].astype(np.float64), match.correct[0][counted], match.image[counted]


def _chosen_score(match: ClassMatches, goal: OperatingGoal) -> float | None:
    scores, correct, _ = _counted(match)
    objects = int(match.positives.sum())
    if not objects or not len(scores):
        return None
    # A threshold keeps all detections of one score or none: only the last of equal scores ends a choice.
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    right = np.cumsum(correct)[ends]
    chosen = _choose(right / (ends + 1), right / objects, 2 * right / (ends + 1 + objects), goal)
    if chosen is None:
        return None
    kept = int(ends[chosen]) + 1
    return float(scores[kept - 1] + (scores[kept] if kept < len(scores) else 0.0)) / 2


def _point(match: ClassMatches, name: str, score: float | None, *, origin: str) -> OperatingPoint:
    scores, correct, image = _counted(match)
    objects, images = int(match.positives.sum()), len(match.positives)
    if score is None or not objects:
        return OperatingPoint(name=name, goal=origin, reason="no score reaches it" if objects else "no object")
    kept = int((scores > score).sum())
    return OperatingPoint(
        name=name,
        goal=origin,
        score=score,
        precision=_share(correct[:kept], image[:kept], np.bincount(image[:kept], minlength=images)) if kept else None,
        recall=_share(correct[:kept], image[:kept], match.positives),
        f1=float(2 * correct[:kept].sum() / (kept + objects)),
    )


def _choose(
    precision: NDArray[np.float64], recall: NDArray[np.float64], f1: NDArray[np.float64], goal: OperatingGoal
) -> int | None:
    """Position of the threshold; None where none reaches the goal. Of equals the higher threshold is taken."""
    if goal.recall is not None:
        reached = np.flatnonzero(recall >= goal.recall)
        return int(reached[0]) if len(reached) else None  # Recall only grows: the first has the highest threshold.
    if goal.precision is not None:
        reached = np.flatnonzero(precision >= goal.precision)
        return int(reached[np.argmax(recall[reached])]) if len(reached) else None
    return int(np.argmax(f1)) if f1.max() > 0 else None


def _share(correct: NDArray[np.bool_], image: NDArray[np.int64], due: NDArray[np.int64]) -> Share:
    """The share of ``due`` (images,) that is right."""
    right = np.bincount(image[correct], minlength=len(due))
    low, high = share_interval(due - right, due)
    return Share(value=float(right.sum() / due.sum()), low=low, high=high)


# What is taken for what at the thresholds, and the images with the most faults.

_IOU = 0.5
_WORST = 10  # images


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FaultyImage:
    """An image with its ``missed`` objects, and its ``extra`` and right (``correct``) detections.

    Labels are positions in the class names of the data set. An object that is detected as another class is missed, and
    the detection is extra.
    """

    image_id: int
    missed: GroundTruth
    extra: Detections
    correct: Detections

    @property
    def faults(self) -> int:
        """Missed objects and extra detections."""
        return len(self.missed.boxes) + len(self.extra)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Confusion:
    """counts: (classes + 1, classes + 1) int64, objects of a row's class that are detected as a column's.

    The last column are objects that are missed, the last row detections of nothing. ``worst``: most faults first.
    """

    class_names: tuple[str, ...]
    counts: NDArray[np.int64]
    worst: tuple[FaultyImage, ...]


def confusion(dataset: Dataset, detections: Mapping[int, Detections], thresholds: Thresholds) -> Confusion:
    """Pair the detections above the thresholds with the objects, by an IoU of at least 0.5.

    Pairs of one class come first, as COCO makes them; what is left is then paired whatever its class. Labels are
    positions in ``dataset.class_names``; a class without a threshold has no detections.
    """
    nothing = len(dataset.class_names)
    limits = np.array([np.inf if score is None else score for score in thresholds.scores])
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    faulty = []
    for image in dataset.images:
        objects, detected = dataset.ground_truth[image.image_id], _above(detections[image.image_id], limits)
        partner, in_crowd = _pair(objects, detected)
        correct = np.zeros(len(detected), np.bool_)
        paired = np.flatnonzero(partner >= 0)
        correct[paired] = objects.classes[partner[paired]] == detected.labels[paired]
        np.add.at(counts, (objects.classes[partner[paired]], detected.labels[paired]), 1)
        taken = np.isin(np.arange(len(objects.classes)), partner)
        missed = ~objects.crowd
        counts[:-1, nothing] += np.bincount(objects.classes[missed & ~taken], minlength=nothing)
        extra = ~correct & ~in_crowd
        counts[nothing, :-1] += np.bincount(detected.labels[extra & (partner < 0)], minlength=nothing)
        missed[partner[correct]] = False
        if extra.any() or missed.any():
            faulty.append(
                FaultyImage(
                    image_id=image.image_id,
                    missed=GroundTruth(*(getattr(objects, n)[missed] for n in ("boxes", "classes", "areas", "crowd"))),
                    extra=_chosen(detected, extra),
                    correct=_chosen(detected, correct),
                )
            )
    worst = sorted(faulty, key=lambda image: -image.faults)[:_WORST]
    return Confusion(class_names=dataset.class_names, counts=counts, worst=tuple(worst))


def confusion_json(confused: Confusion) -> dict[str, Any]:  # Any: JSON
    """The cells that are not 0, and the worst images by id."""
    names: list[str | None] = [*confused.class_names, None]
    rows, columns = np.nonzero(confused.counts)
    return {
        "confusion": [
            {"object": names[row], "detected": names[column], "count": int(confused.counts[row, column])}
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ],
        "worst_images": [
            {"image_id": image.image_id, "missed": len(image.missed.boxes), "extra": len(image.extra)}
            for image in confused.worst
        ],
    }


def _above(detections: Detections, limits: NDArray[np.float64]) -> Detections:
    known = (detections.labels >= 0) & (detections.labels < len(limits))
    limit = np.append(limits, np.inf)[np.where(known, detections.labels, -1)]
    return _chosen(detections, detections.scores > limit)


def _chosen(detections: Detections, mask: NDArray[np.bool_]) -> Detections:
    return Detections(detections.boxes[mask], detections.scores[mask], detections.labels[mask])


def _pair(objects: GroundTruth, detected: Detections) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(d,) position of each detection's object, -1 without one; and (d,) which of these lie in a crowd of their class.

    Each detection, best score first, takes the free object that it overlaps most.
    """
    partner = np.full(len(detected), -1)
    if not len(objects.boxes):
        return partner, np.zeros(len(detected), np.bool_)
    iou = pairwise_iou(detected.boxes, objects.boxes, crowd=objects.crowd)
    alike = detected.labels[:, None] == objects.classes[None]
    in_crowd = (iou * (alike & objects.crowd)).max(1, initial=0.0) >= _IOU
    free = ~objects.crowd
    order = np.argsort(-detected.scores, kind="stable")
    for allowed in (alike, np.broadcast_to(~in_crowd[:, None], alike.shape)):
        for row in order:
            if partner[row] >= 0:
                continue
            overlap = np.where(free & allowed[row], iou[row], -1.0)
            # Of equal overlaps COCO takes the last.
            best = len(overlap) - 1 - int(overlap[::-1].argmax())
            if overlap[best] >= _IOU:
                partner[row], free[best] = best, False
    return partner, in_crowd & (partner < 0)
