"""The pass over the images: what it measures, how it resumes, what it refuses."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.cache import Calibration, load_calibration, save_calibration, write_trt_cache
from calibration.calibrate import CalibrationRequest, StatisticsOptions, calibrate, collect_ranges
from calibration.dataset import CalibrationSet, SampleOptions, collect_images
from calibration.execution import ENGINES, Feeder, expose, memory_groups, open_engine, pick_engine
from calibration.placement import PLACEMENTS, ConvGraph, open_graph
from calibration.qdq import quantize_qdq
from calibration.ranges import Histogram
from fcos_deploy.core.errors import BackendLoadError, CalibrationError, ConfigError
from fcos_deploy.core.serialize import to_json

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OPTIONS = StatisticsOptions(engine="onnxruntime", threads=1)


@pytest.fixture(scope="module")
def images(smooth_images: Path) -> CalibrationSet:
    return collect_images(smooth_images)


@pytest.fixture(scope="module")
def histograms(mini_graph: ConvGraph, images: CalibrationSet) -> dict[str, Histogram]:
    return histograms_of(mini_graph, images)


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the state after every image."""
    monkeypatch.setattr("calibration.calibrate._SAVE_INTERVAL", 0.0)


def histograms_of(graph: ConvGraph, images: CalibrationSet, **options: Any) -> dict[str, Histogram]:
    last: dict[str, Histogram] = {}
    options = {"engine": "onnxruntime", "threads": 1, **options}
    collect_ranges(graph, images, options=StatisticsOptions(**options), observer=lambda _, seen: last.update(seen))
    return last


def test_extremes_are_those_of_the_graph(
    mini_graph: ConvGraph, histograms: dict[str, Histogram], images: CalibrationSet
) -> None:
    feeder = Feeder(mini_graph.source)
    with open_engine("onnxruntime", expose(mini_graph.source.model, ["block", "p3"])) as session:
        seen = [session.run(feeder(image.read())) for image in images.images]
    for name in ("block", "p3"):
        values = np.concatenate([s[name].ravel() for s in seen])
        # Exposing other tensors changes what the runtime fuses, and with it the last bits.
        assert histograms[name].minimum == pytest.approx(float(values.min()), rel=1e-5)
        assert histograms[name].maximum == pytest.approx(float(values.max()), rel=1e-5)
        assert histograms[name].elements == values.size


def test_levels_that_share_a_head_have_ranges_of_their_own(mini_calibration: Any) -> None:
    first, second = (mini_calibration.tensors[f"p{level}"].maximum for level in (3, 4))
    assert first != second


def test_groups_of_tensors_give_the_same_histograms(
    mini_graph: ConvGraph, histograms: dict[str, Histogram], images: CalibrationSet
) -> None:
    parts = histograms_of(mini_graph, images, memory=100_000)
    # Exposing other tensors changes what the runtime fuses, and with it the last bits.
    for name, histogram in histograms.items():
        assert parts[name].amax == pytest.approx(histogram.amax, rel=1e-5)
        assert parts[name].elements == histogram.elements


def test_memory_does_not_grow_with_the_number_of_images(mini_graph: ConvGraph, images: CalibrationSet) -> None:
    def peak(some: CalibrationSet) -> int:
        tracemalloc.start()
        try:
            collect_ranges(mini_graph, some, options=OPTIONS)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(images)  # What is imported on first use is not of the pass.
    assert peak(replace(images, images=images.images * 8)) < 1.05 * peak(images)


def test_a_short_pass_takes_the_first_engine_and_a_long_one_any_that_is_faster(
    mini_graph: ConvGraph, images: CalibrationSet
) -> None:
    feeds = Feeder(mini_graph.source)(images.images[0].read())
    assert pick_engine(mini_graph.source.model, feeds, images=1, threads=1) == "onnxruntime"
    assert pick_engine(mini_graph.source.model, feeds, images=10**9, threads=1) in ENGINES


def test_groups_stay_within_memory(mini_graph: ConvGraph) -> None:
    names = [name for name in mini_graph.activations if name != "images"]
    whole, many = (memory_groups(mini_graph.source.model, names, memory=m) for m in (1 << 30, 100_000))
    assert whole == [names]
    assert 2 < len(many) < len(names)
    assert [name for group in many for name in group] == names


def test_a_tensor_larger_than_the_memory_is_alone() -> None:
    value = onnx.helper.make_tensor_value_info
    big = [1, 1024, 1024]
    nodes = [onnx.helper.make_node("Relu", [a], [b]) for a, b in (("x", "y"), ("y", "z"), ("z", "out"))]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", 1, big)], [value("out", 1, big)])
    assert memory_groups(onnx.helper.make_model(graph), ["y", "z"], memory=1 << 20) == [["y"], ["z"]]


def test_engines_agree(mini_graph: ConvGraph, histograms: dict[str, Histogram], images: CalibrationSet) -> None:
    pytest.importorskip("openvino")
    others = histograms_of(mini_graph, images, engine="openvino")
    for name, histogram in histograms.items():
        assert others[name].amax == pytest.approx(histogram.amax, rel=1e-3), name


def test_auto_takes_an_engine_that_is_there(mini_graph: ConvGraph, images: CalibrationSet) -> None:
    assert collect_ranges(mini_graph, images, options=StatisticsOptions(threads=1)).engine in ENGINES


def test_unknown_engine(mini_graph: ConvGraph, images: CalibrationSet) -> None:
    with pytest.raises(ConfigError, match="no calibration engine 'abacus'"):
        collect_ranges(mini_graph, images, options=StatisticsOptions(engine="abacus"))


class _KillError(Exception):
    """Stands for a kill."""


