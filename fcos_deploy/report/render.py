"""Fills the templates and writes the files."""

from __future__ import annotations

import base64
import importlib.resources
from pathlib import Path
from typing import Any

from fcos_deploy.core.atomic import write_text
from fcos_deploy.core.require import require
from fcos_deploy.report.charts import make_charts
from fcos_deploy.report.data import ReportData
from fcos_deploy.report.pictures import draw_pictures

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
        {"title": c.title, "text": c.text, "source": base64.b64encode(c.svg.encode()).decode("ascii")}
        for c in make_charts(data)
    ]
    css = _template_text("report.css")
    return _fill("report.html.j2", data=data, charts=charts, pictures=draw_pictures(data.pictures), css=css)


def render_markdown(data: ReportData) -> str:
    """The report in Markdown, without charts and pictures."""
    return _fill("report.md.j2", data=data)


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
    return "–" if value is None else f"{value:+.{digits}f}"  # noqa: RUF001


def _interval(value: tuple[float, float] | None, sign: str = "") -> str:
    return "" if value is None else f"{value[0]:{sign}.3f} to {value[1]:{sign}.3f}"


def _mebibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"  # noqa: RUF001


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"  # noqa: RUF001


_FILTERS = {
    "number": _number,
    "signed": _signed,
    "interval": _interval,
    "mebibytes": _mebibytes,
    "percent": _percent,
}
