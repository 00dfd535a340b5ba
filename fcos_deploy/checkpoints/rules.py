"""What the tensors of a checkpoint do not tell: an ecosystem's ``Rules``, and the contract that they make.

``Ecosystem`` is what a file in ``checkpoints/ecosystems`` declares; docs/fcos.md has the facts behind them as tables.
Its rules are overridden by the configuration that a trainer stored beside the weights, and both by the user's options.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fcos_deploy.checkpoints.reader import TensorFacts, flat_values
from fcos_deploy.core.checkpoint_options import OPTION, CheckpointOptions, option_flag
from fcos_deploy.core.contract import Decision
from fcos_deploy.core.decode import ALL_CANDIDATES, PROFILES, BoxClip, DecodeSpec
from fcos_deploy.core.enums import CenterMode, Orientation
from fcos_deploy.core.errors import CheckpointError, ConfigError, InputSizeError, brief, unknown_name
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.network import (
    BackboneType,
    BlockType,
    BoxActivation,
    ExtraSource,
    FcosConfig,
    TowerNorm,
    Upsampling,
)
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, PreprocessSpec, ResizeFilter, ResizeOrder, SizeRule

__all__ = [
    "CHANNEL_ORDER",
    "CLASSES",
    "CLS_HEAD",
    "COCO_80",
    "COCO_91",
    "COCO_IDS",
    "LEVEL_STRIDES",
    "REG_HEAD",
    "SHARED_TOWER",
    "TEST_SIZES",
    "UNKNOWN_CLASS_NAMES",
    "ConfigKey",
    "Ecosystem",
    "Evidence",
    "Rename",
    "Rules",
    "Values",
    "checked",
    "count",
    "decode_spec",
    "final_rules",
    "fixed",
    "flag",
    "is_number",
    "level_strides",
    "moved",
    "network_config",
    "number",
    "numbers",
    "parse_yaml",
    "preprocess_spec",
    "read_training_config",
    "unreadable",
    "word",
]

# Parts of canonical names, which are those of torchvision's fcos_resnet50_fpn.
CLS_HEAD, REG_HEAD, SHARED_TOWER = "head.classification_head", "head.regression_head", "head.shared_tower"

_COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
COCO_80: tuple[str, ...] = tuple(_COCO.split(","))

# The category ids that COCO left out when 91 planned classes became 80.
_UNUSED_IDS = frozenset({0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

# COCO category id of each of the 80 contiguous classes.
COCO_IDS: tuple[int, ...] = tuple(i for i in range(91) if i not in _UNUSED_IDS)

_NAME_OF_ID = dict(zip(COCO_IDS, COCO_80, strict=True))

# torchvision's 91 channels are the category ids; channel 0 is the background and never a detection.
COCO_91: tuple[str, ...] = ("background", *(_NAME_OF_ID.get(i, "N/A") for i in range(1, 91)))


@dataclass(frozen=True, slots=True)
class Rename:
    """Names that match ``pattern`` in full become ``target``: a template, or a function of the match."""

    pattern: str  # a regular expression
    target: str | Callable[[re.Match[str]], str]

    def apply(self, name: str) -> str | None:
        """The new name, or None when the pattern does not match."""
        match = re.fullmatch(self.pattern, name)
        if match is None:
            return None
        return match.expand(self.target) if isinstance(self.target, str) else self.target(match)


def moved(prefixes: Mapping[str, str]) -> tuple[Rename, ...]:
    """One ``Rename`` a pair: what is under ``old.`` goes under ``new.``."""
    return tuple(Rename(rf"{re.escape(old)}\.(.+)", rf"{new}.\1") for old, new in prefixes.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything that neither shapes nor arithmetic can tell. ``sources`` says of each field who decided it.

    Pixels are normalised as ``(pixel / pixel_scale - mean) / std`` in ``channel_order``. ``label_offset`` is the label
    of class channel 0. ``class_names`` is indexed by label. ``pre_nms_top_k`` of 0 keeps all candidates. None is the
    default of ``FcosConfig``, ``PreprocessSpec`` or the profile.
    """

    variant: str = ""
    class_names: tuple[str, ...] = ()
    label_offset: int = 0
    stride_in_1x1: bool = False
    box_activation: BoxActivation = BoxActivation.RELU
    centerness_on_reg: bool = True
    norm_eps: float = 1e-5
    norm_groups: int | None = 32
    anchor_sizes: tuple[int, ...] | None = None
    tower_norm_eps: float | None = None
    fpn_norm_eps: float | None = None
    deform_groups: int | None = None
    stage_strides: tuple[int, int, int, int] | None = None
    stage_dilations: tuple[int, int, int, int] | None = None
    upsampling: Upsampling = Upsampling.NEAREST
    pooled_levels: int | None = None
    extra_source: ExtraSource | None = ExtraSource.OUTPUT
    extra_relu: bool | None = True
    ignore_config: tuple[str, ...] = ()
    profile: str
    centers: CenterMode = CenterMode.HALF
    score_threshold: float
    iou_threshold: float
    pre_nms_top_k: int = 1000
    max_detections: int = 100
    class_agnostic: bool = False
    min_box_size: float | None = None
    clip: BoxClip | None = None
    channel_order: ChannelOrder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_scale: float = 1.0
    resize_filter: ResizeFilter
    resize_order: ResizeOrder = ResizeOrder.RESIZE_FIRST
    orientation: Orientation = Orientation.EXIF
    size_rule: SizeRule
    input_size: tuple[int, int] | None = None
    shortest: int | None = 800
    longest: int | None = 1333
    size_divisor: int | None = None
    content: tuple[int, int] | None = None
    pad_pixel: tuple[float, ...] | None = None
    input_dtype: InputDtype | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def decide(self, source: str, **values: Any) -> Rules:  # Any: the fields have different types
        """The same with ``values`` decided by ``source``; a ``None`` leaves the field as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        sources = {**self.sources, **dict.fromkeys(given, source)}
        return dataclasses.replace(self, **given, sources=sources)

    def decisions(self, *, default_source: str) -> tuple[Decision, ...]:
        """One ``Decision`` a field, in the order above; class names are counted, not listed."""
        decisions = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == "sources" or value is None or value in {"", ()}:
                continue
            if item.name == "class_names":
                text = f"{len(value)} names"
            elif item.name == "ignore_config":
                text = ", ".join(value)
            elif item.name == "pre_nms_top_k" and value == 0:
                text = "all"
            elif isinstance(value, bool):
                text = "yes" if value else "no"
            else:
                text = ", ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
            decisions.append(Decision(item.name, text, self.sources.get(item.name, default_source)))
        return tuple(decisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a checkpoint shows of itself.

    ``tensors`` have canonical names, ``source_names`` are those in the file; ``network`` is what shapes tell;
    ``metadata`` is what the file holds beside tensors; ``options`` is what the user said.
    """

    file_name: str
    tensors: Mapping[str, TensorFacts]
    source_names: frozenset[str]
    network: FcosConfig
    metadata: Mapping[str, Any]  # Any: whatever a training script stored
    options: CheckpointOptions = field(default_factory=CheckpointOptions)

    def merged_batch_norm(self) -> bool:
        """Whether the backbone's statistics are 0 and 1, as converted Caffe (MSRA) backbones have them."""
        # 2e-5: detectron2 stores variances of 1 - 1e-5 (layers/batch_norm.py).
        return self._all_near(".running_mean", 0.0, within=0.0) and self._all_near(".running_var", 1.0, within=2e-5)

    def centred_batch_norm(self) -> bool:
        """Whether the backbone's running means are all 0, which those that a training kept never are."""
        return self._all_near(".running_mean", 0.0, within=0.0)

    def _all_near(self, ending: str, value: float, *, within: float) -> bool:
        """Whether all numbers of the backbone's tensors with this ending are near ``value``."""
        vectors = (t for n, t in self.tensors.items() if n.startswith("backbone.body.") and n.endswith(ending))
        return all(abs(number - value) <= within for vector in vectors for number in flat_values(vector))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ecosystem:
    """One place where people train FCOS: how its keys look, what they become, and what it leaves unsaid.

    ``signature``: parts of names that all must occur in the names of a checkpoint of this ecosystem.
    ``variants``: the words that ``CheckpointOptions.variant`` may be. ``coco_names``: COCO's class names by label, for
    a network with as many labels. ``reads_config``: its files may hold a configuration.
    """

    name: str
    signature: tuple[str, ...]
    renames: tuple[Rename, ...]
    rules: Callable[[Evidence], Rules]
    variants: tuple[str, ...] = ()
    coco_names: tuple[str, ...] = COCO_80
    reads_config: bool = False

    def missing(self, names: Iterable[str]) -> str:
        """The first part of the signature that no name of a checkpoint has; '' for a checkpoint of this ecosystem."""
        present = frozenset(names)
        return next((part for part in self.signature if not any(part in name for name in present)), "")


