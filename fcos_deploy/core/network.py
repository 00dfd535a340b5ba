"""The configuration of an FCOS network: what the shapes of its tensors alone do not tell."""

from __future__ import annotations

from dataclasses import dataclass

from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError

__all__ = [
    "BackboneType",
    "BlockType",
    "BoxActivation",
    "DeformableLayer",
    "ExtraSource",
    "FcosConfig",
    "OsaStage",
    "TowerNorm",
    "Upsampling",
    "resnet_config",
]


class BackboneType(StrEnum):
    """The convolutional network under the feature pyramid."""

    RESNET = "resnet"
    DLA34 = "dla34"
    MOBILENET_V2 = "mobilenet-v2"
    VOVNET = "vovnet"


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
    BATCH = "bn"  # one for all levels
    BATCH_PER_LEVEL = "bn-per-level"
    NONE = "none"


class ExtraSource(StrEnum):
    """What P6 is computed from: the pyramid's finished P5, the lateral convolution of C5, or C5 itself."""

    OUTPUT = "output"
    LATERAL = "lateral"
    INPUT = "input"


class Upsampling(StrEnum):
    """Interpolation of the pyramid's coarser map to the size of the finer one."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"


# Blocks per stage of the published ResNets.
_RESNETS: dict[int, tuple[BlockType, tuple[int, int, int, int]]] = {
    18: (BlockType.BASIC, (2, 2, 2, 2)),
    34: (BlockType.BASIC, (3, 4, 6, 3)),
    50: (BlockType.BOTTLENECK, (3, 4, 6, 3)),
    101: (BlockType.BOTTLENECK, (3, 4, 23, 3)),
    152: (BlockType.BOTTLENECK, (3, 8, 36, 3)),
}


@dataclass(frozen=True, slots=True)
class OsaStage:
    """One stage of a VoVNet: ``blocks`` of ``layers`` 3x3 convolutions of ``channels``, joined to ``out_channels``."""

    blocks: int
    layers: int
    channels: int
    out_channels: int


@dataclass(frozen=True, slots=True)
class DeformableLayer:
    """A convolution that is deformable, by its module's name; ``modulated`` (DCNv2) has a mask as well as offsets.

    ``groups``: parts of its input channels with offsets of their own.
    """

    name: str
    groups: int
    modulated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FcosConfig:
    """Everything the canonical network needs beside its weights.

    ``stem_channels`` is 64 in every published ResNet; a smaller number makes a backbone of reduced width.
    ``stem_widths`` and ``osa_stages`` are those of a VoVNet: its three stem convolutions and its four stages.
    ``strides`` are those of the pyramid levels, finest first, in network-input pixels: of the backbone's last
    ``laterals`` stages (3: P3 to P5, 4: P2 to P5), of levels that convolutions add (P6, P7), and of ``pooled_levels``
    that take every second place of the level before. ``stage_strides`` and ``stage_dilations`` are those of a ResNet's
    four stages. ``extra_relu``: P7 is computed from relu(P6). ``tower_channels`` is the width of the head's towers, 0
    that of the pyramid. ``image_channels``: 3 colours, or 1 of gray images.
    ``anchor_sizes`` are the units of the levels' distances in pixels, () the strides. ``tower_norm_eps`` belongs to the
    norm of the towers, ``fpn_norm_eps`` to the batch norm of the pyramid, which is merged into its convolutions when
    weights are loaded, and ``norm_eps`` to that of the backbone.
    """

    num_classes: int
    image_channels: int = 3
    backbone: BackboneType = BackboneType.RESNET
    block: BlockType = BlockType.BOTTLENECK
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stem_channels: int = 64
    groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = False
    stage_strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    stage_dilations: tuple[int, int, int, int] = (1, 1, 1, 1)
    stem_widths: tuple[int, ...] = ()
    osa_stages: tuple[OsaStage, ...] = ()
    norm_eps: float = 1e-5
    fpn_channels: int = 256
    fpn_norm_eps: float = 1e-5
    upsampling: Upsampling = Upsampling.NEAREST
    extra_source: ExtraSource = ExtraSource.OUTPUT
    extra_relu: bool = True
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    laterals: int = 3
    pooled_levels: int = 0
    anchor_sizes: tuple[int, ...] = ()
    tower_channels: int = 0
    cls_convs: int = 4
    reg_convs: int = 4
    shared_convs: int = 0
    tower_norm: TowerNorm = TowerNorm.GROUP
    norm_groups: int = 32
    tower_norm_eps: float = 1e-5
    centerness_on_reg: bool = True
    box_activation: BoxActivation = BoxActivation.RELU
    has_scales: bool = False
    deformable: tuple[DeformableLayer, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_classes", "stem_channels", "groups", "width_per_group", "fpn_channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FcosConfig.{name} must be at least 1, got {getattr(self, name)}.")
        parts = len(self.stem_widths), len(self.osa_stages)
        if self.backbone is BackboneType.VOVNET and parts != (3, 4):
            raise ConfigError(f"A VoVNet has 3 stem convolutions and 4 stages, got {parts[0]} and {parts[1]}.")
        if self.image_channels not in (1, 3):
            raise ConfigError(f"Images have 3 channels, or 1 where they are gray, got {self.image_channels}.")
        if self.laterals not in (3, 4) or self.pooled_levels < 0 or self.extra_convs not in (0, 1, 2):
            raise ConfigError(
                f"{self.num_levels} levels, {self.pooled_levels} of them pooled, do not fit {self.laterals} lateral "
                "convolutions: a pyramid begins at P2 or P3, and convolutions add up to 2 levels behind P5."
            )
        if self.anchor_sizes and (len(self.anchor_sizes) != len(self.strides) or min(self.anchor_sizes) < 1):
            raise ConfigError(
                f"{len(self.strides)} levels need as many anchor sizes, got {self.anchor_sizes}.",
                hint="--anchor-sizes A,B,...",
            )
        if min(self.stage_strides + self.stage_dilations) < 1:
            raise ConfigError("The strides and dilations of a backbone's stages must be at least 1.")
        if self.norm_groups < 1 or (self.tower_norm is TowerNorm.GROUP and self.head_channels % self.norm_groups):
            raise ConfigError(
                f"{self.head_channels} tower channels do not divide into {self.norm_groups} normalisation groups.",
                hint="the number of the training: --norm-groups N",
            )

    @property
    def head_channels(self) -> int:
        """Channels of the towers."""
        return self.tower_channels or self.fpn_channels

    @property
    def extra_convs(self) -> int:
        """Number of levels that convolutions add behind P5: P6 and P7."""
        return self.num_levels - self.laterals - self.pooled_levels

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
