"""Charts as SVG text; every axis is labelled with its unit."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcos_deploy.core.require import require
from fcos_deploy.report.data import ReportData
from fcos_deploy.report.style import CHART_SETTINGS, INK, MUTED, PASS, line_colors

__all__ = ["Chart", "make_charts"]

_EXTRA = "report"
_WIDTH = 7.6  # inches, of a chart over the whole width
_MAX_CLASSES = 6  # panels of precision-recall curves
_MAX_LAYERS = 24  # bars of the sensitivity chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``svg`` is a document of its own; ``text`` says in words what it shows."""

    title: str
    text: str
    svg: str


def make_charts(data: ReportData) -> list[Chart]:
    """Every chart for which there is data.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra=_EXTRA)
    makers: tuple[Callable[[ReportData], Chart | None], ...] = (
        _accuracy_against_latency,
        _stages,
        _latency_histogram,
        _precision_recall,
        _score_drift,
        _sensitivity,
        _pareto,
    )
    with matplotlib.rc_context(CHART_SETTINGS):
        return [chart for make in makers if (chart := make(data)) is not None]


def _reference(data: ReportData) -> str:
    return next((row.label for row in data.variants if row.reference), "")


def _colors(data: ReportData) -> dict[str, str]:
    return line_colors([row.label for row in data.variants], reference=_reference(data))


def _figure(height: float, **layout: Any) -> Any:  # Any: matplotlib has no types here
    figure = require("matplotlib.figure", extra=_EXTRA).Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(**layout)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _accuracy_against_latency(data: ReportData) -> Chart | None:
    rows = [row for row in data.variants if row.ap is not None and row.p50_ms is not None]
    if len(rows) < 2:
        return None
    figure, axes = _figure(3.4)
    colors = _colors(data)
    for row in rows:
        ap = row.ap or 0.0
        low, high = row.ap_interval or (ap, ap)
        spread = [[ap - low], [high - ap]]
        axes.errorbar(
            [row.p50_ms], [ap], yerr=spread, fmt="o", ms=7, capsize=3, color=colors[row.label], label=row.label
        )
    axes.set(xlabel="median latency of one image (ms)", ylabel="AP (IoU 0.50 to 0.95)")
    axes.set_xlim(left=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    text = "Up and to the left is better. Bars: 95 % bootstrap interval of each AP; differences are surer than these."
    return Chart(title="Accuracy against latency", text=text, svg=_svg(figure))


def _stages(data: ReportData) -> Chart | None:
    if not data.latencies:
        return None
    figure, axes = _figure(0.9 + 0.38 * len(data.latencies))
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
    return Chart(title="Where the time goes", text="Medians of each stage, one image after another.", svg=_svg(figure))


def _latency_histogram(data: ReportData) -> Chart | None:
    rows = [row for row in data.latencies if len(row.samples_ms) > 1]
    if not rows:
        return None
    figure, panels = _figure(0.7 + 0.62 * len(rows), nrows=len(rows), squeeze=False, sharex=True)
    colors = _colors(data)
    every = np.concatenate([row.samples_ms for row in rows])
    # The last hundredth of the times would squeeze the rest into a corner; it is in the table as p99.
    bins = np.linspace(0, float(np.percentile(every, 99)), 80)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        axes.hist(row.samples_ms, bins=bins, color=colors.get(row.variant, MUTED))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(row.variant, rotation=0, ha="right", va="center")
    panels[-1, 0].set_xlabel("latency of one image (ms)")
    text = (
        "How often each latency occurred (height: share of the samples of that row), up to the 99th percentile of all."
    )
    return Chart(title="Latency distribution", text=text, svg=_svg(figure))


def _precision_recall(data: ReportData) -> Chart | None:
    names = list(dict.fromkeys(curve.class_name for curve in data.curves if len(curve.precision) == 101))
    if not names:
        return None
    shown = names[:_MAX_CLASSES]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = _figure(0.5 + 2.5 * rows, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True)
    colors = _colors(data)
    recall = np.linspace(0, 1, 101)
    for axes, name in zip(panels.flat, shown, strict=False):
        for curve in data.curves:
            if curve.class_name == name:
                axes.plot(recall, curve.precision, color=colors.get(curve.variant, MUTED), label=curve.variant)
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1.03))
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("recall (share of the objects found)", fontsize=10)
    figure.supylabel("precision (share of detections right)", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(3, len(labels)))
    more = f" The first {len(shown)} of {len(names)} classes." if len(names) > len(shown) else ""
    return Chart(title="Precision and recall", text=f"At IoU 0.5, COCO's interpolation.{more}", svg=_svg(figure))


def _score_drift(data: ReportData) -> Chart | None:
    drifts = [drift for drift in data.drifts if drift.pairs]
    if not drifts:
        return None
    columns = min(3, len(drifts))
    rows = -(-len(drifts) // columns)
    figure, panels = _figure(0.5 + 2.5 * rows, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True)
    for axes, drift in zip(panels.flat, drifts, strict=False):
        mine, theirs = np.array(drift.pairs).T
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
        axes.scatter(mine, theirs, s=6, alpha=0.35, linewidths=0, color=_colors(data).get(drift.variant, INK))
        moved = float(np.mean(theirs - mine))
        axes.set(title=drift.variant, xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.text(0.04, 0.93, f"mean drift {moved:+.4f}", va="top", fontsize=8.5)
    for axes in panels.flat[len(drifts) :]:
        axes.set_visible(False)
    figure.supxlabel("score given by the reference", fontsize=10)
    figure.supylabel("score given by the variant", fontsize=10)
    text = "One point for each detection that both have. Points off the diagonal mean that a threshold tuned on the "
    return Chart(title="Score drift", text=text + "reference no longer fits.", svg=_svg(figure))


def _sensitivity(data: ReportData) -> Chart | None:
    if not data.sensitivity:
        return None
    rows = sorted(data.sensitivity, key=lambda row: row.sqnr_db)[:_MAX_LAYERS]
    figure, axes = _figure(0.8 + 0.21 * len(rows))
    colors = [PASS if row.kept_float else "#24507a" for row in rows]
    axes.barh([_short(row.layer) for row in rows], [row.sqnr_db for row in rows], color=colors, height=0.7)
    axes.invert_yaxis()
    axes.set(xlabel="signal to quantization noise with this layer alone in INT8 (dB)")
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", visible=False)
    text = f"The {len(rows)} most sensitive of {len(data.sensitivity)} layers; green ones were kept in float."
    return Chart(title="Sensitivity to quantization", text=text, svg=_svg(figure))


def _pareto(data: ReportData) -> Chart | None:
    if len(data.pareto) < 2:
        return None
    figure, axes = _figure(3.2)
    points: Sequence[Any] = sorted(data.pareto, key=lambda point: point.p50_ms)
    axes.plot([p.p50_ms for p in points], [p.ap for p in points], "o", color="#24507a", ms=5)
    for point in points:
        if point.chosen:
            axes.plot(
                [point.p50_ms], [point.ap], "o", ms=11, mfc="none", mec=PASS, mew=2, label=f"chosen: {point.label}"
            )
    axes.set(xlabel="median latency of one image (ms)", ylabel="AP (IoU 0.50 to 0.95)")
    axes.legend(loc="best")
    text = "Every mixture of INT8 and float layers that the search measured."
    return Chart(title="Accuracy and latency of mixed precision", text=text, svg=_svg(figure))


def _short(layer: str, *, limit: int = 44) -> str:
    return layer if len(layer) <= limit else "…" + layer[-limit + 1 :]
