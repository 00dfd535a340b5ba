"""Backbones: ResNet and ResNeXt, DLA-34, MobileNetV2, VoVNet. Each gives C3, C4 and C5, of strides 8, 16 and 32.

Submodules have the names of published checkpoints: torchvision's for ResNet (``models/resnet.py``), AdelaiDet's for
DLA-34 (``adet/modeling/backbone/dla.py``), those of tianzhi0549/FCOS for MobileNetV2
(``fcos_core/modeling/backbone/mobilenet.py``). Those of VoVNet are shorter than AdelaiDet's, which repeat the block's
name in every layer (``adet/modeling/backbone/vovnet.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcos_deploy.core.network import BlockType, FcosConfig, OsaStage

__all__ = ["Dla34Backbone", "MobileNetV2Backbone", "ResNetBackbone", "VovnetBackbone"]


class _Residual(nn.Module):
    """3x3 - 3x3, added to a residual that the caller hands in; the stride sits on the first convolution."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, eps: float, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(n, in, h, w) and (n, c, h / stride, w / stride) -> (n, c, h / stride, w / stride)."""
        branch = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(branch)) + residual)


def _shortcut(in_channels: int, channels: int, *, stride: int, eps: float) -> nn.Sequential | None:
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels, eps=eps))


class _BasicBlock(_Residual):
    """The residual block of ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int, dilation: int, config: FcosConfig) -> None:
        super().__init__(in_channels, planes, stride=stride, eps=config.norm_eps, dilation=dilation)
        self.downsample = _shortcut(in_channels, planes, stride=stride, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # finds its residual itself
        """(n, in, h, w) -> (n, planes, h / stride, w / stride)."""
        return super().forward(x, x if self.downsample is None else self.downsample(x))


class _Bottleneck(nn.Module):
    """1x1 - 3x3 (grouped) - 1x1; Caffe-style backbones put the stride on the first 1x1."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, *, stride: int, dilation: int, config: FcosConfig) -> None:
        super().__init__()
        # ResNeXt-32x8d: 32 groups of 8 channels in the first stage, of twice as many in each stage after it.
        width = planes * config.width_per_group // config.stem_channels * config.groups
        out_channels = planes * self.expansion
        first, second = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, config.groups, bias=False)
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


class ResNetBackbone(nn.Module):
    """ResNet without its classifier; ``forward`` gives C3, C4 and C5 (strides 8, 16, 32 by default)."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        stem = config.stem_channels
        block = _BasicBlock if config.block is BlockType.BASIC else _Bottleneck
        self.conv1 = nn.Conv2d(config.image_channels, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem, eps=config.norm_eps)
        channels = stem
        for index, count in enumerate(config.blocks):
            planes = stem << index
            blocks: list[nn.Module] = []
            for position in range(count):
                stride = config.stage_strides[index] if position == 0 else 1
                dilation = config.stage_dilations[index]
                blocks.append(block(channels, planes, stride=stride, dilation=dilation, config=config))
                channels = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self._laterals = config.laterals
        self.out_channels = tuple((stem << i) * block.expansion for i in range(4))[-config.laterals :]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W) -> [C3, C4, C5], or from C2 on."""
        x = torch.relu(self.bn1(self.conv1(images)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)][-self._laterals :]


class _Root(nn.Module):
    """A 1x1 convolution over everything that is aggregated."""

    def __init__(self, in_channels: int, channels: int, *, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Maps of one size -> (n, channels, h, w)."""
        return torch.relu(self.bn(self.conv(torch.cat(features, 1))))


class _Leaf(nn.Module):
    """Two blocks and the root that joins them with what came before (a tree of depth 1)."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, extra_channels: int, eps: float) -> None:
        super().__init__()
        self.tree1 = _Residual(in_channels, channels, stride=stride, eps=eps)
        self.tree2 = _Residual(channels, channels, stride=1, eps=eps)
        self.root = _Root(2 * channels + extra_channels, channels, eps=eps)
        self.stride = stride
        self.project = _shortcut(in_channels, channels, stride=1, eps=eps)

    def forward(self, x: Tensor, extra: list[Tensor]) -> Tensor:
        """``extra``: maps of the output's size that the root takes in after the two blocks."""
        bottom = nn.functional.max_pool2d(x, self.stride) if self.stride > 1 else x
        residual = bottom if self.project is None else self.project(bottom)
        first = self.tree1(x, residual)
        return self.root([self.tree2(first, first), first, *extra])  # type: ignore[no-any-return]  # nn.Module.__call__


class _Pair(nn.Module):
    """Two leaves; the second root also takes in the pooled input and the first leaf (a tree of depth 2)."""

    def __init__(self, in_channels: int, channels: int, *, eps: float) -> None:
        super().__init__()
        self.tree1 = _Leaf(in_channels, channels, stride=2, extra_channels=0, eps=eps)
        self.tree2 = _Leaf(channels, channels, stride=1, extra_channels=in_channels + channels, eps=eps)
        self.project = _shortcut(in_channels, channels, stride=1, eps=eps)  # In every checkpoint, used by no output.

    def forward(self, x: Tensor, _: list[Tensor]) -> Tensor:
        """(n, in, h, w) -> (n, channels, h / 2, w / 2)."""
        first = self.tree1(x, [])
        return self.tree2(first, [nn.functional.max_pool2d(x, 2), first])  # type: ignore[no-any-return]  # as above


class _Level5(_Leaf):
    """A leaf whose root takes in the pooled input."""

    def forward(self, x: Tensor, _: list[Tensor]) -> Tensor:
        """(n, in, h, w) -> (n, channels, h / 2, w / 2)."""
        return super().forward(x, [nn.functional.max_pool2d(x, 2)])


def _stem(in_channels: int, channels: int, *, kernel: int, stride: int, eps: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels, eps=eps),
        nn.ReLU(),
    )


