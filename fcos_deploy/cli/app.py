"""Collects the commands, prints their help, and turns errors into one screen and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from fcos_deploy.cli.options import OUTPUT, keyword, with_parameters
from fcos_deploy.cli.output import show_error, verbosity
from fcos_deploy.cli.settings import (
    Setting,
    option_name,
    origins,
    read_settings,
    refuse_mistyped_variables,
    settings_in_force,
    show_settings,
    typed_name,
    variable_names,
)
from fcos_deploy.core.errors import ConfigError, FcosDeployError
from fcos_deploy.core.libraries import missing_library

__all__ = ["COMMANDS", "build_app", "main"]

_LOG = logging.getLogger(__name__)

# Panels of the help; in each its commands in the order of use, with the module here that defines ``<name>_command``.
COMMANDS: dict[str, dict[str, str]] = {
    "From a checkpoint to a bundle": {
        "init": "deploy",
        "deploy": "deploy",
        "tune": "tune",
        "demo": "deploy",
        "inspect": "inspect",
        "doctor": "inspect",
    },
    "On the device": {"setup": "device", "install": "device", "rollback": "device"},
    "Single steps": {
        "export": "steps",
        "simplify": "steps",
        "calibrate": "steps",
        "quantize": "steps",
        "build": "steps",
        "package": "bundle",
    },
    "Accuracy": {
        "verify": "device",
        "evaluate": "evaluate",
        "parity": "evaluate",
        "compare": "evaluate",
        "report": "report",
    },
    "Running a model": {"predict": "predict", "benchmark": "benchmark", "soak": "benchmark"},
    "Signatures": {"sign": "bundle", "verify-signature": "bundle"},
}

_VERBOSE = typer.Option(
    "-v",
    "--verbose",
    count=True,
    show_default=False,
    help="Log of the steps on stderr; -vv logs everything, with the traceback of an error.",
    rich_help_panel=OUTPUT,
)
_QUIET = typer.Option(
    "-q", "--quiet", help="Only errors on stderr: no progress, tables or notes.", rich_help_panel=OUTPUT
)
_SHOW_CONFIG = typer.Option(
    "--show-config",
    help="List of the options in force and their sources, on stdout; the command itself does not run.",
    rich_help_panel=OUTPUT,
)
_SETTINGS = "fcos_deploy.settings"  # their key in a context

# What other tools call an option or an argument, and what it may be called here; the command decides which it is.
_INPUTS = ("MODEL", "CHECKPOINT", "BUNDLE", "SOURCE", "MODEL...")
_OTHER_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("imgsz", "img", "img-size", "image-size", "imgsize", "size", "resolution", "shape", "shapes", "input-shape"),
        ("--input-size",),
    ),
    **dict.fromkeys(
        ("conf", "conf-thres", "confidence", "score", "score-thr", "pred-score-thr", "threshold"),
        ("--score-threshold",),
    ),
    **dict.fromkeys(("iou", "iou-thres", "iou-thr", "nms", "nms-thr", "nms-threshold"), ("--iou-threshold",)),
    **dict.fromkeys(("max-det", "topk", "max-per-img"), ("--max-detections",)),
    **dict.fromkeys(("weights", "model", "checkpoint", "ckpt", "onnx", "bundle", "input", "input-model", "m"), _INPUTS),
    **dict.fromkeys(("source", "img-path", "image", "video", "i"), ("IMAGES", "--images")),
    **dict.fromkeys(("data", "ann", "ann-file", "annotation", "labels", "gt"), ("--annotations",)),
    **dict.fromkeys(("val", "val-images", "img-dir", "img-prefix", "dataset"), ("--images", "IMAGES")),
    **dict.fromkeys(
        ("calib", "calib-data", "calibration-data", "calibration-dir"), ("--calibration-images", "--images")
    ),
    **dict.fromkeys(("format", "runtime", "engine", "provider"), ("--backend",)),
    **dict.fromkeys(("half", "fp16", "int8", "dtype", "quantize", "compress-to-fp16"), ("--precision",)),
    **dict.fromkeys(("save", "show", "save-dir", "out-dir", "visualize"), ("--draw",)),
    **dict.fromkeys(
        (
            "out",
            "out-file",
            "output-file",
            "output-model",
            "output-dir",
            "work-dir",
            "saveengine",
            "project",
            "name",
            "dest",
        ),
        ("--output",),
    ),
    **dict.fromkeys(("names", "class-names", "labels-file", "nc"), ("--classes",)),
    **dict.fromkeys(("cfg", "config-file", "cfg-options"), ("--checkpoint-options",)),
    **dict.fromkeys(("batch-size", "bs"), ("--batch",)),
    **dict.fromkeys(("workers", "num-threads", "nthreads"), ("--threads",)),
    **dict.fromkeys(("save-txt", "txt"), ("--yolo",)),
    **dict.fromkeys(("niter", "iterations", "iters", "n"), ("--rounds",)),
    "d": ("--device",),
    "opset-version": ("--opset",),
    "dynamic": ("--batch",),
}
_OTHER_COMMANDS = {
    **dict.fromkeys(("detect", "infer", "inference", "run"), "predict"),
    **dict.fromkeys(("val", "validate", "eval", "test", "map"), "evaluate"),
    **dict.fromkeys(("convert", "onnx", "optimum-cli"), "export"),
    **dict.fromkeys(("bench", "perf", "speed", "time", "latency"), "benchmark"),
    **dict.fromkeys(("info", "show", "summary"), "inspect"),
    **dict.fromkeys(("check", "checks", "env", "status", "devices"), "doctor"),
    **dict.fromkeys(("compile", "engine", "trtexec", "openvino", "tensorrt", "ovc", "mo"), "build"),
    **dict.fromkeys(("ptq", "int8", "quantise"), "quantize"),
    **dict.fromkeys(("optimize", "optimise", "onnxsim"), "simplify"),
    **dict.fromkeys(("diff", "accuracy"), "compare"),
    **dict.fromkeys(("pack", "bundle", "archive"), "package"),
    **dict.fromkeys(("config", "new"), "init"),
    "version": "--version",
    "help": "--help",
}
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Click's, or Typer's copy of it


def _wide_help(self: Any, ctx: Any, formatter: Any) -> None:  # noqa: ARG001  # Any: Click's, or Typer's copy of it
    """Print help in titled panels as wide as the terminal.

    ``rich_markup_mode`` would do it too, but would also put a box around usage errors, whose lines then break in the
    middle of a path and can neither be copied nor searched.
    """
    from typer import rich_utils

    class WholeNames(rich_utils.OptionHighlighter):
        """Folds a name that is too wide for its column, which would be cut."""

        def __call__(self, text: Any) -> Any:  # Any: str or Rich's Text; Text
            shown = super().__call__(text)
            shown.overflow = "fold"
            return shown

    for name in ("highlighter", "negative_highlighter"):
        setattr(rich_utils, name, WholeNames())
    rich_utils.rich_format_help(obj=self, ctx=ctx, markup_mode="rich")


class _Command(TyperCommand):
    """Takes from variables and the project file what is not typed."""

    format_help = _wide_help

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: Typer's copy of Click's context
        """Give the context the settings as its defaults, and name the source of one that its option refuses."""
        try:
            typed, more, _ = self.make_parser(ctx).parse_args(args=list(args))
        except _UsageError as error:
            if (name := getattr(error, "option_name", "")) and (parameter := _other_option(self, name)):
                _refuse(ctx, f"No such option: {name}. Here it is {_usage(parameter)}")
            raise
        if ctx.resilient_parsing or "help" in typed:
            return super().parse_args(ctx, args)
        _refuse_assignments(self, ctx, args)
        if more:
            names = " ".join(typed_name(p) for p in self.params if p.param_type_name == "argument")
            _refuse(
                ctx, f"'{more[0]}' is too much: {self.name} takes {names or 'options only'}, an option takes one value."
            )
        try:
            own = [variable for parameter in self.params for variable in variable_names(str(self.name), parameter)]
            refuse_mistyped_variables(own, _all_variables)
            settings = read_settings(self, typed)
        except ConfigError as error:
            show_error(error.message, hint=error.hint)
            raise typer.Exit(error.exit_code) from error
        ctx.default_map = {name: setting.value for name, setting in settings.items()}
        ctx.meta[_SETTINGS] = settings
        try:
            if "show_config" in typed:
                show_settings(self, ctx, typed, settings)
                raise typer.Exit
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            name = error.param.name if error.param else None
            if name in settings and typed.get(name) is None:
                error.param_hint = f"{settings[name].option} (of {settings[name].source})"
            elif error.param is not None and not error.message:  # it is missing
                error.message = f"{_usage(error.param)}"
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run it, with the settings known to what it prints."""
        settings: dict[str, Setting] = ctx.meta.get(_SETTINGS, {})
        with settings_in_force(settings):
            return super().invoke(ctx)


