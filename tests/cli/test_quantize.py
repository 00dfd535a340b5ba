"""``fcos-deploy calibrate`` and ``fcos-deploy quantize`` as users type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fcos_deploy.cli.app import build_app
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.image import list_images

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

RUN = CliRunner()


def call(*words: object) -> Result:
    return RUN.invoke(build_app(), [str(word) for word in words])


@pytest.fixture(scope="module")
def calibration(mini_onnx: Path, smooth_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "calibration.json"
    result = call("calibrate", mini_onnx, "--images", smooth_images, "-o", path, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["images"]["images"] == 12
    assert report["method"] == "percentile"
    return path


def test_quantize_for_a_backend(mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.onnx"
    result = call("quantize", mini_onnx, "--calibration", calibration, "-o", output, "--for", "onnxruntime", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["record"]["placement"] == "onnxruntime-cpu"
    assert read_contract(output).placement == "onnxruntime-cpu"
    image = list_images(smooth_images)[0]
    assert "placed for" not in call("predict", output, image).stderr


def test_a_placement_names_its_runtimes_and_another_one_the_way_out(
    mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path
) -> None:
    output, image = tmp_path / "q.onnx", list_images(smooth_images)[0]
    made = call("quantize", mini_onnx, "--calibration", calibration, "-o", output)
    assert "meant for tensorrt and tensorrt-rtx" in made.stderr
    uses: tuple[tuple[object, ...], ...] = (
        ("predict", output, image),
        ("benchmark", output, "--rounds", 1, "--seconds", 0.1, "--no-cold-start", "--image", image),
        ("evaluate", output, "--images", smooth_images, "--reference", mini_onnx, "--limit", 2, "--resamples", 0),
    )
    for words in uses:
        said = call(*words).stderr
        assert said.count("INT8 of this graph is placed for 'portable'") == 1, said
        assert "fcos-deploy quantize MODEL --calibration FILE --for onnxruntime" in said


def test_method_and_weights_can_be_replaced(mini_onnx: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--method", "minmax", "--weights", "full", "--ignore-layer", "stem.weight", "--json")
    result = call("quantize", mini_onnx, "--calibration", calibration, "-o", tmp_path / "q.onnx", *options)
    record = json.loads(result.stdout)["record"]
    assert record["weights"] == "full"
    assert record["method"] == "minmax"
    assert record["float_convolutions"] == "n_stem"


def test_noise_is_that_of_pictures_or_not_told(
    mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path
) -> None:
    def noise(*options: Any) -> set[str]:
        made = call("quantize", mini_onnx, "--calibration", calibration, "-o", tmp_path / "q.onnx", "--json", *options)
        return {key for key in json.loads(made.stdout)["record"] if key.startswith("sqnr")}

    assert noise() == set()
    assert len(noise("--images", smooth_images)) == 3


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--for", "toaster"), 2, "no INT8 placement for 'toaster'"),
        (("--method", "magic"), 2, "no range method 'magic'"),
        (("--weights", "half"), 2, "no range of weights 'half'"),
        (("--quantizer", "magic"), 2, "no quantizer 'magic'"),
        (("--ignore-layer", "ghost"), 2, "no layer ['ghost']"),
        (("--max-map-drop", "0.01"), 2, "An accuracy goal needs images"),
    ],
)
def test_options_that_cannot_be_meant(
    options: tuple[str, ...], code: int, message: str, mini_onnx: Path, calibration: Path, tmp_path: Path
) -> None:
    result = call("quantize", mini_onnx, "--calibration", calibration, "-o", tmp_path / "q.onnx", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_quantize_without_a_calibration(mini_onnx: Path, tmp_path: Path) -> None:
    result = call("quantize", mini_onnx, "-o", tmp_path / "q.onnx")
    assert result.exit_code == 1
    assert "fcos-deploy calibrate" in result.stderr


def test_calibrate_names_an_image_that_cannot_be_read(mini_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(smooth_images, images)
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    result = call("calibrate", mini_onnx, "--images", images, "-o", tmp_path / "c.json")
    assert result.exit_code == 1
    assert "broken.jpg" in result.stderr
    assert not (tmp_path / "c.json").exists()


def test_calibrate_on_an_empty_folder(mini_onnx: Path, tmp_path: Path) -> None:
    result = call("calibrate", mini_onnx, "--images", tmp_path, "-o", tmp_path / "c.json")
    assert result.exit_code == 1
    assert "holds no images" in result.stderr


def test_goal_holds_by_the_float_models_own_detections(
    mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("faster_coco_eval")
    options = (
        "--images",
        smooth_images,
        "--min-match-rate",
        "0.05",
        "--for",
        "onnxruntime",
        "--threads",
        "1",
        "--json",
    )
    result = call("quantize", mini_onnx, "--calibration", calibration, "-o", tmp_path / "q.onnx", *options)
    assert result.exit_code == 4, "they are its calibration images"
    assert "images are calibration images of this graph" in result.stderr
    record = json.loads(result.stdout)["record"]
    assert record["score"] == "agreement with the float model's detections"
    assert record["score_float"] == "1.000000"
    assert 0.05 <= float(record["score_int8"]) <= 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.mixed-precision.json", "q.onnx"]


def test_a_loss_of_ap_is_no_goal_without_annotations(
    mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path
) -> None:
    """Against a model's own detections it is another quantity, with another limit."""
    options = ("--calibration", calibration, "--images", smooth_images, "--max-map-drop", "0.01")
    for command in (
        ("quantize", mini_onnx, "-o", tmp_path / "q.onnx", *options),
        _evaluation(mini_onnx, smooth_images),
    ):
        result = call(*command)
        assert result.exit_code == 2
        assert "--min-match-rate" in result.stderr


