"""Mixed precision: which layers quantization hurts, and the smallest set to leave in float that reaches a goal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.execution import Feeder, conv_macs, open_engine
from calibration.placement import QdqPlan, plan_pairs
from calibration.quantizers import (
    COMPARED_IMAGES,
    QuantizedOnnx,
    QuantizeRequest,
    checked_quantization,
    quantized_model,
)
from fcos_deploy.core.backend import Tensors, get_backend
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file, sha256_file, write_text
from fcos_deploy.core.gate import Judge, ScoreDrift
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.libraries import recorded_versions
from fcos_deploy.core.machine import read_machine, usable_cpus
from fcos_deploy.core.onnx_file import save_onnx
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import from_json, parse_json, to_json

__all__ = [
    "DEFAULT_EVALUATIONS",
    "TRADE_OFF_COLUMNS",
    "TRADE_OFF_SUFFIX",
    "AccuracyGoal",
    "DetectionEffect",
    "LayerSensitivity",
    "MixedPrecision",
    "ScoreLoss",
    "TradeOffs",
    "Trial",
    "acceptable",
    "detection_effect",
    "find_trade_offs",
    "narrow",
    "pareto_front",
    "read_trade_offs",
    "search_mixed_precision",
    "trade_off_rows",
    "write_trade_offs",
]


DEFAULT_EVALUATIONS = 16
# Images that layers are ranked on, each of which costs one inference per layer: two, and up to eight until so many
# locations see an object. Two of the demo detector have 2500; they show the same eight most harmful layers as eight do.
_RANKING_IMAGES = (2, 8)
_RANKING_LOCATIONS = 1000
# A location takes part in a detection from about this probability on.
_FOREGROUND = 0.05
# Scores are compared to a millionth: AP has that many digits.
_SCORE_DIGIT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreLoss:
    """The score of a model file, higher is better, and the 95 % interval of what it lost against the float graph.

    The interval is a paired one: both models are measured on the same images. ``refused``: another limit of the gate,
    such as that on recall, is missed for certain.
    """

    score: float
    interval: tuple[float, float]
    refused: bool = False


Evaluate = Callable[[Path], ScoreLoss]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyGoal:
    """How much accuracy may be lost, measured on which images.

    With ``annotations`` AP may fall by ``max_map_drop`` (0..1). Without, the score is the share of detections that
    agree with the float graph's, which must be ``min_match_rate`` or more. ``judge``: whether intervals or measured
    figures decide. ``evaluations``: how many candidates may be evaluated; 1 is all layers in INT8 or nothing.
    ``sample``: how many of the images, None for all. ``further_limits``: other limits of the gate, by name; it is
    ``evaluate`` that says whether they are missed.
    """

    images: Path
    max_map_drop: float | None = None
    min_match_rate: float | None = None
    annotations: Path | None = None
    judge: Judge = Judge.INTERVAL
    backend: str = "onnxruntime"
    threads: int | None = None
    evaluations: int = DEFAULT_EVALUATIONS
    sample: int | None = None
    further_limits: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.max_map_drop is None) == (self.annotations is not None):
            raise ConfigError(
                "A drop of AP needs annotations; without them it is the share of detections that agree with the float "
                "model's that is held.",
                hint="give --annotations FILE with --max-map-drop, or --min-match-rate without",
            )
        if (self.max_map_drop is None) == (self.min_match_rate is None):
            raise ConfigError(
                "An accuracy goal takes exactly one limit.", hint="give --max-map-drop or --min-match-rate"
            )
        if not 0.0 <= self.max_loss <= 1.0:
            raise ConfigError(f"The allowed loss must be in [0, 1], got {self.max_loss}.")
        if self.evaluations < 1:
            raise ConfigError(f"At least 1 candidate must be evaluated, got {self.evaluations}.")

    @property
    def max_loss(self) -> float:
        """Of the score, which is 1 for the float graph itself where there are no annotations."""
        if self.max_map_drop is not None:
            return self.max_map_drop
        return 1.0 - (self.min_match_rate or 0.0)

    @property
    def quantity(self) -> str:
        """What the score is."""
        return "AP" if self.annotations is not None else "agreement with the float model's detections"

    def fingerprint(self) -> list[str]:
        """Stands for everything that scores depend on beside the model: what runs it where, and the images.

        Of images and annotations these are contents, and the names that annotations use. Each processor has kernels of
        its own, which round otherwise.
        """
        machine, version = read_machine(), get_backend(self.backend).probe().version
        runs = [
            f"{self.backend} {version}",
            f"threads {self.threads or usable_cpus()}",
            machine.processor,
            *machine.cpu_features,
        ]
        runs += [str(gpu) for gpu in machine.gpus]
        libraries = [f"{name} {version}" for name, version in recorded_versions().items()]
        files = [*list_images(self.images), *([self.annotations] if self.annotations else [])]
        measured = [f"sample {self.sample}", *(f"{path.name} {sha256_file(path)}" for path in files)]
        limits = [f"{name} {limit}" for name, limit in sorted(self.further_limits.items())]
        return [*runs, *libraries, *measured, *limits]


@dataclass(frozen=True, slots=True)
class DetectionEffect:
    """Root mean square errors over the locations that see an object.

    ``classes``, ``centerness``: of probabilities. ``boxes``: of distances, as a share of the box's size.
    """

    classes: float
    boxes: float
    centerness: float

    @property
    def total(self) -> float:
        """One number to rank by: a box side off by 1 % weighs as much as a probability off by 0.01."""
        return float(np.sqrt(self.classes**2 + self.boxes**2 + self.centerness**2))


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """The effect of quantizing this layer and nothing else."""

    layer: str
    effect: DetectionEffect


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate: the layers left in float, its share of multiply-accumulates in INT8, its score.

    ``loss_interval``: the paired 95 % interval of what it lost against the float graph. ``p50_ms``: median milliseconds
    of one image; None where it was not timed. ``refused``: it misses another limit of the gate.
    """

    ignored_layers: tuple[str, ...]
    int8_share: float
    score: float
    p50_ms: float | None = None
    loss_interval: tuple[float, float] = (0.0, 0.0)
    refused: bool = False


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
    trials: tuple[Trial, ...]
    ranking: tuple[LayerSensitivity, ...]


