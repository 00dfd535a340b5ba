"""The compiled loops of the host path against NumPy's: the same bits, whatever comes in."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import (
    ALL_CANDIDATES,
    PROFILES,
    BoxFilter,
    DecodeSpec,
    HeadOutputs,
    best_first,
    decode,
    level_sizes,
)
from fcos_deploy.core.detections import Postprocessor, Suppression, postprocess, suppress
from fcos_deploy.core.errors import BackendError, ConfigError
from fcos_deploy.core.native import SWITCH, _exponential, _load, library_problem, native
from fcos_deploy.core.preprocess import ChannelOrder, Letterbox, PreprocessSpec, SizeRule, preprocess

ROOT = Path(__file__).parents[2]
SIZE, STRIDES = (96, 128), (8, 16, 32, 64, 128)

compiled = pytest.mark.skipif(
    bool(library_problem()) and "native" not in os.environ.get("FCOS_DEPLOY_REQUIRE", ""), reason=library_problem()
)


@pytest.fixture(autouse=True, scope="module")
def _switch_is_restored() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "")
        yield


def both(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What it returns with NumPy's loops, and with the compiled ones."""
    results = []
    for switch in ("0", "1"):
        os.environ[SWITCH] = switch
        with np.errstate(all="ignore"):
            results.append(call())
    return results[0], results[1]


