"""The FCOS of mmdetection 1 to 3, ``plain`` or with the ``tricks`` of its "center-normbbox-centeronreg-giou" configs.

Source: mmdetection 3.3.0, ``models/dense_heads/fcos_head.py``, ``configs/fcos/`` (docs/fcos.md).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from fcos_deploy.checkpoints.ecosystems.detectron2 import MSRA_MEAN, UNIT_STD
from fcos_deploy.checkpoints.ecosystems.tianzhi import CAFFE_MEAN
from fcos_deploy.checkpoints.rules import CLS_HEAD, REG_HEAD, Ecosystem, Evidence, Rename, Rules, moved
from fcos_deploy.core.errors import CheckpointError, brief
from fcos_deploy.core.network import BlockType, BoxActivation, FcosConfig
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["ECOSYSTEM", "UNKNOWN", "parse_config"]

UNKNOWN = object()  # stands for an expression that is not a literal
_LONGEST_TEXT = 400_000  # characters; published configurations have some ten thousand
_LARGEST_NUMBER = 1 << 31
_PLAIN, _TRICKS = "plain", "tricks"
_CONFIG = "the configuration in the file"


def _rules(evidence: Evidence) -> Rules:
    meta = evidence.metadata.get("meta")
    rules = _with_class_names(_by_tensors(evidence), meta, count=evidence.network.num_classes)
    texts = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, dict) else []
    config = parse_config(next((text for text in texts if isinstance(text, str)), ""))
    _refuse_other_detectors(config)
    rules = _head_of(config, rules, evidence.network)
    rules = _test_of(config, rules)
    return _pixels_of(config, rules)


def _by_tensors(evidence: Evidence) -> Rules:
    """What the tensors show where the file has no configuration."""
    variant, source = evidence.variant, "option --variant"
    if not variant:
        # mmdetection leaves the tower convolutions' bias out unless the config asks for it, which all "tricks" do.
        biased = any(n.startswith("bbox_head.cls_convs.") and n.endswith(".conv.bias") for n in evidence.source_names)
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


def _with_class_names(rules: Rules, meta: object, *, count: int) -> Rules:
    """Those in the file (version 3: ``dataset_meta``, version 2: ``CLASSES``)."""
    for path in (("dataset_meta", "classes"), ("dataset_meta", "CLASSES"), ("CLASSES",)):
        stored = _lookup(meta, *path)
        names = (stored,) if isinstance(stored, str) else stored
        if isinstance(names, (list, tuple)) and len(names) == count and all(isinstance(n, str) for n in names):
            return rules.decide("the class names in the file", class_names=tuple(names))
    return rules


def _refuse_other_detectors(config: dict[str, Any]) -> None:
    expected = (("FCOS", ("model", "type")), ("FCOSHead", ("model", "bbox_head", "type")))
    for name, path in expected:
        stated = _lookup(config, *path)
        if stated not in (None, name):
            key = ".".join(path)
            raise CheckpointError(f"The configuration in the file says {key} = {brief(stated)}, not '{name}'.")
    if _lookup(config, "model", "neck", "relu_before_extra_convs") is False:
        raise CheckpointError("The configuration says relu_before_extra_convs=False; P7 of FCOS follows relu(P6).")


def _head_of(config: dict[str, Any], rules: Rules, network: FcosConfig) -> Rules:
    if _lookup(config, "model") is None:
        return rules
    strides = _lookup(config, "model", "bbox_head", "strides")
    if strides not in (None, list(network.strides)):
        stated = f"[{', '.join(map(brief, strides[:8]))}]" if isinstance(strides, list) else brief(strides)
        raise CheckpointError(f"The configuration says strides {stated}, expected {list(network.strides)}.")
    style = _lookup(config, "model", "backbone", "style")
    # FCOSHead's defaults of both are False.
    on_bbox, on_reg = (
        _lookup(config, "model", "bbox_head", key) is True for key in ("norm_on_bbox", "centerness_on_reg")
    )
    return rules.decide(
        _CONFIG,
        box_activation=BoxActivation.RELU if on_bbox else BoxActivation.EXP,
        centerness_on_reg=on_reg,
        stride_in_1x1=None if style is None else style == "caffe" and network.block is BlockType.BOTTLENECK,
    )


def _test_of(config: dict[str, Any], rules: Rules) -> Rules:
    """Thresholds, and the test size: version 3's ``Resize(scale)``, version 2's ``MultiScaleFlipAug(img_scale)``."""
    test = _lookup(config, "model", "test_cfg") or _lookup(config, "test_cfg") or {}
    kind = _lookup(test, "nms", "type")
    if kind not in (None, "nms"):
        raise CheckpointError(
            f"The configuration suppresses with {brief(kind)}, expected 'nms'.",
            hint="change test_cfg, which is not trained",
        )
    rules = rules.decide(
        _CONFIG,
        score_threshold=_number(_lookup(test, "score_thr")),
        iou_threshold=_number(_lookup(test, "nms", "iou_threshold") or _lookup(test, "nms", "iou_thr")),
        pre_nms_top_k=_whole(_lookup(test, "nms_pre")),
        max_detections=_whole(_lookup(test, "max_per_img")),
    )
    pipeline = _lookup(config, "test_pipeline")
    for kind, key in (("MultiScaleFlipAug", "img_scale"), ("Resize", "scale")):
        for step in _find_dicts(pipeline, kind):
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
    return all(inner.get("keep_ratio") is not False for inner in _find_dicts(pipeline, "Resize"))


def _pixels_of(config: dict[str, Any], rules: Rules) -> Rules:
    """v3: ``model.data_preprocessor``; v2: ``img_norm_cfg``, or the pipeline's ``Normalize``."""
    steps = [
        (_lookup(config, "model", "data_preprocessor"), "bgr_to_rgb"),
        (_lookup(config, "img_norm_cfg"), "to_rgb"),
        *((step, "to_rgb") for step in _find_dicts(_lookup(config, "test_pipeline"), "Normalize")),
    ]
    for step, key in steps:
        mean, std = _three(_lookup(step, "mean")), _three(_lookup(step, "std"))
        if mean and std:
            # Without the key: v3 leaves BGR, v2 converts to RGB.
            flag = _lookup(step, key)
            rgb = flag if isinstance(flag, bool) else key == "to_rgb"
            order = ChannelOrder.RGB if rgb else ChannelOrder.BGR
            return rules.decide(_CONFIG, mean=mean, std=std, channel_order=order)
    return rules


