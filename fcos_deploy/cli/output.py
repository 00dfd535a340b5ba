"""What commands print: tables and progress for people on stderr, JSON for machines on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from fcos_deploy.core.progress import ProgressFn

__all__ = ["note", "print_json", "progress_bar", "table"]


def print_json(value: Any) -> None:  # Any: a JSON value has no narrower type
    """One JSON document on stdout; NaN, which JSON lacks, is an error."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line for people, on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr; the first column is left-aligned, the others right-aligned."""
    sheet = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        sheet.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        sheet.add_row(*row)
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(sheet)


@contextlib.contextmanager
def progress_bar() -> Iterator[ProgressFn]:
    """A function for libraries to report to, drawn as bars on a terminal and silent elsewhere."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        tasks: dict[str, Any] = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total or None)
            progress.update(tasks[label], completed=done, total=total or None)

        yield report
