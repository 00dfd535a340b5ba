"""Simplifying: fewer nodes, the same numbers, and nothing about the interface changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxsim")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from exporters import rewrite  # noqa: E402
from exporters.rewrite import (  # noqa: E402
    LARGE,
    name_weights_after_convolutions,
    simplified,
    simplify_onnx,
    with_weights_aside,
)
from fcos_deploy.core.artifact import (  # noqa: E402
    OnnxGraph,
    read_contract,
)
from fcos_deploy.core.errors import BackendLoadError, ConfigError, StepCheckError  # noqa: E402
from fcos_deploy.core.onnx_file import save_onnx  # noqa: E402


def _model(nodes: list[object], *, constants: dict[str, np.ndarray], batch: object = "batch") -> object:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, "height", "width"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_a_simplified_file_has_the_same_interface_and_contract(tiny_onnx: Path, tmp_path: Path) -> None:
    made = simplify_onnx(tiny_onnx, tmp_path / "s.onnx")
    before, after = OnnxGraph(tiny_onnx).model, OnnxGraph(made.path).model
    assert read_contract(made.path) == read_contract(tiny_onnx)
    assert list(before.graph.output) == list(after.graph.output)
    assert made.nodes <= made.nodes_before
    assert made.file_bytes <= tiny_onnx.stat().st_size
    assert made.check.largest < 1


def test_a_bloated_file_shrinks(tiny_onnx: Path, tmp_path: Path) -> None:
    model = OnnxGraph(tiny_onnx).model
    reads = next(node for node in model.graph.node if "images" in node.input)
    model.graph.node.insert(0, helper.make_node("Identity", ["images"], ["same"], name="needless"))
    reads.input[list(reads.input).index("images")] = "same"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(50_000, np.float32), "unused"))
    save_onnx(model, tmp_path / "bloated.onnx")
    made = simplify_onnx(tmp_path / "bloated.onnx", tmp_path / "s.onnx")
    assert made.file_bytes < made.bytes_before - 200_000
    assert "Identity" not in {node.op_type for node in OnnxGraph(made.path).model.graph.node}


def test_a_pass_that_breaks_the_graph_is_caught(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halve_a_weight(graph: object) -> int:
        weight = graph.graph.initializers["backbone.fpn.layer_blocks.0.0.weight"]
        array = weight.const_value.numpy()
        weight.const_value = ir.tensor(np.where(array > 0, array, array * np.float32(0.5)), name=weight.name)
        return 0

    monkeypatch.setattr(rewrite, "name_weights_after_convolutions", halve_a_weight)
    with pytest.raises(StepCheckError, match="'simplify' differs from its source"):
        simplify_onnx(tiny_onnx, tmp_path / "s.onnx")
    assert not (tmp_path / "s.onnx").exists()


@pytest.mark.parametrize("length", [0, 100, 30_000])
def test_a_truncated_file_is_refused(tiny_onnx: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx.read_bytes()[:length])
    with pytest.raises(BackendLoadError, match=r"'.*cut\.onnx' is not a complete ONNX model"):
        simplify_onnx(tmp_path / "cut.onnx", tmp_path / "s.onnx")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendLoadError, match=r"nothing\.onnx' does not exist"):
        simplify_onnx(tmp_path / "nothing.onnx", tmp_path / "s.onnx")


def test_a_file_without_a_contract_is_refused(tmp_path: Path) -> None:
    model = _model([helper.make_node("Relu", ["images"], ["out"])], constants={})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3, "h", "w"]))
    save_onnx(model, tmp_path / "other.onnx")
    with pytest.raises(BackendLoadError, match="carries no fcos-deploy contract"):
        simplify_onnx(tmp_path / "other.onnx", tmp_path / "s.onnx")


def test_an_output_that_cannot_be_written_is_refused_at_once(tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Cannot write"):
        simplify_onnx(tiny_onnx, tmp_path / "file" / "s.onnx")
    with pytest.raises(ConfigError, match="it is a folder"):
        simplify_onnx(tiny_onnx, tmp_path)


def test_what_would_grow_is_not_used(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxGraph(tiny_onnx).model

    def grow(source: object) -> object:
        larger = onnx.ModelProto()
        larger.CopyFrom(source)
        larger.doc_string = "x" * 100_000
        return larger

    monkeypatch.setattr(rewrite, "_with_onnxsim", grow)
    feed = {"images": np.zeros((1, 3, 128, 160), np.uint8)}
    result, _ = simplified(model, [feed])
    assert result.ByteSize() <= model.ByteSize()


def test_a_weight_without_a_name_gets_its_modules() -> None:
    constants = {"val_7": np.ones((2, 3, 1, 1), np.float32), "val_8": np.ones((1, 2, 1, 1), np.float32)}
    constants["val_9"] = np.ones(2, np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "val_7", "val_9"], ["a"], name="body.conv1/Conv"),
        helper.make_node("Conv", ["a", "val_8"], ["out"], name="somebody_elses"),
    ]
    graph = ir.from_proto(_model(nodes, constants=constants))
    assert name_weights_after_convolutions(graph) == 2
    assert sorted(graph.graph.initializers) == ["body.conv1.bias", "body.conv1.weight", "val_8"]


def test_only_large_weights_are_kept_out_and_all_are_back() -> None:
    generator = np.random.default_rng(0)
    weights = {
        "large": generator.standard_normal((LARGE // 16 + 1, 4)).astype(np.float32),
        "small": generator.standard_normal((LARGE // 16, 4)).astype(np.float32),
    }
    values = {name: onnx.numpy_helper.from_array(array, name) for name, array in weights.items()}
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 4])
    result = onnx.helper.make_tensor_value_info("result", onnx.TensorProto.FLOAT, [None, 4])
    nodes = [
        onnx.helper.make_node("Add", ["large", "images"], ["moved"]),
        onnx.helper.make_node("Concat", ["moved", "small"], ["result"], axis=0),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [images], [result], list(values.values())))
    before = model.SerializeToString(deterministic=True)
    seen: dict[str, Any] = {}

    def rewrite(lean: Any) -> Any:
        onnx.checker.check_model(lean, full_check=True)
        seen["weights"] = [tensor.name for tensor in lean.graph.initializer]
        seen["inputs"] = {value.name: value.type.tensor_type for value in lean.graph.input}
        lean.graph.node[0].op_type = "Sub"
        return lean

    rewritten = with_weights_aside(model, rewrite)
    assert seen["weights"] == ["small"]
    assert [d.dim_value for d in seen["inputs"]["large"].shape.dim] == list(weights["large"].shape)
    assert seen["inputs"]["large"].elem_type == onnx.TensorProto.FLOAT
    assert model.SerializeToString(deterministic=True) == before
    assert [node.op_type for node in rewritten.graph.node] == ["Sub", "Concat"]
    assert [value.name for value in rewritten.graph.input] == ["images"]
    assert {tensor.name: tensor for tensor in rewritten.graph.initializer} == values
