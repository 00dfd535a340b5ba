"""From head outputs to the best pairs of location and class of each level, in fixed shapes (spec 10.1, 10.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import MAX_TOP_K, BoxClip, BoxFilter, DecodeSpec, NmsSpace, PostprocessProfile, ScoreForm
from fcos_deploy.core.enums import CenterMode, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import InputDtype, PreprocessSpec
from fcos_deploy.model.fcos import LevelOutput, flatten_levels

__all__ = [
    "Candidates",
    "ExportableFcos",
    "GreedyNms",
    "StaticNms",
    "StaticNmsResult",
    "Suppression",
    "decode_boxes",
    "greedy_keep",
    "select_candidates",
    "suppress",
]


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
    if profile.rank_per_location:
        best = _best_locations(rank, count=min(spec.pre_nms_top_k, locations, MAX_TOP_K))
        passed = torch.logical_and(passed, best)
    ranked = torch.where(passed, rank, -1.0).flatten(1)
    values, flat = torch.topk(ranked, spec.candidates_per_level(locations, classes=classes), dim=1)
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


class Suppression(Protocol):
    """Which candidates survive: a (n, K) bool mask; only those with a score above 0 take part."""

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Tensor:
        """``limit``: the most detections that will be kept of an image."""
        ...


def suppress(
    candidates: Candidates, image_sizes: Tensor | None, *, spec: DecodeSpec, suppression: Suppression
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (n, D, 4), scores (n, D), labels (n, D) int32 and their count (n, 1) int32, D = ``max_detections``.

    Boxes stay in network-input pixels. Rows after the count are zeros with label -1. Order: best score first, or
    candidate order where the profile does not sort.

    Raises:
        ConfigError: the profile works in image pixels and ``image_sizes`` is None.
    """
    profile = spec.profile
    boxes = _clip(candidates.boxes, image_sizes, clip=profile.clip)
    measured = _in_nms_space(boxes, image_sizes, spec=spec)
    scores = candidates.scores
    if profile.box_filter is BoxFilter.BEFORE_NMS:
        shortest = (measured[..., 2:] - measured[..., :2]).amin(2)
        scores = torch.where(shortest > 0, scores, -1.0)
    keep = suppression(
        candidates._replace(boxes=measured, scores=scores), iou_threshold=spec.iou_threshold, limit=spec.max_detections
    )
    return _pad(candidates._replace(boxes=boxes, scores=torch.where(keep, scores, -1.0)), spec=spec)


def _sizes(image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Resized and original size, each (n, 1, 4) float32 as width, height, width, height."""
    if image_sizes is None:
        raise ConfigError("This profile clips or suppresses in image pixels.", hint="give image_sizes")
    resized, original = (
        torch.index_select(image_sizes, 1, torch.tensor(columns, device=image_sizes.device)).unsqueeze(1)
        for columns in ([1, 0, 1, 0], [3, 2, 3, 2])
    )
    return resized, original


def _clip(boxes: Tensor, image_sizes: Tensor | None, *, clip: BoxClip) -> Tensor:
    if clip is BoxClip.NONE:
        return boxes
    resized, __suppress = _sizes(image_sizes)
    limit = resized - 1.0 if clip is BoxClip.IMAGE_MINUS_ONE else resized
    return torch.minimum(boxes.clamp(min=0.0), limit)


def _in_nms_space(boxes: Tensor, image_sizes: Tensor | None, *, spec: DecodeSpec) -> Tensor:
    """Boxes in the pixels in which overlaps are measured, widened by the profile's ``iou_offset``."""
    if spec.profile.nms_space is NmsSpace.ORIGINAL:
        resized, original = _sizes(image_sizes)
        boxes = boxes * (original / resized)
    if spec.profile.iou_offset:
        # Widths and heights of x2 - x1 + offset are those of a box whose far corner lies offset further.
        boxes = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device) * spec.profile.iou_offset
    return boxes


