"""The page about a search for a configuration: the table, and the plot of AP against latency with its front."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fcos_deploy.core.enums import ComputeType, Precision, StrEnum
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.report.figures import BLUE, CHART_SETTINGS, GREEN, MUTED, RED, arms, new_figure, svg_of
from fcos_deploy.report.render import write_pages

__all__ = [
    "TUNING_COLUMNS",
    "PointStatus",
    "TunedPoint",
    "TuningData",
    "front_of",
    "tuning_chart",
    "tuning_rows",
    "write_tuning_report",
]

matplotlib = lazy_import("matplotlib", extra="report")

TUNING_COLUMNS = ("size", "runtime", "p50 ms", "p90 ms", "images/s", "AP", "95% interval", "images", "status")

_MARKS: dict[Precision, tuple[str, str]] = {  # with floats in float32, and in another format
    Precision.FP32: ("o", "^"),
    Precision.FP16: ("D", "v"),
    Precision.INT8: ("s", "P"),
}


class PointStatus(StrEnum):
    """What became of a configuration."""

    CHOSEN = "chosen"
    NEXT = "next best"
    FRONT = "front"
    MEASURED = "measured"
    PRUNED = "pruned"


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPoint:
    """A configuration, with what is known of it: None was not measured.

    Times in milliseconds of one image; ``cost_ms`` is the one that a limit holds: of a percentile or, where throughput
    was measured, between two images. ``ap_low`` to ``ap_high``: the 95 % interval over ``images``. ``reason``: why it
    was pruned, or what its artifact's AP was not measured for.
    """

    size: str
    runtime: str
    backend: str
    precision: Precision
    compute: ComputeType
    threads: int
    streams: int
    batch: int
    status: PointStatus
    reason: str = ""
    p50_ms: float | None = None
    p90_ms: float | None = None
    cost_ms: float | None = None
    images_per_second: float | None = None
    ap: float | None = None
    ap_low: float | None = None
    ap_high: float | None = None
    images: int = 0

    @property
    def label(self) -> str:
        """Size and runtime."""
        return f"{self.size} {self.runtime}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningData:
    """A finished search. ``goal``: what was asked for, as a sentence; ``answer``: what came of it.

    ``max_ms`` and ``min_ap`` are the limits that the plot shows. ``facts``: the machine, the data and the versions.
    """

    title: str
    goal: str
    answer: str
    points: tuple[TunedPoint, ...]
    max_ms: float | None = None
    min_ap: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def throughput(self) -> bool:
        """Whether images a second were measured, not the latency of one."""
        return any(point.images_per_second is not None for point in self.points)


def front_of(points: tuple[TunedPoint, ...]) -> tuple[TunedPoint, ...]:
    """Those with an AP over the most images that no other one beats in both AP and time, the fastest first."""
    all_images = max((point.images for point in points), default=0)
    known = [p for p in points if p.ap is not None and p.cost_ms is not None and p.images == all_images]
    front: list[TunedPoint] = []
    for point in sorted(known, key=lambda p: (p.cost_ms, -(p.ap or 0.0))):
        if not front or (point.ap or 0.0) > (front[-1].ap or 0.0):
            front.append(point)
    return tuple(front)


def tuning_rows(data: TuningData) -> tuple[list[str], list[tuple[str, ...]]]:
    """Names of the columns, and the rows: first what was measured, then what was not, in groups of one reason."""
    measured = [point for point in data.points if point.p50_ms is not None]
    groups: dict[tuple[str, str], list[TunedPoint]] = {}
    for point in data.points:
        if point.p50_ms is None:
            groups.setdefault((point.runtime, point.reason), []).append(point)
    rows = [(point.size, *_cells(point)) for point in sorted(measured, key=lambda p: (p.ap is None, -(p.ap or 0.0)))]
    for group in groups.values():
        first, last = group[0], group[-1]
        rows.append((first.size if first is last else f"{first.size} to {last.size}", *_cells(first)))
    shown = [i for i, column in enumerate(TUNING_COLUMNS) if column != "images/s" or data.throughput]
    return [TUNING_COLUMNS[i] for i in shown], [tuple(row[i] for i in shown) for row in rows]


def _cells(point: TunedPoint) -> tuple[str, ...]:
    """As ``TUNING_COLUMNS`` names them from the second on."""
    return (
        point.runtime,
        *("-" if v is None else f"{v:.1f}" for v in (point.p50_ms, point.p90_ms, point.images_per_second)),
        "-" if point.ap is None else f"{point.ap:.3f}",
        "-" if point.ap_low is None or point.ap_high is None else f"{point.ap_low:.3f}-{point.ap_high:.3f}",
        str(point.images or "-"),
        f"{point.status}: {point.reason}" if point.reason else str(point.status),
    )


def tuning_chart(data: TuningData) -> str:
    """AP against time as an SVG document.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with matplotlib.rc_context(CHART_SETTINGS):
        figure, axes = new_figure(4.4)
        limit = {"color": RED, "linewidth": 1.1, "linestyle": (0, (4, 3))}
        if data.max_ms is not None:
            axes.axvline(data.max_ms, label="longest time", **limit)
        if data.min_ap is not None:
            axes.axhline(data.min_ap, label="lowest AP", **limit)
        _draw_points(axes, data)
        if times := [p.cost_ms for p in data.points if p.ap is None and p.cost_ms is not None]:
            place = {"transform": axes.get_xaxis_transform(), "clip_on": False}  # at the bottom
            axes.plot(times, [0.02] * len(times), "|", color=MUTED, ms=9, label="pruned by its time", **place)
        latency = "latency of one image (ms): median, line to the 90th percentile"
        if any(p.cost_ms not in (None, p.p50_ms) and p.cost_ms == p.p90_ms for p in data.points):
            latency = "latency of one image (ms): 90th percentile"
        xlabel = "time between two images at full load (ms)" if data.throughput else latency
        axes.set(xlabel=xlabel, ylabel="AP (IoU 0.50 to 0.95)")
        axes.set_xlim(left=0)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg_of(figure)


