"""docs/first-hour.md, cheaply: what is refused on the page is refused here, with the same exit code and hint.

A process for each session runs its refused commands, and ``doctor``, with the libraries blocked that the session has
not installed at that point. ``python docs/first_hour.py`` repeats everything in bare environments.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fcos_deploy.bundle import pack

pytest.importorskip("torch")
pytest.importorskip("openvino")

ROOT = Path(__file__).parents[2]
_DRIVER = """
import json, pathlib, sys

LIBRARIES = {
    "onnxruntime": {"onnxruntime"}, "openvino": {"openvino"}, "jetson": {"cuda"}, "tensorrt": {"tensorrt"},
    "export": {"torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "yaml"}, "sign": {"cryptography"},
    "eval": {"faster_coco_eval"}, "nncf": {"nncf", "openvino"}, "report": {"jinja2", "matplotlib"},
    "tensorrt-rtx": {"tensorrt_rtx"},
}
LIBRARIES["all"] = set().union(*(LIBRARIES[e] for e in ("export", "openvino", "nncf", "eval", "report", "sign")))
blocked = set().union(*LIBRARIES.values())

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Blocker())
extras, prelude, commands = json.loads(sys.stdin.read())
exec(prelude)
for extra in extras:
    blocked -= LIBRARIES[extra]

from typer.testing import CliRunner
from fcos_deploy.cli.app import build_app

results = []
for words in commands:
    if words[0] == "pip":
        blocked -= LIBRARIES[words[-1].partition("[")[2].rstrip("]")]
        results.append((0, ""))
    else:
        done = CliRunner().invoke(build_app(), words[1:])
        crash = done.exception and not isinstance(done.exception, SystemExit)
        results.append((done.exit_code, repr(done.exception) if crash else done.stdout + done.stderr))
print(json.dumps(results))
"""


def _first_hour() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_hour", ROOT / "docs" / "first_hour.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["first_hour"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIRST_HOUR = _first_hour()
SESSIONS = {session.name: session for _, session in FIRST_HOUR.sessions(FIRST_HOUR.PAGE.read_text(encoding="utf-8"))}


def test_every_hint_of_the_page_is_followed() -> None:
    assert {"workstation", "mmdetection", "intel", "bare", "jetson"} <= SESSIONS.keys()
    for session in SESSIONS.values():
        assert FIRST_HOUR.not_followed(session.steps) == []


def test_a_hint_that_is_not_followed_is_noticed() -> None:
    def steps(*commands: str) -> tuple[object, ...]:
        said = "error: no.\nhint:  pip install 'fcos-deploy[export]'\n"
        return tuple(FIRST_HOUR.Step(command, said, 3) for command in commands)

    assert FIRST_HOUR.not_followed(steps("fcos-deploy a", "pip install 'fcos-deploy[export]'")) == []
    assert len(FIRST_HOUR.not_followed(steps("fcos-deploy a", "fcos-deploy b"))) == 1


@pytest.fixture(scope="module")
def files(demo_onnx: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the sessions have or make; ``cells.tar`` is of another model and backend, so that its hints are others."""
    folder = tmp_path_factory.mktemp("first-hour") / "files"
    FIRST_HOUR.make_files(folder)
    shutil.copy(demo_onnx, folder / "cells.onnx")
    shutil.copy(folder / "val" / "BloodImage_00000.jpg", folder / "image.jpg")
    pack(tiny_bundle, folder / "cells.tar")
    return folder


@pytest.mark.parametrize("name", SESSIONS)
def test_what_is_refused_on_the_page_is_refused_with_the_same_hint(name: str, files: Path) -> None:
    session = SESSIONS[name]
    # A model without class names, and a bundle for OpenVINO, as they are made there.
    made_there = ("evaluate cells.onnx --images val --annotations", "verify cells.tar", "predict cells.tar dog.jpg")
    steps = [
        step
        for step in session.steps
        if re.match(r"pip |fcos-deploy doctor", step.command)
        or (step.exit_code and not any(words in step.command for words in made_there))
    ]
    prelude = ""
    if session.jetson:
        for path, text in FIRST_HOUR.JETSON.items():
            (files / "board" / path).parent.mkdir(parents=True, exist_ok=True)
            (files / "board" / path).write_text(text)
        prelude = FIRST_HOUR.LOOKS_LIKE_A_JETSON.format(board=str(files / "board"))
    given = json.dumps([session.extras, prelude, [shlex.split(step.command) for step in steps]])
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER], cwd=files, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for step, (code, said) in zip(steps, json.loads(done.stdout), strict=True):
        assert code == step.exit_code, f"{step.command}\n{said}"
        hints = re.findall(r"^(?:hint:|Error:).*", step.output, re.M)
        for line in hints if "cells.tar" not in step.command else []:
            assert " ".join(line.split()) in " ".join(said.split()), step.command
