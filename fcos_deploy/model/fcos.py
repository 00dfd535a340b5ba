"""The FCOS network (Tian et al., ICCV 2019): backbone, feature pyramid, head.

Submodules have the names of torchvision's ``fcos_resnet50_fpn`` (``models/detection/fcos.py``), so that its checkpoints
load as they are. docs/fcos.md says how the variants that ``FcosConfig`` describes differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import BackboneType, BoxActivation, DeformableLayer, ExtraSource, FcosConfig, TowerNorm
from fcos_deploy.model.backbones import Dla34Backbone, MobileNetV2Backbone, ResNetBackbone, VovnetBackbone

__all__ = ["DeformConv2d", "Fcos", "LevelOutput", "build_network", "deform_conv", "flatten_levels", "make_deformable"]

_Pair = tuple[int, int]


class LevelOutput(NamedTuple):
    """What the head says of one pyramid level.

    cls_logits: (n, classes, h, w), before the sigmoid.
    distances: (n, 4, h, w), left, top, right, bottom in network-input pixels.
    centerness: (n, 1, h, w), before the sigmoid.
    """

    cls_logits: Tensor
    distances: Tensor
    centerness: Tensor


class Fcos(nn.Module):
    """The network that ``config`` describes."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _Backbone(config)
        self.head = _FcosHead(config)
        for layer in config.deformable:
            make_deformable(self, layer)

    def forward(self, images: Tensor) -> list[LevelOutput]:
        """Normalised images (n, 3, H, W) float32, 1 channel of gray ones -> one output a level."""
        outputs: list[LevelOutput] = self.head(self.backbone(images))
        return outputs


_BACKBONES: dict[BackboneType, type[ResNetBackbone | Dla34Backbone | MobileNetV2Backbone | VovnetBackbone]] = {
    BackboneType.RESNET: ResNetBackbone,
    BackboneType.DLA34: Dla34Backbone,
    BackboneType.MOBILENET_V2: MobileNetV2Backbone,
    BackboneType.VOVNET: VovnetBackbone,
}


class _Backbone(nn.Module):
    """torchvision's ``BackboneWithFPN``, whose names put a ``body`` and an ``fpn`` under ``backbone``."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        self.body = _BACKBONES[config.backbone](config)
        self.fpn = _FeaturePyramid(self.body.out_channels, config=config)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.fpn(self.body(images))
        return levels


class _ExtraLevels(nn.Module):
    """P6 from ``source``, and where there are two levels P7 from relu(P6), or from P6 without ``relu``."""

    def __init__(self, in_channels: int, channels: int, *, count: int, relu: bool) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1) if count == 2 else None
        self._relu = relu

    def forward(self, source: Tensor) -> list[Tensor]:
        p6 = self.p6(source)
        return [p6] if self.p7 is None else [p6, self.p7(torch.relu(p6) if self._relu else p6)]


class _FeaturePyramid(nn.Module):
    """C3-C5 -> P3-P5 (or from C2 on), and the levels behind them; every level has ``fpn_channels`` channels."""

    def __init__(self, in_channels: tuple[int, ...], *, config: FcosConfig) -> None:
        super().__init__()
        channels = config.fpn_channels
        self._upsampling, self._source = config.upsampling, config.extra_source
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1)) for _ in in_channels)
        extra_channels = in_channels[-1] if config.extra_source is ExtraSource.INPUT else channels
        self.extra_blocks = (
            _ExtraLevels(extra_channels, channels, count=config.extra_convs, relu=config.extra_relu)
            if config.extra_convs
            else None
        )
        self._pooled_levels = config.pooled_levels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[C3, C4, C5] or [C2, ..., C5] -> all levels, finest first."""
        top_down = [block(feature) for block, feature in zip(self.inner_blocks, features, strict=True)]
        for i in range(len(top_down) - 2, -1, -1):
            # To the size of the finer map, not times two: a map of odd size rounds up when it is halved.
            size = cast(list[int], top_down[i].shape[-2:])
            top_down[i] = top_down[i] + nn.functional.interpolate(top_down[i + 1], size=size, mode=self._upsampling)
        levels = [block(feature) for block, feature in zip(self.layer_blocks, top_down, strict=True)]
        sources = {
            ExtraSource.OUTPUT: levels[-1],
            ExtraSource.LATERAL: top_down[-1],
            ExtraSource.INPUT: features[-1],
        }
        if self.extra_blocks is not None:
            levels += self.extra_blocks(sources[self._source])
        for _ in range(self._pooled_levels):
            levels.append(nn.functional.max_pool2d(levels[-1], 1, 2))
        return levels


