"""detectron2's own FCOS (spec 6, 8.2), and the backbone names that AdelaiDet shares with it."""

from __future__ import annotations

from fcos_deploy.checkpoints.reader import TensorFacts, count_of, flat_values
from fcos_deploy.checkpoints.rules import COCO_80, Ecosystem, Evidence, Rename, Rules
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.network import BackboneType, BlockType
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["BACKBONE_RENAMES", "ECOSYSTEM", "MSRA_MEAN", "UNIT_STD", "caffe_stride", "coco_names", "stored_pixels"]

MSRA_MEAN = (103.53, 116.28, 123.675)  # BGR, 0..255
UNIT_STD = (1.0, 1.0, 1.0)

_BACKBONE = "backbone.body"
BACKBONE_RENAMES = (
    Rename.of(r"backbone\.bottom_up\.stem\.conv1\.norm\.(\w+)", _BACKBONE + r".bn1.\1"),
    Rename.of(r"backbone\.bottom_up\.stem\.conv1\.(\w+)", _BACKBONE + r".conv1.\1"),
    Rename.of(
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv(\d)\.norm\.(\w+)",
        lambda m: f"{_BACKBONE}.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.{m[4]}",
    ),
    Rename.of(
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.norm\.(\w+)",
        lambda m: f"{_BACKBONE}.layer{int(m[1]) - 1}.{m[2]}.downsample.1.{m[3]}",
    ),
    Rename.of(
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.(\w+)",
        lambda m: f"{_BACKBONE}.layer{int(m[1]) - 1}.{m[2]}.downsample.0.{m[3]}",
    ),
    Rename.of(
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.(conv\d\..+)",
        lambda m: f"{_BACKBONE}.layer{int(m[1]) - 1}.{m[2]}.{m[3]}",
    ),
    Rename.of(r"backbone\.bottom_up\.(base_layer|level\d)\.(.+)", _BACKBONE + r".\1.\2"),
    Rename.of(
        r"backbone\.fpn_(lateral|output)([345])\.(\w+)",
        lambda m: f"backbone.fpn.{'inner' if m[1] == 'lateral' else 'layer'}_blocks.{int(m[2]) - 3}.0.{m[3]}",
    ),
    Rename.of(r"backbone\.top_block\.(p[67])\.(\w+)", r"backbone.fpn.extra_blocks.\1.\2"),
)


def caffe_stride(evidence: Evidence) -> bool:
    """Whether the stride sits on the first 1x1: plain MSRA bottlenecks have it there, ResNeXt does not (spec 8.5)."""
    network = evidence.network
    bottleneck = network.backbone is BackboneType.RESNET and network.block is BlockType.BOTTLENECK
    return bottleneck and network.groups == 1


def coco_names(evidence: Evidence) -> tuple[str, ...] | None:
    """COCO's names for 80 channels."""
    return COCO_80 if evidence.network.num_classes == len(COCO_80) else None


def stored_pixels(rules: Rules, evidence: Evidence) -> Rules:
    """Take the mean and std that detectron2 stored in files of 2020-04 to 2021-02 (spec 5)."""
    stored = {name: evidence.metadata.get(name) for name in ("pixel_mean", "pixel_std")}
    values = {name.removeprefix("pixel_"): _triple(name, t) for name, t in stored.items() if t is not None}
    return rules.decide("the file's pixel_mean and pixel_std", **values)


def _triple(name: str, tensor: TensorFacts) -> tuple[float, ...]:
    if count_of(tensor) != 3:
        raise CheckpointError(f"'{name}' must have 3 values, got shape {list(tensor.shape)}.")
    return tuple(flat_values(tensor))


def _rules(evidence: Evidence) -> Rules:
    rules = Rules(
        stride_in_1x1=caffe_stride(evidence),
        profile="detectron2",
        centers=CenterMode.HALF,
        score_threshold=0.2,
        iou_threshold=0.6,
        channel_order=ChannelOrder.BGR,
        mean=MSRA_MEAN,
        std=UNIT_STD,
        resize_filter=ResizeFilter.PIL,
        size_rule=SizeRule.DETECTRON2,
    )
    rules = rules.decide("rule of detectron2: 80 channels are COCO's classes", class_names=coco_names(evidence))
    return stored_pixels(rules, evidence)


ECOSYSTEM = Ecosystem(
    name="detectron2",
    signature=("head.cls_subnet.", "backbone.bottom_up."),
    renames=(
        *BACKBONE_RENAMES,
        Rename.of(r"head\.cls_subnet\.(.+)", r"head.classification_head.conv.\1"),
        Rename.of(r"head\.bbox_subnet\.(.+)", r"head.regression_head.conv.\1"),
        Rename.of(r"head\.cls_score\.(\w+)", r"head.classification_head.cls_logits.\1"),
        Rename.of(r"head\.bbox_pred\.(\w+)", r"head.regression_head.bbox_reg.\1"),
        Rename.of(r"head\.ctrness\.(\w+)", r"head.regression_head.bbox_ctrness.\1"),
    ),
    rules=_rules,
)
