"""How much boxes overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError

__all__ = [
    "DetectionAgreement",
    "DetectionMatch",
    "Distribution",
    "MatchOptions",
    "assign",
    "compare_detections",
    "detection_iou",
    "match_detections",
    "pairwise_iou",
]

# In image pixels. The overlap of boxes that are thinner than a pixel, or were clipped to a line, says nothing.
_SAME_EDGE = 0.1


def pairwise_iou(
    first: NDArray[Any], second: NDArray[Any], *, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Intersection over union of boxes xyxy, (n, 4) and (m, 4) -> (n, m) float64; 0 where both lack area.

    Where ``crowd`` (m,) is set, the intersection is divided by the area of the first box alone, as COCO does.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = (high - low).clip(min=0.0).prod(2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1)[:, None], (b[:, 2:] - b[:, :2]).prod(1)[None]
    union = area_a + area_b - intersection
    if crowd is not None:
        union = np.where(crowd[None], area_a, union)
    iou: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou


def detection_iou(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """As ``pairwise_iou``, (n, 4) and (m, 4) -> (n, m) float64; but 1 where all four edges agree within 0.1 pixels."""
    edges = np.abs(first[:, None] - second[None]).max(2, initial=0.0)
    return np.where(edges <= _SAME_EDGE, 1.0, pairwise_iou(first, second))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchOptions:
    """What counts as the same detection: the same label and at least ``iou_threshold`` of overlap.

    Only detections with at least ``min_score`` have to find a partner; the partner may score less, so that one which
    moves across the threshold is not counted as missed.
    """

    iou_threshold: float = 0.5
    min_score: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 < self.iou_threshold <= 1.0 or not 0.0 <= self.min_score <= 1.0:
            raise ConfigError(
                f"Matching needs an IoU in (0, 1] and a score in [0, 1], got {self.iou_threshold} and {self.min_score}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class DetectionMatch:
    """One image: positions of the pairs, and of what has no partner.

    reference, candidate: (m,) int64, pair by pair. iou: (m,) float64.
    missed: positions in the reference, invented: in the candidate, int64.
    """

    reference: NDArray[np.int64]
    candidate: NDArray[np.int64]
    iou: NDArray[np.float64]
    missed: NDArray[np.int64]
    invented: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Some numbers in brief: how many, mean, percentiles, and the largest distance from 0."""

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
            count=len(values),
            mean=float(values.mean()),
            p5=p5,
            p50=p50,
            p95=p95,
            max_abs=float(np.abs(values).max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionAgreement:
    """How far a candidate's detections are those of the reference, over all images.

    ``match_rate`` is the share, in 0..1, of all detections that have to find a partner and do.
    ``score_delta`` is candidate minus reference; ``box_delta_px`` the largest move of an edge, in image pixels.
    ``score_pairs`` has (reference, candidate) scores of the pairs, for plots.
    """

    images: int
    reference: int
    candidate: int
    matched: int
    missed: int
    invented: int
    match_rate: float
    score_delta: Distribution
    box_delta_px: Distribution
    iou: Distribution
    score_pairs: tuple[tuple[float, float], ...] = ()


def match_detections(
    reference: Detections, candidate: Detections, *, options: MatchOptions | None = None
) -> DetectionMatch:
    """Pair the detections of one image so that as many as possible are matched, and those overlap most."""
    options = options or MatchOptions()
    iou = detection_iou(reference.boxes, candidate.boxes)
    allowed = (iou >= options.iou_threshold) & (reference.labels[:, None] == candidate.labels[None])
    rows, columns = assign(np.where(allowed, 1.0 + iou, 0.0))
    unpaired_rows = np.setdiff1d(np.flatnonzero(reference.scores >= options.min_score), rows)
    unpaired_columns = np.setdiff1d(np.flatnonzero(candidate.scores >= options.min_score), columns)
    return DetectionMatch(rows, columns, iou[rows, columns], unpaired_rows, unpaired_columns)


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
    numbers = sorted(reference)
    matches = [match_detections(reference[n], candidate[n], options=options) for n in numbers]
    pairs = [_pair_deltas(reference[n], candidate[n], m) for n, m in zip(numbers, matches, strict=True)]
    scores = np.concatenate([p[0] for p in pairs] or [np.zeros((0, 2))])
    moves = np.concatenate([p[1] for p in pairs] or [np.zeros(0)])
    counted = [_counted(reference[n], candidate[n], options.min_score) for n in numbers]
    wanted = (sum(c[0] for c in counted), sum(c[1] for c in counted))
    missed, invented = sum(len(m.missed) for m in matches), sum(len(m.invented) for m in matches)
    return DetectionAgreement(
        images=len(numbers),
        reference=wanted[0],
        candidate=wanted[1],
        matched=wanted[0] - missed,
        missed=missed,
        invented=invented,
        match_rate=1.0 - (missed + invented) / sum(wanted) if sum(wanted) else 1.0,
        score_delta=Distribution.of(scores[:, 1] - scores[:, 0]),
        box_delta_px=Distribution.of(moves),
        iou=Distribution.of(np.concatenate([m.iou for m in matches] or [np.zeros(0)])),
        score_pairs=tuple((float(a), float(b)) for a, b in scores),
    )


def _counted(reference: Detections, candidate: Detections, min_score: float) -> tuple[int, int]:
    return int((reference.scores >= min_score).sum()), int((candidate.scores >= min_score).sum())


def _pair_deltas(
    reference: Detections, candidate: Detections, match: DetectionMatch
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (m, 2) and largest edge moves (m,) of the pairs."""
    scores = np.stack([reference.scores[match.reference], candidate.scores[match.candidate]], 1).astype(np.float64)
    edges = reference.boxes[match.reference].astype(np.float64) - candidate.boxes[match.candidate]
    return scores, np.abs(edges).max(1, initial=0.0)


def assign(weights: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pairs of rows and columns with the largest sum of weights, exactly (Hungarian algorithm).

    weights: (n, m), not negative; pairs of weight 0 are left out. Rows ascend in the result.
    """
    possible = weights > 0
    # Most have one partner, which has no other: they need no solver.
    alone = possible & (possible.sum(1) == 1)[:, None] & (possible.sum(0) == 1)
    settled = np.argwhere(alone)
    rows, columns = np.flatnonzero(possible.any(1) & ~alone.any(1)), np.flatnonzero(possible.any(0) & ~alone.any(0))
    contested = _assign_contested(weights, rows, columns)
    pairs = np.concatenate([settled, contested]) if len(contested) else settled
    pairs = pairs[np.argsort(pairs[:, 0])]
    return pairs[:, 0], pairs[:, 1]


def _assign_contested(
    weights: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Pairs (m, 2) among some rows and columns."""
    if not len(rows):
        return np.zeros((0, 2), np.int64)
    part = weights[np.ix_(rows, columns)]
    if len(rows) > len(columns):  # The solver needs at least as many columns as rows.
        column_rows = _solve(-part.T)
        pairs = np.stack([column_rows, np.arange(len(columns))], 1)
    else:
        pairs = np.stack([np.arange(len(rows)), _solve(-part)], 1)
    pairs = pairs[part[pairs[:, 0], pairs[:, 1]] > 0]
    return np.stack([rows[pairs[:, 0]], columns[pairs[:, 1]]], 1)


def _solve(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Column of each row at the least total cost; (n, m) with n <= m -> (n,).

    Shortest augmenting paths with potentials (Jonker and Volgenant), one row at a time.
    """
    count, width = cost.shape
    row_potential, column_potential = np.zeros(count), np.zeros(width)
    owner = np.full(width, -1)
    for row in range(count):
        distance, previous = np.full(width, np.inf), np.full(width, -1)
        visited = np.zeros(width, np.bool_)
        current, column, least = row, -1, 0.0
        reached = [row]
        while True:
            through = least + cost[current] - row_potential[current] - column_potential
            better = ~visited & (through < distance)
            distance[better], previous[better] = through[better], column
            column = int(np.where(visited, np.inf, distance).argmin())
            least = float(distance[column])
            visited[column] = True
            if owner[column] < 0:
                break
            current = int(owner[column])
            reached.append(current)
        _shift_potentials(row_potential, column_potential, distance, visited=visited, least=least, owner=owner, row=row)
        _augment(owner, previous, column=column, row=row)
    columns = np.full(count, -1)
    taken: Sequence[int] = np.flatnonzero(owner >= 0).tolist()
    columns[owner[taken]] = taken
    return columns


def _shift_potentials(  # in place: the solver's own arrays
    row_potential: NDArray[np.float64],
    column_potential: NDArray[np.float64],
    distance: NDArray[np.float64],
    *,
    visited: NDArray[np.bool_],
    least: float,
    owner: NDArray[np.int64],
    row: int,
) -> None:
    settled = np.flatnonzero(visited & (owner >= 0))
    row_potential[row] += least
    row_potential[owner[settled]] += least - distance[settled]
    column_potential[settled] -= least - distance[settled]


def _augment(owner: NDArray[np.int64], previous: NDArray[np.int64], *, column: int, row: int) -> None:
    while previous[column] >= 0:
        owner[column] = owner[previous[column]]
        column = int(previous[column])
    owner[column] = row
