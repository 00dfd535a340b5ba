"""The accuracy contract: reached with few float layers, or refused with the trade-offs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration.cache import Calibration
from calibration.calibrate import StatisticsOptions, collect_ranges
from calibration.dataset import collect_images
from calibration.execution import EffectMeter, compare_models
from calibration.mixed_precision import PrecisionGoal, search_mixed_precision
from calibration.placement import PLACEMENTS
from fcos_deploy.core.errors import AccuracyGateError, ConfigError

onnx = pytest.importorskip("onnx")

PORTABLE = PLACEMENTS["portable"]


@pytest.fixture(scope="module")
def pictures(smooth_images: Path) -> list[Any]:
    return [image.read() for image in collect_images(smooth_images).images[:2]]


@pytest.fixture(scope="module")
def hard(
    mini_fcos: ModuleType, smooth_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Calibration]:
    """A graph in which one channel takes the whole range of ``a_relu``, with its calibration."""
    path = mini_fcos.write(tmp_path_factory.mktemp("hard") / "hard.onnx", spoil=3000.0)
    options = StatisticsOptions(engine="onnxruntime", threads=1)
    return path, collect_ranges(path, collect_images(smooth_images), options=options)


class Score:
    """1 for the float graph, less by the noise of the worst output: stands in for AP, on the real graphs."""

    def __init__(self, source: Path, contract: Any, pictures: list[Any]) -> None:
        self.source, self.contract, self.pictures = onnx.load(str(source)), contract, pictures
        self.calls = 0

    def __call__(self, path: Path) -> float:
        self.calls += 1
        found = compare_models(self.source, onnx.load(str(path)), contract=self.contract, pictures=self.pictures)
        return 1.0 - 10 ** (-min(found.sqnr_db.values()) / 20)


@pytest.fixture
def score(hard: tuple[Path, Calibration], mini_fcos: ModuleType, pictures: list[Any]) -> Score:
    return Score(hard[0], mini_fcos.CONTRACT, pictures)


def search(hard: tuple[Path, Calibration], score: Score, output: Path, **options: Any) -> Any:
    goal = options.pop("goal", PrecisionGoal(max_drop=0.1))
    return search_mixed_precision(
        *hard, output, policy=PORTABLE, goal=goal, evaluate=score, pictures=score.pictures, **options
    )


def test_hard_model_misses_the_goal_in_plain_int8(hard: tuple[Path, Calibration], score: Score, tmp_path: Path) -> None:
    found = search(hard, score, tmp_path / "q.onnx")
    (plain,) = (trial for trial in found.trials if not trial.ignored_layers)
    assert found.float_score - plain.score > 0.1


def test_goal_is_reached_by_keeping_the_culprit_float(
    hard: tuple[Path, Calibration], score: Score, tmp_path: Path
) -> None:
    found = search(hard, score, tmp_path / "q.onnx")
    assert "block.b.weight" in found.chosen.ignored_layers
    assert found.ranking[0].layer == "block.b.weight"
    assert found.float_score - score(found.result.path) <= 0.1 + 1e-6
    assert found.chosen.int8_share == max(t.int8_share for t in found.trials if found.float_score - t.score <= 0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]


def test_unreachable_goal_is_refused_and_the_float_graph_intact(
    hard: tuple[Path, Calibration], score: Score, tmp_path: Path
) -> None:
    before = hard[0].read_bytes()
    with pytest.raises(AccuracyGateError) as error:
        search(hard, score, tmp_path / "q.onnx", goal=PrecisionGoal(max_drop=1e-5, evaluations=4))
    assert error.value.exit_code == 4
    assert "INT8  float  score" in error.value.message
    assert hard[0].read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_easy_model_needs_two_evaluations(
    mini_onnx: Path, mini_calibration: Any, mini_fcos: ModuleType, pictures: list[Any], tmp_path: Path
) -> None:
    score = Score(mini_onnx, mini_fcos.CONTRACT, pictures)
    found = search((mini_onnx, mini_calibration), score, tmp_path / "q.onnx")
    assert found.chosen.ignored_layers == ()
    assert found.chosen.int8_share == 1.0
    assert score.calls == 2


def test_interrupted_search_resumes(hard: tuple[Path, Calibration], score: Score, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    whole = search(hard, score, tmp_path / "whole.onnx")
    needed, score.calls = score.calls, 0

    def stop(label: str, done: int, total: int) -> None:
        if label == "measuring layers" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(hard, score, tmp_path / "q.onnx", state=state, progress=stop)
    layers: list[int] = []
    found = search(hard, score, tmp_path / "q.onnx", state=state, progress=lambda *step: layers.append(step[1]))
    assert score.calls == needed
    assert found.chosen == whole.chosen
    assert not state.exists()


def test_goals_are_checked() -> None:
    with pytest.raises(ConfigError, match="must not be negative"):
        PrecisionGoal(max_drop=-0.1)


def test_effect_counts_only_locations_that_see_an_object() -> None:
    logits = np.float32([[[-20.0], [0.0]]])
    reference = {
        "cls_logits": logits,
        "distances": np.float32([[[1, 1, 1, 1], [10, 10, 10, 10]]]),
        "centerness": np.zeros((1, 2, 1), np.float32),
    }
    result = {**reference, "distances": np.float32([[[99, 99, 99, 99], [12, 10, 10, 10]]])}
    meter = EffectMeter()
    meter.add(reference, result)
    # One of four sides is off by 2 of a width of 20.
    assert meter.effect.boxes == pytest.approx((0.1**2 / 4) ** 0.5)
    assert (meter.effect.classes, meter.effect.centerness) == (0.0, 0.0)
