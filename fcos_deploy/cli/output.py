"""What commands print: tables, notes and progress for people on stderr, JSON for machines on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fcos_deploy.core.errors import ConfigError, printable
from fcos_deploy.core.progress import ProgressFn

if TYPE_CHECKING:
    from fcos_deploy.accuracy.evaluate import Evaluation
    from fcos_deploy.accuracy.gate import Verdict

_LOG = logging.getLogger(__name__)
_PACKAGES = ("fcos_deploy", "exporters", "runtimes", "calibration")
_SHORT = 1.0  # seconds of a stage that leaves no line in a log
_MANY_STEPS = 10
_WHOLE_STAGE = 1e9  # seconds that a rate is taken over; by default 30, in which a large model takes a step or none
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


def print_json_line(value: Any) -> None:  # Any: as ``print_json``
    """One JSON document on a line of stdout, at once: for what has no end."""
    sys.stdout.write(json.dumps(value, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """A line for people, on stderr."""
    shown = printable(text, lines=True)
    Console(stderr=True, soft_wrap=True, highlight=False, quiet=_QUIET.get()).print(shown, markup=False, emoji=False)


def note_placements(descriptions: Iterable[Mapping[str, str]]) -> None:
    """What to say of INT8 graphs, by the descriptions of their sessions, that run where they were not meant to run."""
    from fcos_deploy.core.backend import get_backend

    ran = dict.fromkeys((d["backend"], d["placement"]) for d in descriptions if "placement" in d)
    for backend, placement in ran:
        if advice := get_backend(backend).placement_advice(placement):
            note(advice)


def show_accuracy(evaluations: Sequence[Evaluation]) -> None:
    """A table with a row for each model that was evaluated."""
    from fcos_deploy.accuracy.evaluate import TABLE_COLUMNS, evaluation_row

    table("Accuracy", TABLE_COLUMNS, [evaluation_row(evaluation) for evaluation in evaluations])


def conclude(
    verdicts: Sequence[Verdict], *, allow_inconclusive: bool, junit: Path | None = None, command: str = ""
) -> None:
    """A line for each verdict, and with ``junit`` a file of what ``command`` came to; then what did not pass is raised.

    Raises:
        AccuracyGateError, InconclusiveError: as ``require_all``.
    """
    from fcos_deploy.accuracy.gate import require_all, verdict_line, write_junit

    if junit is not None:
        write_junit(junit, verdicts, suite=f"fcos-deploy {command}", allow_inconclusive=allow_inconclusive)
    for verdict in verdicts:
        note(verdict_line(verdict))
    require_all(verdicts, allow_inconclusive=allow_inconclusive)


def show_error(message: str, *, hint: str, origin: str = "") -> None:
    """An error, what to do about it, and where the options come from that nobody typed, on stderr.

    Names of files in it are text, whatever they contain.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error:", "bold red"), " ", printable(message, lines=True)))
    for title, text in (("hint:", hint), ("from:", origin)):
        if text:
            console.print(Text.assemble((title, "bold"), "  ", printable(text, lines=True)))


_LONGEST_FIGURE = 24  # characters of a cell; a column with more wraps where the table is too wide


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr; columns of figures are right-aligned and never cut. Cells are text, never markup."""
    sheet = Table(title=Text(printable(title)), title_justify="left")
    for index, column in enumerate(columns):
        prose = any(len(row[index]) > _LONGEST_FIGURE for row in rows)
        sheet.add_column(column, justify="right" if index and not prose else "left", no_wrap=not prose)
    for row in rows:
        sheet.add_row(*(Text(printable(cell)) for cell in row))
    Console(stderr=True, width=None if sys.stderr.isatty() else 160, quiet=_QUIET.get()).print(sheet)


class _RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate(speed) if speed else "")


class _RemainingColumn(TimeRemainingColumn):
    """The time that remains of a stage whose steps are many, and therefore alike; a few say nothing of the next one."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total and task.total >= _MANY_STEPS else Text("")


def _rate(per_second: float) -> str:
    """``12.5/s``, or ``3.2 s each`` below one a second."""
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{1 / per_second:.1f} s each"


@dataclass
class _Stage:
    """A stage under way: its bar, when it began, and the steps that were done then."""

    bar: TaskID
    started: float
    first: int
    done: int


@contextlib.contextmanager
def progress_bar() -> Iterator[ProgressFn]:
    """A function for libraries to report to.

    A terminal shows a bar for each stage, with its rate and the time that remains. Elsewhere, as in the log of a CI
    job, a stage that takes a second or more leaves one line when it ends.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        _RemainingColumn(),
    )
    console, on_terminal = Console(stderr=True), sys.stderr.isatty()
    with Progress(
        *columns, console=console, disable=_QUIET.get() or not on_terminal, speed_estimate_period=_WHOLE_STAGE
    ) as progress:
        stages: dict[str, _Stage] = {}

        def report(label: str, done: int, total: int) -> None:
            stage = stages.get(label)
            if stage is None or done < stage.done:  # A stage that begins anew, such as a model's second evaluation.
                bar = stage.bar if stage else progress.add_task(printable(label))
                progress.reset(bar, total=total or None, completed=done)
                stage = stages[label] = _Stage(bar, time.monotonic(), done, done)
                _LOG.info("%s", label)
            stage.done = done
            progress.update(stage.bar, completed=done, total=total or None)
            if total and done >= total:
                seconds = time.monotonic() - stage.started
                _LOG.info("%s: done (%d)", label, total)
                if seconds >= _SHORT and not on_terminal:
                    steps = done - stage.first
                    rate = f", {_rate(steps / seconds)}" if steps > 1 else ""
                    note(f"{label}: {total} in {seconds:.1f} s{rate}")

        yield report
