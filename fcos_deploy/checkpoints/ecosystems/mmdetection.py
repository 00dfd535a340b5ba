"""Reads the configuration text in mmdetection checkpoints without evaluating it."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from fcos_deploy.checkpoints.ecosystems.detectron2 import MSRA_MEAN, UNIT_STD
from fcos_deploy.checkpoints.ecosystems.tianzhi import CAFFE_MEAN
from fcos_deploy.checkpoints.rules import COCO_80, Ecosystem, Evidence, Rename, Rules
from fcos_deploy.core.enums import CenterMode
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.network import BlockType, BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["ECOSYSTEM", "UNKNOWN", "find_dicts", "lookup", "parse_config"]

UNKNOWN = object()  # stands for an expression that is not a literal
_LONGEST_TEXT = 2_000_000


def parse_config(text: str) -> dict[str, Any]:
    """Top-level names and their values; literals, ``dict(...)`` and names assigned before, all else is ``UNKNOWN``.

    Text that is not Python gives an empty dict.
    """
    if len(text) > _LONGEST_TEXT:
        return {}
    try:
        module = ast.parse(text)
        return _assignments(module)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _assignments(module: ast.Module) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = _value(statement.value, names)
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:  # Any: a literal of any type
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Name):
        return names.get(node.id, UNKNOWN)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, (int, float)) else UNKNOWN
    if isinstance(node, ast.Dict):
        pairs = ((k, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant))
        return {k.value: _value(v, names) for k, v in pairs}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {k.arg: _value(k.value, names) for k in node.keywords if k.arg is not None}
    return UNKNOWN


def lookup(config: Any, *path: str) -> Any:  # Any: configurations are untyped
    """The value under ``path``, or None where a part is missing or not known."""
    for part in path:
        if not isinstance(config, dict) or part not in config:
            return None
        config = config[part]
    return None if config is UNKNOWN else config


def find_dicts(config: Any, type_name: str) -> Iterator[dict[str, Any]]:
    """All dicts with ``type=type_name`` at any depth of ``config``, in order."""
    if isinstance(config, dict):
        if config.get("type") == type_name:
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for item in config:
            yield from find_dicts(item, type_name)


_RGB_MEAN = (123.675, 116.28, 103.53)
_RGB_STD = (58.395, 57.12, 57.375)
_PLAIN, _TRICKS = "plain", "tricks"
_CONFIG = "the configuration in the file"


def _rules(evidence: Evidence) -> Rules:
    config = parse_config(_config_text(evidence))
    _refuse_other_detectors(config)
    rules = _by_variant(_base(), evidence)
    rules = _pixels_by_batch_norm(rules, evidence)
    rules = _class_names(rules, evidence)
    rules = _head_of(config, rules, evidence)
    rules = _test_of(config, rules)
    return _pixels_of(config, rules)


def _config_text(evidence: Evidence) -> str:
    meta = evidence.metadata.get("meta")
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, dict) else []
    return next((text for text in texts if isinstance(text, str)), "")


def _base() -> Rules:
    return Rules(
        profile="mmdetection",
        centers=CenterMode.HALF,
        score_threshold=0.05,
        iou_threshold=0.5,
        channel_order=ChannelOrder.RGB,
        mean=_RGB_MEAN,
        std=_RGB_STD,
        resize_filter=ResizeFilter.CV2,
        size_rule=SizeRule.MMDETECTION,
    )


def _by_variant(rules: Rules, evidence: Evidence) -> Rules:
    variant, source = evidence.variant, "option --variant"
    if not variant:
        # mmdetection leaves the tower convolutions' bias out unless the config asks for it, which all "tricks" do.
        biased = any(n.startswith("bbox_head.cls_convs.") and n.endswith(".conv.bias") for n in evidence.source_names)
        variant = _TRICKS if biased else _PLAIN
        source = f"tower convolutions {'with' if biased else 'without'} bias"
    tricks = variant == _TRICKS
    return rules.decide(
        source,
        variant=variant,
        box_activation=BoxActivation.RELU if tricks else BoxActivation.EXP,
        centerness_on_reg=tricks,
        iou_threshold=0.6 if tricks else 0.5,
    )


def _pixels_by_batch_norm(rules: Rules, evidence: Evidence) -> Rules:
    network = evidence.network
    caffe = network.groups == 1 and network.block is BlockType.BOTTLENECK and evidence.merged_batch_norm()
    source = f"the backbone's batch norm statistics are {'' if caffe else 'not '}0 and 1"
    if not caffe:
        return rules.decide(source, stride_in_1x1=False, channel_order=ChannelOrder.RGB, mean=_RGB_MEAN, std=_RGB_STD)
    mean = MSRA_MEAN if rules.variant == _TRICKS else CAFFE_MEAN
    return rules.decide(source, stride_in_1x1=True, channel_order=ChannelOrder.BGR, mean=mean, std=UNIT_STD)


def _class_names(rules: Rules, evidence: Evidence) -> Rules:
    count = evidence.network.num_classes
    if count == len(COCO_80):
        rules = rules.decide("rule of mmdetection: 80 channels are COCO's classes", class_names=COCO_80)
    meta = evidence.metadata.get("meta")
    stored = (lookup(meta, "dataset_meta", "classes"), lookup(meta, "dataset_meta", "CLASSES"), lookup(meta, "CLASSES"))
    for item in stored:
        names = (item,) if isinstance(item, str) else item
        if isinstance(names, (list, tuple)) and len(names) == count and all(isinstance(n, str) for n in names):
            return rules.decide("the class names in the file", class_names=tuple(names))
    return rules


def _refuse_other_detectors(config: dict[str, Any]) -> None:
    expected = (("FCOS", ("model", "type")), ("FCOSHead", ("model", "bbox_head", "type")))
    for wanted, path in expected:
        found = lookup(config, *path)
        if found not in (None, wanted):
            raise CheckpointError(f"The configuration in the file says {'.'.join(path)} = '{found}', not '{wanted}'.")
    if lookup(config, "model", "neck", "relu_before_extra_convs") is False:
        raise CheckpointError("The configuration says relu_before_extra_convs=False; P7 of FCOS follows relu(P6).")


def _head_of(config: dict[str, Any], rules: Rules, evidence: Evidence) -> Rules:
    if lookup(config, "model") is None:
        return rules
    on_bbox = lookup(config, "model", "bbox_head", "norm_on_bbox") is True  # False is FCOSHead's default.
    style = lookup(config, "model", "backbone", "style")
    strides = lookup(config, "model", "bbox_head", "strides")
    if strides is not None and tuple(strides) != evidence.network.strides:
        raise CheckpointError(f"The configuration says strides {strides}, expected {list(evidence.network.strides)}.")
    return rules.decide(
        _CONFIG,
        box_activation=BoxActivation.RELU if on_bbox else BoxActivation.EXP,
        centerness_on_reg=lookup(config, "model", "bbox_head", "centerness_on_reg") is True,
        stride_in_1x1=None if style is None else style == "caffe" and evidence.network.block is BlockType.BOTTLENECK,
    )


def _test_of(config: dict[str, Any], rules: Rules) -> Rules:
    test = lookup(config, "model", "test_cfg") or lookup(config, "test_cfg") or {}
    kind = lookup(test, "nms", "type")
    if kind not in (None, "nms"):
        raise CheckpointError(
            f"The configuration suppresses with '{kind}', expected 'nms'.", hint="change test_cfg, which is not trained"
        )
    overlap = lookup(test, "nms", "iou_threshold") or lookup(test, "nms", "iou_thr")
    return _size_of(config, rules).decide(
        _CONFIG,
        score_threshold=_number(lookup(test, "score_thr")),
        iou_threshold=_number(overlap),
        pre_nms_top_k=_whole(lookup(test, "nms_pre")),
        max_detections=_whole(lookup(test, "max_per_img")),
    )


def _size_of(config: dict[str, Any], rules: Rules) -> Rules:
    """The test pipeline's size: v3 ``Resize(scale)``, v2 ``MultiScaleFlipAug(img_scale)``."""
    pipeline = lookup(config, "test_pipeline")
    for kind, key in (("MultiScaleFlipAug", "img_scale"), ("Resize", "scale")):
        for step in find_dicts(pipeline, kind):
            scale = step.get(key)
            if isinstance(scale, list) and len(scale) == 2 and all(_whole(v) for v in scale):
                if not _keeps_ratio(step, pipeline):
                    return dataclasses.replace(rules, shortest=None, longest=None)  # An option has to say.
                return rules.decide(_CONFIG, shortest=min(scale), longest=max(scale))
    return rules


