"""What follows the network in an exported graph: its tail.

``raw`` concatenates the levels. ``candidates`` adds the gate, the top-k of every level and the decoded boxes. ``nms``
adds clipping, suppression and padding. No shape depends on the values of a tensor, so that every runtime can plan its
memory ahead. ``fcos_deploy.core.detections`` does on the host what a tail leaves out, with the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fcos_deploy.core import detections
from fcos_deploy.core.contract import SOURCE_OUTPUTS, ModelContract
from fcos_deploy.core.decode import (
    ALL_CANDIDATES,
    MAX_TOP_K,
    BoxClip,
    BoxFilter,
    DecodeSpec,
    NmsSpace,
    ScoreForm,
    level_sizes,
)
from fcos_deploy.core.enums import CenterMode, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import InputDtype, PreprocessSpec
from fcos_deploy.model.fcos import LevelOutput, flatten_levels

__all__ = [
    "Candidates",
    "ExportableFcos",
    "StaticNms",
    "Suppression",
    "Survivors",
    "decode_boxes",
    "greedy_nms",
    "select_candidates",
    "suppress",
]


class Candidates(NamedTuple):
    """The pairs of location and class that may become detections, K of them, levels in order.

    Within a level the best rank comes first, or, where the profile does not sort by score, the first position.
    boxes: (n, K, 4) float32 xyxy, network-input pixels, not clipped.
    scores: (n, K) float32, -1 where the gate did not pass.
    labels: (n, K) int64 class channels. classes: how many channels there are.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    classes: int


class Survivors(NamedTuple):
    """``keep``: (n, K) bool. ``settled``: (n, 1) bool, whether they are those of greedy suppression for certain."""

    keep: Tensor
    settled: Tensor


class Suppression(Protocol):
    """Which candidates survive. Only those with a score above 0 take part."""

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Survivors:
        """``limit``: the most detections that will be kept of an image."""
        ...