def search_mixed_precision(
    request: QuantizeRequest,
    *,
    goal: AccuracyGoal,
    float_score: float,
    evaluate: Evaluate,
    state: Path | None = None,
    progress: ProgressFn = no_progress,
) -> MixedPrecision:
    """Find the INT8 graph that reaches the goal with the fewest layers in float.

    ``evaluate`` scores a model file on the goal's images and compares it with the float graph, whose score is
    ``float_score``. An interrupted search resumes from ``state`` if graph, calibration, placement and the goal's images
    are the same. Refusal and success remove it.

    All layers in INT8 are tried first. If their harm is shown and the goal is not kept for certain, layers return to
    float in the order of their effect on detections, as ``narrow`` says. Their effect shows in raw outputs only, so
    that a graph with another tail has no other candidate. Where no candidate reaches the goal, the best of those for
    which the images cannot decide it is taken.

    Raises:
        AccuracyGateError: every candidate misses the goal; the message holds the trade-offs. The output is not written.
    """
    search = _Search(request, goal=goal, float_score=float_score, evaluate=evaluate, state=state, progress=progress)
    ranked = request.graph.source.contract.tail is Tail.RAW
    if not search.reaches_goal(()) and goal.evaluations > 1 and ranked:
        narrow(search.rank(), accepts=search.reaches_goal, may_try=search.may_evaluate, best=search.float_layers)
    chosen = search.best()
    if chosen is None:
        search.finish()
        message = (
            f"INT8 misses the goal: {goal.quantity} of the float graph {float_score:.4f}, "
            f"{goal.max_loss:.4f} may be lost."
        )
        for name, limit in sorted(goal.further_limits.items()):
            message += f" {sum(trial.refused for trial in search.trials)} candidates miss {name} {limit:g}."
        more = "more evaluations" if ranked else "export with --tail raw, where single layers can stay in float"
        raise AccuracyGateError(
            f"{message}\n{search.table()}",
            hint=f"allow a larger drop or {more}, calibrate on other images, or use the float model",
        )
    plan, model = search.quantized(chosen.ignored_layers)
    images = search.images(COMPARED_IMAGES)
    result = checked_quantization(plan, model, request.ranges, request.output, images=images)
    search.finish()
    return MixedPrecision(
        result=result, float_score=float_score, chosen=chosen, trials=search.trials, ranking=search.ranking
    )


