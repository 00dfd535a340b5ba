"""Tables and plots of ``scaling.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

COLOURS = ("#1f5fa8", "#c8541a", "#3b8f4f", "#7a4fa3")


@dataclass(frozen=True)
class Curves:
    """Points (x, y) of each series; ``y`` starts at 0 in the plot, so that what is near-linear looks so."""

    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]

    def table(self) -> str:
        """Markdown: a row for every series, a column for every x."""
        columns = sorted({round(x, 3) for points in self.series.values() for x, _ in points})
        lines = [f"| {self.y} at {self.x} | " + " | ".join(f"{x:g}" for x in columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for name, points in self.series.items():
            at = {round(x, 3): y for x, y in points}
            lines.append(f"| {name} | " + " | ".join(f"{at[x]:.1f}" if x in at else "" for x in columns) + " |")
        return "\n".join(lines) + "\n"


def draw(curves: dict[str, Curves], path: Path) -> None:
    """All in one SVG, two in a row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-len(curves) // 2)
    with rc_context({"svg.hashsalt": "fcos-deploy", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(10, 3.4 * rows), layout="constrained")
        for index, one in enumerate(curves.values()):
            axes = figure.add_subplot(rows, 2, index + 1)
            for colour, (name, points) in zip(COLOURS, one.series.items(), strict=False):
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, color=colour, label=name)
            axes.set_xlabel(one.x)
            axes.set_ylabel(one.y)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
