"""Detections of one image: how much boxes overlap, which ones suppress others, and how outputs become them."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import (
    BoxClip,
    BoxFilter,
    Candidates,
    DecodeSpec,
    HeadOutputs,
    NmsSpace,
    best_first,
    decode,
    finisher,
    native_for,
    passing_pairs,
    selection,
)
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import BackendError, ConfigError, MissingDependencyError, TensorMismatchError
from fcos_deploy.core.native import (
    NATIVE_TYPES,
    DetectionArrays,
    Finish,
    Finisher,
    Native,
    Selection,
    SuppressionRule,
    native,
)
from fcos_deploy.core.preprocess import Letterbox

__all__ = [
    "Detections",
    "Postprocessor",
    "Suppression",
    "box_iou",
    "image_sizes_row",
    "label_name",
    "pairwise_iou",
    "postprocess",
    "suppress",
]


_DTYPES = (np.dtype(np.float32), np.dtype(np.float32), np.dtype(np.int64))  # of boxes, scores and labels


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What a detector returns for one image, best score first.

    boxes: (n, 4) float32 xyxy, in image pixels unless said otherwise.
    scores: (n,) float32 in 0..1. labels: (n,) int64.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.scores)
        fits = self.boxes.shape == (count, 4) and self.scores.shape == (count,) and self.labels.shape == (count,)
        typed = (self.boxes.dtype, self.scores.dtype, self.labels.dtype) == _DTYPES
        if not (fits and typed):
            got = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (self.boxes, self.scores, self.labels))
            raise ConfigError(f"Detections must be float32[n, 4], float32[n] and int64[n], got {got}.")

    @classmethod
    def unchecked(
        cls, boxes: NDArray[np.float32], scores: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> Detections:
        """Of arrays that are made as they have to be."""
        detections = object.__new__(cls)
        assign = object.__setattr__
        assign(detections, "boxes", boxes), assign(detections, "scores", scores), assign(detections, "labels", labels)
        return detections

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float | NDArray[np.float32]) -> Detections:
        """Those with at least this score; of an array (n,), each with at least its own."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def to_list(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """``[{"box": [x1, y1, x2, y2], "score", "label", "name"}]``; a label without a name gets its number."""
        return [
            {
                "box": [float(v) for v in box],
                "score": float(score),
                "label": int(label),
                "name": label_name(label, names),
            }
            for box, score, label in zip(self.boxes, self.scores, self.labels, strict=True)
        ]

    def to_supervision(self, names: tuple[str, ...] = ()) -> Any:  # Any: the library has no stubs here
        """A ``supervision.Detections``; with ``names`` the class names are in its ``data["class_name"]``.

        Raises:
            MissingDependencyError: supervision is not installed. It is no extra: it brings an OpenCV of its own.
        """
        try:
            supervision = importlib.import_module("supervision")
        except ModuleNotFoundError as error:
            raise MissingDependencyError("'supervision' is not installed.", hint="pip install supervision") from error
        data = {"class_name": np.array([label_name(int(label), names) for label in self.labels])} if names else {}
        return supervision.Detections(
            xyxy=self.boxes, confidence=self.scores, class_id=self.labels.astype(int, copy=False), data=data
        )


_TINY = 1e-300  # keeps 0 / 0, the overlap of boxes without area, at 0


def label_name(label: int, names: Sequence[str]) -> str:
    """The name of a label; one without a name gets its number."""
    return names[label] if 0 <= label < len(names) else str(label)


def box_iou(
    first: NDArray[Any], second: NDArray[Any], *, offset: float = 0.0, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Intersection over union of boxes xyxy, broadcast: (..., 4) and (..., 4) -> (...) float64; 0 without area.

    ``offset`` is added to widths and heights, of the intersection too: 1 where coordinates are those of pixels that
    belong to the box (tianzhi's FCOS, as Caffe's Faster R-CNN did). Where ``crowd`` (...) is set, the intersection is
    divided by the area of the first box alone, as COCO does with ``iscrowd`` (pycocotools, maskApi.c: bbIou).

    The graph tails compute the same in torch, as operators to export (``model/tails.py``).
    """
    a, b = (np.moveaxis(boxes, -1, 0).astype(np.float64, copy=False) for boxes in (first, second))
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + offset
    np.maximum(sides, 0.0, out=sides)  # negative for boxes apart, and two negatives would make a positive area
    intersection = sides[0] * sides[1]
    area_a, area_b = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    union = area_a + area_b - intersection
    if crowd is not None:
        union = np.where(crowd, area_a, union)
    iou: NDArray[np.float64] = intersection / np.maximum(union, _TINY)
    return iou


