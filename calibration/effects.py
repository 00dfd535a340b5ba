"""What a quantized graph does to detections, seen in its raw outputs: classes, boxes and centerness apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DetectionEffect", "EffectMeter"]

# A location takes part in a detection from about this probability on.
_FOREGROUND = 0.05


@dataclass(frozen=True, slots=True)
class DetectionEffect:
    """Root mean square errors over the locations that see an object.

    ``classes``, ``centerness``: of probabilities. ``boxes``: of distances, as a share of the box's size.
    """

    classes: float
    boxes: float
    centerness: float

    @property
    def total(self) -> float:
        """One number to rank by: a box side off by 1 % weighs as much as a probability off by 0.01."""
        return float(np.sqrt(self.classes**2 + self.boxes**2 + self.centerness**2))


class EffectMeter:
    """Accumulates over images."""

    def __init__(self) -> None:
        self._squares = np.zeros(3)
        self._count = 0

    def add(self, reference: Mapping[str, NDArray[Any]], result: Mapping[str, NDArray[Any]]) -> None:
        """Compare the raw outputs (``ModelContract``, tail raw) of one run."""
        wanted, got = _sigmoid(reference["cls_logits"]), _sigmoid(result["cls_logits"])
        seen = np.maximum(wanted, got).max(2) > _FOREGROUND  # (n, L)
        if not seen.any():
            return
        distances = reference["distances"].astype(np.float64)
        size = np.maximum((distances[..., :2] + distances[..., 2:])[seen], 1.0)  # (m, 2) width and height
        error = (result["distances"] - distances)[seen] / np.concatenate([size, size], 1)
        centerness = (_sigmoid(result["centerness"]) - _sigmoid(reference["centerness"]))[seen]
        self._squares += [
            np.square((got - wanted)[seen]).max(1).sum(),
            np.square(error).mean(1).sum(),
            np.square(centerness).sum(),
        ]
        self._count += int(seen.sum())

    @property
    def effect(self) -> DetectionEffect:
        """Of everything added; zeros when no location saw an object."""
        return DetectionEffect(*(float(v) for v in np.sqrt(self._squares / max(self._count, 1))))


def _sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    positive: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
    return positive
