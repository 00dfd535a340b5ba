"""From head outputs to the best pairs of location and class of each level, on the host (spec 10.1, 10.2).

A head at 640 x 640 with 80 classes gives 682,000 logits, of which a few hundred matter. They are found by comparing
logits with the inverse of the score threshold; only what passes is ever turned into a probability.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.decode_spec import DecodeSpec
from fcos_deploy.core.errors import TensorMismatchError
from fcos_deploy.core.locations import CenterMode, level_sizes, location_centers
from fcos_deploy.core.ordering import best_of_groups
from fcos_deploy.core.prefilter import SCORE_FORMS, passing_pairs, sigmoid

__all__ = ["Candidates", "HeadOutputs", "decode"]


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
    profile = spec.profile
    classes = head.cls_logits.shape[1]
    quality = sigmoid(head.centerness.reshape(-1))
    flat = passing_pairs(head.cls_logits, quality, levels=levels, spec=spec)
    location, channels = np.divmod(flat, classes)
    p, q = sigmoid(head.cls_logits[location, channels]), quality[location]
    passed = SCORE_FORMS[profile.gate](p, q) > np.float32(spec.score_threshold)
    location, channels, p, q = location[passed], channels[passed], p[passed], q[passed]
    best = _best_of_levels(location, SCORE_FORMS[profile.rank](p, q), levels=levels, spec=spec)
    best = best if profile.sort_by_score else np.sort(best)
    location, channels = location[best], channels[best]
    scores = SCORE_FORMS[profile.score](p[best], q[best])
    centers = _centers(input_size, spec.strides, profile.centers)
    return Candidates(_boxes(location, head.distances, centers=centers), scores, channels)


def _best_of_levels(
    location: NDArray[np.intp], rank: NDArray[np.float32], *, levels: tuple[tuple[int, int], ...], spec: DecodeSpec
) -> NDArray[np.intp]:
    """Indices into ``location``, which ascends: levels in order, best rank first within a level."""
    limit = None if spec.profile.rank_per_location else spec.pre_nms_top_k  # locations were chosen before
    ends = np.searchsorted(location, [end for _, end in levels]).tolist()
    return best_of_groups(rank, ends, limit=limit)


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
    wanted = {"distances": (locations, 4), "centerness": (locations, 1)}
    got = {"distances": head.distances.shape, "centerness": head.centerness.shape}
    if got != wanted or head.cls_logits.shape[:1] != (locations,) or head.cls_logits.ndim != 2:
        shapes = {"cls_logits": head.cls_logits.shape, **got}
        raise TensorMismatchError(
            f"Head outputs of a {input_size[0]}x{input_size[1]} input must have {locations} locations, got {shapes}.",
            hint="do the contract's strides belong to this model?",
        )
