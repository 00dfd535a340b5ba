"""Calibration: one pass over images, and the files that keep its ranges."""

from __future__ import annotations

import json
import logging
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration.calibrate import (
    Calibration,
    CalibrationRequest,
    StatisticsOptions,
    calibrate,
    collect_ranges,
    load_calibration,
    save_calibration,
    write_trt_cache,
)
from calibration.dataset import CalibrationSet, SampleOptions, collect_images
from calibration.execution import Feeder, open_engine
from calibration.measuring import in_order_of_release, measure, measuring_model, open_measuring, read_sample
from calibration.placement import PLACEMENTS, ConvGraph, open_graph
from calibration.quantizers import quantize_qdq
from calibration.ranges import Histogram, RangeMethod
from exporters._tensorrt_options import check_calibration_cache
from fcos_deploy.core.errors import BackendLoadError, CalibrationError, ConfigError
from fcos_deploy.core.onnx_file import with_outputs
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
    with open_engine("onnxruntime", with_outputs(mini_graph.source.model, ["block", "p3"])) as session:
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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", ["fixed", "follows the image"])
def test_a_graph_measures_its_tensors_as_numpy_does(engine: str, shape: str, mini_graph: ConvGraph) -> None:
    pytest.importorskip(engine)
    model, names = onnx.ModelProto(), ["block", "p3", "p4"]
    model.CopyFrom(mini_graph.source.model)
    feeds = Feeder(mini_graph.source)(np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype(np.uint8))
    if shape != "fixed":
        del model.graph.value_info[:]
        for size in model.graph.input[0].type.tensor_type.shape.dim[2:]:
            size.dim_param = "size"
        del model.graph.output[:]
    with open_engine(engine, with_outputs(model, names), threads=1) as session:
        whole = {name: measure(values, samples=500) for name, values in session.run(feeds).items()}
    with open_measuring(engine, model, tensors=names, samples=500, threads=1) as session:
        outputs = session.run(feeds)
    for name in names:
        expected, measured = whole[name], read_sample(outputs, name)
        assert 0 < measured.values.size < 1000
        for part in ("values", "minimum", "maximum", "channel_means"):
            # Exposing other tensors changes what the runtime fuses, and with it the last bits.
            assert getattr(measured, part) == pytest.approx(getattr(expected, part), rel=1e-3, abs=1e-4), (name, part)


def test_tensors_are_measured_before_the_network_goes_on(mini_graph: ConvGraph) -> None:
    names = [conv.result for conv in mini_graph.convs]
    model = measuring_model(mini_graph.source.model, names)
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model)
    ordered = [node.name for node in in_order_of_release(shuffled).graph.node]
    assert sorted(ordered) == sorted(node.name for node in model.graph.node)
    convs = [ordered.index(conv.name) for conv in mini_graph.convs]
    for name, after in zip(names, convs[1:], strict=False):
        own = [place for place, node in enumerate(ordered) if node.endswith(f":{name}")]
        assert own
        assert max(own) < after


def test_one_inference_an_image_is_reported(
    mini_graph: ConvGraph, images: CalibrationSet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "calibration"):
        assert collect_ranges(mini_graph, images, options=StatisticsOptions(threads=1)).engine == "onnxruntime"
    assert f"{len(mini_graph.activations)} tensors, 1 inference an image, on onnxruntime" in caplog.text


def test_engines_agree(mini_graph: ConvGraph, histograms: dict[str, Histogram], images: CalibrationSet) -> None:
    pytest.importorskip("openvino")
    others = histograms_of(mini_graph, images, engine="openvino")
    for name, histogram in histograms.items():
        assert others[name].amax == pytest.approx(histogram.amax, rel=1e-3), name


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
    with pytest.raises(ConfigError, match=r"TensorRT 11\.0\.0 takes no calibration cache"):
        CalibrationRequest(model=mini_onnx, images=smooth_images, output=tmp_path / "c.json", tensorrt_version="11.0.0")
    assert list(tmp_path.iterdir()) == []


