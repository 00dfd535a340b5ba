"""Large weights stay out of what a rewriting is given, and are back in what it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from exporters.onnx_file import LARGE, with_weights_aside  # noqa: E402


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
