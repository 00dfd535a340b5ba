"""Average precision by COCO's protocol, how sure a difference of AP is, and which of several detectors is best.

Scores are computed by faster-coco-eval. A difference is judged by a paired bootstrap over images. The images are
matched once; a resample only changes how often each image counts, so that a thousand of them cost about as much as one
more evaluation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage
from fcos_deploy.core.detections import Detections, pairwise_iou
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Judge
from fcos_deploy.core.libraries import require

__all__ = [
    "ApInterval",
    "ApSamples",
    "ClassMatches",
    "ClassScores",
    "CocoScores",
    "Contender",
    "RaceRules",
    "Standing",
    "ap_interval",
    "coco_scores",
    "drop_interval",
    "match_dataset",
    "paired_ap_drop",
    "race",
    "race_rounds",
    "resample_weights",
    "sample_ap",
    "selection_factor",
    "weighted_ap",
    "widened_for_selection",
]

RECALL_POINTS = tuple(float(v) for v in np.linspace(0.0, 1.0, 101))
MAX_DETECTIONS = 100  # of one image, by COCO's protocol
_AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """One class: AP, AP at IoU 0.5, and recall, all in 0..1; None where the data has no object of it.

    ``precision`` has the interpolated precision at IoU 0.5 at recall 0, 0.01, ..., 1, and ``thresholds`` the score that
    a detection needs there; both are 0 where no threshold reaches the recall.
    """

    name: str
    ap: float | None
    ap50: float | None
    ar: float | None
    precision: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoScores:
    """AP and AR in 0..1, over all images; None where the data has no such object.

    ``ap`` is the mean over IoU 0.50, 0.55, ..., 0.95; small, medium and large objects are below 32 x 32, below
    96 x 96 and above, in image pixels; ``ar`` is the recall with at most 100 detections an image.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar: float | None
    images: int
    objects: int
    per_class: tuple[ClassScores, ...]


def coco_scores(dataset: Dataset, detections: Mapping[int, Detections]) -> CocoScores:
    """Evaluate detections whose labels are positions in ``dataset.class_names`` (others are left out).

    Raises:
        MissingDependencyError: faster-coco-eval is not installed.
    """
    library = require("faster_coco_eval", extra="eval")
    ground_truth = library.COCO(_ground_truth_json(dataset))
    results = ground_truth.loadRes(_detections_json(dataset, detections))
    # The library prints through the function that it is given; its results are read from `eval`.
    evaluator = library.COCOeval_faster(ground_truth, results, iouType="bbox", print_function=lambda *_: None)
    evaluator.params.maxDets = [1, 10, MAX_DETECTIONS]
    evaluator.evaluate()
    evaluator.accumulate()
    return _summary(dataset, *(evaluator.eval[name] for name in ("precision", "recall", "scores")))


def _summary(
    dataset: Dataset, precision: NDArray[np.float64], recall: NDArray[np.float64], scores: NDArray[np.float64]
) -> CocoScores:
    # precision, scores: (IoU, recall, class, area, max detections), recall: without the second; -1 where undefined.
    precision, recall, scores = (np.asarray(values)[..., -1] for values in (precision, recall, scores))
    by_area = {area: _mean(precision[:, :, :, i]) for i, area in enumerate(_AREAS)}
    every = precision[..., 0]
    classes = tuple(
        ClassScores(
            name=name,
            ap=_mean(every[:, :, k]),
            ap50=_mean(every[0, :, k]),
            ar=_mean(recall[:, k, 0]),
            precision=tuple(float(p) for p in every[0, :, k] if p >= 0),
            thresholds=tuple(float(s) for s in scores[0, :, k, 0] if s >= 0),
        )
        for k, name in enumerate(dataset.class_names)
    )
    return CocoScores(
        ap=by_area["all"],
        ap50=_mean(every[0]),
        ap75=_mean(every[5]),
        ap_small=by_area["small"],
        ap_medium=by_area["medium"],
        ap_large=by_area["large"],
        ar=_mean(recall[..., 0]),
        images=len(dataset.images),
        objects=sum(int((~ground_truth.crowd).sum()) for ground_truth in dataset.ground_truth.values()),
        per_class=classes,
    )


