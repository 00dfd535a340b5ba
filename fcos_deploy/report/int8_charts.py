"""Charts of a search for mixed precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from fcos_deploy.report.data import LayerRow, MixedPrecisionPart, TrialPoint
from fcos_deploy.report.figure import Chart, new_figure, svg_text
from fcos_deploy.report.style import FAIL, MUTED, PARTS, PASS

__all__ = ["mixed_precision_charts"]

_MAX_LAYERS = 24  # bars of the sensitivity chart


def mixed_precision_charts(part: MixedPrecisionPart) -> list[Chart]:
    """The trade-offs, where there was more than one candidate, and the ranking, where one was made."""
    charts = []
    if len(part.trials) > 1:
        charts.append(_trade_offs(part))
    if part.layers:
        charts.append(_sensitivity(part))
    return charts


def _trade_offs(part: MixedPrecisionPart) -> Chart:
    figure, (left, right) = new_figure(3.5, ncols=2, sharey=True)
    _draw(left, part, [(100 * t.int8_share, t) for t in part.trials], float_at=0.0)
    timed = [(t.p50_ms, t) for t in part.trials if t.p50_ms is not None]
    _draw(right, part, timed, float_at=part.float_p50_ms)
    front = sorted([(0.0, part.float_ap), *((100 * t.int8_share, t.ap) for t in part.trials if t.p50_ms is not None)])
    left.plot(*np.array(front).T, color="#9fb6cc", linewidth=1.2, zorder=1)
    left.set(xlabel="multiply-accumulates in INT8 (%)", ylabel="AP (IoU 0.50 to 0.95)", xlim=(-4, 104))
    right.set(xlabel="median latency of one image (ms)")
    right.margins(x=0.08)
    right.set_xlim(left=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    text = (
        f"Every mixture of INT8 and float layers that the search for {part.placement} measured on {part.backend}; "
        "the line joins those that no other beats in share and AP, and only these were timed."
    )
    return Chart(section=part.placement, title="AP against INT8 share and latency", text=text, svg=svg_text(figure))


def _draw(axes: Any, part: MixedPrecisionPart, points: list[tuple[Any, TrialPoint]], *, float_at: float | None) -> None:
    """The candidates at their places along one axis; Any: matplotlib has no types here, places are float."""
    axes.axhline(part.float_ap - part.max_drop, color=FAIL, linewidth=1.1, linestyle=(0, (4, 3)), label="gate")
    if float_at is not None:
        axes.plot([float_at], [part.float_ap], "D", color=MUTED, ms=6, label="all in float", zorder=4)
    axes.plot([x for x, _ in points], [t.ap for _, t in points], "o", color="#24507a", ms=5, label="candidate")
    chosen = [(x, t.ap) for x, t in points if t.chosen]
    axes.plot(*np.array(chosen).reshape(-1, 2).T, "o", ms=12, mfc="none", mec=PASS, mew=2, label="chosen")


def _sensitivity(part: MixedPrecisionPart) -> Chart:
    rows = part.layers[:_MAX_LAYERS]
    figure, axes = new_figure(0.9 + 0.21 * len(rows))
    names = [_short(row.layer) for row in rows]
    left = np.zeros(len(rows))
    for name, color in PARTS.items():
        values = np.array([100 * getattr(row, name) for row in rows])
        axes.barh(range(len(rows)), values, left=left, color=color, height=0.7, label=name)
        left += values
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlabel="error with this layer alone in INT8 (% of probability, % of box size)")
    axes.tick_params(axis="y", labelsize=8)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        _mark(label, row)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    text = (
        f"The {len(rows)} most sensitive of {len(part.layers)} layers, worst first; "
        "names in bold green are those that stay in float."
    )
    return Chart(section=part.placement, title="Sensitivity to quantization", text=text, svg=svg_text(figure))


def _mark(label: Any, row: LayerRow) -> None:  # Any: matplotlib has no types here
    if row.kept_float:
        label.set(color=PASS, fontweight="bold")


def _short(layer: str, *, limit: int = 48) -> str:
    return layer if len(layer) <= limit else "…" + layer[-limit + 1 :]
