"""What an mmdetection configuration says of a detector: every key is used, known to change nothing, or refused.

``CONFIG_KEYS`` is the list, checked before anything is read; docs/checkpoints.md shows it as a table. Sources:
mmdetection 3.3.0 and 2.14.0 (``models/backbones/resnet.py``, ``necks/fpn.py``, ``dense_heads/fcos_head.py``,
``dense_heads/base_dense_head.py``, ``datasets/transforms/``), mmcv 2.1.0 (``transforms/processing.py``,
``ops/nms.py``), mmengine 0.10.7 (``model/base_model/data_preprocessor.py``).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fcos_deploy.checkpoints.rules import level_strides
from fcos_deploy.core.checkpoint_options import CheckpointOptions, option_flag
from fcos_deploy.core.decode import BoxClip
from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import CheckpointError, ConfigError, brief
from fcos_deploy.core.network import BlockType, BoxActivation, ExtraSource, FcosConfig, Upsampling
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

__all__ = [
    "CONFIG_KEYS",
    "NEUTRAL_STEPS",
    "UNKNOWN",
    "ConfigKey",
    "KeyUse",
    "config_table",
    "parse_config",
    "read_config",
]

Values = dict[str, Any]  # Any: configurations are untyped

UNKNOWN = object()  # stands for an expression that is not a literal
_LONGEST_TEXT = 400_000  # characters; published configurations have some ten thousand
_LARGEST_NUMBER = 1 << 31
_WHOLE_CONFIG = "cfg"  # what --ignore-config calls the configuration as a whole


class KeyUse(StrEnum):
    """What becomes of a key of the configuration."""

    USED = "used"
    NEUTRAL = "neutral"  # for detections: training, memory, file access, or what the tensors' shapes tell
    FIXED = "fixed"  # only the values that stand for what this network does


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key, and which of its values are understood; another one stops the command.

    ``options`` are the fields of ``CheckpointOptions`` that answer instead of a value that is not understood.
    """

    use: KeyUse
    expected: str = "any value"
    understands: Callable[[Any], bool] = lambda _value: True  # Any: the value may be anything
    options: tuple[str, ...] = ()


def _used(expected: str, understands: Callable[[Any], bool], *options: str) -> ConfigKey:
    return ConfigKey(KeyUse.USED, expected, understands, options)


def _fixed(*values: object, options: tuple[str, ...] = ()) -> ConfigKey:
    expected = " or ".join(repr(value) for value in values)
    return ConfigKey(KeyUse.FIXED, expected, lambda value: any(_equal(value, known) for known in values), options)


def _equal(value: object, known: object) -> bool:
    """Equal and of the same type, but for 0 and 0.0: True is not 1 here."""
    return value == known and (type(value) is type(known) or (_is_number(value) and _is_number(known)))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_positive(value: object) -> bool:
    return _is_whole(value) and value > 0  # type: ignore[operator]  # mypy does not see the check in _is_whole


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _are(count: int, check: Callable[[object], bool]) -> Callable[[object], bool]:
    """A list of ``count`` items that pass ``check``."""
    return lambda value: isinstance(value, list) and len(value) == count and all(check(item) for item in value)


def _is_pad_value(value: object) -> bool:
    pixel = value.get("img", 0) if isinstance(value, dict) else value
    return _is_number(pixel) or _are(3, _is_number)(pixel)


def _is_color_type(value: object) -> bool:
    return isinstance(value, str) and value in {"color", "grayscale", "unchanged"}


def _is_of_channels(value: object) -> bool:
    """Numbers for three channels, or for one of gray images."""
    return _are(3, _is_number)(value) or _are(1, _is_number)(value)


def _one_scale(value: object) -> tuple[int, int] | None:
    """(width, height) of a test scale: a pair, a number, or a list of one pair."""
    if _is_positive(value):
        return value, value  # type: ignore[return-value]  # as above
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if _are(2, _is_positive)(value):
        return value[0], value[1]  # type: ignore[index]  # as above
    return None


