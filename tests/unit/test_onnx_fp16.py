"""Half precision: what becomes half, what stays, and that the result is as close as half precision can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from exporters.rewrite import convert_to_fp16  # noqa: E402
from exporters.step_check import onnx_runner, provoking_feed  # noqa: E402
from fcos_deploy.core.artifact import (  # noqa: E402
    OnnxGraph,
    read_contract,
)
from fcos_deploy.core.enums import Precision  # noqa: E402
from fcos_deploy.core.errors import ConfigError, ExportError, StepCheckError  # noqa: E402
from fcos_deploy.core.onnx_file import save_onnx  # noqa: E402


@pytest.fixture(scope="module")
def half(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_to_fp16(tiny_onnx, tmp_path_factory.mktemp("fp16") / "half.onnx").path


def test_inputs_and_outputs_keep_their_types(half: Path, tiny_onnx: Path) -> None:
    before, after = OnnxGraph(tiny_onnx).model, OnnxGraph(half).model
    onnx.checker.check_model(after, full_check=True)
    assert list(before.graph.input) == list(after.graph.input)
    assert list(before.graph.output) == list(after.graph.output)
    assert read_contract(half).precision is Precision.FP16


def test_convolutions_are_half_and_the_weights_are_stored_once(half: Path, tiny_onnx: Path) -> None:
    graph = OnnxGraph(half).model.graph
    types = {i.name: i.data_type for i in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    assert {types[name] for name in weights} == {TensorProto.FLOAT16}
    assert len(set(weights)) < len(weights)
    before = OnnxGraph(tiny_onnx).model.graph
    assert len(graph.initializer) <= len(before.initializer) + 2
    assert half.stat().st_size < 0.62 * tiny_onnx.stat().st_size


def test_nothing_is_rounded_to_half_and_back(half: Path) -> None:
    graph = OnnxGraph(half).model.graph
    makers = {name: node for node in graph.node for name in node.output}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    # The pixels' own, one in front of the first convolution, and one for each prediction that decoding reads.
    assert len(casts) <= 2 + 15
    for cast in casts:
        maker = makers.get(cast.input[0])
        assert maker is None or maker.op_type != "Cast"


def test_decoding_stays_in_float32(half: Path) -> None:
    inferred = onnx.shape_inference.infer_shapes(OnnxGraph(half).model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    inside = [n for n in inferred.node if n.name.startswith("head/Mul")]  # relu(...) * stride
    assert inside
    assert {types.get(n.output[0], TensorProto.FLOAT) for n in inside} == {TensorProto.FLOAT}


def test_result_is_as_close_as_eleven_bits_allow(half: Path, tiny_onnx: Path) -> None:
    before, after = (onnx_runner(OnnxGraph(path).model) for path in (tiny_onnx, half))
    feed = provoking_feed((1, 3, 128, 160), dtype="uint8", image_sizes=False, seed=9)
    wanted, found = before(feed), after(feed)
    for name, array in wanted.items():
        error = np.sqrt(np.mean((found[name] - array) ** 2)) / np.sqrt(np.mean(array**2))
        assert 0 < error < 2e-3, name


def test_a_weight_beyond_half_precision_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    model = OnnxGraph(tiny_onnx).model
    weight = next(i for i in model.graph.initializer if i.name == "backbone.fpn.layer_blocks.0.0.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e7), weight.name))
    save_onnx(model, tmp_path / "large.onnx")
    with pytest.raises(ExportError, match=r"layer_blocks\.0\.0\.weight' reaches .* half precision ends at 65504"):
        convert_to_fp16(tmp_path / "large.onnx", tmp_path / "h.onnx")


def test_activations_that_overflow_are_found(tiny_onnx: Path, tmp_path: Path) -> None:
    """What users meet as boxes of zeros or infinities: a feature beyond 65504, and nothing told them."""
    model = OnnxGraph(tiny_onnx).model
    for name in ("backbone.fpn.inner_blocks.0.0.weight", "backbone.fpn.layer_blocks.0.0.weight"):
        weight = next(i for i in model.graph.initializer if i.name == name)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e4), name))
    save_onnx(model, tmp_path / "hot.onnx")
    with pytest.raises(StepCheckError, match="convert to fp16"):
        convert_to_fp16(tmp_path / "hot.onnx", tmp_path / "h.onnx")


def test_half_of_half_is_refused(half: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Only an fp32 graph becomes fp16, this one is fp16"):
        convert_to_fp16(half, tmp_path / "h.onnx")


def test_sizes_of_a_resize_are_left_alone(tmp_path: Path, tiny_onnx: Path) -> None:
    """Resize takes its scales in float32 whatever its data is in."""
    model = OnnxGraph(tiny_onnx).model
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    del resize.input[1:]
    resize.input.extend(["", "scales"])
    assert helper.printable_node(resize)
    save_onnx(model, tmp_path / "scales.onnx")
    made = OnnxGraph(convert_to_fp16(tmp_path / "scales.onnx", tmp_path / "h.onnx").path).model
    types = {i.name: i.data_type for i in made.graph.initializer}
    assert types["scales"] == TensorProto.FLOAT
