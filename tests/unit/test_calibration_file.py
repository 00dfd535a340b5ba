"""calibration.json: what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from calibration.cache import load_calibration, save_calibration
from calibration.ranges import RangeMethod
from fcos_deploy.core.errors import CalibrationError, ConfigError


@pytest.fixture
def saved(mini_calibration: Any, tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    save_calibration(mini_calibration, path)
    return path


def test_everything_comes_back(saved: Path, mini_calibration: Any, mini_onnx: Path) -> None:
    assert load_calibration(saved, graph=mini_onnx) == mini_calibration


def test_file_is_readable_by_people(saved: Path) -> None:
    content = json.loads(saved.read_text())
    assert content["schema_version"] == 1
    assert set(content["tensors"]["block"]["ranges"]) == {str(m) for m in RangeMethod}
    assert content["images"][0]["name"] == "a/01.png"


def test_another_graph_is_refused(saved: Path, mini_fcos: ModuleType, tmp_path: Path) -> None:
    other = mini_fcos.write(tmp_path / "other.onnx", seed=1)
    with pytest.raises(CalibrationError, match=r"belongs to the graph [0-9a-f]{12}, '.*other\.onnx' is [0-9a-f]{12}"):
        load_calibration(saved, graph=other)


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