class ExportableFcos(nn.Module):
    """``model`` between the contract's input tensor and the outputs of the contract's tail.

    ``model`` maps normalised images (n, 3, H, W) float32 to one ``LevelOutput`` a level. ``suppression`` is how the
    nms tail suppresses, ``greedy_nms`` by default. ``with_sources`` appends what a tail's outputs are made from, for
    checks: the raw tail's outputs, and before them, of the nms tail, the candidates.

    Raises:
        ConfigError: the contract asks for more than a tail of fixed shapes has room for.
    """

    def __init__(
        self,
        model: nn.Module,
        contract: ModelContract,
        *,
        suppression: Suppression | None = None,
        with_sources: bool = False,
    ) -> None:
        super().__init__()
        _require_room(contract)
        self.model = model
        self.contract = contract
        self.normalize = _Normalize(contract.preprocess)
        self._suppression = suppression or greedy_nms
        self._with_sources = with_sources and contract.tail is not Tail.RAW

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the arguments of ``forward``."""
        return tuple(spec.name for spec in self.contract.input_specs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the tensors that ``forward`` returns."""
        return (*self.contract.outputs, *(SOURCE_OUTPUTS[self.contract.tail] if self._with_sources else ()))

    def forward(self, images: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Images (n, 3, H, W) in the contract's input dtype -> the tensors that ``output_names`` names.

        image_sizes: (n, 4) float32, resized height and width, original height and width; only where
        ``ModelContract.needs_image_sizes``.
        """
        levels: list[LevelOutput] = list(self.model(self.normalize(images)))
        if self.contract.tail is Tail.RAW:
            return flatten_levels(levels)
        spec = self.contract.decode
        input_size = (images.shape[2], images.shape[3])
        candidates = select_candidates(levels, input_size, spec=spec)
        selected = (candidates.boxes, candidates.scores, candidates.labels.to(torch.int32))
        if self.contract.tail is Tail.CANDIDATES:
            return (*selected, *flatten_levels(levels)) if self._with_sources else selected
        outputs = suppress(candidates, image_sizes, input_size, spec=spec, suppression=self._suppression)
        outputs = outputs[: len(self.contract.outputs)]  # without ``settled``, where the contract has none
        return (*outputs, *selected, *flatten_levels(levels)) if self._with_sources else outputs


def _require_room(contract: ModelContract) -> None:
    """Refuse what a tail would leave out without a word.

    Raises:
        ConfigError: a level may have more candidates, or an image more detections, than a top-k takes.
    """
    tail, spec = contract.tail, contract.decode
    if tail is Tail.RAW:
        return
    requested = spec.pre_nms_top_k
    if contract.preprocess.canvas is not None:
        height, width = level_sizes(*contract.preprocess.canvas, strides=spec.strides)[0]
        ranked = height * width * (1 if spec.profile.rank_per_location else len(contract.channel_names))
        requested = min(requested, ranked)
    if requested > MAX_TOP_K:
        count = "any number of" if requested == ALL_CANDIDATES else requested
        raise ConfigError(
            f"A level may have {count} candidates, and the tail '{tail}' takes at most {MAX_TOP_K} of a level.",
            hint=f"--pre-nms-top-k {MAX_TOP_K}, or --tail raw, which has no limit",
        )
    if tail is Tail.NMS and spec.max_detections > MAX_TOP_K:
        raise ConfigError(
            f"The tail 'nms' gives at most {MAX_TOP_K} detections of an image, {spec.max_detections} were asked for.",
            hint=f"--max-detections {MAX_TOP_K}, or --tail candidates",
        )


class _Normalize(nn.Module):
    """``(pixel / pixel_scale - mean) / std`` for uint8 input; float32 input was normalised by the host."""

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, spec: PreprocessSpec) -> None:
        super().__init__()
        self._in_graph = spec.input_dtype is InputDtype.UINT8
        self._is_unit = all(std * spec.pixel_scale == 1 for std in spec.std)
        # (x / s - m) / d = (x - m s) / (d s): one subtraction and one product, rounded once from float64.
        mean = torch.tensor(spec.mean, dtype=torch.float64) * spec.pixel_scale
        inverse_std = 1.0 / (torch.tensor(spec.std, dtype=torch.float64) * spec.pixel_scale)
        self.register_buffer("mean", mean.to(torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("inverse_std", inverse_std.to(torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) as the contract has it -> (n, 3, H, W) float32, normalised."""
        if not self._in_graph:
            return images
        centred = images.to(torch.float32) - self.mean
        return centred if self._is_unit else centred * self.inverse_std


# ---- candidates: gate, top-k of a level, box decode ----

_SCORE_FORMS: dict[ScoreForm, Callable[[Tensor, Tensor], Tensor]] = {
    ScoreForm.P: lambda p, _q: p,
    ScoreForm.PQ: lambda p, q: p * q,
    ScoreForm.SQRT_PQ: lambda p, q: torch.sqrt(p * q),
}


def select_candidates(levels: list[LevelOutput], input_size: tuple[int, int], *, spec: DecodeSpec) -> Candidates:
    """The ``pre_nms_top_k`` best pairs of every level; ``input_size`` is (H, W) of the padded network input."""
    selected = [
        _select_level(level, input_size, stride=stride, spec=spec)
        for level, stride in zip(levels, spec.strides, strict=True)
    ]
    boxes, scores, labels = (torch.cat(parts, 1) for parts in list(zip(*selected, strict=True))[:3])
    return Candidates(boxes, scores, labels, selected[0].classes)


def _select_level(level: LevelOutput, input_size: tuple[int, int], *, stride: int, spec: DecodeSpec) -> Candidates:
    profile = spec.profile
    p, q = _by_location(level.cls_logits).sigmoid(), _by_location(level.centerness).sigmoid()
    locations, classes = p.shape[1], p.shape[2]
    rank = _SCORE_FORMS[profile.rank](p, q)
    gate = rank if profile.gate is profile.rank else _SCORE_FORMS[profile.gate](p, q)
    passed = gate > spec.score_threshold
    if profile.rank_per_location:
        limit = min(spec.pre_nms_top_k, MAX_TOP_K)  # min() with two arguments: see DecodeSpec.candidates_per_level
        passed = torch.logical_and(passed, _best_locations(rank, count=min(limit, locations)))
    # A pair that failed the gate ranks -1, below every number >= 0: the top k of all pairs are then those that
    # "threshold, then top k" of the original libraries gives, without a shape that depends on the data.
    ranked = torch.where(passed, rank, -1.0).flatten(1)
    values, flat = torch.topk(ranked, spec.candidates_per_level(locations, classes=classes), dim=1)
    if not profile.sort_by_score:
        # By position. As float32, which every runtime sorts; exact up to 2^24 pairs, which a level of 80 classes has
        # in an image of 13 million pixels.
        order = torch.topk(-flat.to(torch.float32), flat.shape[1], dim=1).indices
        values, flat = torch.gather(values, 1, order), torch.gather(flat, 1, order)
    location: Tensor = torch.ops.fcos_deploy.divide(flat, classes)
    scores = values
    if profile.score is not profile.rank:
        chosen_p, chosen_q = torch.gather(p.flatten(1), 1, flat), torch.gather(q.flatten(1), 1, location)
        scores = torch.where(values >= 0, _SCORE_FORMS[profile.score](chosen_p, chosen_q), -1.0)
    boxes = _rows(decode_boxes(level, input_size, stride=stride, mode=profile.centers), location)
    return Candidates(boxes, scores, flat - location * classes, classes)


@torch.library.custom_op("fcos_deploy::divide", mutates_args=())
def _divide(index: Tensor, divisor: int) -> Tensor:
    """``index // divisor`` of numbers >= 0; the exporter would write six operators to round negative ones down."""
    return index // divisor


@_divide.register_fake
def _(index: Tensor, _divisor: int) -> Tensor:
    return torch.empty_like(index)


def _by_location(level_map: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h * w, c), row by row."""
    return level_map.flatten(2).transpose(1, 2)


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """Of boxes (n, m, 4), those at ``index`` (n, K) -> (n, K, 4)."""
    return torch.gather(boxes, 1, index.unsqueeze(2).expand(-1, -1, 4))


def _best_locations(rank: Tensor, *, count: int) -> Tensor:
    """(n, h * w, 1) bool: the ``count`` locations whose best class ranks highest, as mmdetection 2 chooses them."""
    best = rank.amax(2)
    chosen = torch.topk(best, count, dim=1).indices
    mask = torch.zeros_like(best).scatter(1, chosen, 1.0)
    return (mask > 0.5).unsqueeze(2)


def decode_boxes(level: LevelOutput, input_size: tuple[int, int], *, stride: int, mode: CenterMode) -> Tensor:
    """Boxes (n, h * w, 4) float32 xyxy in network-input pixels of all locations of one level."""
    distances = _by_location(level.distances)
    rows, columns = level.distances.shape[2], level.distances.shape[3]
    if mode is CenterMode.TORCHVISION:
        # AnchorGenerator (torchvision/models/detection/anchor_utils.py): padded size // grid size and no offset. On P6
        # and P7, whose sizes are rounded up, the step is often smaller than the stride, and the weights learned it so.
        step_y, step_x, offset = input_size[0] // rows, input_size[1] // columns, 0.0
    else:
        step_y, step_x, offset = stride, stride, 0.5
    y = (torch.arange(rows, dtype=torch.float32, device=distances.device) + offset) * step_y
    x = (torch.arange(columns, dtype=torch.float32, device=distances.device) + offset) * step_x
    grid = torch.stack((x.expand(rows, columns), y[:, None].expand(rows, columns)), 2).view(1, rows * columns, 2)
    outward = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=distances.device)  # left and top are subtracted
    return torch.cat((grid, grid), 2) + distances * outward


# ---- nms: clip, suppress, pad ----


def suppress(
    candidates: Candidates,
    image_sizes: Tensor | None,
    input_size: tuple[int, int],
    *,
    spec: DecodeSpec,
    suppression: Suppression,
) -> tuple[Tensor, ...]:
    """Boxes (n, D, 4), scores (n, D), labels (n, D) int32, their count and whether the suppression settled.

    D = ``max_detections``; the last two are (n, 1) int32.

    Boxes stay in network-input pixels. Rows after the count are zeros with label -1. Order: best score first, or
    candidate order where the profile does not sort. ``input_size`` is (H, W) of the padded network input.

    Raises:
        ConfigError: the profile works in image pixels and ``image_sizes`` is None.
    """
    profile = spec.profile
    boxes, scores = candidates.boxes, candidates.scores
    if profile.clip is BoxClip.INPUT:
        x, y = boxes[..., 0::2].clamp(0, input_size[1]), boxes[..., 1::2].clamp(0, input_size[0])
        boxes = torch.stack((x, y), 3).flatten(2)
    elif profile.clip is not BoxClip.NONE:
        resized, _ = _sizes(image_sizes)
        limit = resized - 1.0 if profile.clip is BoxClip.IMAGE_MINUS_ONE else resized
        boxes = torch.minimum(boxes.clamp(min=0.0), limit)
    measured = boxes  # in the pixels in which overlaps are measured
    if profile.nms_space is NmsSpace.ORIGINAL:
        resized, original = _sizes(image_sizes)
        measured = measured * (original / resized)
    if profile.iou_offset:
        # Widths and heights of x2 - x1 + offset are those of a box whose far corner lies offset further.
        measured = measured + torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device) * profile.iou_offset
    if profile.box_filter is BoxFilter.BEFORE_NMS:
        shortest = (measured[..., 2:] - measured[..., :2]).amin(2)
        scores = torch.where(shortest > spec.min_box_size, scores, -1.0)
    rivals = candidates._replace(boxes=measured, scores=scores)
    if spec.class_agnostic:
        rivals = rivals._replace(labels=torch.zeros_like(rivals.labels), classes=1)
    keep, settled = suppression(rivals, iou_threshold=spec.iou_threshold, limit=spec.max_detections)
    survivors = candidates._replace(boxes=boxes, scores=torch.where(keep, scores, -1.0))
    return (*_padded(survivors, spec=spec), settled.to(torch.int32))


def _sizes(image_sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Resized and original size, each (n, 1, 4) float32 as width, height, width, height."""
    if image_sizes is None:
        raise ConfigError("This profile clips or suppresses in image pixels.", hint="give image_sizes")
    resized, original = (
        torch.index_select(image_sizes, 1, torch.tensor(columns, device=image_sizes.device)).unsqueeze(1)
        for columns in ([1, 0, 1, 0], [3, 2, 3, 2])
    )
    return resized, original


def _padded(survivors: Candidates, *, spec: DecodeSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ``max_detections`` best of those with a score above 0, and their count, as ``suppress`` returns them."""
    # Rows that lose against every survivor, so that top-k always has enough to choose from.
    filler = torch.full_like(survivors.scores[:, :1], -1.0).expand(-1, spec.max_detections)
    scores, chosen = torch.topk(torch.cat((survivors.scores, filler), 1), spec.max_detections, dim=1)
    if not spec.profile.sort_by_score:
        position = torch.where(scores > 0, -chosen.to(torch.float32), -torch.inf)
        order = torch.topk(position, spec.max_detections, dim=1).indices
        scores, chosen = torch.gather(scores, 1, order), torch.gather(chosen, 1, order)
    valid = scores > 0
    chosen = torch.where(valid, chosen, 0)
    return (
        torch.where(valid.unsqueeze(2), _rows(survivors.boxes, chosen), 0.0),
        torch.where(valid, scores, 0.0),
        torch.where(valid, torch.gather(survivors.labels, 1, chosen), -1).to(torch.int32),
        valid.sum(1, keepdim=True).to(torch.int32),
    )


def greedy_nms(candidates: Candidates, *, iou_threshold: float, limit: int) -> Survivors:
    """Greedy non-maximum suppression of each class of each image, exact; ONNX NonMaxSuppression when exported.

    Of two equal scores the earlier one goes first; suppressed if IoU > ``iou_threshold``, strictly.
    """
    boxes, scores, labels, classes = candidates
    keep: Tensor = torch.ops.fcos_deploy.nms_keep(boxes, scores, labels, classes, iou_threshold, limit)
    return Survivors(keep, torch.ones_like(keep[:, :1]))


@torch.library.custom_op("fcos_deploy::nms_keep", mutates_args=())
def _nms_keep(  # noqa: PLR0917  (operators of torch take their arguments by position)
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: int,  # noqa: ARG001  (needed where it becomes ONNX NonMaxSuppression)
    iou_threshold: float,
    limit: int,
) -> Tensor:
    keep = torch.zeros_like(scores, dtype=torch.bool)
    rule = detections.Suppression(iou_threshold=iou_threshold, limit=limit)
    for image in range(len(scores)):
        rows = torch.nonzero(scores[image] > 0).squeeze(1)
        rivals, ranks = (tensor[image, rows].float().cpu().numpy() for tensor in (boxes, scores))
        kept = detections.suppress(rivals, ranks, labels=labels[image, rows].cpu().numpy(), rule=rule)
        keep[image, rows[torch.from_numpy(kept).to(rows.device)]] = True
    return keep


@_nms_keep.register_fake
def _(_boxes: Tensor, scores: Tensor, *_arguments: object) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


_BLOCK = 125  # boxes that are settled together; the default number of boxes is eight times this


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticNms:
    """Greedy suppression of the ``boxes`` best candidates by plain tensor operators, and whether it surely is that.

    The best boxes are settled first, ``_BLOCK`` at a time, in ``rounds`` rounds each. Exact where no chain of
    suppressions within a block is longer than ``rounds``, and either no more than ``boxes`` candidates passed the gate
    or ``max_detections`` of the best ``boxes`` survive.
    """

    boxes: int = 8 * _BLOCK
    rounds: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.boxes <= MAX_TOP_K or self.rounds < 1:
            raise ConfigError(
                f"Static NMS takes 1 to {MAX_TOP_K} boxes and at least 1 round, got {self.boxes} and {self.rounds}."
            )

    def __call__(self, candidates: Candidates, *, iou_threshold: float, limit: int) -> Survivors:
        """Those of the ``boxes`` best that survive.

        Raises:
            ConfigError: ``limit`` is more than ``boxes``, which could not all survive.
        """
        available = candidates.scores.shape[1]
        if limit > self.boxes and not (isinstance(available, int) and available <= self.boxes):
            raise ConfigError(
                f"The static NMS looks at the {self.boxes} best candidates, {limit} detections were asked for.",
                hint=f"--nms-boxes N of at least {limit} and at most {MAX_TOP_K}, or --nms-form onnx",
            )
        candidates = _at_least(candidates, self.boxes) if not isinstance(available, int) else candidates
        count = min(self.boxes, available) if isinstance(available, int) else self.boxes
        scores, chosen = torch.topk(candidates.scores, count, dim=1)
        boxes, labels = _rows(candidates.boxes, chosen), torch.gather(candidates.labels, 1, chosen)
        alive = (scores > 0).to(torch.float32).unsqueeze(2)
        keep, changed = alive[:, :0], torch.zeros_like(alive[:, :1, 0])
        for first in range(0, count, _BLOCK):
            end = min(first + _BLOCK, count)
            rows, better = slice(first, end), slice(0, end)
            suppresses = _suppresses(
                (boxes[:, rows], labels[:, rows]), (boxes[:, better], labels[:, better]), iou_threshold=iou_threshold
            )
            block, moved = self._settled_block(alive[:, rows], keep, suppresses)
            keep, changed = torch.cat((keep, block), 1), changed + moved
        settled = changed < 0.5
        if available != count:
            passed = (candidates.scores > 0).to(torch.float32).sum(1, keepdim=True)
            enough = torch.logical_or(passed < count + 0.5, keep.sum(1) > limit - 0.5)
            settled = torch.logical_and(settled, enough)
        mask = torch.zeros_like(candidates.scores).scatter(1, chosen, keep.squeeze(2)) > 0.5
        return Survivors(mask[:, :available], settled)

    def _settled_block(self, alive: Tensor, keep: Tensor, suppresses: Tensor) -> tuple[Tensor, Tensor]:
        """Which boxes of a block survive, (n, s, 1) of 0 and 1, and how many the last round changed, (n, 1).

        alive: (n, s, 1), those that passed the gate. keep: (n, m, 1), which of the boxes before the block survive.
        suppresses: (n, s, m + s).

        Greedy suppression is the one solution of keep[i] = alive[i] and no better j with suppresses[i, j] and keep[j]:
        row i depends on better rows only. Each round applies this rule to all rows at once, so that a row is right
        after as many rounds as the longest chain of suppressions above it; what is right stays right, and a round that
        changes nothing proves the solution. ``alive - suppresses @ keep`` is 1 for a survivor and at most 0 otherwise:
        the product counts survivors that suppress a row, and float32 is exact to 2^24 of them.
        """
        before, size = keep.shape[1], alive.shape[1]
        if before:
            alive = torch.relu(alive - torch.matmul(suppresses[:, :, :before], keep))
        position = torch.arange(size, device=alive.device)
        among = suppresses[:, :, before:] * (position[None, :] < position[:, None]).to(torch.float32)
        # The first row of a block depends on none of it, and each round settles at least one more.
        rounds = min(self.rounds, size - 1)
        previous = keep = alive
        for _ in range(rounds):
            previous, keep = keep, torch.relu(alive - torch.matmul(among, keep))
        changed = (keep - previous).abs().sum(1)
        return keep, changed * float(rounds < size - 1)


def _at_least(candidates: Candidates, count: int) -> Candidates:
    """The same and ``count`` more that failed the gate, where their number is not known before a run."""
    boxes, scores, labels, classes = candidates
    n = scores.shape[0]
    return Candidates(
        torch.cat((boxes, boxes.new_zeros((n, count, 4))), 1),
        torch.cat((scores, scores.new_full((n, count), -1.0)), 1),
        torch.cat((labels, labels.new_zeros((n, count))), 1),
        classes,
    )


def _suppresses(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], *, iou_threshold: float) -> Tensor:
    """(n, s, m) float32: 1 where box i of ``rows`` and box j of ``columns`` are of one class and overlap too much.

    rows, columns: boxes (n, s, 4) and (n, m, 4), and their labels.
    """
    (boxes, labels), (others, other_labels) = rows, columns
    corner_low = torch.maximum(boxes[:, :, None, :2], others[:, None, :, :2])
    corner_high = torch.minimum(boxes[:, :, None, 2:], others[:, None, :, 2:])
    sides = (corner_high - corner_low).clamp(min=0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _areas(boxes)[:, :, None] + _areas(others)[:, None, :] - intersection
    # A product instead of a quotient: 0 / 0 of two empty boxes would be NaN, and NPUs divide badly.
    overlaps = intersection > iou_threshold * union
    same = labels[:, :, None] == other_labels[:, None, :]
    return torch.logical_and(overlaps, same).to(torch.float32)


def _areas(boxes: Tensor) -> Tensor:
    """(n, m) of boxes (n, m, 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
