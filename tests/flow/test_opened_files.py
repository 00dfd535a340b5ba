"""Every file that a signed prediction opens is accounted for: listed, authenticated, or the system's.

Seen twice: by Python's audit events, which name what our code opens, and where strace is installed by the system calls
of the whole process, in which the runtimes' native code is too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from fcos_deploy.bundle import open_bundle
from fcos_deploy.bundle.manifest import DIGEST_NAME, MANIFEST_NAME, SIGNATURE_NAME
from fcos_deploy.bundle.signature import generate_key
from fcos_deploy.bundle.store import sign

pytest.importorskip("openvino")
pytest.importorskip("cryptography")

ROOT = Path(__file__).parents[2]
STRACE = shutil.which("strace")
_PROGRAM = """
import json, os, sys
opened = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))
sys.addaudithook(hook)
from fcos_deploy.cli.app import main
try:
    main()
finally:
    paths = sorted(set(opened))
    print(json.dumps(paths), file=open(os.environ["OPENED"], "w"))
"""
Opened = Callable[..., list[Path]]


@pytest.fixture
def home(tiny_ir_bundle: Path, tmp_path: Path) -> Path:
    """A signed bundle with files around it that no run has a reason to read."""
    bundle = Path(shutil.copytree(tiny_ir_bundle, tmp_path / "cells"))
    generate_key(tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    sign(bundle, private_key=tmp_path / "key.pem")
    shutil.copyfile(next((bundle / "golden").iterdir()), tmp_path / "image.png")
    for name in ("pip.conf", "sitecustomize.py", "openvino.xml", "model.json", "plugins.xml"):
        (tmp_path / name).write_text("not for us")
    return tmp_path


def _opened(home: Path, *arguments: str, native: bool) -> list[Path]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OPENED": str(home / "opened.json"),
        "FCOS_DEPLOY_STATE": str(home / "state"),
        "FCOS_DEPLOY_CACHE": str(home / "cache"),
    }
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", _PROGRAM, *arguments]
    if native:
        # -y names what was opened after its number.
        command = [str(STRACE), "-f", "-y", "-e", "trace=open,openat,openat2", "-o", "opened.trace", *command]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if not native:
        return [Path(path) for path in json.loads((home / "opened.json").read_text())]
    lines = (home / "opened.trace").read_text(errors="replace").splitlines()
    return [Path(call[1]) for line in lines if (call := _OPENED_CALL.search(line))]


# 12 openat(AT_FDCWD</home>, "a", O_RDONLY) = 3</home/a>, or its end where another thread came between.
_OPENED_CALL = re.compile(r"\bopen(?:at2?)?\b.*= \d+<([^>]+)>")


@pytest.mark.parametrize(
    ("backend", "native"),
    [
        ("openvino", False),
        *(
            pytest.param(backend, True, marks=pytest.mark.skipif(STRACE is None, reason="strace is not installed"))
            for backend in ("openvino", "onnxruntime")
        ),
    ],
)
def test_a_signed_prediction_opens_nothing_that_nobody_vouches_for(home: Path, backend: str, native: bool) -> None:
    arguments = ("predict", "cells", "image.png", "--require-signature", "--public-key", "key.pub.pem", "--json")
    system = [Path(path).resolve() for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}]
    system += [ROOT, Path("/proc"), Path("/sys"), Path("/dev"), Path("/etc"), Path("/usr"), Path("/lib")]
    with open_bundle(home / "cells") as bundle:
        listed = {home / "cells" / name for name in bundle.manifest.all_files}
    vouched = listed | {home / "cells" / name for name in (MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME)}
    vouched |= {home / name for name in ("image.png", "key.pub.pem", "opened.json", "opened.trace", "state/secret")}
    for compiled in ("anew", "kept"):
        paths = _opened(home, *arguments, "--backend", backend, native=native)
        kept = {path for path in paths if path.parent == home / "cache" / "openvino" and ".kept" in path.name}
        assert bool(kept) is (backend == "openvino"), "a compiled model is kept, and authenticated before it is used"
        secret = {path for path in paths if path.parent == home / "state" and path.name.startswith(".secret.")}
        unknown = [
            path
            for path in set(paths) - vouched - kept - secret
            if not any(path.resolve().is_relative_to(folder) for folder in system) and path.is_file()
        ]
        assert unknown == [], compiled
        if native:
            assert any(str(path).startswith("/memfd:model.") for path in paths), "a runtime reads the checked bytes"
        weights = "model.fp32.onnx" if backend == "onnxruntime" else "model.fp32.openvino.bin"
        assert home / "cells" / weights in paths
