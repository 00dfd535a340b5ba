"""What happens to the head's output: how each ecosystem gates, ranks, scores, clips and suppresses (docs/fcos.md)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.enums import CenterMode, StrEnum
from fcos_deploy.core.errors import ConfigError, TensorMismatchError
from fcos_deploy.core.native import NATIVE_TYPES, Finish, Finisher, Native, Passing, Selection, native

__all__ = [
    "ALL_CANDIDATES",
    "MAX_TOP_K",
    "PROFILES",
    "BoxClip",
    "BoxFilter",
    "Candidates",
    "DecodeSpec",
    "HeadOutputs",
    "NmsSpace",
    "PostprocessProfile",
    "ScoreForm",
    "best_first",
    "decode",
    "finisher",
    "level_sizes",
    "location_centers",
    "location_strides",
    "native_for",
    "passing_pairs",
    "selection",
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

_SCORE_FORMS: dict[ScoreForm, Callable[[Floats, Floats], Floats]] = {
    ScoreForm.P: lambda p, _q: p,
    ScoreForm.PQ: lambda p, q: p * q,
    ScoreForm.SQRT_PQ: lambda p, q: np.sqrt(p * q),
}

_MARGIN = 1e-5  # relative; sigmoid, product and root in float32 round by less than 1e-6 together
_SAMPLED = 8  # times the top-k: pairs that are ranked to find a rank that the top-k of a level reach
_UNDERFLOW = 1e-30  # of p * q, below which that need not hold: sigmoid stops at exp(-87)


def sigmoid(logits: NDArray[Any]) -> Floats:
    """1 / (1 + exp(-x)) in float32."""
    exponent: Floats = np.negative(np.maximum(logits, -87, dtype=np.float32))  # exp(88.8) is beyond float32.
    np.exp(exponent, out=exponent)
    exponent += 1
    np.reciprocal(exponent, out=exponent)
    return exponent


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
    profile, ends = spec.profile, _level_ends(input_size, spec.strides)
    library = native_for(head)
    if library is not None:
        passing, _ = passing_pairs(library, head, spec, input_size=input_size)
        rule = selection(spec, input_size=input_size, best_first=profile.sort_by_score)
        return Candidates(*library.select(passing, rule))
    _check_shapes(head, input_size, locations=int(ends[-1]))
    classes = head.cls_logits.shape[1]
    logits, quality = head.cls_logits.astype(np.float32, copy=False), sigmoid(head.centerness.reshape(-1))
    bounds = _gate_logit(profile.gate, spec.score_threshold)
    if profile.rank_per_location:
        bounds = _location_bounds(_location_ranks(head, logits.max(axis=1), spec), ends, spec)
    above = logits > bounds[:, None]
    if np.count_nonzero(above) > _room(logits) and not profile.rank_per_location:
        above = logits > _best_logits(head, ends, spec, largest=logits.max(axis=1))[:, None]
    location, channels = np.divmod(np.flatnonzero(above), classes)
    p, q = sigmoid(logits[location, channels]), quality[location]
    passed = _SCORE_FORMS[profile.gate](p, q) > np.float32(spec.score_threshold)
    location, channels, p, q = location[passed], channels[passed], p[passed], q[passed]
    rank = _SCORE_FORMS[profile.rank](p, q)
    limit = None if profile.rank_per_location else spec.pre_nms_top_k  # locations were chosen before
    edges = [0, *np.searchsorted(location, ends)]  # ``location`` ascends
    best = np.concatenate([a + best_first(rank[a:b], limit=limit) for a, b in itertools.pairwise(edges)])
    best = best if profile.sort_by_score else np.sort(best)
    location, channels = location[best], channels[best]
    x, y = _centers(input_size, spec.strides, profile.centers)[:, location]
    left, top, right, bottom = head.distances[location].T
    boxes = np.stack([x - left, y - top, x + right, y + bottom], axis=1, dtype=np.float32, casting="same_kind")
    return Candidates(boxes, _SCORE_FORMS[profile.score](p[best], q[best]), channels)


@functools.lru_cache(maxsize=64)
def _gate_logit(gate: ScoreForm, threshold: float) -> Floats:
    """(1,): a logit that every pair exceeds that passes the gate."""
    # q <= 1, so that p * q >= t needs p >= t: a pair whose logit is below that of t fails whatever its centerness is.
    return _logits_of(_product(gate, np.full(1, threshold * (1 - _MARGIN))))


def _location_ranks(head: HeadOutputs, largest: NDArray[Any], spec: DecodeSpec) -> Floats:
    """(L,): rank of each location by its largest logit (L,)."""
    return _SCORE_FORMS[spec.profile.rank](sigmoid(largest), sigmoid(head.centerness.reshape(-1)))


def _location_bounds(ranks: Floats, ends: NDArray[np.int64], spec: DecodeSpec) -> Floats:
    """(L,): as ``_gate_logit`` for the locations that ``rank_per_location`` chooses, infinity for the others."""
    bounds = np.full(len(ranks), np.inf, np.float32)
    gate = _gate_logit(spec.profile.gate, spec.score_threshold)
    for first, end in itertools.pairwise([0, *ends]):
        bounds[first + best_first(ranks[first:end], limit=spec.pre_nms_top_k)] = gate
    return bounds


def _best_logits(head: HeadOutputs, ends: NDArray[np.int64], spec: DecodeSpec, *, largest: NDArray[Any]) -> Floats:
    """(L,): as ``_gate_logit``, and exceeded by every pair that can be among the ``pre_nms_top_k`` best of its level.

    Only a shortcut, for images in which many pairs pass. ``largest``: each location's largest logit (L,).
    """
    profile, k, classes = spec.profile, spec.pre_nms_top_k, head.cls_logits.shape[1]
    quality, room = sigmoid(head.centerness.reshape(-1)), _SAMPLED * k

    def ranks(logits: NDArray[Any], q: Floats) -> Floats:
        p = sigmoid(logits)
        passed = _SCORE_FORMS[profile.gate](p, q) > np.float32(spec.score_threshold)
        return np.where(passed, _SCORE_FORMS[profile.rank](p, q), np.float32(0))

    # The k-th best rank among some pairs of a level is at most that among all. The best pairs of all locations have a
    # high one where p decides, all pairs of the best locations where q does.
    best, floors = ranks(largest, quality), np.zeros(len(ends))
    for level, (first, end) in enumerate(itertools.pairwise([0, *ends])):
        if (end - first) * classes > room:
            rows = first + best_first(best[first:end], limit=-(-room // classes))
            samples = best[first:end], ranks(head.cls_logits[rows], quality[rows, None]).ravel()
            floors[level] = max(np.partition(sample, -k)[-k] for sample in samples if len(sample) >= k)
    needed = np.repeat(_product(profile.rank, floors * (1 - _MARGIN)), np.diff(ends, prepend=0))
    needed[needed < _UNDERFLOW] = 0
    if profile.rank is not ScoreForm.P:
        needed /= quality
    # NaN says nothing: its rank comes before all numbers.
    return np.fmax(_logits_of(needed), _gate_logit(profile.gate, spec.score_threshold))


def _product(form: ScoreForm, value: NDArray[np.float64]) -> NDArray[np.float64]:
    """The p * q (or p) at which a form reaches a value."""
    return value * value if form is ScoreForm.SQRT_PQ else value


def _logits_of(probabilities: NDArray[np.float64]) -> Floats:
    """log(p / (1 - p)); -inf for 0, and a large number for what is not below 1."""
    p = np.minimum(probabilities, 1 - 1e-9)
    with np.errstate(divide="ignore"):
        logits: NDArray[np.float64] = np.log(p / (1 - p))
    return logits.astype(np.float32)


def _room(logits: NDArray[Any]) -> int:
    """How many pairs are listed as they are; where more pass, it pays to look for those that can be among the best."""
    return max(logits.size // 8, 32768)


_FORM_NUMBERS = {form: number for number, form in enumerate(ScoreForm)}  # P, PQ, SQRT_PQ in host.c


def native_for(head: HeadOutputs) -> Native | None:
    """The compiled loops, if there are any that take these arrays."""
    arrays = (head.cls_logits, head.centerness, head.distances)
    return native() if all(array.dtype in NATIVE_TYPES for array in arrays) else None


def passing_pairs(
    library: Native, head: HeadOutputs, spec: DecodeSpec, *, input_size: tuple[int, int]
) -> tuple[Passing, bool]:
    """The pairs among which all candidates are, and whether all logits are finite; errors are those of ``decode``.

    Probabilities are NumPy's here too, so that no bit differs. The calling thread's next call overwrites the pairs.
    """
    profile, ends = spec.profile, _level_ends(input_size, spec.strides)
    _check_shapes(head, input_size, locations=int(ends[-1]))
    logits, distances = np.ascontiguousarray(head.cls_logits), np.ascontiguousarray(head.distances)
    centerness = np.ascontiguousarray(head.centerness.reshape(-1))
    scan = functools.partial(library.scan, logits, centerness, ends=ends)
    bounds = _gate_logit(profile.gate, spec.score_threshold)
    if profile.rank_per_location:
        largest, finite = library.largest(logits)
        ranks = _location_ranks(head, largest, spec)
        bounds = library.bounds_of_best(ranks, largest, ends=ends, limit=spec.pre_nms_top_k, gate=float(bounds[0]))
        passing = scan(bounds, capacity=_room(logits))
    else:
        passing = scan(bounds, capacity=_room(logits))
        finite = passing.finite
        if not passing.complete:
            bounds = _best_logits(head, ends, spec, largest=library.largest(logits)[0])
            passing = scan(bounds, capacity=_room(logits))
    if not passing.complete:  # equal ranks, which no bound separates, or a rule without a limit
        passing = scan(bounds, capacity=int(passing.counts.sum()))
    return Passing(passing, sigmoid(passing.values), logits.shape[1], distances), finite


def finisher(
    library: Native,
    head: HeadOutputs,
    spec: DecodeSpec,
    *,
    input_size: tuple[int, int],
    rules: tuple[Selection, Finish],
) -> Finisher | None:
    """The compiled loops in one call, for outputs that are overwritten in place; None where they do not go into one.

    Errors are those of ``decode``.
    """
    ends, arrays = _level_ends(input_size, spec.strides), (head.cls_logits, head.centerness, head.distances)
    _check_shapes(head, input_size, locations=int(ends[-1]))
    if spec.profile.rank_per_location or not all(array.flags.c_contiguous for array in arrays):
        return None
    return library.finisher(
        *arrays,
        bound=_gate_logit(spec.profile.gate, spec.score_threshold),
        ends=ends,
        capacity=_room(head.cls_logits),
        selection=rules[0],
        finish=rules[1],
    )


def selection(spec: DecodeSpec, *, input_size: tuple[int, int], best_first: bool) -> Selection:
    """Which of the pairs become candidates, for the compiled loops; in each level the best first, or by position."""
    profile = spec.profile
    return Selection(
        _centers(input_size, spec.strides, profile.centers),
        limit=ALL_CANDIDATES if profile.rank_per_location else spec.pre_nms_top_k,
        threshold=spec.score_threshold,
        forms=(_FORM_NUMBERS[profile.gate], _FORM_NUMBERS[profile.rank], _FORM_NUMBERS[profile.score]),
        best_first=best_first,
    )


@functools.lru_cache(maxsize=64)
def _level_ends(input_size: tuple[int, int], strides: tuple[int, ...]) -> NDArray[np.int64]:
    """Where each level ends, as locations."""
    return np.cumsum([rows * columns for rows, columns in level_sizes(*input_size, strides=strides)], dtype=np.int64)


@functools.lru_cache(maxsize=64)
def _centers(input_size: tuple[int, int], strides: tuple[int, ...], mode: CenterMode) -> NDArray[np.float32]:
    """(2, L): x and y of each location."""
    return np.ascontiguousarray(location_centers(*input_size, strides=strides, mode=mode).T)


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
