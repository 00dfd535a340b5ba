"""AdelaiDet: FCOS with R50/R101/X101 and FCOS-RT with three levels, DLA-34, shared towers (spec 5, 8.2)."""

from __future__ import annotations

from fcos_deploy.checkpoints.ecosystems.detectron2 import (
    BACKBONE_RENAMES,
    MSRA_MEAN,
    UNIT_STD,
    caffe_stride,
    coco_names,
    stored_pixels,
)
from fcos_deploy.checkpoints.rules import Ecosystem, Evidence, Rename, Rules
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["ECOSYSTEM"]

_HEAD = r"proposal_generator\.fcos_head\."
_X101_32X8D_STD = (57.375, 57.12, 58.395)  # BGR; the one AdelaiDet backbone with torchvision-style pixels


def _rules(evidence: Evidence) -> Rules:
    rules = Rules(
        stride_in_1x1=caffe_stride(evidence),
        profile="adelaidet",
        centers=CenterMode.HALF,
        score_threshold=0.05,
        iou_threshold=0.6,
        channel_order=ChannelOrder.BGR,
        mean=MSRA_MEAN,
        std=UNIT_STD,
        resize_filter=ResizeFilter.PIL,
        size_rule=SizeRule.DETECTRON2,
    )
    rules = rules.decide("rule of AdelaiDet: 80 channels are COCO's classes", class_names=coco_names(evidence))
    if evidence.network.groups == 32:
        rules = rules.decide("rule of AdelaiDet for X101-32x8d", std=_X101_32X8D_STD)
    if evidence.network.num_levels == 3:
        rules = rules.decide("rule of FCOS-RT: three levels", shortest=512, longest=736)
    return stored_pixels(rules, evidence)


ECOSYSTEM = Ecosystem(
    name="adelaidet",
    signature=("proposal_generator.fcos_head.",),
    renames=(
        *BACKBONE_RENAMES,
        Rename.of(_HEAD + r"cls_tower\.(.+)", r"head.classification_head.conv.\1"),
        Rename.of(_HEAD + r"bbox_tower\.(.+)", r"head.regression_head.conv.\1"),
        Rename.of(_HEAD + r"share_tower\.(.+)", r"head.shared_tower.conv.\1"),
        Rename.of(_HEAD + r"cls_logits\.(\w+)", r"head.classification_head.cls_logits.\1"),
        Rename.of(_HEAD + r"bbox_pred\.(\w+)", r"head.regression_head.bbox_reg.\1"),
        Rename.of(_HEAD + r"ctrness\.(\w+)", r"head.regression_head.bbox_ctrness.\1"),
        Rename.of(_HEAD + r"scales\.(\d+)\.scale", r"head.regression_head.scales.\1"),
    ),
    rules=_rules,
)
