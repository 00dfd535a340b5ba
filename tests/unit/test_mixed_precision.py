"""The accuracy contract: reached with few float layers, or refused with the trade-offs."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibration import execution, mixed_precision
from calibration.calibrate import Calibration, StatisticsOptions, collect_ranges
from calibration.dataset import collect_images
from calibration.execution import compare_models
from calibration.mixed_precision import (
    AccuracyGoal,
    DetectionEffect,
    ScoreLoss,
    acceptable,
    detection_effect,
    search_mixed_precision,
)
from calibration.placement import PLACEMENTS, ConvGraph, open_graph
from calibration.quantizers import QuantizeRequest
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.gate import Judge
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.onnx_file import save_onnx, with_contract

onnx = pytest.importorskip("onnx")

PORTABLE = PLACEMENTS["portable"]


@pytest.fixture(scope="module")
def two_images(smooth_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for image in collect_images(smooth_images).images[:2]:
        shutil.copy(image.path, folder)
    return folder


@pytest.fixture(scope="module")
def hard(
    mini_fcos: ModuleType, smooth_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ConvGraph, Calibration]:
    """A graph in which one channel takes the whole range of ``a_relu``, with its calibration."""
    graph = open_graph(mini_fcos.write(tmp_path_factory.mktemp("hard") / "hard.onnx", spoil=3000.0))
    options = StatisticsOptions(engine="onnxruntime", threads=1)
    return graph, collect_ranges(graph, collect_images(smooth_images), options=options)


class Score:
    """1 for the float graph, less by the noise of the worst output: stands in for AP, on the real graphs."""

    def __init__(self, graph: ConvGraph, folder: Path) -> None:
        self.source, self.folder, self.calls, self.doubt = graph.source, folder, 0, 0.0
        self.images = [read_image(path) for path in list_images(folder)]

    def __call__(self, path: Path) -> ScoreLoss:
        self.calls += 1
        fidelity = compare_models(self.source, onnx.load(str(path)), images=self.images)
        loss = 10 ** (-min(fidelity.sqnr_db.values()) / 20)
        return ScoreLoss(score=1.0 - loss, interval=(loss - self.doubt, loss + self.doubt))


@pytest.fixture
def score(hard: tuple[ConvGraph, Calibration], two_images: Path) -> Score:
    return Score(hard[0], two_images)


def search(
    hard: tuple[ConvGraph, Calibration],
    score: Any,
    output: Path,
    *,
    drop: float = 0.1,
    evaluations: int = 16,
    folder: Path | None = None,
    **options: Any,
) -> Any:
    goal = AccuracyGoal(min_match_rate=1.0 - drop, images=folder or score.folder, evaluations=evaluations)
    request = QuantizeRequest(graph=hard[0], calibration=hard[1], output=output, placement=PORTABLE)
    return search_mixed_precision(request, goal=goal, float_score=1.0, evaluate=score, **options)


def test_float_outputs_are_those_of_the_same_graph_and_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every placement is compared with them, and they are computed once."""
    opened = []

    @contextmanager
    def engine(_: str, model: str) -> Iterator[Any]:
        opened.append(model)
        yield SimpleNamespace(run=lambda feed: {"shape": np.array(feed["images"].shape), "model": model})

    monkeypatch.setattr(execution, "open_engine", engine)
    monkeypatch.setattr(execution, "_FLOAT_OUTPUTS", {})

    def outputs(graph: str, *shape: int, value: float = 0.0) -> list[int]:
        source: Any = SimpleNamespace(sha256=graph, model=graph)
        (output,) = execution._float_outputs(source, [{"images": np.full(shape, value, np.float32)}])
        assert output["model"] == graph
        return list(output["shape"])

    assert outputs("a", 1, 3, 2, 4) == outputs("a", 1, 3, 2, 4) == [1, 3, 2, 4]
    assert len(opened) == 1
    assert outputs("a", 1, 3, 4, 2) == [1, 3, 4, 2], "the same bytes of another image"
    outputs("a", 1, 3, 4, 2, value=1.0)
    outputs("b", 1, 3, 4, 2, value=1.0)
    assert len(opened) == 4


