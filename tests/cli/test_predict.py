"""``fcos-deploy predict``: detections of images, folders and videos, as JSON, tables and drawings."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from fcos_deploy import Detector
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.errors import ImageError

pytest.importorskip("onnxruntime")

Images = list[NDArray[np.uint8]]


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, blobs: Images) -> Path:
    """Four pictures, one of them in a subfolder."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    for name, image in zip(("a.png", "b.png", "c.png", "more/a.png"), blobs, strict=True):
        assert cv2.imwrite(str(root / name), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return root


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven frames of 160x128 at 10 a second."""
    path = tmp_path_factory.mktemp("videos") / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (160, 128))
    generator = np.random.default_rng(3)
    for _ in range(7):
        coarse = generator.integers(0, 256, (16, 20, 3), np.uint8)
        writer.write(np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1))
    writer.release()
    return path


def test_json_is_what_the_detector_says(tiny_onnx: Path, folder: Path, blobs: Images) -> None:
    done = _run("predict", tiny_onnx, folder / "b.png", folder / "a.png", "--json", "--threads", "1")
    assert done.exit_code == 0, done.stderr
    documents = json.loads(done.stdout)
    assert [document["image"] for document in documents] == [str(folder / "b.png"), str(folder / "a.png")]
    with Detector.open(tiny_onnx) as detector:
        found = detector.detect(blobs[1])
    document = documents[0]
    assert document.keys() == {"image", "width", "height", "backend", "precision", "detections"}
    assert (document["backend"], document["precision"]) == ("onnxruntime", "fp32")
    assert (document["width"], document["height"]) == (160, 128)
    assert [one["score"] for one in document["detections"]] == pytest.approx(found.scores.tolist(), abs=1e-6)
    assert [one["label"] for one in document["detections"]] == found.labels.tolist()
    assert [one["name"] for one in document["detections"]] == [detector.names[label] for label in found.labels]
    np.testing.assert_allclose([one["box"] for one in document["detections"]], found.boxes, atol=1e-3)


def test_backends_agree(tiny_checkpoint: Path, tiny_onnx: Path, folder: Path) -> None:
    pytest.importorskip("openvino")
    runs = [(tiny_checkpoint, "pytorch"), (tiny_onnx, "onnxruntime"), (tiny_onnx, "openvino")]
    printed = [_run("predict", model, folder / "b.png", "--json", "--backend", backend) for model, backend in runs]
    reference, *others = [json.loads(one.stdout)[0]["detections"] for one in printed]
    for other in others:
        assert [one["label"] for one in other] == [one["label"] for one in reference]
        np.testing.assert_allclose([one["box"] for one in other], [one["box"] for one in reference], atol=1e-2)


@pytest.mark.parametrize("name", ["m.ckpt", "m.bin", "m.weights", "m.pth.tar", "m.onnx", "m"])
def test_a_checkpoint_is_known_by_its_content(name: str, tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    from fcos_deploy.benchmark.measure import measure_cold_start
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.inspect import inspect_file

    model = Path(shutil.copyfile(tiny_checkpoint, tmp_path / name))
    options = ("--score-threshold", "0.3")
    done, expected = (_run("predict", path, folder / "b.png", "--json", *options) for path in (model, tiny_checkpoint))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)[0]["detections"] == json.loads(expected.stdout)[0]["detections"]
    assert inspect_file(model).kind == "checkpoint"
    if name == "m":  # the process of its own that deploy and benchmark start
        assert measure_cold_start(DetectorSpec(model=model), folder / "b.png").opened > 0


@pytest.fixture
def chained_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """For a version of ONNX Runtime that nobody has; the chain goes on to OpenVINO, which runs it."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "chained"))
    shutil.copyfile(bundle / "model.fp32.onnx", bundle / "b.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    first = {**manifest["artifacts"][0], "backend": "onnxruntime"}
    asks = {**first["requires"], "backend_version": "0.1"}
    second = {**first, "path": "b.onnx", "backend": "openvino", "requires": {}}
    text = json.dumps({**manifest, "artifacts": [{**first, "requires": asks}, second]})
    (bundle / "manifest.json").write_text(text)
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    return bundle


def test_a_fallback_is_in_every_prediction_as_verification_records_it(chained_bundle: Path, folder: Path) -> None:
    pytest.importorskip("openvino")
    images = (folder / "a.png", folder / "b.png")
    refused = _run("predict", chained_bundle, *images, "--json")
    assert (refused.exit_code, refused.stdout) == (1, "")
    done = _run("predict", chained_bundle, *images, "--json", "--allow-fallback")
    assert done.exit_code == 0, done.stderr
    record = json.loads(_run("verify", chained_bundle, "--allow-fallback", "--json").stdout)
    for document in json.loads(done.stdout):
        assert {key: document[key] for key in ("backend", "precision", "fallbacks")} == {
            key: record[key] for key in ("backend", "precision", "fallbacks")
        }
        assert document["backend"] == "openvino"
        ((passed_over, reason),) = [(step["backend"], step["reason"]) for step in document["fallbacks"]]
        assert passed_over == "onnxruntime"
        assert "the runtime's version must be 0.1" in reason
    assert "fallback from onnxruntime: " in done.stderr


def test_folders_are_searched_and_drawn_with_their_structure(tiny_onnx: Path, folder: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    done = _run("predict", tiny_onnx, folder, "--draw", drawn)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "platelet" in done.stderr
    assert sorted(str(p.relative_to(drawn)) for p in drawn.rglob("*.*")) == ["a.jpg", "b.jpg", "c.jpg", "more/a.jpg"]
    image, copy = cv2.imread(str(folder / "b.png")), cv2.imread(str(drawn / "b.jpg"))
    assert copy.shape == image.shape
    assert np.abs(copy.astype(int) - image).max() > 60


def test_an_image_that_cannot_be_read_does_not_stop_the_others(tiny_onnx: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    drawn = folder / "drawn"
    done = _run("predict", tiny_onnx, tmp_path / "broken.png", folder, "--draw", drawn, "--json")
    assert done.exit_code == 1
    assert "broken.png" in done.stderr
    assert len(json.loads(done.stdout)) == 4
    again = _run("predict", tiny_onnx, folder, "--draw", drawn, "--json")
    assert len(json.loads(again.stdout)) == 4  # its own drawings are no sources
    shutil.rmtree(drawn)


def test_the_table_stops_at_the_threshold_and_says_what_it_leaves_out(tiny_onnx: Path, folder: Path) -> None:
    shown = _run("predict", tiny_onnx, folder / "a.png", "--score-threshold", "0.2").stderr
    more = _run("predict", tiny_onnx, folder / "a.png").stderr
    assert "scores below" not in shown
    hidden = re.search(r"(\d+) more have scores below 0\.3", more)
    assert hidden is not None, more
    count = len(re.findall(r"\.png", shown)), len(re.findall(r"\.png", more))
    assert count[0] - count[1] == int(hidden[1])


def test_files_for_other_tools_hold_the_same_boxes(tiny_onnx: Path, folder: Path, tmp_path: Path) -> None:
    written = ["--coco", tmp_path / "coco.json", "--csv", tmp_path / "boxes.csv", "--yolo", tmp_path / "yolo"]
    done = _run("predict", tiny_onnx, folder / "a.png", folder / "b.png", "--json", *written)
    assert done.exit_code == 0, done.stderr
    documents = json.loads(done.stdout)
    detections = [(d, item) for d in documents for item in d["detections"]]
    coco = json.loads((tmp_path / "coco.json").read_text())
    lines = list(csv.DictReader((tmp_path / "boxes.csv").read_text().splitlines()))
    yolo = [line for name in "ab" for line in (tmp_path / "yolo" / f"{name}.txt").read_text().splitlines()]
    assert (tmp_path / "yolo" / "classes.txt").read_text() == "red\nwhite\nplatelet\n"
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    for (document, item), annotation, line, label in zip(detections, coco["annotations"], lines, yolo, strict=True):
        x1, y1, x2, y2 = item["box"]
        assert files[annotation["image_id"]] == document["image"] == line["image"]
        assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        assert annotation["category_id"] == item["label"] == int(line["label"])
        assert [float(line[edge]) for edge in ("x1", "y1", "x2", "y2")] == item["box"]
        number, x, y, width, height, score = map(float, label.split())
        assert (int(number), score) == (item["label"], pytest.approx(item["score"], abs=1e-6))
        corners = [(x - width / 2) * document["width"], (y + height / 2) * document["height"]]
        assert corners == pytest.approx([x1, y2], abs=1e-3)
    refused = _run("predict", tiny_onnx, folder, "--yolo", tmp_path / "twice")
    assert refused.exit_code == 2
    assert "would be one file, 'a.txt'" in " ".join(refused.stderr.split())


def test_an_image_is_a_path_bytes_pillow_or_an_array(tiny_onnx: Path, folder: Path, blobs: Images) -> None:
    path = folder / "b.png"
    with Detector.open(tiny_onnx) as detector:
        results = [
            detector.detect(image)
            for image in (blobs[1], path, str(path), path.read_bytes(), Image.open(path), bytearray(path.read_bytes()))
        ]
        for result in results[1:]:
            assert np.array_equal(result.boxes, results[0].boxes)
        with pytest.raises(ImageError, match="in memory"):
            detector.detect(b"no image")


def test_only_likely_objects_are_drawn(tiny_onnx: Path, folder: Path, tmp_path: Path) -> None:
    for name, options in (("few", ["--draw-threshold", "0.99"]), ("all", ["--score-threshold", "0.2"])):
        assert _run("predict", tiny_onnx, folder / "b.png", "--draw", tmp_path / name, *options).exit_code == 0
    few, every = (cv2.imread(str(tmp_path / name / "b.jpg")) for name in ("few", "all"))
    _, coded = cv2.imencode(".jpg", cv2.imread(str(folder / "b.png")))
    plain = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(few, plain)
    assert (every != plain).any(axis=2).sum() > 500


def test_a_video_becomes_an_annotated_one(tiny_onnx: Path, video: Path, tmp_path: Path) -> None:
    done = _run("predict", tiny_onnx, video, "--draw", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    documents = json.loads(done.stdout)
    assert [document["frame"] for document in documents] == list(range(7))
    assert any(document["detections"] for document in documents)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10.0)
    frames = 0
    while capture.read()[0]:
        frames += 1
    assert frames == 7
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_the_score_threshold_is_the_least_score(tiny_onnx: Path, folder: Path) -> None:
    done = _run("predict", tiny_onnx, folder / "b.png", "--json", "--score-threshold", "0.45")
    scores = [one["score"] for one in json.loads(done.stdout)[0]["detections"]]
    assert scores
    assert min(scores) >= 0.45


def test_a_checkpoint_is_read_as_its_options_say(
    tiny_checkpoint: Path, tiny_onnx: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "options.toml").write_text("max_detections = 2\ninput_size = [64, 64]\n")
    options = ("--input-size", "128x192", "--checkpoint-options", tmp_path / "options.toml")
    done = _run("predict", tiny_checkpoint, folder / "b.png", "--json", *options)
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)[0]["detections"]) == 2
    refused = _run("predict", tiny_onnx, folder / "b.png", *options)
    assert refused.exit_code == 2
    assert "carries its own contract" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("missing.onnx", "a.png"), 1, "'missing.onnx' does not exist"),
        (("MODEL", "missing.png"), 1, "missing.png"),
        (("CUT", "a.png"), 1, "cut.onnx"),
        (("MODEL", "EMPTY"), 1, "holds no images"),
        (("MODEL", "TEXT"), 1, "is not an image"),
        (("MODEL", "CLIP"), 1, "Cannot read video"),
        (("MODEL", "a.png", "--backend", "tensorflow"), 2, "known: kserve, onnxruntime, openvino"),
        (("MODEL", "a.png", "--device", "cuda:9"), 1, "no device 'cuda:9'"),
        (("MODEL", "a.png", "--precision", "int8"), 2, "is fp32, int8 was asked for"),
        (("MODEL", "a.png", "--compute", "bf16"), 2, "not in bf16"),
        (("MODEL", "a.png", "--draw", "/proc/nowhere"), 2, "Cannot write"),
    ],
)
def test_mistakes_are_one_sentence(
    tiny_onnx: Path, folder: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "clip.mp4").write_text("not a video")
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx.read_bytes()[:-1000])
    meant = {
        "MODEL": tiny_onnx,
        "CUT": tmp_path / "cut.onnx",
        "a.png": folder / "a.png",
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "text.jpg",
        "CLIP": tmp_path / "clip.mp4",
    }
    done = _run("predict", *(meant.get(argument, argument) for argument in arguments))
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_drawing_never_overwrites_its_source(tiny_onnx: Path, tmp_path: Path, blobs: Images) -> None:
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), blobs[0])
    before = path.read_bytes()
    done = _run("predict", tiny_onnx, path, "--draw", tmp_path)
    assert done.exit_code == 2
    assert "would overwrite" in done.stderr
    assert path.read_bytes() == before


