"""DLA-34 (deep layer aggregation) as AdelaiDet's FCOS-RT uses it, under its own names (spec 8.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcos_deploy.core.network import FcosConfig

__all__ = ["Dla34Body"]

_CHANNELS = (16, 32, 64, 128, 256, 512)


class _Block(nn.Module):
    """3x3 - 3x3 with a residual that the tree hands in."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(n, in, h, w) and (n, c, h / stride, w / stride) -> (n, c, h / stride, w / stride)."""
        branch = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(branch)) + residual)


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
        self.tree1 = _Block(in_channels, channels, stride=stride, eps=eps)
        self.tree2 = _Block(channels, channels, stride=1, eps=eps)
        self.root = _Root(2 * channels + extra_channels, channels, eps=eps)
        self.stride = stride
        self.project = _projection(in_channels, channels, eps=eps)

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
        self.project = _projection(in_channels, channels, eps=eps)  # In every checkpoint, used by no output.

    def forward(self, x: Tensor, _: list[Tensor]) -> Tensor:
        """(n, in, h, w) -> (n, channels, h / 2, w / 2)."""
        first = self.tree1(x, [])
        return self.tree2(first, [nn.functional.max_pool2d(x, 2), first])  # type: ignore[no-any-return]  # as above


class _Level5(_Leaf):
    """A leaf whose root takes in the pooled input."""

    def forward(self, x: Tensor, _: list[Tensor]) -> Tensor:
        """(n, in, h, w) -> (n, channels, h / 2, w / 2)."""
        return super().forward(x, [nn.functional.max_pool2d(x, 2)])


def _projection(in_channels: int, channels: int, *, eps: float) -> nn.Sequential | None:
    if in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels, eps=eps))


def _stem(in_channels: int, channels: int, *, kernel: int, stride: int, eps: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels, eps=eps),
        nn.ReLU(),
    )


class Dla34Body(nn.Module):
    """DLA-34 without its classifier; ``forward`` gives levels 3, 4 and 5 (strides 8, 16, 32)."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        eps = config.norm_eps
        c0, c1, c2, c3, c4, c5 = _CHANNELS
        self.base_layer = _stem(3, c0, kernel=7, stride=1, eps=eps)
        self.level0 = _stem(c0, c0, kernel=3, stride=1, eps=eps)
        self.level1 = _stem(c0, c1, kernel=3, stride=2, eps=eps)
        self.level2 = _Leaf(c1, c2, stride=2, extra_channels=0, eps=eps)
        self.level3 = _Pair(c2, c3, eps=eps)
        self.level4 = _Pair(c3, c4, eps=eps)
        self.level5 = _Level5(c4, c5, stride=2, extra_channels=c4, eps=eps)
        self.out_channels = (c3, c4, c5)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (n, 3, H, W) -> [C3, C4, C5]."""
        x = self.level1(self.level0(self.base_layer(images)))
        c3 = self.level3(self.level2(x, []), [])
        c4 = self.level4(c3, [])
        return [c3, c4, self.level5(c4, [])]
