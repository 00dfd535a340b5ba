"""The options that say what a checkpoint leaves open, declared once for every command that reads one."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.core.checkpoint_options import AUTO, CheckpointOptions
from fcos_deploy.core.enums import ArtifactKind, CenterMode
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.model_files import KINDS_BY_SUFFIX
from fcos_deploy.core.network import BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, ResizeFilter

__all__ = [
    "AllowFallback",
    "PublicKeys",
    "RequireSignature",
    "checkpoint_options",
    "for_checkpoints",
    "parse_size",
    "parse_triple",
    "read_class_names",
    "reference_keys",
    "trusted_keys",
    "with_checkpoint_options",
]

_LONGEST_NAMES_FILE = 1 << 20  # bytes


def checkpoint_options(
    *,
    ecosystem: Annotated[
        str, typer.Option(help="auto, torchvision, mmdetection, adelaidet, detectron2 or tianzhi.")
    ] = AUTO,
    variant: Annotated[str, typer.Option(help="tianzhi: original, imprv. mmdetection: plain, tricks.")] = "",
    weights: Annotated[str, typer.Option(help="model or ema, where the file holds both.")] = "",
    classes: Annotated[Path | None, typer.Option(help="Text file with one class name a line.")] = None,
    input_size: Annotated[str, typer.Option(metavar="HxW", help="A fixed input size, such as 640x640.")] = "",
    shortest: Annotated[int | None, typer.Option(help="Length of the shorter side; goes with --longest.")] = None,
    longest: Annotated[int | None, typer.Option(help="Limit of the longer side; goes with --shortest.")] = None,
    input_dtype: Annotated[
        InputDtype | None, typer.Option(help="uint8: pixels, normalised in the graph. float32: normalised before.")
    ] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Least score of a detection.")] = None,
    iou_threshold: Annotated[float | None, typer.Option(help="Overlap above which a detection goes.")] = None,
    max_detections: Annotated[int | None, typer.Option(help="Most detections of an image.")] = None,
    pre_nms_top_k: Annotated[int | None, typer.Option(help="Candidates of a level that reach suppression.")] = None,
    stride_in_1x1: Annotated[
        bool | None,
        typer.Option("--stride-in-1x1/--stride-in-3x3", help="Convolution of a bottleneck with the stride."),
    ] = None,
    box_activation: Annotated[BoxActivation | None, typer.Option(help="How box outputs become pixels.")] = None,
    centerness_on_reg: Annotated[
        bool | None,
        typer.Option("--centerness-on-reg/--centerness-on-cls", help="Tower that feeds the centerness."),
    ] = None,
    norm_eps: Annotated[float | None, typer.Option(help="Epsilon of the backbone's batch norm.")] = None,
    channel_order: Annotated[ChannelOrder | None, typer.Option(help="Order of the colour channels.")] = None,
    mean: Annotated[str, typer.Option(metavar="A,B,C", help="Mean, in the order of the channels.")] = "",
    std: Annotated[str, typer.Option(metavar="A,B,C", help="Standard deviation, likewise.")] = "",
    resize_filter: Annotated[ResizeFilter | None, typer.Option(help="Whose bilinear interpolation.")] = None,
    centers: Annotated[CenterMode | None, typer.Option(help="Where the locations of a level lie.")] = None,
    profile: Annotated[str | None, typer.Option(help="Post-processing, by name: see docs/checkpoints.md.")] = None,
) -> CheckpointOptions:
    """Options in the command line's words to ``CheckpointOptions``; also the declaration of those options.

    Raises:
        ConfigError: when a text cannot be read as what it should be.
    """
    return CheckpointOptions(
        ecosystem=ecosystem,
        variant=variant,
        weights=weights,
        class_names=() if classes is None else read_class_names(classes),
        input_size=parse_size(input_size) if input_size else None,
        shortest=shortest,
        longest=longest,
        input_dtype=input_dtype,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        max_detections=max_detections,
        pre_nms_top_k=pre_nms_top_k,
        stride_in_1x1=stride_in_1x1,
        box_activation=box_activation,
        centerness_on_reg=centerness_on_reg,
        norm_eps=norm_eps,
        channel_order=channel_order,
        mean=parse_triple(mean) if mean else None,
        std=parse_triple(std) if std else None,
        resize_filter=resize_filter,
        centers=centers,
        profile=profile,
    )


def with_checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command all options of ``checkpoint_options``; it receives them as one parameter, ``options``.

    An option that the command declares itself keeps the command's meaning.
    """
    own = inspect.signature(command, eval_str=True)
    declared = inspect.signature(checkpoint_options, eval_str=True).parameters
    added = {name: item for name, item in declared.items() if name not in own.parameters}

    @functools.wraps(command)
    def merged(**arguments: object) -> None:
        chosen = {name: arguments.pop(name) for name in added}
        command(**arguments, options=checkpoint_options(**chosen))  # type: ignore[arg-type]  # typed by ``declared``

    kept = [item for name, item in own.parameters.items() if name != "options"]
    parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in (*kept, *added.values())]
    # Typer reads the signature and the annotations; without ``__wrapped__`` they are not those of ``command``.
    merged.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # a known protocol
    merged.__annotations__ = {item.name: item.annotation for item in parameters}
    del merged.__wrapped__
    return merged


