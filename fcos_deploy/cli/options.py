"""Options that several commands share, each declared once, and what they become."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcos_deploy.core.artifact import is_checkpoint
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import (
    CheckpointOptions,
    OptionInfo,
    option_infos,
    override_options,
    parse_option,
    read_checkpoint_options,
)
from fcos_deploy.core.enums import ComputeType, PerformanceHint, Precision
from fcos_deploy.core.gate import Gate, Judge
from fcos_deploy.core.trust import Trust

if TYPE_CHECKING:
    from fcos_deploy.detector import DetectorSpec


def option(help: str, *flags: str, **more: Any) -> Any:  # noqa: A002  # as in typer.Option
    """``typer.Option`` with its help first; Any: its other arguments, and its result's type."""
    return typer.Option(*flags, help=help, show_default="Default:" not in help, **more)


class Panel(str):
    """The title of a panel in the help of a command."""

    __slots__ = ()

    def option(self, help: str, *flags: str, **more: Any) -> Any:  # noqa: A002  # as in ``option``
        """An option in this panel."""
        return option(help, *flags, rich_help_panel=self, **more)


_OF_A_RUN = tuple(map(Panel, ("Gate", "Runtime", "Serving", "Shapes", "Stream", "TensorRT")))
GATE, RUNTIME, SERVING, SHAPES, STREAM, TENSORRT = _OF_A_RUN
CHECKPOINT, DETECTION, TRUST, OUTPUT = map(Panel, ("Checkpoint", "Detection", "Trust", "Output"))
_PANELS = (None, *_OF_A_RUN, CHECKPOINT, "Preprocessing", DETECTION, TRUST, OUTPUT)  # in this order


def output(help: str, *, metavar: str = "FILE") -> Any:  # noqa: A002  # as in typer.Option
    """``-o/--output``, the same in every command; Any: as ``option``."""
    return option(help, "-o", "--output", metavar=metavar)


def complete_backend(incomplete: str) -> list[str]:
    """Backends whose names begin so, for shells."""
    from fcos_deploy.core.backend import all_backends

    return [name for name in all_backends() if name.startswith(incomplete)]


def complete_target(incomplete: str) -> list[str]:
    """Device profiles whose names begin so, for shells."""
    from fcos_deploy.targets.profiles import profile_names

    return [name for name in profile_names() if name.startswith(incomplete)]


def complete_serving(incomplete: str) -> list[str]:
    """Uses of a package whose names begin so, for shells."""
    from fcos_deploy.serving.package import all_packagers

    return [name for name in all_packagers() if name.startswith(incomplete)]


Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of any supported ecosystem.")]
Graph = Annotated[Path, typer.Argument(metavar="MODEL", help="Float ONNX graph.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint, ONNX file, OpenVINO IR, engine or bundle.")]
Bundle = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Bundle: the folder or .tar that 'fcos-deploy deploy' wrote.")
]
InstalledLink = Annotated[
    Path, typer.Argument(metavar="LINK", help="Symbolic link that leads to the installed bundle, such as models/cells.")
]

Also = Annotated[list[Path] | None, option("Another model to measure with this one; repeatable.", metavar="MODEL")]
Reference = Annotated[Path, option("Model to compare with, usually the checkpoint it was made from.", metavar="MODEL")]
Images = Annotated[Path, option("Folder of the images.", metavar="DIR")]
Annotations = Annotated[
    Path | None,
    option(
        "COCO annotations of the images. Default: the reference model's detections are the ground truth.",
        metavar="FILE",
    ),
]
AllowOverlap = Annotated[
    bool, option("Permission for evaluation images that are calibration images too; it is reported.")
]
CalibrationCount = Annotated[int | None, option("Number of calibration images to choose. Default: up to 128.")]
Seed = Annotated[int, option("Random seed for choosing calibration images.")]
RunCode = Annotated[bool, option("Permission to run the function that MODEL names, which returns a wrapped module.")]
Limit = Annotated[int | None, option("Number of images to use. Default: all.", min=1)]
Rounds = Annotated[int, option("Rounds of the benchmark; each times 5 detections of every model.", min=1)]
_AT = "{} for which each class's score threshold is chosen. Default: the bundle's thresholds, elsewhere best F1."
AtPrecision = Annotated[float | None, option(_AT.format("Precision"), metavar="SHARE")]
AtRecall = Annotated[float | None, option(_AT.format("Recall"), metavar="SHARE")]
Opset = Annotated[int | None, option("ONNX operator set, 16 to 23. Default: 17, or 19 where the graph has DeformConv.")]
Target = Annotated[
    str,
    option(
        "Device profile, such as jetson-orin-nano, or a TOML file of one. Default: none.",
        metavar="NAME",
        autocompletion=complete_target,
    ),
]

