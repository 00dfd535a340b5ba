"""The FCOS of detectron2 itself, and what AdelaiDet shares with it: names of the backbone, Caffe pixels.

Source: detectron2, ``modeling/meta_arch/fcos.py`` and ``configs/common/models/fcos.py`` (docs/fcos.md).
"""

from __future__ import annotations

import re

from fcos_deploy.checkpoints.reader import TensorFacts, count_of, flat_values
from fcos_deploy.checkpoints.rules import CLS_HEAD, REG_HEAD, Ecosystem, Evidence, Rename, Rules, moved
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.network import BackboneType, BlockType
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["BACKBONE_RENAMES", "ECOSYSTEM", "MSRA_MEAN", "UNIT_STD", "caffe_rules", "caffe_stride", "stored_pixels"]

MSRA_MEAN = (103.53, 116.28, 123.675)  # BGR, 0..255
UNIT_STD = (1.0, 1.0, 1.0)


def _residual_block(match: re.Match[str]) -> str:
    """``res3.0.conv1.norm.weight`` -> ``layer2.0.bn1.weight``; a shortcut's convolution and norm are numbered."""
    layer = re.sub(r"^conv(\d)\.norm\b", r"bn\1", match[3])
    layer = re.sub(r"^shortcut\.norm\b", "downsample.1", layer)
    layer = re.sub(r"^shortcut\b", "downsample.0", layer)
    return f"backbone.body.layer{int(match[1]) - 1}.{match[2]}.{layer}"


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
    Rename(
        r"backbone\.fpn_(lateral|output)([345])\.(\w+)",
        lambda m: f"backbone.fpn.{'inner' if m[1] == 'lateral' else 'layer'}_blocks.{int(m[2]) - 3}.0.{m[3]}",
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


def stored_pixels(rules: Rules, evidence: Evidence) -> Rules:
    """Take the mean and std that detectron2 stored from 2020-04-20 (9ced00a1) to 2021-02-25 (3c0509e6)."""
    values = {}
    for name in ("mean", "std"):
        tensor: TensorFacts | None = evidence.metadata.get(f"pixel_{name}")
        if tensor is not None:
            if count_of(tensor) != 3:
                raise CheckpointError(f"'pixel_{name}' must have 3 values, got shape {list(tensor.shape)}.")
            values[name] = tuple(flat_values(tensor))
    return rules.decide("the file's pixel_mean and pixel_std", **values)


def _rules(evidence: Evidence) -> Rules:
    return stored_pixels(caffe_rules(evidence, profile="detectron2", score_threshold=0.2), evidence)


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
)