class _Tower(nn.Module):
    """Convolution, norm and ReLU, ``count`` times; entry 3i is a convolution and 3i + 1 its norm."""

    def __init__(self, in_channels: int, count: int, *, config: FcosConfig) -> None:
        super().__init__()
        channels = config.head_channels
        self.out_channels = channels if count else in_channels
        layers: list[nn.Module] = []
        for index in range(count):
            norm: nn.Module = nn.Identity()
            if config.tower_norm is TowerNorm.GROUP:
                norm = nn.GroupNorm(config.norm_groups, channels, eps=config.tower_norm_eps)
            elif config.tower_norm is TowerNorm.BATCH:
                norm = nn.BatchNorm2d(channels, eps=config.tower_norm_eps)
            elif config.tower_norm is TowerNorm.BATCH_PER_LEVEL:
                norm = nn.ModuleList(nn.BatchNorm2d(channels, eps=config.tower_norm_eps) for _ in config.strides)
            layers += [nn.Conv2d(channels if index else in_channels, channels, 3, 1, 1), norm, nn.ReLU()]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, level: int) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w) at pyramid level number ``level``."""
        for layer in self.conv:
            x = layer[level](x) if isinstance(layer, nn.ModuleList) else layer(x)
        return x


class _ClassificationHead(_Tower):
    def __init__(self, in_channels: int, config: FcosConfig) -> None:
        super().__init__(in_channels, config.cls_convs, config=config)
        self.cls_logits = nn.Conv2d(self.out_channels, config.num_classes, 3, 1, 1)


class _RegressionHead(_Tower):
    def __init__(self, in_channels: int, config: FcosConfig) -> None:
        super().__init__(in_channels, config.reg_convs, config=config)
        self.bbox_reg = nn.Conv2d(self.out_channels, 4, 3, 1, 1)
        # Stays here even when the classification tower feeds it: the key names are torchvision's.
        self.bbox_ctrness = nn.Conv2d(self.out_channels, 1, 3, 1, 1)
        if config.has_scales:
            self.scales = nn.Parameter(torch.ones(config.num_levels))


class _FcosHead(nn.Module):
    """Classification, box regression and centerness over all levels."""

    def __init__(self, config: FcosConfig) -> None:
        super().__init__()
        self._config = config
        shared = _Tower(config.fpn_channels, config.shared_convs, config=config)
        self.classification_head = _ClassificationHead(shared.out_channels, config)
        self.regression_head = _RegressionHead(shared.out_channels, config)
        self.shared_tower = shared if config.shared_convs else None
        # Weights on the meta device are assigned later; drawing them there imports torch._dynamo, which takes seconds.
        if self.regression_head.bbox_reg.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(cast(Tensor, module.bias))
        # Every class begins with probability 0.01 (Lin et al., Focal Loss, section 4.1): sigmoid(-log(99)) = 1 / 100.
        nn.init.constant_(cast(Tensor, self.classification_head.cls_logits.bias), -math.log(99.0))

    def forward(self, levels: list[Tensor]) -> list[LevelOutput]:
        """[P3, ...] -> one ``LevelOutput`` a level."""
        outputs = []
        for level, feature in enumerate(levels):
            shared = feature if self.shared_tower is None else self.shared_tower(feature, level)
            cls_feature = self.classification_head(shared, level)
            reg_feature = self.regression_head(shared, level)
            cls_logits = self.classification_head.cls_logits(cls_feature)
            distances = self._distances(self.regression_head.bbox_reg(reg_feature), level)
            centerness_feature = reg_feature if self._config.centerness_on_reg else cls_feature
            outputs.append(LevelOutput(cls_logits, distances, self.regression_head.bbox_ctrness(centerness_feature)))
        return outputs

    def _distances(self, raw: Tensor, level: int) -> Tensor:
        if self._config.has_scales:
            # Inside the ReLU: relu(s x) = s relu(x) only for s > 0, which training does not promise.
            raw = raw * self.regression_head.scales[level]
        if self._config.box_activation is BoxActivation.EXP:
            return torch.exp(raw)  # in pixels already: no variant with exp multiplies by the stride (docs/fcos.md)
        return torch.relu(raw) * (self._config.anchor_sizes or self._config.strides)[level]


def flatten_levels(levels: list[LevelOutput]) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate the levels, locations row by row, P3 first.

    Returns:
        Class logits (n, L, classes), distances (n, L, 4) in pixels, centerness logits (n, L, 1).
    """
    cls_logits, distances, centerness = (
        torch.cat([level_map.flatten(2) for level_map in maps], 2).transpose(1, 2) for maps in zip(*levels, strict=True)
    )
    return cls_logits, distances, centerness


# ---- weights ----