_BACKEND = "Runtime to use{}; 'fcos-deploy doctor' lists them. Default: the one that the model is meant for."
Backend = Annotated[str, RUNTIME.option(_BACKEND.format(""), metavar="NAME", autocompletion=complete_backend)]
Backends = Annotated[
    list[str] | None, RUNTIME.option(_BACKEND.format(", repeatable"), metavar="NAME", autocompletion=complete_backend)
]
_PRECISION = "Precision of the bundle's artifact to use{}. Default: the bundle's choice."
BundlePrecision = Annotated[Precision | None, RUNTIME.option(_PRECISION.format(""))]
BundlePrecisions = Annotated[list[Precision] | None, RUNTIME.option(_PRECISION.format(", repeatable"))]
Device = Annotated[
    str,
    RUNTIME.option(
        "Device as the runtime names it, such as cpu, GPU.0 or cuda:0. Default: the runtime's choice.", metavar="NAME"
    ),
]
Compute = Annotated[
    ComputeType | None,
    RUNTIME.option("Type that the runtime computes float layers in. Default: what the bundle was tuned with, or f32."),
]
Threads = Annotated[
    int | None,
    RUNTIME.option("Threads of the runtime. Default: what the bundle was tuned with, or the runtime's choice.", min=1),
]
Server = Annotated[
    str,
    RUNTIME.option(
        "Served model in place of a local runtime, such as http://HOST:8000/v2/models/NAME. Default: none.",
        metavar="URL",
    ),
]

_MaxMapDrop = Annotated[
    float | None,
    GATE.option(
        "Largest loss of AP against the reference, such as 0.01 for one point; exit code 4 beyond it. "
        "Default: no limit.",
        metavar="AP",
    ),
]
_DROP = "Largest loss of {} at the score thresholds, mean over the classes; needs annotations. Default: no limit."
MaxPrecisionDrop = Annotated[float | None, GATE.option(_DROP.format("precision"), metavar="SHARE")]
MaxRecallDrop = Annotated[float | None, GATE.option(_DROP.format("recall"), metavar="SHARE")]
_MinAp = Annotated[float | None, GATE.option("Smallest AP; exit code 4 below it. Default: no limit.", metavar="AP")]
MinInt8MatchRate = Annotated[
    float | None,
    GATE.option(
        "Smallest share of INT8's detections that agree with the float model's. Default: 0.97 without annotations.",
        metavar="SHARE",
    ),
]
_MinMatchRate = Annotated[
    float | None,
    GATE.option(
        "Smallest share of the reference's detections that must match (0 to 1); exit code 4 below it. "
        "Default: no limit.",
        metavar="RATE",
    ),
]

JudgeBy = Annotated[
    Judge,
    GATE.option(
        "What must be within a limit: the 95 % confidence interval of the figure, or the point estimate alone, which "
        "chance may decide."
    ),
]
AllowInconclusive = Annotated[
    bool, GATE.option("Exit code 0 where the data cannot decide a limit. Default: exit code 4.")
]