def interrupt(graph: ConvGraph, images: CalibrationSet, state: Path, *, after: int) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if done == after:
            raise _KillError

    with pytest.raises(_KillError):
        collect_ranges(graph, images, options=OPTIONS, state=state, progress=stop)
    assert state.is_file()


@pytest.mark.usefixtures("save_always")
def test_interrupted_pass_resumes_with_its_engine_and_the_same_result(
    mini_graph: ConvGraph, images: CalibrationSet, tmp_path: Path
) -> None:
    state = tmp_path / "state.npz"
    interrupt(mini_graph, images, state, after=7)
    done: list[int] = []
    options = StatisticsOptions(threads=1)  # any engine
    resumed = collect_ranges(
        mini_graph, images, options=options, state=state, progress=lambda *step: done.append(step[1])
    )
    assert done[0] == 7
    assert resumed == collect_ranges(mini_graph, images, options=OPTIONS)
    assert not state.exists()


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize("change", ["images", "engine"])
def test_state_of_other_images_or_another_engine_is_not_used(
    change: str, mini_graph: ConvGraph, images: CalibrationSet, smooth_images: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.npz"
    interrupt(mini_graph, images, state, after=4)
    done: list[int] = []
    options = OPTIONS
    if change == "images":
        images = collect_images(smooth_images, options=SampleOptions(count=9))
    else:
        pytest.importorskip("openvino")
        options = replace(OPTIONS, engine="openvino")
    collect_ranges(mini_graph, images, options=options, state=state, progress=lambda *step: done.append(step[1]))
    assert done[0] == 0


def test_damaged_state_starts_again(mini_graph: ConvGraph, images: CalibrationSet, tmp_path: Path) -> None:
    state = tmp_path / "state.npz"
    state.write_bytes(b"PK\x03\x04 torn")
    assert collect_ranges(mini_graph, images, options=OPTIONS, state=state).tensors


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
        collect_ranges(open_graph(broken), images, options=OPTIONS)


@pytest.mark.parametrize("placement", sorted(PLACEMENTS))
def test_a_tensor_that_is_always_zero_keeps_its_layers_in_float(
    placement: str, mini_onnx: Path, images: CalibrationSet, tmp_path: Path
) -> None:
    dead = changed(mini_onnx, tmp_path / "a.onnx", "block.a.weight", 0.0)
    graph = open_graph(changed(dead, tmp_path / "dead.onnx", "block.a.bias", -1.0))
    ranges = collect_ranges(graph, images, options=OPTIONS)
    save_calibration(ranges, tmp_path / "c.json")
    assert load_calibration(tmp_path / "c.json").zero_tensors == ("a_relu",)
    write_trt_cache(ranges, graph, tmp_path / "c.cache", version="10.3.0")
    assert "a_relu:" not in (tmp_path / "c.cache").read_text()
    result = quantize_qdq(graph, ranges, tmp_path / "q.onnx", placement=PLACEMENTS[placement])
    assert {"n_a", "n_b"} <= set(result.float_convolutions)
    assert "n_c3_conv" in result.int8_convolutions
    assert result.record["zero_for_every_image"] == "a_relu"


def test_a_graph_that_gives_nothing_but_zeros_is_refused(
    mini_onnx: Path, images: CalibrationSet, tmp_path: Path
) -> None:
    dead = changed(mini_onnx, tmp_path / "a.onnx", "block.a.weight", 0.0)
    graph = open_graph(changed(dead, tmp_path / "dead.onnx", "block.a.bias", -1.0))
    with pytest.raises(CalibrationError, match="Every tensor is zero for all 12 images"):
        collect_ranges(replace(graph, activations=("a_relu",)), images, options=OPTIONS)


@pytest.mark.parametrize(("field", "value"), [("minimum", "NaN"), ("amax", "Infinity"), ("high", "Infinity")])
def test_numbers_that_are_not_finite_are_refused(
    field: str, value: str, mini_calibration: Calibration, tmp_path: Path
) -> None:
    content = to_json(mini_calibration)
    tensor = content["tensors"]["block"]
    (tensor if field in tensor else tensor["ranges"]["minmax"])[field] = float(value)
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="The ranges of tensor 'block' are not finite"):
        load_calibration(tmp_path / "c.json")


def test_truncated_graph(mini_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "half.onnx").write_bytes(mini_onnx.read_bytes()[:5000])
    with pytest.raises(BackendLoadError, match=r"half\.onnx' is not a complete ONNX"):
        open_graph(tmp_path / "half.onnx")


def test_a_tensorrt_version_without_a_cache_is_refused_before_the_pass(
    mini_onnx: Path, smooth_images: Path, tmp_path: Path
) -> None:
    request = CalibrationRequest(
        model=mini_onnx, images=smooth_images, output=tmp_path / "c.json", tensorrt_version="11.0.0"
    )
    with pytest.raises(ConfigError, match=r"TensorRT 11\.0\.0 takes no calibration cache"):
        calibrate(request)
    assert list(tmp_path.iterdir()) == []


def test_calibrate_writes_a_report_with_convergence(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    request = CalibrationRequest(
        model=mini_onnx,
        images=smooth_images,
        output=tmp_path / "calibration.json",
        engine="onnxruntime",
        threads=1,
        convergence=True,
        evaluation_images=smooth_images,
        allow_overlap=True,
    )
    with pytest.raises(CalibrationError, match="12 of 12 evaluation images are calibration images too"):
        calibrate(replace(request, allow_overlap=False))
    report = calibrate(request)
    assert [point.images for point in report.convergence] == [1, 3, 6, 12]
    assert report.convergence[-1].largest_change == 0.0
    assert report.convergence[0].largest_change > report.convergence[2].largest_change
    assert "overlap" in [finding.kind for finding in report.images.findings]
    assert (tmp_path / "calibration.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]
