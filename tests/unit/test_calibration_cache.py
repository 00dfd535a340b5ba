"""calibration.json and the calibration cache of old TensorRT: what comes back, format and numbers, refusals."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calibration.calibrate import load_calibration, save_calibration, write_trt_cache
from calibration.placement import open_graph
from calibration.ranges import RangeMethod
from exporters._tensorrt_options import check_calibration_cache
from fcos_deploy.core.errors import CalibrationError, ConfigError


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
