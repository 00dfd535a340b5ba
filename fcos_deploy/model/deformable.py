"""Deformable convolution (Dai et al., ICCV 2017), also modulated (version 2: Zhu et al., CVPR 2019), in plain PyTorch.

Offsets come tap by tap as (dy, dx), groups outermost, then one mask value a tap: the order of mmcv, detectron2 and
tianzhi0549/FCOS, and of ONNX DeformConv. A sample beyond the image counts as zero.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.network import DeformableLayer

__all__ = ["DeformConv2d", "deform_conv", "make_deformable"]

_Pair = tuple[int, int]


class DeformConv2d(nn.Conv2d):
    """A convolution that samples its input where a second convolution, ``offset``, says.

    ``as_operator``: compute with the operator ``fcos_deploy::deform_conv``, which is exported as ONNX DeformConv.
    Otherwise the exported graph has plain operators, with GridSample for the sampling. The numbers are the same.
    """

    def __init__(self, conv: nn.Conv2d, *, deform_groups: int, modulated: bool) -> None:
        kernel, stride, dilation = (cast(_Pair, pair) for pair in (conv.kernel_size, conv.stride, conv.dilation))
        padding = cast(_Pair, conv.padding)
        with torch.device("meta"):  # its own weights are those of ``conv``
            super().__init__(conv.in_channels, conv.out_channels, kernel, stride, padding, dilation, conv.groups)
        self.weight, self.bias = conv.weight, conv.bias
        self.deform_groups, self.modulated, self.as_operator = deform_groups, modulated, False
        channels = (3 if modulated else 2) * kernel[0] * kernel[1] * deform_groups
        self.offset = nn.Conv2d(
            conv.in_channels, channels, kernel, stride, padding, dilation, device=conv.weight.device
        )
        if not conv.weight.is_meta:  # Training begins with the plain convolution, at half of its strength with a mask.
            nn.init.zeros_(self.offset.weight)
            nn.init.zeros_(cast(Tensor, self.offset.bias))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h / stride, w / stride)."""
        learned = self.offset(x)
        count = 2 * self.kernel_size[0] * self.kernel_size[1] * self.deform_groups
        offsets = learned[:, :count] if self.modulated else learned
        mask = learned[:, count:].sigmoid() if self.modulated else None
        compute = torch.ops.fcos_deploy.deform_conv if self.as_operator else deform_conv
        padding = list(cast(_Pair, self.padding))
        result: Tensor = compute(
            *(x, self.weight, offsets, self.bias, mask),
            *(list(self.stride), padding, list(self.dilation), self.groups, self.deform_groups),
        )
        return result


def make_deformable(model: nn.Module, layer: DeformableLayer) -> None:
    """Replace the convolution that ``layer`` names.

    Raises:
        ConfigError: the model has no such convolution.
    """
    parent, _, name = layer.name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        conv = owner.get_submodule(name)
    except AttributeError:
        conv = owner = model
    if not isinstance(conv, nn.Conv2d):
        raise ConfigError(f"The network has no convolution '{layer.name}' that could be deformable.")
    setattr(owner, name, DeformConv2d(conv, deform_groups=layer.groups, modulated=layer.modulated))


def deform_conv(  # noqa: PLR0917  (operators of torch take their arguments by position)
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    """(n, in, h, w) and offsets (n, 2 * taps * deform_groups, h', w') in pixels -> (n, out, h', w').

    Each output pixel gets a block of kernel size in one large map of samples, which a plain convolution reads with the
    kernel's size as its stride: the weights stay as they are, and one GridSample serves all taps.
    """
    kernel = weight.shape[2], weight.shape[3]
    out_height, out_width = offsets.shape[2], offsets.shape[3]
    height, width = x.shape[2], x.shape[3]
    # (n * deform_groups, ky, kx, (dy, dx), h', w') -> (n * deform_groups, h', ky, w', kx) each
    by_tap = offsets.reshape(-1, *kernel, 2, out_height, out_width).permute(3, 0, 4, 1, 5, 2)
    # Of grid_sample without aligned corners, pixel p of n lies at (2 p + 1) / n - 1.
    rows, columns = (
        (2 * _origins(count, kernel[axis], stride[axis], dilation[axis], x) - 2 * padding[axis] + 1) / size - 1
        for axis, (count, size) in enumerate(((out_height, height), (out_width, width)))
    )
    grid = torch.stack((by_tap[1] * (2 / width) + columns, by_tap[0] * (2 / height) + rows[:, :, None, None]), -1)
    grid = grid.reshape(-1, out_height * kernel[0], out_width * kernel[1], 2)
    source = x if deform_groups == 1 else x.reshape(-1, x.shape[1] // deform_groups, height, width)
    samples = nn.functional.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if mask is not None:
        blocks = mask.reshape(-1, *kernel, out_height, out_width).permute(0, 3, 1, 4, 2)
        samples = samples * blocks.reshape(-1, 1, out_height * kernel[0], out_width * kernel[1])
    if deform_groups > 1:
        samples = samples.reshape(-1, x.shape[1], out_height * kernel[0], out_width * kernel[1])
    return nn.functional.conv2d(samples, weight, bias, stride=kernel, groups=groups)


def _origins(count: int, taps: int, stride: int, dilation: int, like: Tensor) -> Tensor:
    """(count, taps): pixel of the padded map that each tap of each output position reads without an offset."""
    positions = torch.arange(count, dtype=like.dtype, device=like.device) * stride
    return positions[:, None] + torch.arange(taps, dtype=like.dtype, device=like.device) * dilation


_deform_conv = torch.library.custom_op("fcos_deploy::deform_conv", deform_conv, mutates_args=())


@_deform_conv.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, *_arguments: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], offsets.shape[2], offsets.shape[3])