_NEUTRAL = ConfigKey(KeyUse.NEUTRAL)
_SIZE_OPTIONS = ("input_size", "shortest")
_SCALE = _used("one size in pixels", lambda value: _one_scale(value) is not None, *_SIZE_OPTIONS)
_NORM_EPS = _used("a number", _is_number, "norm_eps")
_FLAG = _used("True or False", _is_bool)
_DICT = _used("a dict", lambda value: isinstance(value, dict))
_DICT_OR_NONE = _used("a dict or None", lambda value: value is None or isinstance(value, dict))
_TRAINING = dict.fromkeys(("init_cfg", "pretrained", "train_cfg"), _NEUTRAL)
_LOAD = {
    "type": _fixed("LoadImageFromFile", "LoadImageFromNDArray", "LoadImageFromWebcam"),
    "to_float32": _used("True or False", _is_bool, "resize_filter"),
    "color_type": _used("'color', or 'grayscale' or 'unchanged' for gray images", _is_color_type),
    "channel_order": _fixed("bgr"),
    "imdecode_backend": _fixed("cv2", "pillow", "turbojpeg", None),  # Decoders differ by a rounding at most.
    **dict.fromkeys(("backend_args", "file_client_args", "ignore_empty"), _NEUTRAL),
}
_RESIZE = {
    "scale": _SCALE,
    "img_scale": _SCALE,
    "scale_factor": _fixed(None, options=_SIZE_OPTIONS),
    "keep_ratio": _used("True or False", _is_bool, *_SIZE_OPTIONS),
    "interpolation": _fixed("bilinear", options=("resize_filter",)),
    "backend": _used("'cv2' or 'pillow'", lambda value: value in ("cv2", "pillow", None), "resize_filter"),
    "multiscale_mode": _NEUTRAL,  # chooses among several scales
    "ratio_range": _fixed(None, options=_SIZE_OPTIONS),
    **dict.fromkeys(("clip_object_border", "bbox_clip_border", "override"), _NEUTRAL),
}

