"""From a graph's outputs to detections in image pixels, whichever tail the graph has."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import BoxClip, BoxFilter, Candidates, DecodeSpec, HeadOutputs, NmsSpace, decode
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import BackendError, TensorMismatchError
from fcos_deploy.core.nms import Suppression, suppress
from fcos_deploy.core.preprocess import Letterbox

__all__ = ["image_sizes_row", "postprocess"]

_LOG = logging.getLogger(__name__)

Outputs = Mapping[str, NDArray[Any]]


def image_sizes_row(letterbox: Letterbox) -> NDArray[np.float32]:
    """(4,) float32 resized height, resized width, original height, original width: a row of ``image_sizes``."""
    sizes = (letterbox.resized_height, letterbox.resized_width, letterbox.image_height, letterbox.image_width)
    return np.array(sizes, np.float32)


def postprocess(
    outputs: Outputs, contract: ModelContract, *, index: int, input_size: tuple[int, int], letterbox: Letterbox
) -> Detections:
    """Detections of image ``index`` of a batch, in image pixels, with ``label_map`` applied.

    ``outputs`` are those of ``contract.tail``; nothing in the result shares memory with them. ``input_size`` is the
    padded (H, W) of the batch.

    Raises:
        TensorMismatchError: an output is missing or its shape does not fit.
        BackendError: an output is not finite. A NaN passes no threshold, so that it would look like an empty image.
    """
    missing = sorted(set(contract.outputs) - set(outputs))
    if missing:
        raise TensorMismatchError(f"The outputs must be {sorted(contract.outputs)}, {missing} are missing.")
    of_image: Outputs = {name: outputs[name][index] for name in contract.outputs}
    if contract.tail is Tail.NMS:  # Rows beyond the count are not written by every runtime.
        of_image = _used_rows(of_image)
    for name, array in of_image.items():
        _check_finite(name, array, index=index)
    with np.errstate(over="ignore"):  # The sum of two finite halves may not be one.
        candidates = _candidates(of_image, contract, input_size)
        if contract.tail is not Tail.NMS:
            candidates = _suppressed(candidates, contract.decode, input_size, letterbox)
        return _finish(candidates, contract.decode, letterbox)


def _check_finite(name: str, array: NDArray[Any], *, index: int) -> None:
    if array.dtype == np.float16:
        # NumPy tests halves one by one in software; infinity and NaN are those whose exponent bits are all set.
        finite = int((array.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0)) < 0x7C00
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
    """The nms tail's outputs without the padding after the last detection.

    Raises:
        TensorMismatchError: the count does not fit.
    """
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
    profile = spec.profile
    boxes = _CLIPS[profile.clip](candidates.boxes, input_size, letterbox)
    candidates = Candidates(boxes, candidates.scores, candidates.channels)
    measured = letterbox.to_image(boxes) if profile.nms_space is NmsSpace.ORIGINAL else boxes
    if profile.box_filter is BoxFilter.BEFORE_NMS:
        x1, y1, x2, y2 = measured.T
        large = (x2 - x1 > spec.min_box_size) & (y2 - y1 > spec.min_box_size)
        candidates, measured = candidates.take(large), measured[large]
    rule = Suppression(
        iou_threshold=spec.iou_threshold,
        limit=spec.max_detections,
        iou_offset=profile.iou_offset,
        keep_ties=profile.keep_ties,
    )
    labels = np.zeros_like(candidates.channels) if spec.class_agnostic else candidates.channels
    kept = suppress(measured, candidates.scores, labels=labels, rule=rule)
    return candidates.take(kept if profile.sort_by_score else np.sort(kept))


def _clip_to(boxes: NDArray[np.float32], width: float, height: float) -> NDArray[np.float32]:
    # In two steps, which NumPy does faster than one np.clip.
    clipped: NDArray[np.float32] = np.maximum(boxes, np.float32(0))
    np.minimum(clipped, np.array([width, height, width, height], np.float32), out=clipped)
    return clipped


_CLIPS: dict[BoxClip, Callable[[NDArray[np.float32], tuple[int, int], Letterbox], NDArray[np.float32]]] = {
    BoxClip.NONE: lambda boxes, _size, _box: boxes,
    BoxClip.INPUT: lambda boxes, size, _box: _clip_to(boxes, size[1], size[0]),
    BoxClip.IMAGE: lambda boxes, _size, box: _clip_to(boxes, box.resized_width, box.resized_height),
    BoxClip.IMAGE_MINUS_ONE: lambda boxes, _size, box: _clip_to(boxes, box.resized_width - 1, box.resized_height - 1),
}


def _finish(candidates: Candidates, spec: DecodeSpec, letterbox: Letterbox) -> Detections:
    """To image pixels, with the final clip and filter where the profile has them, and labels for channels."""
    boxes = letterbox.to_image(candidates.boxes)
    if spec.profile.box_filter is BoxFilter.AFTER_FINAL_CLIP:
        boxes = _clip_to(boxes, letterbox.image_width, letterbox.image_height)
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        candidates, boxes = candidates.take(solid), boxes[solid]
    channels = candidates.channels
    labels = _label_array(spec.label_map)[channels] if spec.label_map else channels.astype(np.int64)
    return Detections(boxes, candidates.scores, labels)


@functools.lru_cache(maxsize=16)
def _label_array(label_map: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(label_map, np.int64)
