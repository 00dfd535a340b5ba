"""ResNet and ResNeXt bodies under torchvision's names (spec 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcos_deploy.core.network import BlockType, FcosConfig

__all__ = ["ResNetBody"]


class _BasicBlock(nn.Module):
    """3x3 - 3x3 with a shortcut; the stride sits on the first convolution."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int, config: FcosConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes, eps=config.norm_eps)
        self.downsample = _shortcut(in_channels, planes, stride=stride, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, planes, h / stride, w / stride)."""
        branch = torch.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return torch.relu(branch + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    """1x1 - 3x3 (grouped) - 1x1; Caffe-style bodies put the stride on the first 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, *, stride: int, config: FcosConfig) -> None:
        super().__init__()
        width = planes * config.width_per_group // config.stem_channels * config.groups
        out_channels = planes * self.expansion
        first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, second, 1, groups=config.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps=config.norm_eps)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps=config.norm_eps)
        self.downsample = _shortcut(in_channels, out_channels, stride=stride, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, 4 * planes, h / stride, w / stride)."""
        branch = torch.relu(self.bn1(self.conv1(x)))
        branch = torch.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return torch.relu(branch + (x if self.downsample is None else self.downsample(x)))


def _shortcut(in_channels: int, out_channels: int, *, stride: int, eps: float) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels, eps=eps)
    )


_BLOCKS: dict[BlockType, type[_BasicBlock] | type[_Bottleneck]] = {
    BlockType.BASIC: _BasicBlock,
    BlockType.BOTTLENECK: _Bottleneck,
}


class ResNetBody(nn.Module):
    """ResNet without its classifier; ``forward`` gives C3, C4 and C5 (strides 8, 16, 32)."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        stem = config.stem_channels
        block = _BLOCKS[config.block]
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem, eps=config.norm_eps)
        channels = stem
        for index, count in enumerate(config.blocks):
            planes = stem << index
            blocks: list[nn.Module] = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, planes, stride=stride, config=config))
                channels = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.out_channels = tuple((stem << i) * block.expansion for i in (1, 2, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W) -> [C3, C4, C5]."""
        x = torch.relu(self.bn1(self.conv1(images)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]
