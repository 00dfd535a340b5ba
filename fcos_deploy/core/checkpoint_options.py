"""What a user may say about a checkpoint: one declaration for Python, the command line and TOML files."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcos_deploy.core.decode import BoxClip
from fcos_deploy.core.enums import CenterMode, Orientation
from fcos_deploy.core.errors import ConfigError, brief
from fcos_deploy.core.files import decoded_text, read_file
from fcos_deploy.core.network import BoxActivation, ExtraSource, Upsampling
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, ResizeFilter, SizeRule
from fcos_deploy.core.serialize import from_json, parse_toml, to_json, toml_value

__all__ = [
    "AUTO",
    "OPTION",
    "CheckpointOptions",
    "OptionInfo",
    "format_checkpoint_options",
    "option_flag",
    "option_infos",
    "override_options",
    "parse_option",
    "read_checkpoint_options",
    "read_options_file",
    "replaced_fields",
]

AUTO = "auto"
OPTION = "option"  # the source of a decision that the user states
_STRUCTURED = frozenset({".json", ".yaml", ".yml", ".toml", ".xml", ".csv", ".pbtxt"})  # their lines are no names
_LARGEST_FILE = 1 << 20  # bytes, of a file of class names or of options


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """A field of ``CheckpointOptions`` on the command line.

    ``flags`` replaces the name that follows from the field's; ``parse`` makes the field's value of a text, or of a path
    with ``is_file`` (ConfigError: what the option "must be"). ``common`` options are those of every command that reads
    a checkpoint.
    """

    help: str
    panel: str
    flags: str = ""
    metavar: str = ""
    parse: Callable[[Any], Any] | None = None  # Any: a str or a Path; the field's own type
    is_file: bool = False
    common: bool = False


def _option(default: Any, help: str, *, panel: str = "Checkpoint", **info: Any) -> Any:  # noqa: A002  # as in Typer
    """A field with its ``OptionInfo``; Any: the field's type and the default's, as in ``dataclasses.field``."""
    return dataclasses.field(default=default, metadata={"option": OptionInfo(help=help, panel=panel, **info)})


def _preprocessing(default: Any, help: str, **info: Any) -> Any:  # noqa: A002
    return _option(default, help, panel="Preprocessing", **info)


def _detection(default: Any, help: str, **info: Any) -> Any:  # noqa: A002
    return _option(default, help, panel="Detection", **info)


def _size(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if match is None:
        square = f"{text.strip()}x{text.strip()}" if text.strip().isdecimal() else "640x800"
        raise ConfigError(f"must be height x width such as {square}, got '{text}'.")
    return int(match[1]), int(match[2])


def _channels(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in {1, 3}:
        raise ConfigError(f"must be three numbers with commas between them, or one for gray images, got '{text}'.")
    return values


def _whole_numbers(example: str, *, count: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """Reads ``count`` numbers, or any, that are separated by commas."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.replace(" ", "").split(",")
        if any(re.fullmatch(r"\d{1,5}", part) is None for part in parts) or count not in (None, len(parts)):
            number = {None: "", 4: "four "}[count]
            raise ConfigError(
                f"must be {number}whole numbers with commas between them such as {example}, got '{text}'."
            )
        return tuple(map(int, parts))

    return parse


def _class_names(path: Path) -> tuple[str, ...]:
    if not path.exists() or path.suffix.lower() in _STRUCTURED:
        raise ConfigError(f"must be a text file with one class name a line, got '{path}'.")
    names = tuple(line.strip() for line in _read_text(path).rstrip().splitlines())
    if not names or not all(names):
        raise ConfigError(f"'{path}' must hold one class name per line, without empty lines.")
    return names


