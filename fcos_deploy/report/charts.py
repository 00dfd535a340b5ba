"""Colours and chart settings, in one place."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcos_deploy.core.libraries import require
from fcos_deploy.report.data import LayerRow, MixedPrecisionPart, ReportData, TrialPoint, VariantRow

__all__ = [
    "CHART_SETTINGS",
    "EXTRA",
    "FAIL",
    "GRID",
    "INK",
    "MOVED",
    "MUTED",
    "PARTS",
    "PASS",
    "WARN",
    "Chart",
    "line_colors",
    "make_charts",
    "mixed_precision_charts",
    "new_figure",
    "svg_text",
]

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
    if row.ignored:
        label.set(color=PASS, fontweight="bold")


def _short(layer: str, *, limit: int = 48) -> str:
    return layer if len(layer) <= limit else "…" + layer[-limit + 1 :]


_CURVES = (
    "Precision: share of the detections that are right. Recall: share of the objects that are found. At IoU 0.5, "
    "COCO's interpolation."
)
_MAX_CLASSES = 6  # panels of precision-recall curves


def make_charts(data: ReportData) -> list[Chart]:
    """Every chart for which there is data.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra=EXTRA)
    makers: tuple[Callable[[ReportData], Chart | None], ...] = (
        _accuracy_against_latency,
        _stages,
        _latency_histogram,
        _precision_recall,
        _score_drift,
    )
    with matplotlib.rc_context(CHART_SETTINGS):
        charts = [chart for make in makers if (chart := make(data)) is not None]
        return charts + [chart for part in data.mixed for chart in mixed_precision_charts(part)]


def _reference(data: ReportData) -> str:
    return next((row.label for row in data.variants if row.reference), "")


def _colors(data: ReportData) -> dict[str, str]:
    return line_colors([row.label for row in data.variants], reference=_reference(data))


def _accuracy_against_latency(data: ReportData) -> Chart | None:
    rows = [row for row in data.variants if row.ap is not None and row.p50_ms is not None]
    if len(rows) < 2:
        return None
    figure, axes = new_figure(3.2)
    colors, reference = _colors(data), next((row.ap for row in rows if row.reference), None)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for row in rows:
        ap = row.ap or 0.0
        low, high = _ap_range(row, reference)
        spread = [[max(0.0, ap - low)], [max(0.0, high - ap)]]
        style = {"fmt": "o", "ms": 7, "capsize": 3, "color": colors[row.label]}
        axes.errorbar([row.p50_ms], [ap], yerr=spread, label=row.label, **style)
    axes.set(xlabel="median latency of one image (ms)", ylabel="AP (IoU 0.50 to 0.95)")
    axes.set_xlim(left=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    text = (
        "Up and to the left is better. Bars: where 95 % of the resampled differences from the reference lie; "
        "the dashed line is the reference."
    )
    return Chart(section="speed", title="Accuracy against latency", text=text, svg=svg_text(figure))


def _ap_range(row: VariantRow, reference: float | None) -> tuple[float, float]:
    """Of a variant's AP, given the reference's: the paired interval, which leaves out what is hard about the images."""
    ap = row.ap or 0.0
    if reference is None:
        return row.ap_interval or (ap, ap)
    low, high = row.drop_interval or (0.0, 0.0)
    return (reference - high, reference - low) if row.drop_interval else (ap, ap)


def _stages(data: ReportData) -> Chart | None:
    if not data.latencies:
        return None
    figure, axes = new_figure(0.9 + 0.38 * len(data.latencies))
    labels = [row.variant for row in data.latencies]
    left = np.zeros(len(labels))
    parts = (("preprocess", "#8fb8de"), ("infer", "#24507a"), ("decode", "#e0a458"))
    for name, color in parts:
        values = np.array([getattr(row, f"{name}_ms") for row in data.latencies])
        axes.barh(labels, values, left=left, color=color, label={"infer": "network"}.get(name, name), height=0.62)
        left += values
    for index, total in enumerate(left):
        axes.text(total, index, f"  {total:.1f}", va="center", color=INK)
    axes.set(xlabel="median time of one image (ms)")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", ncols=3, bbox_to_anchor=(1.0, 1.0))
    return Chart(
        section="speed",
        title="Where the time goes",
        text="Medians of each stage, one image after another.",
        svg=svg_text(figure),
    )


def _latency_histogram(data: ReportData) -> Chart | None:
    rows = [row for row in data.latencies if len(row.samples_ms) > 1]
    if not rows:
        return None
    figure, panels = new_figure(0.7 + 0.62 * len(rows), nrows=len(rows), squeeze=False, sharex=True)
    colors = _colors(data)
    every = np.concatenate([row.samples_ms for row in rows])
    # The last hundredth of the times would squeeze the rest into a corner; it is in the table as p99.
    bins = np.linspace(0, float(np.percentile(every, 99)), 80)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        axes.hist(row.samples_ms, bins=bins, color=colors.get(row.variant, MUTED))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(row.variant, rotation=0, ha="right", va="center")
    panels[-1, 0].set_xlim(left=0)
    panels[-1, 0].set_xlabel("latency of one image (ms)")
    text = (
        "How often each latency occurred (height: share of the samples of that row), up to the 99th percentile of all."
    )
    return Chart(section="speed", title="Latency distribution", text=text, svg=svg_text(figure))


def _precision_recall(data: ReportData) -> Chart | None:
    names = list(dict.fromkeys(curve.class_name for curve in data.curves if len(curve.precision) == 101))
    if not names:
        return None
    shown = names[:_MAX_CLASSES]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = new_figure(0.5 + 2.5 * rows, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True)
    colors = _colors(data)
    recall = np.linspace(0, 1, 101)
    for axes, name in zip(panels.flat, shown, strict=False):
        for curve in data.curves:
            if curve.class_name == name:
                axes.plot(recall, curve.precision, color=colors.get(curve.variant, MUTED), label=curve.variant)
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1.03))
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(labels)))
    more = f" The first {len(shown)} of {len(names)} classes." if len(names) > len(shown) else ""
    return Chart(section="accuracy", title="Precision and recall", text=f"{_CURVES}{more}", svg=svg_text(figure))


def _score_drift(data: ReportData) -> Chart | None:
    drifts = [drift for drift in data.drifts if drift.pairs]
    if not drifts:
        return None
    columns = min(4, len(drifts))
    rows = -(-len(drifts) // columns)
    figure, panels = new_figure(
        0.5 + (8.2 / columns if columns > 2 else 3.2) * rows,
        nrows=rows,
        ncols=columns,
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axes, drift in zip(panels.flat, drifts, strict=False):
        mine, theirs = np.array(drift.pairs).T
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
        axes.scatter(mine, theirs, s=9, alpha=0.4, linewidths=0, zorder=3, color=_colors(data).get(drift.variant, INK))
        moved = round(float(np.mean(theirs - mine)), 4) + 0.0  # no minus before nothing
        axes.set(title=drift.variant, xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.text(0.04, 0.93, f"mean shift {moved:+.4f}", va="top", fontsize=8.5)
    for axes in panels.flat[len(drifts) :]:
        axes.set_visible(False)
    figure.supxlabel("score by the reference", fontsize=10)
    figure.supylabel("score by the variant", fontsize=10)
    text = "One point for each detection that both have. Points off the diagonal mean that a threshold tuned on the "
    return Chart(section="scores", title="Score drift", text=text + "reference no longer fits.", svg=svg_text(figure))