def test_goal_is_reached_by_ignoring_the_layer_that_misses_it(
    hard: tuple[ConvGraph, Calibration], score: Score, tmp_path: Path
) -> None:
    result = search(hard, score, tmp_path / "q.onnx")
    (plain,) = (trial for trial in result.trials if not trial.ignored_layers)
    assert result.float_score - plain.score > 0.1
    assert "block.b.weight" in result.chosen.ignored_layers
    assert result.ranking[0].layer == "block.b.weight"
    assert result.float_score - score(result.result.path).score <= 0.1 + 1e-6
    assert result.chosen.int8_share == max(t.int8_share for t in result.trials if result.float_score - t.score <= 0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]


def test_a_candidate_that_misses_another_limit_does_not_reach_the_goal(
    mini_graph: Any, mini_calibration: Any, two_images: Path, tmp_path: Path
) -> None:
    """With everything in INT8 the score is enough, but recall, say, is not."""
    score = Score(mini_graph, two_images)

    def strict(path: Path) -> ScoreLoss:
        return replace(score(path), refused=score.calls == 1)

    result = search((mini_graph, mini_calibration), strict, tmp_path / "q.onnx", folder=two_images)
    assert len(result.chosen.ignored_layers) >= 1
    assert [trial.refused for trial in result.trials if not trial.ignored_layers] == [True]


@pytest.mark.parametrize(("enough", "images"), [(1, 2), (100, 2), (10_000, 8)])
def test_layers_are_ranked_on_as_few_images_as_show_enough(
    hard: tuple[ConvGraph, Calibration],
    score: Score,
    smooth_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    enough: int,
    images: int,
) -> None:
    """Each costs an inference a layer; one image of this detector has eighty locations."""
    ranked_on: list[int] = []

    def effect(reference: Any, results: Any) -> DetectionEffect:
        ranked_on.append(len(results))
        return detection_effect(reference, results)

    monkeypatch.setattr(mixed_precision, "_RANKING_LOCATIONS", enough)
    monkeypatch.setattr(mixed_precision, "detection_effect", effect)
    search(hard, score, tmp_path / "q.onnx", folder=smooth_images, evaluations=2)
    assert set(ranked_on) == {images}


def test_unreachable_goal_is_refused_and_the_float_graph_intact(
    hard: tuple[ConvGraph, Calibration], score: Score, tmp_path: Path
) -> None:
    before = hard[0].source.path.read_bytes()
    with pytest.raises(AccuracyGateError) as error:
        search(hard, score, tmp_path / "q.onnx", drop=1e-5, evaluations=4)
    assert error.value.exit_code == 4
    assert "INT8  float  score" in error.value.message
    assert hard[0].source.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_another_tail_has_no_candidate_but_everything_in_int8(
    hard: tuple[ConvGraph, Calibration], smooth_images: Path, two_images: Path, tmp_path: Path
) -> None:
    """The effect of a layer shows in raw outputs: the float artifacts remain, and the hint says where layers can go."""
    source = hard[0].source
    path = tmp_path / "candidates.onnx"
    save_onnx(with_contract(source.model, replace(source.contract, tail=Tail.CANDIDATES)), path)
    graph = open_graph(path)
    calibration = collect_ranges(graph, collect_images(smooth_images), options=StatisticsOptions(threads=1))
    score = Score(graph, two_images)
    with pytest.raises(AccuracyGateError) as error:
        search((graph, calibration), score, tmp_path / "q.onnx")
    assert score.calls == 1
    assert "--tail raw" in error.value.hint
    assert str(tmp_path) not in error.value.hint, "deploy's graph lies in a working folder, which goes"


