"""The canonical FCOS network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcos_deploy.core.network import BodyType, FcosConfig
from fcos_deploy.model.body import ResNetBody
from fcos_deploy.model.dla import Dla34Body
from fcos_deploy.model.fpn import FeaturePyramid
from fcos_deploy.model.head import FcosHead, LevelOutput
from fcos_deploy.model.mobilenet import MobileNetV2Body

__all__ = ["Fcos", "flatten_levels"]

_BODIES: dict[BodyType, type[ResNetBody] | type[Dla34Body] | type[MobileNetV2Body]] = {
    BodyType.RESNET: ResNetBody,
    BodyType.DLA34: Dla34Body,
    BodyType.MOBILENET_V2: MobileNetV2Body,
}


class _Backbone(nn.Module):
    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        self.body = _BODIES[config.body](config)
        self.fpn = FeaturePyramid(self.body.out_channels, channels=config.fpn_channels, num_levels=config.num_levels)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.fpn(self.body(images))
        return levels


class Fcos(nn.Module):
    """FCOS (Tian et al., ICCV 2019): fully convolutional one-stage detection.

    ``state_dict`` keys are those of torchvision's ``fcos_resnet50_fpn``.
    """

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _Backbone(config)
        self.head = FcosHead(config)

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """Normalised images (n, 3, H, W) float32, H and W multiples of 32 -> one output a level."""
        outputs: list[LevelOutput] = self.head(self.backbone(images))
        return outputs


def flatten_levels(levels: list[LevelOutput]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate the levels, locations row by row, P3 first.

    Returns:
        Class logits (n, L, classes), distances (n, L, 4) in pixels, centerness logits (n, L, 1).
    """
    columns = zip(*levels, strict=True)
    flat = (torch.cat([m.flatten(2) for m in column], 2).transpose(1, 2) for column in columns)
    cls_logits, distances, centerness = flat
    return cls_logits, distances, centerness