# The keys of each section, by its path; those of the test pipeline by the type of the step.
CONFIG_KEYS: dict[str, dict[str, ConfigKey]] = {
    "model": {
        "type": _fixed("FCOS"),
        **dict.fromkeys(("backbone", "neck", "bbox_head"), _DICT),
        **dict.fromkeys(("test_cfg", "data_preprocessor"), _DICT_OR_NONE),
        **_TRAINING,
    },
    "model.backbone": {
        "type": _fixed("ResNet", "ResNeXt"),
        "in_channels": _used("1 or 3", _is_positive),
        "strides": _used("four strides", _are(4, _is_positive), "stage_strides"),
        "dilations": _used("four dilations", _are(4, _is_positive), "stage_dilations"),
        "out_indices": _used("a list of stages", lambda value: isinstance(value, list) and all(map(_is_whole, value))),
        "num_stages": _fixed(4),
        "style": _used(
            "'caffe' or 'pytorch'",
            lambda value: isinstance(value, str) and value in {"caffe", "pytorch"},
            "stride_in_1x1",
        ),
        "norm_cfg": _DICT,
        "conv_cfg": _fixed(None),
        "deep_stem": _fixed(False),
        "avg_down": _fixed(False),
        "dcn": _DICT_OR_NONE,
        "plugins": _fixed(None),
        **dict.fromkeys(("depth", "base_channels", "stem_channels", "groups", "base_width"), _NEUTRAL),  # in shapes
        **dict.fromkeys(("frozen_stages", "norm_eval", "with_cp", "zero_init_residual", "stage_with_dcn"), _NEUTRAL),
        **_TRAINING,
    },
    "model.backbone.dcn": {
        "type": _fixed("DCN", "DCNv2"),
        # In names and shapes.
        **dict.fromkeys(("deform_groups", "deformable_groups", "modulated", "fallback_on_stride"), _NEUTRAL),
    },
    "model.backbone.norm_cfg": {
        "type": _fixed("BN", "BN2d", "SyncBN"),
        "eps": _NORM_EPS,
        **dict.fromkeys(("requires_grad", "momentum"), _NEUTRAL),
    },
    "model.neck": {
        "type": _fixed("FPN"),
        "start_level": _used("a number", _is_whole),
        "end_level": _used("a number", _is_whole),
        "num_outs": _used("a number", _is_positive),
        "add_extra_convs": _used(
            "True, False or where P6 comes from",
            lambda value: (
                _is_bool(value) or (isinstance(value, str) and value.removeprefix("on_") in list(ExtraSource))
            ),
            "extra_source",
        ),
        "extra_convs_on_inputs": _used("True or False", _is_bool, "extra_source"),
        "relu_before_extra_convs": _used("True or False", _is_bool, "extra_relu"),
        "upsample_cfg": _DICT,
        "norm_cfg": _DICT_OR_NONE,
        "act_cfg": _fixed(None),
        "conv_cfg": _fixed(None),
        **dict.fromkeys(("in_channels", "out_channels", "no_norm_on_lateral"), _NEUTRAL),  # in names and shapes
        **_TRAINING,
    },
    "model.neck.norm_cfg": {
        "type": _fixed("BN", "BN2d", "SyncBN"),
        "eps": _used("a number", _is_number, "fpn_norm_eps"),
        **dict.fromkeys(("requires_grad", "momentum"), _NEUTRAL),
    },
    "model.neck.upsample_cfg": {
        "mode": _used(
            "'nearest' or 'bilinear'", lambda value: isinstance(value, str) and value in list(Upsampling), "upsampling"
        ),
        "align_corners": _fixed(None, False),
        "scale_factor": _fixed(2),
    },
    "model.bbox_head": {
        "type": _fixed("FCOSHead"),
        "num_classes": _used("a number", _is_positive),
        "strides": _used("a list of strides", lambda value: isinstance(value, list)),
        "norm_on_bbox": _used("True or False", _is_bool, "box_activation"),
        "centerness_on_reg": _used("True or False", _is_bool, "centerness_on_reg"),
        "norm_cfg": _DICT_OR_NONE,
        "loss_cls": _DICT,
        "bbox_coder": _DICT,
        "conv_cfg": _fixed(None),
        "dcn_on_last_conv": _NEUTRAL,  # in names
        "cls_predictor_cfg": _fixed(None),
        **dict.fromkeys(("in_channels", "feat_channels", "stacked_convs", "conv_bias"), _NEUTRAL),  # in shapes
        **dict.fromkeys(("regress_ranges", "center_sampling", "center_sample_radius"), _NEUTRAL),
        **dict.fromkeys(("loss_bbox", "loss_centerness"), _NEUTRAL),
        "test_cfg": _DICT_OR_NONE,  # where the detector has none, which replaces it
        **_TRAINING,
    },
    "model.bbox_head.norm_cfg": {
        "type": _fixed("GN", "BN", "BN2d", "SyncBN"),
        "num_groups": _used("a number", _is_positive, "norm_groups"),
        "eps": _used("a number", _is_number, "tower_norm_eps"),
        **dict.fromkeys(("requires_grad", "momentum"), _NEUTRAL),
    },
    "model.bbox_head.loss_cls": {
        "type": _fixed("FocalLoss", "CrossEntropyLoss", "GHMC"),
        "use_sigmoid": _fixed(True),
        "activated": _NEUTRAL,
        **dict.fromkeys(("gamma", "alpha", "loss_weight", "reduction", "class_weight", "bins", "momentum"), _NEUTRAL),
    },
    "model.bbox_head.bbox_coder": {
        "type": _fixed("DistancePointBBoxCoder"),
        "clip_border": _used("True or False", _is_bool, "clip"),
        "use_box_type": _NEUTRAL,
    },
    "model.test_cfg": {
        "nms_pre": _used("a number", _is_whole, "pre_nms_top_k"),
        "min_bbox_size": _used("a number", _is_number, "min_box_size"),
        "score_thr": _used("a number", _is_number, "score_threshold"),
        "nms": _DICT,
        "max_per_img": _used("a number above 0", _is_positive, "max_detections"),
    },
    "model.test_cfg.nms": {
        "type": _fixed("nms"),
        "iou_threshold": _used("a number", _is_number, "iou_threshold"),
        "iou_thr": _used("a number", _is_number, "iou_threshold"),
        "class_agnostic": _used("True or False", _is_bool, "class_agnostic"),
        "offset": _fixed(0),
        "score_threshold": _fixed(0),
        "max_num": _fixed(-1),
        "split_thr": _NEUTRAL,  # how many boxes are compared at once
    },
    "model.data_preprocessor": {
        "type": _fixed("DetDataPreprocessor"),
        "mean": _used("three numbers, or one", lambda value: value is None or _is_of_channels(value), "mean"),
        "std": _used("three numbers, or one", lambda value: value is None or _is_of_channels(value), "std"),
        "bgr_to_rgb": _used("True or False", _is_bool, "channel_order"),
        "rgb_to_bgr": _used("True or False", _is_bool, "channel_order"),
        "pad_size_divisor": _used("a number", _is_positive, "size_divisor"),
        "pad_value": _used("a number", _is_number, "pad_pixel"),
        **dict.fromkeys(("pad_mask", "mask_pad_value", "pad_seg", "seg_pad_value", "boxtype2tensor"), _NEUTRAL),
        **dict.fromkeys(("non_blocking", "batch_augments"), _NEUTRAL),
    },
    "pipeline.LoadImageFromFile": _LOAD,
    "pipeline.LoadImageFromNDArray": _LOAD,
    "pipeline.LoadImageFromWebcam": _LOAD,
    "pipeline.MultiScaleFlipAug": {
        "img_scale": _SCALE,
        "scale_factor": _fixed(None, options=_SIZE_OPTIONS),
        "flip": _fixed(False),
        "flip_direction": _NEUTRAL,
        "transforms": _used("a list of steps", lambda value: isinstance(value, list)),
    },
    "pipeline.Resize": _RESIZE,
    "pipeline.FixScaleResize": _RESIZE,
    "pipeline.ResizeShortestEdge": {
        "scale": _SCALE,
        "max_size": _used("a number", _is_positive, *_SIZE_OPTIONS),
        "resize_type": _fixed("Resize"),
        **{key: _RESIZE[key] for key in ("interpolation", "backend", "clip_object_border")},
        "keep_ratio": _fixed(False, options=_SIZE_OPTIONS),
    },
    "pipeline.FixShapeResize": {
        "width": _used("a number", _is_positive, *_SIZE_OPTIONS),
        "height": _used("a number", _is_positive, *_SIZE_OPTIONS),
        "keep_ratio": _fixed(False, options=_SIZE_OPTIONS),
        "pad_val": _NEUTRAL,  # for keep_ratio=True
        **{key: _RESIZE[key] for key in ("interpolation", "backend", "clip_object_border")},
    },
    "pipeline.Normalize": {
        "mean": _used("three numbers, or one", _is_of_channels, "mean"),
        "std": _used("three numbers, or one", _is_of_channels, "std"),
        "to_rgb": _used("True or False", _is_bool, "channel_order"),
    },
    "pipeline.Pad": {
        "size": _used("a size", lambda value: value is None or _are(2, _is_positive)(value), *_SIZE_OPTIONS),
        "size_divisor": _used("a number", lambda value: value is None or _is_positive(value), "size_divisor"),
        "pad_to_square": _used("True or False", _is_bool, *_SIZE_OPTIONS),
        "pad_val": _used("a number or three", _is_pad_value, "pad_pixel"),
        "padding_mode": _fixed("constant"),
    },
    "pipeline.RandomFlip": {
        "prob": _fixed(0, None),
        "flip_ratio": _fixed(0, None),
        "direction": _NEUTRAL,
    },
}

