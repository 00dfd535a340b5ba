"""What a training configuration that is stored beside the weights says of a detector.

Trainers store a ``CfgNode`` of detectron2 or maskrcnn-benchmark, or its YAML text, the hyper-parameters of a Lightning
module, or the arguments of a script. The keys in ``CONFIG_KEYS`` are used where they are understood, and stop the
command otherwise; all others belong to the training or to other models. Sources: AdelaiDet
``adet/config/defaults.py``, detectron2 ``configs/common/models/fcos.py``, tianzhi0549/FCOS
``fcos_core/config/defaults.py``, torchvision ``models/detection/fcos.py`` (arguments of ``FCOS``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fcos_deploy.checkpoints.rules import Evidence
from fcos_deploy.core.checkpoint_options import option_flag
from fcos_deploy.core.errors import CheckpointError, ConfigError, brief
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.network import BackboneType, BlockType, BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder

__all__ = ["CONFIG_KEYS", "StatedKey", "parse_yaml", "read_training_config"]

yaml = lazy_import("yaml", extra="export")

Values = dict[str, Any]  # Any: configurations are untyped

_CONTAINERS = ("cfg", "config", "args", "hyper_parameters", "hparams")
_DEEPEST = 6  # mappings within mappings
_LONGEST_TEXT = 400_000  # characters
_MOST_VALUES = 100_000  # mappings that are shared unfold to more than the file holds
_LARGEST_NUMBER = 1 << 31
# Text that holds a configuration, in blocks, in braces or as JSON.
_YAML = re.compile(r"""(?:^|[{,])\s*["']?(?:MODEL|INPUT|model)["']?\s*:""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class StatedKey:
    """A key, what is expected there, and what its value decides by the names of ``Rules``; None: not understood.

    ``options`` are the fields of ``CheckpointOptions`` that answer instead. ``strides`` and ``num_classes`` are
    compared with the tensors'.
    """

    expected: str
    read: Callable[[Any], Values | None]  # Any: the value may be anything
    options: tuple[str, ...] = ()


def _number(name: str) -> StatedKey:
    return StatedKey("a number", lambda value: {name: float(value)} if _is_number(value) else None, (name,))


def _count(name: str, *options: str) -> StatedKey:
    def read(value: Any) -> Values | None:
        return {name: value} if isinstance(value, int) and _is_number(value) and value > 0 else None

    return StatedKey("a whole number above 0", read, (name, *options))


def _numbers(name: str) -> StatedKey:
    def read(value: Any) -> Values | None:
        sound = isinstance(value, (list, tuple)) and len(value) in {1, 3} and all(map(_is_number, value))
        return {name: tuple(map(float, value))} if sound else None

    return StatedKey("three numbers, or one", read, (name,))


def _flag(name: str) -> StatedKey:
    return StatedKey("true or false", lambda value: {name: value} if isinstance(value, bool) else None, (name,))


def _fixed(known: object, *options: str) -> StatedKey:
    return StatedKey(repr(known), lambda value: {} if value == known else None, options)


def _word(name: str, meanings: Mapping[Any, Any]) -> StatedKey:
    def read(value: Any) -> Values | None:
        return {name: meanings[value]} if isinstance(value, (str, bool)) and value in meanings else None

    return StatedKey(" or ".join(map(repr, meanings)), read, (name,))


def _last(key: StatedKey) -> StatedKey:
    """Of several values, which training chooses from, the last one is the test's."""

    def read(value: Any) -> Values | None:
        return key.read(value[-1] if isinstance(value, (list, tuple)) and value else value)

    return StatedKey(key.expected, read, key.options)


def _level_strides(value: Any) -> Values | None:
    return {"strides": list(value)} if isinstance(value, (list, tuple)) else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


_ORDER = _word("channel_order", {"BGR": ChannelOrder.BGR, "RGB": ChannelOrder.RGB, "L": ChannelOrder.GRAY})
_SIZES = {
    "INPUT.MIN_SIZE_TEST": _count("shortest", "input_size"),
    "INPUT.MAX_SIZE_TEST": _count("longest", "input_size"),
}
_LEVEL_STRIDES = StatedKey("a list of strides", _level_strides)
_CLASSES = StatedKey("a number", lambda value: {"num_classes": value} if _is_number(value) else None)

# The keys of each ecosystem that decide about its detections, by their path.
CONFIG_KEYS: dict[str, dict[str, StatedKey]] = {
    "adelaidet": {
        **_SIZES,
        "INPUT.FORMAT": _ORDER,
        "MODEL.PIXEL_MEAN": _numbers("mean"),
        "MODEL.PIXEL_STD": _numbers("std"),
        "MODEL.META_ARCHITECTURE": _fixed("OneStageDetector"),
        "MODEL.RESNETS.STRIDE_IN_1X1": _flag("stride_in_1x1"),
        "MODEL.RESNETS.RES5_DILATION": _fixed(1, "stage_dilations"),
        "MODEL.FPN.FUSE_TYPE": _fixed("sum"),
        "MODEL.FCOS.NUM_CLASSES": _CLASSES,
        "MODEL.FCOS.FPN_STRIDES": _LEVEL_STRIDES,
        "MODEL.FCOS.INFERENCE_TH_TEST": _number("score_threshold"),
        "MODEL.FCOS.NMS_TH": _number("iou_threshold"),
        "MODEL.FCOS.PRE_NMS_TOPK_TEST": _count("pre_nms_top_k"),
        "MODEL.FCOS.POST_NMS_TOPK_TEST": _count("max_detections"),
        "MODEL.FCOS.BOX_QUALITY": _fixed("ctrness"),
        "MODEL.FCOS.THRESH_WITH_CTR": _fixed(known=False),
        "MODEL.FCOS.USE_RELU": _fixed(known=True),
    },
    "detectron2": {
        "model.input_format": _ORDER,
        "model.pixel_mean": _numbers("mean"),
        "model.pixel_std": _numbers("std"),
        "model.num_classes": _CLASSES,
        "model.backbone.bottom_up.stages.stride_in_1x1": _flag("stride_in_1x1"),
        "model.test_score_thresh": _number("score_threshold"),
        "model.test_nms_thresh": _number("iou_threshold"),
        "model.test_topk_candidates": _count("pre_nms_top_k"),
        "model.max_detections_per_image": _count("max_detections"),
        **_SIZES,
        "INPUT.FORMAT": _ORDER,
    },
    "tianzhi": {
        **_SIZES,
        "INPUT.PIXEL_MEAN": _numbers("mean"),
        "INPUT.PIXEL_STD": _numbers("std"),
        "INPUT.TO_BGR255": _fixed(known=True),
        "MODEL.RPN_ONLY": _fixed(known=True),
        "MODEL.RESNETS.STRIDE_IN_1X1": _flag("stride_in_1x1"),
        "MODEL.RESNETS.RES5_DILATION": _fixed(1, "stage_dilations"),
        "MODEL.FCOS.FPN_STRIDES": _LEVEL_STRIDES,
        "MODEL.FCOS.INFERENCE_TH": _number("score_threshold"),
        "MODEL.FCOS.NMS_TH": _number("iou_threshold"),
        "MODEL.FCOS.PRE_NMS_TOP_N": _count("pre_nms_top_k"),
        "MODEL.FCOS.NORM_REG_TARGETS": _word("box_activation", {True: BoxActivation.RELU, False: BoxActivation.EXP}),
        "MODEL.FCOS.CENTERNESS_ON_REG": _flag("centerness_on_reg"),
        "TEST.DETECTIONS_PER_IMG": _count("max_detections"),
        "TEST.BBOX_AUG.ENABLED": _fixed(known=False),
    },
    "torchvision": {
        "min_size": _last(_count("shortest", "input_size")),
        "max_size": _count("longest", "input_size"),
        "fixed_size": _fixed(None, "input_size"),
        "image_mean": _numbers("mean"),
        "image_std": _numbers("std"),
        "score_thresh": _number("score_threshold"),
        "nms_thresh": _number("iou_threshold"),
        "detections_per_img": _count("max_detections"),
        "topk_candidates": _count("pre_nms_top_k"),
    },
}


def read_training_config(ecosystem: str, evidence: Evidence) -> Values:
    """What is stored beside the weights says, by the names of ``Rules``; keys in ``--ignore-config`` count as absent.

    Raises:
        CheckpointError: naming a key whose value is not understood, and the options that answer instead.
        ConfigError: an ignored key that is not there.
    """
    known, ignored = CONFIG_KEYS[ecosystem], set(evidence.options.ignore_config)
    values: Values = {}
    for place, path, value in _stated(evidence.metadata, ignored):
        key = known.get(path)
        if key is None:
            continue
        if path in ignored or f"{place}.{path}" in ignored:
            ignored -= {path, f"{place}.{path}"}
            continue
        decided = key.read(value)
        expected = key.expected if decided is None else _contradiction(decided, evidence)
        if expected and not any(getattr(evidence.options, name) not in {None, ""} for name in key.options):
            answers = " or ".join(option_flag(name) for name in key.options)
            raise CheckpointError(
                f"'{place}' in the file says {path} = {brief(value)}, expected {expected}.",
                hint=f"{f'{answers} answers instead; ' if answers else ''}--ignore-config {path} leaves the key out",
            )
        values |= decided or {}
    if ignored:
        raise ConfigError(f"The file has no '{min(ignored)}' to ignore.", hint="leave --ignore-config out")
    network = evidence.network
    if network.backbone is not BackboneType.RESNET or network.block is not BlockType.BOTTLENECK:
        values.pop("stride_in_1x1", None)
    for fact in ("strides", "num_classes"):
        values.pop(fact, None)
    if ("shortest" in values) != ("longest" in values):  # Half of a size decides nothing without the other.
        values = {name: value for name, value in values.items() if name not in {"shortest", "longest"}}
    return values


def _contradiction(decided: Values, evidence: Evidence) -> str:
    """What the tensors show in place of a stated fact; '' where both agree."""
    network = evidence.network
    strides = decided.get("strides", list(network.strides))
    if strides != list(network.strides):
        return f"the strides of the network's levels, {list(network.strides)}"
    if decided.get("num_classes", network.num_classes) not in {network.num_classes, network.num_classes + 1}:
        return f"the {network.num_classes} channels of the tensors"
    return ""


def _stated(metadata: Mapping[str, Any], ignored: set[str]) -> Iterator[tuple[str, str, Any]]:
    """(container, dotted path, value) of every value in the containers; one that is ignored as a whole is left out."""
    for place in _CONTAINERS:
        stored = metadata.get(place)
        content = getattr(stored, "state", stored)
        if place in ignored:
            ignored.discard(place)
            continue
        if isinstance(content, str) and _YAML.search(content):
            content = parse_yaml(content)
            if content is None:
                raise CheckpointError(
                    f"'{place}' in the file cannot be read: it is not the YAML that detectron2 writes.",
                    hint=f"--ignore-config {place} leaves it out, and options say what the tensors do not",
                )
        if isinstance(content, Mapping):
            values = list(islice(_flattened(content), _MOST_VALUES + 1))
            if len(values) > _MOST_VALUES:
                raise CheckpointError(
                    f"'{place}' in the file has more than {_MOST_VALUES} values, which no configuration has.",
                    hint=f"--ignore-config {place} leaves it out, and options say what the tensors do not",
                )
            yield from ((place, path, value) for path, value in values)


def _flattened(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Dotted paths and values; an empty mapping is a value, so that every mapping that is entered yields one."""
    for name, stored in content.items():
        value, path = getattr(stored, "state", stored), f"{prefix}{name}"
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            yield from _flattened(value, f"{path}.", depth + 1)
        else:
            yield path, value


def parse_yaml(text: str) -> Values | None:
    """The mapping that the text holds; None where it is no YAML, or has more than the dump of a configuration."""
    if len(text) > _LONGEST_TEXT:
        return None
    try:
        content = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


@functools.cache
def _loader() -> Any:  # Any: yaml.SafeLoader, untyped
    """The safe loader, which runs nothing; it takes what a tag of Python's marks as the list, mapping or word it is."""

    def plain(loader: Any, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value

    def refuse_merges(_loader: Any, node: Any) -> None:
        """No dump has merges, which could unfold to gigabytes."""
        if any(key.tag.endswith(":merge") for key, _ in node.value):
            raise yaml.YAMLError("a merge")

    loader: Any = type("Loader", (yaml.SafeLoader,), {"flatten_mapping": refuse_merges})
    loader.add_constructor(None, plain)
    return loader
