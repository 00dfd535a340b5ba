"""Quantize a graph, and where there is an accuracy goal leave as many layers in float as it needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from fcos_deploy.accuracy.coco import paired_ap_drop
from fcos_deploy.accuracy.evaluate import (
    OPERATING_SCORE,
    Evaluation,
    EvaluationRequest,
    Evaluations,
    at_operating_point,
    evaluate,
    evidence_problem,
    judge_evaluation,
    judge_operating_point,
    widened_evaluation,
)
from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.accuracy.operating_point import OperatingGoal
from fcos_deploy.benchmark.measure import TimingOptions, time_in_turns
from fcos_deploy.core.artifact import files_of
from fcos_deploy.core.backend import SessionOptions, all_backends
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import (
    Gate,
    MatchOptions,
    Outcome,
    ScoreDrift,
    compare_detections,
    score_drift,
    undecided_because,
)
from fcos_deploy.core.image import list_images
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = ["Quantized", "Scored", "accuracy_goal", "quantize_model"]

# Evaluations on the images of one goal, by backend and hash of the model file.
Scored = dict[tuple[str, str], Evaluations]

_RESAMPLES = 1000
_TIMING = TimingOptions(rounds=6, block=4, warmup=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What the quantizer made, and the verdicts on it where there is a goal."""

    result: QuantizeResult
    verdicts: tuple[Verdict, ...] = ()


def accuracy_goal(
    gate: Gate,
    *,
    images: Path | None,
    annotations: Path | None,
    placement: Placement,
    threads: int | None = None,
    evaluations: int = DEFAULT_EVALUATIONS,
    sample: int | None = None,
) -> AccuracyGoal | None:
    """The goal that a gate's limits ask for; it is measured on the placement's own backend where that runs here.

    Raises:
        ConfigError: a goal without images, or a limit on AP without annotations.
    """
    limits = {"max_precision_drop": gate.max_precision_drop, "max_recall_drop": gate.max_recall_drop}
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
        sample=sample,
        further_limits={name: limit for name, limit in limits.items() if limit is not None},
    )


def quantize_model(
    request: QuantizeRequest,
    *,
    quantizer: str = "qdq",
    goal: AccuracyGoal | None = None,
    state: Path | None = None,
    predictions: Path | None = None,
    scored: Scored | None = None,
    float_model: Path | None = None,
    operating_goal: OperatingGoal | None = None,
    runnable: Callable[[Path], Path] | None = None,
    progress: ProgressFn = no_progress,
) -> Quantized:
    """Quantize, and where there is a goal return only what reaches it, or what the images cannot decide.

    ``state``: file from which an interrupted search resumes; hidden beside the output by default. ``predictions``:
    folder in which detections are kept by content. ``scored``: what was evaluated before on the goal's images, to which
    this search adds. ``float_model``: what the goal's backend runs of the float graph; the graph itself by default.
    ``operating_goal``: what score thresholds are chosen for, at which precision and recall are limited. ``runnable``:
    gives what the goal's backend runs of an INT8 graph; the graph itself by default.

    Raises:
        AccuracyGateError: the goal cannot be reached; nothing was written, the float graph is as it was.
        CalibrationError, ConfigError: as the quantizer says.
    """
    chosen = get_quantizer(quantizer)
    if goal is None:
        return Quantized(result=chosen.quantize(request, progress=progress))
    if not chosen.ignores_layers:
        raise ConfigError(
            f"The quantizer '{quantizer}' cannot search for an accuracy goal.",
            hint=f"quantize without it, then 'fcos-deploy evaluate {request.output} --images DIR "
            f"--reference {request.graph.source.path}' with the same limit; or --quantizer qdq",
        )
    with tempfile.TemporaryDirectory() as folder:
        score = _Score(
            request.graph.source.path,
            goal,
            float_model=float_model or request.graph.source.path,
            predictions=predictions or Path(folder),
            scored={} if scored is None else scored,
            operating_goal=operating_goal,
            runnable=runnable,
            progress=progress,
        )
        if score.problem:
            # What cannot be judged says nothing against INT8, and is no reason to move layers to float.
            result, choices = chosen.quantize(request, progress=progress), 1
        else:
            result, choices = _search(request, goal, score, state=state, folder=Path(folder), progress=progress)
        return Quantized(result=result, verdicts=score.verdicts(result.files[0], choices=choices))


