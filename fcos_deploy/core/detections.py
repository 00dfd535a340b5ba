"""Boxes, scores and labels of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError

__all__ = ["Detections"]


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
        typed = [a.dtype.name for a in (self.boxes, self.scores, self.labels)] == ["float32", "float32", "int64"]
        if not (fits and typed):
            got = ", ".join(f"{a.dtype}{list(a.shape)}" for a in (self.boxes, self.scores, self.labels))
            raise ConfigError(f"Detections must be float32[n, 4], float32[n] and int64[n], got {got}.")

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """Those with at least this score."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])

    def to_list(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """``[{"box": [x1, y1, x2, y2], "score", "label", "name"}]``; a label without a name gets its number."""
        return [
            {
                "box": [float(v) for v in box],
                "score": float(score),
                "label": int(label),
                "name": names[label] if 0 <= label < len(names) else str(label),
            }
            for box, score, label in zip(self.boxes, self.scores, self.labels, strict=True)
        ]
