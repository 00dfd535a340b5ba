"""Which layers hurt: each is quantized alone, and its effect on detections measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.cache import Calibration
from calibration.execution import DetectionEffect, EffectMeter, Feeder, conv_macs, open_engine
from calibration.placement import ConvGraph, Placement, load_graph, plan_pairs
from calibration.qdq import QuantizedOnnx, quantize_qdq, quantized_model
from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.files import sha256_file, write_text
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, to_json

__all__ = [
    "DEFAULT_EVALUATIONS",
    "LayerSensitivity",
    "MixedPrecision",
    "PrecisionGoal",
    "Trial",
    "measure_sensitivity",
    "pareto_front",
    "search_mixed_precision",
]

Remember = Callable[["LayerSensitivity"], None]


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """The effect of quantizing this layer and nothing else."""

    layer: str
    effect: DetectionEffect


def measure_sensitivity(
    graph: ConvGraph,
    calibration: Calibration,
    *,
    contract: ModelContract,
    policy: Placement,
    pictures: Sequence[NDArray[np.uint8]],
    known: Mapping[str, LayerSensitivity] | None = None,
    remember: Remember | None = None,
    progress: ProgressFn = no_progress,
) -> tuple[LayerSensitivity, ...]:
    """All layers that ``policy`` would quantize, the most harmful first.

    ``known`` holds measurements of an interrupted run, ``remember`` is called with every new one.

    Raises:
        ConfigError: the graph does not end in raw outputs.
    """
    if contract.tail is not Tail.RAW:
        raise ConfigError(f"Sensitivity needs the raw tail, the graph has '{contract.tail}'.", hint="export --tail raw")
    known = known or {}
    feeder = Feeder(graph.model, contract)
    feeds = [feeder(picture) for picture in pictures]
    reference = open_engine("onnxruntime", graph.model)
    wanted = [reference(feed) for feed in feeds]
    layers = quantizable_layers(graph, policy)
    found = []
    for index, layer in enumerate(layers):
        progress("measuring layers", index, len(layers))
        if layer not in known:
            others = set(graph.layers) - {layer}
            model = quantized_model(graph, calibration, policy=policy, ignored_layers=others)
            known = {**known, layer: LayerSensitivity(layer, _effect(model, feeds, wanted))}
            if remember is not None:
                remember(known[layer])
        found.append(known[layer])
    progress("measuring layers", len(layers), len(layers))
    return tuple(sorted(found, key=lambda item: (-item.effect.total, item.layer)))


def quantizable_layers(graph: ConvGraph, policy: Placement) -> tuple[str, ...]:
    """Layers with a convolution that the placement does not keep float itself."""
    convs = (c for c in graph.convs if not (policy.ignore_predictions and c.is_prediction))
    return tuple(dict.fromkeys(conv.layer for conv in convs))


def _effect(
    model: Any, feeds: Sequence[Mapping[str, NDArray[Any]]], wanted: Sequence[Mapping[str, NDArray[Any]]]
) -> DetectionEffect:
    run = open_engine("onnxruntime", model)
    meter = EffectMeter()
    for feed, reference in zip(feeds, wanted, strict=True):
        meter.add(reference, run(feed))
    return meter.effect


Evaluate = Callable[[Path], float]
DEFAULT_EVALUATIONS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionGoal:
    """``max_drop``: how much the score (0..1) may fall. ``evaluations``: how many candidates may be evaluated.

    One evaluation is all layers in INT8 or nothing.
    """

    max_drop: float
    evaluations: int = DEFAULT_EVALUATIONS

    def __post_init__(self) -> None:
        if self.max_drop < 0:
            raise ConfigError(f"The allowed drop must not be negative, got {self.max_drop}.")
        if self.evaluations < 1:
            raise ConfigError(f"At least 1 candidate must be evaluated, got {self.evaluations}.")


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate: the layers kept in float, its share of multiply-accumulates in INT8, its score."""

    ignored_layers: tuple[str, ...]
    int8_share: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """The result, everything that was tried (the Pareto chart's points), and the ranking behind it."""

    result: QuantizedOnnx
    float_score: float
    chosen: Trial
    trials: tuple[Trial, ...]
    ranking: tuple[LayerSensitivity, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """What an interrupted search keeps."""

    key: str
    float_score: float | None
    trials: tuple[Trial, ...]
    ranking: tuple[LayerSensitivity, ...]


def search_mixed_precision(
    source: Path,
    calibration: Calibration,
    output: Path,
    *,
    policy: Placement,
    goal: PrecisionGoal,
    evaluate: Evaluate,
    pictures: Sequence[NDArray[np.uint8]],
    measured_on: str = "",
    state: Path | None = None,
    progress: ProgressFn = no_progress,
) -> MixedPrecision:
    """Find the graph; ``evaluate`` scores a model file, higher is better.

    An interrupted search goes on from ``state``, provided that the files and ``measured_on``, which stands for the data
    behind ``evaluate``, are the same. Refusal and success remove it.

    All layers in INT8 are tried first. If they miss the goal, layers return to float in the order of their effect on
    detections: first doubling their number, then halving the interval, then offering single layers back to INT8.

    Raises:
        AccuracyGateError: no candidate reached the goal; the message holds the trade-offs. ``output`` is not written.
    """
    search = _Search(
        source,
        calibration,
        output,
        policy=policy,
        evaluate=evaluate,
        measured_on=measured_on,
        state=state,
        progress=progress,
    )
    search.begin(goal)
    if not search.holds(()) and goal.evaluations > 1:
        search.rank(pictures)
        search.narrow()
    chosen = search.best()
    if chosen is None:
        search.finish()
        message = f"INT8 misses the goal: float {search.float_score:.4f}, allowed drop {goal.max_drop:.4f}."
        raise AccuracyGateError(
            f"{message}\n{search.table()}",
            hint=f"allow a larger drop or more evaluations, calibrate on other images, or use the float '{source}'",
        )
    result = quantize_qdq(
        source, calibration, output, policy=policy, ignored_layers=chosen.ignored_layers, pictures=pictures
    )
    search.finish()
    return MixedPrecision(
        result=result,
        float_score=search.float_score,
        chosen=chosen,
        trials=search.trials,
        ranking=search.ranking,
    )


def pareto_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Those that no other beats in both share and score, most INT8 first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (-t.int8_share, -t.score)):
        if not front or trial.score > front[-1].score:
            front.append(trial)
    return tuple(front)


