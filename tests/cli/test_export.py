"""``fcos-deploy export`` and ``simplify``: what users get wrong is one sentence, an exit code and no traceback."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fcos_deploy.cli.app import build_app
from fcos_deploy.pipeline.deploy import DEMO_DATA

CHECKPOINT = DEMO_DATA / "fcos_bccd.safetensors"


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


def _refused(result: Result, *words: str, code: int = 1) -> None:
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/fcos-deploy-was-here",)


def test_text_file_as_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_text("not a checkpoint\n" * 20)
    _refused(_run("export", tmp_path / "notes.pth", "-o", tmp_path / "m.onnx"), "notes.pth")
    assert not (tmp_path / "m.onnx").exists()


def test_pickle_that_executes_code_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": _Hostile()}))
    Path("/tmp/fcos-deploy-was-here").unlink(missing_ok=True)
    _refused(_run("inspect", tmp_path / "evil.pth"), "system")
    assert not Path("/tmp/fcos-deploy-was-here").exists()


def test_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3), "fc.bias": torch.zeros(10)}, tmp_path / "vgg.pth")
    _refused(_run("export", tmp_path / "vgg.pth", "-o", tmp_path / "m.onnx"), "features.0.weight")


def test_truncated_onnx(tmp_path: Path, tiny_onnx: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(tiny_onnx.read_bytes()[:-1000])
    _refused(_run("simplify", cut, "-o", tmp_path / "m.onnx"), "cut.onnx")


@pytest.mark.parametrize("command", ["export", "deploy"])
def test_output_that_cannot_be_written(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "out.onnx"
    more = ["--calibration-images", DEMO_DATA / "calibration"] if command == "deploy" else []
    result = _run(command, CHECKPOINT, "-o", target, *more)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.stderr
    assert "out.onnx" in result.stderr


def test_input_size_that_is_no_multiple_of_32_names_the_nearest(tmp_path: Path) -> None:
    result = _run("export", CHECKPOINT, "-o", tmp_path / "m.onnx", "--input-size", "300x400")
    _refused(result, "300x400", "288x384", code=2)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch", "many", "--batch must be a number or 'dynamic', got 'many'."),
        ("--batch", "0", "batch must be at least 1"),
        ("--precision", "half", "Invalid value for '--precision'"),
        ("--precision", "int8", "INT8 is made by 'fcos-deploy quantize'"),
        ("--nms-form", "soft", "Invalid value for '--nms-form'"),
        ("--input-size", "640", "--input-size must be height x width such as 640x640, got '640'."),
        ("--content-size", "640", "--content-size must be height x width such as 640x640, got '640'."),
        ("--mean", "1,2", "--mean must be three numbers with commas between them, or one for gray images, got '1,2'."),
        ("--classes", "RBC,WBC", "--classes must be a text file with one class name a line, got 'RBC,WBC'."),
    ],
)
def test_values_that_cannot_be_meant_are_refused(option: str, value: str, message: str, tmp_path: Path) -> None:
    _refused(_run("export", CHECKPOINT, "-o", tmp_path / "m.onnx", option, value), message, code=2)
    assert list(tmp_path.iterdir()) == []