def assert_same_bits(expected: np.ndarray, actual: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.dtype.kind == "f":  # of NaN the payload is the processor's affair
        expected, actual = (np.where(np.isnan(values), np.float32(np.nan), values) for values in (expected, actual))
    assert actual.tobytes() == expected.tobytes()


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(-3, 2, shape)


def _all_pass(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(3, 1, shape)


def _ties(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-4, 3, shape) / 2


def _at_the_threshold(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.log(0.05 / 0.95) + rng.integers(-3, 4, shape) * 2.0**-22


def _not_finite(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.normal(0, 3, shape)
    chosen = rng.random(shape)
    values[chosen < 0.03], values[chosen > 0.97] = np.nan, np.inf
    values[(chosen > 0.45) & (chosen < 0.5)] = -np.inf
    values[(chosen > 0.5) & (chosen < 0.52)] = np.copysign(np.nan, -1)
    return values


def _extreme(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice([0.0, -0.0, 1e-30, 88.0, -88.0, 6e4, -6e4, 6e-8], shape)


def _none_pass(_rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, -20.0)


LOGITS = (_random, _all_pass, _ties, _at_the_threshold, _not_finite, _extreme, _none_pass)


@compiled
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("make", LOGITS, ids=lambda make: make.__name__.strip("_"))
def test_decoding_has_the_same_bits(make: Callable[..., np.ndarray], profile: Any) -> None:
    count = sum(rows * columns for rows, columns in level_sizes(*SIZE, strides=STRIDES))
    for seed, (classes, top_k, threshold, dtype) in enumerate(
        (
            *((1, 1000, 0.05, np.float32), (3, 20, 0.05, np.float32), (80, 50, 0.05, np.float32)),
            *((3, ALL_CANDIDATES, 0.05, np.float32), (7, 1, 0.0, np.float32), (20, 30, 0.2, np.float32)),
            *((3, 20, 0.05, np.float16), (80, 50, 0.05, np.float16), (17, 5, 0.0, np.float16)),
        )
    ):
        rng = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            head = HeadOutputs(
                make(rng, (count, classes)).astype(dtype),
                np.abs(make(rng, (count, 4)) * 20).astype(dtype),
                make(rng, (count, 1)).astype(dtype),
            )
        spec = DecodeSpec(
            profile=profile, score_threshold=threshold, iou_threshold=0.6, pre_nms_top_k=top_k, strides=STRIDES
        )
        expected, actual = both(lambda head=head, spec=spec: decode(head, spec, input_size=SIZE))
        for name in ("boxes", "scores", "channels"):
            assert_same_bits(getattr(expected, name), getattr(actual, name))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("make", LOGITS, ids=lambda make: make.__name__.strip("_"))
def test_the_shortcut_for_crowded_images_changes_no_bit(
    make: Callable[..., np.ndarray], profile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = sum(rows * columns for rows, columns in level_sizes(*SIZE, strides=STRIDES))
    rng = np.random.default_rng(0)
    shapes = ((count, 20), (count, 4), (count, 1))
    head = HeadOutputs(*(make(rng, shape).astype(np.float32) for shape in shapes))
    loops = ("0",) if library_problem() else ("0", "1")
    for threshold, top_k in ((0.0, 1), (0.0, 30), (0.05, 30), (0.6, 100)):
        spec = DecodeSpec(
            profile=profile, score_threshold=threshold, iou_threshold=0.6, pre_nms_top_k=top_k, strides=STRIDES
        )
        results = []
        for switch, room in itertools.product(loops, (head.cls_logits.size, 200, 0)):
            monkeypatch.setenv(SWITCH, switch)
            monkeypatch.setattr("fcos_deploy.core.decode._room", lambda _logits, room=room: room)
            with np.errstate(all="ignore"):
                results.append(decode(head, spec, input_size=SIZE))
        for result, name in itertools.product(results[1:], ("boxes", "scores", "channels")):
            assert_same_bits(getattr(results[0], name), getattr(result, name))


@compiled
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("make", [_random, _all_pass, _ties, _extreme, _none_pass], ids=lambda make: make.__name__[1:])
def test_detections_have_the_same_bits(make: Callable[..., np.ndarray], profile: Any) -> None:
    count = sum(rows * columns for rows, columns in level_sizes(*SIZE, strides=STRIDES))
    before_nms = profile.box_filter is BoxFilter.BEFORE_NMS
    for seed, (classes, dtype, limit, changes, box) in enumerate(
        (
            (1, np.float32, 100, {}, Letterbox(*SIZE, *SIZE)),
            (3, np.float32, 7, {"class_agnostic": True, "label_map": (9, 4, 4)}, Letterbox(500, 333, 90, 61)),
            (20, np.float16, 100, {"pre_nms_top_k": 40}, Letterbox(31, 41, 93, 123)),
            (3, np.float32, 1000, {"min_box_size": 6.5} if before_nms else {}, Letterbox(90, 80, 90, 80)),
            (3, np.float32, 1, {"min_box_size": -1.0, "iou_threshold": 1e-3}, Letterbox(7, 9, 1, 1)),
        )
    ):
        rng = np.random.default_rng(seed)
        outputs = {
            "cls_logits": make(rng, (1, count, classes)),
            "distances": np.abs(make(rng, (1, count, 4)) * 5),
            "centerness": make(rng, (1, count, 1)),
        }
        with np.errstate(over="ignore"):
            outputs = {name: np.minimum(values, 6e4).astype(dtype) for name, values in outputs.items()}
        options = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_detections": limit, **changes}
        contract = ModelContract(
            class_names=tuple(map(str, range(classes))),
            preprocess=PreprocessSpec(mean=(0.0,) * 3, std=(1.0,) * 3, height=SIZE[0], width=SIZE[1]),
            decode=DecodeSpec(profile=profile, strides=STRIDES, **options),  # type: ignore[arg-type]  # the test's own
        )
        finish = functools.partial(postprocess, outputs, contract, index=0, input_size=SIZE, letterbox=box)
        expected, actual = both(finish)
        with pytest.MonkeyPatch.context() as patch:  # more pairs than one scan has room for
            patch.setattr("fcos_deploy.core.decode._room", lambda _logits: 9)
            crowded = both(finish)[1]
        for result, name in itertools.product((actual, crowded), ("boxes", "scores", "labels")):
            assert_same_bits(getattr(expected, name), getattr(result, name))
        again = Postprocessor(outputs, contract, index=0, input_size=SIZE, letterbox=box)
        for values in outputs.values():
            values[:] = values[:, ::-1].copy()
        first = again()
        for name in ("boxes", "scores", "labels"):
            assert_same_bits(getattr(both(finish)[0], name), getattr(first, name))
        assert actual.boxes.base is None  # and not a part of what all candidates took
        for (name, values), value in itertools.product(outputs.items(), (np.nan, np.inf, -np.inf)):
            values[0, -1, -1] = value
            for switch in ("0", "1"):
                os.environ[SWITCH] = switch
                with pytest.raises(BackendError, match=f"'{name}' of image 0 is not finite: 1 of"):
                    finish()
            values[0, -1, -1] = 0


@compiled
@pytest.mark.parametrize("classes", [3, 5000])  # fewer and more than are looked through at a time
@pytest.mark.parametrize("missing", [-1, 0, 1, 70])
def test_what_passes_beyond_the_capacity_is_only_counted(
    classes: int, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native()
    assert library is not None
    passing = 2 * classes + 1
    capacity = passing - missing if missing < 70 else 5
    flat, values = np.full(capacity + 64 + passing, -7, np.int32), np.full(2 * passing + 8, -7, np.float32)
    scratch = type("_Scratch", (), {"of_capacity": lambda _self, _capacity: (flat, values)})()
    monkeypatch.setattr(library, "_scratch", scratch)
    logits = np.ones((5, classes), np.float32)
    logits[:2] = logits[4, -1] = 3
    ends, bounds = np.array([3, 5], np.int64), np.full(1, 2, np.float32)
    scan = library.scan(logits, np.zeros(5, np.float32), bounds, ends=ends, capacity=capacity)
    assert (scan.counts.tolist(), scan.complete, scan.finite) == ([2 * classes, 1], missing <= 0, True)
    assert scan.flat.tolist() == ([*range(2 * classes), 5 * classes - 1] if missing <= 0 else [])
    assert (flat[capacity + 64 :] == -7).all()
    assert (values[2 * capacity :] == -7).all()


@compiled
@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    new_size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    padding=st.integers(0, 2),
    order=st.sampled_from(ChannelOrder),
    seed=st.integers(0, 2**32 - 1),
)
def test_resized_pixels_are_those_of_opencv(
    size: tuple[int, int], new_size: tuple[int, int], padding: int, order: ChannelOrder, seed: int
) -> None:
    channels = 1 if order is ChannelOrder.GRAY else 3
    spec = PreprocessSpec(
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        height=new_size[0] + padding,
        width=new_size[1] + padding,
        size_divisor=1,
        size_rule=SizeRule.STRETCH,
        content=new_size,
        channel_order=order,
    )
    rows = np.random.default_rng(seed).integers(0, 256, (size[0], size[1] + padding, 3), dtype=np.uint8)
    for view in (rows[:, : size[1]], rows[:, : size[1]][:, ::-1]):  # the second one is left to OpenCV
        assert_same_bits(*both(lambda view=view: preprocess(view, spec)[0]))


@compiled
def test_only_the_memory_of_numpys_arrays_is_read() -> None:
    library = native()
    assert library is not None
    resizer = library.resizer((4, 4), list(np.empty((3, 9, 9), np.uint8)))
    if resizer is not None:  # with AVX2
        assert resizer(np.zeros((4, 4, 3), np.uint8))
        assert not resizer(type("Lookalike", (), {"shape": (4, 4, 3), "dtype": np.dtype(np.uint8)})())


@compiled
def test_a_view_of_a_larger_array_is_decoded_as_its_copy() -> None:
    count = sum(rows * columns for rows, columns in level_sizes(*SIZE, strides=STRIDES))
    wide = np.random.default_rng(0).normal(-2, 2, (count, 16)).astype(np.float32)
    head = HeadOutputs(wide[:, 2:5], np.abs(wide[:, 6:10]), wide[:, 11:12])
    spec = DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.05, iou_threshold=0.6, strides=STRIDES)
    expected, actual = both(lambda: decode(head, spec, input_size=SIZE))
    assert len(actual.scores) > 0
    assert_same_bits(expected.boxes, actual.boxes)


@compiled
@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(0, 500),
    classes=st.sampled_from([1, 3, 80]),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["random", "whole", "tiny", "huge", "not finite", "inverted", "equal"]),
    levels=st.sampled_from([0, 3]),
    rule=st.builds(
        Suppression,
        iou_threshold=st.sampled_from([1e-6, 0.3, 0.5, 0.6, 0.95, 1.0]),
        limit=st.sampled_from([1, 7, 100, 10_000]),
        iou_offset=st.sampled_from([0.0, 1.0]),
        keep_ties=st.booleans(),
    ),
)
def test_suppression_keeps_the_same_boxes(
    count: int, classes: int, seed: int, kind: str, levels: int, rule: Suppression
) -> None:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 100, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(0, 60, (count, 2))), axis=1)
    scores = rng.random(count)
    if kind == "whole":
        boxes = boxes.round()
    elif kind in ("tiny", "huge"):  # areas below the smallest and above the largest float32
        boxes *= 1e-24 if kind == "tiny" else 2e17
    elif kind == "inverted":
        boxes = boxes[:, [2, 1, 0, 3]]
    elif kind == "equal":
        boxes[:] = boxes[:1]
    elif kind == "not finite":
        chosen = rng.random(boxes.shape)
        boxes[chosen < 0.02], boxes[chosen > 0.98] = np.nan, np.inf
        scores[rng.random(count) < 0.02] = np.nan
    if levels:
        scores = (scores * levels).round() / levels
    labels = rng.integers(-1, classes - 1, count)
    kept = both(lambda: suppress(boxes.astype(np.float32), scores.astype(np.float32), labels=labels, rule=rule))
    assert kept[0].tolist() == kept[1].tolist()


@compiled
@pytest.mark.parametrize("count", [0, 1, 40, 3000])
@pytest.mark.parametrize("limit", [1, 63, 1000, 5000])
def test_the_best_scores_are_the_same_ones_in_the_same_order(count: int, limit: int) -> None:
    rng = np.random.default_rng(count + limit)
    scores = rng.integers(0, 300, count).astype(np.float32) / 300
    scores[::97] = np.nan
    assert_same_bits(*both(lambda: best_first(scores, limit=limit)))


@compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_seen_wherever_it_stands(value: float, dtype: type[np.floating[Any]]) -> None:
    library = native()
    assert library is not None
    values = np.full(131, np.finfo(dtype).max, dtype)
    values[::2] = np.finfo(dtype).min
    values[5] = np.finfo(dtype).smallest_subnormal
    assert library.all_finite(values)
    for index in (0, 17, 128, 130):
        spoilt = values.copy()
        spoilt[index] = value
        assert not library.all_finite(spoilt)


@compiled
def test_suppression_of_more_boxes_than_a_sort_treats_one_by_one() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 3000, (20_000, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(5, 90, (20_000, 2))), axis=1).astype(np.float32)
    scores = (rng.integers(0, 4000, 20_000) / 4000).astype(np.float32)
    rule = Suppression(iou_threshold=0.5, limit=3000)
    kept = both(lambda: suppress(boxes, scores, labels=rng.integers(0, 1, 20_000), rule=rule))
    assert len(kept[0]) == 3000
    assert kept[0].tolist() == kept[1].tolist()


