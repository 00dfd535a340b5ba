"""What is shipped: exactly four import packages, typed, with their data files, and a light command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build from a copy of the sources, in ``folder``."""
    source = folder / "source"
    for name in ("fcos_deploy", "exporters", "runtimes", "calibration"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)],
        check=True,
        cwd=folder,
        env={**os.environ, "FCOS_DEPLOY_NATIVE": "", **environment},
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))).namelist()


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_compiled_host_path_is_shipped_where_there_is_a_compiler(wheel_names: list[str]) -> None:
    assert "fcos_deploy/core/c/host.so" in wheel_names


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_built_without_the_library(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CC="/no/compiler")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.startswith("fcos_deploy-0.1.0-py3-none-")
    assert "fcos_deploy/core/native.py" in names
    assert "fcos_deploy/core/c/host.so" not in names


@pytest.mark.slow
def test_the_sources_of_the_cpp_package_are_shipped(wheel_names: list[str]) -> None:
    sources = ROOT / "fcos_deploy" / "serving" / "cpp_sources"
    shipped = {name for name in wheel_names if name.startswith("fcos_deploy/serving/cpp_sources/")}
    assert shipped == {f"fcos_deploy/serving/cpp_sources/{path.name}" for path in sources.iterdir()}