def _search(
    request: QuantizeRequest,
    goal: AccuracyGoal,
    score: _Score,
    *,
    state: Path | None,
    folder: Path,
    progress: ProgressFn,
) -> tuple[QuantizeResult, int]:
    """Search, compare the scores of the result with the float model's, and write the trade-offs beside it.

    Returns the result and from how many graphs it was chosen.
    """
    source = request.graph.source
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
    return QuantizeResult(files=(search.result.path, report), record=record), len(search.trials)


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

    def __init__(
        self,
        source: Path,
        goal: AccuracyGoal,
        *,
        float_model: Path,
        predictions: Path,
        scored: Scored,
        operating_goal: OperatingGoal | None,
        runnable: Callable[[Path], Path] | None,
        progress: ProgressFn,
    ) -> None:
        self._float_model, self._operating_goal, self._runnable = float_model, operating_goal, runnable
        self._source, self._goal, self._predictions, self._progress = source, goal, predictions, progress
        self._scored = scored
        self._options = SessionOptions(threads=goal.threads)

    @property
    def problem(self) -> str:
        """Why these images cannot decide the goal, as half a sentence; empty when they can."""
        reference = self._evaluated(self._source)
        return (
            undecided_because(reference.dataset.findings)
            or evidence_problem(reference.dataset, judge=self._goal.judge)
            or reference.candidates[0].contradiction
        )

    def __call__(self, model: Path) -> ScoreLoss:
        compared = self._compared(model)
        if compared.drop is not None and compared.scores.ap is not None:
            reference = self._evaluated(self._source)
            further = judge_operating_point(self._gate, compared, reference.candidates[0], reference.dataset)
            return ScoreLoss(
                score=compared.scores.ap,
                interval=(compared.drop.low, compared.drop.high),
                refused=any(verdict.outcome is Outcome.FAILED for verdict in further),
            )
        if compared.agreement is None:  # Excluded: what is compared has one.
            raise ConfigError("There is nothing to compare with.")
        low, high = compared.agreement.match_interval
        return ScoreLoss(score=compared.agreement.match_rate, interval=(1.0 - high, 1.0 - low))

    def verdicts(self, model: Path, *, choices: int) -> tuple[Verdict, ...]:
        """On a model that was chosen among so many."""
        reference = self._evaluated(self._source)
        return judge_evaluation(
            self._gate,
            widened_evaluation(self._compared(model), choices),
            dataset=reference.dataset,
            reference=reference.candidates[0],
        )

    @property
    def _gate(self) -> Gate:
        goal = self._goal
        return Gate(
            max_map_drop=goal.max_map_drop,
            min_match_rate=goal.min_match_rate,
            judge=goal.judge,
            **goal.further_limits,
        )

    def _compared(self, model: Path) -> Evaluation:
        """With what it lost against the float graph: AP, or without annotations detections."""
        evaluation, reference = self._evaluated(model).candidates[0], self._evaluated(self._source).candidates[0]
        options = MatchOptions() if self._goal.annotations else MatchOptions(min_score=OPERATING_SCORE)
        agreement = compare_detections(reference.run.detections, evaluation.run.detections, options=options)
        drop = None
        if evaluation.samples is not None and reference.samples is not None:
            drop = paired_ap_drop(reference.samples, evaluation.samples)
        return at_operating_point(
            replace(evaluation, agreement=agreement, drop=drop),
            reference,
            goal=self._operating_goal,
            resamples=_RESAMPLES,
        )

    def _evaluated(self, model: Path) -> Evaluations:
        """A model that a resumed search had evaluated is evaluated again."""
        float_graph = model == self._source
        model = self._float_model if float_graph else model
        key = (self._goal.backend, " ".join(map(sha256_file, files_of(model))))
        if key not in self._scored:
            if self._runnable is not None and not float_graph:
                model = self._runnable(model)
            spec = DetectorSpec(model=model, backend=self._goal.backend, options=self._options)
            request = EvaluationRequest(
                candidates=(spec,),
                images=self._goal.images,
                annotations=self._goal.annotations,
                reference=None if self._goal.annotations else replace(spec, model=self._float_model),
                resamples=_RESAMPLES if self._goal.annotations else 0,
                sample=self._goal.sample,
                operating_goal=self._operating_goal,
                predictions=self._predictions,
            )
            self._scored[key] = evaluate(request, progress=self._progress)
        return self._scored[key]

    def detections(self, model: Path) -> Mapping[int, Detections]:
        """By image number."""
        return self._evaluated(model).candidates[0].run.detections


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