def _draw_points(axes: Any, data: TuningData) -> None:  # Any: matplotlib has no types here
    """The configurations with an AP: filled where it is over all images, with the front through them."""
    front = front_of(data.points)
    axes.plot([p.cost_ms for p in front], [p.ap for p in front], color="#9fb6cc", linewidth=1.2, label="front")
    all_images = max((point.images for point in data.points), default=0)
    named: set[str] = set()
    for point in data.points:
        if point.ap is None or point.cost_ms is None:
            continue
        complete = point.images == all_images
        color = BLUE if complete else MUTED
        kind = str(point.precision) if point.compute is ComputeType.F32 else f"{point.precision} {point.compute}"
        name = kind if complete else f"{kind}, left early"
        cost, slow = point.cost_ms, None if point.cost_ms != point.p50_ms else point.p90_ms
        axes.errorbar(
            [cost],
            [point.ap],
            yerr=arms(point.ap, point.ap_low, point.ap_high),
            xerr=arms(cost, None, slow),
            fmt=_MARKS[point.precision][point.compute is not ComputeType.F32],
            ms=6,
            mfc=color if complete else "white",
            color=color,
            elinewidth=0.9,
            label=None if name in named else name,
        )
        named.add(name)
        if point.status is PointStatus.CHOSEN:
            axes.plot([cost], [point.ap], "o", ms=14, mfc="none", mec=GREEN, mew=2, label="chosen")
        if complete:
            axes.annotate(point.size, (cost, point.ap), xytext=(6, -11), textcoords="offset points", size=7.5)


def write_tuning_report(data: TuningData, path: Path) -> tuple[Path, Path]:
    """Write ``path`` (HTML, one file that needs no other) and the same in Markdown beside it, without the plot.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
        ConfigError: the folder cannot be written.
    """
    columns, rows = tuning_rows(data)
    chart = base64.b64encode(tuning_chart(data).encode()).decode("ascii")
    values = {"data": data, "columns": columns, "rows": rows, "facts": sorted(data.facts.items())}
    return write_pages("tuning", path, values, chart=chart)
