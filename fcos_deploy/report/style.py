"""Colours and chart settings, in one place."""

from __future__ import annotations

from typing import Any

__all__ = ["CHART_SETTINGS", "FAIL", "GRID", "INK", "MOVED", "MUTED", "PARTS", "PASS", "WARN", "line_colors"]

INK, MUTED, GRID = "#1b2430", "#5b6675", "#e3e7ec"
PASS, FAIL, WARN, MOVED = "#1a7f4b", "#b3261e", "#b26a00", "#6d28d9"
# Okabe and Ito's colours, which people with any colour vision can tell apart; the reference is ink.
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")

# Errors of a layer in INT8, by what they are of; also told apart without colour by their order.
PARTS = {"classes": "#24507a", "boxes": "#8fb8de", "centerness": "#e0a458"}

CHART_SETTINGS: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "grid.color": GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "fcos-deploy",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def line_colors(labels: list[str], *, reference: str) -> dict[str, str]:
    """A colour for each label."""
    others = [label for label in labels if label != reference]
    colors = {label: _LINES[i % len(_LINES)] for i, label in enumerate(others)}
    return {reference: INK, **colors}
