"""What users get wrong, through the command line: one sentence each, the right exit code, never a traceback."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from fcos_deploy.cli.app import build_app
from fcos_deploy.pipeline.deploy import DEMO_DATA

CHECKPOINT = DEMO_DATA / "fcos_bccd.safetensors"
PHOTO = DEMO_DATA / "evaluation" / "BloodImage_00000.jpg"


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
    _refused(_run("predict", cut, PHOTO), "cut.onnx")
    _refused(_run("simplify", cut, "-o", tmp_path / "m.onnx"), "cut.onnx")


def test_unreadable_image_among_the_calibration_images(tmp_path: Path, tiny_onnx: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(DEMO_DATA / "calibration", images)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    _refused(_run("calibrate", tiny_onnx, "--images", images, "-o", tmp_path / "c.json"), "broken.jpg")
    assert not (tmp_path / "c.json").exists()


def test_empty_folder_of_calibration_images(tmp_path: Path, tiny_onnx: Path) -> None:
    (tmp_path / "images").mkdir()
    _refused(_run("calibrate", tiny_onnx, "--images", tmp_path / "images", "-o", tmp_path / "c.json"), "images")


def _pictures(folder: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
    made = {
        "gray.png": Image.fromarray(pixels[:, :, 0]),
        "sixteen.png": Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256),
        "rgba.png": Image.fromarray(np.dstack([pixels, pixels[:, :, :1]])),
        "one.png": Image.fromarray(pixels[:1, :1]),
        "wide.png": Image.fromarray(np.tile(pixels[:8], (1, 157, 1))[:, :10_000]),
    }
    for name, image in made.items():
        image.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: 64 x 48 becomes 48 x 64
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["gray.png", "sixteen.png", "rgba.png", "one.png", "wide.png", "turned.jpg"])
def test_unusual_images_are_detected_on(tmp_path: Path, tiny_onnx: Path, name: str) -> None:
    import json

    path = _pictures(tmp_path)[name]
    result = _run("predict", tiny_onnx, path, "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    sizes = {"one.png": (1, 1), "wide.png": (10_000, 8), "turned.jpg": (48, 64)}
    assert (found["width"], found["height"]) == sizes.get(name, (64, 48))
    assert all(0 <= v <= max(found["width"], found["height"]) for d in found["detections"] for v in d["box"])


def test_unknown_backend_names_the_ones_that_exist(tiny_onnx: Path) -> None:
    _refused(_run("predict", tiny_onnx, PHOTO, "--backend", "caffe"), "caffe", "openvino", "onnxruntime", code=2)


@pytest.mark.parametrize("command", ["export", "deploy"])
def test_output_that_cannot_be_written(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "out.onnx"
    more = ["--calibration-images", DEMO_DATA / "calibration"] if command == "deploy" else []
    result = _run(command, CHECKPOINT, "-o", target, *more)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.stderr
    assert "out.onnx" in result.stderr


def test_missing_annotations_file(tmp_path: Path, tiny_onnx: Path) -> None:
    arguments = ("evaluate", tiny_onnx, "--images", DEMO_DATA / "evaluation", "--annotations", tmp_path / "no.json")
    result = _run(*arguments)
    assert result.exit_code != 0
    assert "no.json" in result.stderr


def test_input_size_that_is_no_multiple_of_32_names_the_nearest(tmp_path: Path) -> None:
    result = _run("export", CHECKPOINT, "-o", tmp_path / "m.onnx", "--input-size", "300x400")
    _refused(result, "300x400", "288x384", code=2)