# ---- configurations that trainers store beside the weights ----

Values = dict[str, Any]  # Any: configurations are untyped

yaml = lazy_import("yaml", extra="export")

_CONTAINERS = ("cfg", "config", "args", "hyper_parameters", "hparams")
_DEEPEST = 6  # mappings within mappings
_LONGEST_TEXT = 400_000  # characters
_MOST_VALUES = 100_000  # mappings that are shared unfold to more than the file holds
_LARGEST_NUMBER = 1 << 31
# Text that holds a configuration, in blocks, in braces or as JSON.
_YAML = re.compile(r"""(?:^|[{,])\s*["']?(?:MODEL|INPUT|model)["']?\s*:""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A key of a configuration, what is expected there, and what its value decides by the names of ``Rules``.

    A value for which ``read`` gives None is not understood, which stops the command unless one of ``options``, fields
    of ``CheckpointOptions``, answers instead. ``strides`` and ``num_classes`` are compared with the tensors'.
    """

    expected: str
    read: Callable[[Any], Values | None]  # Any: the value may be anything
    options: tuple[str, ...] = ()

    def refusal(self, said: str, path: str) -> CheckpointError:
        """The error of a value that is not understood; ``said`` ends in the value."""
        answers = " or ".join(option_flag(name) for name in self.options)
        return CheckpointError(
            f"{said}, expected {self.expected}.",
            hint=f"{f'{answers} answers instead; ' if answers else ''}--ignore-config {path} leaves the key out",
        )

    def answered(self, options: CheckpointOptions) -> bool:
        """Whether the user gave one of the options that answer instead."""
        return any(getattr(options, name) not in {None, ""} for name in self.options)


def unreadable(message: str, place: str) -> CheckpointError:
    """The error of a configuration that cannot be read as a whole; ``place`` is what ``--ignore-config`` calls it."""
    return CheckpointError(
        message, hint=f"--ignore-config {place} leaves it out, and options say what the tensors do not"
    )


def is_number(value: object) -> bool:
    """Whether it is a number that a configuration may hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def checked(expected: str, understands: Callable[[Any], bool], *options: str) -> ConfigKey:
    """A key whose value decides nothing by itself."""
    return ConfigKey(expected, lambda value: {} if understands(value) else None, options)


def fixed(*known: object, options: tuple[str, ...] = ()) -> ConfigKey:
    """Only the values that stand for what this network does; True is not 1."""

    def is_known(value: object) -> bool:
        return any(value == k and (type(value) is type(k) or (is_number(value) and is_number(k))) for k in known)

    return checked(" or ".join(map(repr, known)), is_known, *options)


def number(name: str) -> ConfigKey:
    """A number that decides ``name``."""
    return ConfigKey("a number", lambda value: {name: float(value)} if is_number(value) else None, (name,))


def count(name: str, *options: str) -> ConfigKey:
    """A whole number above 0 that decides ``name``."""

    def read(value: Any) -> Values | None:
        return {name: value} if isinstance(value, int) and is_number(value) and value > 0 else None

    return ConfigKey("a whole number above 0", read, (name, *options))


def numbers(name: str) -> ConfigKey:
    """A number for each of three channels, or for one of gray images."""

    def read(value: Any) -> Values | None:
        sound = isinstance(value, (list, tuple)) and len(value) in {1, 3} and all(map(is_number, value))
        return {name: tuple(map(float, value))} if sound else None

    return ConfigKey("three numbers, or one", read, (name,))


def word(name: str, meanings: Mapping[Any, Any]) -> ConfigKey:
    """One of some words or flags, and what each stands for."""

    def read(value: Any) -> Values | None:
        return {name: meanings[value]} if isinstance(value, (str, bool)) and value in meanings else None

    return ConfigKey(" or ".join(map(repr, meanings)), read, (name,))


def flag(name: str) -> ConfigKey:
    """True or false, which decides ``name``."""
    return word(name, {True: True, False: False})


def fact(expected: str, name: str, understands: Callable[[Any], bool]) -> ConfigKey:
    """What the tensors tell as well, and must agree with."""
    return ConfigKey(expected, lambda value: {name: value} if understands(value) else None)


# Keys that detectron2's configurations, AdelaiDet's and those of tianzhi0549/FCOS share.
LEVEL_STRIDES = fact("a list of strides", "strides", lambda value: isinstance(value, (list, tuple)))
CLASSES = fact("a number", "num_classes", is_number)
CHANNEL_ORDER = word("channel_order", {"BGR": ChannelOrder.BGR, "RGB": ChannelOrder.RGB, "L": ChannelOrder.GRAY})
TEST_SIZES = {
    "INPUT.MIN_SIZE_TEST": count("shortest", "input_size"),
    "INPUT.MAX_SIZE_TEST": count("longest", "input_size"),
}


def read_training_config(known: Mapping[str, ConfigKey], evidence: Evidence) -> Values:
    """What is stored beside the weights says, by the names of ``Rules``; keys in ``--ignore-config`` count as absent.

    That is a ``CfgNode`` of detectron2 or maskrcnn-benchmark, or its YAML text, the hyper-parameters of a Lightning
    module, or the arguments of a script. The keys in ``known``, by their dotted paths, are used where they are
    understood, and stop the command otherwise; all others belong to the training or to other models.

    Raises:
        CheckpointError: naming a key whose value is not understood, and the options that answer instead.
        ConfigError: an ignored key that is not there.
    """
    ignored = set(evidence.options.ignore_config)
    values: Values = {}
    for place, path, value in _stated(evidence.metadata, ignored):
        key = known.get(path)
        if key is None:
            continue
        if path in ignored or f"{place}.{path}" in ignored:
            ignored -= {path, f"{place}.{path}"}
            continue
        decided = key.read(value)
        contradiction = _contradiction(decided or {}, evidence)
        if (decided is None or contradiction) and not key.answered(evidence.options):
            key = dataclasses.replace(key, expected=contradiction or key.expected)
            raise key.refusal(f"'{place}' in the file says {path} = {brief(value)}", path)
        values |= decided or {}
    if ignored:
        raise ConfigError(f"The file has no '{min(ignored)}' to ignore.", hint="leave --ignore-config out")
    network = evidence.network
    if network.backbone is not BackboneType.RESNET or network.block is not BlockType.BOTTLENECK:
        values.pop("stride_in_1x1", None)
    values = {name: value for name, value in values.items() if name not in {"strides", "num_classes"}}
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
                raise unreadable(
                    f"'{place}' in the file cannot be read: it is not the YAML that detectron2 writes.", place
                )
        if isinstance(content, Mapping):
            values = list(islice(_flattened(content), _MOST_VALUES + 1))
            if len(values) > _MOST_VALUES:
                text = f"'{place}' in the file has more than {_MOST_VALUES} values, which no configuration has."
                raise unreadable(text, place)
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


# ---- the contract that the rules make ----

UNKNOWN_CLASS_NAMES = "unknown: give the names with --classes"  # the source of numbered class names


def final_rules(
    ecosystem: Ecosystem, evidence: Evidence, *, stated: Mapping[str, Any], options: CheckpointOptions
) -> Rules:
    """The ecosystem's rules, overridden by what the file states, and both by the user's options.

    Raises:
        ConfigError: when class names do not fit the network, or a profile does not exist.
    """
    if options.ignore_config and not ecosystem.reads_config:
        raise ConfigError(f"Files of {ecosystem.name} hold no configuration.", hint="leave --ignore-config out")
    rules = ecosystem.rules(evidence)
    if options.anchor_sizes and rules.anchor_sizes is None:
        raise ConfigError(f"Models of {ecosystem.name} have no anchors.", hint="leave --anchor-sizes out")
    if evidence.network.extra_source is ExtraSource.INPUT:
        rules = rules.decide("the shape of P6's weights", extra_source=ExtraSource.INPUT)
    names = {item.name for item in dataclasses.fields(Rules)} - {"variant"}
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(options) if item.name in names}
    for source, said in (("the file's metadata", stated), (OPTION, given)):
        values = {name: value for name, value in said.items() if name in names and value not in (None, ())}
        # Another profile decodes from its own centers, unless they are given as well.
        if "profile" in values and "centers" not in values and values["profile"] in PROFILES:
            rules = rules.decide(f"{source}: profile", centers=PROFILES[values["profile"]].centers)
            rules = dataclasses.replace(rules, clip=None)
        rules = rules.decide(source, **values)
        if "input_size" in values:
            rules = dataclasses.replace(rules, shortest=None, longest=None)
        if "shortest" in values:
            rules = dataclasses.replace(rules, input_size=None)
    rules = _with_image_channels(_with_network_facts(rules, evidence), evidence.network)
    return _with_input_type(_with_class_names(rules, ecosystem, evidence.network))


def _with_network_facts(rules: Rules, evidence: Evidence) -> Rules:
    """Without decisions about parts that the network does not have.

    Raises:
        ConfigError: an option is about such a part.
    """
    network = evidence.network
    is_resnet = network.backbone is BackboneType.RESNET
    has_fpn_norm = any(n.startswith("backbone.fpn.") and n.endswith(".norm.running_mean") for n in evidence.tensors)
    if has_fpn_norm and rules.fpn_norm_eps is None:
        rules = dataclasses.replace(rules, fpn_norm_eps=network.fpn_norm_eps)
    if network.backbone is BackboneType.VOVNET and (rules.size_divisor or 32) % 32:
        raise ConfigError(
            "A VoVNet's pooling rounds sizes down where they are not even, so that its inputs are multiples of 32, "
            f"not of {rules.size_divisor}.",
            hint="--size-divisor 32",
        )
    parts = {
        "norm_groups": ("group norm in its towers", network.tower_norm is TowerNorm.GROUP),
        "tower_norm_eps": ("norm in its towers", network.tower_norm is not TowerNorm.NONE),
        "fpn_norm_eps": ("batch norm in its pyramid", has_fpn_norm),
        "deform_groups": ("deformable convolution", bool(network.deformable)),
        "extra_source": ("level P6", network.extra_convs > 0),
        "extra_relu": ("level P7", network.extra_convs > 1),
        "stage_strides": ("ResNet backbone", is_resnet),
        "stage_dilations": ("ResNet backbone", is_resnet),
    }
    absent = {name: part for name, (part, present) in parts.items() if not present}
    for name, part in absent.items():
        if rules.sources.get(name) == OPTION:
            raise ConfigError(f"The network has no {part}.", hint=f"leave {option_flag(name)} out")
    nothing: dict[str, Any] = dict.fromkeys(absent)
    return dataclasses.replace(rules, **nothing)


def _with_image_channels(rules: Rules, network: FcosConfig) -> Rules:
    """With the order of the channels that the stem takes, and as many numbers for the pixels.

    Raises:
        ConfigError: the order, the mean or the std is of another number of channels.
    """
    gray = network.image_channels == 1
    if gray and rules.sources.get("channel_order") != OPTION:
        rules = rules.decide("the shape of the stem's weights", channel_order=ChannelOrder.GRAY)
    if gray != (rules.channel_order is ChannelOrder.GRAY):
        taken = "gray images" if gray else "images of 3 colours"
        raise ConfigError(f"The network takes {taken}, not {rules.channel_order}.", hint="leave --channel-order out")
    for name in ("mean", "std"):
        values, source = getattr(rules, name), rules.sources.get(name, "")
        if len(values) != network.image_channels:
            example = f"--{name} A" if gray else f"--{name} A,B,C"
            stated = f"'s {len(values)} numbers, from {source}, are not of them" if source else " is not in the file"
            raise ConfigError(
                f"The network takes images of {network.image_channels} channels: their {name}{stated}.",
                hint=f"give that of the training: {example}, for pixels of 0 to {255 / rules.pixel_scale:g}",
            )
    return rules


def _with_class_names(rules: Rules, ecosystem: Ecosystem, network: FcosConfig) -> Rules:
    """Class names by label; a missing list is COCO's or gets numbers.

    Raises:
        ConfigError: the names do not fit the network; COCO's never take their place.
    """
    count = network.num_classes + rules.label_offset
    names = rules.class_names
    if not names and count == len(ecosystem.coco_names):
        source = f"rule of {ecosystem.name}: {network.num_classes} channels are COCO's"
        return rules.decide(source, class_names=ecosystem.coco_names)
    if not names:
        numbered = tuple(f"class_{i}" for i in range(count))
        return rules.decide(UNKNOWN_CLASS_NAMES, class_names=numbered)
    # tianzhi's labels begin at 1, and the label 0 has no channel; of COCO's 91 ids, 0 is the background.
    background = rules.label_offset == 1 or count == len(COCO_91) == len(ecosystem.coco_names)
    if len(names) == count - 1 and background:
        return dataclasses.replace(rules, class_names=("background", *names))
    if len(names) != count:
        source = rules.sources.get("class_names", OPTION)
        given = "were given" if source == OPTION else f"come from {source}"
        raise ConfigError(
            f"The network has {network.num_classes} class channels, but {len(names)} class names {given}.",
            hint="give --classes FILE with one name a line, in the order of the training labels"
            + ("; name the background first where it has a channel" if len(names) == count - 1 else ""),
        )
    return rules


def _with_input_type(rules: Rules) -> Rules:
    """float32 keeps the ecosystem's own arithmetic; pixels that stay uint8 are resized before they are normalised."""
    default = InputDtype.FLOAT32 if rules.input_size is None else InputDtype.UINT8
    dtype = rules.input_dtype or default
    if rules.input_dtype is None:
        rules = rules.decide("rule: uint8 for a fixed input size, float32 otherwise", input_dtype=dtype)
    if rules.input_size is not None and rules.size_rule not in {SizeRule.LETTERBOX, SizeRule.STRETCH}:
        rules = rules.decide("rule: a fixed input size is filled keeping the ratio", size_rule=SizeRule.LETTERBOX)
    # OpenCV's bilinear filter of uint8 is torch's of float without antialiasing, rounded to levels (docs/fcos.md).
    if dtype is InputDtype.UINT8 and rules.resize_filter is ResizeFilter.TORCH:
        rules = rules.decide("rule: for uint8 input the same arithmetic, rounded", resize_filter=ResizeFilter.CV2)
    if rules.resize_filter is not ResizeFilter.TORCH and rules.resize_order is not ResizeOrder.RESIZE_FIRST:
        rules = rules.decide("rule: this resize filter works on uint8", resize_order=ResizeOrder.RESIZE_FIRST)
    return rules


def network_config(rules: Rules, network: FcosConfig) -> FcosConfig:
    """What shapes tell of the network, completed by the rules."""
    names = {item.name for item in dataclasses.fields(FcosConfig)} & {item.name for item in dataclasses.fields(Rules)}
    decided = {name: value for name in sorted(names) if (value := getattr(rules, name)) is not None}
    levels = network.laterals + network.extra_convs + decided.get("pooled_levels", network.pooled_levels)
    strides = level_strides(rules.stage_strides or network.stage_strides, levels, laterals=network.laterals)
    return dataclasses.replace(network, strides=strides, **decided)


def level_strides(stage_strides: tuple[int, ...], levels: int, *, laterals: int = 3) -> tuple[int, ...]:
    """Strides of the pyramid's levels in network-input pixels, of a backbone with these strides of its stages."""
    strides, stride = [], 4  # The stem has divided by 4.
    for stage_stride in (*stage_strides, *(2,) * (levels - laterals)):
        stride *= stage_stride
        strides.append(stride)
    return tuple(strides[len(stage_strides) - laterals :])


def preprocess_spec(rules: Rules) -> PreprocessSpec:
    """The preprocessing part of the contract.

    Raises:
        ConfigError: a size that is no multiple of the network's strides; where it is not the user's, whose it is.
    """
    _check_units(rules)
    height, width = rules.input_size or (None, None)
    pixel = rules.pad_pixel  # One number stands for all channels.
    padded = pixel * len(rules.mean) if pixel is not None and len(pixel) == 1 else pixel
    decided = {item.name: getattr(rules, item.name, None) for item in dataclasses.fields(PreprocessSpec)}
    decided |= {"height": height, "width": width, "pad_pixel": padded}
    try:
        return PreprocessSpec(**{name: value for name, value in decided.items() if value is not None})
    except InputSizeError as error:
        source = rules.sources.get("input_size", OPTION)
        if source == OPTION:
            raise
        raise InputSizeError(
            f"{error.message} The size comes from {source}.", hint=f"{error.hint}; --input-size HxW overrides it"
        ) from error


def _check_units(rules: Rules) -> None:
    """Refuse a mean or std that belongs to pixels of another range.

    Raises:
        ConfigError: it is not finite, or cannot be one of pixels from 0 to 255 / ``pixel_scale``.
    """
    scale = rules.pixel_scale
    largest = 255.0 / scale
    unit = f"pixels are {f'divided by {scale:g}, so ' if scale != 1 else ''}0 to {largest:g} here"
    for name, values in (("mean", rules.mean), ("std", rules.std)):
        shown = ", ".join(f"{value:g}" for value in values)
        source = rules.sources.get(name, OPTION)
        said = f"The {name} {shown}" + ("" if source == OPTION else f", from {source},")
        if not all(math.isfinite(value) for value in values):
            raise ConfigError(f"{said} is not made of finite numbers.", hint=f"--{name} A,B,C")
        # A mean lies within the range. A std is at least one level of 255 and at most the range.
        smallest = 0.0 if name == "mean" else 1.0 / scale
        within = all(smallest <= value <= largest for value in values)
        # Of pixels up to 255 no image's mean lies below 1, but those of 0..1 always do.
        of_unit_range = name == "mean" and scale == 1 and 0 < max(values) <= 1
        if not within or of_unit_range:
            factor = 255.0 if max(values) <= 1 else 1 / 255.0
            hint = ",".join(f"{value * factor:.6g}" for value in values)
            raise ConfigError(f"{said} cannot be one of the pixels: {unit}.", hint=f"--{name} {hint} in this unit")


def decode_spec(rules: Rules, config: FcosConfig) -> DecodeSpec:
    """The post-processing part of the contract."""
    if rules.profile not in PROFILES:
        raise unknown_name("profile", rules.profile, PROFILES)
    offset = rules.label_offset
    profile = PROFILES[rules.profile]
    return DecodeSpec(
        profile=dataclasses.replace(profile, centers=rules.centers, clip=rules.clip or profile.clip),
        score_threshold=rules.score_threshold,
        iou_threshold=rules.iou_threshold,
        strides=config.strides,
        pre_nms_top_k=rules.pre_nms_top_k or ALL_CANDIDATES,
        max_detections=rules.max_detections,
        class_agnostic=rules.class_agnostic,
        min_box_size=rules.min_box_size or 0.0,
        label_map=tuple(range(offset, offset + config.num_classes)) if offset else (),
    )
