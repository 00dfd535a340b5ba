"""The configuration of an FCOS network: what the shapes of its tensors alone do not tell."""

from __future__ import annotations

from dataclasses import dataclass

from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError

__all__ = ["BackboneType", "BlockType", "BoxActivation", "FcosConfig", "TowerNorm", "resnet_config"]


class BackboneType(StrEnum):
    """The convolutional network under the feature pyramid."""

    RESNET = "resnet"
    DLA34 = "dla34"
    MOBILENET_V2 = "mobilenet-v2"


class BlockType(StrEnum):
    """The residual block of a ResNet backbone."""

    BASIC = "basic"
    BOTTLENECK = "bottleneck"


class BoxActivation(StrEnum):
    """How the box convolution becomes distances in pixels (docs/fcos.md).

    ``relu``: ``relu(scale * x) * stride``; ``exp``: ``exp(scale * x)``, which is in pixels already.
    """

    RELU = "relu"
    EXP = "exp"


class TowerNorm(StrEnum):
    """Normalisation after each tower convolution of the head."""

    GROUP = "gn"
    BATCH_PER_LEVEL = "bn-per-level"
    NONE = "none"


# Blocks per stage of the published ResNets.
_RESNETS: dict[int, tuple[BlockType, tuple[int, int, int, int]]] = {
    18: (BlockType.BASIC, (2, 2, 2, 2)),
    34: (BlockType.BASIC, (3, 4, 6, 3)),
    50: (BlockType.BOTTLENECK, (3, 4, 6, 3)),
    101: (BlockType.BOTTLENECK, (3, 4, 23, 3)),
    152: (BlockType.BOTTLENECK, (3, 8, 36, 3)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FcosConfig:
    """Everything the canonical network needs beside its weights.

    ``stem_channels`` is 64 in every published ResNet; a smaller number makes a backbone of reduced width.
    ``strides`` are those of the pyramid levels, finest first, in network-input pixels.
    """

    num_classes: int
    backbone: BackboneType = BackboneType.RESNET
    block: BlockType = BlockType.BOTTLENECK
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stem_channels: int = 64
    groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = False
    norm_eps: float = 1e-5
    fpn_channels: int = 256
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    cls_convs: int = 4
    reg_convs: int = 4
    shared_convs: int = 0
    tower_norm: TowerNorm = TowerNorm.GROUP
    norm_groups: int = 32
    centerness_on_reg: bool = True
    box_activation: BoxActivation = BoxActivation.RELU
    has_scales: bool = False

    def __post_init__(self) -> None:
        for name in ("num_classes", "stem_channels", "groups", "width_per_group", "fpn_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FcosConfig.{name} must be at least 1, got {getattr(self, name)}.")
        if len(self.strides) not in (3, 5):
            raise ConfigError(f"An FCOS pyramid has 3 or 5 levels, got strides {self.strides}.")
        if self.tower_norm is TowerNorm.GROUP and self.fpn_channels % self.norm_groups:
            raise ConfigError(
                f"{self.fpn_channels} pyramid channels do not divide into {self.norm_groups} normalisation groups.",
                hint=f"use a multiple of {self.norm_groups}",
            )

    @property
    def num_levels(self) -> int:
        """Number of pyramid levels."""
        return len(self.strides)


def resnet_config(depth: int, *, num_classes: int, stem_channels: int = 64, fpn_channels: int = 256) -> FcosConfig:
    """The configuration of a plain ResNet FCOS as torchvision lays it out.

    Raises:
        ConfigError: when no ResNet of that depth is published.
    """
    if depth not in _RESNETS:
        raise ConfigError(f"ResNet depth must be one of {sorted(_RESNETS)}, got {depth}.")
    block, blocks = _RESNETS[depth]
    return FcosConfig(
        num_classes=num_classes, block=block, blocks=blocks, stem_channels=stem_channels, fpn_channels=fpn_channels
    )