def _mean(values: NDArray[np.float64]) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _ground_truth_json(dataset: Dataset) -> dict[str, Any]:
    """Images are numbered from 1: the evaluator takes neither ids of 17 digits nor negative ones."""
    rows: list[dict[str, Any]] = []
    for number, image in enumerate(dataset.images, start=1):
        objects = dataset.ground_truth[image.image_id]
        columns = objects.classes + 1, _xywh(objects.boxes), objects.areas, objects.crowd.astype(int)
        names = ("category_id", "bbox", "area", "iscrowd")
        for row in zip(*(np.asarray(column).tolist() for column in columns), strict=True):
            # COCO's matching takes the id 0 for "no match".
            rows.append({"id": len(rows) + 1, "image_id": number, **dict(zip(names, row, strict=True))})
    return {
        "images": [{"id": number} for number, _ in enumerate(dataset.images, start=1)],
        "annotations": rows,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(dataset.class_names)],
    }


def _detections_json(dataset: Dataset, detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    known, rows = range(len(dataset.class_names)), []
    for number, image in enumerate(dataset.images, start=1):
        detected = detections[image.image_id]
        columns = _xywh(detected.boxes), detected.scores.tolist(), detected.labels.tolist()
        rows += [
            {"image_id": number, "category_id": label + 1, "bbox": box, "score": score}
            for box, score, label in zip(*columns, strict=True)
            if label in known
        ]
    return rows


def _xywh(boxes: NDArray[Any]) -> list[list[float]]:
    """(n, 4) xyxy to n lists of x, y, width, height; in float64, as the evaluator computes."""
    exact = boxes.astype(np.float64)
    exact[:, 2:] -= exact[:, :2]
    listed: list[list[float]] = exact.tolist()
    return listed


_CONFIDENCE = 0.95
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_LONG_ROW = 64  # resamples from which on adding row by row is faster than NumPy's own accumulation
_CHUNK = 4_000_000  # elements of one float32 array of resamples x detections: 16 MB


@dataclass(frozen=True, slots=True, eq=False)
class ClassMatches:
    """The detections of one class over all images, best score first, and which of them are right.

    image: (d,) int64, position of the image. scores: (d,). correct, ignored: (10, d) bool, at IoU 0.50 ... 0.95.
    positives: (images,) int64, how many objects each image has.
    """

    image: NDArray[np.int64]
    scores: NDArray[np.float32]
    correct: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    positives: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ApSamples:
    """values: (1 + resamples,) float64, AP of the data as it is and of each resample; NaN where no object was drawn.

    positives: (classes, images) int64, how many objects there are; together with ``seed`` it says what was resampled.
    object_share: (classes,) float64, the AP that a found object of each class carries in the mean; 0 without any.
    """

    values: NDArray[np.float64]
    positives: NDArray[np.int64]
    seed: int
    object_share: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApInterval:
    """An AP, or a difference of two, with its bootstrap interval; all in units of AP (0..1)."""

    value: float
    low: float
    high: float
    standard_error: float
    confidence: float
    resamples: int
    images: int

    @staticmethod
    def point(value: float, *, images: int) -> ApInterval:
        """A figure without resamples, and so without an interval."""
        return ApInterval(
            value=value, low=value, high=value, standard_error=0.0, confidence=0.0, resamples=0, images=images
        )


def match_dataset(dataset: Dataset, detections: Mapping[int, Detections]) -> list[ClassMatches]:
    """Match every image once by COCO's rule; labels are positions in ``dataset.class_names``."""
    return [_match_class(dataset, detections, label=k) for k in range(len(dataset.class_names))]


def _match_class(dataset: Dataset, detections: Mapping[int, Detections], *, label: int) -> ClassMatches:
    images, scores, correct, ignored, positives = [], [], [], [], []
    for position, image in enumerate(dataset.images):
        ground_truth, detected = dataset.ground_truth[image.image_id], detections[image.image_id]
        candidates, objects = np.flatnonzero(detected.labels == label), ground_truth.classes == label
        candidates = candidates[np.argsort(-detected.scores[candidates], kind="stable")[:MAX_DETECTIONS]]
        crowd = ground_truth.crowd[objects]
        iou = pairwise_iou(detected.boxes[candidates], ground_truth.boxes[objects], crowd=crowd)
        right, outside = _match_image(iou, crowd)
        images.append(np.full(len(candidates), position))
        scores.append(detected.scores[candidates])
        correct.append(right)
        ignored.append(outside)
        positives.append(int((~crowd).sum()))
    score = np.concatenate(scores)
    best_first = np.argsort(-score, kind="stable")
    return ClassMatches(
        np.concatenate(images)[best_first],
        score[best_first],
        np.concatenate(correct, axis=1)[:, best_first],
        np.concatenate(ignored, axis=1)[:, best_first],
        np.array(positives),
    )


def _match_image(iou: NDArray[np.float64], crowd: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """COCO's greedy matching: each detection, best first, takes the free object that it overlaps most.

    iou: (d, g). Returns which detections are right and which lie in a crowd, (10, d) each.
    """
    count, thresholds = len(iou), IOU_THRESHOLDS
    correct = np.zeros((len(thresholds), count), np.bool_)
    ignored = np.zeros_like(correct)
    if not iou.shape[1]:
        return correct, ignored
    free = np.ones((len(thresholds), iou.shape[1]), np.bool_) & ~crowd
    rows = np.arange(len(thresholds))
    in_crowd = (iou * crowd).max(1, initial=0.0)
    for d in range(count):
        overlap = np.where(free, iou[d], -1.0)
        # Of equal overlaps COCO takes the last.
        best = overlap.shape[1] - 1 - overlap[:, ::-1].argmax(1)
        hit = overlap[rows, best] >= thresholds
        correct[:, d] = hit
        free[rows[hit], best[hit]] = False
        ignored[:, d] = ~hit & (in_crowd[d] >= thresholds)
    return correct, ignored


def weighted_ap(
    matches: list[ClassMatches], weights: NDArray[np.float32], *, dtype: type[np.floating[Any]] = np.float64
) -> NDArray[np.float64]:
    """AP when image ``i`` counts ``weights[r, i]`` times: (resamples, images) -> (resamples,) float64.

    With all weights 1 it is COCO's AP; NaN where no object remains. Detections of one image that tie in score keep
    their order when the image counts several times, while copies of the image would alternate.
    ``dtype`` of the precisions: float32 is good to seven digits and takes half the time.
    """
    classes = []
    for match in matches:
        step = max(1, _CHUNK // max(1, len(match.scores)))
        parts = [_class_ap(match, weights[i : i + step], dtype) for i in range(0, len(weights), step)]
        classes.append(np.concatenate(parts))
    per_class = np.stack(classes)
    defined = np.isfinite(per_class)
    total = np.where(defined, per_class, 0.0).sum(0)
    count = defined.sum(0)
    means: NDArray[np.float64] = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return means


# Below, resamples are the last axis: what is done for all of them at a time is then contiguous in memory.


def _class_ap(
    matches: ClassMatches, weights: NDArray[np.float32], dtype: type[np.floating[Any]]
) -> NDArray[np.float64]:
    """AP of one class for each resample, the mean over the ten IoU thresholds -> (r,); NaN without an object.

    Drawing an image w times repeats its objects and detections w times. So recall after the detection at rank t is the
    sum of w over the right detections up to t, over the sum of w over all objects; precision is the same sum over that
    of all detections up to t which are not ignored. Sums of whole numbers are exact in float32 up to 2 ** 24.
    """
    objects = (weights @ matches.positives.astype(np.float32)).astype(np.int64)
    total = np.zeros(len(weights))
    if len(matches.scores):
        drawn = np.ascontiguousarray(weights.T)[matches.image]  # (d, r): how often each detection counts
        points = _RecallPoints(objects)
        all_seen = _running(np.add, drawn)
        for right, outside in zip(matches.correct, matches.ignored, strict=True):
            seen = _running(np.add, drawn * ~outside[:, None]) if outside.any() else all_seen
            total += _threshold_ap(drawn[right], seen[right].astype(dtype, copy=False), points=points)
    return np.where(objects > 0, total / len(matches.correct), np.nan)


def _running(operation: np.ufunc, rows: NDArray[Any]) -> NDArray[Any]:
    """``operation.accumulate`` along the first axis, up to twice as fast for long rows."""
    if rows.shape[1] < _LONG_ROW:
        done: NDArray[Any] = operation.accumulate(rows, axis=0)
        return done
    done = rows.copy()
    for above, row in itertools.pairwise(done):
        operation(above, row, out=row)
    return done


class _RecallPoints:
    """How many of COCO's 101 recalls are reached with how many hits, for resamples with ``objects`` (r,).

    A table of one row for each number of objects that occurs replaces a search for every detection and resample.
    """

    def __init__(self, objects: NDArray[np.int64]) -> None:
        counts, kind = np.unique(objects, return_inverse=True)
        hits = np.arange(int(counts.max(initial=0)) + 1)
        recall = np.minimum(hits[None] / np.maximum(counts, 1)[:, None], 1.0)
        self._table = np.searchsorted(np.array(RECALL_POINTS), recall, side="right").astype(np.float32).ravel()
        self._start = (kind * len(hits)).astype(np.int32)  # the row of each resample in the table

    def reached(self, hits: NDArray[np.float32]) -> NDArray[np.float32]:
        """hits: (t, r) right detections so far -> (t, r) number of recalls reached."""
        return self._table.take(hits.astype(np.int32) + self._start)


def _threshold_ap(drawn: NDArray[np.float32], seen: NDArray[Any], *, points: _RecallPoints) -> NDArray[np.float64]:
    """Mean interpolated precision at 101 recalls -> (r,).

    drawn, seen: (t, r) of the t right detections, best first: how often each counts, and how many detections count up
    to it, which is of the type that precision is computed in. Precision changes for the better only where a detection
    is right, so the others are not needed.
    """
    if not len(drawn):
        return np.zeros(drawn.shape[1])
    hits = _running(np.add, drawn)
    # COCO's precision at a recall is the best at that recall or any higher one: a running maximum from the end.
    precision = hits / np.maximum(seen, seen.dtype.type(1))
    envelope = _running(np.maximum, precision[::-1])[::-1]
    # Each right detection answers for the recalls that are reached with it and were not before.
    new = points.reached(hits)
    new[1:] -= new[:-1].copy()
    summed: NDArray[np.float64] = np.einsum("tr,tr->r", envelope, new).astype(np.float64)
    return summed / len(RECALL_POINTS)


def sample_ap(matches: list[ClassMatches], *, resamples: int = 1000, seed: int = 0) -> ApSamples:
    """AP of the data and of each resample; runs with the same ``seed`` and images are resampled alike."""
    positives = np.stack([m.positives for m in matches])
    weights = resample_weights(positives.shape[1], resamples=resamples, seed=seed)
    exact, resampled = weighted_ap(matches, weights[:1]), weighted_ap(matches, weights[1:], dtype=np.float32)
    return ApSamples(np.concatenate([exact, resampled]), positives, seed, _object_share(matches))


def _object_share(matches: list[ClassMatches]) -> NDArray[np.float64]:
    classes = sum(bool(match.positives.any()) for match in matches)
    shares = np.zeros(len(matches))
    for position, match in enumerate(matches):
        if hits := int(match.correct[0].sum()):  # at IoU 0.5
            (ap,) = weighted_ap([match], np.ones((1, len(match.positives)), np.float32))
            shares[position] = ap / hits / classes
    return shares


def ap_interval(samples: ApSamples) -> ApInterval:
    """The AP of one run with its 95 % bootstrap interval.

    Raises:
        ConfigError: the data has no object.
    """
    interval = _interval(samples.values, images=samples.positives.shape[1])
    return replace(interval, low=max(interval.low, 0.0), high=min(interval.high, 1.0))


def paired_ap_drop(reference: ApSamples, candidate: ApSamples, *, same_outputs: bool = False) -> ApInterval:
    """AP of the reference minus AP of the candidate on the same images: positive when the candidate is worse.

    Both are resampled with the same images, so that what is hard about an image cancels. The upper end also allows for
    objects that the candidate loses and that chance has left out of these images: where few objects are lost these
    images may show none of them, and no resample of the others does. ``same_outputs``: every single detection is the
    same, so that nothing was perturbed that could lose an object, and nothing is allowed for.

    Raises:
        ConfigError: the two were not evaluated on the same images, or not resampled alike.
    """
    alike = len(reference.values) == len(candidate.values) and reference.seed == candidate.seed
    if not alike or not np.array_equal(reference.positives, candidate.positives):
        raise ConfigError("A paired interval needs two runs on the same images and annotations, resampled alike.")
    # A resample draws the same images for both, so each difference is one draw of the difference of two APs.
    drop = reference.values - candidate.values
    object_share = 0.0 if same_outputs else float(reference.object_share.max(initial=0.0))
    return drop_interval(drop, images=reference.positives.shape[1], object_share=object_share)


def drop_interval(values: NDArray[np.float64], *, images: int, object_share: float) -> ApInterval:
    """The 95 % interval of a drop, (1 + resamples,) as in ``ApSamples``.

    ``object_share``: what an object costs that is lost and that these images don't show.

    Raises:
        ConfigError: the data has no object.
    """
    interval = _interval(values, images=images)
    # What the images show and what they leave out are independent, so that the squares add up. Without the allowance
    # the upper end was below the true drop in 3 to 28 % of the trials of benchmarks/verdict_simulation.py.
    unseen = _unseen_events(_CONFIDENCE) * object_share
    return replace(interval, high=interval.value + math.hypot(interval.high - interval.value, unseen))


def _unseen_events(confidence: float) -> float:
    """How many rare events may be expected in data that show none of them.

    Where m are expected none occurs with probability exp(-m), which is (1 - confidence) / 2 at this m: 3.69 at 95 %.
    However they are spread over the classes, the dearest class bounds what they cost.
    """
    return math.log(2 / (1 - confidence))


def selection_factor(choices: int) -> float:
    """By how much the sides of a 95 % interval grow when its model was chosen among ``choices`` on the same images.

    Bonferroni: intervals that each miss in 5 % / choices of all data sets all hold in 95 % of them, so that the chosen
    one's does, however it was chosen. The quantiles are those of the normal distribution.
    """
    normal = NormalDist()
    return normal.inv_cdf(1 - 0.025 / max(choices, 1)) / normal.inv_cdf(1 - 0.025)


def widened_for_selection(interval: ApInterval, choices: int) -> ApInterval:
    """The interval of a model that was chosen among ``choices`` on the same images.

    The upper end grows as the allowance for events that the images do not show, which grows faster than quantiles do.
    """
    factor = selection_factor(choices)
    unseen = _unseen_events(1 - 0.05 / max(choices, 1)) / _unseen_events(_CONFIDENCE)
    return replace(
        interval,
        low=interval.value - factor * (interval.value - interval.low),
        high=interval.value + unseen * (interval.high - interval.value),
    )


def resample_weights(images: int, *, resamples: int, seed: int) -> NDArray[np.float32]:
    """How often each image counts, (1 + resamples, images); the first row is the data as it is."""
    if resamples < 1:
        raise ConfigError(f"A bootstrap needs at least 1 resample, got {resamples}.")
    # n images drawn with replacement: the counts of a fair multinomial with n draws.
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(images, np.full(images, 1.0 / images), size=resamples)
    return np.concatenate([np.ones((1, images)), drawn]).astype(np.float32)


def _interval(values: NDArray[np.float64], *, images: int) -> ApInterval:
    # Resamples that drew no object have no AP, and are left out.
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not drawn.size:
        raise ConfigError("AP needs at least one annotated object.")
    value = float(values[0])
    low, high = _ends(value, drawn, images=images)
    return ApInterval(
        value=value,
        low=low,
        high=high,
        standard_error=float(drawn.std(ddof=1)) if drawn.size > 1 else 0.0,
        confidence=_CONFIDENCE,
        resamples=int(drawn.size),
        images=images,
    )


def _ends(value: float, drawn: NDArray[np.float64], *, images: int) -> tuple[float, float]:
    """The wider end, to each side, of three bootstrap intervals: percentile, reflected and bias-corrected.

    Alone each is too short to one side on few images, because AP of few images is skewed and too high (benchmarks/
    verdict_simulation.py measures what they cover). All three take expanded percentiles: those of a normal distribution
    that is as wide as Student's t for so many images, times sqrt(n / (n - 1)), since a bootstrap of n images varies
    that much too little (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 3.3).
    """
    normal = NormalDist()
    degrees = max(1, images - 1)
    reach = math.sqrt(1 + 1 / degrees) * _student_quantile(normal.inv_cdf((1 + _CONFIDENCE) / 2), degrees=degrees)
    # The share of the resamples below the value itself: 1/2 without bias (Efron and Tibshirani, An Introduction to the
    # Bootstrap, section 14.3). Kept off 0 and 1, which have no quantile.
    below = float((drawn < value).mean() + (drawn == value).mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / (drawn.size + 1)), drawn.size / (drawn.size + 1)))
    shares = [normal.cdf(z) for z in (-reach, reach, 2 * bias - reach, 2 * bias + reach)]
    low, high, corrected_low, corrected_high = (float(v) for v in np.quantile(drawn, shares))
    return min(low, 2 * value - high, corrected_low), max(high, 2 * value - low, corrected_high)


def _student_quantile(z: float, *, degrees: int) -> float:
    """Quantile of Student's t from that of the normal, ``z``, to three digits from ten degrees of freedom on.

    The first terms of the expansion in 1 / degrees (Abramowitz and Stegun, 26.7.5).
    """
    first = (z**3 + z) / (4 * degrees)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


# The best of several detectors, on as few images as decide it. All run on a subset of the images that grows; after each
# round those that cannot win drop out. It is successive halving with a proof in place of a share: a detector leaves
# when a paired bootstrap interval says that another one is better.

_FIRST_ROUND = 24  # images; an interval over fewer decides nothing (docs/accuracy.md)
_GROWTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """``cost`` is a time, or what else should be small.

    ``detect`` gives the detections of images by their ids; labels are positions in the data set's class names.
    """

    name: str
    cost: float
    detect: Callable[[Sequence[EvaluationImage]], Mapping[int, Detections]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceRules:
    """What winning means.

    Without ``min_ap`` it is the highest AP; with ``by_cost`` a detector leaves only for a better one that costs no
    more, so that the front of AP against cost remains. With ``min_ap`` it is the lowest cost at which the AP is
    reached: one leaves when its whole interval is below, or when a cheaper one has reached it on all images.
    """

    min_ap: float | None = None
    by_cost: bool = False
    judge: Judge = Judge.INTERVAL
    resamples: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a contender came: its AP over ``images``, and why it left; '' for those that ran on all.

    ``choices``: among how many the winner was chosen on these images, for which its interval has to be widened.
    ``detections``: of these images, by their ids; ``matches``: those of each class against the annotations.
    """

    name: str
    images: int
    interval: ApInterval | None
    reason: str = ""
    choices: int = 1
    matches: tuple[ClassMatches, ...] = ()
    detections: Mapping[int, Detections] = field(default_factory=dict)


def race_rounds(images: int) -> tuple[int, ...]:
    """How many images each round has, all of them in the last."""
    rounds, count = [], _FIRST_ROUND
    while count < images:
        rounds.append(count)
        count *= _GROWTH
    return (*rounds, images)


@dataclass(slots=True)
class _Entrant:
    contender: Contender
    detections: dict[int, Detections] = field(default_factory=dict)
    samples: ApSamples | None = None
    interval: ApInterval | None = None
    matches: list[ClassMatches] = field(default_factory=list)
    images: int = 0
    reason: str = ""

    def run(self, dataset: Dataset, *, resamples: int) -> None:
        """Detect on the images that are new, and score all of ``dataset``."""
        new = [image for image in dataset.images if image.image_id not in self.detections]
        if new:
            self.detections |= self.contender.detect(new)
        self.matches = match_dataset(dataset, self.detections)
        self.samples = sample_ap(self.matches, resamples=resamples)
        self.interval, self.images = ap_interval(self.samples), len(dataset.images)


def race(contenders: Sequence[Contender], dataset: Dataset, *, rules: RaceRules) -> tuple[Standing, ...]:
    """Run it; one standing for each contender, in their order.

    Raises:
        ConfigError: the data has no object.
        FcosDeployError: as the contenders' ``detect``.
    """
    if not contenders:
        return ()
    entrants = [_Entrant(contender) for contender in contenders]
    rounds = race_rounds(len(dataset.images))
    # Every comparison of every round may err, and one that errs drops the best: the intervals of all together hold.
    choices = len(rounds) * max(1, len(entrants) - 1)
    for count in rounds:
        subset = dataset.sample(count) if count < len(dataset.images) else dataset
        if not any((~objects.crowd).any() for objects in subset.ground_truth.values()):
            if count == rounds[-1]:
                raise ConfigError("AP needs at least one annotated object.")
            continue
        last = count == rounds[-1]
        for entrant in sorted((e for e in entrants if not e.reason), key=lambda e: e.contender.cost):
            reached = _cheaper_that_reached(entrant, entrants, rules, choices=choices) if last else None
            if reached is not None:
                entrant.reason = f"'{reached.contender.name}' costs less and reaches the AP"
            else:
                entrant.run(subset, resamples=rules.resamples)
        if not last:
            _drop_out(entrants, rules, choices=choices)
    return tuple(
        Standing(
            name=e.contender.name,
            images=e.images,
            interval=e.interval,
            reason=e.reason,
            choices=len(entrants),
            matches=tuple(e.matches),
            detections=e.detections,
        )
        for e in entrants
    )


def _cheaper_that_reached(
    entrant: _Entrant, entrants: Sequence[_Entrant], rules: RaceRules, *, choices: int
) -> _Entrant | None:
    """One that costs less and has reached the AP in the last round, which ``entrant`` has not run in yet."""
    for rival in entrants:
        if rules.min_ap is None or rival.interval is None or rival.reason or rival.images <= entrant.images:
            continue
        interval = widened_for_selection(rival.interval, choices)
        reached = (interval.low if rules.judge is Judge.INTERVAL else interval.value) >= rules.min_ap
        if reached and rival.contender.cost < entrant.contender.cost:
            return rival
    return None


def _drop_out(entrants: Sequence[_Entrant], rules: RaceRules, *, choices: int) -> None:
    """Give those that cannot win the reason why they leave; the best of a round never leaves."""
    running = [entrant for entrant in entrants if not entrant.reason and entrant.interval is not None]
    for entrant in running:
        if rules.min_ap is not None:
            interval = entrant.interval and widened_for_selection(entrant.interval, choices)
            if interval and interval.high < rules.min_ap:
                entrant.reason = f"AP {interval.value:.3f} on {entrant.images} images, at most {interval.high:.3f}"
            continue
        for rival in running:
            dearer = rules.by_cost and rival.contender.cost > entrant.contender.cost
            if rival is entrant or dearer or rival.samples is None or entrant.samples is None:
                continue
            drop = widened_for_selection(paired_ap_drop(rival.samples, entrant.samples), choices)
            if drop.low > 0.0:
                entrant.reason = (
                    f"AP {drop.value:.3f} below '{rival.contender.name}' on {entrant.images} images "
                    f"(at least {drop.low:.3f})"
                )
                break
