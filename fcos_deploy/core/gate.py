"""The limits that a deployed detector must keep, the possible outcomes of a check, and how far two detectors agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections, pairwise_iou
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.serialize import to_json

__all__ = [
    "ClassDrift",
    "DetectionAgreement",
    "DetectionMatch",
    "Distribution",
    "Finding",
    "Gate",
    "Judge",
    "MatchOptions",
    "Outcome",
    "ScoreDrift",
    "Severity",
    "agreement_json",
    "compare_detections",
    "equivalent_threshold",
    "interval_outcome",
    "match_detections",
    "overall_outcome",
    "score_drift",
    "share_interval",
    "undecided_because",
]


class Outcome(StrEnum):
    """What a judgement came to; ``inconclusive``: the data cannot decide, which says nothing against the model."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"


class Judge(StrEnum):
    """What must keep a limit: the whole 95 % ``interval`` of a figure, or the ``point`` estimate alone."""

    INTERVAL = "interval"
    POINT = "point"


def interval_outcome(low: float, high: float, *, at_most: float) -> Outcome:
    """Passed when the whole interval keeps the limit, failed when none of it does, otherwise inconclusive.

    With an interval that covers the true figure in 95 % of all data sets, half of its misses are too low: a figure
    beyond the limit passes in 2.5 % of them.
    """
    if high <= at_most:
        return Outcome.PASSED
    return Outcome.FAILED if low > at_most else Outcome.INCONCLUSIVE


