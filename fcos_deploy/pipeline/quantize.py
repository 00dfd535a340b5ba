"""Quantize a graph, and where there is an accuracy goal leave as many layers in float as it needs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from calibration.quantizers import QuantizeRequest, QuantizeResult, get_quantizer, quantize_qdq
from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.accuracy.evaluate import (
    OPERATING_SCORE,
    Evaluation,
    EvaluationRequest,
    Evaluations,
    compared_with,
    evaluate,
    evidence_problem,
    judge_evaluation,
    judge_operating_point,
    shared_with_calibration,
    widened_evaluation,
)
from fcos_deploy.accuracy.gate import Verdict
from fcos_deploy.accuracy.operating_point import OperatingGoal
from fcos_deploy.accuracy.predictions import DetectionRuns
from fcos_deploy.benchmark.measure import TimingOptions, time_in_turns
from fcos_deploy.core.artifact import files_of, read_contract
from fcos_deploy.core.backend import SessionOptions, all_backends
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Gate, MatchOptions, Outcome, undecided_because
from fcos_deploy.core.image import list_images
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import DetectorSpec

__all__ = ["Quantized", "Scoring", "accuracy_goal", "quantize_model"]

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


@dataclass(kw_only=True, slots=True)
class Scoring:
    """Scores INT8 graphs on the images of ``goal``, and compares them with the float graph.

    ``operating_goal``: what score thresholds are chosen for, at which precision and recall are limited.
    ``float_model``: what is evaluated for the float graph; None: the graph itself, on the goal's backend.
    ``runnable``: gives what the goal's backend runs of an INT8 graph. ``predictions``: folder in which detections are
    kept by content. ``calibrated_on``: SHA-256 of the pixels that the ranges are from. ``runs`` and ``evaluations``:
    what was measured before on these images, to which this adds.
    ``annotated``: what the goal's annotations and images hold, where they have been read.
    """

    goal: AccuracyGoal
    operating_goal: OperatingGoal | None = None
    float_model: DetectorSpec | None = None
    runnable: Callable[[Path], Path] = Path
    predictions: Path | None = None
    calibrated_on: frozenset[str] = frozenset()
    runs: DetectionRuns = field(default_factory=DetectionRuns)
    evaluations: dict[tuple[str, str], Evaluations] = field(default_factory=dict)
    annotated: Dataset | None = None
    progress: ProgressFn = no_progress
    _compared: dict[tuple[str, str], Evaluation] = field(default_factory=dict, init=False)
    _float: Evaluations | None = field(default=None, init=False)

    def spec(self, model: Path) -> DetectorSpec:
        """A model on the goal's backend."""
        return DetectorSpec(model=model, backend=self.goal.backend, options=SessionOptions(threads=self.goal.threads))

    @property
    def reference(self) -> Evaluation:
        """That of the float graph."""
        return self._float_evaluations.candidates[0]

    @property
    def dataset(self) -> Dataset:
        """The images, with what is to be detected in them."""
        return self._float_evaluations.dataset

    @property
    def problem(self) -> str:
        """Why these images cannot decide the goal, as half a sentence; empty when they can."""
        return (
            undecided_because(self.dataset.findings)
            or evidence_problem(self.dataset, judge=self.goal.judge)
            or self.reference.contradiction
        )

    def loss(self, graph: Path) -> ScoreLoss:
        """Of an INT8 graph."""
        compared = self.compared(graph)
        if self.goal.annotations and compared.drop is not None and compared.scores.ap is not None:
            further = judge_operating_point(self._gate, compared, self.reference, self.dataset)
            return ScoreLoss(
                score=compared.scores.ap,
                interval=(compared.drop.low, compared.drop.high),
                refused=any(verdict.outcome is Outcome.FAILED for verdict in further),
            )
        if compared.agreement is None:  # Excluded: what is compared has one.
            raise ConfigError("There is nothing to compare with.")
        low, high = compared.agreement.match_interval
        return ScoreLoss(score=compared.agreement.match_rate, interval=(1.0 - high, 1.0 - low))

    @property
    def float_score(self) -> float:
        """On the scale of ``loss``: without annotations the share of its own detections that it keeps."""
        ap = self.reference.scores.ap
        return 1.0 if self.goal.annotations is None or ap is None else ap

    def verdicts(self, graph: Path, *, choices: int) -> tuple[Verdict, ...]:
        """On an INT8 graph that was chosen among so many."""
        evaluation = widened_evaluation(self.compared(graph), choices)
        problem = self.problem or shared_with_calibration(
            self.dataset.images,
            self.calibrated_on,
            orientation=read_contract(graph).preprocess.orientation,
            of="this graph",
        )
        return judge_evaluation(self._gate, evaluation, dataset=self.dataset, reference=self.reference, problem=problem)

    def compared(self, graph: Path) -> Evaluation:
        """An INT8 graph with what it lost against the float one: AP, or without annotations detections."""
        spec = self.spec(graph)
        key = self._key(spec)
        if key not in self._compared:
            self._compared[key] = compared_with(
                self.reference,
                self._evaluated(spec, key).candidates[0],
                dataset=self.dataset,
                options=MatchOptions() if self.goal.annotations else MatchOptions(min_score=OPERATING_SCORE),
                goal=self.operating_goal,
                resamples=_RESAMPLES,
            )
        return self._compared[key]

    @property
    def _float_evaluations(self) -> Evaluations:
        """Looked up once: its key is the hash of a large file."""
        if self.float_model is None:
            raise ConfigError("An accuracy goal needs the float model.")
        if self._float is None:
            self._float = self._evaluated(self.float_model)
        return self._float

    @property
    def _gate(self) -> Gate:
        goal = self.goal
        return Gate(
            max_map_drop=goal.max_map_drop,
            min_match_rate=goal.min_match_rate,
            judge=goal.judge,
            **goal.further_limits,
        )

    @staticmethod
    def _key(spec: DetectorSpec) -> tuple[str, str]:
        return spec.backend, " ".join(map(sha256_file, files_of(spec.model)))

    def _evaluated(self, spec: DetectorSpec, key: tuple[str, str] | None = None) -> Evaluations:
        """A model that a resumed search had evaluated is evaluated again."""
        key = key or self._key(spec)
        if key not in self.evaluations:
            if spec is not self.float_model:
                spec = replace(spec, model=self.runnable(spec.model))
            annotated = self.goal.annotations is not None
            request = EvaluationRequest(
                candidates=(spec,),
                images=self.goal.images,
                annotations=self.goal.annotations,
                reference=None if annotated else self.float_model,
                resamples=_RESAMPLES if annotated else 0,
                sample=self.goal.sample,
                operating_goal=self.operating_goal,
                predictions=self.predictions,
                runs=self.runs,
                dataset=self.annotated,
            )
            self.evaluations[key] = evaluate(request, progress=self.progress)
        return self.evaluations[key]


