"""The ``fcos_resnet50_fpn`` of torchvision, whose names are the canonical ones.

Source: torchvision, ``models/detection/fcos.py``, ``transform.py``, ``anchor_utils.py`` (docs/fcos.md).
"""

from __future__ import annotations

from fcos_deploy.checkpoints.rules import COCO_91, Ecosystem, Evidence, Rename, Rules
from fcos_deploy.core.enums import CenterMode, Orientation
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, ResizeOrder, SizeRule

__all__ = ["ECOSYSTEM"]


def _rules(evidence: Evidence) -> Rules:
    if evidence.network.num_levels != 5:
        raise CheckpointError(
            "The pyramid has no P6 and P7. torchvision's resnet_fpn_backbone then adds a level by pooling, which has "
            "no weights, and the sizes of the anchors are not in the file.",
            hint="train with extra_blocks=LastLevelP6P7(256, 256), or see docs/your-own-fcos.md",
        )
    return Rules(
        profile="torchvision",
        centers=CenterMode.TORCHVISION,
        score_threshold=0.2,
        iou_threshold=0.6,
        channel_order=ChannelOrder.RGB,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        pixel_scale=255.0,
        resize_filter=ResizeFilter.TORCH,
        resize_order=ResizeOrder.NORMALIZE_FIRST,
        size_rule=SizeRule.TORCHVISION,
        orientation=Orientation.STORED,
    ).decide("rule of torchvision: AnchorGenerator's sizes are not in the file", anchor_sizes=(8, 16, 32, 64, 128))


ECOSYSTEM = Ecosystem(
    name="torchvision",
    signature=("head.classification_head.",),
    # Before version 2 of FeaturePyramidNetwork (torchvision 0.12) the FPN's keys had no ".0".
    renames=(Rename(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),),
    rules=_rules,
    coco_names=COCO_91,
)
