"""The FCOS of detectron2 itself, and what AdelaiDet shares with it: names of the backbone, Caffe pixels.

Source: detectron2, ``modeling/meta_arch/fcos.py`` and ``configs/common/models/fcos.py`` (docs/fcos.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fcos_deploy.checkpoints.reader import TensorFacts, count_of, flat_values
from fcos_deploy.checkpoints.rules import (
    CHANNEL_ORDER,
    CLASSES,
    CLS_HEAD,
    REG_HEAD,
    TEST_SIZES,
    Ecosystem,
    Evidence,
    Rename,
    Rules,
    count,
    flag,
    moved,
    number,
    numbers,
    read_training_config,
)
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import BackboneType, BlockType
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = [
    "BACKBONE_RENAMES",
    "CONFIG_KEYS",
    "ECOSYSTEM",
    "MSRA_MEAN",
    "UNIT_STD",
    "ask_what_the_backbone_leaves_open",
    "caffe_rules",
    "caffe_stride",
    "with_stored_facts",
]

MSRA_MEAN = (103.53, 116.28, 123.675)  # BGR, 0..255
UNIT_STD = (1.0, 1.0, 1.0)
TORCHVISION_PIXELS = "123.675,116.28,103.53 and 58.395,57.12,57.375"  # mean and std, RGB, 0..255


def _residual_block(match: re.Match[str]) -> str:
    """``res3.0.conv1.norm.weight`` -> ``layer2.0.bn1.weight``; a shortcut's convolution and norm are numbered."""
    layer = re.sub(r"^conv(\d)\.norm\b", r"bn\1", match[3])
    layer = re.sub(r"^shortcut\.norm\b", "downsample.1", layer)
    layer = re.sub(r"^shortcut\b", "downsample.0", layer)
    return f"backbone.body.layer{int(match[1]) - 1}.{match[2]}.{layer}"


def _osa_layer(match: re.Match[str]) -> str:
    """``stage3.OSA3_2.layers.0.OSA3_2_0/norm.weight`` -> ``stages.1.1.layers.0.1.weight``; AdelaiDet counts from 1."""
    layer = re.sub(r"stem_(\d)/", lambda m: f"{int(m[1]) - 1}/", match[2])
    layer = re.sub(r"^OSA\d_(\d+)\.", lambda m: f"{int(m[1]) - 1}.", layer)
    layer = re.sub(r"\.OSA\w+/", "/", layer)
    layer = layer.replace("/conv.", ".0.").replace("/norm.", ".1.")
    part = "stem" if match[1] == "stem" else f"stages.{int(match[1][-1]) - 2}"
    return f"backbone.body.{part}.{layer}"


BACKBONE_RENAMES = (
    *moved(
        {
            "backbone.bottom_up.stem.conv1.norm": "backbone.body.bn1",
            "backbone.bottom_up.stem.conv1": "backbone.body.conv1",
            "backbone.top_block": "backbone.fpn.extra_blocks",
        }
    ),
    Rename(r"backbone\.bottom_up\.res([2-5])\.(\d+)\.(.+)", _residual_block),
    Rename(r"backbone\.bottom_up\.(base_layer|level\d)\.(.+)", r"backbone.body.\1.\2"),  # DLA
    Rename(r"backbone\.bottom_up\.(stem|stage\d)\.(.+/(?:conv|norm)\..+|.+\.ese\.fc\..+)", _osa_layer),
    Rename(
        r"backbone\.fpn_(lateral|output)([2345])\.(\w+)",
        lambda m: f"backbone.fpn.{'inner' if m[1] == 'lateral' else 'layer'}_blocks.{m[2]}.0.{m[3]}",
    ),
)


def caffe_stride(evidence: Evidence) -> bool:
    """Whether the stride sits on the first 1x1: plain MSRA bottlenecks have it there, ResNeXt does not."""
    network = evidence.network
    bottleneck = network.backbone is BackboneType.RESNET and network.block is BlockType.BOTTLENECK
    return bottleneck and network.groups == 1


def caffe_rules(evidence: Evidence, *, profile: str, score_threshold: float) -> Rules:
    """What detectron2 and AdelaiDet share: MSRA backbones and their pixels, resized by PIL."""
    return Rules(
        stride_in_1x1=caffe_stride(evidence),
        profile=profile,
        score_threshold=score_threshold,
        iou_threshold=0.6,
        channel_order=ChannelOrder.BGR,
        mean=MSRA_MEAN,
        std=UNIT_STD,
        resize_filter=ResizeFilter.PIL,
        size_rule=SizeRule.DETECTRON2,
    )


def with_stored_facts(rules: Rules, evidence: Evidence, *, config: Mapping[str, Any]) -> Rules:
    """Take what the file says: ``config``, and the mean and std that detectron2 stored for a while.

    It did from 2020-04-20 (9ced00a1) to 2021-02-25 (3c0509e6).
    """
    values = {}
    for name in ("mean", "std"):
        tensor: TensorFacts | None = evidence.metadata.get(f"pixel_{name}")
        if tensor is not None:
            channels = evidence.network.image_channels
            if count_of(tensor) != channels:
                raise CheckpointError(f"'pixel_{name}' must have {channels} values, got shape {list(tensor.shape)}.")
            values[name] = tuple(flat_values(tensor))
    order = _order_of(values["mean"]) if "mean" in values else None
    msra_rules = rules
    rules = rules.decide("the configuration in the file", **config)
    rules = rules.decide("the file's pixel_mean and pixel_std", channel_order=order, **values)
    ask_what_the_backbone_leaves_open(evidence, msra_rules, stored=frozenset({*values, *config}), order=order)
    return rules