def _evaluation(model: Path, images: Path) -> tuple[Any, ...]:
    return ("evaluate", model, "--images", images, "--reference", model, "--max-map-drop", "0.01")


@pytest.mark.parametrize("annotated", [False, True])
def test_a_goal_that_the_images_cannot_decide_keeps_the_model_and_says_so(
    annotated: bool, mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path
) -> None:
    """Annotations without an object; or without any, too few images for an interval."""
    pytest.importorskip("faster_coco_eval")
    images = tmp_path / "images"
    images.mkdir()
    for path in list_images(smooth_images)[:3]:
        shutil.copy(path, images)
    options: tuple[Any, ...] = ("--min-match-rate", "0.05")
    if annotated:
        entries = [{"id": number, "file_name": path.name} for number, path in enumerate(sorted(images.iterdir()))]
        coco = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "class0"}]}
        (tmp_path / "empty.json").write_text(json.dumps(coco))
        options = ("--annotations", tmp_path / "empty.json", "--max-map-drop", "0.01")
    command = ("quantize", mini_onnx, "--calibration", calibration, "-o", tmp_path / "q.onnx", "--images", images)
    written = ("--junit", tmp_path / "j.xml", "--json", "--for", "onnxruntime", "--threads", "1")
    result = call(*command, *options, *written)
    assert result.exit_code == 4, result.output
    (verdict,) = json.loads(result.stdout)["verdicts"]
    assert verdict["outcome"] == "inconclusive"
    assert ("hold no object in these 3 images" if annotated else "3 images are too few") in verdict["message"]
    assert 'errors="1"' in (tmp_path / "j.xml").read_text()
    assert (tmp_path / "q.onnx").is_file()
    assert call(*command, *options, *written, "--allow-inconclusive").exit_code == 0


def test_missed_goal_is_exit_code_four(mini_onnx: Path, calibration: Path, smooth_images: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    limit = ("--min-match-rate", "1", "--judge", "point", "--evaluations", "3")
    options = ("--images", smooth_images, *limit, "--for", "onnxruntime", "--threads", "1")
    result = call("quantize", mini_onnx, "--calibration", calibration, "-o", tmp_path / "q.onnx", *options)
    assert result.exit_code == 4
    assert "INT8 misses the goal" in result.stderr
    assert not (tmp_path / "q.onnx").exists()


def test_a_goal_for_nncf_is_refused_with_what_to_do_instead(
    mini_onnx: Path, smooth_images: Path, tmp_path: Path
) -> None:
    options = ("--quantizer", "nncf", "--for", "openvino", "--images", smooth_images, "--min-match-rate", "0.9")
    result = call("quantize", mini_onnx, "-o", tmp_path / "q.xml", *options)
    assert result.exit_code == 2
    assert "'nncf' cannot search for an accuracy goal" in result.stderr
    assert "fcos-deploy evaluate" in result.stderr
    assert "with the same limit" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