_PublicKeys = Annotated[
    list[str] | None,
    TRUST.option(
        "Trusted public key, as a file or its text; repeatable. The bundle must be signed with one of them.",
        metavar="PEM",
    ),
]
_ExpectName = Annotated[
    str, TRUST.option("Name that the bundle must have; it is signed with the bundle. Default: any.", metavar="NAME")
]
_MinVersion = Annotated[
    int, TRUST.option("Lowest version that the bundle must be signed as; needs a --public-key.", min=0)
]
RequireSignature = Annotated[bool, TRUST.option("Restriction to bundles that are signed with a --public-key.")]
AllowEngineCode = Annotated[
    bool, TRUST.option("Permission for a version-compatible engine that is not signed to run the library it contains.")
]
AllowFallback = Annotated[
    bool, TRUST.option("Permission to fall back to the next backend that the bundle lists when its first does not fit.")
]

DeviceRecord = Annotated[
    Path | None,
    OUTPUT.option(
        "Device record to write, for 'fcos-deploy report --records'; signed where there is a device key.",
        metavar="FILE",
    ),
]
Json = Annotated[bool, OUTPUT.option("JSON on stdout.", "--json")]
Junit = Annotated[Path | None, OUTPUT.option("JUnit XML file of the verdicts to write.", metavar="FILE")]


def with_parameters(
    function: Callable[..., None], command: Callable[..., None], added: Sequence[inspect.Parameter], *, hidden: str = ""
) -> Callable[..., None]:
    """``function`` with the parameters of ``command`` but ``hidden``, and those ``added`` that it does not declare.

    They are in the order of their help panels.
    """
    own = inspect.signature(command, eval_str=True)
    parameters = [item for name, item in own.parameters.items() if name != hidden]
    parameters += [item for item in added if item.name not in own.parameters]
    parameters = [_named(item.replace(kind=inspect.Parameter.KEYWORD_ONLY)) for item in parameters]
    parameters.sort(key=_panel)
    functools.update_wrapper(function, command)
    # Typer reads the signature and the annotations; without ``__wrapped__`` they are not those of ``command``.
    function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # a known protocol
    function.__annotations__ = {item.name: item.annotation for item in parameters}
    del function.__wrapped__  # type: ignore[attr-defined]  # set by update_wrapper
    return function


def _named(parameter: inspect.Parameter) -> inspect.Parameter:
    """A boolean option that names no flag is one, without the ``--no-`` form that Typer adds."""
    kind, info = (*typing.get_args(parameter.annotation), None, None)[:2]
    if kind is not bool or info.default is not ...:  # which is the first flag in an annotation
        return parameter
    info = copy.copy(info)
    info.param_decls = (f"--{parameter.name.replace('_', '-')}",)
    return parameter.replace(annotation=Annotated[bool, info])


def _panel(parameter: inspect.Parameter) -> int:
    """The place of a parameter's help panel; one that another decorator hides has none."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    return _PANELS.index(metadata[0].rich_help_panel) if metadata else 0


def _gathering(
    command: Callable[..., None], options: Mapping[str, tuple[Any, Any]], *, into: str, make: Callable[..., Any]
) -> Callable[..., None]:
    """``command`` with these options, by name a type form and a default; it receives what ``make`` makes as ``into``.

    One that the command declares itself it receives as well. Any: each option's own type.
    """
    own = inspect.signature(command).parameters

    def gathered(**arguments: Any) -> None:
        value = make(**{name: arguments[name] for name in options})
        rest = {name: argument for name, argument in arguments.items() if name in own or name not in options}
        command(**rest, **{into: value})

    added = [keyword(name, kind, default) for name, (kind, default) in options.items()]
    return with_parameters(gathered, command, added, hidden=into)


def keyword(name: str, kind: Any, default: Any = None) -> inspect.Parameter:  # Any: a type form, a value of it
    """A keyword parameter of a command."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


_LOCAL_BUILDS = TRUST.option("Trust in artifacts that this user built on this device for a signed bundle.")
_KEY_OPTIONS: dict[str, tuple[Any, Any]] = {  # Any: type forms and defaults, as below
    "public_key": (_PublicKeys, None),
    "expect_name": (_ExpectName, ""),
    "min_version": (_MinVersion, 0),
}
_SIGNATURE_OPTIONS = {"require_signature": (RequireSignature, False), **_KEY_OPTIONS}
_TRUST_OPTIONS = {**_SIGNATURE_OPTIONS, "trust_local_builds": (Annotated[bool, _LOCAL_BUILDS], False)}


