"""Collects the commands, and turns errors into one screen and an exit code."""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

import fcos_deploy.cli
from fcos_deploy.core.errors import FcosDeployError

__all__ = ["build_app", "main"]

_LOG = logging.getLogger(__name__)


def build_app(*, only: str = "") -> typer.Typer:
    """A Typer application with one command for every module here that defines ``command``.

    ``only`` is a command whose module alone is imported, to start sooner; any other word leaves all.
    """
    app = typer.Typer(
        help="Takes a trained FCOS detector to an engine on an edge device, and proves that it is still the same.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_group)
    for name in _modules(only):
        command = getattr(importlib.import_module(f"fcos_deploy.cli.{name}"), "command", None)
        if command is not None:
            app.command(name.replace("_", "-"))(_guard(command))
    return app


def _modules(only: str) -> list[str]:
    names = sorted(module.name for module in pkgutil.iter_modules(fcos_deploy.cli.__path__))
    wanted = only.replace("-", "_")
    return [wanted] if wanted in names else names


def _group() -> None:
    """Keeps Typer from making a single command the whole application."""


def _guard(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:  # Any: the wrapped command's own parameters
        try:
            command(*args, **kwargs)
        except FcosDeployError as error:
            _show(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("[bold red]interrupted[/]")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except OSError as error:  # A disk, a device or a permission that went away in the middle.
            _LOG.debug("%s", error, exc_info=True)
            _show(FcosDeployError(f"{error}.", hint="check the free space, the permissions and the device"))
            raise typer.Exit(1) from None

    return guarded


def _show(error: FcosDeployError) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint:
        console.print(f"[bold]hint:[/]  {escape(error.hint)}")


def main() -> None:
    """Entry point of ``fcos-deploy``."""
    build_app(only=next(iter(sys.argv[1:]), ""))()
    sys.exit(0)
