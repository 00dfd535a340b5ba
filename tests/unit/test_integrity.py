"""An ONNX file can name other files: only those of the bundle are allowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.bundle.store import check_external_data
from fcos_deploy.core.errors import BundleError

onnx = pytest.importorskip("onnx")


def _tensor(location: str) -> onnx.TensorProto:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _in_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))


def _in_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))


def _in_subgraph(tensor: onnx.TensorProto) -> onnx.ModelProto:
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    node = onnx.helper.make_node("If", ["c"], [], then_branch=inner, else_branch=inner)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))


def _in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    function = onnx.helper.make_function("d", "f", [], ["c"], [node], [onnx.helper.make_opsetid("", 17)])
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), functions=[function])


def _in_sparse(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model


PLACES = [_in_initializer, _in_attribute, _in_subgraph, _in_function, _in_sparse]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.bin", "sub/../../x", "unlisted.bin"])
def test_data_outside_the_bundle_is_found_wherever_it_hides(place, location: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(place(_tensor(location)).SerializeToString())
    with pytest.raises(BundleError, match="not in the bundle"):
        check_external_data(tmp_path, "m.onnx", allowed=frozenset({"m.onnx", "weights.bin"}))


@pytest.mark.parametrize("place", PLACES)
def test_listed_data_is_allowed(place, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.onnx").write_bytes(place(_tensor("weights.bin")).SerializeToString())
    check_external_data(tmp_path, "sub/m.onnx", allowed=frozenset({"sub/weights.bin"}))


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x3a\x7f", b"\x3a\x03abc"])
def test_a_file_that_is_not_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(BundleError):
        check_external_data(tmp_path, "m.onnx", allowed=frozenset())


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_nested_graphs(70))
    with pytest.raises(BundleError, match="nested too deeply"):
        check_external_data(tmp_path, "m.onnx", allowed=frozenset())


def _nested_graphs(depth: int) -> bytes:
    """A model whose graph has a node with an attribute that is a graph with a node, and so on."""
    graph = b""
    for _ in range(depth):
        attribute = b"\x32" + _varint(len(graph)) + graph
        node = b"\x2a" + _varint(len(attribute)) + attribute
        graph = b"\x0a" + _varint(len(node)) + node
    return b"\x3a" + _varint(len(graph)) + graph


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
