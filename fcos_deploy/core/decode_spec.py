"""What happens to the head's output: how each ecosystem gates, ranks, scores, clips and suppresses (spec 1, 10)."""

from __future__ import annotations

from dataclasses import dataclass

from fcos_deploy.core.enums import CenterMode, StrEnum
from fcos_deploy.core.errors import ConfigError

__all__ = ["PROFILES", "BoxClip", "BoxFilter", "DecodeSpec", "NmsSpace", "PostprocessProfile", "ScoreForm"]


class ScoreForm(StrEnum):
    """A number made from the class probability p and the centerness q."""

    P = "p"
    PQ = "p*q"
    SQRT_PQ = "sqrt(p*q)"


class BoxClip(StrEnum):
    """To what boxes are clipped before suppression: nothing, or the resized image without its padding."""

    NONE = "none"
    IMAGE = "image"  # [0, W] x [0, H]
    IMAGE_MINUS_ONE = "image-1"  # [0, W - 1] x [0, H - 1]


class NmsSpace(StrEnum):
    """The pixels in which overlaps are measured: the resized image's, or the original's."""

    INPUT = "input"
    ORIGINAL = "original"


class BoxFilter(StrEnum):
    """When boxes without area are dropped: never, before suppression, or after a final clip to the original image."""

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
    channel; empty means that the label is the channel.
    """

    profile: PostprocessProfile
    score_threshold: float
    iou_threshold: float
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    pre_nms_top_k: int = 1000
    max_detections: int = 100
    label_map: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.score_threshold < 1.0:
            raise ConfigError(f"The score threshold must be in [0, 1), got {self.score_threshold}.")
        if not 0.0 < self.iou_threshold <= 1.0:
            raise ConfigError(f"The IoU threshold must be in (0, 1], got {self.iou_threshold}.")
        if self.pre_nms_top_k < 1 or self.max_detections < 1:
            raise ConfigError("pre_nms_top_k and max_detections must be at least 1.")