class Dla34Backbone(nn.Module):
    """DLA-34 without its classifier; ``forward`` gives levels 3, 4 and 5 (strides 8, 16, 32), or from level 2 on."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        eps = config.norm_eps
        c0, c1, c2, c3, c4, c5 = 16, 32, 64, 128, 256, 512
        self.base_layer = _stem(config.image_channels, c0, kernel=7, stride=1, eps=eps)
        self.level0 = _stem(c0, c0, kernel=3, stride=1, eps=eps)
        self.level1 = _stem(c0, c1, kernel=3, stride=2, eps=eps)
        self.level2 = _Leaf(c1, c2, stride=2, extra_channels=0, eps=eps)
        self.level3 = _Pair(c2, c3, eps=eps)
        self.level4 = _Pair(c3, c4, eps=eps)
        self.level5 = _Level5(c4, c5, stride=2, extra_channels=c4, eps=eps)
        self._laterals = config.laterals
        self.out_channels = (c2, c3, c4, c5)[-config.laterals :]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W) -> [C3, C4, C5], or from C2 on."""
        level2 = self.level2(self.level1(self.level0(self.base_layer(images))), [])
        level3 = self.level3(level2, [])
        level4 = self.level4(level3, [])
        return [level2, level3, level4, self.level5(level4, [])][-self._laterals :]


# Expansion, channels, repetitions, stride (Sandler et al., MobileNetV2, table 2).
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_TAPS = (3, 6, 13, 17)  # the last features at strides 4, 8, 16 and 32


class _InvertedResidual(nn.Module):
    """Expand, depthwise, project; with a shortcut where sizes allow."""

    def __init__(self, in_channels: int, channels: int, *, expansion: int, stride: int, eps: float) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden, eps=eps), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, eps=eps),
            nn.ReLU6(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels, eps=eps),
        ]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, channels, h / stride, w / stride)."""
        branch: Tensor = self.conv(x)
        return x + branch if self.shortcut else branch


class MobileNetV2Backbone(nn.Module):
    """MobileNetV2 up to its last inverted residual; ``forward`` gives strides 8, 16 and 32."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        eps = config.norm_eps
        channels = 32
        features: list[nn.Module] = [
            nn.Sequential(
                nn.Conv2d(config.image_channels, channels, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels, eps=eps),
                nn.ReLU6(),
            )
        ]
        widths = [channels]
        for expansion, width, count, first_stride in _STAGES:
            for position in range(count):
                stride = first_stride if position == 0 else 1
                features.append(_InvertedResidual(channels, width, expansion=expansion, stride=stride, eps=eps))
                channels = width
                widths.append(width)
        self.features = nn.Sequential(*features)
        self._taps = _TAPS[-config.laterals :]
        self.out_channels = tuple(widths[i] for i in self._taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W) -> [C3, C4, C5], or from C2 on."""
        x, taps = images, []
        for index, feature in enumerate(self.features):
            x = feature(x)
            if index in self._taps:
                taps.append(x)
        return taps


class _ChannelGate(nn.Module):
    """Effective squeeze and excitation: each channel times a hard sigmoid of the means of all (Lee and Park, 2020)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        return x * nn.functional.hardsigmoid(self.fc(nn.functional.adaptive_avg_pool2d(x, 1)))


class _OsaBlock(nn.Module):
    """One-shot aggregation: a chain of 3x3 convolutions whose outputs are joined once, by a 1x1."""

    def __init__(self, in_channels: int, stage: OsaStage, *, identity: bool, eps: float) -> None:
        super().__init__()
        widths = (in_channels, *(stage.channels,) * stage.layers)
        self.layers = nn.ModuleList(
            _stem(width, stage.channels, kernel=3, stride=1, eps=eps) for width in widths[: stage.layers]
        )
        self.concat = _stem(sum(widths), stage.out_channels, kernel=1, stride=1, eps=eps)
        self.ese = _ChannelGate(stage.out_channels)
        self._identity = identity

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h, w)."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        gated: Tensor = self.ese(self.concat(torch.cat(maps, 1)))
        return gated + x if self._identity else gated


class VovnetBackbone(nn.Module):
    """VoVNetV2 without its classifier; ``forward`` gives stages 3, 4 and 5 (strides 8, 16, 32)."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        eps, channels = config.norm_eps, config.image_channels
        self.stem = nn.Sequential()
        for width, stride in zip(config.stem_widths, (2, 1, 2), strict=True):
            self.stem.append(_stem(channels, width, kernel=3, stride=stride, eps=eps))
            channels = width
        self.stages = nn.ModuleList()
        for stage in config.osa_stages:
            blocks = nn.Sequential()
            for index in range(stage.blocks):
                # The first block changes the number of channels, so that nothing can be added to it.
                blocks.append(_OsaBlock(channels, stage, identity=index > 0, eps=eps))
                channels = stage.out_channels
            self.stages.append(blocks)
        self._laterals = config.laterals
        self.out_channels = tuple(stage.out_channels for stage in config.osa_stages[-config.laterals :])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W), multiples of 32 -> [C3, C4, C5], or from C2 on."""
        x: Tensor = self.stages[0](self.stem(images))
        maps = [x]
        for stage in self.stages[1:]:
            x = stage(nn.functional.max_pool2d(x, 3, 2, ceil_mode=True))
            maps.append(x)
        return maps[-self._laterals :]