def acceptable(loss: float, interval: tuple[float, float], *, at_most: float, judge: Judge) -> bool:
    """Whether no layer has to return to float for a candidate that lost ``loss``.

    By the interval: the limit is kept for certain, or no harm is shown at all: a loss that may be noise is no reason to
    give up speed, since the next images may show a gain.
    """
    if judge is Judge.POINT:
        return loss <= at_most + _SCORE_DIGIT
    low, high = interval
    return high <= at_most + _SCORE_DIGIT or low <= 0.0


def narrow(
    order: Sequence[str],
    *,
    accepts: Callable[[Sequence[str]], bool],
    may_try: Callable[[], bool],
    best: Callable[[], Sequence[str] | None],
) -> None:
    """Try which layers, the most harmful first in ``order``, have to return to float.

    Their number doubles until ``accepts`` says yes, is halved back, and then single layers of ``best()`` are offered to
    INT8 again. All layers in INT8 were tried before.
    """
    low, high = 0, 1
    while high < len(order) and may_try() and not accepts(order[:high]):
        low, high = high, min(high * 2, len(order) - 1) if high < len(order) - 1 else len(order)
    while high - low > 1 and may_try():
        middle = (low + high) // 2
        low, high = (low, middle) if accepts(order[:middle]) else (middle, high)
    kept = best() or ()
    for layer in reversed(kept):
        fewer = [name for name in kept if name != layer]
        if may_try() and accepts(fewer):
            kept = best() or ()


def pareto_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Those that no other trial beats in both share and score, most INT8 first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (-t.int8_share, -t.score)):
        if not front or trial.score > front[-1].score:
            front.append(trial)
    return tuple(front)


def detection_effect(reference: Sequence[Tensors], results: Sequence[Tensors]) -> DetectionEffect:
    """Compare the raw outputs (``ModelContract``, tail raw) of the same images; zeros where nothing sees an object."""
    squares, count = np.zeros(3), 0
    for expected, measured in zip(reference, results, strict=True):
        before, after = _sigmoid(expected["cls_logits"]), _sigmoid(measured["cls_logits"])
        seen = np.maximum(before, after).max(2) > _FOREGROUND  # (n, L)
        if not seen.any():
            continue
        distances = expected["distances"].astype(np.float64)
        size = np.maximum((distances[..., :2] + distances[..., 2:])[seen], 1.0)  # (m, 2) width and height
        error = (measured["distances"] - distances)[seen] / np.concatenate([size, size], 1)
        centerness = (_sigmoid(measured["centerness"]) - _sigmoid(expected["centerness"]))[seen]
        squares += [
            np.square((after - before)[seen]).max(1).sum(),
            np.square(error).mean(1).sum(),
            np.square(centerness).sum(),
        ]
        count += int(seen.sum())
    return DetectionEffect(*(float(v) for v in np.sqrt(squares / max(count, 1))))


def _sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    # tanh does not overflow, as exp does.
    probabilities: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
    return probabilities


