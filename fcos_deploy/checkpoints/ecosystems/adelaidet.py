"""AdelaiDet: FCOS with R50, R101 and X101, and FCOS-RT with three levels, DLA-34 and shared towers.

Source: AdelaiDet, ``adet/modeling/fcos/``, ``adet/config/defaults.py``, ``configs/FCOS-Detection/`` (docs/fcos.md).
"""

from __future__ import annotations

import re

from fcos_deploy.checkpoints.ecosystems.detectron2 import BACKBONE_RENAMES, caffe_rules, with_stored_facts
from fcos_deploy.checkpoints.rules import (
    CHANNEL_ORDER,
    CLASSES,
    CLS_HEAD,
    LEVEL_STRIDES,
    REG_HEAD,
    SHARED_TOWER,
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
)

__all__ = ["CONFIG_KEYS", "ECOSYSTEM"]

_HEAD = "proposal_generator.fcos_head"
_X101_32X8D_STD = (57.375, 57.12, 58.395)  # BGR; the one AdelaiDet backbone that divides by a std


# Keys of adet/config/defaults.py that decide about the detections.
CONFIG_KEYS = {
    **TEST_SIZES,
    "INPUT.FORMAT": CHANNEL_ORDER,
    "MODEL.PIXEL_MEAN": numbers("mean"),
    "MODEL.PIXEL_STD": numbers("std"),
    "MODEL.META_ARCHITECTURE": fixed("OneStageDetector"),
    "MODEL.RESNETS.STRIDE_IN_1X1": flag("stride_in_1x1"),
    "MODEL.RESNETS.RES5_DILATION": fixed(1, options=("stage_dilations",)),
    "MODEL.FPN.FUSE_TYPE": fixed("sum"),
    "MODEL.FCOS.NUM_CLASSES": CLASSES,
    "MODEL.FCOS.FPN_STRIDES": LEVEL_STRIDES,
    "MODEL.FCOS.INFERENCE_TH_TEST": number("score_threshold"),
    "MODEL.FCOS.NMS_TH": number("iou_threshold"),
    "MODEL.FCOS.PRE_NMS_TOPK_TEST": count("pre_nms_top_k"),
    "MODEL.FCOS.POST_NMS_TOPK_TEST": count("max_detections"),
    "MODEL.FCOS.BOX_QUALITY": fixed("ctrness"),
    "MODEL.FCOS.THRESH_WITH_CTR": fixed(False),
    "MODEL.FCOS.USE_RELU": fixed(True),
}


def _rules(evidence: Evidence) -> Rules:
    rules = caffe_rules(evidence, profile="adelaidet", score_threshold=0.05)
    if evidence.network.groups == 32:
        rules = rules.decide("rule of AdelaiDet for X101-32x8d", std=_X101_32X8D_STD)
    if evidence.network.num_levels == 3:
        rules = rules.decide("rule of FCOS-RT: three levels", shortest=512, longest=736)
    return with_stored_facts(rules, evidence, config=read_training_config(CONFIG_KEYS, evidence))


ECOSYSTEM = Ecosystem(
    name="adelaidet",
    signature=(f"{_HEAD}.",),
    renames=(
        *BACKBONE_RENAMES,
        *moved(
            {
                f"{_HEAD}.cls_tower": f"{CLS_HEAD}.conv",
                f"{_HEAD}.bbox_tower": f"{REG_HEAD}.conv",
                f"{_HEAD}.share_tower": f"{SHARED_TOWER}.conv",
                f"{_HEAD}.cls_logits": f"{CLS_HEAD}.cls_logits",
                f"{_HEAD}.bbox_pred": f"{REG_HEAD}.bbox_reg",
                f"{_HEAD}.ctrness": f"{REG_HEAD}.bbox_ctrness",
            }
        ),
        Rename(rf"{re.escape(_HEAD)}\.scales\.(\d+)\.scale", rf"{REG_HEAD}.scales.\1"),
    ),
    rules=_rules,
    reads_config=True,
)