def _number(value: object) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _LARGEST_NUMBER:
        return None
    return float(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_NUMBER else None


def _three(value: object) -> tuple[float, ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    numbers = [_number(v) for v in value]
    return tuple(v for v in numbers if v is not None) if None not in numbers else None


# ---- the configuration's text, parsed and never run ----


def parse_config(text: str) -> dict[str, Any]:
    """Top-level names and their values; literals, ``dict(...)`` and names assigned before, all else is ``UNKNOWN``.

    Text that is not Python gives an empty dict.
    """
    if len(text) > _LONGEST_TEXT:
        return {}
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign):
                value = _value(statement.value, values)
                values.update({target.id: value for target in statement.targets if isinstance(target, ast.Name)})
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return values


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


def _lookup(config: Any, *path: str) -> Any:  # Any: configurations are untyped
    """The value under ``path``, or None where a part is missing or not known."""
    for part in path:
        if not isinstance(config, dict) or part not in config:
            return None
        config = config[part]
    return None if config is UNKNOWN else config


def _find_dicts(config: Any, type_name: str) -> Iterator[dict[str, Any]]:
    """All dicts with ``type=type_name`` at any depth of ``config``, in order; one that occurs twice is given once."""
    seen: set[int] = set()
    pending = [config]
    while pending:
        item = pending.pop()
        if id(item) in seen or not isinstance(item, (dict, list)):
            continue
        seen.add(id(item))  # A file can make thirty objects of a billion paths.
        if isinstance(item, dict) and item.get("type") == type_name:
            yield item
        pending += reversed(list(item.values()) if isinstance(item, dict) else item)


def _tower(source: str, head: str) -> tuple[Rename, Rename]:
    """``cls_convs.2.conv`` and ``.gn`` are entries 6 and 7 of the tower."""
    layer = rf"bbox_head\.{source}_convs\.(\d+)\."
    return (
        Rename(layer + r"conv\.(.+)", lambda m: f"{head}.conv.{3 * int(m[1])}.{m[2]}"),
        Rename(layer + r"(?:gn|bn)\.(.+)", lambda m: f"{head}.conv.{3 * int(m[1]) + 1}.{m[2]}"),
    )


ECOSYSTEM = Ecosystem(
    name="mmdetection",
    signature=("bbox_head.", "neck."),
    variants=(_PLAIN, _TRICKS),
    renames=(
        Rename(r"backbone\.((?:conv1|bn1|layer\d)\..+)", r"backbone.body.\1"),
        Rename(r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        Rename(r"neck\.fpn_convs\.([012])\.conv\.(\w+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        *moved(
            {
                "neck.fpn_convs.3.conv": "backbone.fpn.extra_blocks.p6",
                "neck.fpn_convs.4.conv": "backbone.fpn.extra_blocks.p7",
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