def pairwise_iou(
    first: NDArray[Any], second: NDArray[Any], *, offset: float = 0.0, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """As ``box_iou``, of every pair: (n, 4) and (m, 4) -> (n, m) float64; ``crowd`` (m,)."""
    return box_iou(first[:, None], second[None], offset=offset, crowd=crowd)


_BLOCK = 64  # candidates that are compared at a time; all pairs of a block fit into the level-2 cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppression:
    """``iou_offset`` is added to widths and heights in the overlap (1 in tianzhi's FCOS).

    At most ``limit`` boxes stay, and with ``keep_ties`` also those whose score equals that of the last one.
    """

    iou_threshold: float
    limit: int
    iou_offset: float = 0.0
    keep_ties: bool = False


def suppress(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], *, labels: NDArray[Any], rule: Suppression
) -> NDArray[np.intp]:
    """Indices of the boxes that stay, best score first, earlier ones first among equal scores.

    A box goes when a box of its class that stays, and comes before it in that order, overlaps it by
    IoU > ``iou_threshold`` (strictly). boxes: (n, 4) float32 xyxy. scores: (n,) float32 >= 0. labels: (n,) integers.
    """
    library = native()
    if library is not None:
        return library.suppress(boxes, scores, labels=labels, rule=_native_suppression(rule))
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


def _native_suppression(rule: Suppression) -> SuppressionRule:
    return SuppressionRule(rule.iou_threshold, rule.iou_offset, rule.limit, rule.keep_ties)


def _survivors(
    boxes: NDArray[np.float32], labels: NDArray[Any], *, settled: int, rule: Suppression
) -> NDArray[np.bool_]:
    """(m,) bool: which of boxes (m, 4), best first, stay; the first ``settled`` are known to."""
    corners = boxes.T.astype(np.float64, order="C")  # (4, m): each row contiguous
    near = labels[:, None] == labels[settled:]
    for low, high in zip(corners[:2], corners[2:] + rule.iou_offset, strict=True):  # boxes apart do not overlap
        near &= (low[:, None] <= high[settled:]) & (high[:, None] >= low[settled:])
    # All such pairs of one class, of each the one that comes first, and the other, which is not settled.
    winner, loser = np.nonzero(near)
    loser += settled
    winner, loser = winner[winner < loser], loser[winner < loser]
    over = box_iou(corners[:, winner].T, corners[:, loser].T, offset=rule.iou_offset) > rule.iou_threshold
    winner, loser = winner[over], loser[over]
    stays = np.ones(len(boxes), np.bool_)
    while True:
        # A box stays if every box that overlaps it, and comes before it, goes. By induction round r is right for boxes
        # at the end of a chain of at most r such dependencies, so that the fixed point is the greedy result.
        previous, stays = stays, np.ones(len(boxes), np.bool_)
        stays[loser[previous[winner]]] = False
        if np.array_equal(stays, previous):
            return stays


_LOG = logging.getLogger(__name__)

Outputs = Mapping[str, NDArray[Any]]


def image_sizes_row(letterbox: Letterbox) -> NDArray[np.float32]:
    """(4,) float32 resized height, resized width, original height, original width: a row of ``image_sizes``."""
    sizes = (letterbox.resized_height, letterbox.resized_width, letterbox.image_height, letterbox.image_width)
    return np.array(sizes, np.float32)


