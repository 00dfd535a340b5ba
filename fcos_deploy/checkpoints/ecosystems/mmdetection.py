"""The FCOS of mmdetection 1 to 3, ``plain`` or with the ``tricks`` of its "center-normbbox-centeronreg-giou" configs.

Every key of the configuration in a file is used, known to change nothing, or refused: ``CONFIG_KEYS`` is the list,
checked before anything is read; docs/checkpoints.md shows it as a table. Sources: mmdetection 3.3.0 and 2.14.0
(``models/backbones/resnet.py``, ``necks/fpn.py``, ``dense_heads/fcos_head.py``, ``dense_heads/base_dense_head.py``,
``datasets/transforms/``, ``configs/fcos/``), mmcv 2.1.0 (``transforms/processing.py``, ``ops/nms.py``), mmengine 0.10.7
(``model/base_model/data_preprocessor.py``); docs/fcos.md.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fcos_deploy.checkpoints.ecosystems.detectron2 import MSRA_MEAN, UNIT_STD
from fcos_deploy.checkpoints.ecosystems.tianzhi import CAFFE_MEAN
from fcos_deploy.checkpoints.rules import (
    CLS_HEAD,
    REG_HEAD,
    ConfigKey,
    Ecosystem,
    Evidence,
    Rename,
    Rules,
    Values,
    checked,
    fixed,
    is_number,
    level_strides,
    moved,
    unreadable,
)
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.decode import BoxClip
from fcos_deploy.core.errors import ConfigError, brief
from fcos_deploy.core.network import BlockType, BoxActivation, ExtraSource, FcosConfig, TowerNorm, Upsampling
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = ["CONFIG_KEYS", "ECOSYSTEM", "NEUTRAL", "NEUTRAL_STEPS", "UNKNOWN", "parse_config", "read_config"]

UNKNOWN = object()  # stands for an expression that is not a literal
_LONGEST_TEXT = 400_000  # characters; published configurations have some ten thousand
_WHOLE_CONFIG = "cfg"  # what --ignore-config calls the configuration as a whole

# A key that changes nothing: training, memory, file access, or what the tensors' names and shapes tell.
NEUTRAL = checked("any value", lambda _: True)


def _neutral(names: str) -> dict[str, ConfigKey]:
    return dict.fromkeys(names.split(), NEUTRAL)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value > 0


def _are(count: int, check: Callable[[object], bool]) -> Callable[[object], bool]:
    """A list of ``count`` items that pass ``check``."""
    return lambda value: isinstance(value, list) and len(value) == count and all(check(item) for item in value)


def _is_of_channels(value: object) -> bool:
    """Numbers for three channels, or for one of gray images."""
    return _are(3, is_number)(value) or _are(1, is_number)(value)


def _is_pad_value(value: object) -> bool:
    pixel = value.get("img", 0) if isinstance(value, dict) else value
    return is_number(pixel) or _are(3, is_number)(pixel)


def _one_scale(value: Any) -> tuple[int, int] | None:
    """(width, height) of a test scale: a pair, a number, or a list of one pair."""
    if _is_positive(value):
        return value, value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return (value[0], value[1]) if _are(2, _is_positive)(value) else None


def _kind(expected: str, understands: Callable[[Any], bool]) -> Callable[..., ConfigKey]:
    """Keys of one kind, by the options that answer instead."""
    return lambda *options: checked(expected, understands, *options)


_number = _kind("a number", is_number)
_whole = _kind("a number", lambda value: isinstance(value, int) and is_number(value))
_positive = _kind("a number above 0", _is_positive)
_flag = _kind("True or False", lambda value: isinstance(value, bool))
_channels = _kind("three numbers, or one", _is_of_channels)
_channels_or_none = _kind("three numbers, or one", lambda value: value is None or _is_of_channels(value))
_four = _kind("four numbers above 0", _are(4, _is_positive))
_SIZE_OPTIONS = ("input_size", "shortest")
_SCALE = checked("one size in pixels", lambda value: _one_scale(value) is not None, *_SIZE_OPTIONS)
_NO_SCALE = fixed(None, options=_SIZE_OPTIONS)
_LIST = checked("a list", lambda value: isinstance(value, list))
_DICT = checked("a dict", lambda value: isinstance(value, dict))
_DICT_OR_NONE = checked("a dict or None", lambda value: value is None or isinstance(value, dict))
_TRAINING = _neutral("init_cfg pretrained train_cfg")
_BATCH_NORM = {"type": fixed("BN", "BN2d", "SyncBN"), **_neutral("requires_grad momentum")}
_LOAD = {
    "type": fixed("LoadImageFromFile", "LoadImageFromNDArray", "LoadImageFromWebcam"),
    "to_float32": _flag("resize_filter"),
    "color_type": fixed("color", "grayscale", "unchanged"),
    "channel_order": fixed("bgr"),
    "imdecode_backend": fixed("cv2", "pillow", "turbojpeg", None),  # Decoders differ by a rounding at most.
    **_neutral("backend_args file_client_args ignore_empty"),
}
_INTERPOLATION = {
    "interpolation": fixed("bilinear", options=("resize_filter",)),
    "backend": fixed("cv2", "pillow", None, options=("resize_filter",)),
    "clip_object_border": NEUTRAL,
}
_RESIZE = {
    "scale": _SCALE,
    "img_scale": _SCALE,
    "scale_factor": _NO_SCALE,
    "ratio_range": _NO_SCALE,
    "keep_ratio": _flag(*_SIZE_OPTIONS),
    **_INTERPOLATION,
    **_neutral("multiscale_mode bbox_clip_border override"),  # the first chooses among several scales
}

# The keys of each section, by its path; those of the test pipeline by the type of the step.
CONFIG_KEYS: dict[str, dict[str, ConfigKey]] = {
    "model": {
        "type": fixed("FCOS"),
        **dict.fromkeys(("backbone", "neck", "bbox_head"), _DICT),
        **dict.fromkeys(("test_cfg", "data_preprocessor"), _DICT_OR_NONE),
        **_TRAINING,
    },
    "model.backbone": {
        "type": fixed("ResNet", "ResNeXt"),
        "in_channels": fixed(1, 3),
        "strides": _four("stage_strides"),
        "dilations": _four("stage_dilations"),
        "out_indices": _LIST,
        "num_stages": fixed(4),
        "style": fixed("caffe", "pytorch", options=("stride_in_1x1",)),
        "norm_cfg": _DICT,
        "conv_cfg": fixed(None),
        "deep_stem": fixed(False),
        "avg_down": fixed(False),
        "dcn": _DICT_OR_NONE,
        "plugins": fixed(None),
        **_neutral("depth base_channels stem_channels groups base_width"),  # in shapes
        **_neutral("frozen_stages norm_eval with_cp zero_init_residual stage_with_dcn"),
        **_TRAINING,
    },
    "model.backbone.dcn": {
        "type": fixed("DCN", "DCNv2"),
        **_neutral("deform_groups deformable_groups modulated fallback_on_stride"),  # in names and shapes
    },
    "model.backbone.norm_cfg": {**_BATCH_NORM, "eps": _number("norm_eps")},
    "model.neck": {
        "type": fixed("FPN"),
        "start_level": _whole(),
        "end_level": _whole(),
        "num_outs": _positive(),
        "add_extra_convs": fixed(True, False, "on_input", "on_lateral", "on_output", options=("extra_source",)),
        "extra_convs_on_inputs": _flag("extra_source"),
        "relu_before_extra_convs": _flag("extra_relu"),
        "upsample_cfg": _DICT,
        "norm_cfg": _DICT_OR_NONE,
        "act_cfg": fixed(None),
        "conv_cfg": fixed(None),
        **_neutral("in_channels out_channels no_norm_on_lateral"),  # in names and shapes
        **_TRAINING,
    },
    "model.neck.norm_cfg": {**_BATCH_NORM, "eps": _number("fpn_norm_eps")},
    "model.neck.upsample_cfg": {
        "mode": fixed("nearest", "bilinear", options=("upsampling",)),
        "align_corners": fixed(None, False),
        "scale_factor": fixed(2),
    },
    "model.bbox_head": {
        "type": fixed("FCOSHead"),
        "num_classes": _positive(),
        "strides": _LIST,
        "norm_on_bbox": _flag("box_activation"),
        "centerness_on_reg": _flag("centerness_on_reg"),
        "norm_cfg": _DICT_OR_NONE,
        "loss_cls": _DICT,
        "bbox_coder": _DICT,
        "conv_cfg": fixed(None),
        "cls_predictor_cfg": fixed(None),
        "test_cfg": _DICT_OR_NONE,  # where the detector has none, which replaces it
        **_neutral("dcn_on_last_conv in_channels feat_channels stacked_convs conv_bias"),  # in names and shapes
        **_neutral("regress_ranges center_sampling center_sample_radius loss_bbox loss_centerness"),
        **_TRAINING,
    },
    "model.bbox_head.norm_cfg": {
        **_BATCH_NORM,
        "type": fixed("GN", "BN", "BN2d", "SyncBN"),
        "num_groups": _positive("norm_groups"),
        "eps": _number("tower_norm_eps"),
    },
    "model.bbox_head.loss_cls": {
        "type": fixed("FocalLoss", "CrossEntropyLoss", "GHMC"),
        "use_sigmoid": fixed(True),
        **_neutral("activated gamma alpha loss_weight reduction class_weight bins momentum"),
    },
    "model.bbox_head.bbox_coder": {
        "type": fixed("DistancePointBBoxCoder"),
        "clip_border": _flag("clip"),
        "use_box_type": NEUTRAL,
    },
    "model.test_cfg": {
        "nms_pre": _whole("pre_nms_top_k"),
        "min_bbox_size": _number("min_box_size"),
        "score_thr": _number("score_threshold"),
        "nms": _DICT,
        "max_per_img": _positive("max_detections"),
    },
    "model.test_cfg.nms": {
        "type": fixed("nms"),
        "iou_threshold": _number("iou_threshold"),
        "iou_thr": _number("iou_threshold"),
        "class_agnostic": _flag("class_agnostic"),
        "offset": fixed(0),
        "score_threshold": fixed(0),
        "max_num": fixed(-1),
        "split_thr": NEUTRAL,  # how many boxes are compared at once
    },
    "model.data_preprocessor": {
        "type": fixed("DetDataPreprocessor"),
        "mean": _channels_or_none("mean"),
        "std": _channels_or_none("std"),
        "bgr_to_rgb": _flag("channel_order"),
        "rgb_to_bgr": _flag("channel_order"),
        "pad_size_divisor": _positive("size_divisor"),
        "pad_value": _number("pad_pixel"),
        **_neutral("pad_mask mask_pad_value pad_seg seg_pad_value boxtype2tensor non_blocking batch_augments"),
    },
    **dict.fromkeys((f"pipeline.LoadImageFrom{source}" for source in ("File", "NDArray", "Webcam")), _LOAD),
    "pipeline.MultiScaleFlipAug": {
        "img_scale": _SCALE,
        "scale_factor": _NO_SCALE,
        "flip": fixed(False),
        "flip_direction": NEUTRAL,
        "transforms": _LIST,
    },
    **dict.fromkeys(("pipeline.Resize", "pipeline.FixScaleResize"), _RESIZE),
    "pipeline.ResizeShortestEdge": {
        "scale": _SCALE,
        "max_size": _positive(*_SIZE_OPTIONS),
        "resize_type": fixed("Resize"),
        "keep_ratio": fixed(False, options=_SIZE_OPTIONS),
        **_INTERPOLATION,
    },
    "pipeline.FixShapeResize": {
        "width": _positive(*_SIZE_OPTIONS),
        "height": _positive(*_SIZE_OPTIONS),
        "keep_ratio": fixed(False, options=_SIZE_OPTIONS),
        "pad_val": NEUTRAL,  # for keep_ratio=True
        **_INTERPOLATION,
    },
    "pipeline.Normalize": {
        "mean": _channels("mean"),
        "std": _channels("std"),
        "to_rgb": _flag("channel_order"),
    },
    "pipeline.Pad": {
        "size": checked("a size or None", lambda value: value is None or _are(2, _is_positive)(value), *_SIZE_OPTIONS),
        "size_divisor": checked("a number or None", lambda value: value is None or _is_positive(value), "size_divisor"),
        "pad_to_square": _flag(*_SIZE_OPTIONS),
        "pad_val": checked("a number or three", _is_pad_value, "pad_pixel"),
        "padding_mode": fixed("constant"),
    },
    "pipeline.RandomFlip": {"prob": fixed(0, None), "flip_ratio": fixed(0, None), "direction": NEUTRAL},
}

# Steps that do nothing to the image, with all their keys.
NEUTRAL_STEPS = frozenset(
    {"LoadAnnotations", "PackDetInputs", "Collect", "ImageToTensor", "DefaultFormatBundle", "WrapFieldsToLists"}
)
_RESIZE_STEPS = frozenset({"Resize", "FixScaleResize", "ResizeShortestEdge", "FixShapeResize"})


def read_config(meta: Mapping[str, Any], *, network: FcosConfig, options: CheckpointOptions) -> Values | None:
    """What the configuration in ``meta`` says, by the names of ``Rules``; None where there is no configuration.

    Keys named in ``options.ignore_config`` count as absent.

    Raises:
        CheckpointError: naming a key whose value is not understood, and the options that answer instead.
        ConfigError: an ignored key that the configuration does not have.
    """
    stored = next((meta[key] for key in ("cfg", "config") if meta.get(key)), None)
    if stored is None or _WHOLE_CONFIG in options.ignore_config:
        if options.ignore_config and (stored is None or options.ignore_config != (_WHOLE_CONFIG,)):
            raise ConfigError(f"The file has no configuration with '{options.ignore_config[0]}'.", hint=_IGNORE_HINT)
        return None
    config = parse_config(stored) if isinstance(stored, str) else None
    if not config:
        text = "The configuration in the file cannot be read: it is not the Python text that mmdetection writes."
        raise unreadable(text, _WHOLE_CONFIG)
    reading = _Config(config, network=network, options=options)
    reading.require("_base_" not in config, "_base_", config.get("_base_"), "a complete configuration")
    model = reading.section("model", config.get("model"))
    values = {}
    if model is not None:
        values = _backbone(reading, model) | _neck(reading, model) | _head(reading, model)
    values |= _test_cfg(reading, model)
    unclipped = {"clip": BoxClip.NONE} if values.get("clip") is BoxClip.NONE else {}
    values |= _pixels(reading, model) | unclipped
    if reading.unused:
        raise ConfigError(f"The configuration in the file has no '{min(reading.unused)}' to ignore.", hint=_IGNORE_HINT)
    return values


_IGNORE_HINT = "leave --ignore-config out, or give the key as the error that named it wrote it"


class _Config:
    """A configuration and who reads it: sections are checked against ``CONFIG_KEYS`` when they are opened."""

    def __init__(self, stored: Values, *, network: FcosConfig, options: CheckpointOptions) -> None:
        self.stored, self.network, self.options = stored, network, options
        self.unused = set(options.ignore_config)

    def section(self, path: str, stored: object, *, keys: str = "") -> Values | None:
        """The dict at ``path`` without what is ignored, every key of it understood; None where there is none."""
        if path in self.unused or stored is None:
            self.unused.discard(path)
            return None
        if not isinstance(stored, dict):
            self.refuse(path, stored, "a dict")
            return None
        known, section = CONFIG_KEYS[keys or path], {}
        for name, stated in stored.items():
            key, where, value = known.get(name), f"{path}.{name}", _unscoped(stated) if name == "type" else stated
            if name == "_scope_" or (name == "type" and key is None):
                continue
            if where in self.unused:
                self.unused.discard(where)
            elif key is not None and (key is NEUTRAL or (value is not UNKNOWN and key.read(value) is not None)):
                section[name] = value
            elif key is not None:
                self.refuse(where, value, key.expected, *key.options)
            else:
                self.refuse(where, value, "a key that is known here")
        return section

    def require(self, holds: bool, path: str, value: object, expected: str, *options: str) -> None:
        """Refuse ``value`` where it does not hold."""
        if not holds:
            self.refuse(path, value, expected, *options)

    def refuse(self, path: str, value: object, expected: str, *options: str) -> None:
        """Stop, unless the path is ignored or one of ``options`` answers instead."""
        key = checked(expected, lambda _: False, *options)
        if path in self.options.ignore_config:
            self.unused.discard(path)
        elif not key.answered(self.options):
            shown = "an expression that is not a literal" if value is UNKNOWN else brief(value)
            if isinstance(value, list) and len(value) <= 8:
                shown = f"[{', '.join(map(brief, value))}]"
            raise key.refusal(f"The configuration in the file says {path} = {shown}", path)


# ---- the network ----


def _backbone(config: _Config, model: Values) -> Values:
    backbone = config.section("model.backbone", model.get("backbone"))
    if backbone is None:
        return {}
    norm = config.section("model.backbone.norm_cfg", backbone.get("norm_cfg")) or {}
    config.section("model.backbone.dcn", backbone.get("dcn"))
    channels, taken = backbone.get("in_channels", 3), config.network.image_channels
    config.require(channels == taken, "model.backbone.in_channels", channels, f"the {taken} of the stem")
    strides, dilations = (tuple(backbone[key]) if key in backbone else None for key in ("strides", "dilations"))
    bottleneck = config.network.block is BlockType.BOTTLENECK
    return {
        "stride_in_1x1": backbone.get("style", "pytorch") == "caffe" and bottleneck,
        "stage_strides": strides,
        "stage_dilations": dilations,
        "norm_eps": float(norm.get("eps", 1e-5)),
    }


def _neck(config: _Config, model: Values) -> Values:
    neck, network = config.section("model.neck", model.get("neck")), config.network
    if neck is None:
        return {}
    backbone = model.get("backbone") or {}
    start, end = neck.get("start_level", 0), neck.get("end_level", -1)
    stages = backbone.get("out_indices", [0, 1, 2, 3])[start : None if end == -1 else end + 1]
    expected = [0, 1, 2, 3][-network.laterals :]
    over = f"a pyramid over stages {expected}, not {stages}"
    config.require(stages == expected, "model.neck.start_level", start, over)
    levels, present = neck.get("num_outs", network.num_levels), network.num_levels
    config.require(levels == present, "model.neck.num_outs", levels, f"the {present} levels that have tensors")
    upsampling = config.section("model.neck.upsample_cfg", neck.get("upsample_cfg")) or {}
    norm = config.section("model.neck.norm_cfg", neck.get("norm_cfg"))
    values: Values = {
        "upsampling": Upsampling(upsampling.get("mode", "nearest")),
        "fpn_norm_eps": None if norm is None else float(norm.get("eps", 1e-5)),
    }
    extra, path = neck.get("add_extra_convs", False), "model.neck.add_extra_convs"
    if levels <= len(stages):
        return values
    if extra is False:
        config.require(not network.extra_convs, path, extra, "the convolutions that have tensors", "extra_source")
        return values
    config.require(not network.pooled_levels, path, extra, "False, where levels have no tensors")
    if extra is True:  # version 1 and early 2: the older key says which
        extra = "on_input" if neck.get("extra_convs_on_inputs", True) else "on_output"
    source = ExtraSource(extra.removeprefix("on_"))
    return {**values, "extra_source": source, "extra_relu": neck.get("relu_before_extra_convs", False)}


def _head(config: _Config, model: Values) -> Values:
    path, network = "model.bbox_head", config.network
    head = config.section(path, model.get("bbox_head"))
    if head is None:
        return {}
    # Version 1 counts the background. Later ones have a channel more only with softmax, which is refused below.
    channels = network.num_classes
    classes = head.get("num_classes", channels)
    fits = classes in {channels, channels + 1}
    config.require(fits, f"{path}.num_classes", classes, f"the {channels} channels of the tensors")
    loss = config.section(f"{path}.loss_cls", head.get("loss_cls"))
    # FCOSHead takes the softmax where a loss does not say.
    config.require(loss is None or "use_sigmoid" in loss, f"{path}.loss_cls.use_sigmoid", None, "True")
    stages = config.options.stage_strides or (model.get("backbone") or {}).get("strides", [1, 2, 2, 2])
    if _are(4, _is_positive)(list(stages)):  # Others are refused or answered already.
        strides = head.get("strides", [4, 8, 16, 32, 64])
        expected = list(level_strides(tuple(stages), network.num_levels, laterals=network.laterals))
        text = f"the strides of the network's levels, {expected}"
        config.require(strides == expected, f"{path}.strides", strides, text)
    coder = config.section(f"{path}.bbox_coder", head.get("bbox_coder")) or {}
    norm = config.section(f"{path}.norm_cfg", head.get("norm_cfg", {"type": "GN", "num_groups": 32})) or {}
    return {
        "box_activation": BoxActivation.RELU if head.get("norm_on_bbox", False) else BoxActivation.EXP,
        "centerness_on_reg": head.get("centerness_on_reg", False),
        "norm_groups": norm.get("num_groups") if norm.get("type") == "GN" else None,
        "tower_norm_eps": float(norm.get("eps", 1e-5)) if norm else None,
        "clip": None if coder.get("clip_border", True) else BoxClip.NONE,
    }


def _test_cfg(config: _Config, model: Values | None) -> Values:
    path, stored = "model.test_cfg", (model or {}).get("test_cfg")
    if stored is None:  # until 2.4 beside the model; in version 3 that name holds the test loop
        beside = config.stored.get("test_cfg")
        stored = beside if isinstance(beside, dict) and "type" not in beside else None
    head = (model or {}).get("bbox_head")
    if stored is None and isinstance(head, dict) and head.get("test_cfg") is not None:
        path, stored = "model.bbox_head.test_cfg", head["test_cfg"]
    config.require(stored is not None or model is None, path, None, "the thresholds of the test")
    test = config.section(path, stored, keys="model.test_cfg")
    if test is None:
        return {}
    nms = config.section(f"{path}.nms", test.get("nms"), keys="model.test_cfg.nms") or {}
    threshold = nms.get("iou_threshold", nms.get("iou_thr"))
    return {
        "score_threshold": float(test.get("score_thr", 0.0)),
        "iou_threshold": None if threshold is None else float(threshold),
        "class_agnostic": nms.get("class_agnostic", False),
        "pre_nms_top_k": max(test.get("nms_pre", -1), 0),  # 0 and less: all of them
        "min_box_size": float(max(test.get("min_bbox_size", -1), -1)),
        "max_detections": test.get("max_per_img"),
    }


# ---- pixels: the preprocessor of version 3, and the test pipeline ----

_PREPROCESSOR = "model.data_preprocessor"


def _pixels(config: _Config, model: Values | None) -> Values:
    stored = (model or {}).get("data_preprocessor") or config.stored.get("data_preprocessor")
    section, steps = config.section(_PREPROCESSOR, stored), _steps(config)
    if steps is None and model is None and section is None:
        return {}
    config.require(steps is not None, "test_pipeline", None, "the steps of the test", *_SIZE_OPTIONS)
    before, steps, channels = section or {}, steps or {}, config.network.image_channels
    pixels: Values = {}
    step, unchanged = steps.get("Normalize"), bool(steps) and not _is_version_3(config.stored)
    if section is None and step is None and not unchanged:
        config.require(model is None, _PREPROCESSOR, None, "the normalisation of the pixels", "mean", "std")
    elif section is not None or step is not None or model is not None:
        turns = before.get("bgr_to_rgb", False) or before.get("rgb_to_bgr", False)
        doubled = step is not None and (turns or before.get("mean") is not None)
        config.require(not doubled, _PREPROCESSOR, stored, "one normalisation, not a second in the pipeline")
        source, rgb = (before, turns) if step is None else (step, step.get("to_rgb", True))
        mean, std = source.get("mean"), source.get("std")
        pixels = {
            "mean": tuple(map(float, mean)) if mean else (0.0,) * channels,
            "std": tuple(map(float, std)) if std else (1.0,) * channels,
            # Images are read as BGR; both flags of version 3 reverse the channels. Of one there is no order.
            "channel_order": ChannelOrder.GRAY if channels == 1 else ChannelOrder.RGB if rgb else ChannelOrder.BGR,
        }
    for name in ("mean", "std"):
        levels = list(pixels.get(name, ()))
        path = f"{_PREPROCESSOR if before.get(name) else 'pipeline.Normalize'}.{name}"
        fits = len(levels) in {0, channels}
        config.require(fits, path, levels, f"{channels} numbers for the stem's channels", name)
    return pixels | _padding(config, before, steps, pixels) | _sizes(config, before, steps)


def _steps(config: _Config) -> Values | None:
    """The steps that matter by type, each without what is ignored; version 2's are in ``MultiScaleFlipAug``."""
    pipeline = _test_pipeline(config.stored)
    if pipeline is None:
        return None
    if not isinstance(pipeline, list):
        config.refuse("test_pipeline", pipeline, "a list of steps", *_SIZE_OPTIONS)
        return {}
    steps: Values = {}
    for kind, stored in _flat_steps(pipeline):
        path = f"pipeline.{kind}"
        if kind in NEUTRAL_STEPS:
            continue
        if path not in CONFIG_KEYS:
            config.refuse(path, stored, "a step that is known here")
            continue
        step = config.section(path, stored)
        if step is None:
            continue
        role = "Resize" if kind in _RESIZE_STEPS else "Load" if kind.startswith("Load") else kind
        misplaced = role in steps or (role == "Resize" and steps.keys() & {"Normalize", "Pad"})
        config.require(not misplaced, path, stored, "one step of each kind, with resizing first", *_SIZE_OPTIONS)
        steps[role] = {**step, "type": kind}
    return steps


