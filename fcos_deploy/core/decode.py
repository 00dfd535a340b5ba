"""What happens to the head's output: how each ecosystem gates, ranks, scores, clips and suppresses (docs/fcos.md)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.enums import CenterMode, StrEnum
from fcos_deploy.core.errors import ConfigError, TensorMismatchError
from fcos_deploy.core.native import NATIVE_TYPES, Native, native

__all__ = [
    "ALL_CANDIDATES",
    "MAX_TOP_K",
    "PROFILES",
    "SCORE_FORMS",
    "BoxClip",
    "BoxFilter",
    "Candidates",
    "DecodeSpec",
    "HeadOutputs",
    "NmsSpace",
    "PostprocessProfile",
    "ScoreForm",
    "best_first",
    "best_of_groups",
    "decode",
    "level_sizes",
    "location_centers",
    "location_strides",
    "passing_pairs",
    "sigmoid",
]


MAX_TOP_K = 3840  # the largest K of TensorRT's TopK layer
ALL_CANDIDATES = 2**31 - 1  # a ``pre_nms_top_k`` that leaves out none


class ScoreForm(StrEnum):
    """A number made from the class probability p and the centerness q."""

    P = "p"
    PQ = "p*q"
    SQRT_PQ = "sqrt(p*q)"


class BoxClip(StrEnum):
    """To what boxes are clipped before suppression: nothing, the network input, or the resized image in it."""

    NONE = "none"
    INPUT = "input"  # [0, W] x [0, H] of the image with its padding
    IMAGE = "image"  # [0, W] x [0, H]
    IMAGE_MINUS_ONE = "image-1"  # [0, W - 1] x [0, H - 1]


class NmsSpace(StrEnum):
    """The pixels in which overlaps are measured: the resized image's, or the original's."""

    INPUT = "input"
    ORIGINAL = "original"


class BoxFilter(StrEnum):
    """When small boxes are dropped: never, before suppression, or (without area) after a final clip to the image."""

    NONE = "none"
    BEFORE_NMS = "before-nms"
    AFTER_FINAL_CLIP = "after-final-clip"


@dataclass(frozen=True, slots=True, kw_only=True)
class PostprocessProfile:
    """One ecosystem's post-processing.

    A candidate is a pair of location and class with ``gate`` > the score threshold (strictly); of each level the
    ``pre_nms_top_k`` best by ``rank`` remain; ``score`` is what the detection gets. ``iou_offset`` is added to widths
    and heights in the overlap (1 in tianzhi's). ``keep_ties``: detections that tie with the last one allowed stay.
    ``sort_by_score``: False leaves survivors level by level, by location and then class (tianzhi).
    ``rank_per_location``: rank locations by their best class instead of pairs (mmdetection 2).
    """

    name: str
    gate: ScoreForm
    rank: ScoreForm
    score: ScoreForm
    centers: CenterMode
    clip: BoxClip
    nms_space: NmsSpace = NmsSpace.INPUT
    box_filter: BoxFilter = BoxFilter.NONE
    iou_offset: float = 0.0
    keep_ties: bool = False
    sort_by_score: bool = True
    rank_per_location: bool = False


PROFILES: dict[str, PostprocessProfile] = {
    profile.name: profile
    for profile in (
        PostprocessProfile(
            name="torchvision",
            gate=ScoreForm.SQRT_PQ,
            rank=ScoreForm.SQRT_PQ,
            score=ScoreForm.SQRT_PQ,
            centers=CenterMode.TORCHVISION,
            clip=BoxClip.IMAGE,
        ),
        PostprocessProfile(
            name="mmdetection",
            gate=ScoreForm.P,
            rank=ScoreForm.P,
            score=ScoreForm.PQ,
            centers=CenterMode.HALF,
            clip=BoxClip.IMAGE,
            nms_space=NmsSpace.ORIGINAL,
            box_filter=BoxFilter.BEFORE_NMS,
        ),
        PostprocessProfile(
            name="mmdetection2",
            gate=ScoreForm.P,
            rank=ScoreForm.PQ,
            score=ScoreForm.PQ,
            centers=CenterMode.HALF,
            clip=BoxClip.IMAGE,
            nms_space=NmsSpace.ORIGINAL,
            rank_per_location=True,
        ),
        PostprocessProfile(
            name="adelaidet",
            gate=ScoreForm.P,
            rank=ScoreForm.PQ,
            score=ScoreForm.SQRT_PQ,
            centers=CenterMode.HALF,
            clip=BoxClip.NONE,
            box_filter=BoxFilter.AFTER_FINAL_CLIP,
            keep_ties=True,
        ),
        PostprocessProfile(
            name="detectron2",
            gate=ScoreForm.SQRT_PQ,
            rank=ScoreForm.SQRT_PQ,
            score=ScoreForm.SQRT_PQ,
            centers=CenterMode.HALF,
            clip=BoxClip.NONE,
            box_filter=BoxFilter.AFTER_FINAL_CLIP,
        ),
        PostprocessProfile(
            name="tianzhi",
            gate=ScoreForm.P,
            rank=ScoreForm.PQ,
            score=ScoreForm.SQRT_PQ,
            centers=CenterMode.HALF,
            clip=BoxClip.IMAGE_MINUS_ONE,
            iou_offset=1.0,
            keep_ties=True,
            sort_by_score=False,
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpec:
    """From head outputs to detections.

    ``strides`` of the levels in network-input pixels, finest first. ``label_map[channel]`` is the label of a class
    channel; empty means that the label is the channel. ``class_agnostic``: boxes suppress those of other classes too.
    Where the profile drops boxes before suppression, those stay whose sides are both longer than ``min_box_size``, in
    the pixels in which overlaps are measured; -1 keeps all.
    """

    profile: PostprocessProfile
    score_threshold: float
    iou_threshold: float
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    pre_nms_top_k: int = 1000
    max_detections: int = 100
    label_map: tuple[int, ...] = ()
    class_agnostic: bool = False
    min_box_size: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.score_threshold < 1.0:
            raise ConfigError(f"The score threshold must be in [0, 1), got {self.score_threshold}.")
        if not 0.0 < self.iou_threshold <= 1.0:
            raise ConfigError(f"The IoU threshold must be in (0, 1], got {self.iou_threshold}.")
        if self.pre_nms_top_k < 1 or self.max_detections < 1:
            raise ConfigError("pre_nms_top_k and max_detections must be at least 1.")
        if self.min_box_size > 0 and self.profile.box_filter is not BoxFilter.BEFORE_NMS:
            raise ConfigError(
                f"The profile '{self.profile.name}' does not drop boxes by their size, got {self.min_box_size:g}.",
                hint="--min-box-size 0, or --profile mmdetection",
            )

    def candidates_per_level(self, locations: int, *, classes: int) -> int:
        """How many pairs of location and class a graph's top-k keeps of a level with ``locations``."""
        if self.profile.rank_per_location:
            return min(MAX_TOP_K, min(self.pre_nms_top_k, locations) * classes)
        # min() with two arguments: torch.export, which traces this with open sizes, replaces it by one that stays
        # symbolic for two only; with three, the example's number of locations would become a constant of the graph.
        limit = min(MAX_TOP_K, self.pre_nms_top_k)
        return min(limit, locations * classes)


def level_sizes(height: int, width: int, *, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Grid (h, w) of each level for a padded network input; every halving rounds up (3x3, stride 2, padding 1)."""
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def location_centers(height: int, width: int, *, strides: tuple[int, ...], mode: CenterMode) -> NDArray[np.float32]:
    """Centres (L, 2) float32 as x, y in network-input pixels; levels finest first, row by row."""
    centers = []
    for (rows, columns), stride in zip(level_sizes(height, width, strides=strides), strides, strict=True):
        if mode is CenterMode.TORCHVISION:
            step_x, step_y, offset = width // columns, height // rows, 0.0
        else:
            step_x, step_y, offset = stride, stride, 0.5
        x, y = (np.arange(columns) + offset) * step_x, (np.arange(rows) + offset) * step_y
        centers.append(np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1).reshape(-1, 2))
    return np.concatenate(centers).astype(np.float32)


def location_strides(height: int, width: int, *, strides: tuple[int, ...]) -> NDArray[np.float32]:
    """Stride (L,) float32 of each location, in the order of ``location_centers``."""
    sizes = level_sizes(height, width, strides=strides)
    return np.repeat(np.asarray(strides, np.float32), [rows * columns for rows, columns in sizes])


Floats = NDArray[np.float32]
Level = tuple[int, int]  # first location, end

SCORE_FORMS: dict[ScoreForm, Callable[[Floats, Floats], Floats]] = {
    ScoreForm.P: lambda p, _q: p,
    ScoreForm.PQ: lambda p, q: p * q,
    ScoreForm.SQRT_PQ: lambda p, q: np.sqrt(p * q),
}

# The p * q (or p) at which a form reaches a value.
_INVERSES: dict[ScoreForm, Callable[[float], float]] = {
    ScoreForm.P: lambda value: value,
    ScoreForm.PQ: lambda value: value,
    ScoreForm.SQRT_PQ: lambda value: value * value,
}

_MARGIN = 1e-5  # relative; sigmoid, product and root in float32 round by less than 1e-6 together

# To narrow a level down is to read it once more, which pays where at least one in this many of its pairs passes.
_CROWDED = 32

# As many times top-k pairs, or fewer, are sorted as they are.
_ROOM = 16
_ROOM_SHARE = 8  # or one in this many of a level's pairs

# This many times top-k pairs are ranked to find a level's floor: more of them raise the floor, and take longer.
_SAMPLED = 8


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
    _above(cls_logits, _least_logit(spec), out=mask.pairs)
    words = mask.words()
    if spec.profile.rank_per_location:
        narrowed = [(first, end) for first, end in levels if end - first > spec.pre_nms_top_k]
    else:
        narrowed = [level for level in levels if mask.is_crowded(level, words, spec=spec)]
    for first, end in narrowed:
        logits, pairs = cls_logits[first:end], mask.pairs[first:end]
        bounds = _logit_bounds(logits, quality[first:end], spec=spec)
        rows = np.flatnonzero(bounds < np.inf)
        inside = pairs[rows] & (logits[rows] > bounds[rows, None])
        pairs[:] = False
        pairs[rows] = inside
    return mask.flat(mask.words() if narrowed else words)


def _least_logit(spec: DecodeSpec) -> float:
    """A logit that every pair that passes the gate exceeds.

    q <= 1, so that p * q >= t needs p >= t: a pair whose logit is below that of t fails whatever its centerness is.
    """
    threshold = _INVERSES[spec.profile.gate](spec.score_threshold * (1 - _MARGIN))
    return math.log(threshold / (1 - threshold)) if threshold > 0 else -math.inf


def _logit_bounds(cls_logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec) -> Floats:
    """(l,): logits that pairs of a level's locations have to exceed if the level's top-k is to have them.

    inf: none of the location's. ``rank_per_location`` is a rule of the ecosystem, otherwise this is a shortcut.
    """
    bounds = _best_location_bounds if spec.profile.rank_per_location else _best_pair_bounds
    return bounds(cls_logits, quality, spec=spec)


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
        set_bytes = np.flatnonzero(self._bytes.view(np.uint64)[words].view(np.bool_))
        flat: NDArray[np.intp] = words[set_bytes >> 3] * 8 + (set_bytes & 7)
        return flat


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


def _best_location_bounds(cls_logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec) -> Floats:
    """-inf for the ``pre_nms_top_k`` locations whose best class ranks highest."""
    rank = SCORE_FORMS[spec.profile.rank](sigmoid(_largest(cls_logits)), quality)
    bounds = np.full(len(rank), np.inf, np.float32)
    bounds[best_first(rank, limit=spec.pre_nms_top_k)] = -np.inf
    return bounds


def _largest(cls_logits: NDArray[Any]) -> NDArray[Any]:
    """(l,): each location's largest logit."""
    library = native()
    if library is not None and cls_logits.dtype in NATIVE_TYPES and cls_logits.flags.c_contiguous:
        return library.largest(cls_logits)
    largest: NDArray[Any] = cls_logits.max(axis=1)
    return largest


def _best_pair_bounds(cls_logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec) -> Floats:
    """What pairs that can be among the ``pre_nms_top_k`` best exceed."""
    largest = _largest(cls_logits)
    best = _passing_ranks(largest, quality, spec=spec)
    floor = _rank_floor(cls_logits, quality, best=best, spec=spec) * (1 - _MARGIN)
    bounds = np.full(len(best), -np.inf, np.float32)
    if not floor > 0:
        return bounds
    bounds[~np.isnan(largest + quality)] = np.inf  # NaN says nothing of the location's other pairs.
    rows = np.flatnonzero(best >= floor)
    # rank(p, q) >= floor  <=>  p >= inverse(floor) / q  <=>  logit >= log(p / (1 - p)): one comparison a pair.
    needed = np.full(len(rows), _INVERSES[spec.profile.rank](floor))
    if spec.profile.rank is not ScoreForm.P:
        needed /= quality[rows]  # Not zero, since the best pair of these locations reaches the floor.
    needed = np.minimum(needed, 1 - 1e-9)
    bounds[rows] = np.log(needed / (1 - needed))
    return bounds


def _rank_floor(cls_logits: NDArray[Any], quality: Floats, *, best: Floats, spec: DecodeSpec) -> float:
    """A rank that at least ``pre_nms_top_k`` passing pairs of a level reach, or 0.

    The k-th best rank among some pairs is at most the k-th best among all, so that no pair below it is in the top k.
    Two samples are ranked: the best pair of each location, which gives a high floor where p decides, and all pairs of
    the best locations, where q does. ``best``: (l,) the rank of each location's best pair.
    """
    k = spec.pre_nms_top_k
    locations = best_first(best, limit=-(-_SAMPLED * k // cls_logits.shape[1]))
    of_best = _passing_ranks(cls_logits[locations], quality[locations, None], spec=spec).ravel()
    return max((float(np.partition(r, len(r) - k)[-k]) for r in (best, of_best) if len(r) >= k), default=0.0)


def _passing_ranks(logits: NDArray[Any], quality: Floats, *, spec: DecodeSpec) -> Floats:
    """Ranks of pairs, 0 for those that do not pass the gate."""
    p = sigmoid(logits)
    passed = SCORE_FORMS[spec.profile.gate](p, quality) > np.float32(spec.score_threshold)
    return np.where(passed, SCORE_FORMS[spec.profile.rank](p, quality), np.float32(0))


@dataclass(frozen=True, slots=True, eq=False)
class HeadOutputs:
    """The raw tail's outputs of one image, float32 or float16, L locations finest level first, row by row.

    cls_logits: (L, C) before the sigmoid. distances: (L, 4) left, top, right, bottom, in network-input pixels.
    centerness: (L, 1) before the sigmoid.
    """

    cls_logits: NDArray[Any]
    distances: NDArray[Any]
    centerness: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Pairs of location and class that may become detections, levels in order.

    Within a level the best rank comes first, or, where the profile does not sort by score, the first position.

    boxes: (n, 4) float32 xyxy, network-input pixels, not clipped. scores: (n,) float32. channels: (n,) integers.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    channels: NDArray[Any]

    def take(self, chosen: NDArray[Any]) -> Candidates:
        """Those at these indices, or where this mask is True."""
        return Candidates(self.boxes[chosen], self.scores[chosen], self.channels[chosen])


def decode(head: HeadOutputs, spec: DecodeSpec, *, input_size: tuple[int, int]) -> Candidates:
    """The pairs that pass the gate, of each level the ``pre_nms_top_k`` best; ``input_size`` is the padded (H, W).

    Raises:
        TensorMismatchError: the outputs' shapes do not fit each other or the input size.
    """
    levels = _level_bounds(input_size, spec.strides)
    _check_shapes(head, input_size, locations=levels[-1][1])
    library = native()
    if library is not None and all(
        array.dtype in NATIVE_TYPES for array in (head.cls_logits, head.centerness, head.distances)
    ):
        return _decode_native(library, head, spec, input_size=input_size)
    profile = spec.profile
    classes = head.cls_logits.shape[1]
    quality = sigmoid(head.centerness.reshape(-1))
    flat = passing_pairs(head.cls_logits, quality, levels=levels, spec=spec)
    location, channels = np.divmod(flat, classes)
    p, q = sigmoid(head.cls_logits[location, channels]), quality[location]
    passed = SCORE_FORMS[profile.gate](p, q) > np.float32(spec.score_threshold)
    location, channels, p, q = location[passed], channels[passed], p[passed], q[passed]
    limit = None if profile.rank_per_location else spec.pre_nms_top_k  # locations were chosen before
    ends = np.searchsorted(location, [end for _, end in levels]).tolist()  # ``location`` ascends
    best = best_of_groups(SCORE_FORMS[profile.rank](p, q), ends, limit=limit)
    best = best if profile.sort_by_score else np.sort(best)
    location, channels = location[best], channels[best]
    scores = SCORE_FORMS[profile.score](p[best], q[best])
    centers = _centers(input_size, spec.strides, profile.centers)
    return Candidates(_boxes(location, head.distances, centers=centers), scores, channels)


_FORM_NUMBERS = {form: number for number, form in enumerate(ScoreForm)}  # P, PQ, SQRT_PQ in host.c


def _decode_native(library: Native, head: HeadOutputs, spec: DecodeSpec, *, input_size: tuple[int, int]) -> Candidates:
    """As ``decode``, with the library's loops; probabilities are NumPy's here too, so that no bit differs."""
    profile, levels = spec.profile, _level_bounds(input_size, spec.strides)
    logits, distances = np.ascontiguousarray(head.cls_logits), np.ascontiguousarray(head.distances)
    centerness = np.ascontiguousarray(head.centerness.reshape(-1))
    classes, ends = logits.shape[1], np.array([end for _, end in levels], np.int64)
    bounds = np.full(1, _least_logit(spec), np.float32)
    scan = functools.partial(library.scan, logits, centerness, ends=ends)
    # Of a level: so many pairs that to choose among them takes no longer than to look for a higher bound.
    room = [
        min((b - a) * classes, max(_ROOM * spec.pre_nms_top_k, (b - a) * classes // _ROOM_SHARE)) for a, b in levels
    ]
    passing = None
    if profile.rank_per_location:
        narrowed = [(first, end) for first, end in levels if end - first > spec.pre_nms_top_k]
    else:
        passing = scan(bounds, capacity=sum(room))
        narrowed = [level for level, count, size in zip(levels, passing.counts, room, strict=True) if count > size]
    if narrowed:
        bounds = np.repeat(bounds, len(logits))
        for first, end in narrowed:
            own = _logit_bounds(logits[first:end], sigmoid(centerness[first:end]), spec=spec)
            np.maximum(bounds[first:end], own, out=bounds[first:end])
    if passing is None or narrowed:
        passing = scan(bounds, capacity=sum(room))
    if not passing.complete:  # equal ranks, which no bound separates, or a rule without a limit
        passing = scan(bounds, capacity=int(passing.counts.sum()))
    boxes, scores, channels = library.select(
        passing,
        sigmoid(passing.values),
        classes=classes,
        forms=(_FORM_NUMBERS[profile.gate], _FORM_NUMBERS[profile.rank], _FORM_NUMBERS[profile.score]),
        threshold=spec.score_threshold,
        limit=ALL_CANDIDATES if profile.rank_per_location else spec.pre_nms_top_k,
        best_first=profile.sort_by_score,
        centers=_centers(input_size, spec.strides, profile.centers),
        distances=distances,
    )
    return Candidates(boxes, scores, channels)


def _boxes(location: NDArray[np.intp], distances: NDArray[Any], *, centers: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, 4) xyxy of these locations; ``centers``: (2, L)."""
    x, y = centers.take(location, axis=1)
    left, top, right, bottom = distances.take(location, axis=0).T
    boxes = np.empty((len(location), 4), np.float32)
    np.subtract(x, left, out=boxes[:, 0])
    np.subtract(y, top, out=boxes[:, 1])
    np.add(x, right, out=boxes[:, 2])
    np.add(y, bottom, out=boxes[:, 3])
    return boxes


@functools.lru_cache(maxsize=64)
def _level_bounds(input_size: tuple[int, int], strides: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(first location, end) of each level."""
    ends = np.cumsum([rows * columns for rows, columns in level_sizes(*input_size, strides=strides)]).tolist()
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


@functools.lru_cache(maxsize=64)
def _centers(input_size: tuple[int, int], strides: tuple[int, ...], mode: CenterMode) -> NDArray[np.float32]:
    """(2, L): x and y of each location."""
    centers = np.ascontiguousarray(location_centers(*input_size, strides=strides, mode=mode).T)
    centers.flags.writeable = False
    return centers


def _check_shapes(head: HeadOutputs, input_size: tuple[int, int], *, locations: int) -> None:
    expected = {"distances": (locations, 4), "centerness": (locations, 1)}
    got = {"distances": head.distances.shape, "centerness": head.centerness.shape}
    if got != expected or head.cls_logits.shape[:1] != (locations,) or head.cls_logits.ndim != 2:
        shapes = {"cls_logits": head.cls_logits.shape, **got}
        raise TensorMismatchError(
            f"Head outputs of a {input_size[0]}x{input_size[1]} input must have {locations} locations, got {shapes}.",
            hint="do the contract's strides belong to this model?",
        )


_LOW = np.uint64(0xFFFFFFFF)
_SCORE_BITS = np.uint32(0x7FFFFFFF)  # without the sign, so that NaN of either sign comes first


def best_first(scores: NDArray[np.float32], *, limit: int | None = None) -> NDArray[np.intp]:
    """Indices of the ``limit`` best of (n,) float32 scores >= 0, best first; the earlier index first among equals."""
    library = native()
    if library is not None and limit is not None:
        return library.best_first(scores, limit=limit)
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
