"""Disks that fill up, permissions that are missing, runtimes that fail in the middle: one sentence, nothing half-made.

``RLIMIT_FSIZE`` stands in for a full disk: writing beyond it fails as on one, with EFBIG for ENOSPC.
For root permission bits hold only without two of its capabilities, which a child process is started without.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from calibration.calibrate import save_calibration
from fcos_deploy.bundle import pack
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import BackendError, BackendLoadError
from fcos_deploy.detector import Detector

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

PROGRAM = "from fcos_deploy.cli.app import main; main()"


def _on_a_small_disk(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process that can write no file beyond ``size`` bytes."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    environment = {**os.environ, "FCOS_DEPLOY_CACHE": "/dev/null"}
    return subprocess.run(command, preexec_fn=limit, env=environment, capture_output=True, text=True, check=False)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def _refused(done: subprocess.CompletedProcess[str] | Result, word: str) -> None:
    code = done.returncode if isinstance(done, subprocess.CompletedProcess) else done.exit_code
    assert code in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert word in done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 100 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_memory_that_runs_out_is_told(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Detector, "open", out_of_memory)
    _refused(_run("predict", tiny_onnx, tmp_path), "There is not enough memory.")


def test_packages_on_a_full_disk_are_told_and_leave_nothing(tiny_bundle: Path, small: Path) -> None:
    _refused(_run("package", tiny_bundle, "-o", small / "b.tar"), "No space left")
    _refused(_run("package", tiny_bundle, "--for", "triton", "-o", small / "models"), f"Cannot write '{small}/models'")
    assert list(small.iterdir()) == []


def test_a_build_on_a_full_disk_is_told_and_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    onnx = tiny_bundle / "model.fp32.onnx"
    pytest.importorskip("openvino")
    built = _on_a_small_disk(100_000, "build", onnx, "--backend", "openvino", "-o", tmp_path / "m.xml")
    _refused(built, f"is there room in '{tmp_path}'")
    assert list(tmp_path.iterdir()) == []


def test_calibration_and_quantization_on_a_full_disk_leave_nothing(
    mini_onnx: Path, mini_calibration: Any, smooth_images: Path, tmp_path: Path
) -> None:
    options = ("--engine", "onnxruntime", "--threads", 1)
    calibrate = ("calibrate", mini_onnx, "--images", smooth_images, "-o", tmp_path / "c.json", *options)
    _refused(_on_a_small_disk(4096, *calibrate), "Cannot write")
    assert list(tmp_path.iterdir()) == []
    calibration, output = tmp_path / "calibration.json", tmp_path / "out"
    save_calibration(mini_calibration, calibration)
    quantize = ("quantize", mini_onnx, "--calibration", calibration, "-o", output / "q.onnx")
    _refused(_on_a_small_disk(4096, *quantize), "Cannot write")
    assert list(output.iterdir()) == []


def test_an_evaluation_on_a_full_disk_goes_on_when_there_is_room(
    tiny_onnx: Path, smooth_images: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", tiny_onnx, "--reference", tiny_onnx, "--images", smooth_images, "--limit", 4)
    arguments = (*arguments, "--resamples", 0, "--predictions", tmp_path / "kept", "--json")
    _refused(_on_a_small_disk(20_000, *arguments), "make room and run the command again")
    (kept,) = (tmp_path / "kept").iterdir()
    whole = kept.read_bytes().count(b"\n")
    assert 0 < whole < 4
    done = _run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert kept.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("place", ["/proc/nowhere/x", "/dev/null/x"])
def test_a_place_that_cannot_be_written_is_named(place: str, tiny_bundle: Path, tiny_onnx: Path) -> None:
    _refused(_run("package", tiny_bundle, "-o", f"{place}.tar"), place)
    _refused(_run("package", tiny_bundle, "--for", "ovms", "-o", place), place)
    _refused(_run("sign", "--generate-key", "--key", f"{place}.pem"), place)
    _refused(_run("verify", tiny_bundle, "--log", f"{place}.jsonl"), place)
    short = ("--rounds", 1, "--seconds", 0.1, "--warmup", 0, "--no-cold-start")
    _refused(_run("benchmark", tiny_onnx, *short, "--output", f"{place}.json"), place)


def test_files_that_are_gone_while_a_command_runs_are_no_traceback(tiny_bundle: Path, tmp_path: Path) -> None:
    """``/proc/self/mem`` opens and then refuses to be read, as a dying disk does."""
    (tmp_path / "m.onnx").symlink_to("/proc/self/mem")
    for command in ("predict", "inspect"):
        more = ("x.png",) if command == "predict" else ()
        _refused(_run(command, tmp_path / "m.onnx", *more), "m.onnx")


def test_weights_that_were_cut_off_are_refused_by_the_runtime_and_told(tiny_ir: Path, tmp_path: Path) -> None:
    for suffix in (".xml", ".bin", ".json"):
        content = tiny_ir.with_suffix(suffix).read_bytes()
        (tmp_path / f"m{suffix}").write_bytes(content[: len(content) // 2] if suffix == ".bin" else content)
    with pytest.raises(BackendLoadError, match=r"m\.xml"):
        Detector.open(tmp_path / "m.xml")
    assert _run("predict", tmp_path / "m.xml", "x.png").exit_code == 1


def test_a_runtime_that_throws_in_the_middle_is_an_error_of_that_request_only(
    bundle_contract: ModelContract, tmp_path: Path
) -> None:
    """A real graph that fails for some inputs: it looks a pixel's value up in a table of four."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    table = onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), "table")
    nodes = [
        helper.make_node("Cast", ["images"], ["index"], to=onnx.TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["out"]),
    ]
    shape = [1, 3, 64, 96]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)],
        [table],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    options = SessionOptions(threads=1, contract=bundle_contract)
    with get_backend("onnxruntime").open(tmp_path / "m.onnx", options) as session:
        good, bad = np.full(shape, 3, np.uint8), np.full(shape, 200, np.uint8)
        assert session.run({"images": good})["out"].max() == 3.0
        with pytest.raises(BackendError):
            session.run({"images": bad})
        assert session.run({"images": good})["out"].max() == 3.0