def _all_variables() -> list[str]:
    group: Any = typer.main.get_command(build_app())  # Any: Typer's copy of Click's group
    return [v for name, command in group.commands.items() for p in command.params for v in variable_names(name, p)]


class _Group(TyperGroup):
    format_help = _wide_help

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # Any: as in ``_Command``
        """Say what another tool's command, or a file in place of a command, is here."""
        word = args[0].partition("=")[0]
        if self.get_command(ctx, args[0]) is None:
            if word in _OTHER_COMMANDS:
                _refuse(ctx, f"No such command '{args[0]}'. Here it is: fcos-deploy {_OTHER_COMMANDS[word]}")
            if Path(args[0]).exists():
                path = shlex.quote(args[0])
                _refuse(ctx, f"'{args[0]}' is a path, not a command. To see what it is: fcos-deploy inspect {path}")
        return super().resolve_command(ctx, args)


def _refuse(ctx: Any, message: str) -> NoReturn:
    raise _UsageError(message, ctx)


def _usage(parameter: Any) -> str:
    """``--input-size HxW: Fixed input size.``: how a parameter is typed, and the first sentence of its help."""
    name, metavar = typed_name(parameter), parameter.metavar or ""
    typed = name if name == metavar or parameter.is_flag else f"{name} {metavar}".rstrip()
    return f"{typed}: {re.split(r'(?<=[a-z0-9)])[.;] ', f'{parameter.help} ')[0].rstrip('. ')}."