def _padding(config: _Config, before: Values, steps: Values, pixels: Values) -> Values:
    """``size_divisor``, and ``pad_pixel`` where padding is not 0 after normalising."""
    pad, divisor, channels = steps.get("Pad", {}), before.get("pad_size_divisor", 1), config.network.image_channels
    fits, path = (pad.get("size_divisor") or 0) % divisor == 0, f"{_PREPROCESSOR}.pad_size_divisor"
    config.require(fits, path, divisor, "a divisor of Pad's", "size_divisor")
    order = list(steps)
    normalized = "Normalize" in order and "Pad" not in order[: order.index("Normalize")]
    value = pad.get("pad_val", 0) if pad else before.get("pad_value", 0)
    value = value.get("img", 0) if isinstance(value, dict) else value
    numbers = list(value) if isinstance(value, list) else [value] * channels
    pixel: tuple[float, ...] | None = None
    if pad and not normalized:  # Images are BGR until they are normalised.
        rgb = pixels.get("channel_order") is ChannelOrder.RGB
        pixel = tuple(float(number) for number in (reversed(numbers) if rgb else numbers))
    elif any(numbers):
        means, stds = pixels.get("mean", (0.0,) * channels), pixels.get("std", (1.0,) * channels)
        pixel = tuple(number * std + mean for number, mean, std in zip(numbers, means, stds, strict=True))
    values: Values = {"size_divisor": pad.get("size_divisor") or divisor, "pad_pixel": pixel}
    if pad and _is_version_3(config.stored):  # whose Pad changes the size to which boxes are clipped
        values["clip"] = BoxClip.INPUT
    return values


