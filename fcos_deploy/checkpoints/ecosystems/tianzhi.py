"""tianzhi0549/FCOS, the paper's code: original and improved, with ResNet, ResNeXt and MobileNetV2 (spec 7, 8.3)."""

from __future__ import annotations

from fcos_deploy.checkpoints.ecosystems.detectron2 import UNIT_STD, caffe_stride
from fcos_deploy.checkpoints.rules import COCO_80, Ecosystem, Evidence, Rename, Rules
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.network import BackboneType, BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["CAFFE_MEAN", "ECOSYSTEM"]

CAFFE_MEAN = (102.9801, 115.9465, 122.7717)  # BGR, 0..255
_VARIANTS = ("original", "imprv")


def _rules(evidence: Evidence) -> Rules:
    rules = Rules(
        label_offset=1,  # Label 0 is the background, which has no channel.
        stride_in_1x1=caffe_stride(evidence),
        profile="tianzhi",
        centers=CenterMode.HALF,
        score_threshold=0.05,
        iou_threshold=0.6,
        channel_order=ChannelOrder.BGR,
        mean=CAFFE_MEAN,
        std=UNIT_STD,
        resize_filter=ResizeFilter.PIL,
        size_rule=SizeRule.TIANZHI,
    )
    if evidence.network.num_classes == len(COCO_80):
        names = ("background", *COCO_80)
        rules = rules.decide("rule of tianzhi: 80 channels are COCO's classes, labels from 1", class_names=names)
    if evidence.network.backbone is not BackboneType.MOBILENET_V2:
        rules = rules.decide("rule of tianzhi: FrozenBatchNorm adds nothing to the variance", norm_eps=0.0)
    return _with_variant(rules, evidence)


def _with_variant(rules: Rules, evidence: Evidence) -> Rules:
    variant, source = evidence.variant, "option --variant"
    if not variant and "imprv" in evidence.file_name.lower():
        variant, source = "imprv", "the file's name"
    if not variant:
        raise ConfigError(
            "The original and the improved FCOS of tianzhi0549/FCOS have the same tensors; which one this is cannot be "
            "seen.",
            hint="give --variant original, or --variant imprv for a model trained with a 'fcos_imprv_*' config",
        )
    original = variant == "original"
    return rules.decide(
        source,
        variant=variant,
        box_activation=BoxActivation.EXP if original else BoxActivation.RELU,
        centerness_on_reg=not original,
    )


_HEAD = r"rpn\.head\."
ECOSYSTEM = Ecosystem(
    name="tianzhi",
    signature=("rpn.head.cls_tower.",),
    variants=_VARIANTS,
    renames=(
        Rename.of(r"backbone\.body\.stem\.(conv1|bn1)\.(\w+)", r"backbone.body.\1.\2"),
        Rename.of(
            r"backbone\.fpn\.fpn_(inner|layer)([234])\.(\w+)",
            lambda m: f"backbone.fpn.{m[1]}_blocks.{int(m[2]) - 2}.0.{m[3]}",  # 2 is C3
        ),
        Rename.of(r"backbone\.fpn\.top_blocks\.(p[67])\.(\w+)", r"backbone.fpn.extra_blocks.\1.\2"),
        Rename.of(_HEAD + r"cls_tower\.(.+)", r"head.classification_head.conv.\1"),
        Rename.of(_HEAD + r"bbox_tower\.(.+)", r"head.regression_head.conv.\1"),
        Rename.of(_HEAD + r"cls_logits\.(\w+)", r"head.classification_head.cls_logits.\1"),
        Rename.of(_HEAD + r"bbox_pred\.(\w+)", r"head.regression_head.bbox_reg.\1"),
        Rename.of(_HEAD + r"centerness\.(\w+)", r"head.regression_head.bbox_ctrness.\1"),
        Rename.of(_HEAD + r"scales\.(\d+)\.scale", r"head.regression_head.scales.\1"),
    ),
    rules=_rules,
)