def build_network(config: FcosConfig, tensors: Mapping[str, Tensor]) -> Fcos:
    """The network in evaluation mode, float32, over exactly these tensors (canonical names).

    Raises:
        CheckpointError: naming tensors that are missing, left over, damaged, or of another shape.
    """
    weights = _assembled(_with_merged_norms(tensors, eps=config.fpn_norm_eps))
    with torch.device("meta"):
        model = Fcos(config)
    expected = model.state_dict()
    counters = {name: torch.zeros((), dtype=torch.int64) for name in expected if name.endswith(".num_batches_tracked")}
    for verb, kind, names in (
        ("lacks", "tensors", expected.keys() - weights.keys() - counters.keys()),
        ("has", "unknown tensors", weights.keys() - expected.keys()),
    ):
        if names:
            shown = ", ".join(f"'{name}'" for name in sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise CheckpointError(
                f"The checkpoint {verb} {len(names)} {kind}: {shown}.",
                hint="is it another architecture, or incomplete? For a network of your own see docs/your-own-fcos.md",
            )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"Tensor '{name}' must have shape {list(expected[name].shape)}, got {list(tensor.shape)}."
            )
    converted = {name: tensor.to(torch.float32).contiguous() for name, tensor in weights.items()}
    model.load_state_dict({**converted, **counters}, strict=True, assign=True)
    return model.eval().requires_grad_(requires_grad=False)


_TOWER_CONV = re.compile(r"(head\.(?:classification_head|regression_head|shared_tower)\.conv\.\d+)\.weight")
_LEVEL_NORM = re.compile(r"(head\..+\.conv\.\d+)\.(\d+)\.running_mean")
_FPN_NORM = re.compile(r"(backbone\.fpn\..+)\.norm\.running_mean")
_SCALE_NAMES = "head.regression_head.scales"


def _with_merged_norms(tensors: Mapping[str, Tensor], *, eps: float) -> dict[str, Tensor]:
    """The pyramid's convolutions with the batch norm behind them merged in, for files that have one.

    gamma (w x - mean) / sqrt(var + eps) + beta is a convolution again, to the rounding of its weights.

    Raises:
        CheckpointError: naming a tensor of the norm that is missing or has another shape.
    """
    merged = dict(tensors)
    for name in tensors:
        match = _FPN_NORM.fullmatch(name)
        if match is None:
            continue
        conv, norm = match[1], {}
        for part in ("weight", "bias", "running_mean", "running_var"):
            value = merged.pop(f"{conv}.norm.{part}", None)
            if value is None or f"{conv}.weight" not in merged or value.shape != merged[f"{conv}.weight"].shape[:1]:
                raise CheckpointError(f"The batch norm after '{conv}' lacks '{part}', or has another width than it.")
            norm[part] = value.double()
        factor = norm["weight"] / torch.sqrt(norm["running_var"] + eps)
        bias = merged.get(f"{conv}.bias", torch.zeros_like(factor)).double()
        merged[f"{conv}.weight"] = (merged[f"{conv}.weight"].double() * factor.view(-1, 1, 1, 1)).float()
        merged[f"{conv}.bias"] = (norm["bias"] + (bias - norm["running_mean"]) * factor).float()
    return merged


def _assembled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales gathered into one vector, norms with a weight for each level, a bias of zeros for convolutions without."""
    assembled = {name: tensor for name, tensor in tensors.items() if not name.startswith(_SCALE_NAMES + ".")}
    levels = len(tensors) - len(assembled)  # the scales that were left out
    if levels:
        assembled[_SCALE_NAMES] = torch.cat([tensors[f"{_SCALE_NAMES}.{level}"].reshape(1) for level in range(levels)])
    for name in list(assembled):
        match = _LEVEL_NORM.fullmatch(name)
        # detectron2's CycleBatchNormList: statistics of each level, one weight and bias for all.
        for part in ("weight", "bias") if match else ():
            if match and f"{match[1]}.{part}" in tensors:
                assembled.pop(f"{match[1]}.{part}", None)
                assembled[f"{match[1]}.{match[2]}.{part}"] = tensors[f"{match[1]}.{part}"]
    for name in list(assembled):
        match = _TOWER_CONV.fullmatch(name)
        # mmdetection's plain head has no bias; adding zeros is exact, and all networks have the same names.
        if match and assembled[name].ndim == 4:
            assembled.setdefault(f"{match.group(1)}.bias", torch.zeros(assembled[name].shape[0]))
    return assembled


# ---- deformable convolution (Dai et al., ICCV 2017), also modulated (version 2: Zhu et al., CVPR 2019) ----
# Offsets come tap by tap as (dy, dx), groups outermost, then one mask value a tap: the order of mmcv, detectron2 and
# tianzhi0549/FCOS, and of ONNX DeformConv. A sample beyond the image counts as zero.


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
