"""MobileNetV2 as tianzhi0549/FCOS uses it, under its own names (spec 7)."""

from __future__ import annotations

from torch import Tensor, nn

from fcos_deploy.core.network import FcosConfig

__all__ = ["MobileNetV2Body"]

# Expansion, channels, repetitions, stride (MobileNetV2, table 2).
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_TAPS = (6, 13, 17)  # features at strides 8, 16 and 32


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


class MobileNetV2Body(nn.Module):
    """MobileNetV2 up to its last inverted residual; ``forward`` gives strides 8, 16 and 32."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        eps = config.norm_eps
        channels = 32
        features: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels, eps=eps), nn.ReLU6())
        ]
        widths = [channels]
        for expansion, width, count, first_stride in _STAGES:
            for position in range(count):
                stride = first_stride if position == 0 else 1
                features.append(_InvertedResidual(channels, width, expansion=expansion, stride=stride, eps=eps))
                channels = width
                widths.append(width)
        self.features = nn.Sequential(*features)
        self.out_channels = tuple(widths[i] for i in _TAPS)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W) -> [C3, C4, C5]."""
        x, taps = images, []
        for index, feature in enumerate(self.features):
            x = feature(x)
            if index in _TAPS:
                taps.append(x)
        return taps