def _pad(survivors: Candidates, *, spec: DecodeSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Rows that lose against every survivor, so that there are always enough to choose from.
    filler = torch.full_like(survivors.scores[:, :1], -1.0).expand(-1, spec.max_detections)
    scores, chosen = torch.topk(torch.cat((survivors.scores, filler), 1), spec.max_detections, dim=1)
    if not spec.profile.sort_by_score:
        position = torch.where(scores > 0, -chosen.to(torch.float32), -torch.inf)
        order = torch.topk(position, spec.max_detections, dim=1).indices
        scores, chosen = torch.gather(scores, 1, order), torch.gather(chosen, 1, order)
    valid = scores > 0
    chosen = torch.where(valid, chosen, 0)
    boxes = torch.gather(survivors.boxes, 1, chosen.unsqueeze(2).expand(-1, -1, 4))
    labels = torch.gather(survivors.labels, 1, chosen)
    return (
        torch.where(valid.unsqueeze(2), boxes, 0.0),
        torch.where(valid, scores, 0.0),
        torch.where(valid, labels, -1).to(torch.int32),
        valid.sum(1, keepdim=True).to(torch.int32),
    )


def greedy_keep(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression of each class of each image, exact.

    boxes: (n, K, 4) float32 xyxy. scores: (n, K) float32; those not above 0 take no part. labels: (n, K) int64.

    Returns:
        (n, K) bool. Of two equal scores the earlier one goes first; suppressed if IoU > ``iou_threshold``, strictly.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(scores.shape[0]):
        order = torch.argsort(scores[image], descending=True, stable=True)
        rest = order[scores[image][order] > 0]
        while len(rest):
            best, rest = rest[0], rest[1:]
            keep[image, best] = True
            overlap = _iou(boxes[image, best], boxes[image, rest]) > iou_threshold
            rest = rest[~(overlap & (labels[image, rest] == labels[image, best]))]
    return keep


def _iou(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box (4,) with others (m, 4), xyxy -> (m,)."""
    sides = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    inter = sides[:, 0] * sides[:, 1]
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - inter
    return inter / union


@torch.library.custom_op("fcos_deploy::nms_keep", mutates_args=())
def _nms_keep(  # noqa: PLR0917  (operators of torch take their arguments by position)
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: int,  # noqa: ARG001  (needed where it becomes ONNX NonMaxSuppression)
    iou_threshold: float,
    limit: int,  # noqa: ARG001  (likewise)
) -> Tensor:
    """``greedy_keep`` as one opaque operator, which the exporter writes as ONNX NonMaxSuppression."""
    return greedy_keep(boxes, scores, labels, iou_threshold)


@_nms_keep.register_fake
def __suppress(_boxes: Tensor, scores: Tensor, *__suppress: object) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


class GreedyNms:
    """Suppression by the reference algorithm; ONNX NonMaxSuppression when exported."""

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Tensor:
        """(n, K) bool."""
        boxes, scores, labels, classes = candidates
        keep: Tensor = torch.ops.fcos_deploy.nms_keep(boxes, scores, labels, classes, iou_threshold, limit)
        return keep


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


class ExportableFcos(nn.Module):
    """``model`` between the contract's input tensor and the outputs of the contract's tail.

    ``model`` maps normalised images (n, 3, H, W) float32 to one ``LevelOutput`` a level. ``suppression`` is how the
    nms tail suppresses; ``with_raw`` appends the raw tail's outputs to those of the other two.
    """

    def __init__(
        self,
        model: nn.Module,
        contract: ModelContract,
        *,
        suppression: Suppression | None = None,
        with_raw: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.contract = contract
        self.normalize = _Normalize(contract.preprocess)
        self._suppression = GreedyNms() if suppression is None else suppression
        self._with_raw = with_raw and contract.tail is not Tail.RAW

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the arguments of ``forward``."""
        return tuple(spec.name for spec in self.contract.input_specs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the tensors that ``forward`` returns."""
        raw = ("cls_logits", "distances", "centerness") if self._with_raw else ()
        return (*self.contract.outputs, *raw)

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images (n, 3, H, W) in the contract's input dtype -> the tensors that ``contract.outputs`` names.

        image_sizes: (n, 4) float32, resized height and width, original height and width; only where
        ``contract.needs_image_sizes``.
        """
        levels: Sequence[LevelOutput] = self.model(self.normalize(images))
        height, width = images.shape[2], images.shape[3]
        tail = _TAILS[self.contract.tail](self, list(levels), (height, width), image_sizes)
        return (*tail, *flatten_levels(list(levels))) if self._with_raw else tail

    def _raw(
        self, levels: list[LevelOutput], _input_size: tuple[int, int], _image_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        return flatten_levels(levels)

    def _candidates(
        self, levels: list[LevelOutput], input_size: tuple[int, int], _image_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        found = self._select(levels, input_size)
        return found.boxes, found.scores, found.labels.to(torch.int32)

    def _nms(
        self, levels: list[LevelOutput], input_size: tuple[int, int], image_sizes: Tensor | None
    ) -> tuple[Tensor, ...]:
        return suppress(
            self._select(levels, input_size), image_sizes, spec=self.contract.decode, suppression=self._suppression
        )

    def _select(self, levels: list[LevelOutput], input_size: tuple[int, int]) -> Candidates:
        return select_candidates(levels, input_size, spec=self.contract.decode)

    @property
    def profile(self) -> PostprocessProfile:
        """The post-processing that the tail follows."""
        return self.contract.decode.profile


_TailFn = Callable[[ExportableFcos, list[LevelOutput], tuple[int, int], "Tensor | None"], tuple[Tensor, ...]]
_TAILS: dict[Tail, _TailFn] = {
    Tail.RAW: ExportableFcos._raw,
    Tail.CANDIDATES: ExportableFcos._candidates,
    Tail.NMS: ExportableFcos._nms,
}


class _Normalize(nn.Module):
    """``(pixel / pixel_scale - mean) / std`` for uint8 input; float32 input was normalised by the host."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self._in_graph = spec.input_dtype is InputDtype.UINT8
        mean = torch.tensor(spec.mean, dtype=torch.float64) * spec.pixel_scale
        inverse_std = 1.0 / (torch.tensor(spec.std, dtype=torch.float64) * spec.pixel_scale)
        self.register_buffer("mean", mean.to(torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("inverse_std", inverse_std.to(torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) as the contract has it -> (n, 3, H, W) float32, normalised."""
        if not self._in_graph:
            return images
        return (images.to(torch.float32) - self.mean) * self.inverse_std