def _read_text(path: Path) -> str:
    try:
        return decoded_text(read_file(path, limit=_LARGEST_FILE))
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"Cannot read '{path}': {error}.", hint="save it as UTF-8") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """Overrides of what the file and its ecosystem say; empty and ``None`` leave the decision to them.

    ``input_size`` (height, width) makes a fixed canvas, ``shortest`` and ``longest`` follow the image; without either
    the ecosystem's own test size holds. ``input_dtype`` is uint8 for a canvas and float32 otherwise, because only
    float32 reproduces the ecosystem's own resize arithmetic to the last digit. ``profile`` is a name in
    ``core.decode.PROFILES``. ``origins``: for each field that an options file states, the name of that file.

    Raises:
        ConfigError: when two options contradict each other, or a size cannot be meant.
    """

    ecosystem: str = _option(
        AUTO,
        "Library that trained the checkpoint, such as torchvision or mmdetection (docs/checkpoints.md has all). "
        "Default: auto, recognised by the tensors' names.",
        metavar="NAME",
        common=True,
    )
    variant: str = _option(
        "",
        "Variant of the ecosystem's FCOS. tianzhi: original or imprv; mmdetection: plain or tricks. "
        "Default: recognised where the file shows it.",
        metavar="NAME",
        common=True,
    )
    weights: str = _option(
        "",
        "Weights to load from a file that holds several: ema, model, or a name that 'inspect' shows. "
        "Default: ema, which training scripts evaluate; you are asked where the file leaves it open.",
        metavar="ema|model|NAME",
    )
    class_names: tuple[str, ...] = _option(
        (),
        "Text file with one class name per line, in the order of the training labels. "
        "Default: the names in the file, or COCO's where the number of classes is COCO's.",
        flags="--classes",
        metavar="FILE",
        parse=_class_names,
        is_file=True,
        common=True,
    )
    stride_in_1x1: bool | None = _option(
        None,
        "Convolution of a bottleneck block that has the stride. Default: the ecosystem's.",
        flags="--stride-in-1x1/--stride-in-3x3",
    )
    box_activation: BoxActivation | None = _option(
        None, "Function that turns box outputs into pixels. Default: the ecosystem's."
    )
    centerness_on_reg: bool | None = _option(
        None,
        "Tower that feeds the centerness output. Default: the ecosystem's.",
        flags="--centerness-on-reg/--centerness-on-cls",
    )
    norm_eps: float | None = _option(None, "Epsilon of the backbone's batch norm. Default: the ecosystem's.")
    norm_groups: int | None = _option(
        None, "Number of groups of the towers' group norm. Default: the configuration's, or 32.", metavar="N"
    )
    tower_norm_eps: float | None = _option(None, "Epsilon of the towers' norm. Default: the configuration's, or 1e-5.")
    fpn_norm_eps: float | None = _option(
        None, "Epsilon of the pyramid's batch norm. Default: the configuration's, or 1e-5."
    )
    deform_groups: int | None = _option(
        None, "Offset groups of deformable convolutions. Default: what the shapes of their tensors show.", metavar="N"
    )
    anchor_sizes: tuple[int, ...] = _option(
        (),
        "Sizes of torchvision's AnchorGenerator, one a level: the unit of the distances. Default: 8,16,32,64,128.",
        metavar="A,B,...",
        parse=_whole_numbers("8,16,32,64,128"),
    )
    stage_strides: tuple[int, int, int, int] | None = _option(
        None,
        "Strides of the four stages of a ResNet. Default: the configuration's, or 1,2,2,2.",
        metavar="A,B,C,D",
        parse=_whole_numbers("1,2,2,2", count=4),
    )
    stage_dilations: tuple[int, int, int, int] | None = _option(
        None,
        "Dilations of the four stages of a ResNet. Default: the configuration's, or 1,1,1,1.",
        metavar="A,B,C,D",
        parse=_whole_numbers("1,2,2,2", count=4),
    )
    upsampling: Upsampling | None = _option(
        None, "Interpolation between the pyramid's levels. Default: the configuration's, or nearest."
    )
    pooled_levels: int | None = _option(
        None,
        "Number of coarsest levels that pooling makes, which have no weights. "
        "Default: what the levels' scales show; 1 for torchvision without P6.",
        metavar="N",
    )
    extra_source: ExtraSource | None = _option(
        None,
        "Map from which P6 is computed: P5 (output), the lateral convolution of C5 (lateral) or C5 (input). "
        "Default: what the tensors' shapes show, the configuration's, or output.",
    )
    extra_relu: bool | None = _option(
        None,
        "Whether P7 is computed from relu(P6) or from P6. Default: the configuration's, or relu(P6).",
        flags="--extra-relu/--no-extra-relu",
    )
    ignore_config: tuple[str, ...] = _option(
        (),
        "Keys of the configuration in an mmdetection file to leave out, as the error that names them writes them, "
        "separated by commas; cfg leaves out all of it. Default: none.",
        metavar="KEYS",
        parse=lambda text: tuple(key.strip() for key in text.split(",") if key.strip()),
    )
    input_size: tuple[int, int] | None = _preprocessing(
        None,
        "Fixed input size, height x width, such as 640x640 (other tools' --imgsz 640). The image keeps its aspect "
        "ratio; the rest is padded. Default: the ecosystem's test size.",
        metavar="HxW",
        parse=_size,
        common=True,
    )
    shortest: int | None = _preprocessing(
        None, "Length of the image's shorter side after resizing; needs --longest.", metavar="PIXELS"
    )
    longest: int | None = _preprocessing(
        None, "Limit of the longer side after resizing; needs --shortest.", metavar="PIXELS"
    )
    input_dtype: InputDtype | None = _preprocessing(
        None,
        "Type of the network input. uint8: pixels, normalised inside the graph; float32: normalised before it. "
        "Default: uint8 with --input-size, float32 otherwise.",
    )
    channel_order: ChannelOrder | None = _preprocessing(None, "Order of the colour channels. Default: the ecosystem's.")
    mean: tuple[float, ...] | None = _preprocessing(
        None,
        "Mean that is subtracted, in the order of the channels and the unit of the pixels: 0 to 1 for torchvision, "
        "0 to 255 for the others. One number for gray images. Default: the ecosystem's.",
        metavar="A,B,C",
        parse=_channels,
    )
    std: tuple[float, ...] | None = _preprocessing(
        None,
        "Standard deviation to divide by, in the order of the channels and the unit of the mean. "
        "Default: the ecosystem's.",
        metavar="A,B,C",
        parse=_channels,
    )
    resize_filter: ResizeFilter | None = _preprocessing(
        None, "Library whose bilinear interpolation is reproduced. Default: the ecosystem's."
    )
    size_rule: SizeRule | None = _preprocessing(
        None,
        "Arithmetic of the resized size: letterbox or stretch with --input-size, a library's with --shortest. "
        "Default: letterbox with --input-size, otherwise the ecosystem's.",
    )
    content: tuple[int, int] | None = _preprocessing(
        None,
        "Height x width in the upper left of --input-size that the image is resized to. Default: all of it.",
        flags="--content-size",
        metavar="HxW",
        parse=_size,
    )
    size_divisor: int | None = _preprocessing(
        None,
        "Number that the height and width of the network input are padded to a multiple of. "
        "Default: the configuration's, or 32.",
        metavar="PIXELS",
    )
    pad_pixel: tuple[float, ...] | None = _preprocessing(
        None,
        "Pixel of the padding, in the order of the channels, or one number for all of them. Default: the mean.",
        flags="--pad-pixel",
        metavar="A,B,C",
        parse=_channels,
    )
    orientation: Orientation | None = _preprocessing(
        None, "Whether image files are turned as their EXIF orientation says. Default: as the ecosystem does."
    )
    score_threshold: float | None = _detection(
        None, "Minimum score of a detection. Default: the checkpoint's.", metavar="SCORE", common=True
    )
    iou_threshold: float | None = _detection(
        None, "IoU above which NMS drops the lower-scored box. Default: the checkpoint's.", metavar="IOU"
    )
    max_detections: int | None = _detection(
        None, "Maximum number of detections in an image. Default: the checkpoint's.", metavar="N"
    )
    pre_nms_top_k: int | None = _detection(
        None, "Maximum number of candidates per level before NMS; 0: all. Default: the checkpoint's.", metavar="N"
    )
    class_agnostic: bool | None = _detection(
        None,
        "Whether NMS compares boxes of all classes, or those of the same class. Default: the checkpoint's.",
        flags="--class-agnostic-nms/--per-class-nms",
    )
    min_box_size: float | None = _detection(
        None,
        "Length in image pixels that both sides of a box must exceed, for profiles that drop boxes by their size. "
        "Default: the checkpoint's.",
        metavar="PIXELS",
    )
    clip: BoxClip | None = _detection(
        None,
        "What boxes are clipped to before NMS: nothing (none), the padded input, the image in it, or one pixel less "
        "(image-1). Default: the profile's.",
    )
    centers: CenterMode | None = _detection(
        None, "Position of a level's locations in the image. Default: the profile's."
    )
    profile: str | None = _detection(
        None,
        "Post-processing of this library: torchvision, mmdetection, mmdetection2 (2.17 and older), adelaidet, "
        "detectron2 or tianzhi. "
        "Default: the ecosystem's.",
        metavar="NAME",
    )
    origins: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if (self.shortest is None) != (self.longest is None):
            raise ConfigError(
                "Give --shortest and --longest together.", hint="for example --shortest 800 --longest 1333"
            )
        if self.input_size is not None and self.shortest is not None:
            raise ConfigError("Give either --input-size or --shortest and --longest, not both.")
        for name in ("mean", "std", "pad_pixel"):
            if len(getattr(self, name) or (0,)) not in {1, 3}:
                raise ConfigError(f"{option_flag(name)} must have 3 numbers, or 1 for gray images.")
        sizes = (*(self.input_size or ()), *(self.content or ()), self.shortest, self.longest, self.size_divisor)
        for size in sizes:
            if size is not None and size < 1:
                raise ConfigError(f"An input size must be at least 1 pixel, got {size}.")
        if self.shortest is not None and self.longest is not None and self.shortest > self.longest:
            raise ConfigError(f"--shortest {self.shortest} is larger than --longest {self.longest}.")


