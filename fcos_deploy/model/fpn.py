"""Feature pyramid with the two extra levels of FCOS, under torchvision's names (spec 2.1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["FeaturePyramid"]


class _ExtraLevels(nn.Module):
    """P6 from the pyramid's P5, P7 from relu(P6)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, p5: Tensor) -> list[Tensor]:
        p6 = self.p6(p5)
        return [p6, self.p7(torch.relu(p6))]


class FeaturePyramid(nn.Module):
    """C3-C5 -> P3-P5, and P6-P7 when ``num_levels`` is 5; every level has ``channels`` channels."""

    def __init__(self, in_channels: tuple[int, ...], *, channels: int, num_levels: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1)) for _ in in_channels)
        self.extra_blocks = _ExtraLevels(channels) if num_levels == 5 else None

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[C3, C4, C5] -> [P3, ..., P7], finest first."""
        top_down = [block(feature) for block, feature in zip(self.inner_blocks, features, strict=True)]
        for i in range(len(top_down) - 2, -1, -1):
            size = cast(list[int], top_down[i].shape[-2:])
            top_down[i] = top_down[i] + nn.functional.interpolate(top_down[i + 1], size=size, mode="nearest")
        levels = [block(feature) for block, feature in zip(self.layer_blocks, top_down, strict=True)]
        return levels if self.extra_blocks is None else levels + self.extra_blocks(levels[-1])