class _Search:
    """The candidates of one search, each evaluated at most once."""

    def __init__(
        self,
        request: QuantizeRequest,
        *,
        goal: AccuracyGoal,
        float_score: float,
        evaluate: Evaluate,
        state: Path | None,
        progress: ProgressFn,
    ) -> None:
        self._request, self._graph, self._goal, self._float_score = request, request.graph, goal, float_score
        self._evaluate, self._state, self._progress = evaluate, state, progress
        self._macs = conv_macs(self._graph)
        self._trials: dict[tuple[str, ...], Trial] = {}
        self._sensitivities: dict[str, LayerSensitivity] = {}
        self.ranking: tuple[LayerSensitivity, ...] = ()
        self._quantized: dict[tuple[str, ...], tuple[QdqPlan, Any]] = {}  # of the last candidate; Any: onnx.ModelProto
        depends_on = [self._graph.source.sha256, to_json(request.ranges), to_json(request.placement)]
        key = json.dumps([*depends_on, goal.quantity, goal.fingerprint()], sort_keys=True)
        self._key = hashlib.sha256(key.encode()).hexdigest()
        self._resume()

    def images(self, count: int) -> list[NDArray[np.uint8]]:
        """The first of the goal's images, (h, w, 3) uint8 RGB each."""
        orientation = self._graph.source.contract.preprocess.orientation
        return [read_image(path, orientation=orientation) for path in list_images(self._goal.images)[:count]]

    @property
    def trials(self) -> tuple[Trial, ...]:
        return tuple(sorted(self._trials.values(), key=lambda trial: -trial.int8_share))

    def reaches_goal(self, ignored_layers: Sequence[str]) -> bool:
        """Evaluate the candidate that leaves these layers in float, unless it was evaluated before."""
        key = tuple(sorted(ignored_layers))
        if key not in self._trials:
            self._progress("evaluating candidates", len(self._trials), 0)  # how many it takes is not known
            plan, model = self.quantized(key)
            share = round(sum(self._macs[conv.name] for conv in plan.convs) / sum(self._macs.values()), 6)
            candidate = self._request.output.with_name(f".{self._request.output.stem}.trial.onnx")
            try:
                # Its score shows what it computes; the one that is chosen is compared with its source as well.
                save_onnx(model, candidate)
                measured = self._evaluate(candidate)
                self._trials[key] = Trial(
                    key, share, measured.score, loss_interval=measured.interval, refused=measured.refused
                )
            finally:
                candidate.unlink(missing_ok=True)
            self._save()
        return self._within_goal(self._trials[key])

    def quantized(self, ignored_layers: tuple[str, ...]) -> tuple[QdqPlan, Any]:
        """The onnx.ModelProto that leaves these layers in float, and its plan; the last one asked for is kept."""
        if ignored_layers not in self._quantized:
            self._quantized.clear()
            plan = self._plan(ignored_layers)
            self._quantized[ignored_layers] = plan, quantized_model(plan, self._request.ranges)
        return self._quantized[ignored_layers]

    def _plan(self, ignored_layers: Collection[str]) -> QdqPlan:
        return plan_pairs(
            self._graph,
            self._request.placement,
            ignored_layers=ignored_layers,
            zero_tensors=self._request.ranges.zero_tensors,
        )

    def _within_goal(self, trial: Trial) -> bool:
        loss, goal = self._float_score - trial.score, self._goal
        return not trial.refused and acceptable(loss, trial.loss_interval, at_most=goal.max_loss, judge=goal.judge)

    def rank(self) -> list[str]:
        """All layers that the placement would quantize, the most harmful first; each is quantized alone.

        The graph ends in raw outputs.
        """
        source = self._graph.source
        feeder, minimum, seen = Feeder(source), _RANKING_IMAGES[0], 0
        feeds: list[Tensors] = []
        reference: list[Tensors] = []
        with open_engine("onnxruntime", source.model) as session:
            for image in self.images(_RANKING_IMAGES[1]):
                if len(feeds) >= minimum and seen >= _RANKING_LOCATIONS:
                    break
                feeds.append(feeder(image))
                reference.append(session.run(feeds[-1]))
                seen += int((_sigmoid(reference[-1]["cls_logits"]).max(2) > _FOREGROUND).sum())
        every = self._plan(()).convs
        layers = tuple(dict.fromkeys(conv.layer for conv in every))
        for index, layer in enumerate(layers):
            self._progress("measuring layers", index, len(layers))
            if layer in self._sensitivities:
                continue
            others = set(self._graph.layers) - {layer}
            with open_engine("onnxruntime", quantized_model(self._plan(others), self._request.ranges)) as session:
                effect = detection_effect(reference, [session.run(feed) for feed in feeds])
            self._sensitivities[layer] = LayerSensitivity(layer, effect)
            self._save()
        self._progress("measuring layers", len(layers), len(layers))
        measured = [self._sensitivities[layer] for layer in layers]
        self.ranking = tuple(sorted(measured, key=lambda item: (-item.effect.total, item.layer)))
        return [item.layer for item in self.ranking]

    def may_evaluate(self) -> bool:
        """Whether the goal allows another candidate."""
        return len(self._trials) < self._goal.evaluations

    def float_layers(self) -> tuple[str, ...] | None:
        """Those of the best candidate that reaches the goal."""
        reaching = self._reaching()
        return reaching.ignored_layers if reaching else None

    def _reaching(self) -> Trial | None:
        return next((trial for trial in self.trials if self._within_goal(trial)), None)

    def best(self) -> Trial | None:
        """The candidate with most in INT8 among those that reach the goal, or else the best that may reach it."""
        reaching = self._reaching()
        if reaching is not None or self._goal.judge is Judge.POINT:
            return reaching
        undecided = [t for t in self.trials if t.loss_interval[0] <= self._goal.max_loss and not t.refused]
        return max(undecided, key=lambda trial: trial.score, default=None)

    def table(self) -> str:
        """The trade-offs, most INT8 first."""
        rows = [
            f"{t.int8_share:8.1%}  {len(t.ignored_layers):5d}  {t.score:.4f}  "
            f"{t.loss_interval[0]:+.4f} to {t.loss_interval[1]:+.4f}"
            for t in self.trials
        ]
        return "\n".join(
            ["    INT8  float  score   95 % of the loss", *rows, f"{0:8.1%}    all  {self._float_score:.4f}"]
        )

    def finish(self) -> None:
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Take over what an interrupted search of the same inputs has."""
        if self._state is None or not self._state.is_file():
            return
        try:
            saved = from_json(_Saved, json.loads(self._state.read_text(encoding="utf-8")))
        except (OSError, ValueError, ConfigError):
            return
        if saved.key == self._key:
            self._trials = {trial.ignored_layers: trial for trial in saved.trials}
            self._sensitivities = {item.layer: item for item in saved.ranking}

    def _save(self) -> None:
        if self._state is not None:
            saved = _Saved(key=self._key, trials=self.trials, ranking=tuple(self._sensitivities.values()))
            write_text(self._state, json.dumps(to_json(saved)))


TRADE_OFF_SUFFIX = ".mixed-precision.json"
TRADE_OFF_COLUMNS = ("layers in float", "in INT8, %", "score", "loss", "95% interval", "p50 ms", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOffs:
    """One search. Scores are ``quantity`` (0..1) on ``backend``, of which at most ``max_loss`` was to be lost.

    ``trials`` begin with most INT8; those on the Pareto front are timed.
    ``ranking`` is empty where all layers in INT8 reached the goal at once, so that nothing had to be ranked.
    """

    placement: str
    backend: str
    quantity: str
    max_loss: float
    float_score: float
    float_p50_ms: float | None
    ignored_layers: tuple[str, ...]
    trials: tuple[Trial, ...]
    ranking: tuple[LayerSensitivity, ...]
    drift: ScoreDrift
    schema_version: int = 2

    def __post_init__(self) -> None:
        if self.schema_version != 2:
            raise ConfigError(f"Trade-offs of schema version {self.schema_version}, this fcos-deploy reads 2.")


def write_trade_offs(trade_offs: TradeOffs, model: Path) -> Path:
    """Write them beside ``model``."""
    path = model.with_name(model.stem + TRADE_OFF_SUFFIX)
    write_text(path, json.dumps(to_json(trade_offs), indent=1) + "\n")
    return path


def read_trade_offs(path: Path) -> TradeOffs:
    """The inverse.

    Raises:
        ConfigError: not such a file.
    """
    try:
        return from_json(TradeOffs, parse_json(read_file(path, limit=MAX_TEXT_BYTES)), where=path.name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"Cannot read the trade-offs '{path}': {error}.") from error


def find_trade_offs(models: Sequence[Path]) -> tuple[TradeOffs, ...]:
    """Those that lie beside these models, or in these bundles."""
    paths: dict[Path, None] = {}
    for model in models:
        beside = (
            sorted(model.glob("*" + TRADE_OFF_SUFFIX))
            if model.is_dir()
            else [model.with_name(model.stem + TRADE_OFF_SUFFIX)]
        )
        paths.update(dict.fromkeys(path for path in beside if path.is_file()))
    return tuple(read_trade_offs(path) for path in paths)


def trade_off_rows(trade_offs: TradeOffs) -> list[tuple[str, ...]]:
    """For ``TRADE_OFF_COLUMNS``."""
    rows = [
        (
            str(len(trial.ignored_layers)),
            f"{100 * trial.int8_share:.1f}",
            f"{trial.score:.4f}",
            f"{trade_offs.float_score - trial.score:.4f}",
            f"{trial.loss_interval[0]:+.4f} to {trial.loss_interval[1]:+.4f}",
            _milliseconds(trial.p50_ms),
            "chosen" if trial.ignored_layers == trade_offs.ignored_layers else "",
        )
        for trial in trade_offs.trials
    ]
    return [
        *rows,
        ("all", "0.0", f"{trade_offs.float_score:.4f}", "-", "", _milliseconds(trade_offs.float_p50_ms), "float"),
    ]


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