def option_flag(name: str) -> str:
    """The option of a field as one types it, without the form that switches it off."""
    return option_infos()[name].flags.partition("/")[0] or f"--{name.replace('_', '-')}"


def parse_option(name: str, text: Any) -> Any:  # Any: what the command line has for the field; its own type
    """The value of a field from its text on a command line.

    Raises:
        ConfigError: it has another form; the message names the option.
    """
    parse = option_infos()[name].parse
    try:
        return parse(text) if parse else text
    except ConfigError as error:
        if not error.message.startswith("must be "):
            raise
        raise ConfigError(f"{option_flag(name)} {error.message}", hint=error.hint) from error


def option_infos() -> dict[str, OptionInfo]:
    """Every option by the name of its field, in order."""
    fields = dataclasses.fields(CheckpointOptions)
    return {item.name: item.metadata["option"] for item in fields if "option" in item.metadata}


def override_options(options: CheckpointOptions, values: Mapping[str, Any]) -> CheckpointOptions:
    """``options`` with ``values`` (by field) in place of its own, and without its own that contradict them."""
    dropped = dict.fromkeys(replaced_fields(values))
    origins = {name: file for name, file in options.origins.items() if name not in values}
    return dataclasses.replace(options, **{**dropped, **values, "origins": origins})


def replaced_fields(stated: Collection[str]) -> frozenset[str]:
    """The fields of what is overridden that go with the ones that are ``stated`` above it, as they contradict them."""
    replaced: set[str] = set()
    if "input_size" in stated:
        replaced = {"shortest", "longest", "size_rule", "content"}
    elif "shortest" in stated or "longest" in stated:
        replaced = {"input_size", "size_rule", "content"}
    if "profile" in stated:
        replaced |= {"centers", "clip"}  # A profile brings its own.
    return frozenset(replaced)


