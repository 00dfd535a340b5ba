"""Finds, in class logits, the pairs of location and class that can still become detections.

What is found is a superset of what the exact rules keep: every bound here is looser than float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.decode_spec import DecodeSpec, ScoreForm
from fcos_deploy.core.ordering import best_first

__all__ = ["SCORE_FORMS", "passing_pairs", "sigmoid"]

Floats = NDArray[np.float32]
Level = tuple[int, int]  # first location, end

SCORE_FORMS: dict[ScoreForm, Callable[[Floats, Floats], Floats]] = {
    ScoreForm.P: lambda p, _q: p,
    ScoreForm.PQ: lambda p, q: p * q,
    ScoreForm.SQRT_PQ: lambda p, q: np.sqrt(p * q),
}

# The least p * q (or p) for which a form reaches a value.
_INVERSES: dict[ScoreForm, Callable[[float], float]] = {
    ScoreForm.P: lambda value: value,
    ScoreForm.PQ: lambda value: value,
    ScoreForm.SQRT_PQ: lambda value: value * value,
}

_MARGIN = 1e-5  # relative, far above the rounding of sigmoid, product and root in float32

# Narrowing a level down means to read it once more. That pays where at least one in this many of its pairs passes.
_CROWDED = 32

# So many times top-k pairs are ranked to find a level's floor: more make the floor higher, and take longer themselves.
_LOOKED_AT = 8


def sigmoid(logits: NDArray[Any]) -> Floats:
    """1 / (1 + exp(-x)) in float32."""
    exponent: Floats = np.negative(np.maximum(logits, -87, dtype=np.float32))  # exp(88.8) is beyond float32.
    np.exp(exponent, out=exponent)
    exponent += 1
    np.reciprocal(exponent, out=exponent)
    return exponent


def passing_pairs(
    cls_logits: NDArray[Any], quality: Floats, *, levels: tuple[Level, ...], spec: DecodeSpec
) -> NDArray[np.intp]:
    """Flat indices ``location * C + channel``, ascending, of all pairs that can pass the gate and the level's top-k.

    cls_logits: (L, C) float32 or float16. quality: (L,) float32, the sigmoid of the centerness.
    """
    mask = _PairMask(cls_logits.shape)
    threshold = _INVERSES[spec.profile.gate](spec.score_threshold * (1 - _MARGIN))
    _above(cls_logits, _logit(threshold), out=mask.pairs)
    words = mask.words()
    narrow, concerned = _keep_best_pairs, [level for level in levels if mask.is_crowded(level, words, spec=spec)]
    if spec.profile.rank_per_location:  # Not to save time, but part of the rules.
        narrow, concerned = (
            _keep_best_locations,
            [level for level in levels if level[1] - level[0] > spec.pre_nms_top_k],
        )
    for first, end in concerned:
        narrow(mask.pairs[first:end], cls_logits[first:end], quality[first:end], spec=spec)
    return mask.flat(mask.words() if concerned else words)


class _PairMask:
    """A bool for each pair of location and class, searched eight at a time: almost all of them are False."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._classes = shape[1]
        size = shape[0] * shape[1]
        self._bytes = np.empty(-(-size // 8) * 8, np.bool_)
        self._bytes[size:] = False
        self.pairs = self._bytes[:size].reshape(shape)

    def words(self) -> NDArray[np.intp]:
        """Which groups of eight have a True."""
        return np.flatnonzero(self._bytes.view(np.uint64) != 0)

    def is_crowded(self, level: Level, words: NDArray[np.intp], *, spec: DecodeSpec) -> bool:
        """Whether so many of a level's pairs are True that it pays to look for a higher threshold."""
        first, last = np.searchsorted(words, [edge * self._classes // 8 for edge in level])
        pairs = (level[1] - level[0]) * self._classes
        return bool(last - first > max(spec.pre_nms_top_k, pairs // _CROWDED))

    def flat(self, words: NDArray[np.intp]) -> NDArray[np.intp]:
        """Indices of all that are True."""
        found = np.flatnonzero(self._bytes.view(np.uint64)[words].view(np.bool_))
        flat: NDArray[np.intp] = words[found >> 3] * 8 + (found & 7)
        return flat


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability)) if probability > 0 else -math.inf


def _above(logits: NDArray[Any], threshold: float, *, out: NDArray[np.bool_]) -> None:
    """``logits > threshold``, for a threshold that is rounded down."""
    if logits.dtype != np.float16:
        np.greater(logits, np.float32(threshold), out=out)
        return
    # NumPy compares halves one by one in software. Their bits compare as integers in vector registers: among negative
    # halves the greater has the smaller bits, and the sign bit makes every negative one greater than a positive one.
    bound = np.nextafter(np.float16(threshold), np.float16(-np.inf))
    if np.signbit(bound):
        np.less(logits.view(np.uint16), bound.view(np.uint16), out=out)
    else:
        np.greater(logits.view(np.int16), bound.view(np.int16), out=out)


def _keep_best_locations(
    mask: NDArray[np.bool_], cls_logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec
) -> None:
    """Leave, of a level's mask (l, C), the ``pre_nms_top_k`` locations whose best class ranks highest."""
    rank = SCORE_FORMS[spec.profile.rank](sigmoid(cls_logits.max(axis=1)), quality)
    others = np.ones(len(mask), np.bool_)
    others[best_first(rank, limit=spec.pre_nms_top_k)] = False
    mask[others] = False


def _keep_best_pairs(mask: NDArray[np.bool_], cls_logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec) -> None:
    """Take out of a level's mask (l, C) pairs that cannot be among its ``pre_nms_top_k`` best."""
    best = _passing_ranks(cls_logits.max(axis=1), quality, spec=spec)
    floor = _rank_floor(cls_logits, quality, best=best, spec=spec) * (1 - _MARGIN)
    if floor <= 0:
        return
    rows = np.flatnonzero(best >= floor)
    needed = np.full((len(rows), 1), _INVERSES[spec.profile.rank](floor))
    if spec.profile.rank is not ScoreForm.P:
        needed /= quality[rows, None]  # Not zero, since the best pair of these locations reaches the floor.
    needed = np.minimum(needed, 1 - 1e-9)
    inside = mask[rows] & (cls_logits[rows] > np.log(needed / (1 - needed)).astype(np.float32))
    mask[:] = False
    mask[rows] = inside


def _rank_floor(cls_logits: NDArray[Any], quality: Floats, *, best: Floats, spec: DecodeSpec) -> float:
    """A rank that at least ``pre_nms_top_k`` passing pairs of a level reach; 0 if none is found.

    It is the k-th best rank among some of the pairs: the best of each location, a good choice where p decides, or all
    pairs of the best locations, a good one where q does. ``best``: (l,) the rank of each location's best pair.
    """
    k = spec.pre_nms_top_k
    few = best_first(best, limit=-(-_LOOKED_AT * k // cls_logits.shape[1]))
    of_few = _passing_ranks(cls_logits[few], quality[few, None], spec=spec)
    return max(_kth_best(ranks, k) for ranks in (best, of_few.ravel()))


def _passing_ranks(logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec) -> Floats:
    """Ranks of pairs, 0 for those that do not pass the gate."""
    p = sigmoid(logits)
    passed = SCORE_FORMS[spec.profile.gate](p, quality) > np.float32(spec.score_threshold)
    return SCORE_FORMS[spec.profile.rank](p, quality) * passed


def _kth_best(ranks: Floats, k: int) -> float:
    return float(np.partition(ranks, len(ranks) - k)[-k]) if len(ranks) >= k else 0.0
