"""Quantize a graph, and where there is an accuracy goal keep as many layers in float as it needs."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.mixed_precision import (
    DEFAULT_EVALUATIONS,
    MixedPrecision,
    PrecisionGoal,
    Trial,
    pareto_front,
    search_mixed_precision,
)
from calibration.placement import Placement
from calibration.qdq import quantize_qdq
from calibration.quantizers import QuantizeRequest, QuantizeResult, quantizer
from calibration.trade_offs import TimedTrial, TradeOffs, write_trade_offs
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.benchmark.measure import TimingOptions, time_in_turns
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import read_contract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import all_backends
from fcos_deploy.core.score_drift import ScoreDrift, score_drift
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = ["AccuracyGoal", "accuracy_goal", "quantize_model"]

# Pictures that layers are ranked on: each costs one inference per layer.
_RANKING_PICTURES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyGoal:
    """How far AP (0..1) may fall, measured on which images; without annotations the float model's detections count.

    ``evaluations``: how many mixtures may be evaluated.
    """

    max_map_drop: float
    images: Path
    annotations: Path | None = None
    backend: str = "onnxruntime"
    threads: int | None = None
    evaluations: int = DEFAULT_EVALUATIONS


def accuracy_goal(
    max_map_drop: float | None,
    *,
    images: Path | None,
    annotations: Path | None,
    placement: Placement,
    threads: int | None = None,
    evaluations: int = DEFAULT_EVALUATIONS,
) -> AccuracyGoal | None:
    """The goal that options ask for; the drop is measured on the placement's own backend where it runs here.

    Raises:
        ConfigError: a goal without images.
    """
    if max_map_drop is None:
        return None
    if images is None:
        raise ConfigError("--max-map-drop needs images to measure on.", hint="--images DIR [--annotations FILE]")
    here = [name for name in placement.backends if name in all_backends() and all_backends()[name].probe().available]
    backend = here[0] if here else "onnxruntime"
    return AccuracyGoal(
        max_map_drop=max_map_drop,
        images=images,
        annotations=annotations,
        backend=backend,
        threads=threads,
        evaluations=evaluations,
    )


def quantize_model(
    request: QuantizeRequest,
    *,
    kind: str = "qdq",
    goal: AccuracyGoal | None = None,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
) -> QuantizeResult:
    """Quantize, and where there is a goal return only what reaches it.

    ``state``: file from which an interrupted search goes on; hidden beside the output by default.

    Raises:
        AccuracyGateError: the goal cannot be reached; nothing was written, the float graph is as it was.
        CalibrationError, ConfigError: as the quantizer says.
    """
    chosen = quantizer(kind)
    if goal is None:
        return chosen.quantize(request, progress=progress)
    if not chosen.ignores_layers:
        raise ConfigError(
            f"The quantizer '{kind}' cannot search for an accuracy goal.",
            hint=f"quantize without the goal, then 'fcos-deploy evaluate {request.output} --images DIR "
            f"--max-map-drop {goal.max_map_drop}'; or --quantizer qdq",
        )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        score = _Score(request.source, goal, predictions=scratch, progress=progress)
        state = state or request.output.with_name(f".{request.output.stem}.search.json")
        return _mixed(request, goal, score=score, state=state, folder=scratch, progress=progress)


class _Score:
    """AP of a model file on the goal's images."""

    def __init__(self, source: Path, goal: AccuracyGoal, *, predictions: Path, progress: ProgressFn) -> None:
        self._goal, self._predictions, self._progress = goal, predictions, progress
        self.detections: dict[Path, Mapping[int, Detections]] = {}
        self._options = SessionOptions(threads=goal.threads)
        self._reference = DetectorSpec(model=source, backend=goal.backend, options=self._options)

    def __call__(self, model: Path) -> float:
        request = EvaluationRequest(
            candidates=(DetectorSpec(model=model, backend=self._goal.backend, options=self._options),),
            images=self._goal.images,
            annotations=self._goal.annotations,
            reference=None if self._goal.annotations else self._reference,
            resamples=0,
            predictions=self._predictions,
        )
        found = evaluate(request, progress=self._progress).candidates[0]
        ap = found.scores.ap
        if ap is None:
            raise ConfigError("No annotated object in these images, so that there is no AP.", hint="other --images")
        self.detections[model] = found.run.detections
        return ap

    @property
    def identity(self) -> str:
        """Stands for everything that scores depend on beside the model."""
        goal = self._goal
        parts = [goal.backend, *(sha256_file(path) for path in list_images(goal.images))]
        parts += [sha256_file(goal.annotations)] if goal.annotations else []
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def drift(self, source: Path, result: Path) -> ScoreDrift:
        """How far the scores of ``result`` have moved from those of ``source``; evaluates what is not yet."""
        for model in {source, result} - set(self.detections):
            self(model)
        one, other = self.detections[source], self.detections[result]
        return score_drift(
            [one[number] for number in sorted(one)],
            [other[number] for number in sorted(other)],
            class_names=read_contract(source).class_names,
        )