def read_options_file(path: Path, known: Collection[str], *, otherwise: str) -> dict[str, Any]:  # Any: TOML values
    """What a TOML file says about the options that are ``known``; ``otherwise``: the hint where no name is similar.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds an option that does not exist.
    """
    try:
        values = parse_toml(_read_text(path))
    except ValueError as error:
        hint = "text stands in quotes: \"train\"; a path with backslashes in single ones: 'C:\\images\\train'"
        raise ConfigError(f"'{path}' is not a TOML file: {error}.", hint=hint) from error
    for name in values:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{similar[0]}'?" if similar else otherwise
            raise ConfigError(f"'{path}' has an unknown option {brief(name)}.", hint=hint)
    return values


def read_checkpoint_options(path: Path) -> CheckpointOptions:
    """Options from a TOML file: one ``field = value`` a line, as ``format_checkpoint_options`` writes them.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or holds an option that does not exist or has another type.
    """
    values = read_options_file(path, option_infos(), otherwise="'fcos-deploy inspect --write-options' writes a file")
    options = from_json(CheckpointOptions, values, where=str(path))
    return dataclasses.replace(options, origins=dict.fromkeys(values, path.name))


def format_checkpoint_options(options: CheckpointOptions, *, sources: Mapping[str, str] | None = None) -> str:
    """``options`` as TOML, without those that decide nothing; ``sources`` (by field) become comments."""
    lines = ["# Options of a checkpoint for fcos-deploy: give this file with --checkpoint-options."]
    for name, value in to_json(options).items():
        if name == "origins" or value in (None, "", [], AUTO):
            continue
        comment = " ".join((sources or {}).get(name, "").split())
        lines.append(f"{name} = {toml_value(value)}" + (f"  # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"