def test_without_numpys_own_exponentials_the_library_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcos_deploy.core.native._exponential", lambda: None)
    library, problem = _load.__wrapped__()
    assert library is None
    assert problem
    monkeypatch.undo()
    loop = _exponential()
    monkeypatch.setattr(np, "exp", np.tanh)
    assert loop != _exponential()
    monkeypatch.setattr(sys, "implementation", type("", (), {"name": "pypy"}))
    assert _exponential() is None


def test_the_switch_chooses_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    assert native() is None
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ConfigError, match="must be 0 or 1, got 'yes'"):
        native()


@pytest.mark.parametrize(
    ("file", "problem"), [("", "not compiled"), ("text", "does not load"), ("other", "does not load: .*host_interface")]
)
def test_without_a_usable_library_numpy_works_and_the_doctor_says_why(tmp_path: Path, file: str, problem: str) -> None:
    """In a copy of the package: without the library, with a damaged one, with one that is something else."""
    package = shutil.copytree(
        ROOT / "fcos_deploy", tmp_path / "fcos_deploy", ignore=shutil.ignore_patterns("*.so", "*.jpg")
    )
    library = package / "core" / "c" / "host.so"
    if file == "text":
        library.write_text("no library")
    elif file == "other":
        import _ctypes

        shutil.copy(_ctypes.__file__, library)
    program = (
        "import fcos_deploy.core.native as n; from fcos_deploy.targets.doctor import _host_path as f; import re, sys\n"
        f"assert n.__file__.startswith({str(tmp_path)!r}) and n.native() is None\n"
        f"assert f().health == 'absent' and re.search({problem!r}, f().detail), f()\n"
        f"import os; os.environ['{SWITCH}'] = '1'\n"
        "from fcos_deploy.core.errors import ConfigError\n"
        "try: n.native()\n"
        "except ConfigError as error: sys.exit(0)\n"
        "sys.exit('not refused')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    environment.pop(SWITCH, None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
