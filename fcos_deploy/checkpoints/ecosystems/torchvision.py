"""The ``fcos_resnet50_fpn`` of torchvision, whose names are the canonical ones.

Source: torchvision, ``models/detection/fcos.py``, ``transform.py``, ``anchor_utils.py`` (docs/fcos.md).
"""

from __future__ import annotations

from dataclasses import replace

from fcos_deploy.checkpoints.rules import (
    COCO_91,
    Ecosystem,
    Evidence,
    Rename,
    Rules,
    count,
    fixed,
    number,
    numbers,
    read_training_config,
)
from fcos_deploy.core.enums import CenterMode, Orientation
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, ResizeOrder, SizeRule

__all__ = ["CONFIG_KEYS", "ECOSYSTEM"]


_SHORTEST = count("shortest", "input_size")


# Arguments of ``FCOS`` in models/detection/fcos.py that decide about the detections.
CONFIG_KEYS = {
    # Of several sizes, which training chooses from, the last one is the test's.
    "min_size": replace(
        _SHORTEST, read=lambda sizes: _SHORTEST.read(sizes[-1] if isinstance(sizes, (list, tuple)) and sizes else sizes)
    ),
    "max_size": count("longest", "input_size"),
    "fixed_size": fixed(None, options=("input_size",)),
    "image_mean": numbers("mean"),
    "image_std": numbers("std"),
    "score_thresh": number("score_threshold"),
    "nms_thresh": number("iou_threshold"),
    "detections_per_img": count("max_detections"),
    "topk_candidates": count("pre_nms_top_k"),
}


def _rules(evidence: Evidence) -> Rules:
    rules = Rules(
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
    )
    rules = rules.decide("the arguments or hyper-parameters in the file", **read_training_config(CONFIG_KEYS, evidence))
    network, options = evidence.network, evidence.options
    if not network.extra_convs:
        # BackboneWithFPN (models/detection/backbone_utils.py) pools a level where it gets no extra blocks.
        rules = rules.decide("rule of torchvision: LastLevelMaxPool, where there is no P6", pooled_levels=1)
    pooled = options.pooled_levels if options.pooled_levels is not None else rules.pooled_levels or 0
    levels = network.laterals + network.extra_convs + pooled
    if levels == len(_ANCHOR_SIZES):
        return rules.decide(
            "rule of torchvision: AnchorGenerator's sizes are not in the file", anchor_sizes=_ANCHOR_SIZES
        )
    if not options.anchor_sizes:
        doubled = ",".join(str(_ANCHOR_SIZES[0] << level) for level in range(levels))
        raise ConfigError(
            f"The pyramid has {levels} levels, for which torchvision has no default sizes of AnchorGenerator, and they "
            "are not in the file.",
            hint=f"give those of the training: --anchor-sizes A,B,... (torchgeo: {doubled})",
        )
    return rules.decide("option", anchor_sizes=options.anchor_sizes)


_ANCHOR_SIZES = (8, 16, 32, 64, 128)  # of models/detection/fcos.py


ECOSYSTEM = Ecosystem(
    name="torchvision",
    signature=("head.classification_head.",),
    # Before version 2 of FeaturePyramidNetwork (torchvision 0.12) the FPN's keys had no ".0".
    renames=(Rename(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),),
    rules=_rules,
    reads_config=True,
    coco_names=COCO_91,
)
