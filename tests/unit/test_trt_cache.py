"""The calibration cache for old TensorRT: format and numbers."""

from __future__ import annotations

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calibration.cache import cache_lines, write_trt_cache
from calibration.placement import load_graph
from exporters._tensorrt_options import check_calibration_cache
from fcos_deploy.core.errors import CalibrationError, ConfigError

pytest.importorskip("onnx")


@pytest.mark.parametrize(
    ("version", "header"),
    [
        ("8.5.2", "TRT-8502-EntropyCalibration2"),
        ("8.6.1.6", "TRT-8601-EntropyCalibration2"),
        ("10.3.0", "TRT-100300-EntropyCalibration2"),
        ("10.14.1", "TRT-101401-EntropyCalibration2"),
    ],
)
def test_header_is_the_versions(version: str, header: str, mini_onnx: Path, mini_calibration: Any) -> None:
    assert cache_lines(mini_calibration, mini_onnx, version=version)[0] == header


def test_scales_are_big_endian_floats_of_amax_over_127(mini_onnx: Path, mini_calibration: Any, tmp_path: Path) -> None:
    write_trt_cache(mini_calibration, mini_onnx, tmp_path / "c.cache", version="10.3.0")
    entries = dict(line.split(": ") for line in (tmp_path / "c.cache").read_text().splitlines()[1:])
    (scale,) = struct.unpack("!f", bytes.fromhex(entries["block"]))
    assert scale == pytest.approx(mini_calibration.range_of("block").amax / 127, rel=1e-6)


def test_tensors_before_a_fused_relu_have_their_results_scale(mini_onnx: Path, mini_calibration: Any) -> None:
    entries = dict(line.split(": ") for line in cache_lines(mini_calibration, mini_onnx, version="8.5")[1:])
    assert entries["stem"] == entries["stem_relu"]
    assert entries["sum"] == entries["block"]
    assert {conv.output for conv in load_graph(mini_onnx).convs} <= set(entries)


def test_scales_are_written_as_the_bits_of_a_float() -> None:
    # TensorRT writes the bits of a float32: 3caa54fc is a scale of 0.0207925.
    assert struct.unpack("!f", bytes.fromhex("3caa54fc"))[0] == pytest.approx(0.0207925, rel=1e-5)
    from calibration.cache import _hex

    assert _hex(struct.unpack("!f", bytes.fromhex("3caa54fc"))[0]) == "3caa54fc"


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "10.13.3.9"])
def test_the_builder_takes_the_cache_of_its_version_and_no_other(
    version: str, mini_onnx: Path, mini_calibration: Any, tmp_path: Path
) -> None:
    """Everything but the build itself, which needs TensorRT: real ranges, the file, and the builder's look at it."""
    write_trt_cache(mini_calibration, mini_onnx, tmp_path / "c.cache", version=version)
    check_calibration_cache(tmp_path / "c.cache", version=version)
    entries = dict(line.split(": ") for line in (tmp_path / "c.cache").read_text().splitlines()[1:])
    assert {conv.input for conv in load_graph(mini_onnx).convs} <= set(entries)
    scales = [struct.unpack("!f", bytes.fromhex(entry))[0] for entry in entries.values()]
    assert all(0 < scale < 1e4 for scale in scales)
    with pytest.raises(ConfigError, match="would ignore it"):
        check_calibration_cache(tmp_path / "c.cache", version="10.4.0")


@pytest.mark.parametrize("version", ["11.0.0", "6.0", "ten", ""])
def test_versions_without_a_cache(version: str, mini_onnx: Path, mini_calibration: Any) -> None:
    with pytest.raises(ConfigError):
        cache_lines(mini_calibration, mini_onnx, version=version)


def test_another_graph(mini_fcos: ModuleType, mini_calibration: Any, tmp_path: Path) -> None:
    other = mini_fcos.write(tmp_path / "other.onnx", seed=9)
    with pytest.raises(CalibrationError, match="belongs to the graph"):
        write_trt_cache(mini_calibration, other, tmp_path / "c.cache", version="8.5.2")
