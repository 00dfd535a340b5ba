"""What happens to an image before the network: the contract, without the arithmetic (spec 9)."""

from __future__ import annotations

from dataclasses import dataclass

from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError, InputSizeError

__all__ = ["ChannelOrder", "InputDtype", "PreprocessSpec", "ResizeFilter", "ResizeOrder", "SizeRule"]


class ResizeFilter(StrEnum):
    """Bilinear interpolation as a library does it (spec 9, "Interpolators").

    ``torch``: half-pixel, no antialiasing, in float32. ``cv2``: the same on uint8, rounded.
    ``pil``: antialiased when shrinking, on uint8, rounded.
    """

    TORCH = "torch"
    CV2 = "cv2"
    PIL = "pil"


class SizeRule(StrEnum):
    """How the resized height and width follow from the image and the wanted size (spec 9).

    ``letterbox``: the largest size of the same aspect ratio that fits the canvas, rounded to the nearest pixel. The
    other rules are the five ecosystems' own shortest-edge / longest-edge arithmetic.
    """

    LETTERBOX = "letterbox"
    TORCHVISION = "torchvision"
    MMDETECTION = "mmdetection"
    DETECTRON2 = "detectron2"
    TIANZHI = "tianzhi"


class ResizeOrder(StrEnum):
    """Whether pixels are normalised before or after they are resized."""

    NORMALIZE_FIRST = "normalize-first"
    RESIZE_FIRST = "resize-first"


class ChannelOrder(StrEnum):
    """Order of the three colour channels in the network's input tensor."""

    RGB = "rgb"
    BGR = "bgr"


class InputDtype(StrEnum):
    """``uint8``: raw pixels, normalised inside the graph. ``float32``: normalised on the host."""

    UINT8 = "uint8"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSpec:
    """From a picture to the input tensor ``(3, H, W)``.

    Either ``height`` and ``width`` (a fixed canvas) or ``shortest`` and ``longest`` (the size follows the image, padded
    to a multiple of ``size_divisor``) are given, in pixels. Normalising is ``(pixel / pixel_scale - mean) / std``,
    with ``mean`` and ``std`` in the order of ``channel_order``. Padding is appended on the right and the bottom; it is
    0 after normalising for float32 input, and ``pad_value`` (in ``channel_order``) for uint8 input.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pixel_scale: float = 1.0
    channel_order: ChannelOrder = ChannelOrder.RGB
    height: int | None = None
    width: int | None = None
    shortest: int | None = None
    longest: int | None = None
    size_rule: SizeRule = SizeRule.LETTERBOX
    resize_filter: ResizeFilter = ResizeFilter.CV2
    resize_order: ResizeOrder = ResizeOrder.RESIZE_FIRST
    input_dtype: InputDtype = InputDtype.UINT8
    size_divisor: int = 32

    def __post_init__(self) -> None:
        canvas = self.height is not None and self.width is not None
        edges = self.shortest is not None and self.longest is not None
        given = sum(v is not None for v in (self.height, self.width, self.shortest, self.longest))
        if canvas == edges or given != 2:
            raise ConfigError("Give either height and width, or shortest and longest.")
        if (self.size_rule is SizeRule.LETTERBOX) != canvas:
            raise ConfigError(f"Size rule '{self.size_rule}' does not go with {'a canvas' if canvas else 'edges'}.")
        for size in (self.height, self.width):
            if size is not None and (size < self.size_divisor or size % self.size_divisor):
                raise InputSizeError(
                    f"Input size {self.height}x{self.width} is not a multiple of {self.size_divisor}.",
                    hint=f"the nearest is {self._round(self.height)}x{self._round(self.width)}",
                )
        if self.input_dtype is InputDtype.UINT8 and self.resize_order is ResizeOrder.NORMALIZE_FIRST:
            raise ConfigError("uint8 input is resized before it is normalised, so the order must be 'resize-first'.")
        if self.resize_filter is ResizeFilter.PIL and self.resize_order is ResizeOrder.NORMALIZE_FIRST:
            raise ConfigError("The resize filter 'pil' works on uint8, so the order must be 'resize-first'.")
        if min(self.std) <= 0 or self.pixel_scale <= 0:
            raise ConfigError(f"std and pixel_scale must be positive, got {self.std} and {self.pixel_scale}.")

    def _round(self, size: int | None) -> int:
        return max(self.size_divisor, round((size or 0) / self.size_divisor) * self.size_divisor)

    @property
    def canvas(self) -> tuple[int, int] | None:
        """(height, width) of the network input, or None when it follows the image."""
        return None if self.height is None or self.width is None else (self.height, self.width)

    @property
    def pad_value(self) -> tuple[int, int, int]:
        """The uint8 nearest to the mean, per channel: what padding is for uint8 input."""
        first, second, third = (round(m * self.pixel_scale) for m in self.mean)
        return first, second, third
