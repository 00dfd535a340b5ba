"""The device side runs where neither torch nor onnx is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

_BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnxscript", "onnxsim", "torchvision"}:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Blocker())
from fcos_deploy.cli.app import main

sys.argv[0] = "fcos-deploy"
main()
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _BLOCKED, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory, blobs: list[NDArray[np.uint8]]) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "blobs.png"
    Image.fromarray(blobs[0]).save(path)
    return path


@pytest.mark.parametrize(
    ("model", "backend"), [("tiny_onnx", "onnxruntime"), ("tiny_onnx", "openvino"), ("tiny_ir", "")]
)
def test_predict_needs_neither_torch_nor_onnx(
    request: pytest.FixtureRequest, picture: Path, model: str, backend: str
) -> None:
    pytest.importorskip(backend or "openvino")
    path = request.getfixturevalue(model)
    done = _run("predict", str(path), str(picture), "--json", *(("--backend", backend) if backend else ()))
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    assert (document["width"], document["height"]) == (128, 96)
    assert len(document["detections"]) > 0


def test_a_checkpoint_says_what_to_install(tiny_checkpoint: Path, picture: Path) -> None:
    done = _run("predict", str(tiny_checkpoint), str(picture), "--backend", "pytorch")
    assert done.returncode == 3
    assert "needs 'torch'" in done.stderr
    assert "pip install 'fcos-deploy[export]'" in done.stderr
    assert "Traceback" not in done.stderr