def _sizes(config: _Config, before: Values, steps: Values) -> Values:
    load, resize = steps.get("Load", {}), steps.get("Resize")
    gray, color_type = config.network.image_channels == 1, load.get("color_type", "color")
    fits, path = not load or gray != (color_type == "color"), f"pipeline.{load.get('type')}.color_type"
    expected = "'grayscale' or 'unchanged'" if gray else "'color'"
    config.require(fits, path, color_type, f"{expected} for the stem's channels")
    values: Values = {"resize_filter": ResizeFilter.TORCH if load.get("to_float32") else ResizeFilter.CV2}
    if resize is None:
        config.refuse("pipeline.Resize", None, "a step that resizes", *_SIZE_OPTIONS)
        return values
    if resize.get("backend") == "pillow":
        values["resize_filter"] = ResizeFilter.PIL
    if _SCALE.answered(config.options):
        return values
    kind, scale = resize["type"], _one_scale(resize.get("scale") or resize.get("img_scale"))
    if kind == "FixShapeResize":
        scale = (resize.get("width", 0), resize.get("height", 0))
    if scale is None:
        config.refuse("pipeline.Resize.scale", None, "one size in pixels", *_SIZE_OPTIONS)
        return values
    if kind == "ResizeShortestEdge":
        path = "pipeline.ResizeShortestEdge.max_size"
        config.require("max_size" in resize, path, None, "a limit of the longer side", *_SIZE_OPTIONS)
        longest = max(resize.get("max_size", 0), min(scale))
        return values | {"size_rule": SizeRule.DETECTRON2, "shortest": min(scale), "longest": longest}
    # Unless it says so, version 3's Resize, which has a scale, does not keep the ratio, and version 2's does.
    keeps = resize.get("keep_ratio", "scale" not in resize) and kind != "FixShapeResize"
    pad = steps.get("Pad", {})
    if keeps and pad.get("size") is None and not pad.get("pad_to_square", False):
        rule = SizeRule.MMDETECTION_FIX_SCALE if kind == "FixScaleResize" else SizeRule.MMDETECTION
        return values | {"size_rule": rule, "shortest": min(scale), "longest": max(scale)}
    divisor = pad.get("size_divisor") or before.get("pad_size_divisor", 1)
    return values | _canvas(config, pad, scale, keeps=keeps, divisor=divisor)