# Means of the pretrained backbones in red, green, blue, 0..255; whoever stores them shows the order of the channels.
_KNOWN_MEANS = ((123.675, 116.28, 103.53), (122.7717, 115.9465, 102.9801))


def _order_of(mean: tuple[float, ...]) -> ChannelOrder | None:
    """The order in which a mean is one of the known ones, within a level; None where it is neither."""
    if len(mean) == 1:
        return ChannelOrder.GRAY
    for order, turned in ((ChannelOrder.RGB, mean), (ChannelOrder.BGR, mean[::-1])):
        for known in _KNOWN_MEANS:
            if all(abs(a - b) < 1 for a, b in zip(turned, known, strict=True)):
                return order
    return None


def ask_what_the_backbone_leaves_open(
    evidence: Evidence, rules: Rules, *, stored: frozenset[str] = frozenset(), order: ChannelOrder | None = None
) -> None:
    """Stop at a ResNet that is not surely an MSRA one, whose stride and pixels torchvision's has otherwise.

    MSRA weights have their batch norm merged. Statistics of its own say that the body was converted from torchvision's,
    or trained from MSRA's with synchronised batch norm: the tensors are the same. ``rules``: those of MSRA's;
    ``stored``: what else the file says, by the names of ``Rules``; ``order``: the channels that the stored mean shows.

    Raises:
        ConfigError: naming the options that answer it.
    """
    network, options = evidence.network, evidence.options
    open_questions = []
    msra = network.backbone is not BackboneType.RESNET or network.groups != 1 or evidence.centred_batch_norm()
    if not msra:
        if network.block is BlockType.BOTTLENECK and options.stride_in_1x1 is None and "stride_in_1x1" not in stored:
            open_questions.append("--stride-in-1x1 or --stride-in-3x3")
        given = {"mean": options.mean, "std": options.std}
        open_questions += [f"--{name} A,B,C" for name, value in given.items() if value is None and name not in stored]
    coloured = network.image_channels == 3 and "channel_order" not in stored
    if coloured and options.channel_order is None and order is None and (not msra or "mean" in stored):
        open_questions.append("--channel-order bgr or rgb")
    if open_questions and not msra:
        raise ConfigError(
            "The backbone's batch norm has statistics of its own, so it may be torchvision's (stride in the 3x3, RGB) "
            "or MSRA's (stride in the 1x1, BGR).",
            hint=f"say what the training used: {', '.join(open_questions)}; "
            f"MSRA: {','.join(map(str, rules.mean))} and 1,1,1; torchvision: {TORCHVISION_PIXELS}",
        )
    if open_questions:
        raise ConfigError(
            "The stored pixel_mean does not show whether the channels are RGB or BGR.", hint=", ".join(open_questions)
        )


# Keys of configs/common/models/fcos.py that decide about the detections.
CONFIG_KEYS = {
    **TEST_SIZES,
    "INPUT.FORMAT": CHANNEL_ORDER,
    "model.input_format": CHANNEL_ORDER,
    "model.pixel_mean": numbers("mean"),
    "model.pixel_std": numbers("std"),
    "model.num_classes": CLASSES,
    "model.backbone.bottom_up.stages.stride_in_1x1": flag("stride_in_1x1"),
    "model.test_score_thresh": number("score_threshold"),
    "model.test_nms_thresh": number("iou_threshold"),
    "model.test_topk_candidates": count("pre_nms_top_k"),
    "model.max_detections_per_image": count("max_detections"),
}


def _rules(evidence: Evidence) -> Rules:
    if not evidence.network.extra_convs and evidence.options.pooled_levels is None:
        raise ConfigError(
            "The pyramid has no P6. The file does not say whether a level is pooled behind P5 (LastLevelMaxPool): it "
            "would have no weights.",
            hint="--pooled-levels 1, or --pooled-levels 0",
        )
    rules = caffe_rules(evidence, profile="detectron2", score_threshold=0.2)
    return with_stored_facts(rules, evidence, config=read_training_config(CONFIG_KEYS, evidence))


ECOSYSTEM = Ecosystem(
    name="detectron2",
    signature=("head.cls_subnet.", "backbone.bottom_up."),
    renames=(
        *BACKBONE_RENAMES,
        *moved(
            {
                "head.cls_subnet": f"{CLS_HEAD}.conv",
                "head.bbox_subnet": f"{REG_HEAD}.conv",
                "head.cls_score": f"{CLS_HEAD}.cls_logits",
                "head.bbox_pred": f"{REG_HEAD}.bbox_reg",
                "head.ctrness": f"{REG_HEAD}.bbox_ctrness",
            }
        ),
    ),
    rules=_rules,
    reads_config=True,
)
