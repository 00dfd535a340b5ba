"""Fills the templates and writes the files."""

from __future__ import annotations

import base64
import importlib.resources
from pathlib import Path
from typing import Any

from fcos_deploy.core.files import write_text
from fcos_deploy.core.libraries import require
from fcos_deploy.report.charts import make_charts
from fcos_deploy.report.data import ReportData
from fcos_deploy.report.panels import draw_panels

__all__ = ["render_html", "render_markdown", "write_report"]

_EXTRA = "report"


def write_report(data: ReportData, path: Path) -> tuple[Path, Path]:
    """Write ``path`` (HTML, one file that needs no other) and the same in Markdown beside it.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
        ConfigError: the folder cannot be written.
    """
    markdown = path.with_suffix(".md")
    write_text(path, render_html(data))
    write_text(markdown, render_markdown(data))
    return path, markdown


def render_html(data: ReportData) -> str:
    """The report as one HTML document."""
    charts = [
        {
            "section": c.section,
            "title": c.title,
            "text": c.text,
            "source": base64.b64encode(c.svg.encode()).decode("ascii"),
        }
        for c in make_charts(data)
    ]
    css = _template_text("report.css")
    images = draw_panels(data.images)
    return _fill("report.html.j2", data=data, charts=charts, images=images, css=css, **_score_tables(data))


def render_markdown(data: ReportData) -> str:
    """The report in Markdown, without charts and images."""
    return _fill("report.md.j2", data=data, **_score_tables(data))


def _score_tables(data: ReportData) -> dict[str, Any]:  # Any: rows for a template
    """The thresholds and the classes of all drifts, row by row: a value for each variant, None where it has none."""
    moved = [drift.moved for drift in data.drifts if drift.moved is not None]
    by_threshold = [dict(one.equivalents) for one in moved]
    by_class = [{c.name: c for c in one.classes} for one in moved]
    return {
        "thresholds": [
            {"threshold": t, "cells": [one.get(t) for one in by_threshold]}
            for t in sorted({t for one in by_threshold for t in one})
        ],
        "shifts": [
            {"name": name, "cells": [one.get(name) for one in by_class]}
            for name in dict.fromkeys(name for one in by_class for name in one)
        ],
    }


def _fill(name: str, **values: Any) -> str:  # Any: what a template is given
    jinja2 = require("jinja2", extra=_EXTRA)
    environment = jinja2.Environment(
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    text: str = environment.from_string(_template_text(name)).render(**values)
    return text


def _template_text(name: str) -> str:
    folder = importlib.resources.files("fcos_deploy.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001  (a dash in a table)


def _signed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    # Nothing lost is neither plus nor minus nothing.
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _interval(value: tuple[float, float] | None, digits: int = 3) -> str:
    return "" if value is None else f"{value[0]:.{digits}f} to {value[1]:.{digits}f}"


def _signed_interval(value: tuple[float, float] | None, digits: int = 3) -> str:
    return "" if value is None else f"{_signed(value[0], digits)} to {_signed(value[1], digits)}"


def _typeset(text: str) -> str:
    """Arrows and comparisons as signs."""
    return text.replace(" -> ", " → ").replace(" <= ", " ≤ ").replace(" >= ", " ≥ ")


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"  # noqa: RUF001


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"  # noqa: RUF001


_FILTERS = {
    "number": _number,
    "signed": _signed,
    "interval": _interval,
    "signed_interval": _signed_interval,
    "typeset": _typeset,
    "mebibytes": _mebibytes,
    "percent": _percent,
}