def _unusual_images(folder: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 64, 3), np.uint8)
    images = {
        "gray.png": Image.fromarray(pixels[:, :, 0]),
        "sixteen.png": Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256),
        "rgba.png": Image.fromarray(np.dstack([pixels, pixels[:, :, :1]])),
        "one.png": Image.fromarray(pixels[:1, :1]),
        "wide.png": Image.fromarray(np.tile(pixels[:8], (1, 157, 1))[:, :10_000]),
    }
    for name, image in images.items():
        image.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which torchvision, whose checkpoint this is, does not make
    Image.fromarray(pixels).save(folder / "turned.jpg", exif=exif)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["gray.png", "sixteen.png", "rgba.png", "one.png", "wide.png", "turned.jpg"])
def test_unusual_images_are_detected_on(tmp_path: Path, tiny_onnx: Path, name: str) -> None:
    path = _unusual_images(tmp_path)[name]
    result = _run("predict", tiny_onnx, path, "--json")
    assert result.exit_code == 0, result.stderr
    (document,) = json.loads(result.stdout)
    sizes = {"one.png": (1, 1), "wide.png": (10_000, 8)}
    assert (document["width"], document["height"]) == sizes.get(name, (64, 48))
    assert all(0 <= v <= max(document["width"], document["height"]) for d in document["detections"] for v in d["box"])