def test_calibrate_writes_a_report_with_convergence(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    request = CalibrationRequest(
        model=mini_onnx,
        images=smooth_images,
        output=tmp_path / "calibration.json",
        statistics=OPTIONS,
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


@pytest.fixture
def saved(mini_calibration: Any, tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    save_calibration(mini_calibration, path)
    return path


def test_everything_comes_back(saved: Path, mini_calibration: Any) -> None:
    assert load_calibration(saved) == mini_calibration


def test_file_is_readable_by_people(saved: Path) -> None:
    content = json.loads(saved.read_text())
    assert content["schema_version"] == 1
    assert set(content["tensors"]["block"]["ranges"]) == {str(m) for m in RangeMethod}
    assert content["images"][0]["name"] == "a/01.png"


def test_another_graph_is_refused(
    mini_calibration: Any, mini_graph: Any, mini_fcos: ModuleType, tmp_path: Path
) -> None:
    mini_calibration.check_graph(mini_graph.source)
    other = open_graph(mini_fcos.write(tmp_path / "other.onnx", seed=1))
    with pytest.raises(CalibrationError, match=r"belongs to the graph [0-9a-f]{12}, '.*other\.onnx' is [0-9a-f]{12}"):
        mini_calibration.check_graph(other.source)
    with pytest.raises(CalibrationError, match="belongs to the graph"):
        write_trt_cache(mini_calibration, other, tmp_path / "c.cache", version="8.5.2")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"schema_version": 2}', '{"schema_version": 1}'])
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=r"calibration\.json"):
        load_calibration(path)


def test_range_that_excludes_zero_is_refused(saved: Path) -> None:
    content = json.loads(saved.read_text())
    content["tensors"]["block"]["ranges"]["minmax"]["low"] = 0.5
    saved.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match="must hold zero"):
        load_calibration(saved)


def test_unknown_tensor_is_named(mini_calibration: Any) -> None:
    with pytest.raises(CalibrationError, match="no range for tensor 'ghost'"):
        mini_calibration.range_of("ghost")


def test_folder_that_cannot_be_made(mini_calibration: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot write"):
        save_calibration(mini_calibration, tmp_path / "file" / "calibration.json")


@pytest.fixture
def trt_cache(mini_calibration: Any, mini_graph: Any, tmp_path: Path) -> Callable[[str], list[str]]:
    """Writes the cache for a version of TensorRT and returns its lines."""

    def lines(version: str) -> list[str]:
        write_trt_cache(mini_calibration, mini_graph, tmp_path / "c.cache", version=version)
        return (tmp_path / "c.cache").read_text().splitlines()

    return lines


@pytest.mark.parametrize(
    ("version", "header"),
    [
        ("8.5.2", "TRT-8502-EntropyCalibration2"),
        ("8.6.1.6", "TRT-8601-EntropyCalibration2"),
        ("10.3.0", "TRT-100300-EntropyCalibration2"),
        ("10.14.1", "TRT-101401-EntropyCalibration2"),
    ],
)
def test_trt_header_is_the_versions(version: str, header: str, trt_cache: Callable[[str], list[str]]) -> None:
    assert trt_cache(version)[0] == header


def test_trt_scales_are_big_endian_floats_of_amax_over_127(
    trt_cache: Callable[[str], list[str]], mini_calibration: Any, mini_graph: Any
) -> None:
    entries = dict(line.split(": ") for line in trt_cache("10.3.0")[1:])
    (scale,) = struct.unpack("!f", bytes.fromhex(entries["block"]))
    assert scale == pytest.approx(mini_calibration.range_of("block").amax / 127, rel=1e-6)
    # Tensors before a fused ReLU have their result's scale.
    assert entries["stem"] == entries["stem_relu"]
    assert entries["sum"] == entries["block"]
    assert {name for conv in mini_graph.convs for name in (conv.input, conv.output)} <= set(entries)


def test_trt_scale_by_hand(mini_calibration: Any, mini_graph: Any, tmp_path: Path) -> None:
    """0x3caa54fc is the float32 that is closest to 0.0207925."""
    tensor = mini_calibration.tensors["block"]
    method = str(mini_calibration.method)
    ranges = {**tensor.ranges, method: replace(tensor.ranges[method], amax=0.020792476832866669 * 127)}
    tensors = {**mini_calibration.tensors, "block": replace(tensor, ranges=ranges)}
    write_trt_cache(replace(mini_calibration, tensors=tensors), mini_graph, tmp_path / "c.cache", version="8.5.2")
    assert "block: 3caa54fc" in (tmp_path / "c.cache").read_text().splitlines()


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "10.13.3.9"])
def test_the_builder_takes_the_trt_cache_of_its_version_and_no_other(
    version: str, trt_cache: Callable[[str], list[str]], tmp_path: Path
) -> None:
    """Everything but the build itself, which needs TensorRT: real ranges, the file, and the builder's look at it."""
    entries = dict(line.split(": ") for line in trt_cache(version)[1:])
    check_calibration_cache(tmp_path / "c.cache", version=version)
    scales = [struct.unpack("!f", bytes.fromhex(entry))[0] for entry in entries.values()]
    assert all(0 < scale < 1e4 for scale in scales)
    with pytest.raises(ConfigError, match="would ignore it"):
        check_calibration_cache(tmp_path / "c.cache", version="10.4.0")


@pytest.mark.parametrize("version", ["11.0.0", "6.0", "ten", ""])
def test_versions_without_a_trt_cache(version: str, trt_cache: Callable[[str], list[str]]) -> None:
    with pytest.raises(ConfigError):
        trt_cache(version)
