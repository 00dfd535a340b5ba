"""``fcos-deploy calibrate`` and ``quantize`` when no more can be written: a sentence, and nothing half done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from calibration.cache import Calibration, save_calibration

pytest.importorskip("onnxruntime")
pytest.importorskip("resource")

# The kernel refuses to let a file grow beyond this, as a full disk does.
_LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from fcos_deploy.cli.app import main
main()
"""


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _LIMITED, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_calibrate(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    options = ("--engine", "onnxruntime", "--threads", 1)
    done = _run("calibrate", mini_onnx, "--images", smooth_images, "-o", tmp_path / "c.json", *options)
    assert done.returncode in (1, 2), done.stderr
    assert "Cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_quantize(mini_onnx: Path, mini_calibration: Calibration, tmp_path: Path) -> None:
    calibration, output = tmp_path / "c.json", tmp_path / "out"
    save_calibration(mini_calibration, calibration)
    done = _run("quantize", mini_onnx, "--calibration", calibration, "-o", output / "q.onnx")
    assert done.returncode in (1, 2), done.stderr
    assert "Cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(output.iterdir()) == []
