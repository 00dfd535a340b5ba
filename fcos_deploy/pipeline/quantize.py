"""Quantize a graph, and where there is an accuracy goal leave as many layers in float as it needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from calibration.mixed_precision import (
    DEFAULT_EVALUATIONS,
    AccuracyGoal,
    MixedPrecision,
    ScoreLoss,
    TradeOffs,
    Trial,
    pareto_front,
    search_mixed_precision,
    write_trade_offs,
)
from calibration.placement import Placement
from calibration.qdq import quantize_qdq
from calibration.quantizers import QuantizeRequest, QuantizeResult, get_quantizer
from fcos_deploy.accuracy.evaluate import OPERATING_SCORE, Evaluation, EvaluationRequest, evaluate
from fcos_deploy.accuracy.intervals import paired_ap_drop
from fcos_deploy.benchmark.measure import TimingOptions, time_in_turns
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.image import list_images
from fcos_deploy.core.matching import MatchOptions, ScoreDrift, compare_detections, score_drift
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import all_backends
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = ["accuracy_goal", "quantize_model"]

_RESAMPLES = 1000
_TIMING = TimingOptions(rounds=6, block=4, warmup=2)


def accuracy_goal(
    gate: Gate,
    *,
    images: Path | None,
    annotations: Path | None,
    placement: Placement,
    threads: int | None = None,
    evaluations: int = DEFAULT_EVALUATIONS,
) -> AccuracyGoal | None:
    """The goal that a gate's limits ask for; it is measured on the placement's own backend where that runs here.

    Raises:
        ConfigError: a goal without images, or a limit on AP without annotations.
    """
    if gate.max_map_drop is None and gate.min_match_rate is None:
        return None
    if images is None:
        raise ConfigError("An accuracy goal needs images to measure on.", hint="--images DIR [--annotations FILE]")
    here = [name for name in placement.backends if name in all_backends() and all_backends()[name].probe().available]
    backend = here[0] if here else "onnxruntime"
    return AccuracyGoal(
        max_map_drop=gate.max_map_drop,
        min_match_rate=gate.min_match_rate,
        judge=gate.judge,
        images=images,
        annotations=annotations,
        backend=backend,
        threads=threads,
        evaluations=evaluations,
    )


def quantize_model(
    request: QuantizeRequest,
    *,
    quantizer: str = "qdq",
    goal: AccuracyGoal | None = None,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
) -> QuantizeResult:
    """Quantize, and where there is a goal return only what reaches it.

    ``state``: file from which an interrupted search resumes; hidden beside the output by default.

    Raises:
        AccuracyGateError: the goal cannot be reached; nothing was written, the float graph is as it was.
        CalibrationError, ConfigError: as the quantizer says.
    """
    chosen = get_quantizer(quantizer)
    if goal is None:
        return chosen.quantize(request, progress=progress)
    if not chosen.ignores_layers:
        raise ConfigError(
            f"The quantizer '{quantizer}' cannot search for an accuracy goal.",
            hint=f"quantize without it, then 'fcos-deploy evaluate {request.output} --images DIR "
            f"--reference {request.graph.source.path}' with the same limit; or --quantizer qdq",
        )
    with tempfile.TemporaryDirectory() as folder:
        return _quantize_to_goal(request, goal, state=state, folder=Path(folder), progress=progress)


def _quantize_to_goal(
    request: QuantizeRequest, goal: AccuracyGoal, *, state: Path | None, folder: Path, progress: ProgressFn
) -> QuantizeResult:
    """Search, compare the scores of the result with the float model's, and write the trade-offs beside it."""
    source = request.graph.source
    score = _Score(source.path, goal, predictions=folder, progress=progress)
    search = search_mixed_precision(
        request.graph,
        request.ranges,
        request.output,
        placement=request.placement,
        goal=goal,
        evaluate=score,
        state=state or request.output.with_name(f".{request.output.stem}.search.json"),
        progress=progress,
    )
    before, after = score.detections(source.path), score.detections(search.result.path)
    drift = score_drift(
        [before[image] for image in sorted(before)],
        [after[image] for image in sorted(after)],
        class_names=source.contract.class_names,
    )
    report = write_trade_offs(
        _trade_offs(request, goal, search, drift=drift, folder=folder, progress=progress), request.output
    )
    record = {
        **search.result.record,
        "score": goal.quantity,
        "score_float": f"{search.float_score:.6f}",
        "score_int8": f"{search.chosen.score:.6f}",
        # How many graphs this one was chosen from, for which its interval has to be widened.
        "choices": str(len(search.trials)),
        "float_score_threshold": f"{drift.float_threshold}",
        "score_threshold": f"{drift.threshold}",
        **{f"score_shift_{c.name}": f"{c.mean_shift:+.5f}" for c in drift.classes if c.matched},
        "int8_share": f"{search.chosen.int8_share:.4f}",
        "ignored_layers": ", ".join(search.chosen.ignored_layers),
        "report": report.name,
    }
    return QuantizeResult(files=(search.result.path, report), record=record)