class Postprocessor:
    """``postprocess`` of outputs that a runtime overwrites in place; one thread at a time.

    ``outputs`` are those of ``contract.tail``; nothing in a result shares memory with them. ``input_size`` is the
    padded (H, W) of the batch.

    Raises:
        TensorMismatchError: an output is missing or its shape does not fit.
    """

    def __init__(
        self,
        outputs: Outputs,
        contract: ModelContract,
        *,
        index: int,
        input_size: tuple[int, int],
        letterbox: Letterbox,
    ) -> None:
        missing = sorted(set(contract.outputs) - set(outputs))
        if missing:
            raise TensorMismatchError(f"The outputs must be {sorted(contract.outputs)}, {missing} are missing.")
        self._of_image: Outputs = {name: outputs[name][index] for name in contract.outputs}
        self._contract, self._index, self._input_size, self._letterbox = contract, index, input_size, letterbox
        self._head: HeadOutputs | None = None
        self._library: Native | None = None
        self._finisher: Finisher | None = None
        if contract.tail is Tail.RAW:
            self._head = HeadOutputs(*(self._of_image[name] for name in ("cls_logits", "distances", "centerness")))
            self._library = native_for(self._head)
        if self._head is not None and self._library is not None:
            self._rules = _native_rules(contract.decode, input_size, letterbox)
            self._finisher = finisher(
                self._library, self._head, contract.decode, input_size=input_size, rules=self._rules
            )

    def __call__(self) -> Detections:
        """Detections of what the outputs are now.

        Raises:
            BackendError: an output is not finite. A NaN passes no threshold, so that it would look like an empty image.
        """
        arrays = self._finisher() if self._finisher is not None else None
        if arrays is None and self._library is not None and self._head is not None:
            arrays = self._detect_native(self._library, self._head)
        return self._detect() if arrays is None else Detections.unchecked(*arrays)

    def _detect_native(self, library: Native, head: HeadOutputs) -> DetectionArrays | None:
        """The compiled loops one after the other; None if an output is not finite."""
        passing, finite = passing_pairs(library, head, self._contract.decode, input_size=self._input_size)
        centerness = np.ascontiguousarray(head.centerness)
        if not (finite and library.all_finite(centerness) and library.all_finite(passing.distances)):
            return None
        return library.detect(passing, *self._rules)

    def _detect(self) -> Detections:
        contract, letterbox, of_image = self._contract, self._letterbox, self._of_image
        if contract.tail is Tail.NMS:  # Rows beyond the count are not written by every runtime.
            of_image = _used_rows(of_image)
        for name, array in of_image.items():
            _check_finite(name, array, index=self._index)
        with np.errstate(over="ignore"):  # The sum of two finite halves may not be one.
            candidates = _candidates(of_image, contract, self._input_size)
            if contract.tail is not Tail.NMS:
                candidates = _suppressed(candidates, contract.decode, self._input_size, letterbox)
            return _finish(candidates, contract.decode, letterbox)


def postprocess(
    outputs: Outputs, contract: ModelContract, *, index: int, input_size: tuple[int, int], letterbox: Letterbox
) -> Detections:
    """Detections of image ``index`` of a batch, in image pixels, with ``label_map`` applied.

    Arguments and errors are those of ``Postprocessor``.
    """
    return Postprocessor(outputs, contract, index=index, input_size=input_size, letterbox=letterbox)()


@functools.lru_cache(maxsize=64)
def _native_rules(spec: DecodeSpec, input_size: tuple[int, int], letterbox: Letterbox) -> tuple[Selection, Finish]:
    """What the compiled loops do with the pairs that pass."""
    profile = spec.profile
    final = profile.box_filter is BoxFilter.AFTER_FINAL_CLIP
    # Suppression sorts by score anyway, and candidates of equal scores have the order of their ranks.
    ranked = profile.sort_by_score and profile.rank is not profile.score
    label_map = np.array(spec.label_map, np.int64)
    finish = Finish(
        suppression=_native_suppression(_suppression(spec)),
        label_map=label_map.ctypes.data if spec.label_map else None,
        clip=_CLIPS[profile.clip](input_size, letterbox) or _NO_CLIP,
        final_clip=(letterbox.image_width, letterbox.image_height) if final else _NO_CLIP,
        to_image=tuple(letterbox.to_image(np.ones((1, 4), np.float32))[0].tolist()),
        min_size=spec.min_box_size,
        drops_small=profile.box_filter is BoxFilter.BEFORE_NMS,
        in_image_pixels=profile.nms_space is NmsSpace.ORIGINAL,
        class_agnostic=spec.class_agnostic,
        sort_by_score=profile.sort_by_score,
    )
    finish.labels = label_map  # which the address is of
    return selection(spec, input_size=input_size, best_first=ranked), finish


def _check_finite(name: str, array: NDArray[Any], *, index: int) -> None:
    library = native()
    if library is not None and array.dtype in NATIVE_TYPES and array.flags.c_contiguous:
        finite = library.all_finite(array)
    else:
        finite = array.dtype.kind != "f" or bool(np.isfinite(array).all())
    if finite:
        return
    place = np.argwhere(~np.isfinite(array))[0].tolist()
    count, value = int((~np.isfinite(array)).sum()), array[tuple(place)]
    raise BackendError(
        f"Output '{name}' of image {index} is not finite: {count} of {array.size} values, "
        f"the first is {value} at {place}.",
        hint="the model is damaged, or overflows in this precision; 'fcos-deploy parity' finds where it begins",
    )


def _used_rows(outputs: Outputs) -> Outputs:
    """The nms tail's outputs without the padding after the last detection."""
    count, rows = int(outputs["num_detections"].reshape(-1)[0]), len(outputs["scores"])
    if not 0 <= count <= rows:
        raise TensorMismatchError(f"Output 'num_detections' must be in 0..{rows}, got {count}.")
    whole = ("num_detections", "settled")
    return {name: array if name in whole else array[:count] for name, array in outputs.items()}