def with_trust_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that opens bundles every option of whom and what to trust; it receives them as ``trust``."""
    return _gathering(command, _TRUST_OPTIONS, into="trust", make=_trust)


def with_signature_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same where local builds have no say, or a say in any case."""
    return _gathering(command, _SIGNATURE_OPTIONS, into="trust", make=_trust)


def with_required_signature(command: Callable[..., None]) -> Callable[..., None]:
    """The same for a command that does nothing without a key."""
    return _gathering(command, _KEY_OPTIONS, into="trust", make=_trust)


def _trust(
    *,
    public_key: list[str] | None,
    expect_name: str,
    min_version: int,
    require_signature: bool = True,
    trust_local_builds: bool = False,
) -> Trust:
    """What these options ask of a bundle.

    Raises:
        ConfigError: a signature is required, and there is no key to check it with.
    """
    keys: tuple[str, ...] = ()
    if public_key or require_signature:
        from fcos_deploy.bundle import required_keys  # which plain files do without

        keys = tuple(str(key) for key in required_keys(tuple(public_key or ()), required=require_signature))
    return Trust(public_keys=keys, local_builds=trust_local_builds, name=expect_name, min_version=min_version)


_SERVER_OPTIONS: dict[str, Any] = {  # Any: type forms; each stands in for FCOS_DEPLOY_ and its name
    "server_token_file": SERVING.option(
        "File with the bearer token for a served model. Default: none.", metavar="FILE"
    ),
    "server_ca": SERVING.option("Authorities of a server's certificate. Default: the system's.", metavar="PEM"),
    "server_cert": SERVING.option("Client certificate for a served model. Default: none.", metavar="PEM"),
    "server_key": SERVING.option("Key of --server-cert. Default: none.", metavar="PEM"),
}


def with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that may run a served model the credentials for its server.

    They are put into the variables of the same names while it runs, so that processes that it starts have them too.
    """

    def with_server(**arguments: Any) -> None:  # Any: the command's own parameters
        given = {name: arguments.pop(name) for name in _SERVER_OPTIONS}
        variables = {f"FCOS_DEPLOY_{name.upper()}": str(path) for name, path in given.items() if path is not None}
        before = {name: os.environ[name] for name in variables if name in os.environ}
        os.environ.update(variables)
        try:
            command(**arguments)
        finally:
            for name in variables:
                del os.environ[name]
            os.environ.update(before)

    added = [keyword(name, Annotated[Path | None, info]) for name, info in _SERVER_OPTIONS.items()]
    return with_parameters(with_server, command, added)


_LIMITS: dict[str, Any] = {  # Any: type forms
    "max_map_drop": _MaxMapDrop,
    "max_precision_drop": MaxPrecisionDrop,
    "max_recall_drop": MaxRecallDrop,
    "min_ap": _MinAp,
    "min_match_rate": _MinMatchRate,
}


def with_gate_options(*limits: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these limits and what judges them; it receives them as ``gate``."""
    options = {**{name: (_LIMITS[name], None) for name in limits}, "judge": (JudgeBy, Judge.INTERVAL)}
    return functools.partial(_gathering, options=options, into="gate", make=Gate)


_SESSION_OPTIONS: dict[str, Any] = {  # Any: type forms
    "device": Device,
    "compute": Compute,
    "hint": Annotated[
        PerformanceHint | None,
        RUNTIME.option("Goal the runtime is tuned for. Default: what the bundle was tuned for, or latency."),
    ],
    "threads": Threads,
    "allow_fallback": AllowFallback,
    "allow_engine_code": AllowEngineCode,
}