def _keeps_ratio(step: dict[str, Any], pipeline: Any) -> bool:  # Any: configurations are untyped
    """Whether the step that names the size keeps the ratio; unless it says so, v3's does not and v2's does."""
    if step.get("type") == "Resize":
        return step.get("keep_ratio") is True
    return all(inner.get("keep_ratio") is not False for inner in find_dicts(pipeline, "Resize"))


def _pixels_of(config: dict[str, Any], rules: Rules) -> Rules:
    """v3: ``model.data_preprocessor``; v2: ``img_norm_cfg``, or the pipeline's ``Normalize``."""
    steps = [
        (lookup(config, "model", "data_preprocessor"), "bgr_to_rgb"),
        (lookup(config, "img_norm_cfg"), "to_rgb"),
        *((step, "to_rgb") for step in find_dicts(lookup(config, "test_pipeline"), "Normalize")),
    ]
    for step, key in steps:
        mean, std = _three(lookup(step, "mean")), _three(lookup(step, "std"))
        if mean and std:
            # Without the key: v3 leaves BGR, v2 converts to RGB.
            flag = lookup(step, key)
            rgb = flag if isinstance(flag, bool) else key == "to_rgb"
            order = ChannelOrder.RGB if rgb else ChannelOrder.BGR
            return rules.decide(_CONFIG, mean=mean, std=std, channel_order=order)
    return rules


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _three(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    numbers = [_number(v) for v in value]
    return tuple(v for v in numbers if v is not None) if None not in numbers else None


def _tower(source: str, head: str) -> tuple[Rename, Rename]:
    """``cls_convs.2.conv`` and ``.gn`` are entries 6 and 7 of the tower."""
    layer = rf"bbox_head\.{source}_convs\.(\d+)\."
    return (
        Rename.of(layer + r"conv\.(.+)", lambda m: f"head.{head}.conv.{3 * int(m[1])}.{m[2]}"),
        Rename.of(layer + r"(?:gn|bn)\.(.+)", lambda m: f"head.{head}.conv.{3 * int(m[1]) + 1}.{m[2]}"),
    )


ECOSYSTEM = Ecosystem(
    name="mmdetection",
    signature=("bbox_head.", "neck."),
    variants=(_PLAIN, _TRICKS),
    renames=(
        Rename.of(r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.body.\1"),
        Rename.of(r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        Rename.of(r"neck\.fpn_convs\.([012])\.conv\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        Rename.of(
            r"neck\.fpn_convs\.([34])\.conv\.(\w+)", lambda m: f"backbone.fpn.extra_blocks.p{int(m[1]) + 3}.{m[2]}"
        ),
        *_tower("cls", "classification_head"),
        *_tower("reg", "regression_head"),
        # mmdetection 1 called the predictors fcos_cls, fcos_reg and fcos_centerness.
        Rename.of(r"bbox_head\.(?:conv|fcos)_cls\.(\w+)", r"head.classification_head.cls_logits.\1"),
        Rename.of(r"bbox_head\.(?:conv|fcos)_reg\.(\w+)", r"head.regression_head.bbox_reg.\1"),
        Rename.of(r"bbox_head\.(?:conv|fcos)_centerness\.(\w+)", r"head.regression_head.bbox_ctrness.\1"),
        Rename.of(r"bbox_head\.scales\.(\d+)\.scale", r"head.regression_head.scales.\1"),
    ),
    rules=_rules,
)
