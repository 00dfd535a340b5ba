"""What commands print: tables, notes and progress for people on stderr, JSON for machines on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn
from fcos_deploy.core.text import printable

__all__ = ["command_line", "note", "print_json", "progress_bar", "show_error", "table", "verbosity"]

_LOG = logging.getLogger(__name__)
_PACKAGES = ("fcos_deploy", "exporters", "runtimes", "calibration")
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


class _Stderr(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment, so that lines and progress bars don't overwrite each other."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.levelname.lower()}: {printable(self.format(record), lines=True)}\n")


@contextlib.contextmanager
def verbosity(*, verbose: int, quiet: bool) -> Iterator[None]:
    """What is printed on stderr within: a line for every step (1), all that is logged (2), or only errors.

    Raises:
        ConfigError: both are asked for.
    """
    if verbose and quiet:
        raise ConfigError("--verbose and --quiet contradict each other.", hint="give one of them")
    level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    before = [logger.level for logger in loggers]
    handler = _Stderr()
    token = _QUIET.set(quiet)
    for logger in loggers:
        logger.setLevel(level)
        logger.addHandler(handler)
    try:
        yield
    finally:
        _QUIET.reset(token)
        for logger, earlier in zip(loggers, before, strict=True):
            logger.setLevel(earlier)
            logger.removeHandler(handler)


def print_json(value: Any) -> None:  # Any: a JSON value has no narrower type
    """One JSON document on stdout; what JSON lacks becomes its text, but NaN is an error."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()  # here, where a full disk or a closed pipe is an error with a sentence


def note(text: str) -> None:
    """A line for people, on stderr."""
    shown = printable(text, lines=True)
    Console(stderr=True, soft_wrap=True, highlight=False, quiet=_QUIET.get()).print(shown, markup=False, emoji=False)


def show_error(message: str, *, hint: str) -> None:
    """An error and what to do about it, on stderr; names of files in it are text, whatever they contain."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error:", "bold red"), " ", printable(message, lines=True)))
    if hint:
        console.print(Text.assemble(("hint:", "bold"), "  ", printable(hint, lines=True)))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr; the first column is left-aligned, the others right-aligned. Cells are text, never markup."""
    sheet = Table(title=Text(printable(title)), title_justify="left")
    for index, column in enumerate(columns):
        sheet.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        sheet.add_row(*(Text(printable(cell)) for cell in row))
    Console(stderr=True, width=None if sys.stderr.isatty() else 160, quiet=_QUIET.get()).print(sheet)


@contextlib.contextmanager
def progress_bar() -> Iterator[ProgressFn]:
    """A function for libraries to report to: bars on a terminal, a logged line when each step begins and ends."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=_QUIET.get() or not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(printable(label), total=total or None)
                _LOG.info("%s", label)
            progress.update(tasks[label], completed=done, total=total or None)
            if total and done >= total:
                _LOG.info("%s: done (%d)", label, total)

        yield report


def command_line() -> str:
    """The command as the user typed it, for reports and manifests."""
    return shlex.join(["fcos-deploy", *sys.argv[1:]])
