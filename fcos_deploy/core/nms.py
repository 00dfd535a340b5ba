"""Non-maximum suppression on the host: exact, greedy, within each class; and the sorting that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.detections import box_iou
from fcos_deploy.core.native import native

__all__ = ["Suppression", "best_first", "best_of_groups", "suppress"]

_LOW = np.uint64(0xFFFFFFFF)
_SCORE_BITS = np.uint32(0x7FFFFFFF)  # without the sign, so that NaN of either sign comes first
_BLOCK = 128  # candidates that are compared at a time; all pairs of a block fit into the level-2 cache
# Below one pair of the same class in this many, listing the pairs is cheaper than the float32 overlap of all of them.
_DENSE = 8
_MARGIN = 1e-5  # relative; see _may_overlap
_TINY, _HUGE = np.float32(1e-37), np.float32(1e36)  # near the ends of float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppression:
    """``iou_offset`` is added to widths and heights in the overlap (1 in tianzhi's FCOS).

    At most ``limit`` boxes stay, and with ``keep_ties`` also those whose score equals that of the last one.
    """

    iou_threshold: float
    limit: int
    iou_offset: float = 0.0
    keep_ties: bool = False


def best_first(scores: NDArray[np.float32], *, limit: int | None = None) -> NDArray[np.intp]:
    """Indices of the ``limit`` best of (n,) float32 scores >= 0, best first; the earlier index first among equals."""
    # The bits of non-negative floats sort as the floats do. With the index below them keys are unique, so that NumPy's
    # vectorised sort, which is not stable, gives the stable order; it is several times faster than the stable one.
    keys = (~np.ascontiguousarray(scores, np.float32).view(np.uint32) & _SCORE_BITS).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    if limit is not None and limit < len(keys):
        keys = np.partition(keys, limit)[:limit]
    keys.sort()
    order: NDArray[np.intp] = (keys & _LOW).astype(np.intp)
    return order


def best_of_groups(scores: NDArray[np.float32], ends: Sequence[int], *, limit: int | None = None) -> NDArray[np.intp]:
    """Indices of the ``limit`` best of each group of (n,) scores >= 0; groups in order, best first within a group.

    ``ends``: where the groups, which lie one after the other, end; at most 8 of them.
    """
    starts = [0, *ends[:-1]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    if limit is not None and max(sizes) > limit:
        parts = [best_first(scores[a:b], limit=limit) + a for a, b in zip(starts, ends, strict=True) if b > a]
        return np.concatenate(parts)
    # All in one sort: 3 bits of group, 31 of the score (its sign is 0), 30 of index.
    keys = (~np.ascontiguousarray(scores, np.float32).view(np.uint32) & _SCORE_BITS).astype(np.uint64)
    keys <<= np.uint64(30)
    keys |= np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(61), sizes)
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    order: NDArray[np.intp] = (keys & np.uint64(0x3FFFFFFF)).astype(np.intp)
    return order


def suppress(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], *, labels: NDArray[Any], rule: Suppression
) -> NDArray[np.intp]:
    """Indices of the boxes that stay, best score first, earlier ones first among equal scores.

    A box goes when a box of its class that stays, and comes before it in that order, overlaps it by
    IoU > ``iou_threshold`` (strictly). boxes: (n, 4) float32 xyxy. scores: (n,) float32 >= 0. labels: (n,) integers.
    """
    library = native()
    if library is not None:
        return library.suppress(
            boxes,
            scores,
            labels=labels,
            iou_threshold=rule.iou_threshold,
            iou_offset=rule.iou_offset,
            limit=rule.limit,
            keep_ties=rule.keep_ties,
        )
    order, labels = best_first(scores), labels.astype(np.int32)
    kept = order[:0]
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        if len(kept) >= rule.limit:
            # Not less, rather than at least: NaN, which sorts before all numbers, is neither.
            block = block[~(scores[block] < scores[kept[rule.limit - 1]])] if rule.keep_ties else block[:0]
            if len(block) == 0:
                break
        pool = np.concatenate((kept, block))
        kept = pool[_survivors(boxes[pool], labels[pool], settled=len(kept), rule=rule)]
    if len(kept) > rule.limit:
        return kept[~(scores[kept] < scores[kept[rule.limit - 1]])] if rule.keep_ties else kept[: rule.limit]
    return kept


def _survivors(
    boxes: NDArray[np.float32], labels: NDArray[Any], *, settled: int, rule: Suppression
) -> NDArray[np.bool_]:
    """(m,) bool: which of boxes (m, 4), best first, stay; the first ``settled`` are known to."""
    winner, loser = _overlapping_pairs(boxes, labels, settled=settled, rule=rule)
    stays = np.ones(len(boxes), np.bool_)
    while True:
        # A box stays if every box that overlaps it, and comes before it, goes. By induction round r is right for boxes
        # at the end of a chain of at most r such dependencies, so that the fixed point is the greedy result.
        previous, stays = stays, np.ones(len(boxes), np.bool_)
        stays[loser[previous[winner]]] = False
        if np.array_equal(stays, previous):
            return stays


def _overlapping_pairs(
    boxes: NDArray[np.float32], labels: NDArray[Any], *, settled: int, rule: Suppression
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices (winner, loser) of all pairs of one class with IoU > threshold, winner < loser, loser >= ``settled``.

    In float64; where more than one pair in ``_DENSE`` is of one class, after a float32 pass over all pairs.
    """
    near = labels[:, None] == labels[settled:]
    if _DENSE * np.count_nonzero(near) > near.size:
        near &= _may_overlap(boxes, settled=settled, rule=rule)
    winner, loser = np.divmod(np.flatnonzero(near), near.shape[1])
    loser += settled
    before = winner < loser
    winner, loser = winner[before], loser[before]
    corners = boxes.T.astype(np.float64)  # (4, m): each row contiguous
    iou = box_iou(corners.take(winner, axis=1).T, corners.take(loser, axis=1).T, offset=rule.iou_offset)
    over = iou > rule.iou_threshold
    return winner[over], loser[over]


def _may_overlap(boxes: NDArray[np.float32], *, settled: int, rule: Suppression) -> NDArray[np.bool_]:
    """(m, m - settled) bool: False only for pairs with IoU <= threshold; in float32.

    The coordinates are exact, so that each difference, product and sum adds a relative error of at most 2^-24. There
    are fewer than 16 of them, 1e-6 together, and ``_MARGIN`` is ten times that. Underflow adds less than ``_TINY``;
    what might overflow may overlap.
    """
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    offset = np.float32(rule.iou_offset)
    late = slice(settled, None)
    inter = _common(x1, x2, late=late, offset=offset)
    np.maximum(inter, 0, out=inter)  # One side clamped is enough: the product is then not positive.
    inter *= _common(y1, y2, late=late, offset=offset)
    # inter / (a + b - inter) > t  <=>  inter > (a + b) * t / (1 + t): without a division for each pair.
    share = np.float32(rule.iou_threshold / (1 + rule.iou_threshold) * (1 - _MARGIN))
    areas = (x2 - x1 + offset) * (y2 - y1 + offset) * share - _TINY
    areas[areas > _HUGE] = -np.inf
    may_overlap: NDArray[np.bool_] = inter >= areas[:, None] + areas[late]
    return may_overlap


def _common(
    low: NDArray[np.float32], high: NDArray[np.float32], *, late: slice, offset: np.float32
) -> NDArray[np.float32]:
    """(m, m - settled): length that intervals have in common with the late ones; negative for a gap."""
    common = np.minimum(high[:, None], high[late])
    common -= np.maximum(low[:, None], low[late])
    if offset:
        common += offset
    return common