def quantize_model(
    request: QuantizeRequest,
    *,
    quantizer: str = "qdq",
    scoring: Scoring | None = None,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
) -> Quantized:
    """Quantize, and where there is a goal return only what reaches it, or what the images cannot decide.

    ``state``: file from which an interrupted search resumes; hidden beside the output by default.

    Raises:
        AccuracyGateError: the goal cannot be reached; nothing was written, the float graph is as it was.
        CalibrationError, ConfigError: as the quantizer says.
    """
    chosen = get_quantizer(quantizer)
    if scoring is None:
        return Quantized(result=chosen.quantize(request, progress=progress))
    source = request.graph.source
    if not chosen.ignores_layers:
        raise ConfigError(
            f"The quantizer '{quantizer}' cannot search for an accuracy goal.",
            hint=f"quantize without it, then 'fcos-deploy evaluate {request.output} --images DIR "
            f"--reference {source.path}' with the same limit; or --quantizer qdq",
        )
    scoring.float_model = scoring.float_model or scoring.spec(source.path)
    if scoring.problem:
        # What cannot be judged says nothing against INT8, and is no reason to move layers to float.
        result, choices = chosen.quantize(request, progress=progress), 1
    else:
        result, choices = _search(request, scoring, state=state, progress=progress)
    return Quantized(result=result, verdicts=scoring.verdicts(result.files[0], choices=choices))


def _search(
    request: QuantizeRequest, scoring: Scoring, *, state: Path | None, progress: ProgressFn
) -> tuple[QuantizeResult, int]:
    """Search, compare the scores of the result with the float model's, and write the trade-offs beside it.

    Returns the result and from how many graphs it was chosen.
    """
    goal = scoring.goal
    search = search_mixed_precision(
        request,
        goal=goal,
        float_score=scoring.float_score,
        evaluate=scoring.loss,
        state=state or request.output.with_name(f".{request.output.stem}.search.json"),
        progress=progress,
    )
    drift = scoring.compared(search.result.path).score_drift
    if drift is None:
        raise ConfigError("The INT8 graph has other classes than the float model.")
    # Where everything in INT8 reached the goal at once there is no choice to show.
    speed = _time_trials(request, scoring, search, progress=progress) if len(search.trials) > 1 else {}
    trade_offs = TradeOffs(
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
    report = write_trade_offs(trade_offs, request.output)
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


def _time_trials(
    request: QuantizeRequest, scoring: Scoring, search: MixedPrecision, *, progress: ProgressFn
) -> dict[Trial | None, float]:
    """Median milliseconds of the float graph (key None) and of the trials on the Pareto front, timed in turns."""
    paths: dict[Trial | None, Path] = {None: request.graph.source.path}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for index, trial in enumerate(pareto_front(search.trials)):
            paths[trial] = Path(folder) / f"trial-{index}.onnx"
            quantize_qdq(
                request.graph,
                request.ranges,
                paths[trial],
                placement=request.placement,
                ignored_layers=trial.ignored_layers,
            )
        detectors = [stack.enter_context(scoring.spec(path).open()) for path in paths.values()]
        image = detectors[0].read(list_images(scoring.goal.images)[0])
        timings = time_in_turns(detectors, image, options=_TIMING, progress=progress)
    return {trial: round(float(np.median(timing.whole)), 3) for trial, timing in zip(paths, timings, strict=True)}
