"""What a user may say about a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.network import BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, ResizeFilter

__all__ = ["AUTO", "CheckpointOptions"]

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Overrides of what the file and its ecosystem say; empty and ``None`` leave the decision to them.

    ``input_size`` (height, width) makes a fixed canvas, ``shortest`` and ``longest`` follow the image; without either
    the ecosystem's own test size holds. ``input_dtype`` is uint8 for a canvas and float32 otherwise, because only
    float32 reproduces the ecosystem's own resize arithmetic to the last digit. ``weights`` chooses between ``model``
    and ``ema`` in a file that holds both. ``variant`` is the ecosystem's word (tianzhi: ``original``, ``imprv``;
    mmdetection: ``plain``, ``tricks``). ``profile`` is a name in ``core.decode_spec.PROFILES``.
    """

    ecosystem: str = AUTO
    variant: str = ""
    weights: str = ""
    class_names: tuple[str, ...] = ()
    input_size: tuple[int, int] | None = None
    shortest: int | None = None
    longest: int | None = None
    input_dtype: InputDtype | None = None
    score_threshold: float | None = None
    iou_threshold: float | None = None
    max_detections: int | None = None
    pre_nms_top_k: int | None = None
    stride_in_1x1: bool | None = None
    box_activation: BoxActivation | None = None
    centerness_on_reg: bool | None = None
    norm_eps: float | None = None
    channel_order: ChannelOrder | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize_filter: ResizeFilter | None = None
    centers: CenterMode | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        if (self.shortest is None) != (self.longest is None):
            raise ConfigError(
                "Give --shortest and --longest together.", hint="for example --shortest 800 --longest 1333"
            )
        if self.input_size is not None and self.shortest is not None:
            raise ConfigError("Give either --input-size or --shortest and --longest, not both.")
        for size in (*(self.input_size or ()), self.shortest, self.longest):
            if size is not None and size < 1:
                raise ConfigError(f"An input size must be at least 1 pixel, got {size}.")
        if self.shortest is not None and self.longest is not None and self.shortest > self.longest:
            raise ConfigError(f"--shortest {self.shortest} is larger than --longest {self.longest}.")
        if self.weights not in ("", "model", "ema"):
            raise ConfigError(f"weights must be 'model' or 'ema', got '{self.weights}'.")