def _canvas(config: _Config, pad: Values, scale: tuple[int, int], *, keeps: bool, divisor: int) -> Values:
    """What a pipeline fills that stretches or pads to one size; ``scale``: (width, height) of the resized image."""
    size, to_square, content = pad.get("size"), pad.get("pad_to_square", False), (scale[1], scale[0])
    canvas = tuple(-(-side // divisor) * divisor for side in ((max(content),) * 2 if to_square else content))
    if size is not None:
        canvas = (size[1], size[0]) if _is_version_3(config.stored) else (size[0], size[1])  # 3: (width, height)
    holds = all(side >= inner and side % divisor == 0 for side, inner in zip(canvas, content, strict=True))
    path, stated = ("pad_to_square", True) if to_square else ("size", size)
    expected = f"one size that holds every image of scale {scale}"
    square = not keeps or scale[0] == scale[1]
    config.require(holds and square, f"pipeline.Pad.{path}", stated, expected, *_SIZE_OPTIONS)
    return {
        "size_rule": SizeRule.LETTERBOX if keeps else SizeRule.STRETCH,
        "input_size": canvas,
        "content": None if content == canvas else content,
        "shortest": None,
        "longest": None,
    }


def _unscoped(kind: object) -> object:
    """The name of a class without the library and the modules that mmdetection 3 may write before it."""
    if isinstance(kind, str) and kind.split(".")[0] in {"mmdet", "mmcv", "mmengine"}:
        return kind.rpartition(".")[2]
    return kind


def _is_version_3(config: Values) -> bool:
    """Whether images are normalised by the model's preprocessor, and a ``Pad`` has its width first."""
    pipeline = _test_pipeline(config)
    kinds = {kind for kind, _ in _flat_steps(pipeline)} if isinstance(pipeline, list) else set()
    model = config.get("model")
    return bool(
        "test_dataloader" in config
        or "PackDetInputs" in kinds
        or (isinstance(model, dict) and model.get("data_preprocessor"))
        or config.get("data_preprocessor")
    )


def _test_pipeline(config: Values) -> object:
    """The pipeline that mmdetection runs: that of version 3's test dataloader or of version 2's test data.

    ``test_pipeline`` holds where the configuration has neither.
    """
    for path in (("test_dataloader", "dataset"), ("data", "test")):
        dataset: object = config
        for part in path:
            dataset = dataset.get(part) if isinstance(dataset, dict) else dataset if dataset is UNKNOWN else None
        if dataset is UNKNOWN:
            return UNKNOWN
        while dataset is not None:
            if isinstance(dataset, list):
                dataset = dataset[0] if dataset else None
            if not isinstance(dataset, dict):
                return dataset
            if "pipeline" in dataset:
                return dataset["pipeline"]
            if "img_norm_cfg" in dataset:
                return _steps_of_version_1(dataset)
            dataset = dataset.get("dataset") or dataset.get("datasets")
    return config.get("test_pipeline")


def _steps_of_version_1(dataset: Values) -> list[Any]:
    """What its first releases, whose data sets have options in place of a pipeline, do to an image."""
    normalization = dataset["img_norm_cfg"]
    return [
        {"type": "Resize", "img_scale": dataset.get("img_scale"), "keep_ratio": dataset.get("resize_keep_ratio", True)},
        {"type": "Normalize", **(normalization if isinstance(normalization, dict) else {"**": UNKNOWN})},
        {"type": "Pad", "size_divisor": dataset.get("size_divisor")},
    ]


def _step_type(step: object) -> str:
    kind = _unscoped(step.get("type")) if isinstance(step, dict) else None
    return kind if isinstance(kind, str) else "no type"


def _flat_steps(pipeline: list[Any]) -> Iterator[tuple[str, Any]]:
    """Type and keys of each step; those in ``MultiScaleFlipAug`` follow it, with its scale."""
    for step in pipeline:
        kind = _step_type(step)
        yield kind, step
        if kind == "MultiScaleFlipAug" and isinstance(step.get("transforms"), list):
            for inner in step["transforms"]:
                inner_kind = _step_type(inner)
                if inner_kind == "Resize" and isinstance(inner, dict):
                    yield inner_kind, {**inner, "img_scale": step.get("img_scale")}
                elif inner_kind != "RandomFlip":  # MultiScaleFlipAug says whether to flip.
                    yield inner_kind, inner


# ---- the configuration's text, parsed and never run ----


def parse_config(text: str) -> Values:
    """Top-level names and their values; literals, ``dict(...)`` and names assigned before, all else is ``UNKNOWN``.

    Text that is not Python gives an empty dict.
    """
    if len(text) > _LONGEST_TEXT:
        return {}
    values: Values = {}
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and all(isinstance(target, ast.Name) for target in statement.targets):
                value = _value(statement.value, values)
                values.update({target.id: value for target in statement.targets if isinstance(target, ast.Name)})
            else:  # It may change every name in it.
                names = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
                values.update(dict.fromkeys(names, UNKNOWN))
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
        return _dict(((getattr(k, "value", None), v) for k, v in zip(node.keys, node.values, strict=True)), names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return _dict(((keyword.arg, keyword.value) for keyword in node.keywords), names)
    return UNKNOWN


def _dict(pairs: Iterable[tuple[object, ast.expr]], names: Mapping[str, Any]) -> Values:
    """A key of None is ``**mapping``, or no literal: what it adds is ``UNKNOWN`` where it cannot be read."""
    values: Values = {}
    for key, node in pairs:
        value = _value(node, names)
        if key is not None:
            values[str(key)] = value
        elif isinstance(value, dict):
            values |= value
        else:
            values["**"] = UNKNOWN
    return values


# ---- the ecosystem ----

_PLAIN, _TRICKS = "plain", "tricks"
_CONFIG = "the configuration in the file"


def _rules(evidence: Evidence) -> Rules:
    stored = evidence.metadata.get("meta")
    meta: Mapping[str, Any] = stored if isinstance(stored, dict) else {}
    config = read_config(meta, network=evidence.network, options=evidence.options)
    rules = _by_tensors(evidence, config or {})
    if config is None:
        return rules
    rules = rules.decide(_CONFIG, **config)
    return dataclasses.replace(rules, shortest=None, longest=None) if "input_size" in config else rules


def _by_tensors(evidence: Evidence, config: Mapping[str, Any]) -> Rules:
    """What the tensors show, for files without a configuration."""
    variant, source = evidence.options.variant, "option --variant"
    if not variant:
        # mmdetection leaves the tower convolutions' bias out unless the config asks for it, which all "tricks" do, or
        # there is no norm.
        biased = any(n.startswith("bbox_head.cls_convs.") and n.endswith(".conv.bias") for n in evidence.source_names)
        if (
            biased
            and evidence.network.tower_norm is TowerNorm.NONE
            and not {"box_activation", "centerness_on_reg"} <= config.keys()
        ):
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
