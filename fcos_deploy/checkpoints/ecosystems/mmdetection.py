"""The FCOS of mmdetection 1 to 3, ``plain`` or with the ``tricks`` of its "center-normbbox-centeronreg-giou" configs.

Source: mmdetection 3.3.0, ``models/dense_heads/fcos_head.py``, ``configs/fcos/`` (docs/fcos.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fcos_deploy.checkpoints.ecosystems.detectron2 import MSRA_MEAN, UNIT_STD
from fcos_deploy.checkpoints.ecosystems.tianzhi import CAFFE_MEAN
from fcos_deploy.checkpoints.mmdetection_config import read_config
from fcos_deploy.checkpoints.rules import CLS_HEAD, REG_HEAD, Ecosystem, Evidence, Rename, Rules, moved
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.network import BlockType, BoxActivation, TowerNorm
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["ECOSYSTEM"]

_PLAIN, _TRICKS = "plain", "tricks"
_CONFIG = "the configuration in the file"


def _rules(evidence: Evidence) -> Rules:
    stored = evidence.metadata.get("meta")
    meta: Mapping[str, Any] = stored if isinstance(stored, dict) else {}
    config = read_config(meta, network=evidence.network, options=evidence.options)
    rules = _by_tensors(evidence, config or {})
    rules = _with_class_names(rules, meta)
    if config is None:
        return rules
    rules = rules.decide(_CONFIG, **config)
    return dataclasses.replace(rules, shortest=None, longest=None) if "input_size" in config else rules


def _by_tensors(evidence: Evidence, config: Mapping[str, Any]) -> Rules:
    """What the tensors show, for files without a configuration."""
    variant, source = evidence.variant, "option --variant"
    decided = {"box_activation", "centerness_on_reg"} <= config.keys()
    if not variant:
        # mmdetection leaves the tower convolutions' bias out unless the config asks for it, which all "tricks" do, or
        # there is no norm.
        biased = any(n.startswith("bbox_head.cls_convs.") and n.endswith(".conv.bias") for n in evidence.source_names)
        if biased and evidence.network.tower_norm is TowerNorm.NONE and not decided:
            raise ConfigError(
                "The towers of this mmdetection head have no norm, and the file has no configuration that says how "
                "boxes and centerness are computed.",
                hint="give --variant plain (exp, centerness beside the classes) or --variant tricks (norm_on_bbox and "
                "centerness_on_reg)",
            )
        variant, source = (
            (_TRICKS, "tower convolutions with bias") if biased else (_PLAIN, "tower convolutions without bias")
        )
    tricks = variant == _TRICKS
    rules = Rules(
        profile="mmdetection",
        score_threshold=0.05,
        iou_threshold=0.5,
        channel_order=ChannelOrder.RGB,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        resize_filter=ResizeFilter.CV2,
        size_rule=SizeRule.MMDETECTION,
    ).decide(
        source,
        variant=variant,
        box_activation=BoxActivation.RELU if tricks else BoxActivation.EXP,
        centerness_on_reg=tricks,
        iou_threshold=0.6 if tricks else 0.5,
    )
    network = evidence.network
    caffe = network.groups == 1 and network.block is BlockType.BOTTLENECK and evidence.merged_batch_norm()
    source = f"the backbone's batch norm statistics are {'' if caffe else 'not '}0 and 1"
    if not caffe:
        return rules.decide(
            source, stride_in_1x1=False, channel_order=rules.channel_order, mean=rules.mean, std=rules.std
        )
    mean = MSRA_MEAN if tricks else CAFFE_MEAN
    return rules.decide(source, stride_in_1x1=True, channel_order=ChannelOrder.BGR, mean=mean, std=UNIT_STD)


def _with_class_names(rules: Rules, meta: object) -> Rules:
    """Those in the file (version 3: ``dataset_meta``, version 2: ``CLASSES``)."""
    for path in (("dataset_meta", "classes"), ("dataset_meta", "CLASSES"), ("CLASSES",)):
        stored = _lookup(meta, *path)
        names = (stored,) if isinstance(stored, str) else stored
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return rules.decide("the class names in the file", class_names=tuple(names))
    return rules


def _lookup(config: object, *path: str) -> object:
    """The value under ``path``, or None where a part is missing."""
    for part in path:
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _tower(source: str, head: str) -> tuple[Rename, Rename]:
    """``cls_convs.2.conv`` and ``.gn`` are entries 6 and 7 of the tower; ``conv_offset`` is mmcv 0's deformable one."""
    layer = rf"bbox_head\.{source}_convs\.(\d+)\."
    return (
        Rename(layer + r"conv(?:\.|_)(.+)", lambda m: f"{head}.conv.{3 * int(m[1])}.{m[2]}"),
        Rename(layer + r"(?:gn|bn)\.(.+)", lambda m: f"{head}.conv.{3 * int(m[1]) + 1}.{m[2]}"),
    )


ECOSYSTEM = Ecosystem(
    name="mmdetection",
    signature=("bbox_head.", "neck."),
    variants=(_PLAIN, _TRICKS),
    reads_config=True,
    renames=(
        Rename(r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.body.\1"),
        Rename(r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        Rename(r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        Rename(r"neck\.lateral_convs\.(\d+)\.bn\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.norm.\2"),
        Rename(r"neck\.fpn_convs\.(\d+)\.bn\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.norm.\2"),
        *moved(
            {
                "bbox_head.conv_cls": f"{CLS_HEAD}.cls_logits",
                "bbox_head.conv_reg": f"{REG_HEAD}.bbox_reg",
                "bbox_head.conv_centerness": f"{REG_HEAD}.bbox_ctrness",
                # mmdetection 1
                "bbox_head.fcos_cls": f"{CLS_HEAD}.cls_logits",
                "bbox_head.fcos_reg": f"{REG_HEAD}.bbox_reg",
                "bbox_head.fcos_centerness": f"{REG_HEAD}.bbox_ctrness",
            }
        ),
        *_tower("cls", CLS_HEAD),
        *_tower("reg", REG_HEAD),
        Rename(r"bbox_head\.scales\.(\d+)\.scale", rf"{REG_HEAD}.scales.\1"),
    ),
    rules=_rules,
)
