"""NNCF's accuracy control behind our contract: what NNCF only logs when it misses is an error here.

NNCF quantizes everything, ranks groups of quantizers by what they cost, and reverts one group after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.data import CalibrationSet
from calibration.engines import Run, compiled_run
from calibration.executed import int8_convolutions
from calibration.graph import ConvSite
from calibration.nncf_quantizer import NncfOptions, QuantizedIr, prepare_nncf, quiet_nncf, write_ir
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.require import require

__all__ = ["NncfGoal", "NncfTrial", "ScoreRun", "nncf_table", "quantize_nncf_to_goal"]

# Score (0..1, higher is better) of a function from feeds to outputs, on the evaluation images with these positions.
ScoreRun = Callable[[Run, Sequence[int]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfGoal:
    """``max_drop``: how far the score (0..1) may fall. ``images``: how many ``score`` knows.

    ``ranking_images``: of these, how many rank the groups: each costs one inference a group. ``iterations``: groups
    that may be reverted, each costs an evaluation on all images.
    """

    max_drop: float
    images: int
    score: ScoreRun
    ranking_images: int = 8
    iterations: int = 16

    def __post_init__(self) -> None:
        if self.max_drop < 0:
            raise ConfigError(f"The allowed drop must not be negative, got {self.max_drop}.")
        if min(self.images, self.ranking_images, self.iterations) < 1:
            raise ConfigError("images, ranking_images and iterations must be at least 1.")


@dataclass(frozen=True, slots=True)
class NncfTrial:
    """A candidate that was evaluated on all images; the first is the float model."""

    int8_convolutions: int
    score: float


def nncf_table(trials: Sequence[NncfTrial]) -> str:
    """The trials in their order, for people."""
    return "\n".join([" INT8  score", *(f"{t.int8_convolutions:5d}  {t.score:.4f}" for t in trials)])


def quantize_nncf_to_goal(
    source: Path,
    images: CalibrationSet,
    output: Path,
    *,
    goal: NncfGoal,
    options: NncfOptions | None = None,
    progress: ProgressFn = no_progress,
) -> tuple[QuantizedIr, tuple[NncfTrial, ...]]:
    """``quantize_nncf`` with as many groups of quantizers reverted as the goal needs, and all that was tried.

    Raises:
        AccuracyGateError: NNCF did not reach the goal; the message holds its trials, nothing was written.
        CalibrationError, MissingDependencyError: as ``quantize_nncf``.
    """
    prepared = prepare_nncf(source, images, output, options=options or NncfOptions(), progress=progress)
    nncf = require("nncf", extra="nncf")
    watch = _Watch(goal, prepared.convolutions, progress=progress)
    restorer = nncf.AdvancedAccuracyRestorerParameters(
        max_num_iterations=goal.iterations,
        ranking_subset_size=min(goal.ranking_images, goal.images),
        num_ranking_workers=1,  # Each worker would hold a compiled model and use all threads.
    )
    with watch.errors(), quiet_nncf():
        model = nncf.quantize_with_accuracy_control(
            prepared.model,
            validation_dataset=nncf.Dataset(list(range(goal.images))),
            validation_fn=watch,
            max_drop=goal.max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=prepared.advanced,
            advanced_accuracy_restorer_parameters=restorer,
            **prepared.arguments,
        )
    watch.check(source)
    return write_ir(prepared, model), tuple(watch.trials)


class _Watch:
    """NNCF's validation function: scores compiled models and remembers those that saw all images."""

    def __init__(self, goal: NncfGoal, convolutions: Sequence[ConvSite], *, progress: ProgressFn) -> None:
        self._goal, self._convolutions, self._progress = goal, convolutions, progress
        self._error: Exception | None = None
        self.trials: list[NncfTrial] = []

    def __call__(self, compiled: Any, positions: Iterable[int]) -> tuple[float, None]:
        chosen = list(positions)
        try:
            score = self._goal.score(compiled_run(compiled), chosen)
        except Exception as error:  # NNCF takes an exception for another kind of validation function and goes on.
            self._error = self._error or error
            raise
        if len(chosen) == self._goal.images:
            self.trials.append(NncfTrial(len(int8_convolutions(compiled, self._convolutions)), score))
            self._progress("evaluating candidates", len(self.trials), self._goal.iterations + 2)
        return score, None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What the scoring raised leaves NNCF as what it was."""
        try:
            yield
        except Exception as error:
            if self._error is not None and self._error is not error:
                raise self._error from error
            raise

    def check(self, source: Path) -> None:
        """Raise AccuracyGateError unless the last candidate, which NNCF returned, holds the goal."""
        if self._error is not None:
            raise self._error
        before, last = self.trials[0].score, self.trials[-1]
        # NNCF also reverts everything, and calls that success.
        if before - last.score <= self._goal.max_drop + 1e-6 and last.int8_convolutions:
            return
        raise AccuracyGateError(
            f"NNCF misses the goal: float {before:.4f}, allowed drop {self._goal.max_drop:.4f}, of "
            f"{len(self._convolutions)} convolutions in INT8:\n{nncf_table(self.trials)}",
            hint=f"--quantizer qdq, a larger drop, or the float model '{source}'",
        )
