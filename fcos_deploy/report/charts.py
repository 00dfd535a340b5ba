"""Charts as SVG text; every axis is labelled with its unit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fcos_deploy.core.require import require
from fcos_deploy.report.data import ReportData, VariantRow
from fcos_deploy.report.figure import EXTRA, Chart, new_figure, svg_text
from fcos_deploy.report.int8_charts import mixed_precision_charts
from fcos_deploy.report.style import CHART_SETTINGS, INK, MUTED, line_colors

__all__ = ["make_charts"]

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