def _trade_offs(
    request: QuantizeRequest,
    goal: AccuracyGoal,
    search: MixedPrecision,
    *,
    drift: ScoreDrift,
    folder: Path,
    progress: ProgressFn,
) -> TradeOffs:
    """The record of a search, with the speed of the trials on the Pareto front."""
    # Where everything in INT8 reached the goal at once there is no choice to show.
    speed = _time_trials(request, goal, search, folder=folder, progress=progress) if len(search.trials) > 1 else {}
    return TradeOffs(
        placement=request.placement.name,
        backend=goal.backend,
        quantity=goal.quantity,
        max_loss=goal.max_loss,
        float_score=search.float_score,
        float_p50_ms=speed.get(None),
        ignored_layers=search.chosen.ignored_layers,
        trials=tuple(replace(trial, p50_ms=speed.get(trial)) for trial in search.trials),
        ranking=search.ranking,
        drift=drift,
    )


class _Score:
    """Scores a model file on the goal's images, and compares it with the float graph; its detections are kept."""

    def __init__(self, source: Path, goal: AccuracyGoal, *, predictions: Path, progress: ProgressFn) -> None:
        self._source, self._goal, self._predictions, self._progress = source, goal, predictions, progress
        self._evaluations: dict[Path, Evaluation] = {}
        self._options = SessionOptions(threads=goal.threads)

    def __call__(self, model: Path) -> ScoreLoss:
        self._evaluations.pop(model, None)  # A candidate's file takes the name of the one before.
        evaluation, reference = self._evaluation(model), self._evaluation(self._source)
        if self._goal.annotations is None:
            return self._agreement(evaluation, reference)
        if evaluation.scores.ap is None or evaluation.samples is None or reference.samples is None:
            raise ConfigError("No annotated object in these images, so that there is no AP.", hint="other --images")
        drop = paired_ap_drop(reference.samples, evaluation.samples)
        return ScoreLoss(score=evaluation.scores.ap, interval=(drop.low, drop.high))

    def _agreement(self, evaluation: Evaluation, reference: Evaluation) -> ScoreLoss:
        options = MatchOptions(min_score=OPERATING_SCORE)
        agreement = compare_detections(reference.run.detections, evaluation.run.detections, options=options)
        low, high = agreement.match_interval
        if evaluation is reference:
            low = high = 1.0
        return ScoreLoss(score=agreement.match_rate, interval=(1.0 - high, 1.0 - low))

    def _evaluation(self, model: Path) -> Evaluation:
        """A model that a resumed search had evaluated is evaluated again."""
        if model not in self._evaluations:
            spec = DetectorSpec(model=model, backend=self._goal.backend, options=self._options)
            request = EvaluationRequest(
                candidates=(spec,),
                images=self._goal.images,
                annotations=self._goal.annotations,
                reference=None if self._goal.annotations else replace(spec, model=self._source),
                resamples=_RESAMPLES if self._goal.annotations else 0,
                predictions=self._predictions,
            )
            self._evaluations[model] = evaluate(request, progress=self._progress).candidates[0]
        return self._evaluations[model]

    def detections(self, model: Path) -> Mapping[int, Detections]:
        """By image number."""
        return self._evaluation(model).run.detections


def _time_trials(
    request: QuantizeRequest, goal: AccuracyGoal, search: MixedPrecision, *, folder: Path, progress: ProgressFn
) -> dict[Trial | None, float]:
    """Median milliseconds of the float graph (key None) and of the trials on the Pareto front, timed in turns."""
    paths: dict[Trial | None, Path] = {None: request.graph.source.path}
    for index, trial in enumerate(pareto_front(search.trials)):
        paths[trial] = folder / f"trial-{index}.onnx"
        quantize_qdq(
            request.graph,
            request.ranges,
            paths[trial],
            placement=request.placement,
            ignored_layers=trial.ignored_layers,
        )
    options = SessionOptions(threads=goal.threads)
    with contextlib.ExitStack() as stack:
        detectors = [
            stack.enter_context(Detector.open(p, backend=goal.backend, options=options)) for p in paths.values()
        ]
        image = detectors[0].read(list_images(goal.images)[0])
        timings = time_in_turns(detectors, image, options=_TIMING, progress=progress)
    return {trial: round(float(np.median(timing.whole)), 3) for trial, timing in zip(paths, timings, strict=True)}
