"""The pass over the images: what it measures, how it resumes, what it refuses."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration.calibrate import CalibrationRequest, StatisticsOptions, calibrate, collect_histograms, collect_ranges
from calibration.dataset import CalibrationSet, SampleOptions, collect_images
from calibration.execution import ENGINES, Feeder, expose, memory_groups, open_engine, pick_engine
from calibration.placement import load_graph
from fcos_deploy.core.contract import read_contract
from fcos_deploy.core.errors import CalibrationError, ConfigError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OPTIONS = StatisticsOptions(engine="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def images(smooth_images: Path) -> CalibrationSet:
    return collect_images(smooth_images)


def test_extremes_are_those_of_the_graph(mini_onnx: Path, mini_fcos: ModuleType, images: CalibrationSet) -> None:
    histograms = collect_histograms(mini_onnx, images, options=OPTIONS)
    graph = load_graph(mini_onnx)
    run = open_engine("onnxruntime", expose(graph.model, ["block", "p3"]))
    feeder = Feeder(graph.model, mini_fcos.CONTRACT)
    seen = [run(feeder(image.read())) for image in images.images]
    for name in ("block", "p3"):
        values = np.concatenate([s[name].ravel() for s in seen])
        # Exposing other tensors changes what the runtime fuses, and with it the last bits.
        assert histograms[name].minimum == pytest.approx(float(values.min()), rel=1e-5)
        assert histograms[name].maximum == pytest.approx(float(values.max()), rel=1e-5)
        assert histograms[name].elements == values.size


def test_levels_that_share_a_head_have_ranges_of_their_own(mini_calibration: Any) -> None:
    first, second = (mini_calibration.tensors[f"p{level}"].maximum for level in (3, 4))
    assert first != second


def test_groups_of_tensors_give_the_same_histograms(mini_onnx: Path, images: CalibrationSet) -> None:
    whole = collect_histograms(mini_onnx, images, options=OPTIONS)
    parts = collect_histograms(
        mini_onnx, images, options=StatisticsOptions(engine="onnxruntime", threads=1, memory=100_000)
    )
    # Exposing other tensors changes what the runtime fuses, and with it the last bits.
    for name, histogram in whole.items():
        assert parts[name].amax == pytest.approx(histogram.amax, rel=1e-5)
        assert parts[name].elements == histogram.elements


def test_memory_does_not_grow_with_the_number_of_images(mini_onnx: Path, images: CalibrationSet) -> None:
    def peak(some: CalibrationSet) -> int:
        tracemalloc.start()
        try:
            collect_histograms(mini_onnx, some, options=OPTIONS)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(images)  # What is imported on first use is not of the pass.
    assert peak(replace(images, images=images.images * 8)) < 1.05 * peak(images)


def test_a_short_pass_takes_the_first_engine_and_a_long_one_the_fastest(
    mini_onnx: Path, images: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = load_graph(mini_onnx)
    feeds = Feeder(graph.model, read_contract(mini_onnx))(images.images[0].read())
    opened = []

    def watched(name: str, model: Any, *, threads: int | None = None) -> Any:
        opened.append(name)
        return open_engine(name, model, threads=threads)

    monkeypatch.setattr("calibration.execution.open_engine", watched)
    assert pick_engine(graph.model, feeds, images=1, threads=1) == "onnxruntime"
    assert opened == ["onnxruntime"]
    pick_engine(graph.model, feeds, images=10**9, threads=1)
    assert opened == ["onnxruntime", *ENGINES]


def test_groups_stay_within_memory(mini_onnx: Path) -> None:
    graph = load_graph(mini_onnx)
    names = [name for name in graph.activations() if name != "images"]
    one, many = (memory_groups(graph.model, names, memory=m) for m in (1 << 30, 100_000))
    assert one == [names]
    assert 2 < len(many) < len(names)
    assert [name for group in many for name in group] == names


def test_a_tensor_larger_than_the_memory_is_alone() -> None:
    value = onnx.helper.make_tensor_value_info
    big = [1, 1024, 1024]
    nodes = [onnx.helper.make_node("Relu", [a], [b]) for a, b in (("x", "y"), ("y", "z"), ("z", "out"))]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, big)], [value("out", 1, big)])
    assert memory_groups(onnx.helper.make_model(graph), ["y", "z"], memory=1 << 20) == [["y"], ["z"]]


def test_resumed_pass_keeps_its_engine(mini_onnx: Path, images: CalibrationSet, tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    options = StatisticsOptions(engine="onnxruntime", threads=1, save_every=0.0)
    collect_histograms(mini_onnx, images, options=options, state=state)
    found = collect_ranges(mini_onnx, images, options=StatisticsOptions(threads=1), state=state)
    assert found.engine == "onnxruntime"


def test_engines_agree(mini_onnx: Path, images: CalibrationSet) -> None:
    pytest.importorskip("openvino")
    one = collect_histograms(mini_onnx, images, options=OPTIONS)
    other = collect_histograms(mini_onnx, images, options=StatisticsOptions(engine="openvino", threads=1))
    for name, histogram in one.items():
        assert other[name].amax == pytest.approx(histogram.amax, rel=1e-3), name


def test_auto_takes_an_engine_that_is_there(mini_onnx: Path, images: CalibrationSet) -> None:
    assert collect_ranges(mini_onnx, images, options=StatisticsOptions(threads=1)).tensors


def test_unknown_engine(mini_onnx: Path, images: CalibrationSet) -> None:
    with pytest.raises(ConfigError, match="no calibration engine 'abacus'"):
        collect_ranges(mini_onnx, images, options=StatisticsOptions(engine="abacus"))


class _KillError(Exception):
    """Stands for a kill."""


def test_interrupted_pass_resumes_with_the_same_result(mini_onnx: Path, images: CalibrationSet, tmp_path: Path) -> None:
    options = StatisticsOptions(engine="onnxruntime", threads=1, save_every=0.0)
    state = tmp_path / "state.npz"

    def stop(label: str, done: int, total: int) -> None:
        if done == 7:
            raise _KillError

    with pytest.raises(_KillError):
        collect_ranges(mini_onnx, images, options=options, state=state, progress=stop)
    assert state.is_file()
    done: list[int] = []
    resumed = collect_ranges(
        mini_onnx, images, options=options, state=state, progress=lambda *step: done.append(step[1])
    )
    assert done[0] == 7
    assert resumed == collect_ranges(mini_onnx, images, options=options)
    assert not state.exists()


def test_state_of_other_images_is_not_used(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    options = StatisticsOptions(engine="onnxruntime", threads=1, save_every=0.0)
    collect_histograms(mini_onnx, collect_images(smooth_images), options=options, state=state)
    done: list[int] = []
    fewer = collect_images(smooth_images, options=SampleOptions(count=9))
    collect_histograms(mini_onnx, fewer, options=options, state=state, progress=lambda *step: done.append(step[1]))
    assert done[0] == 0


def test_damaged_state_starts_again(mini_onnx: Path, images: CalibrationSet, tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    state.write_bytes(b"PK\x03\x04 torn")
    assert collect_ranges(mini_onnx, images, options=OPTIONS, state=state).tensors


def changed(source: Path, target: Path, name: str, value: float) -> Path:
    """The graph with one weight filled with a value."""
    model = onnx.load(str(source))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            shape = onnx.numpy_helper.to_array(tensor).shape
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(shape, value, np.float32), name))
    onnx.save(model, str(target))
    return target


def test_nan_names_tensor_and_image(mini_onnx: Path, images: CalibrationSet, tmp_path: Path) -> None:
    broken = changed(mini_onnx, tmp_path / "nan.onnx", "block.b.weight", float("nan"))
    with pytest.raises(CalibrationError, match=r"Tensor '(b|block)' for the image '.*01\.png'.*not finite"):
        collect_ranges(broken, images, options=OPTIONS)


def test_dead_tensor_is_an_empty_range(mini_onnx: Path, images: CalibrationSet, tmp_path: Path) -> None:
    dead = changed(mini_onnx, tmp_path / "a.onnx", "block.a.weight", 0.0)
    dead = changed(dead, tmp_path / "dead.onnx", "block.a.bias", -1.0)
    with pytest.raises(CalibrationError, match=r"Tensor 'a_relu'.*range is empty.*12 images"):
        collect_ranges(dead, images, options=OPTIONS)


def test_truncated_graph(mini_onnx: Path, images: CalibrationSet, tmp_path: Path) -> None:
    (tmp_path / "half.onnx").write_bytes(mini_onnx.read_bytes()[:5000])
    with pytest.raises(Exception, match=r"half\.onnx' is not a complete ONNX"):
        collect_ranges(tmp_path / "half.onnx", images, options=OPTIONS)


def test_calibrate_writes_a_report_with_convergence(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    request = CalibrationRequest(
        model=mini_onnx,
        images=smooth_images,
        output=tmp_path / "calibration.json",
        engine="onnxruntime",
        threads=1,
        convergence=True,
        evaluation_images=smooth_images,
    )
    report = calibrate(request)
    assert [point.images for point in report.convergence] == [1, 3, 6, 12]
    assert report.convergence[-1].largest_change == 0.0
    assert report.convergence[0].largest_change > report.convergence[2].largest_change
    assert len(report.images.overlap) == 12
    assert (tmp_path / "calibration.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]