class _Search:
    """The candidates of one search, evaluated at most once each."""

    def __init__(
        self,
        source: Path,
        calibration: Calibration,
        output: Path,
        *,
        policy: Placement,
        evaluate: Evaluate,
        measured_on: str,
        state: Path | None,
        progress: ProgressFn,
    ) -> None:
        self._source, self._calibration, self._output = source, calibration, output
        self._policy, self._evaluate, self._measured_on = policy, evaluate, measured_on
        self._state, self._progress = state, progress
        self._graph, self._contract = load_graph(source), read_contract(source)
        self._macs = conv_macs(self._graph, self._contract)
        self._trials: dict[tuple[str, ...], Trial] = {}
        self._known: dict[str, LayerSensitivity] = {}
        self.ranking: tuple[LayerSensitivity, ...] = ()
        self._float_score: float | None = None
        self._goal = PrecisionGoal(max_drop=0.0)

    @property
    def float_score(self) -> float:
        return self._float_score or 0.0

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(sorted(self._trials.values(), key=lambda trial: -trial.int8_share))

    def begin(self, goal: PrecisionGoal) -> None:
        self._goal = goal
        self._load()
        if self._float_score is None:
            self._report()
            self._float_score = self._evaluate(self._source)
            self._save()

    def holds(self, ignored_layers: Sequence[str]) -> bool:
        """Whether this candidate reaches the goal. Scores are compared to a millionth: AP has that many digits."""
        key = tuple(sorted(ignored_layers))
        if key not in self._trials:
            self._report()
            self._trials[key] = Trial(key, self._share(key), self._try(key))
            self._save()
        return self.float_score - self._trials[key].score <= self._goal.max_drop + 1e-6

    def _try(self, ignored_layers: tuple[str, ...]) -> float:
        candidate = self._output.with_name(f".{self._output.stem}.trial.onnx")
        try:
            quantize_qdq(self._source, self._calibration, candidate, policy=self._policy, ignored_layers=ignored_layers)
            return self._evaluate(candidate)
        finally:
            candidate.unlink(missing_ok=True)

    def _report(self) -> None:
        self._progress("evaluating candidates", len(self._trials), self._goal.evaluations)

    def _share(self, ignored_layers: tuple[str, ...]) -> float:
        plan = plan_pairs(self._graph, self._policy, ignored_layers=ignored_layers)
        return round(sum(self._macs[conv.name] for conv in plan.convs) / sum(self._macs.values()), 6)

    def rank(self, pictures: Sequence[NDArray[np.uint8]]) -> None:
        if not pictures:
            raise ConfigError("Ranking the layers needs images.", hint="--images DIR")
        self.ranking = measure_sensitivity(
            self._graph,
            self._calibration,
            contract=self._contract,
            policy=self._policy,
            pictures=pictures,
            known=self._known,
            remember=self._remember,
            progress=self._progress,
        )

    def _remember(self, found: LayerSensitivity) -> None:
        self._known[found.layer] = found
        self._save()

    def narrow(self) -> None:
        """Double the number of float layers until the goal holds, halve back, then try single layers in INT8 again."""
        order = [item.layer for item in self.ranking]
        low, high = 0, 1
        while high < len(order) and self._room() and not self.holds(order[:high]):
            low, high = high, min(high * 2, len(order) - 1) if high < len(order) - 1 else len(order)
        while high - low > 1 and self._room():
            middle = (low + high) // 2
            low, high = (low, middle) if self.holds(order[:middle]) else (middle, high)
        best = self.best()
        for layer in reversed(best.ignored_layers if best else ()):
            if best and self._room() and self.holds([name for name in best.ignored_layers if name != layer]):
                best = self.best()

    def _room(self) -> bool:
        return len(self._trials) < self._goal.evaluations

    def best(self) -> Trial | None:
        """The candidate with most in INT8 among those that reach the goal."""
        good = [t for t in self.trials if self.float_score - t.score <= self._goal.max_drop + 1e-6]
        return good[0] if good else None

    def table(self) -> str:
        """The trade-offs, most INT8 first."""
        rows = [f"{t.int8_share:8.1%}  {len(t.ignored_layers):5d}  {t.score:.4f}" for t in self.trials]
        return "\n".join(["    INT8  float  score", *rows, f"{0:8.1%}    all  {self.float_score:.4f}"])

    def _key(self) -> str:
        parts: list[Any] = [
            sha256_file(self._source),
            to_json(self._calibration),
            to_json(self._policy),
            self._measured_on,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _load(self) -> None:
        if self._state is None or not self._state.is_file():
            return
        try:
            saved = from_json(_Saved, json.loads(self._state.read_text(encoding="utf-8")))
        except (OSError, ValueError, ConfigError):
            return
        if saved.key == self._key():
            self._float_score = saved.float_score
            self._trials = {trial.ignored_layers: trial for trial in saved.trials}
            self._known = {item.layer: item for item in saved.ranking}

    def _save(self) -> None:
        if self._state is not None:
            saved = _Saved(
                key=self._key(),
                float_score=self._float_score,
                trials=self.trials,
                ranking=tuple(self._known.values()),
            )
            write_text(self._state, json.dumps(to_json(saved)))

    def finish(self) -> None:
        if self._state is not None:
            self._state.unlink(missing_ok=True)