def _other_option(command: Any, name: str) -> Any:
    """The command's own parameter for what other tools call ``name``; None if it has none."""
    names = _OTHER_OPTIONS.get(name.lstrip("-").replace("_", "-").lower(), ())
    return next((p for ours in names for p in command.params if ours in (*p.opts, typed_name(p))), None)


def _refuse_assignments(command: Any, ctx: Any, args: list[str]) -> None:
    """Refuse ``imgsz=640`` with the option that it is here: as an argument it would be taken for a file's name."""
    for before, word in zip(["", *args], args, strict=False):
        name, assigned, value = word.partition("=")
        if not assigned or name.startswith("-") or before.startswith("-") or Path(word).exists():
            continue
        own = next((p for p in command.params if option_name(p) == name.replace("-", "_").lower()), None)
        if (parameter := own or _other_option(command, name)) is not None:
            _refuse(ctx, f"'{word}' is not how options are typed here. Give {value!r} as {_usage(parameter)}")


def build_app(*, only: str = "") -> typer.Typer:
    """The application. ``only``: a command whose module alone is imported, to start sooner; other words do nothing."""
    app = typer.Typer(
        cls=_Group,
        help="Take a trained FCOS detector to an engine for an edge device, and prove that it still detects the same.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_group)
    known = any(only in names for names in COMMANDS.values())
    for panel, names in COMMANDS.items():
        for name, module in names.items():
            if not known or name == only:
                commands = importlib.import_module(f"fcos_deploy.cli.{module}")
                command = getattr(commands, f"{name.replace('-', '_')}_command")
                paragraphs = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(command) or "")  # as wide as the terminal
                app.command(name, cls=_Command, rich_help_panel=panel, help=paragraphs)(_guard(command))
    return app


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"fcos-deploy {importlib.metadata.version('fcos-deploy')}")
        raise typer.Exit


def _group(
    version: Annotated[  # the callback has printed it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version of fcos-deploy.")
    ] = False,
) -> None:
    """Options of the application itself."""


def _guard(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of every command, its errors on one screen, and their exit codes."""

    def guarded(  # ``show_config`` ended the command while it was parsed
        *,
        verbose: int,
        quiet: bool,
        show_config: bool,  # noqa: ARG001
        **arguments: Any,  # Any: the command's own parameters
    ) -> None:
        try:
            with verbosity(verbose=verbose, quiet=quiet), _failures_as_errors():
                command(**arguments)
        except FcosDeployError as error:
            origin = origins(f"{error.message} {error.hint}", of_options=isinstance(error, ConfigError))
            show_error(error.message, hint=error.hint, origin=origin)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("[bold red]interrupted[/]")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            _silence_stdout()
            raise typer.Exit(0) from None

    added = [
        keyword("verbose", Annotated[int, _VERBOSE], 0),
        keyword("quiet", Annotated[bool, _QUIET], False),
        keyword("show_config", Annotated[bool, _SHOW_CONFIG], False),
    ]
    return with_parameters(guarded, command, added)


@contextlib.contextmanager
def _failures_as_errors() -> Iterator[None]:
    """A disk, device or permission that fails in the middle is an error with a hint; what led to it is logged.

    Raises:
        FcosDeployError: the command's own, or such a failure.
    """
    try:
        yield
    except (FcosDeployError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        _LOG.debug("%s", error, exc_info=True)
        if isinstance(error, FcosDeployError):
            raise
        _silence_stdout()
        where = f"'{error.filename}': " if error.filename else ""
        no_folder = "temporary directory" in str(error.strerror)  # as tempfile says it
        hint = (
            "set TMPDIR to a folder that can be written"
            if no_folder
            else "check the free space, the permissions and the device"
        )
        raise FcosDeployError(f"{where}{error.strerror or error}.", hint=hint) from error
    except MemoryError as error:
        _LOG.debug("%s", error, exc_info=True)
        raise FcosDeployError(
            "There is not enough memory.", hint="end other programs, or take a smaller input, batch or model"
        ) from error
    except ModuleNotFoundError as error:
        missing = missing_library(error)
        if missing is None:
            raise
        raise missing from error


def _open_standard_streams() -> None:
    """Give the null device to a standard stream that is closed: the next file would take its number and its output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (to the end)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  (to the end)


def _silence_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes an output that nobody reads any more."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())


def _terminate(number: int, _: object) -> None:
    """Leave as after an error, so that temporary folders are removed, which the signal's own action would not do."""
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of ``fcos-deploy``."""
    _open_standard_streams()
    for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, _terminate)
    build_app(only=next(iter(sys.argv[1:]), ""))()
    sys.exit(0)
