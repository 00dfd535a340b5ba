"""The written INT8 graph: read back, computed by hand, and run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calibration.dataset import collect_images
from calibration.execution import executed_share
from calibration.placement import PLACEMENTS, ActivationFormat, WeightRange
from calibration.qdq import (
    WeightValues,
    activation_scale,
    bias_correction,
    quantize_bias,
    quantize_qdq,
    quantize_weight,
)
from calibration.ranges import Range
from fcos_deploy.core.contract import read_contract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError

onnx = pytest.importorskip("onnx")

ALL = sorted(PLACEMENTS)


def nodes(path: Path, kind: str) -> list[Any]:
    return [node for node in onnx.load(str(path)).graph.node if node.op_type == kind]


@pytest.mark.parametrize("name", ALL)
def test_result_is_close_to_its_source(
    name: str, mini_onnx: Path, mini_calibration: Any, smooth_images: Path, tmp_path: Path
) -> None:
    pictures = [image.read() for image in collect_images(smooth_images).images[:3]]
    made = quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS[name], pictures=pictures)
    assert made.fidelity.images == 3
    assert min(made.fidelity.sqnr_db.values()) > 20.0
    assert len(made.int8_convolutions) + len(made.float_convolutions) == 17


@pytest.mark.parametrize("name", ALL)
def test_contract_says_what_it_is(name: str, mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS[name])
    contract, source = read_contract(tmp_path / "q.onnx"), read_contract(mini_onnx)
    assert (contract.precision, contract.placement) == (Precision.INT8, name)
    assert replace(contract, precision=Precision.FP32, placement="") == source


@pytest.mark.parametrize(
    ("name", "backend"), [("onnxruntime-cpu", "onnxruntime"), ("openvino", "openvino"), ("portable", "openvino")]
)
def test_runtime_executes_it_in_int8(
    name: str, backend: str, mini_onnx: Path, mini_calibration: Any, tmp_path: Path
) -> None:
    pytest.importorskip(backend)
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS[name])
    found = executed_share(mini_onnx, tmp_path / "q.onnx", backend)
    # The prediction layers of this small graph are 4 % of the work; the CPU placement keeps them float.
    assert found.share > 0.95
    assert found.total_macs == 2_276_096


def test_float_graph_executes_nothing_in_int8(mini_onnx: Path) -> None:
    assert executed_share(mini_onnx, mini_onnx, "onnxruntime").share == 0.0


def test_unknown_profiler(mini_onnx: Path) -> None:
    with pytest.raises(ConfigError, match="'tensorrt' cannot be profiled here"):
        executed_share(mini_onnx, mini_onnx, "tensorrt")


def test_portable_has_no_pairs_on_biases_outputs_or_zero_points(
    mini_onnx: Path, mini_calibration: Any, tmp_path: Path
) -> None:
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"])
    model = onnx.load(str(tmp_path / "q.onnx"))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in nodes(tmp_path / "q.onnx", "QuantizeLinear"):
        assert constants[node.input[2]] == 0
        assert constants[node.input[2]].dtype == np.int8
    assert not any(value.dtype == np.int32 for value in constants.values())
    assert all(constants[node.input[2]].dtype == np.float32 for node in nodes(tmp_path / "q.onnx", "Conv"))


def test_scale_is_the_ranges(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"])
    model = onnx.load(str(tmp_path / "q.onnx"))
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert constants["block/scale"] == np.float32(mini_calibration.range_of("block").amax / 127)


def test_shared_weight_is_stored_once(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"])
    names = [t.name for t in onnx.load(str(tmp_path / "q.onnx")).graph.initializer]
    assert names.count("tower.weight/quantized") == 1
    assert "tower.weight" not in names
    assert len(names) == len(set(names))


def test_group_norm_and_decoding_stay_float(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"])
    for kind in ("InstanceNormalization", "Mul", "Concat"):
        assert nodes(tmp_path / "q.onnx", kind) == nodes(mini_onnx, kind)


def test_source_is_untouched(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    before = mini_onnx.read_bytes()
    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["onnxruntime-cpu"])
    assert mini_onnx.read_bytes() == before


def test_same_input_same_bytes(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize_qdq(mini_onnx, mini_calibration, tmp_path / f"{name}.onnx", policy=PLACEMENTS["openvino"])
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_int8_graph_is_not_quantized_again(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    from fcos_deploy.core.files import sha256_file

    quantize_qdq(mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"])
    calibration = replace(mini_calibration, graph_sha256=sha256_file(tmp_path / "q.onnx"))
    with pytest.raises(CalibrationError, match="is int8"):
        quantize_qdq(tmp_path / "q.onnx", calibration, tmp_path / "again.onnx", policy=PLACEMENTS["portable"])


def test_calibration_of_another_graph(mini_fcos: ModuleType, mini_calibration: Any, tmp_path: Path) -> None:
    other = mini_fcos.write(tmp_path / "other.onnx", seed=3)
    with pytest.raises(CalibrationError, match="belongs to the graph"):
        quantize_qdq(other, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"])
    assert not (tmp_path / "q.onnx").exists()


def test_ignoring_every_layer_is_refused(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    from calibration.placement import load_graph

    layers = load_graph(mini_onnx).layers
    with pytest.raises(CalibrationError, match="Every convolution would stay float"):
        quantize_qdq(
            mini_onnx, mini_calibration, tmp_path / "q.onnx", policy=PLACEMENTS["portable"], ignored_layers=layers
        )


def test_symmetric_scale_by_hand() -> None:
    found = activation_scale(Range(-1.0, 2.0, 2.54), ActivationFormat.S8_SYMMETRIC)
    assert found.scale == np.float32(0.02)
    assert (found.zero_point, found.zero_point.dtype) == (0, np.int8)


def test_asymmetric_scale_by_hand() -> None:
    found = activation_scale(Range(-0.55, 2.0, 2.0), ActivationFormat.U8_ASYMMETRIC)
    assert found.scale == np.float32(0.01)
    assert (found.zero_point, found.zero_point.dtype) == (55, np.uint8)


def test_weight_by_hand() -> None:
    weight = np.float32([[1.27, -0.50], [0.0, 0.0]]).reshape(2, 2, 1, 1)
    found = quantize_weight(weight, WeightRange.FULL)
    assert found.values.reshape(2, 2).tolist() == [[127, -50], [0, 0]]
    assert np.allclose(found.dequantized(), weight)


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
    found = bias_correction(weight, values, means=np.float32([2.0, 10.0]))
    assert found == pytest.approx([0.35 * 2.0 + 0.4 * 10.0], rel=1e-6)


def test_bias_correction_of_groups_by_hand() -> None:
    weight = np.float32([0.5, 1.5]).reshape(2, 1, 1, 1)  # depthwise
    values = WeightValues(np.int8([1, 1]).reshape(2, 1, 1, 1), np.float32([0.4, 1.0]))
    assert bias_correction(weight, values, means=np.float32([3.0, 5.0])) == pytest.approx([0.3, 2.5], rel=1e-6)


def test_bias_correction_refuses_means_of_another_tensor() -> None:
    weight = np.ones((2, 4, 1, 1), np.float32)
    with pytest.raises(CalibrationError, match=r"means of 6 channels for weights of shape \(2, 4, 1, 1\)"):
        bias_correction(weight, quantize_weight(weight, WeightRange.FULL), means=np.ones(6, np.float32))


def test_biases_take_back_the_shift_of_rounded_weights(
    mini_onnx: Path, mini_calibration: Any, smooth_images: Path, tmp_path: Path
) -> None:
    """The mean of each channel behind the first convolution, over the calibration images, against the float graph's."""
    from calibration.execution import Feeder, expose, open_engine

    without = {name: replace(tensor, channel_means="") for name, tensor in mini_calibration.tensors.items()}
    policy = replace(PLACEMENTS["portable"], weights=WeightRange.REDUCED)
    feeder = Feeder(onnx.load(str(mini_onnx)), read_contract(mini_onnx))
    feeds = [feeder(image.read()) for image in collect_images(smooth_images).images]

    def means(path: Path) -> Any:
        run = open_engine("onnxruntime", expose(onnx.load(str(path)), ["stem"]), threads=1)
        return np.mean([run(feed)["stem"].mean((0, 2, 3)) for feed in feeds], axis=0)

    shifts = []
    for calibration in (replace(mini_calibration, tensors=without), mini_calibration):
        quantize_qdq(mini_onnx, calibration, tmp_path / "q.onnx", policy=policy)
        shifts.append(float(np.abs(means(tmp_path / "q.onnx") - means(mini_onnx)).mean()))
    assert shifts[1] < 0.5 * shifts[0]


def test_bias_by_hand() -> None:
    values, scales = quantize_bias(
        np.float32([0.5, -1.0]), input_scale=np.float32(0.5), weight_scales=np.float32([0.25, 0.5])
    )
    assert values.tolist() == [4, -4]
    assert scales.tolist() == [0.125, 0.25]


def test_large_bias_over_tiny_weights_does_not_overflow(
    mini_fcos: ModuleType, mini_onnx: Path, mini_calibration: Any, smooth_images: Path, tmp_path: Path
) -> None:
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
    images = collect_images(smooth_images)
    calibration = collect_ranges(path, images, options=StatisticsOptions(engine="onnxruntime", threads=1))
    pictures = [images.images[0].read()]
    made = quantize_qdq(path, calibration, tmp_path / "q.onnx", policy=PLACEMENTS["onnxruntime-cpu"], pictures=pictures)
    assert min(made.fidelity.sqnr_db.values()) > 15.0
