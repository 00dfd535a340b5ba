"""A comparison that must find a planted difference, and must not be upset by a tie."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exporters.step_check import compare, provoking_feed, recorded
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import StepCheckError
from fcos_deploy.core.preprocess import PreprocessSpec


def _compare(expected: dict[str, object], actual: dict[str, object], *, tolerance: float = 1e-3) -> object:
    left, right = ({k: np.asarray(v, np.float32) for k, v in o.items()} for o in (expected, actual))
    return compare(lambda _: left, lambda _: right, [{}], step="a step", tolerance=tolerance)


def _rows(scores: list[float], labels: list[int]) -> dict[str, object]:
    boxes = [[10.0 * label, 0, 10.0 * label + 5, 5] for label in labels]
    return {"boxes": [boxes], "scores": [scores], "labels": [labels]}


def test_equal_outputs_pass() -> None:
    assert _compare({"a": [1, 2]}, {"a": [1, 2]}).largest == 0


def test_the_largest_difference_is_named_with_its_place() -> None:
    check = _compare({"a": [[1, 2], [3, 4]], "b": [0]}, {"a": [[1, 2], [3.001, 4]], "b": [0]})
    assert check.where == "a[1, 0]"
    assert check.difference == pytest.approx(1e-3, rel=1e-2)


def test_too_large_a_difference_is_an_error_that_says_where() -> None:
    with pytest.raises(StepCheckError, match=r"'a step' differs from its source .*0\.5 at b\[2\]"):
        _compare({"a": [1], "b": [0, 0, 0]}, {"a": [1], "b": [0, 0, 0.5]})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("before", ["the same", 2.0])
def test_what_is_not_finite_is_an_error_even_on_both_sides(value: float, before: float | str) -> None:
    with pytest.raises(StepCheckError, match=r"a\[1\] is .* (before|after) the step"):
        _compare({"a": [1, value if before == "the same" else before]}, {"a": [1, value]})
    rows = {"boxes": [[[0, 0, 1, 1]]], "scores": [[value]], "labels": [[0]]}
    with pytest.raises(StepCheckError, match=r"scores\[0, 0\] is"):
        _compare(rows, rows)


def test_a_changed_shape_is_an_error() -> None:
    with pytest.raises(StepCheckError, match=r"from shape \(2,\) to \(3,\)"):
        _compare({"a": [1, 2]}, {"a": [1, 2, 3]})


def test_rows_that_swap_on_a_tie_are_equal() -> None:
    check = _compare(_rows([0.5, 0.5, 0.1], [1, 2, 3]), _rows([0.5, 0.5, 0.1], [2, 1, 3]))
    assert (check.unmatched, check.rows) == (0, 3)


def test_rows_that_say_nothing_are_not_compared() -> None:
    assert _compare(_rows([0.5, -1], [1, 2]), _rows([0.5, -1], [1, 3])).rows == 1


def test_rows_of_other_labels_are_an_error() -> None:
    with pytest.raises(StepCheckError, match="3 of 3 rows without a partner"):
        _compare(_rows([0.5, 0.4, 0.3], [1, 2, 3]), _rows([0.5, 0.4, 0.3], [4, 5, 6]))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_feed_is_the_same_each_time_and_reaches_the_extremes(dtype: str) -> None:
    feed, again = (provoking_feed((2, 3, 48, 64), dtype=dtype, image_sizes=True) for _ in range(2))
    images = feed["images"]
    assert (images.dtype, images.shape, feed["image_sizes"].shape) == (dtype, (2, 3, 48, 64), (2, 4))
    assert np.array_equal(images, again["images"])
    assert not np.array_equal(images[0], images[1])
    low, high = (0, 255) if dtype == "uint8" else (-20, 20)
    for rows, dark, bright in (
        (slice(16, 32), slice(0, 32), slice(32, 64)),
        (slice(32, 48), slice(1, 64, 2), slice(0, 64, 2)),
    ):
        assert np.abs(images[0, 0, rows, dark].astype(float) - low).max() < 8
        assert np.abs(images[0, 0, rows, bright].astype(float) - high).max() < 8
    assert np.ptp(images[0, 0, :16].astype(float)) > (200 if dtype == "uint8" else 4)
    assert len(np.unique(images[0, 0, 16:32, :32])) >= 8, "flat areas leave ties to rounding"


def test_a_recorded_runner_answers_for_its_own_feeds_and_keeps_nothing_else() -> None:
    class Session:
        def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"y": feed["x"] * 2}

    session, feeds = Session(), [{"x": np.array([1.0])}, {"x": np.array([3.0])}]
    outputs, alive = recorded(session, feeds), weakref.ref(session)
    del session
    assert alive() is None, "a session holds its weights"
    for _ in range(2):
        assert [outputs(feed)["y"][0] for feed in feeds] == [2.0, 6.0]


def _nms_runner(shift: float, *, faulty: bool = False) -> Callable[[object], dict[str, np.ndarray]]:
    """Pairs of boxes of two sizes whose scores tie but for ``shift``, with what the detections are made from."""
    torch = pytest.importorskip("torch")
    from fcos_deploy.model.fcos import LevelOutput
    from fcos_deploy.model.tails import ExportableFcos, Survivors

    grid = torch.arange(16 * 16).reshape(1, 1, 16, 16)
    even = (grid % 2 == 0).to(torch.float32)
    logits = 1.0 + grid // 2 * 0.01 + even * shift
    distances = (4.0 + 3.0 * even).expand(1, 4, 16, 16)

    def model(_images: object) -> list[LevelOutput]:
        return [LevelOutput(logits, distances, torch.full((1, 1, 16, 16), 9.0))]

    def keep_all(candidates: Any, **_: object) -> Survivors:
        return Survivors(candidates.scores > 0, candidates.scores[:, :1] < 2)

    network = torch.nn.Module()
    network.forward = model
    module = ExportableFcos(network, NMS, suppression=keep_all if faulty else None, with_sources=True).eval()

    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = module(torch.from_numpy(feed["images"]))
        return {name: tensor.numpy() for name, tensor in zip(module.output_names, tensors, strict=True)}

    return run


NMS = ModelContract(
    class_names=("a",),
    preprocess=PreprocessSpec(mean=(0, 0, 0), std=(1, 1, 1), height=128, width=128),
    decode=DecodeSpec(profile=PROFILES["detectron2"], score_threshold=0.1, iou_threshold=0.1, strides=(8,)),
    tail=Tail.NMS,
)


def test_a_rounding_that_lets_another_box_win_is_no_difference_but_wrong_suppression_is() -> None:
    feed = {"images": np.zeros((1, 3, 128, 128), np.uint8)}
    before, after = _nms_runner(3e-5), _nms_runner(-3e-5)
    assert not np.allclose(before(feed)["boxes"], after(feed)["boxes"], atol=1)
    check = compare(before, after, [feed], step="export", tolerance=1e-3, contract=NMS)
    assert check.unmatched == 0
    assert check.rows > 40
    with pytest.raises(StepCheckError, match="rows without a partner"):
        compare(before, _nms_runner(3e-5, faulty=True), [feed], step="export", tolerance=1e-3, contract=NMS)