def test_a_damaged_store_of_predictions_is_named_and_made_again(
    tiny_onnx: Path, smooth_images: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", tiny_onnx, "--reference", tiny_onnx, "--images", smooth_images, "--limit", 2)
    arguments = (*arguments, "--resamples", 0, "--predictions", tmp_path)
    assert _run(*arguments).exit_code == 0
    (kept,) = tmp_path.iterdir()
    kept.write_text(json.dumps({"image_id": 1}) + "\nnot json\n")
    done = _run(*arguments)
    assert done.exit_code == 0, done.output
    assert f"{kept.name}' is damaged after 0 images" in done.stderr
    assert len(kept.read_text().splitlines()) == 2


_PR_CAPBSET_DROP = 24  # linux/prctl.h
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2  # linux/capability.h
# Starts once for many commands: {"name": [arguments]} on stdin, {"name": [exit code, stdout, stderr]} on stdout.
_MANY = """
import json, os, sys
from typer.testing import CliRunner
from fcos_deploy.bundle import pack
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


def _run_unprivileged(place: Path, commands: dict[str, list[object]]) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, none of which may end in an exception."""
    words = {name: [str(word) for word in command] for name, command in commands.items()}
    program = [sys.executable, "-c", _MANY, str(place / "closed")]
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
    done = _run_unprivileged(
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
    done = _run_unprivileged(place, {name: command for name, (_, command) in commands.items()})
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


def test_without_a_temporary_folder_it_is_asked_for(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tiny_bundle, tmp_path / "b.tar")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "nowhere")])
    done = _run("verify", tmp_path / "b.tar")
    _refused(done, "set TMPDIR to a folder that can be written")
    assert "Errno" not in done.stderr