def _mixed(
    request: QuantizeRequest, goal: AccuracyGoal, *, score: _Score, state: Path, folder: Path, progress: ProgressFn
) -> QuantizeResult:
    pictures = [read_image(path) for path in list_images(goal.images)[:_RANKING_PICTURES]]
    found = search_mixed_precision(
        request.source,
        request.load_calibration(),
        request.output,
        policy=request.placement,
        goal=PrecisionGoal(max_drop=goal.max_map_drop, evaluations=goal.evaluations),
        evaluate=score,
        pictures=pictures,
        measured_on=score.identity,
        state=state,
        progress=progress,
    )
    drift = score.drift(request.source, found.result.path)
    report = write_trade_offs(
        _trade_offs(request, goal, found, drift=drift, folder=folder, progress=progress), request.output
    )
    record = {
        **found.result.record,
        **_scores(found.float_score, found.chosen.score),
        **_drift_record(drift),
        "int8_share": f"{found.chosen.int8_share:.4f}",
        "ignored_layers": ", ".join(found.chosen.ignored_layers),
        "report": report.name,
    }
    return QuantizeResult(files=(found.result.path, report), record=record)


def _trade_offs(
    request: QuantizeRequest,
    goal: AccuracyGoal,
    found: MixedPrecision,
    *,
    drift: ScoreDrift,
    folder: Path,
    progress: ProgressFn,
) -> TradeOffs:
    """With the speed of the candidates that are worth having, where there was a choice."""
    calibration = request.load_calibration()

    def make(trial: Trial, path: Path) -> None:
        quantize_qdq(request.source, calibration, path, policy=request.placement, ignored_layers=trial.ignored_layers)

    float_ms: float | None = None
    times: dict[Trial, float] = {}
    if len(found.trials) > 1:
        float_ms, times = _time_trials(
            request.source,
            pareto_front(found.trials),
            make=make,
            folder=folder,
            backend=goal.backend,
            options=SessionOptions(threads=goal.threads),
            image=list_images(goal.images)[0],
            progress=progress,
        )
    return TradeOffs(
        placement=request.placement.name,
        backend=goal.backend,
        max_drop=goal.max_map_drop,
        float_score=found.float_score,
        float_p50_ms=float_ms,
        ignored_layers=found.chosen.ignored_layers,
        trials=tuple(TimedTrial(trial, times.get(trial)) for trial in found.trials),
        ranking=found.ranking,
        drift=drift,
    )


def _scores(before: float, after: float) -> dict[str, str]:
    return {"ap_float": f"{before:.6f}", "ap_int8": f"{after:.6f}"}


def _drift_record(drift: ScoreDrift) -> dict[str, str]:
    shifts = {f"score_shift_{c.name}": f"{c.mean_shift:+.5f}" for c in drift.classes if c.matched}
    return {"float_score_threshold": f"{drift.float_threshold}", "score_threshold": f"{drift.threshold}", **shifts}


_TIMING = TimingOptions(rounds=6, block=4, warmup=2)


def _time_trials(
    source: Path,
    trials: Sequence[Trial],
    *,
    make: Callable[[Trial, Path], None],
    folder: Path,
    backend: str,
    options: SessionOptions,
    image: Path,
    progress: ProgressFn = no_progress,
) -> tuple[float, dict[Trial, float]]:
    """Median milliseconds of the float graph, and of each candidate as ``make`` writes it, timed in turns."""
    paths = [source]
    for index, trial in enumerate(trials):
        paths.append(folder / f"trial-{index}.onnx")
        make(trial, paths[-1])
    with contextlib.ExitStack() as stack:
        detectors = [stack.enter_context(Detector.open(p, backend=backend, options=options)) for p in paths]
        timings = time_in_turns(detectors, read_image(image), options=_TIMING, progress=progress)
    first, *others = (round(float(np.median(timing.whole)), 3) for timing in timings)
    return first, dict(zip(trials, others, strict=True))