def overall_outcome(outcomes: Iterable[Outcome]) -> Outcome | None:
    """Failed when one failed, else inconclusive when one is, else passed; None when nothing was judged."""
    every = set(outcomes)
    return next((o for o in (Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.PASSED) if o in every), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Limits; None leaves a quantity unjudged.

    ``max_map_drop``: AP of the reference minus AP of the candidate, in 0..1 (0.01 is one AP point).
    ``min_ap``: AP itself. ``judge``: whether the confidence interval or the measured figure must keep a limit.
    ``max_precision_drop``, ``max_recall_drop``: as ``max_map_drop``, of the mean precision and recall of the classes at
    their score thresholds.

    ``min_match_rate``: share of the detections of both detectors that are paired, in 0..1.
    ``min_iou``: overlap that a pair needs; None is 0.5. ``max_score_delta`` (in 0..1) and ``max_box_delta_px`` (image
    pixels): how far the two of a pair may differ. In an evaluation they bound percentiles, the 5th and 95th of the
    scores' differences and the 95th of the boxes'; golden detections whose scores differ by more are not paired at all.
    """

    max_map_drop: float | None = None
    min_ap: float | None = None
    max_precision_drop: float | None = None
    max_recall_drop: float | None = None
    min_match_rate: float | None = None
    min_iou: float | None = None
    max_score_delta: float | None = None
    max_box_delta_px: float | None = None
    judge: Judge = Judge.INTERVAL

    def __post_init__(self) -> None:
        shares = ("max_map_drop", "min_ap", "max_precision_drop", "max_recall_drop", "min_match_rate")
        for name in (*shares, "min_iou", "max_score_delta"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {value}.")
        if self.max_box_delta_px is not None and not self.max_box_delta_px >= 0:
            raise ConfigError(f"max_box_delta_px must not be negative, got {self.max_box_delta_px}.")

    @property
    def has_limits(self) -> bool:
        """Whether anything is judged."""
        return self != Gate(judge=self.judge)


class Severity(StrEnum):
    """``warning``: to be known. ``inconclusive``: no verdict on these images can be passed. ``refused``: no run."""

    WARNING = "warning"
    INCONCLUSIVE = "inconclusive"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """``kind``: its name for machines, such as ``overlap``. ``message``: half a sentence for people."""

    kind: str
    severity: Severity
    message: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.severity}: {self.message}"


def undecided_because(findings: Iterable[Finding]) -> str:
    """Why no verdict can be passed, as half a sentence; empty when nothing stands in the way."""
    return "; ".join(finding.message for finding in findings if finding.severity is Severity.INCONCLUSIVE)


# In image pixels. The overlap of boxes that are thinner than a pixel, or were clipped to a line, says nothing.
_SAME_EDGE = 0.1
_SAME_SCORE = 1e-3  # float32 on another runtime differs by 1e-5; half precision by more than this


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchOptions:
    """When two detections are the same.

    They have the same label, overlap by at least ``iou_threshold``, and their scores differ by at most
    ``max_score_delta``. Only detections with at least ``min_score`` have to be paired; their partner may score less, so
    that a detection which moves across the threshold is not counted as missed.
    """

    iou_threshold: float = 0.5
    min_score: float = 0.2
    max_score_delta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.iou_threshold <= 1.0 or not 0.0 <= self.min_score <= 1.0:
            raise ConfigError(
                f"Matching needs an IoU in (0, 1] and a score in [0, 1], got {self.iou_threshold} and {self.min_score}."
            )

    @staticmethod
    def of_gate(gate: Gate) -> MatchOptions:
        """The rule by which golden detections are paired under ``gate``."""
        return MatchOptions(
            iou_threshold=0.5 if gate.min_iou is None else gate.min_iou,
            max_score_delta=1.0 if gate.max_score_delta is None else gate.max_score_delta,
        )


@dataclass(frozen=True, slots=True, eq=False)
class DetectionMatch:
    """One image: positions of the pairs, and of the detections that have to be paired and are not.

    reference, candidate: (m,) int64, pair by pair in the order of the reference. iou: (m,) float64.
    missed: positions in the reference; extra: positions in the candidate; int64.
    """

    reference: NDArray[np.int64]
    candidate: NDArray[np.int64]
    iou: NDArray[np.float64]
    missed: NDArray[np.int64]
    extra: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Summary of numbers: count, mean, percentiles, and the largest distance from 0."""

    count: int
    mean: float
    p5: float
    p50: float
    p95: float
    max_abs: float

    @staticmethod
    def of(values: NDArray[np.float64]) -> Distribution:
        """Summarise (n,) numbers; all zeros when there are none."""
        if not len(values):
            return Distribution(count=0, mean=0.0, p5=0.0, p50=0.0, p95=0.0, max_abs=0.0)
        p5, p50, p95 = (float(v) for v in np.percentile(values, [5, 50, 95]))
        return Distribution(
            count=len(values), mean=float(values.mean()), p5=p5, p50=p50, p95=p95, max_abs=float(np.abs(values).max())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionAgreement:
    """How far a candidate's detections are those of the reference, over all images.

    ``match_rate`` is the share, in 0..1, of the detections that have to be paired and are; ``match_interval`` holds it
    with 95 % confidence.
    ``score_delta`` is candidate minus reference; ``box_delta_px`` the largest move of an edge, in image pixels.
    ``score_pairs`` has (reference, candidate) scores of the pairs, for plots.
    """

    images: int
    reference: int
    candidate: int
    matched: int
    missed: int
    extra: int
    match_rate: float
    match_interval: tuple[float, float]
    score_delta: Distribution
    box_delta_px: Distribution
    iou: Distribution
    score_pairs: tuple[tuple[float, float], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether neither has a detection that could agree, so that the rate says nothing."""
        return not self.reference + self.candidate

    @property
    def same_outputs(self) -> bool:
        """Whether every detection is the reference's but for rounding: all paired, the largest differences tiny."""
        paired = self.matched > 0 and not self.missed + self.extra
        return paired and self.score_delta.max_abs <= _SAME_SCORE and self.box_delta_px.max_abs <= _SAME_EDGE


def match_detections(
    reference: Detections, candidate: Detections, *, options: MatchOptions | None = None
) -> DetectionMatch:
    """Pair the detections of one image as COCO's evaluation does.

    Each detection of the candidate, best score first, takes the free detection of the reference that it overlaps most.
    """
    options = options or MatchOptions()
    sides = zip(reference.boxes.T, candidate.boxes.T, strict=True)
    edges = np.maximum.reduce([np.abs(first[:, None] - second) for first, second in sides])
    iou = np.where(edges <= _SAME_EDGE, 1.0, pairwise_iou(reference.boxes, candidate.boxes))
    alike = (reference.labels[:, None] == candidate.labels) & (iou >= options.iou_threshold)
    alike &= np.abs(reference.scores[:, None] - candidate.scores) <= options.max_score_delta
    rows, columns = np.nonzero(alike)
    rank = np.argsort(np.argsort(-candidate.scores, kind="stable"))
    partner, free = np.full(len(reference), -1), np.ones(len(candidate), np.bool_)
    # Best score first, then largest overlap; the first detection of the reference among equal overlaps.
    for pair in np.lexsort((rows, -iou[rows, columns], rank[columns])).tolist():
        row, column = rows[pair], columns[pair]
        if partner[row] < 0 and free[column]:
            partner[row], free[column] = column, False
    paired = partner >= 0
    rows, columns = np.flatnonzero(paired), partner[paired]
    return DetectionMatch(
        rows,
        columns,
        iou[rows, columns],
        missed=np.flatnonzero((reference.scores >= options.min_score) & ~paired),
        extra=np.flatnonzero((candidate.scores >= options.min_score) & free),
    )


def compare_detections(
    reference: Mapping[int, Detections], candidate: Mapping[int, Detections], *, options: MatchOptions | None = None
) -> DetectionAgreement:
    """Match image by image (same keys in both) and summarise.

    Raises:
        ConfigError: the two are not of the same images.
    """
    if set(reference) != set(candidate):
        raise ConfigError("Detections can be compared on the same images only.")
    options = options or MatchOptions()
    pairs = [(reference[number], candidate[number]) for number in sorted(reference)]
    matches = [match_detections(a, b, options=options) for a, b in pairs]
    scores, moves, overlaps = [np.zeros((0, 2))], [np.zeros(0)], [np.zeros(0)]
    for (a, b), match in zip(pairs, matches, strict=True):
        scores.append(np.stack([a.scores[match.reference], b.scores[match.candidate]], 1).astype(np.float64))
        edges = a.boxes[match.reference].astype(np.float64) - b.boxes[match.candidate]
        moves.append(np.abs(edges).max(1, initial=0.0))
        overlaps.append(match.iou)
    due_by_image = np.array(
        [[int((d.scores >= options.min_score).sum()) for d in pair] for pair in pairs], np.int64
    ).reshape(-1, 2)
    due = [int(count) for count in due_by_image.sum(0)]
    unpaired = np.array([len(match.missed) + len(match.extra) for match in matches], np.int64)
    missed, extra = sum(len(m.missed) for m in matches), sum(len(m.extra) for m in matches)
    score_pairs = np.concatenate(scores)
    agreement = DetectionAgreement(
        images=len(pairs),
        reference=due[0],
        candidate=due[1],
        matched=due[0] - missed,
        missed=missed,
        extra=extra,
        match_rate=1.0 - (missed + extra) / sum(due) if sum(due) else 1.0,
        match_interval=share_interval(unpaired, due_by_image.sum(1), design_effect=2.0),
        score_delta=Distribution.of(score_pairs[:, 1] - score_pairs[:, 0]),
        box_delta_px=Distribution.of(np.concatenate(moves)),
        iou=Distribution.of(np.concatenate(overlaps)),
        score_pairs=tuple((float(first), float(second)) for first, second in score_pairs),
    )
    # Where nothing was perturbed chance has no part: other images would agree as well.
    return replace(agreement, match_interval=(1.0, 1.0)) if agreement.same_outputs else agreement


def share_interval(
    failed: NDArray[np.int64], due: NDArray[np.int64], *, design_effect: float = 1.0
) -> tuple[float, float]:
    """95 % interval of the share of ``due`` that did not fail; (0, 1) when nothing was due. Both (images,).

    ``design_effect``: how many count as one at least; 2 where both partners of a pair are counted.
    """
    # Wilson's interval, which has a width also at 100 %, for the number of independent detections that the images
    # amount to: the variance between images over the binomial one (Kish's design effect) is how many detections count
    # as one.
    total, images = int(due.sum()), len(due)
    if not total or images < 2:
        return 0.0, 1.0
    share = failed.sum() / total
    # The variance of a ratio of sums over images, linearised: failed - share * due is an image's part in it.
    between = images / (images - 1) * np.square(failed - share * due).sum() / total**2
    binomial = share * (1 - share) / total
    independent = total / max(design_effect, between / binomial if binomial else 0.0)
    # The ends of all rates r with |rate - r| <= 1.96 sqrt(r (1 - r) / independent), a quadratic equation in r.
    z2 = 1.96**2 / independent
    rate = 1 - share
    center, half = rate + z2 / 2, 1.96 * np.sqrt(rate * share / independent + z2 / (4 * independent))
    return float(max(0.0, (center - half) / (1 + z2))), float(min(1.0, (center + half) / (1 + z2)))


def agreement_json(agreement: DetectionAgreement) -> dict[str, Any]:
    """The figures as JSON, without ``score_pairs``: thousands of numbers, for plots only."""
    content: dict[str, Any] = to_json(agreement)
    del content["score_pairs"]
    return content


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
    before, after = _scores(reference), _scores(quantized)
    # Each detection of the reference, best first, takes the best overlap that is left: it stands as the candidate here.
    matches = [match_detections(after, before) for before, after in zip(reference, quantized, strict=True)]
    pairs = [
        np.stack([b.labels[match.candidate], b.scores[match.candidate], a.scores[match.reference]], 1)
        for b, a, match in zip(reference, quantized, matches, strict=True)
    ]
    labels, matched_before, matched_after = np.concatenate([np.empty((0, 3)), *pairs]).T
    classes = []
    for label in seen:
        shift = (matched_after - matched_before)[(labels == label) & (matched_before >= threshold)]
        mean, largest = (float(shift.mean()), float(np.abs(shift).max())) if len(shift) else (0.0, 0.0)
        scores = [_scores(images, label=label) for images in (reference, quantized)]
        equivalent = equivalent_threshold(*scores, threshold=threshold)
        classes.append(ClassDrift(class_names[label], len(shift), round(mean, 5), round(largest, 5), equivalent))
    operating = [t for t in _THRESHOLDS if (before > t).sum() >= _FEW]
    return ScoreDrift(
        threshold,
        equivalent_threshold(before, after, threshold=threshold),
        tuple(classes),
        tuple((t, equivalent_threshold(before, after, threshold=t)) for t in operating),
    )


def _scores(images: Sequence[Detections], *, label: int | None = None) -> NDArray[np.float32]:
    """(n,) of all images, or of one class."""
    chosen = (d.scores if label is None else d.scores[d.labels == label] for d in images)
    return np.concatenate([np.empty(0, np.float32), *chosen])


def equivalent_threshold(
    reference: NDArray[np.floating[Any]], quantized: NDArray[np.floating[Any]], *, threshold: float
) -> float:
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
