"""A figure of the report: made with matplotlib, kept as SVG text."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from fcos_deploy.core.require import require

__all__ = ["EXTRA", "Chart", "new_figure", "svg_text"]

EXTRA = "report"
_WIDTH = 8.6  # inches, of a chart over the whole width


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``svg`` is a document of its own; ``text`` says in words what it shows; ``section``: where it belongs."""

    section: str
    title: str
    text: str
    svg: str


def new_figure(height: float, **layout: Any) -> Any:  # Any: matplotlib has no types here
    """A figure of ``height`` inches, and its axes as ``layout`` says."""
    figure = require("matplotlib.figure", extra=EXTRA).Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(**layout)


def svg_text(figure: Any) -> str:  # Any: as above
    """The figure as an SVG document, the same for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
