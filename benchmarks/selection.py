"""How often the search for mixed precision accepts a graph that loses more than its goal, by how trials are judged.

    python benchmarks/selection.py

A simulation with the search's own strategy (``calibration.mixed_precision.narrow``) and a goal of 0.005. Each of 24
layers costs every image an AP that scatters between images, so that 40 images know a drop to +-0.01, as for the demo
detector. Half of the models lose nothing in INT8, the others up to six times the goal. ``point`` takes a trial whose
measured drop keeps the goal. ``interval`` returns layers to float only when harm is shown, and widens the interval of
the graph that it chose for the number of graphs that it chose from.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from calibration.mixed_precision import acceptable, narrow
from fcos_deploy.accuracy.coco import selection_factor
from fcos_deploy.core.gate import Judge, Outcome, interval_outcome

_LAYERS, _GOAL, _TRIALS = 24, 0.005, 16
_SPREAD = 0.0051 * 40**0.5  # of one image's drop; its standard error on 40 images is 0.0051
_IMAGES = (40, 100, 500, 5000)


@dataclass
class _Search:
    """measured: (layers,) mean drop that each costs on the images. error: standard error of one layer's mean."""

    measured: NDArray[np.float64]
    error: float
    judge: Judge

    def __post_init__(self) -> None:
        self.tried: dict[tuple[str, ...], tuple[float, float, float]] = {}

    def loss(self, ignored: Sequence[str]) -> tuple[float, float, float]:
        """The drop of the graph that leaves these layers in float, and its 95 % interval."""
        key = tuple(sorted(ignored))
        if key not in self.tried:
            left = np.setdiff1d(np.arange(_LAYERS), np.array([int(name) for name in key], np.int64))
            value, half = float(self.measured[left].sum()), 1.96 * self.error * len(left) ** 0.5
            self.tried[key] = value, value - half, value + half
        return self.tried[key]

    def accepts(self, ignored: Sequence[str]) -> bool:
        value, low, high = self.loss(ignored)
        return acceptable(value, (low, high), at_most=_GOAL, judge=self.judge)

    def may_try(self) -> bool:
        return len(self.tried) < _TRIALS

    def best(self) -> tuple[str, ...] | None:
        return min((key for key in self.tried if self.accepts(key)), key=len, default=None)


@dataclass(frozen=True)
class Shares:
    """Each of some cases, True where it holds: the columns of the table."""

    passed: Sequence[bool]
    beyond: Sequence[bool]  # of the graphs that passed: true drop larger than the goal
    mixed_beyond: Sequence[bool]  # the same of those with layers in float
    inconclusive: Sequence[bool]
    needless: Sequence[bool]  # of the harmless models: layers in float


def simulate(images: int, *, judge: Judge, runs: int, seed: int = 0) -> Shares:
    """Search ``runs`` models whose true drop is known."""
    generator = np.random.default_rng(seed)
    rows = []
    for run in range(runs):
        harmless = run % 2 == 0
        true = np.abs(generator.normal(size=_LAYERS)) ** 3  # a few layers cost most
        true *= 0.0 if harmless else generator.uniform(0, 6) * _GOAL / true.sum()
        error = _SPREAD / (images * _LAYERS) ** 0.5
        search = _Search(true + generator.normal(size=_LAYERS) * error, error, judge)
        if not search.accepts(()):
            order = [str(layer) for layer in np.argsort(-true)]
            narrow(order, accepts=search.accepts, may_try=search.may_try, best=search.best)
        chosen = search.best()
        value, low, high = search.loss(chosen or ())
        factor = selection_factor(len(search.tried))
        outcome = interval_outcome(value - factor * (value - low), value + factor * (high - value), at_most=_GOAL)
        if judge is Judge.POINT or chosen is None:
            outcome = Outcome.FAILED if chosen is None else Outcome.PASSED
        left = np.setdiff1d(np.arange(_LAYERS), np.array([int(name) for name in chosen or ()], np.int64))
        rows.append((outcome, true[left].sum() > _GOAL, bool(chosen), harmless))
    passed = [row for row in rows if row[0] is Outcome.PASSED]
    return Shares(
        passed=[row[0] is Outcome.PASSED for row in rows],
        beyond=[row[1] for row in passed],
        mixed_beyond=[row[1] for row in passed if row[2]],
        inconclusive=[row[0] is Outcome.INCONCLUSIVE for row in rows],
        needless=[row[2] for row in rows if row[3]],
    )


def in_words(cases: Sequence[bool]) -> str:
    """In percent; of fewer than ten cases how many there are."""
    return f"{100 * sum(cases) / len(cases):.1f} %" if len(cases) >= 10 else f"{sum(cases)} of {len(cases)}"


def main() -> None:
    """Print the table of docs/int8.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    options = parser.parse_args()
    print(
        "| images | judged by | passed | of these beyond the goal | of those with layers in float beyond it "
        "| inconclusive | harmless models with layers in float |"
    )
    print("|---|---|---|---|---|---|---|")
    for images in _IMAGES:
        for judge in Judge:
            shares = simulate(images, judge=judge, runs=options.runs)
            columns = " | ".join(in_words(getattr(shares, column.name)) for column in fields(shares))
            print(f"| {images} | {judge} | {columns} |")


if __name__ == "__main__":
    main()
