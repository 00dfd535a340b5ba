"""Collects the commands, prints their help, and turns errors into one screen and an exit code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from fcos_deploy.cli.options import OUTPUT, keyword, with_parameters
from fcos_deploy.cli.output import show_error, verbosity
from fcos_deploy.cli.settings import (
    Setting,
    origins,
    read_settings,
    refuse_mistyped_variables,
    settings_in_force,
    show_settings,
    variable_names,
)
from fcos_deploy.core.errors import ConfigError, FcosDeployError

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
    help="Logged steps on stderr; -vv for everything that is logged, with the traceback of an error.",
    rich_help_panel=OUTPUT,
)
_QUIET = typer.Option(
    "-q", "--quiet", help="Only errors on stderr: no progress, tables or notes.", rich_help_panel=OUTPUT
)
_SHOW_CONFIG = typer.Option(
    "--show-config",
    help="Every option in force and where it comes from, on stdout, in place of running the command.",
    rich_help_panel=OUTPUT,
)
_SETTINGS = "fcos_deploy.settings"  # their key in a context


def _wide_help(self: Any, ctx: Any, formatter: Any) -> None:  # noqa: ARG001  # Any: Click's, or Typer's copy of it
    """Print help in titled panels as wide as the terminal.

    ``rich_markup_mode`` would do it too, but would also put a box around usage errors, whose lines then break in the
    middle of a path and can neither be copied nor searched.
    """
    from typer.rich_utils import rich_format_help

    rich_format_help(obj=self, ctx=ctx, markup_mode="rich")


class _Command(TyperCommand):
    """Takes from variables and the project file what is not typed."""

    format_help = _wide_help

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # Any: Typer's copy of Click's context
        """Give the context the settings as its defaults, and name the source of one that its option refuses."""
        typed: dict[str, Any] = self.make_parser(ctx).parse_args(args=list(args))[0]
        if ctx.resilient_parsing or "help" in typed:
            return super().parse_args(ctx, args)
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
                app.command(name, cls=_Command, rich_help_panel=panel)(_guard(command))
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
        raise FcosDeployError(f"{error}.", hint="check the free space, the permissions and the device") from error


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
