"""What is shipped: exactly four import packages, typed, with their data files, and a light command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    target, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("fcos_deploy", "exporters", "runtimes", "calibration"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), str(source)], check=True, cwd=target)
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_wheel_has_exactly_the_four_packages(wheel_names: list[str]) -> None:
    top = {name.partition("/")[0] for name in wheel_names if ".dist-info" not in name}
    assert top == {"fcos_deploy", "exporters", "runtimes", "calibration"}


@pytest.mark.slow
def test_every_package_is_typed(wheel_names: list[str]) -> None:
    for package in ("fcos_deploy", "exporters", "runtimes", "calibration"):
        assert f"{package}/py.typed" in wheel_names


@pytest.mark.slow
def test_demo_data_is_shipped_with_its_licence(wheel_names: list[str]) -> None:
    data = [name for name in wheel_names if name.startswith("fcos_deploy/demo_data/")]
    assert "fcos_deploy/demo_data/LICENSE" in data
    assert "fcos_deploy/demo_data/fcos_bccd.safetensors" in data
    assert sum(name.endswith(".jpg") for name in data) == 127