def for_checkpoints(options: CheckpointOptions, models: Sequence[Path]) -> dict[Path, CheckpointOptions | None]:
    """The options of each model where a command takes several: its checkpoints get them, the others carry a contract.

    Where none is a checkpoint all get them, so that opening one refuses them.
    """
    checkpoints = {model for model in models if _is_checkpoint(model)}
    return {model: options if model in checkpoints or not checkpoints else None for model in models}


def reference_keys(reference: Path, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys that ``reference`` needs: a checkpoint is read as data and has no signature, the rest is executed."""
    return () if _is_checkpoint(reference) else keys


def _is_checkpoint(model: Path) -> bool:
    return ArtifactKind.CHECKPOINT in KINDS_BY_SUFFIX.get(model.suffix.lower(), ())


def parse_size(text: str) -> tuple[int, int]:
    """``"320x416"`` to (height, width).

    Raises:
        ConfigError: when it is anything else.
    """
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip())
    if match is None:
        raise ConfigError(f"--input-size must be height x width such as 640x800, got '{text}'.")
    return int(match[1]), int(match[2])


def parse_triple(text: str) -> tuple[float, float, float]:
    """``"1,2,3"`` to three numbers.

    Raises:
        ConfigError: when it is anything else.
    """
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"Expected three numbers separated by commas, got '{text}'.") from error
    return first, second, third


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names from a text file, one a line in the order of the labels; empty lines at the end do not count.

    Raises:
        ConfigError: when the file cannot be read, is empty, or has an empty line between names.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(_LONGEST_NAMES_FILE + 1)
        names = tuple(line.strip() for line in content.decode("utf-8-sig").rstrip().splitlines())
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not a UTF-8 text file.", hint="one class name a line") from error
    if len(content) > _LONGEST_NAMES_FILE or not names or not all(names):
        raise ConfigError(f"'{path}' must hold one class name a line, without empty lines.")
    return names


PublicKeys = Annotated[
    list[str] | None,
    typer.Option("--public-key", metavar="PEM", help="Trusted key, a file or its text; may be repeated."),
]
RequireSignature = Annotated[
    bool, typer.Option("--require-signature", help="Refuse what is not a bundle that a --public-key signed.")
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Fall back along the chain of backends that a bundle declares.")
]


def trusted_keys(public_key: list[str] | None, *, required: bool) -> tuple[str, ...]:
    """The keys of which one must have signed a bundle; none when none is given.

    Raises:
        ConfigError: a signature is required, and there is no key to check it with.
    """
    if not public_key and not required:
        return ()  # Before the bundle package is imported, which plain files do without.
    from fcos_deploy.bundle import required_keys

    return tuple(str(key) for key in required_keys(tuple(public_key or ()), required=required))
