"""What imports cost: the public names, and a device without torch and onnx."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fcos_deploy

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

# What Windows has in place of these modules and of these names in ``os`` and ``signal``.
_WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys, types
import fcntl, logging.handlers, multiprocessing, subprocess, tempfile  # the standard library's own use stays

msvcrt = types.ModuleType("msvcrt")
msvcrt.LK_LOCK, msvcrt.LK_NBLCK = 1, 2

def locking(descriptor, mode, count, *, flock=fcntl.flock, how=(fcntl.LOCK_EX, fcntl.LOCK_EX | fcntl.LOCK_NB)):
    try:
        flock(descriptor, how[mode - 1])
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error

msvcrt.locking = locking
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fork", "geteuid", "getuid", "sched_getaffinity",
             "memfd_create", "sysconf"):
    delattr(os, name)
del signal.SIGHUP
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


@pytest.mark.parametrize(
    "words",
    [
        "predict {checkpoint} {picture} --backend pytorch",
        "export {checkpoint} -o {folder}/m.onnx",
        "deploy {checkpoint} -o {folder}/b --calibration-images {pictures}",
        "demo -o {folder}/b",
    ],
    ids=lambda words: words.partition(" ")[0],
)
def test_a_checkpoint_says_what_to_install(tiny_checkpoint: Path, picture: Path, tmp_path: Path, words: str) -> None:
    names = {"checkpoint": tiny_checkpoint, "picture": picture, "pictures": picture.parent, "folder": tmp_path}
    done = _run(*words.format(**names).split())
    assert done.returncode == 3, done.stderr
    assert "'torch' is not installed" in done.stderr
    assert "pip install 'fcos-deploy[export]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_without_its_runtime_says_what_to_install(tiny_bundle: Path) -> None:
    program = "import sys; sys.modules['onnxruntime'] = None; from fcos_deploy.cli.app import main; main()"
    words = [sys.executable, "-c", program, "verify", str(tiny_bundle), "--backend", "onnxruntime"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "pip install 'fcos-deploy[onnxruntime]'" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "{bundle}"),
        ("build", "{bundle}", "--backend", "openvino"),
        ("setup", "{bundle}", "--backend", "openvino"),
        ("install", "{bundle}", "{bundle}-installed"),
        ("sign", "--generate-key", "--key", "{bundle}-key.pem"),
    ],
    ids=lambda words: words[0],
)
def test_commands_run_where_nothing_of_posix_is_there(
    tiny_bundle: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    program = _WITHOUT_POSIX + "from fcos_deploy.cli.app import main\nmain()"
    arguments = [word.format(bundle=bundle) for word in words]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_is_imported_where_nothing_of_posix_is_there(tmp_path: Path) -> None:
    program = (
        _WITHOUT_POSIX
        + """
for top in ("fcos_deploy", "runtimes", "exporters", "calibration"):
    for module in pkgutil.walk_packages(importlib.import_module(top).__path__, f"{top}."):
        importlib.import_module(module.name)

from pathlib import Path
from fcos_deploy.core.files import lock_file

path = Path(sys.argv[1])
with path.open("w+b") as first, path.open("r+b") as second:
    lock_file(first.fileno())
    try:
        lock_file(second.fileno(), wait=False)
    except BlockingIOError:
        sys.exit(0)
sys.exit("not locked")
"""
    )
    command = [sys.executable, "-c", program, str(tmp_path / "locked")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_is_its_homes() -> None:
    for name in fcos_deploy.__all__:
        assert getattr(getattr(fcos_deploy, name), "__name__", name) == name  # a table of profiles has none


def test_importing_it_loads_neither_numpy_nor_a_framework() -> None:
    code = "import sys, fcos_deploy; assert not {'numpy', 'torch', 'onnx', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
