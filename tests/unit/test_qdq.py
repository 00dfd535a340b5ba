"""The written INT8 graph: read back, computed by hand, and run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration import execution
from calibration.dataset import collect_images
from calibration.execution import conv_macs, executed_share
from calibration.placement import PLACEMENTS, ActivationFormat, ConvGraph, WeightRange, open_graph
from calibration.quantizers import (
    QuantizedOnnx,
    WeightValues,
    activation_scale,
    bias_correction,
    quantize_bias,
    quantize_qdq,
    quantize_weight,
)
from calibration.ranges import Range
from exporters.torch_onnx import export_onnx
from fcos_deploy.checkpoints.load import load_checkpoint
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError
from fcos_deploy.core.onnx_file import with_outputs
from fcos_deploy.core.progress import INFERENCES

onnx = pytest.importorskip("onnx")

ALL = sorted(PLACEMENTS)


@pytest.fixture(scope="module")
def written(
    mini_graph: ConvGraph, mini_calibration: Any, smooth_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, QuantizedOnnx]:
    """``mini_graph`` in every placement, compared with its source on three images; read-only."""
    folder = tmp_path_factory.mktemp("qdq")
    images = [image.read() for image in collect_images(smooth_images).images[:3]]
    return {
        name: quantize_qdq(mini_graph, mini_calibration, folder / f"{name}.onnx", placement=placement, images=images)
        for name, placement in PLACEMENTS.items()
    }


@pytest.fixture
def portable(written: dict[str, QuantizedOnnx]) -> Path:
    return written["portable"].path


def nodes(path: Path, kind: str) -> list[Any]:
    return [node for node in onnx.load(str(path)).graph.node if node.op_type == kind]


@pytest.mark.parametrize("name", ALL)
def test_result_is_close_to_its_source(name: str, written: dict[str, QuantizedOnnx]) -> None:
    result = written[name]
    assert result.fidelity.images == 3
    assert min(result.fidelity.sqnr_db.values()) > 20.0
    assert len(result.int8_convolutions) + len(result.float_convolutions) == 17


@pytest.mark.parametrize("name", ALL)
def test_contract_says_what_it_is(name: str, written: dict[str, QuantizedOnnx], mini_graph: ConvGraph) -> None:
    contract = read_contract(written[name].path)
    assert (contract.precision, contract.placement) == (Precision.INT8, name)
    assert replace(contract, precision=Precision.FP32, placement="") == mini_graph.source.contract


@pytest.mark.parametrize(
    ("name", "backend"), [("onnxruntime-cpu", "onnxruntime"), ("openvino", "openvino"), ("portable", "openvino")]
)
def test_runtime_executes_it_in_int8(
    name: str, backend: str, written: dict[str, QuantizedOnnx], mini_graph: ConvGraph
) -> None:
    pytest.importorskip(backend)
    executed = executed_share(mini_graph, written[name].path, backend)
    # The prediction layers of this small graph are 4 % of the work; the CPU placement keeps them float.
    assert executed.share > 0.95
    assert executed.total_macs == 2_276_096


@pytest.mark.parametrize("size", ["fixed", "dynamic"])
def test_multiply_accumulates_need_no_run_and_are_those_of_one(
    size: str, mini_graph: ConvGraph, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = mini_graph
    if size == "dynamic":
        loaded = load_checkpoint(tiny_checkpoint, options=CheckpointOptions(shortest=96, longest=160))
        export_onnx(loaded, tmp_path / "dynamic.onnx")
        graph = open_graph(tmp_path / "dynamic.onnx")
    before = INFERENCES.count
    macs = conv_macs(graph)
    assert INFERENCES.count == before
    monkeypatch.setattr(execution, "_inferred_shapes", lambda *_: {})
    assert conv_macs(graph) == macs
    assert INFERENCES.count == before + 1


def test_float_graph_executes_nothing_in_int8(mini_graph: ConvGraph) -> None:
    assert executed_share(mini_graph, mini_graph.source.path, "onnxruntime").share == 0.0


def test_unknown_profiler(mini_graph: ConvGraph) -> None:
    with pytest.raises(ConfigError, match="'tensorrt' cannot be profiled here"):
        executed_share(mini_graph, mini_graph.source.path, "tensorrt")


def constants_of(path: Path) -> dict[str, Any]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def test_portable_has_no_pairs_on_biases_outputs_or_zero_points(portable: Path) -> None:
    constants = constants_of(portable)
    for node in nodes(portable, "QuantizeLinear"):
        assert constants[node.input[2]] == 0
        assert constants[node.input[2]].dtype == np.int8
    assert not any(value.dtype == np.int32 for value in constants.values())
    assert all(constants[node.input[2]].dtype == np.float32 for node in nodes(portable, "Conv"))


def test_scale_is_the_ranges(portable: Path, mini_calibration: Any) -> None:
    assert constants_of(portable)["block/scale"] == np.float32(mini_calibration.range_of("block").amax / 127)


def test_shared_weight_is_stored_once(portable: Path) -> None:
    names = [t.name for t in onnx.load(str(portable)).graph.initializer]
    assert names.count("tower.weight/quantized") == 1
    assert "tower.weight" not in names
    assert len(names) == len(set(names))


def test_group_norm_and_decoding_stay_float(portable: Path, mini_onnx: Path) -> None:
    for kind in ("InstanceNormalization", "Mul", "Concat"):
        assert nodes(portable, kind) == nodes(mini_onnx, kind)


def test_source_is_untouched_and_the_same_input_gives_the_same_bytes(
    written: dict[str, QuantizedOnnx], mini_graph: ConvGraph, mini_calibration: Any, tmp_path: Path
) -> None:
    path, before = mini_graph.source.path, mini_graph.source.model.SerializeToString()
    for name, result in written.items():
        quantize_qdq(open_graph(path), mini_calibration, tmp_path / "q.onnx", placement=PLACEMENTS[name])
        assert (tmp_path / "q.onnx").read_bytes() == result.path.read_bytes()
    assert mini_graph.source.model.SerializeToString() == onnx.load(str(path)).SerializeToString() == before


def test_int8_graph_is_not_quantized_again(portable: Path) -> None:
    with pytest.raises(CalibrationError, match="is int8"):
        open_graph(portable)


def test_calibration_of_another_graph(mini_fcos: ModuleType, mini_calibration: Any, tmp_path: Path) -> None:
    other = open_graph(mini_fcos.write(tmp_path / "other.onnx", seed=3))
    with pytest.raises(CalibrationError, match="belongs to the graph"):
        quantize_qdq(other, mini_calibration, tmp_path / "q.onnx", placement=PLACEMENTS["portable"])
    assert not (tmp_path / "q.onnx").exists()


def test_ignoring_every_layer_is_refused(mini_graph: ConvGraph, mini_calibration: Any, tmp_path: Path) -> None:
    options = {"placement": PLACEMENTS["portable"], "ignored_layers": mini_graph.layers}
    with pytest.raises(CalibrationError, match="Every convolution would stay float"):
        quantize_qdq(mini_graph, mini_calibration, tmp_path / "q.onnx", **options)


def test_symmetric_scale_by_hand() -> None:
    result = activation_scale(Range(-1.0, 2.0, 2.54), ActivationFormat.S8_SYMMETRIC)
    assert result.scale == np.float32(0.02)
    assert (result.zero_point, result.zero_point.dtype) == (0, np.int8)


def test_asymmetric_scale_by_hand() -> None:
    result = activation_scale(Range(-0.55, 2.0, 2.0), ActivationFormat.U8_ASYMMETRIC)
    assert result.scale == np.float32(0.01)
    assert (result.zero_point, result.zero_point.dtype) == (55, np.uint8)


def test_weight_by_hand() -> None:
    weight = np.float32([[1.27, -0.50], [0.0, 0.0]]).reshape(2, 2, 1, 1)
    result = quantize_weight(weight, WeightRange.FULL)
    assert result.values.reshape(2, 2).tolist() == [[127, -50], [0, 0]]
    assert np.allclose(result.dequantized(), weight)


@pytest.mark.parametrize("kind", [WeightRange.PAIRWISE, WeightRange.REDUCED])
def test_no_pair_of_weights_can_overflow_sixteen_bits(kind: WeightRange) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (8, 16, 3, 3)).astype(np.float32)
    values = quantize_weight(weight, kind).values.astype(np.int64)
    walked = np.moveaxis(values, 1, -1).reshape(8, -1)
    pairs = np.stack([walked[:, :-1], walked[:, 1:]])
    assert 255 * np.maximum(pairs, 0).sum(0).max() <= 32767
    assert 255 * np.minimum(pairs, 0).sum(0).min() >= -32768


def test_full_range_can_overflow_sixteen_bits() -> None:
    values = quantize_weight(np.ones((1, 2, 1, 1), np.float32), WeightRange.FULL).values.astype(np.int64)
    assert 255 * values.sum() > 32767


def test_pairwise_keeps_more_bits_than_reduced() -> None:
    weight = np.random.default_rng(1).normal(0, 1, (8, 16, 3, 3)).astype(np.float32)
    errors = [
        float(np.abs(quantize_weight(weight, kind).dequantized() - weight).mean())
        for kind in (WeightRange.FULL, WeightRange.PAIRWISE, WeightRange.REDUCED)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_bias_correction_by_hand() -> None:
    weight = np.float32([[[[0.5, 0.25]], [[2.0, 0.0]]]])  # one output, two inputs, a kernel of 1 x 2
    values = WeightValues(np.int8([[[[1, 0]], [[4, 0]]]]), np.float32([0.4]))
    # Lost of the first input 0.5 - 0.4 + 0.25, of the second 2.0 - 1.6.
    result = bias_correction(weight, values, means=np.float32([2.0, 10.0]))
    assert result == pytest.approx([0.35 * 2.0 + 0.4 * 10.0], rel=1e-6)


def test_bias_correction_of_groups_by_hand() -> None:
    weight = np.float32([0.5, 1.5]).reshape(2, 1, 1, 1)  # depthwise
    values = WeightValues(np.int8([1, 1]).reshape(2, 1, 1, 1), np.float32([0.4, 1.0]))
    assert bias_correction(weight, values, means=np.float32([3.0, 5.0])) == pytest.approx([0.3, 2.5], rel=1e-6)


def test_bias_correction_refuses_means_of_another_tensor() -> None:
    weight = np.ones((2, 4, 1, 1), np.float32)
    with pytest.raises(CalibrationError, match=r"means of 6 channels for weights of shape \(2, 4, 1, 1\)"):
        bias_correction(weight, quantize_weight(weight, WeightRange.FULL), means=np.ones(6, np.float32))


def test_biases_take_back_the_shift_of_rounded_weights(
    mini_graph: ConvGraph, mini_calibration: Any, smooth_images: Path, tmp_path: Path
) -> None:
    """The mean of each channel behind the first convolution, over the calibration images, against the float graph's."""
    from calibration.execution import Feeder, open_engine

    without = {name: replace(tensor, channel_means="") for name, tensor in mini_calibration.tensors.items()}
    placement = replace(PLACEMENTS["portable"], weights=WeightRange.REDUCED)
    feeder = Feeder(mini_graph.source)
    feeds = [feeder(image.read()) for image in collect_images(smooth_images).images]

    def means(path: Path) -> Any:
        with open_engine("onnxruntime", with_outputs(onnx.load(str(path)), ["stem"]), threads=1) as session:
            return np.mean([session.run(feed)["stem"].mean((0, 2, 3)) for feed in feeds], axis=0)

    shifts = []
    for calibration in (replace(mini_calibration, tensors=without), mini_calibration):
        quantize_qdq(mini_graph, calibration, tmp_path / "q.onnx", placement=placement)
        shifts.append(float(np.abs(means(tmp_path / "q.onnx") - means(mini_graph.source.path)).mean()))
    assert shifts[1] < 0.5 * shifts[0]


def test_bias_by_hand() -> None:
    values, scales = quantize_bias(
        np.float32([0.5, -1.0]), input_scale=np.float32(0.5), weight_scales=np.float32([0.25, 0.5])
    )
    assert values.tolist() == [4, -4]
    assert scales.tolist() == [0.125, 0.25]


def test_large_bias_over_tiny_weights_does_not_overflow(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    from calibration.calibrate import StatisticsOptions, collect_ranges

    model = onnx.load(str(mini_onnx))
    for tensor in model.graph.initializer:
        if tensor.name == "c3.weight":
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[2] *= 1e-12
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        if tensor.name == "c3.bias":
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[2] = 3.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    path = tmp_path / "dead.onnx"
    onnx.save(model, str(path))
    images, graph = collect_images(smooth_images), open_graph(path)
    calibration = collect_ranges(graph, images, options=StatisticsOptions(engine="onnxruntime", threads=1))
    options = {"placement": PLACEMENTS["onnxruntime-cpu"], "images": [images.images[0].read()]}
    result = quantize_qdq(graph, calibration, tmp_path / "q.onnx", **options)
    assert min(result.fidelity.sqnr_db.values()) > 15.0