# Steps that do nothing to the image, with all their keys.
NEUTRAL_STEPS = frozenset(
    {"LoadAnnotations", "PackDetInputs", "Collect", "ImageToTensor", "DefaultFormatBundle", "WrapFieldsToLists"}
)
_RESIZE_STEPS = frozenset({"Resize", "FixScaleResize", "ResizeShortestEdge", "FixShapeResize"})


def config_table() -> str:
    """``CONFIG_KEYS`` as a Markdown table: one row for each section and use of its keys."""
    rows = ["| section | key | values | else |", "|---|---|---|---|"]
    for section, keys in CONFIG_KEYS.items():
        neutral = [f"`{name}`" for name, key in keys.items() if key.use is KeyUse.NEUTRAL]
        for name, key in keys.items():
            if key.use is not KeyUse.NEUTRAL:
                answers = " or ".join(f"`{option_flag(option)}`" for option in key.options)
                rows.append(f"| `{section}` | `{name}` | {key.use}: {key.expected} | {answers or 'refused'} |")
        if neutral:
            rows.append(f"| `{section}` | {', '.join(neutral)} | neutral | - |")
    steps = ", ".join(f"`{step}`" for step in sorted(NEUTRAL_STEPS))
    return "\n".join([*rows, f"| `pipeline` | {steps} | neutral | - |"])


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
        raise CheckpointError(
            "The configuration in the file cannot be read: it is not the Python text that mmdetection writes.",
            hint=f"--ignore-config {_WHOLE_CONFIG} leaves it out, and options say what the tensors do not",
        )
    return _Reader(config, network=network, options=options).read()


_IGNORE_HINT = "leave --ignore-config out, or give the key as the error that named it wrote it"


