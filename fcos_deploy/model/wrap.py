"""Exporting your own FCOS: any ``nn.Module`` that keeps to an ``OutputConvention`` (docs/your-own-fcos.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.decode import DecodeSpec, level_sizes
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.model.fcos import LevelOutput

__all__ = ["BoxOutput", "Grouping", "OutputConvention", "WrappedModule", "wrap_module"]


class BoxOutput(StrEnum):
    """What the box maps hold: left, top, right, bottom, and how they become network-input pixels.

    ``pixels``: they are. ``strides``: times the level's stride. ``relu-strides``: ReLU, then times the stride.
    ``exp-pixels``: their exponential is.
    """

    PIXELS = "pixels"
    STRIDES = "strides"
    RELU_STRIDES = "relu-strides"
    EXP_PIXELS = "exp-pixels"


class Grouping(StrEnum):
    """``by-level``: one triple of maps a level. ``by-kind``: three lists of maps, one map a level each."""

    BY_LEVEL = "by-level"
    BY_KIND = "by-kind"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConvention:
    """What ``module(images)`` returns, finest level first.

    ``order`` names the three kinds in their order: class logits (n, classes, h, w), boxes (n, 4, h, w), centerness
    logits (n, 1, h, w), before the sigmoid.
    """

    grouping: Grouping = Grouping.BY_LEVEL
    order: tuple[str, str, str] = ("classes", "boxes", "centerness")
    boxes: BoxOutput = BoxOutput.PIXELS

    def __post_init__(self) -> None:
        if sorted(self.order) != ["boxes", "centerness", "classes"]:
            raise ConfigError(f"order must name 'classes', 'boxes' and 'centerness' once each, got {self.order}.")


@dataclass(frozen=True, slots=True)
class WrappedModule:
    """What ``export_onnx`` takes: a network that gives ``LevelOutput``s, and its contract."""

    model: nn.Module
    contract: ModelContract


def wrap_module(
    module: nn.Module,
    *,
    preprocess: PreprocessSpec,
    decode: DecodeSpec,
    class_names: Sequence[str],
    convention: OutputConvention | None = None,
) -> WrappedModule:
    """Wrap ``module`` for ``export_onnx``, after a run that checks the shapes and the signs of its outputs.

    ``module`` takes normalised images (n, 3, H, W) float32, 1 channel of gray ones, H and W multiples of
    ``preprocess.size_divisor``. It is set to evaluation mode.

    Raises:
        ConfigError: its outputs are not what ``convention``, ``decode.strides`` or ``class_names`` say; or shapes could
            not tell, because four classes look like boxes and one like the centerness, and ``convention`` is not given.
    """
    twin = _TWINS.get(len(decode.label_map or class_names))
    if convention is None and twin is not None:
        raise ConfigError(
            f"The class logits have as many channels as {twin}, so that a wrong order of the outputs would not show.",
            hint='say the order: convention=OutputConvention(order=("classes", "boxes", "centerness"))',
        )
    convention = convention or OutputConvention()
    adapter = _Adapter(module, convention, decode.strides).eval()
    contract = ModelContract(
        class_names=tuple(class_names),
        preprocess=preprocess,
        decode=decode,
        ecosystem="custom",
        decisions=tuple(
            Decision(item.name, str(getattr(convention, item.name)), "wrap_module")
            for item in dataclasses.fields(convention)
        ),
    )
    _check_outputs(adapter, contract)
    return WrappedModule(adapter, contract)


# What class logits look like with this many classes.
_TWINS = {1: "the centerness", 4: "the boxes"}


class _Adapter(nn.Module):
    """``module`` with its outputs put in order."""

    def __init__(self, module: nn.Module, convention: OutputConvention, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.module = module
        self._convention = convention
        self._strides = strides

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """Normalised images (n, 3, H, W) -> one ``LevelOutput`` a level, distances in pixels."""
        outputs: Any = self.module(images)  # Any: ``_check_outputs`` ran once before
        if self._convention.grouping is Grouping.BY_KIND:
            outputs = list(zip(*outputs, strict=True))
        levels = []
        for maps, stride in zip(outputs, self._strides, strict=True):
            named = dict(zip(self._convention.order, maps, strict=True))
            distances = _TO_PIXELS[self._convention.boxes](named["boxes"], stride)
            levels.append(LevelOutput(named["classes"], distances, named["centerness"]))
        return levels


_TO_PIXELS: dict[BoxOutput, Callable[[Tensor, int], Tensor]] = {
    BoxOutput.PIXELS: lambda boxes, _stride: boxes,
    BoxOutput.STRIDES: lambda boxes, stride: boxes * stride,
    BoxOutput.RELU_STRIDES: lambda boxes, stride: boxes.relu() * stride,
    BoxOutput.EXP_PIXELS: lambda boxes, _stride: boxes.exp(),
}


def _check_outputs(adapter: _Adapter, contract: ModelContract) -> None:
    """Run once on a black image and one of noise; compare shapes and signs with what the contract says."""
    # Without a fixed size: four divisors, so that even the coarsest of five levels has a location.
    height, width = contract.preprocess.canvas or (4 * contract.preprocess.size_divisor,) * 2
    images = torch.zeros(2, contract.preprocess.channels, height, width)
    images[1] = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            levels = [level for image in images for level in adapter(image[None])]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"The module's output is not what the convention says: {error}.",
            hint="compare OutputConvention and decode.strides with what module(images) returns",
        ) from error
    channels = len(contract.channel_names)
    sizes = level_sizes(height, width, strides=contract.decode.strides)
    for number, (level, size) in enumerate(zip(levels, (*sizes, *sizes), strict=True)):
        for name, tensor, depth in zip(LevelOutput._fields, level, (channels, 4, 1), strict=True):
            expected, where = (1, depth, *size), f"Level {number % len(sizes)}: {name}"
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != expected:
                got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ConfigError(f"{where} must have shape {expected} for a {height}x{width} input, got {got}.")
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"{where} holds NaN or infinite values for a black image or one of noise.")
    if channels in _TWINS:  # Elsewhere shapes have told the kinds apart.
        _check_signs(levels)


def _check_signs(levels: list[LevelOutput]) -> None:
    """Refuse kinds that were taken for one another although their shapes are equal.

    Raises:
        ConfigError: distances below 0, or class logits that are nowhere below 0.
    """
    hint = "compare OutputConvention(order=..., boxes=...) with what module(images) returns"
    lowest = min(float(level.distances.min()) for level in levels)
    if lowest < 0:
        raise ConfigError(f"Distances to the sides of a box are not negative, these reach {lowest:.3g}.", hint=hint)
    if min(float(level.cls_logits.min()) for level in levels) >= 0:
        raise ConfigError(
            "The class logits are nowhere below 0: every location would hold an object of every class.", hint=hint
        )