def _candidates(outputs: Outputs, contract: ModelContract, input_size: tuple[int, int]) -> Candidates:
    """What the graph's tail gives of an image, in network-input pixels; of the nms tail, what is left."""
    if contract.tail is Tail.RAW:
        head = HeadOutputs(outputs["cls_logits"], outputs["distances"], outputs["centerness"])
        return decode(head, contract.decode, input_size=input_size)
    boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs["labels"]
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or labels.shape != scores.shape:
        got = {"boxes": boxes.shape, "scores": scores.shape, "labels": labels.shape}
        raise TensorMismatchError(f"Outputs of an image must be boxes (K, 4), scores (K,) and labels (K,), got {got}.")
    candidates = Candidates(boxes.astype(np.float32, copy=False), scores.astype(np.float32, copy=False), labels)
    if "settled" in outputs and not outputs["settled"].reshape(-1)[0]:
        _LOG.warning(
            "The static NMS did not settle on this image: its detections may differ from those of greedy suppression. "
            "Export with --nms-form onnx, or with more --nms-boxes."
        )
    # A copy of all rows of the nms tail: the runtime overwrites its buffers.
    used = candidates.scores >= 0 if contract.tail is Tail.CANDIDATES else np.arange(len(candidates.scores))
    return candidates.take(used)


def _suppressed(
    candidates: Candidates, spec: DecodeSpec, input_size: tuple[int, int], letterbox: Letterbox
) -> Candidates:
    """Survivors in the profile's order, boxes clipped as it says, in network-input pixels."""
    profile, boxes = spec.profile, candidates.boxes
    limits = _CLIPS[profile.clip](input_size, letterbox)
    if limits is not None:
        boxes = _clip_to(boxes, *limits)
        candidates = Candidates(boxes, candidates.scores, candidates.channels)
    measured = letterbox.to_image(boxes) if profile.nms_space is NmsSpace.ORIGINAL else boxes
    if profile.box_filter is BoxFilter.BEFORE_NMS:
        x1, y1, x2, y2 = measured.T
        large = (x2 - x1 > spec.min_box_size) & (y2 - y1 > spec.min_box_size)
        if not large.all():
            candidates, measured = candidates.take(large), measured[large]
    labels = np.zeros_like(candidates.channels) if spec.class_agnostic else candidates.channels
    kept = suppress(measured, candidates.scores, labels=labels, rule=_suppression(spec))
    return candidates.take(kept if profile.sort_by_score else np.sort(kept))


def _suppression(spec: DecodeSpec) -> Suppression:
    return Suppression(
        iou_threshold=spec.iou_threshold,
        limit=spec.max_detections,
        iou_offset=spec.profile.iou_offset,
        keep_ties=spec.profile.keep_ties,
    )


def _clip_to(boxes: NDArray[np.float32], width: float, height: float) -> NDArray[np.float32]:
    # In two steps, which NumPy does faster than one np.clip.
    clipped: NDArray[np.float32] = np.maximum(boxes, np.float32(0))
    np.minimum(clipped, np.array([width, height, width, height], np.float32), out=clipped)
    return clipped


# Largest x and y of boxes before suppression, for the size (H, W) of the input.
_CLIPS: dict[BoxClip, Callable[[tuple[int, int], Letterbox], tuple[int, int] | None]] = {
    BoxClip.NONE: lambda _size, _box: None,
    BoxClip.INPUT: lambda size, _box: (size[1], size[0]),
    BoxClip.IMAGE: lambda _size, box: (box.resized_width, box.resized_height),
    BoxClip.IMAGE_MINUS_ONE: lambda _size, box: (box.resized_width - 1, box.resized_height - 1),
}
_NO_CLIP = (-1, -1)  # of host.c


def _finish(candidates: Candidates, spec: DecodeSpec, letterbox: Letterbox) -> Detections:
    """To image pixels, with the final clip and filter where the profile has them, and labels for channels."""
    boxes = letterbox.to_image(candidates.boxes)
    if spec.profile.box_filter is BoxFilter.AFTER_FINAL_CLIP:
        boxes = _clip_to(boxes, letterbox.image_width, letterbox.image_height)
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        candidates, boxes = candidates.take(solid), boxes[solid]
    return Detections(boxes, candidates.scores, _labels(candidates.channels, spec))


def _labels(channels: NDArray[Any], spec: DecodeSpec) -> NDArray[np.int64]:
    return np.array(spec.label_map, np.int64)[channels] if spec.label_map else channels.astype(np.int64)