def with_session_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command these options of a runtime, and those of trust; it receives them as ``session``."""
    default = SessionOptions()
    own = {name: (_SESSION_OPTIONS[name], getattr(default, name)) for name in names}

    def session(**values: Any) -> SessionOptions:  # Any: each option's own type
        trust = _trust(**{name: values.pop(name) for name in _TRUST_OPTIONS})
        return SessionOptions(**values).trusting(trust)

    return functools.partial(_gathering, options={**own, **_TRUST_OPTIONS}, into="session", make=session)


def with_all_checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of ``CheckpointOptions`` as an option; it receives them as ``options``."""
    return _with_checkpoint_options(command, option_infos())


def with_common_checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same with the common options only; ``--checkpoint-options`` takes the rest from a file."""
    return _with_checkpoint_options(command, {name: info for name, info in option_infos().items() if info.common})


def _with_checkpoint_options(command: Callable[..., None], infos: Mapping[str, OptionInfo]) -> Callable[..., None]:
    types = typing.get_type_hints(CheckpointOptions)
    options: dict[str, tuple[Any, Any]] = {}  # Any: type forms and defaults
    for name, info in infos.items():
        if name in inspect.signature(command).parameters:
            continue  # What the command declares itself keeps the command's meaning.
        flags = [info.flags] if info.flags else []
        kind = types[name]
        if info.parse is not None or kind is str:
            kind = Path | None if info.is_file else str | None
        shown = typer.Option(*flags, metavar=info.metavar or None, help=info.help, rich_help_panel=info.panel)
        options[name] = (Annotated[kind, shown], None)
    file = typer.Option(
        metavar="FILE",
        help="TOML file of checkpoint options, as 'fcos-deploy inspect --write-options' writes it; "
        "options of the command line override it.",
        rich_help_panel=CHECKPOINT,
    )
    options["checkpoint_options"] = (Annotated[Path | None, file], None)

    def checkpoint(
        *, checkpoint_options: Path | None, **texts: Any
    ) -> CheckpointOptions:  # Any: each option's own type
        return checkpoint_options_of(texts, file=checkpoint_options)

    return _gathering(command, options, into="options", make=checkpoint)


def checkpoint_options_of(texts: Mapping[str, Any], *, file: Path | None) -> CheckpointOptions:
    """What the values of these options on a command line, by their fields, say over those of an options ``file``.

    Raises:
        ConfigError: a value cannot be read, or two options contradict each other.
    """
    given = {name: parse_option(name, text) for name, text in texts.items() if text not in (None, "")}
    stated = read_checkpoint_options(file) if file else CheckpointOptions()
    return override_options(stated, given)


def session_options(
    base: SessionOptions, models: Sequence[Path], *, checkpoint: CheckpointOptions
) -> dict[Path, SessionOptions]:
    """How each model is opened where a command takes several: its checkpoints as ``checkpoint`` says.

    Where none is a checkpoint all get the options, so that opening one refuses them.
    """
    checkpoints = {model for model in models if model.exists() and is_checkpoint(model)}
    return {
        model: replace(base, checkpoint=checkpoint if model in checkpoints or not checkpoints else None)
        for model in models
    }


def detector_specs(
    sessions: Mapping[Path, SessionOptions], backends: Sequence[str] | None, precisions: Sequence[Precision] | None
) -> tuple[DetectorSpec, ...]:
    """Every model on every backend in every precision; none given: the model's own choice."""
    from fcos_deploy.detector import DetectorSpec

    chosen: Sequence[Precision | None] = precisions or [None]
    return tuple(
        DetectorSpec(model=model, backend=backend, precision=precision, options=options)
        for model, options in sessions.items()
        for backend in backends or [""]
        for precision in chosen
    )


def reference_options(session: SessionOptions) -> SessionOptions:
    """How the reference of a comparison is opened: on its runtime's own device, and a checkpoint without a signature.

    A checkpoint is read as data; everything else is executed and must be signed as the model itself.
    """
    options = SessionOptions(threads=session.threads, checkpoint=session.checkpoint, unsigned_checkpoints=True)
    return options.trusting(session.trust)
