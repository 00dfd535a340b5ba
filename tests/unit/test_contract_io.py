"""Contracts as they travel with artifacts, and tensor specifications."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fcos_deploy.core.artifact import OnnxGraph, find_contract, read_contract, sidecar_path, write_sidecar
from fcos_deploy.core.contract import METADATA_KEY, ModelContract, TensorSpec, contract_to_text
from fcos_deploy.core.errors import BackendLoadError, ConfigError, TensorMismatchError
from fcos_deploy.core.onnx_file import onnx_metadata


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def onnx_file(path: Path, properties: dict[str, str]) -> Path:
    """The wire format of a ModelProto: ir_version, producer_name, a graph of 300 bytes, metadata_props."""
    props = (field(14, field(1, k.encode()) + field(2, v.encode())) for k, v in properties.items())
    path.write_bytes(b"\x08\x0a" + field(2, b"test") + field(7, field(2, b"g" * 300)) + b"".join(props))
    return path


def test_metadata_is_what_the_onnx_package_wrote(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", 1, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    model = helper.make_model(graph)
    properties = {"a": "1", "empty": "", "Größe": "groß", METADATA_KEY: "x" * 100_000}
    helper.set_model_props(model, properties)
    onnx.save(model, tmp_path / "m.onnx")
    assert onnx_metadata(tmp_path / "m.onnx") == properties


def test_contract_of_an_onnx_file(bundle_contract: ModelContract, tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", {METADATA_KEY: contract_to_text(bundle_contract)})
    assert read_contract(path) == find_contract(path) == bundle_contract


def test_contract_beside_an_engine(bundle_contract: ModelContract, tmp_path: Path) -> None:
    path = tmp_path / "model.int8.engine"
    path.touch()
    assert find_contract(path) is None
    assert write_sidecar(path, bundle_contract, {"tensorrt": "10"}) == tmp_path / "model.int8.json"
    assert read_contract(path) == find_contract(path) == bundle_contract
    assert json.loads(sidecar_path(path).read_text())["record"] == {"tensorrt": "10"}


def test_files_of_elsewhere_carry_none(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", {"author": "someone"})
    assert find_contract(path) is None
    with pytest.raises(BackendLoadError, match="carries no fcos-deploy contract"):
        read_contract(path)


@pytest.mark.parametrize("name", ["m.onnx", "m.engine"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    for read in (read_contract, find_contract):
        with pytest.raises(BackendLoadError, match=f"{name}' does not exist"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", [read_contract, find_contract, OnnxGraph])
def test_a_checkpoint_or_a_folder_in_place_of_a_graph_is_named_as_what_it_is(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    for name in ("model.pth", "model.onnx"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 as torch.save writes it")
        with pytest.raises(BackendLoadError, match=f"{name}' is a checkpoint") as refused:
            read(tmp_path / name)
        assert "fcos-deploy export" in refused.value.hint
    with pytest.raises(BackendLoadError, match="is a folder, not a file"):
        read(tmp_path)


def test_missing_or_empty_onnx_file_has_no_metadata(tmp_path: Path) -> None:
    with pytest.raises(BackendLoadError, match=r"Cannot read '.*m\.onnx': No such file"):
        onnx_metadata(tmp_path / "m.onnx")
    with pytest.raises(BackendLoadError, match="Cannot read"):
        onnx_metadata(tmp_path)
    (tmp_path / "m.onnx").touch()
    with pytest.raises(BackendLoadError, match="is empty"):
        onnx_metadata(tmp_path / "m.onnx")


def test_missing_sidecar_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.xml").touch()
    with pytest.raises(BackendLoadError, match=r"m\.xml' has no 'm\.json' beside it"):
        read_contract(tmp_path / "m.xml")


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"contract": null}', '{"contract": {"tail": 1}}', "{" * 9]
)
def test_damaged_sidecar_is_a_load_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "m.xml").touch()
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(BackendLoadError, match=r"m\.(xml|json)'"):
        read_contract(tmp_path / "m.xml")


def test_sidecar_that_is_not_text_is_a_load_error(tmp_path: Path) -> None:
    (tmp_path / "m.xml").touch()
    (tmp_path / "m.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BackendLoadError, match="Cannot read the contract"):
        read_contract(tmp_path / "m.xml")


def test_contract_of_a_newer_version_says_so(bundle_contract: ModelContract, tmp_path: Path) -> None:
    newer = contract_to_text(bundle_contract).replace('"schema_version":1', '"schema_version":2')
    with pytest.raises(BackendLoadError, match="schema version 2") as caught:
        read_contract(onnx_file(tmp_path / "m.onnx", {METADATA_KEY: newer}))
    assert caught.value.hint == "upgrade fcos-deploy"


@pytest.mark.parametrize("cut", [1, 5, 40, 300, -1, -20])
def test_cut_off_onnx_file_is_a_load_error(cut: int, bundle_contract: ModelContract, tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", {METADATA_KEY: contract_to_text(bundle_contract)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BackendLoadError, match="not a complete ONNX file"):
        read_contract(path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_never_give_another_error(
    data: st.DataObject, bundle_contract: ModelContract, tmp_path: Path
) -> None:
    path = onnx_file(tmp_path / "m.onnx", {METADATA_KEY: contract_to_text(bundle_contract)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    for read in (onnx_metadata, find_contract, read_contract):
        try:
            read(path)
        except BackendLoadError:
            continue


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_bytes_never_give_another_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    try:
        metadata = onnx_metadata(path)
    except BackendLoadError:
        return
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)


IMAGES = TensorSpec("images", "uint8", (None, 3, 64, 64))


@pytest.mark.parametrize("batch", [1, 5])
def test_dynamic_axes_take_any_length(batch: int) -> None:
    IMAGES.check(np.zeros((batch, 3, 64, 64), np.uint8))


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((1, 3, 64, 64), np.float32), r"got float32\[1, 3, 64, 64\]"),
        (np.zeros((1, 64, 64, 3), np.uint8), r"got uint8\[1, 64, 64, 3\]"),
        (np.zeros((3, 64, 64), np.uint8), r"got uint8\[3, 64, 64\]"),
    ],
)
def test_mismatch_says_what_was_expected_and_what_came(array: np.ndarray, got: str) -> None:
    with pytest.raises(TensorMismatchError, match=rf"Tensor 'images' must be uint8\[\?, 3, 64, 64\], {got}\."):
        IMAGES.check(array)


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        TensorSpec("", "uint8", (1,))
    with pytest.raises(ConfigError, match="unknown dtype 'bfloat17'"):
        TensorSpec("images", "bfloat17", (1,))