class _Reader:
    """One configuration: sections are checked against ``CONFIG_KEYS`` when they are opened, and then read."""

    def __init__(self, config: Values, *, network: FcosConfig, options: CheckpointOptions) -> None:
        self._config, self._network, self._options = config, network, options
        self._ignored = set(options.ignore_config)

    def read(self) -> Values:
        values: Values = {}
        if "_base_" in self._config:
            self._refuse("_base_", self._config["_base_"], "a configuration that is complete")
        model = self._section("model", self._config.get("model"))
        if model is not None:
            values |= self._backbone(model) | self._neck(model) | self._head(model)
        values |= self._test_cfg(model)
        without_clip = {"clip": BoxClip.NONE} if values.get("clip") is BoxClip.NONE else {}
        values |= self._pixels(model) | without_clip
        if self._ignored:
            raise ConfigError(
                f"The configuration in the file has no '{min(self._ignored)}' to ignore.", hint=_IGNORE_HINT
            )
        return values

    # ---- sections and refusals ----

    def _section(self, path: str, stored: object, *, keys: str = "") -> Values | None:
        """The dict at ``path`` without what is ignored, every key of it understood; None where there is none."""
        if path in self._ignored:
            self._ignored.discard(path)
            return None
        if stored is None:
            return None
        if not isinstance(stored, dict):
            self._refuse(path, stored, "a dict")
            return None
        known, section = CONFIG_KEYS[keys or path], {}
        for name, stated in stored.items():
            key, where, value = known.get(name), f"{path}.{name}", _unscoped(stated) if name == "type" else stated
            if name == "_scope_" or (name == "type" and "type" not in known):
                continue
            if where in self._ignored:
                self._ignored.discard(where)
                continue
            if key is None:
                self._refuse(where, value, "a key that is known here")
            elif key.use is KeyUse.NEUTRAL or (value is not UNKNOWN and key.understands(value)):
                section[name] = value
            else:
                self._refuse(where, value, key.expected, *key.options)
        return section

    def _refuse(self, path: str, value: object, expected: str, *options: str) -> None:
        """Stop, unless the path is ignored or one of ``options`` (fields of ``CheckpointOptions``) answers instead."""
        if path in self._options.ignore_config:
            self._ignored.discard(path)
            return
        if any(self._given(name) for name in options):
            return
        answers = " or ".join(option_flag(name) for name in options)
        raise CheckpointError(
            f"The configuration in the file says {path} = {_shown(value)}, expected {expected}.",
            hint=f"{f'{answers} answers instead; ' if answers else ''}--ignore-config {path} leaves the key out",
        )

    def _given(self, name: str) -> bool:
        return getattr(self._options, name) not in {None, ""}

    # ---- the network ----

    def _backbone(self, model: Values) -> Values:
        backbone = self._section("model.backbone", model.get("backbone"))
        if backbone is None:
            return {}
        norm = self._section("model.backbone.norm_cfg", backbone.get("norm_cfg")) or {}
        self._section("model.backbone.dcn", backbone.get("dcn"))
        channels = backbone.get("in_channels", 3)
        if channels != self._network.image_channels:
            self._refuse("model.backbone.in_channels", channels, f"the {self._network.image_channels} of the stem")
        bottleneck = self._network.block is BlockType.BOTTLENECK
        strides, dilations = (tuple(backbone[key]) if key in backbone else None for key in ("strides", "dilations"))
        return {
            "stride_in_1x1": backbone.get("style", "pytorch") == "caffe" and bottleneck,
            "stage_strides": strides,
            "stage_dilations": dilations,
            "norm_eps": float(norm.get("eps", 1e-5)),
        }

    def _neck(self, model: Values) -> Values:
        neck = self._section("model.neck", model.get("neck"))
        if neck is None:
            return {}
        backbone = model.get("backbone") or {}
        end = neck.get("end_level", -1)
        stages = backbone.get("out_indices", [0, 1, 2, 3])[neck.get("start_level", 0) : None if end == -1 else end + 1]
        expected = [0, 1, 2, 3][-self._network.laterals :]
        if stages != expected:
            path = "model.neck.start_level"
            self._refuse(path, neck.get("start_level", 0), f"a pyramid over stages {expected}, not {stages}")
        levels = neck.get("num_outs", self._network.num_levels)
        if levels != self._network.num_levels:
            self._refuse("model.neck.num_outs", levels, f"the {self._network.num_levels} levels that have tensors")
        upsampling = self._section("model.neck.upsample_cfg", neck.get("upsample_cfg")) or {}
        norm = self._section("model.neck.norm_cfg", neck.get("norm_cfg"))
        values: Values = {
            "upsampling": Upsampling(upsampling.get("mode", "nearest")),
            "fpn_norm_eps": None if norm is None else float(norm.get("eps", 1e-5)),
        }
        extra = neck.get("add_extra_convs", False)
        if levels <= len(stages):
            return values
        if extra is False:
            if self._network.extra_convs:
                self._refuse("model.neck.add_extra_convs", extra, "the convolutions that have tensors", "extra_source")
            return values
        if self._network.pooled_levels:
            self._refuse("model.neck.add_extra_convs", extra, "False, where levels have no tensors")
        if extra is True:  # version 1 and early 2: the older key says which
            extra = "on_input" if neck.get("extra_convs_on_inputs", True) else "on_output"
        source = ExtraSource(extra.removeprefix("on_"))
        return {**values, "extra_source": source, "extra_relu": neck.get("relu_before_extra_convs", False)}

    def _head(self, model: Values) -> Values:
        head = self._section("model.bbox_head", model.get("bbox_head"))
        if head is None:
            return {}
        channels = self._network.num_classes
        # Version 1 counts the background. Later ones have a channel more only with softmax, which is refused below.
        if head.get("num_classes", channels) not in {channels, channels + 1}:
            self._refuse("model.bbox_head.num_classes", head["num_classes"], f"the {channels} channels of the tensors")
        loss = self._section("model.bbox_head.loss_cls", head.get("loss_cls"))
        if loss is not None and "use_sigmoid" not in loss:  # FCOSHead then takes the softmax
            self._refuse("model.bbox_head.loss_cls.use_sigmoid", None, "True")
        self._check_strides(model, head.get("strides", [4, 8, 16, 32, 64]))
        coder = self._section("model.bbox_head.bbox_coder", head.get("bbox_coder")) or {}
        norm_cfg = head.get("norm_cfg", {"type": "GN", "num_groups": 32})
        norm = self._section("model.bbox_head.norm_cfg", norm_cfg) or {}
        groups = norm.get("num_groups") if norm.get("type") == "GN" else None
        return {
            "box_activation": BoxActivation.RELU if head.get("norm_on_bbox", False) else BoxActivation.EXP,
            "centerness_on_reg": head.get("centerness_on_reg", False),
            "norm_groups": groups,
            "tower_norm_eps": float(norm.get("eps", 1e-5)) if norm else None,
            "clip": None if coder.get("clip_border", True) else BoxClip.NONE,
        }

    def _check_strides(self, model: Values, stated: list[Any]) -> None:
        stages = self._options.stage_strides or (model.get("backbone") or {}).get("strides", [1, 2, 2, 2])
        if not _are(4, _is_positive)(list(stages)):
            return  # refused or answered already
        expected = level_strides(tuple(stages), self._network.num_levels, laterals=self._network.laterals)
        if stated != list(expected):
            self._refuse("model.bbox_head.strides", stated, f"the strides of the network's levels, {list(expected)}")

    def _test_cfg(self, model: Values | None) -> Values:
        stored = (model or {}).get("test_cfg")
        if stored is None:  # until 2.4 beside the model; in version 3 that name holds the test loop
            beside = self._config.get("test_cfg")
            stored = beside if isinstance(beside, dict) and "type" not in beside else None
        path, head = "model.test_cfg", (model or {}).get("bbox_head")
        if stored is None and isinstance(head, dict) and head.get("test_cfg") is not None:
            path, stored = "model.bbox_head.test_cfg", head["test_cfg"]
        if stored is None and model is not None:
            self._refuse(path, None, "the thresholds of the test")
        test = self._section(path, stored, keys="model.test_cfg")
        if test is None:
            return {}
        nms = self._section(f"{path}.nms", test.get("nms"), keys="model.test_cfg.nms") or {}
        top_k = test.get("nms_pre", -1)
        threshold = nms.get("iou_threshold", nms.get("iou_thr"))
        return {
            "score_threshold": float(test.get("score_thr", 0.0)),
            "iou_threshold": None if threshold is None else float(threshold),
            "class_agnostic": nms.get("class_agnostic", False),
            "pre_nms_top_k": max(top_k, 0),  # 0 and less: all of them
            "min_box_size": float(max(test.get("min_bbox_size", -1), -1)),
            "max_detections": test.get("max_per_img"),
        }

    # ---- pixels: the preprocessor of version 3, and the test pipeline ----

    def _pixels(self, model: Values | None) -> Values:
        preprocessor = (model or {}).get("data_preprocessor") or self._config.get("data_preprocessor")
        before = self._section("model.data_preprocessor", preprocessor)
        steps = self._steps()
        if steps is None:
            if model is None and before is None:
                return {}
            self._refuse("test_pipeline", None, "the steps of the test", *_SIZE_OPTIONS)
            steps = {}
        pixels: Values | None = {}
        unchanged = bool(steps) and model is not None and not _is_version_3(self._config)
        if before is not None or "Normalize" in steps or unchanged:
            pixels = _normalization(before, steps.get("Normalize"), channels=self._network.image_channels)
        elif model is not None:
            self._refuse("model.data_preprocessor", None, "the normalisation of the pixels", "mean", "std")
        for name in ("mean", "std"):
            numbers = (pixels or {}).get(name, ())
            if numbers and len(numbers) != self._network.image_channels:
                section = "model.data_preprocessor" if before and before.get(name) else "pipeline.Normalize"
                expected = f"{self._network.image_channels} numbers for the stem's channels"
                self._refuse(f"{section}.{name}", list(numbers), expected, name)
        if pixels is None:
            self._refuse("model.data_preprocessor", preprocessor, "one normalisation, not a second in the pipeline")
            pixels = {}
        return pixels | self._padding(before, steps, pixels) | self._sizes(before, steps)

    def _steps(self) -> Values | None:
        """The steps that matter by type, each without what is ignored; version 2's are in ``MultiScaleFlipAug``."""
        pipeline = _test_pipeline(self._config)
        if pipeline is None:
            return None
        if not isinstance(pipeline, list):
            self._refuse("test_pipeline", pipeline, "a list of steps", *_SIZE_OPTIONS)
            return {}
        steps: Values = {}
        for kind, stored in _flat_steps(pipeline):
            path = f"pipeline.{kind}"
            if kind in NEUTRAL_STEPS:
                continue
            if path not in CONFIG_KEYS:
                self._refuse(path, stored, "a step that is known here")
                continue
            step = self._section(path, stored)
            if step is None:
                continue
            role = "Resize" if kind in _RESIZE_STEPS else "Load" if kind.startswith("Load") else kind
            if role in steps or (role == "Resize" and steps.keys() & {"Normalize", "Pad"}):
                self._refuse(path, stored, "one step of each kind, with resizing first", *_SIZE_OPTIONS)
            steps[role] = {**step, "type": kind}
        return steps

    def _padding(self, before: Values | None, steps: Values, pixels: Values) -> Values:
        """``size_divisor``, and ``pad_pixel`` where padding is not 0 after normalising."""
        pad = steps.get("Pad", {})
        divisor = (before or {}).get("pad_size_divisor", 1)
        if pad.get("size_divisor") and pad["size_divisor"] % divisor:
            self._refuse("model.data_preprocessor.pad_size_divisor", divisor, "a divisor of Pad's", "size_divisor")
        order = list(steps)
        normalized = "Normalize" in order and "Pad" not in order[: order.index("Normalize")]
        value = pad.get("pad_val", 0) if pad else (before or {}).get("pad_value", 0)
        value = value.get("img", 0) if isinstance(value, dict) else value
        channels = self._network.image_channels
        numbers = list(value) if isinstance(value, list) else [value] * channels
        rgb = pixels.get("channel_order") is ChannelOrder.RGB
        if (pad and normalized) or not pad:
            parts = zip(
                numbers, pixels.get("mean", (0.0,) * channels), pixels.get("std", (1.0,) * channels), strict=True
            )
            pixel = tuple(number * std + mean for number, mean, std in parts) if any(numbers) else None
        else:
            # Images are BGR until they are normalised.
            pixel = tuple(float(number) for number in (reversed(numbers) if rgb else numbers))
        values: Values = {"size_divisor": pad.get("size_divisor") or divisor, "pad_pixel": pixel}
        if pad and _is_version_3(self._config):  # whose Pad changes the size to which boxes are clipped
            values["clip"] = BoxClip.INPUT
        return values

    def _sizes(self, before: Values | None, steps: Values) -> Values:
        load, resize = steps.get("Load", {}), steps.get("Resize")
        gray, color_type = self._network.image_channels == 1, load.get("color_type", "color")
        if load and gray == (color_type == "color"):
            expected = "'grayscale' or 'unchanged'" if gray else "'color'"
            self._refuse(f"pipeline.{load['type']}.color_type", color_type, f"{expected} for the stem's channels")
        values: Values = {"resize_filter": ResizeFilter.TORCH if load.get("to_float32") else ResizeFilter.CV2}
        if resize is None:
            self._refuse("pipeline.Resize", None, "a step that resizes", *_SIZE_OPTIONS)
            return values
        if resize.get("backend") == "pillow":
            values["resize_filter"] = ResizeFilter.PIL
        if any(self._given(name) for name in _SIZE_OPTIONS):
            return values
        return values | (self._fixed_size(resize, before, steps) or self._edges(resize))

    def _edges(self, resize: Values) -> Values:
        scale = _one_scale(resize.get("scale") or resize.get("img_scale"))
        if scale is None:
            self._refuse("pipeline.Resize.scale", None, "one size in pixels", *_SIZE_OPTIONS)
            return {}
        if resize["type"] == "ResizeShortestEdge":
            if "max_size" not in resize:
                self._refuse("pipeline.ResizeShortestEdge.max_size", None, "a limit of the longer side", *_SIZE_OPTIONS)
            edges = min(scale), max(resize.get("max_size", 0), min(scale))
            return {"size_rule": SizeRule.DETECTRON2, "shortest": edges[0], "longest": edges[1]}
        rule = SizeRule.MMDETECTION_FIX_SCALE if resize["type"] == "FixScaleResize" else SizeRule.MMDETECTION
        return {"size_rule": rule, "shortest": min(scale), "longest": max(scale)}

    def _fixed_size(self, resize: Values, before: Values | None, steps: Values) -> Values | None:
        """A canvas, where the pipeline stretches or pads to one size."""
        scale = _one_scale(resize.get("scale") or resize.get("img_scale"))
        if resize["type"] == "FixShapeResize":
            scale = (resize.get("width", 0), resize.get("height", 0))
        if scale is None or resize["type"] == "ResizeShortestEdge":
            return None
        content = scale[1], scale[0]
        # Unless it says so, version 3's Resize, which has a scale, does not keep the ratio, and version 2's does.
        keeps = resize.get("keep_ratio", "scale" not in resize) and resize["type"] != "FixShapeResize"
        pad = steps.get("Pad", {})
        divisor = pad.get("size_divisor") or (before or {}).get("pad_size_divisor", 1)
        size, to_square = pad.get("size"), pad.get("pad_to_square", False)
        if size is None and keeps and not to_square:
            return None
        canvas = tuple(-(-side // divisor) * divisor for side in ((max(content),) * 2 if to_square else content))
        if size is not None:
            canvas = (size[1], size[0]) if _is_version_3(self._config) else (size[0], size[1])  # 3: (width, height)
        fits = all(side >= inner for side, inner in zip(canvas, content, strict=True))
        if not fits or any(side % divisor for side in canvas) or (keeps and scale[0] != scale[1]):
            path, stated = ("pad_to_square", True) if to_square else ("size", size)
            expected = f"one size that holds every image of scale {scale}"
            self._refuse(f"pipeline.Pad.{path}", stated, expected, *_SIZE_OPTIONS)
        return {
            "size_rule": SizeRule.LETTERBOX if keeps else SizeRule.STRETCH,
            "input_size": canvas,
            "content": None if content == canvas else content,
            "shortest": None,
            "longest": None,
        }


def _shown(value: object) -> str:
    if value is UNKNOWN:
        return "an expression that is not a literal"
    return f"[{', '.join(map(brief, value))}]" if isinstance(value, list) and len(value) <= 8 else brief(value)


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


def _normalization(before: Values | None, step: Values | None, *, channels: int) -> Values | None:
    """Mean, std and channel order of version 3's preprocessor or of a ``Normalize`` step; None where both normalise."""
    source = before or {}
    rgb = flips = source.get("bgr_to_rgb", False) or source.get("rgb_to_bgr", False)
    if step is not None:
        if flips or source.get("mean") is not None:
            return None
        source, rgb = step, step.get("to_rgb", True)
    mean, std = source.get("mean"), source.get("std")
    return {
        "mean": tuple(map(float, mean)) if mean else (0.0,) * channels,
        "std": tuple(map(float, std)) if std else (1.0,) * channels,
        # Images are read as BGR; each of the two flags of version 3 reverses the channels. Of one there is no order.
        "channel_order": ChannelOrder.GRAY if channels == 1 else ChannelOrder.RGB if rgb else ChannelOrder.BGR,
    }


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
