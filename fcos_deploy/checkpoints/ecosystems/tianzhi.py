"""tianzhi0549/FCOS, the paper's code: ``original`` and ``imprv``, with ResNet, ResNeXt and MobileNetV2.

Source: tianzhi0549/FCOS, ``fcos_core/modeling/rpn/fcos/``, ``configs/fcos/`` (docs/fcos.md).
"""

from __future__ import annotations

from fcos_deploy.checkpoints.ecosystems.detectron2 import UNIT_STD, ask_what_the_backbone_leaves_open, caffe_stride
from fcos_deploy.checkpoints.rules import (
    CLS_HEAD,
    COCO_80,
    LEVEL_STRIDES,
    REG_HEAD,
    TEST_SIZES,
    Ecosystem,
    Evidence,
    Rename,
    Rules,
    count,
    fixed,
    flag,
    moved,
    number,
    numbers,
    read_training_config,
    word,
)
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.network import BackboneType, BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["CAFFE_MEAN", "CONFIG_KEYS", "ECOSYSTEM"]

CAFFE_MEAN = (102.9801, 115.9465, 122.7717)  # BGR, 0..255


# Keys of fcos_core/config/defaults.py that decide about the detections.
CONFIG_KEYS = {
    **TEST_SIZES,
    "INPUT.PIXEL_MEAN": numbers("mean"),
    "INPUT.PIXEL_STD": numbers("std"),
    "INPUT.TO_BGR255": fixed(True),
    "MODEL.RPN_ONLY": fixed(True),
    "MODEL.RESNETS.STRIDE_IN_1X1": flag("stride_in_1x1"),
    "MODEL.RESNETS.RES5_DILATION": fixed(1, options=("stage_dilations",)),
    "MODEL.FCOS.FPN_STRIDES": LEVEL_STRIDES,
    "MODEL.FCOS.INFERENCE_TH": number("score_threshold"),
    "MODEL.FCOS.NMS_TH": number("iou_threshold"),
    "MODEL.FCOS.PRE_NMS_TOP_N": count("pre_nms_top_k"),
    "MODEL.FCOS.NORM_REG_TARGETS": word("box_activation", {True: BoxActivation.RELU, False: BoxActivation.EXP}),
    "MODEL.FCOS.CENTERNESS_ON_REG": flag("centerness_on_reg"),
    "TEST.DETECTIONS_PER_IMG": count("max_detections"),
    "TEST.BBOX_AUG.ENABLED": fixed(False),
}


def _rules(evidence: Evidence) -> Rules:
    rules = Rules(
        label_offset=1,  # Label 0 is the background, which has no channel.
        stride_in_1x1=caffe_stride(evidence),
        profile="tianzhi",
        score_threshold=0.05,
        iou_threshold=0.6,
        channel_order=ChannelOrder.BGR,
        mean=CAFFE_MEAN,
        std=UNIT_STD,
        resize_filter=ResizeFilter.PIL,
        size_rule=SizeRule.TIANZHI,
        orientation=Orientation.STORED,
    )
    if evidence.network.backbone is not BackboneType.MOBILENET_V2:
        rules = rules.decide("rule of tianzhi: FrozenBatchNorm adds nothing to the variance", norm_eps=0.0)
    config = read_training_config(CONFIG_KEYS, evidence)
    ask_what_the_backbone_leaves_open(evidence, rules, stored=frozenset(config))
    variant, source = evidence.options.variant, "option --variant"
    if not variant and "imprv" in evidence.file_name.lower():
        variant, source = "imprv", "the file's name"
    stated = "the configuration in the file"
    if not variant and {"box_activation", "centerness_on_reg"} <= config.keys():
        return rules.decide(stated, **config)
    if not variant:
        raise ConfigError(
            "The original and the improved FCOS of tianzhi0549/FCOS have the same tensors, so which one this is cannot "
            "be seen.",
            hint="give --variant original, or --variant imprv for a model trained with a 'fcos_imprv_*' config",
        )
    original = variant == "original"
    return rules.decide(
        source,
        variant=variant,
        box_activation=BoxActivation.EXP if original else BoxActivation.RELU,
        centerness_on_reg=not original,
    ).decide(stated, **config)


ECOSYSTEM = Ecosystem(
    name="tianzhi",
    signature=("rpn.head.cls_tower.",),
    variants=("original", "imprv"),
    renames=(
        *moved(
            {
                "backbone.body.stem": "backbone.body",
                "backbone.fpn.top_blocks": "backbone.fpn.extra_blocks",
                "rpn.head.cls_tower": f"{CLS_HEAD}.conv",
                "rpn.head.bbox_tower": f"{REG_HEAD}.conv",
                "rpn.head.cls_logits": f"{CLS_HEAD}.cls_logits",
                "rpn.head.bbox_pred": f"{REG_HEAD}.bbox_reg",
                "rpn.head.centerness": f"{REG_HEAD}.bbox_ctrness",
            }
        ),
        Rename(r"rpn\.head\.scales\.(\d+)\.scale", rf"{REG_HEAD}.scales.\1"),
        Rename(
            r"backbone\.fpn\.fpn_(inner|layer)([1234])\.(\w+)",
            lambda m: f"backbone.fpn.{m[1]}_blocks.{m[2]}.0.{m[3]}",
        ),
    ),
    rules=_rules,
    reads_config=True,
    coco_names=("background", *COCO_80),
)
