"""Suppression as a fixed sequence of plain tensor operators, for targets without an NMS operator (TensorRT-RTX, NPUs).

The survivors of greedy NMS are the only fixed point of: a box survives if and only if no better box of its class that
survives overlaps it. Starting from "all survive", every round settles at least the next link of each chain of
overlaps, so after r rounds the result is exact where no chain of boxes, each deciding about the next, is longer than r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.model.candidates import MAX_TOP_K, Candidates

__all__ = ["StaticNms", "StaticNmsResult"]


@dataclass(frozen=True, slots=True)
class StaticNmsResult:
    """keep: (n, K) bool. settled: (n,) bool, whether another round would change nothing: keep is then exact."""

    keep: Tensor
    settled: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticNms:
    """Greedy NMS of the ``boxes`` best candidates in at most ``rounds`` rounds.

    Exact when ``StaticNmsResult.settled``, and either no more than ``boxes`` candidates passed the gate or
    ``max_detections`` of the best ``boxes`` survive. The cost is ``boxes`` squared for each round and image.
    """

    boxes: int = 1000
    rounds: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.boxes <= MAX_TOP_K or self.rounds < 1:
            raise ConfigError(
                f"Static NMS takes 1 to {MAX_TOP_K} boxes and at least 1 round, got {self.boxes} and {self.rounds}."
            )

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Tensor:  # noqa: ARG002
        """(n, K) bool."""
        return self.run(candidates, iou_threshold=iou_threshold).keep

    def run(self, candidates: Candidates, *, iou_threshold: float) -> StaticNmsResult:
        """Suppress, and say whether the rounds sufficed."""
        count = min(self.boxes, candidates.scores.shape[1])
        scores, chosen = torch.topk(candidates.scores, count, dim=1)
        boxes = torch.gather(candidates.boxes, 1, chosen.unsqueeze(2).expand(-1, -1, 4))
        labels = torch.gather(candidates.labels, 1, chosen)
        decides = _decides(boxes, labels, iou_threshold=iou_threshold)
        alive = (scores > 0).to(torch.float32)
        keep = alive
        for _ in range(self.rounds):
            keep = alive * _unopposed(decides, keep)
        after = alive * _unopposed(decides, keep)
        mask = torch.zeros_like(candidates.scores).scatter(1, chosen, keep)
        return StaticNmsResult(mask > 0.5, (after == keep).all(1))


def _decides(boxes: Tensor, labels: Tensor, *, iou_threshold: float) -> Tensor:
    """(n, m, m) float32: 1 where box j (column) is better than box i (row), of its class, and overlaps it too much."""
    corner_low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    corner_high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    sides = (corner_high - corner_low).clamp(min=0.0)
    inter = sides[..., 0] * sides[..., 1]
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    union = area[:, :, None] + area[:, None, :] - inter
    # A product instead of a quotient: 0 / 0 of two empty boxes would be NaN, and NPUs divide badly.
    overlaps = inter > iou_threshold * union
    same = labels[:, :, None] == labels[:, None, :]
    position = torch.arange(boxes.shape[1], device=boxes.device)
    better = position[None, :] < position[:, None]
    return torch.logical_and(torch.logical_and(overlaps, same), better).to(torch.float32)


def _unopposed(decides: Tensor, keep: Tensor) -> Tensor:
    """(n, m) float32: 1 where no surviving box decides against a box."""
    against = torch.matmul(decides, keep.unsqueeze(2)).squeeze(2)
    return (against < 0.5).to(torch.float32)