def test_easy_model_needs_one_evaluation(
    mini_graph: Any, mini_calibration: Any, two_images: Path, tmp_path: Path
) -> None:
    score = Score(mini_graph, two_images)
    result = search((mini_graph, mini_calibration), score, tmp_path / "q.onnx")
    assert result.chosen.ignored_layers == ()
    assert result.chosen.int8_share == 1.0
    assert score.calls == 1


def test_interrupted_search_resumes(hard: tuple[ConvGraph, Calibration], score: Score, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    whole = search(hard, score, tmp_path / "whole.onnx")
    needed, score.calls = score.calls, 0

    def stop(label: str, done: int, total: int) -> None:
        if label == "measuring layers" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(hard, score, tmp_path / "q.onnx", state=state, progress=stop)
    layers: list[int] = []
    result = search(hard, score, tmp_path / "q.onnx", state=state, progress=lambda *step: layers.append(step[1]))
    assert score.calls == needed
    assert result.chosen == whole.chosen
    assert not state.exists()


def test_goals_are_checked() -> None:
    for limits, message in (
        ({"min_match_rate": 1.1}, "The allowed loss must be in"),
        ({"min_match_rate": 0.9, "evaluations": 0}, "At least 1 candidate"),
        ({"max_map_drop": 0.1}, "A drop of AP needs annotations"),
        ({}, "takes exactly one limit"),
    ):
        with pytest.raises(ConfigError, match=message):
            AccuracyGoal(images=Path(), **limits)


@pytest.mark.parametrize(
    ("interval", "by_interval", "by_point"),
    [
        ((0.002, 0.009), True, True),  # kept for certain
        ((-0.005, 0.029), True, False),  # as likely a gain: no layer returns for it
        ((0.001, 0.015), False, True),  # harm, and perhaps too much
        ((0.02, 0.04), False, False),
    ],
)
def test_a_layer_returns_to_float_only_for_harm_that_is_shown(
    interval: tuple[float, float], by_interval: bool, by_point: bool
) -> None:
    loss = sum(interval) / 2
    assert acceptable(loss, interval, at_most=0.01, judge=Judge.INTERVAL) == by_interval
    assert acceptable(loss, interval, at_most=0.01, judge=Judge.POINT) == by_point


def test_what_images_cannot_decide_is_kept_and_not_refused(
    hard: tuple[ConvGraph, Calibration], score: Score, tmp_path: Path
) -> None:
    """Harm is shown, and it may be within the goal: the best candidate is written, for the verdict to say so."""
    score.doubt = 0.01
    result = search(hard, score, tmp_path / "q.onnx", drop=0.02, evaluations=6)
    low, high = result.chosen.loss_interval

    assert 0 < low <= 0.02 < high
    assert result.chosen.score == max(trial.score for trial in result.trials)


@pytest.mark.parametrize("images", [40, 500])
def test_a_graph_that_was_chosen_by_its_figures_is_not_passed_for_them(images: int) -> None:
    """benchmarks/selection.py simulates the search where the truth is known."""
    simulate = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "selection.py"))["simulate"]
    by_point = simulate(images, judge=Judge.POINT, runs=300)
    by_interval = simulate(images, judge=Judge.INTERVAL, runs=300)
    assert np.mean(by_interval.beyond) <= 0.05 < np.mean(by_point.beyond)
    assert np.mean(by_interval.needless) <= 0.05


def test_effect_counts_only_locations_that_see_an_object() -> None:
    logits = np.float32([[[-20.0], [0.0]]])
    reference = {
        "cls_logits": logits,
        "distances": np.float32([[[1, 1, 1, 1], [10, 10, 10, 10]]]),
        "centerness": np.zeros((1, 2, 1), np.float32),
    }
    measured = {**reference, "distances": np.float32([[[99, 99, 99, 99], [12, 10, 10, 10]]])}
    effect = detection_effect([reference], [measured])
    # One of four sides is off by 2 of a width of 20.
    assert effect.boxes == pytest.approx((0.1**2 / 4) ** 0.5)
    assert (effect.classes, effect.centerness) == (0.0, 0.0)
