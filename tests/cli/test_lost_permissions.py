"""Files that may not be read and folders that may not be written: one sentence with the path, nothing left behind.

For root permission bits hold only without two of its capabilities, which the child process is started without.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

_PR_CAPBSET_DROP = 24  # linux/prctl.h
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2  # linux/capability.h
# Starts once for many commands: {"name": [arguments]} on stdin, {"name": [exit code, stdout, stderr]} on stdout.
_PROGRAM = """
import json, os, sys
from typer.testing import CliRunner
from fcos_deploy.cli.app import build_app
assert not os.access(sys.argv[1], os.W_OK), "permission bits do not hold here"
done = {name: CliRunner().invoke(build_app(), words) for name, words in json.load(sys.stdin).items()}
print(json.dumps({name: [one.exit_code, one.stdout, one.stderr, repr(one.exception)] for name, one in done.items()}))
"""


def _obey_permission_bits() -> None:
    if os.geteuid() != 0:
        return  # They hold anyway.
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """``closed`` is a folder that may be read and not written; permissions come back when the test ends."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    yield tmp_path
    for path in sorted(tmp_path.rglob("*")):
        path.chmod(0o755)


def _run(place: Path, commands: dict[str, list[object]]) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, none of which may end in an exception."""
    words = {name: [str(word) for word in command] for name, command in commands.items()}
    program = [sys.executable, "-c", _PROGRAM, str(place / "closed")]
    environment = {**os.environ, "FCOS_DEPLOY_CACHE": "/dev/null"}
    try:
        done = subprocess.run(
            program,
            input=json.dumps(words),
            preexec_fn=_obey_permission_bits,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.SubprocessError:
        pytest.skip("root may not give up its capabilities here")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [name for name, one in results.items() if one[3] != f"SystemExit({one[0]})" and one[0]] == []
    return {name: (one[0], one[1], one[2]) for name, one in results.items()}


def test_a_folder_that_may_not_be_written_is_named_and_left_as_it_was(
    tiny_bundle: Path, tiny_onnx: Path, tiny_checkpoint: Path, smooth_images: Path, place: Path
) -> None:
    pytest.importorskip("onnx")
    closed, picture = place / "closed", smooth_images / "b" / "00.png"
    short = ("--rounds", 1, "--seconds", 0.1, "--warmup", 0, "--no-cold-start")
    done = _run(
        place,
        {
            "simplify": ["simplify", tiny_onnx, "-o", closed / "s.onnx"],
            "export": ["export", tiny_checkpoint, "-o", closed / "e.onnx"],
            "package": ["package", tiny_bundle, "-o", closed / "b.tar"],
            "triton": ["package", tiny_bundle, "--for", "triton", "-o", closed / "models"],
            "predict": ["predict", tiny_onnx, picture, "--draw", closed / "drawn"],
            "benchmark": ["benchmark", tiny_onnx, *short, "--output", closed / "b.json"],
            "calibrate": ["calibrate", tiny_onnx, "--images", smooth_images, "--count", 8, "-o", closed / "c.json"],
            "sign": ["sign", "--generate-key", "--key", closed / "k.pem"],
            "verify": ["verify", tiny_bundle, "--log", closed / "log.jsonl"],
        },
    )
    for name, (code, _, told) in done.items():
        assert code == 2, (name, code, told)
        assert f"Cannot write '{closed}" in told, (name, told)
        assert "Permission denied" in told or "no permission" in told, (name, told)
        assert "hint:" in told, (name, told)
    assert list(closed.iterdir()) == []


def test_a_file_that_may_not_be_read_is_named(
    tiny_bundle: Path, tiny_onnx: Path, tiny_checkpoint: Path, smooth_images: Path, place: Path
) -> None:
    picture = smooth_images / "b" / "00.png"
    images, bundle = place / "images", place / "bundle"
    images.mkdir()
    for name in "abcdefghi":
        shutil.copyfile(picture, images / f"{name}.png")
    shutil.copytree(tiny_bundle, bundle)
    shutil.copyfile(tiny_onnx, place / "m.onnx")
    shutil.copyfile(tiny_checkpoint, place / "m.safetensors")
    secret = [place / "m.onnx", place / "m.safetensors", images / "b.png", bundle / "model.fp32.onnx"]
    for path in secret:
        path.chmod(0)
    output = place / "c.json"
    commands: dict[str, tuple[str, list[object]]] = {
        "predict": ("m.onnx", ["predict", place / "m.onnx", picture]),
        "inspect": ("m.onnx", ["inspect", place / "m.onnx"]),
        "simplify": ("m.onnx", ["simplify", place / "m.onnx", "-o", place / "s.onnx"]),
        "checkpoint": ("m.safetensors", ["predict", place / "m.safetensors", picture]),
        "export": ("m.safetensors", ["export", place / "m.safetensors", "-o", place / "e.onnx"]),
        "image": ("b.png", ["predict", tiny_onnx, images, "--json"]),
        "calibrate": ("b.png", ["calibrate", tiny_onnx, "--images", images, "-o", output]),
        "bundle": ("model.fp32.onnx", ["verify", bundle]),
        "package": ("model.fp32.onnx", ["package", bundle, "-o", place / "b.tar"]),
    }
    before = sorted(place.rglob("*"))
    done = _run(place, {name: command for name, (_, command) in commands.items()})
    for name, (code, printed, told) in done.items():
        given = commands[name][0] in str(
            commands[name][1][1]
        )  # Looked at with the other arguments, before the command.
        assert code == (2 if given else 1), (name, code, told)
        assert commands[name][0] in told, (name, told)
        assert "is not readable" in told or "Permission denied" in told, (name, told)
        assert (printed == "") is (name != "image"), (name, printed)
    assert [Path(one["image"]).name for one in json.loads(done["image"][1])] == [f"{name}.png" for name in "acdefghi"]
    assert sorted(place.rglob("*")) == before
