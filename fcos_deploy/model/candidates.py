"""From head outputs to the best pairs of location and class of each level, in fixed shapes (spec 10.1, 10.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fcos_deploy.core.decode_spec import DecodeSpec, ScoreForm
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.model.head import LevelOutput

__all__ = ["MAX_TOP_K", "Candidates", "decode_boxes", "select_candidates"]

MAX_TOP_K = 3840  # TensorRT refuses a larger K in TopK.


class Candidates(NamedTuple):
    """The pairs that may become detections, K of them, levels in order.

    Within a level the best rank comes first, or, where the profile does not sort by score, the first position.
    boxes: (n, K, 4) float32 xyxy, network-input pixels, not clipped.
    scores: (n, K) float32, -1 where the gate did not pass.
    labels: (n, K) int64 class channels. classes: how many channels there are.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    classes: int


_FORMS: dict[ScoreForm, Callable[[Tensor, Tensor], Tensor]] = {
    ScoreForm.P: lambda p, _q: p,
    ScoreForm.PQ: lambda p, q: p * q,
    ScoreForm.SQRT_PQ: lambda p, q: torch.sqrt(p * q),
}


def select_candidates(levels: list[LevelOutput], input_size: tuple[int, int], *, spec: DecodeSpec) -> Candidates:
    """The ``pre_nms_top_k`` best pairs of every level; ``input_size`` is (H, W) of the padded network input."""
    found = [
        _select_level(level, input_size, stride=stride, spec=spec)
        for level, stride in zip(levels, spec.strides, strict=True)
    ]
    boxes, scores, labels = (torch.cat(parts, 1) for parts in list(zip(*found, strict=True))[:3])
    return Candidates(boxes, scores, labels, found[0].classes)


def _select_level(level: LevelOutput, input_size: tuple[int, int], *, stride: int, spec: DecodeSpec) -> Candidates:
    profile = spec.profile
    p, q = _by_location(level.cls_logits).sigmoid(), _by_location(level.centerness).sigmoid()
    classes, locations = p.shape[2], p.shape[1]
    rank = _FORMS[profile.rank](p, q)
    gate = rank if profile.gate is profile.rank else _FORMS[profile.gate](p, q)
    passed = gate > spec.score_threshold
    pairs = min(spec.pre_nms_top_k, locations * classes)
    if profile.rank_per_location:
        best = _best_locations(rank, count=min(spec.pre_nms_top_k, locations, MAX_TOP_K))
        passed = torch.logical_and(passed, best)
        pairs = min(MAX_TOP_K, min(spec.pre_nms_top_k, locations) * classes)
    ranked = torch.where(passed, rank, -1.0).flatten(1)
    values, flat = torch.topk(ranked, min(pairs, MAX_TOP_K), dim=1)
    values, flat = (values, flat) if profile.sort_by_score else _by_position(values, flat)
    location, label = _unravel(flat, classes)
    scores = values if profile.score is profile.rank else _scores(p, q, flat, location, values, form=profile.score)
    boxes = decode_boxes(level, input_size, stride=stride, mode=profile.centers)
    return Candidates(torch.gather(boxes, 1, location.unsqueeze(2).expand(-1, -1, 4)), scores, label, classes)


def _by_location(level_map: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h * w, c), row by row."""
    return level_map.flatten(2).transpose(1, 2)


def _best_locations(rank: Tensor, *, count: int) -> Tensor:
    """(n, h * w, 1) bool: the ``count`` locations whose best class ranks highest (mmdetection 2)."""
    best = rank.amax(2)
    chosen = torch.topk(best, count, dim=1).indices
    mask = torch.zeros_like(best).scatter(1, chosen, 1.0)
    return (mask > 0.5).unsqueeze(2)


def _by_position(values: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Both (n, K) in the order of ``flat``."""
    # As float32, which every runtime sorts; exact to 2^24 pairs, those of a level of 13 million pixels and 80 classes.
    order = torch.topk(-flat.to(torch.float32), flat.shape[1], dim=1).indices
    return torch.gather(values, 1, order), torch.gather(flat, 1, order)


def _unravel(flat: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Index ``location * classes + label`` -> location, label; both (n, K) int64."""
    location: Tensor = torch.ops.fcos_deploy.divide(flat, classes)
    return location, flat - location * classes


@torch.library.custom_op("fcos_deploy::divide", mutates_args=())
def _divide(index: Tensor, divisor: int) -> Tensor:
    """``index // divisor`` of numbers >= 0; the exporter would write six operators to round negative ones down."""
    return index // divisor


@_divide.register_fake
def _(index: Tensor, _divisor: int) -> Tensor:
    return torch.empty_like(index)


def _scores(p: Tensor, q: Tensor, flat: Tensor, location: Tensor, values: Tensor, *, form: ScoreForm) -> Tensor:
    chosen_p = torch.gather(p.flatten(1), 1, flat)
    chosen_q = torch.gather(q.flatten(1), 1, location)
    return torch.where(values >= 0, _FORMS[form](chosen_p, chosen_q), -1.0)


def decode_boxes(level: LevelOutput, input_size: tuple[int, int], *, stride: int, mode: CenterMode) -> Tensor:
    """Boxes (n, h * w, 4) float32 xyxy in network-input pixels of all locations of one level."""
    distances = _by_location(level.distances)
    rows, columns = level.distances.shape[2], level.distances.shape[3]
    step_y, step_x = _STEPS[mode](input_size, (rows, columns), stride)
    y = (torch.arange(rows, dtype=torch.float32, device=distances.device) + _OFFSETS[mode]) * step_y
    x = (torch.arange(columns, dtype=torch.float32, device=distances.device) + _OFFSETS[mode]) * step_x
    grid = torch.stack((x.expand(rows, columns), y[:, None].expand(rows, columns)), 2).view(1, rows * columns, 2)
    outward = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=distances.device)
    return torch.cat((grid, grid), 2) + distances * outward


_STEPS: dict[CenterMode, Callable[[tuple[int, int], tuple[int, int], int], tuple[int, int]]] = {
    CenterMode.HALF: lambda _input, _grid, stride: (stride, stride),
    # Padded size // grid size, in integers: on P6 and P7 this is not the stride (spec 10.2).
    CenterMode.TORCHVISION: lambda size, grid, _stride: (size[0] // grid[0], size[1] // grid[1]),
}
_OFFSETS: dict[CenterMode, float] = {CenterMode.HALF: 0.5, CenterMode.TORCHVISION: 0.0}
