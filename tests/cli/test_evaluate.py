"""``evaluate``, ``parity``, ``compare`` and ``report`` on a tiny real model."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import fcos_deploy
from fcos_deploy.accuracy import evaluate as evaluate_module
from fcos_deploy.accuracy import predictions
from fcos_deploy.accuracy.dataset import load_coco
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.accuracy.predictions import DetectionRuns
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.progress import INFERENCES
from fcos_deploy.detector import Detector, DetectorSpec

DEMO = Path(fcos_deploy.__file__).parent / "demo_data"
CHECKPOINT = DEMO / "fcos_bccd.safetensors"

cv2 = pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")
pytest.importorskip("faster_coco_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path, blobs: list[NDArray[np.uint8]]) -> Path:
    """Four pictures, and annotations that agree with some of what the tiny model sees in them."""
    folder = tmp_path_factory.mktemp("data")
    images, annotations = [], []
    with Detector.open(tiny_onnx, backend="onnxruntime") as detector:
        for number, pixels in enumerate(blobs, start=1):
            name = f"{number}.png"
            cv2.imwrite(str(folder / name), pixels[:, :, ::-1])
            images.append({"id": number, "file_name": name})
            found = detector.detect(pixels)
            for box, label in list(zip(found.boxes.tolist(), found.labels.tolist(), strict=True))[::3]:
                x1, y1, x2, y2 = box
                if x2 - x1 < 1 or y2 - y1 < 1:
                    continue
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": 10 * label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": 10 * k + 1, "name": name} for k, name in enumerate(detector.names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


def on(data: Path) -> tuple[object, ...]:
    return ("--images", data, "--annotations", data / "annotations.json", "--threads", 1, "--resamples", 50)


def test_json_has_the_keys_that_others_rely_on(tiny_onnx: Path, data: Path) -> None:
    result = run("evaluate", tiny_onnx, *on(data), "--backend", "onnxruntime", "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "images", "backend", "precision"} <= set(scores)
    assert (scores["images"], scores["backend"], scores["precision"]) == (4, "onnxruntime", "fp32")
    assert 0.1 < scores["ap"] < 1.0
    assert scores["interval"]["low"] <= scores["ap"] <= scores["interval"]["high"]


def on_demo(count: int) -> tuple[object, ...]:
    where = ("--images", DEMO / "evaluation", "--annotations", DEMO / "evaluation.json")
    return (*where, "--threads", 1, "--limit", count)


def test_several_backends_agree_with_the_checkpoint(demo_onnx: Path) -> None:
    pytest.importorskip("openvino")
    both = ("--backend", "onnxruntime", "--backend", "openvino", "--reference", CHECKPOINT, "--resamples", 200)
    limits = ("--max-map-drop", 0.001, "--max-recall-drop", 0.001, "--max-precision-drop", 0.001)
    result = run("evaluate", demo_onnx, *on_demo(10), *both, *limits, "--json")
    assert result.exit_code == 0, result.output
    assert "small/medium/large" in result.stderr
    entries = json.loads(result.stdout)
    assert [e["backend"] for e in entries] == ["onnxruntime", "openvino"]
    assert entries[0]["ap"] == pytest.approx(entries[1]["ap"], abs=5e-4)
    for entry in entries:
        assert entry["agreement"]["match_rate"] > 0.99
        assert [verdict["outcome"] for verdict in entry["verdicts"]] == ["passed"] * 3
        assert entry["recall_drop"]["drop"]["value"] == 0.0
        assert sum(cell["count"] for cell in entry["confusion"] if cell["object"]) == entry["objects"]
        assert len(entry["per_class"][0]["thresholds"]) == len(entry["per_class"][0]["precision"]) == 101


def test_a_failed_gate_is_exit_4_and_in_junit(tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    result = run(
        "evaluate",
        tiny_onnx,
        *on(data),
        "--backend",
        "onnxruntime",
        "--min-ap",
        0.999,
        "--judge",
        "point",
        "--junit",
        junit,
    )
    assert result.exit_code == 4
    assert "FAILED  onnxruntime fp32: mAP 0." in result.output
    (suite,) = ElementTree.parse(junit).getroot()
    assert suite.attrib["failures"] == "1"


LIMITS = ("--max-map-drop", 0.01, "--min-ap", 0.5, "--min-match-rate", 0.9, "--max-recall-drop", 0.01)


@pytest.mark.parametrize(
    ("annotations", "more", "sentence"),
    [
        ([], (), "the annotations hold no object"),
        ([], ("--judge", "point"), "the annotations hold no object"),
        (None, (), "4 images are too few for a confidence interval"),
        (None, ("--limit", 1), "1 images are too few"),
        (None, ("--resamples", 0), "are too few"),
    ],
)
def test_limits_that_nothing_was_measured_for_are_inconclusive(
    tiny_onnx: Path,
    data: Path,
    tmp_path: Path,
    annotations: list[object] | None,
    more: tuple[object, ...],
    sentence: str,
) -> None:
    content = json.loads((data / "annotations.json").read_text())
    content["annotations"] = content["annotations"] if annotations is None else annotations
    (tmp_path / "a.json").write_text(json.dumps(content))
    where = ("--images", data, "--annotations", tmp_path / "a.json", "--threads", 1, "--resamples", 200, *more)
    arguments = ("evaluate", tiny_onnx, "--reference", tiny_onnx, *where, *LIMITS, "--junit", tmp_path / "junit.xml")
    result = run(*arguments, "--json")
    assert result.exit_code == 4, result.output
    assert sentence in result.stderr
    judged = {v["name"]: v["outcome"] for v in json.loads(result.stdout)["verdicts"]}
    assert set(judged) == {"max_map_drop", "min_ap", "min_match_rate", "max_recall_drop"}
    assert {judged[name] for name in ("max_map_drop", "min_ap", "max_recall_drop")} == {"inconclusive"}
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("4", "0")
    assert int(suite.attrib["errors"]) == list(judged.values()).count("inconclusive")


def test_one_image_in_many_files_decides_nothing(
    tiny_onnx: Path, blobs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    """The files differ, and their pixels do not."""
    for level in range(10):
        cv2.imwrite(str(tmp_path / f"{level}.png"), blobs[0], [cv2.IMWRITE_PNG_COMPRESSION, level])
    limits = ("--reference", tiny_onnx, "--min-match-rate", 0.5, "--resamples", 50)
    result = run("evaluate", tiny_onnx, "--images", tmp_path, *limits)
    assert result.exit_code == 4, result.output
    assert "9 of the 10 images are copies of others" in result.stderr


def test_detections_that_were_scored_are_scored_again_only_against_something_else(data: Path, tiny_onnx: Path) -> None:
    runs, options = DetectionRuns(), SessionOptions(threads=1)
    model = DetectorSpec(model=tiny_onnx, backend="onnxruntime", options=options)
    dataset = load_coco(data / "annotations.json", images=data)
    request = EvaluationRequest(
        candidates=(model,),
        images=data,
        annotations=data / "annotations.json",
        resamples=50,
        runs=runs,
        dataset=dataset,
    )
    first = evaluate(request)
    again = evaluate(dataclasses.replace(request, reference=model, earlier=(first,)))
    assert [e.scores is first.candidates[0].scores for e in (again.reference, *again.candidates) if e] == [True, True]
    assert again.candidates[0].interval == first.candidates[0].interval
    fewer = load_coco(data / "annotations.json", images=data).first(3)
    for changed in ({"resamples": 51}, {"seed": 1}, {"dataset": fewer}, {"runs": None}):
        other = evaluate(dataclasses.replace(request, earlier=(first,), **changed)).candidates[0]
        assert other.scores is not first.candidates[0].scores, changed


def test_what_was_reported_of_an_evaluation_tells_how_long_the_rest_takes(
    data: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is scored while another one detects, and no more than one image ran that is not reported yet."""
    scoring, steps = threading.Event(), []

    def score(*values: Any, **more: Any) -> Any:
        scoring.set()
        time.sleep(0.3)
        try:
            return original(*values, **more)
        finally:
            scoring.clear()

    original = evaluate_module._score
    monkeypatch.setattr(evaluate_module, "_score", score)
    model = DetectorSpec(model=tiny_onnx, backend="onnxruntime", options=SessionOptions(threads=1))
    request = EvaluationRequest(
        candidates=(model, model), reference=model, images=data, annotations=data / "annotations.json", resamples=50
    )
    evaluate(request, progress=lambda _, done, total: steps.append((done, total, INFERENCES.count, scoring.is_set())))
    assert [(done, total) for done, total, *_ in steps] == [(done, 4) for _ in range(3) for done in range(5)]
    assert not any(under_way for *_, under_way in steps)
    for run in range(0, 15, 5):
        assert all(ran - steps[run][2] <= done + 1 for done, _, ran, _ in steps[run : run + 5])


def test_without_annotations_the_reference_is_the_ground_truth(demo_onnx: Path) -> None:
    where = ("--images", DEMO / "evaluation", "--limit", 2)
    arguments = (*where, "--reference", CHECKPOINT, "--threads", 1, "--resamples", 0, "--json")
    result = run("evaluate", demo_onnx, *arguments, "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ap"] > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--images", "DATA"), "Accuracy needs annotations"),
        (("--images", "DATA", "--annotations", "gone.json"), "Cannot read the annotations 'gone.json'"),
        (("--images", "DATA", "--annotations", "DATA/annotations.json", "--max-map-drop", "0.1"), "give --reference"),
        (("--images", "DATA", "--annotations", "DATA/annotations.json", "--max-recall-drop", "0"), "give --reference"),
        (("--images", "DATA", "--reference", "MODEL", "--max-precision-drop", "0"), "cannot be limited without annot"),
        (("--images", "DATA", "--annotations", "DATA/annotations.json", "--backend", "x"), "There is no backend 'x'."),
    ],
)
def test_what_cannot_be_meant_is_exit_2(tiny_onnx: Path, data: Path, arguments: tuple[str, ...], message: str) -> None:
    places = {"DATA": data, "MODEL": tiny_onnx}
    words = [functools.reduce(lambda w, name: w.replace(name, str(places[name])), places, a) for a in arguments]
    result = run("evaluate", tiny_onnx, *words)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_an_interrupted_run_goes_on(tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    arguments = (tiny_onnx, *on(data), "--backend", "onnxruntime", "--predictions", tmp_path / "kept", "--json")
    whole = json.loads(run("evaluate", *arguments).stdout)
    (kept,) = (tmp_path / "kept").iterdir()
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # killed while writing the third
    again = json.loads(run("evaluate", *arguments).stdout)
    assert (whole["resumed_images"], again["resumed_images"]) == (0, 2)
    assert again["ap"] == whole["ap"]
    assert kept.read_bytes() == b"".join(lines)


def test_a_run_that_was_killed_goes_on(tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL while the first of two backends runs; what it had found is not computed again."""
    pytest.importorskip("openvino")
    many, kept = tmp_path / "many", tmp_path / "kept"
    many.mkdir()
    content = json.loads((data / "annotations.json").read_text())
    content["images"] = [{"id": n, "file_name": f"{n}.png"} for n in range(1, 61)]
    (many / "annotations.json").write_text(json.dumps(content))
    for number in range(60):
        shutil.copyfile(data / f"{number % 4 + 1}.png", many / f"{number + 1}.png")
    backends = ("--backend", "onnxruntime", "--backend", "openvino", "--json")
    arguments = [str(a) for a in (tiny_onnx, *on(many), *backends, "--predictions", kept)]
    program = [sys.executable, "-c", "from fcos_deploy.cli.app import main; main()", "evaluate", *arguments]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not any(path.read_bytes().count(b"\n") >= 3 for path in kept.glob("*")):
            time.sleep(0.001)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    (file,) = kept.iterdir()
    lines = file.read_bytes().count(b"\n")
    assert 3 <= lines < 60
    again = json.loads(run("evaluate", *arguments).stdout)
    assert [e["resumed_images"] for e in again] == [lines, 0]
    fresh = json.loads(run("evaluate", tiny_onnx, *on(many), *backends).stdout)
    assert [e["ap"] for e in again] == [e["ap"] for e in fresh]
    assert [e["resumed_images"] for e in json.loads(run("evaluate", *arguments).stdout)] == [60, 60]


def test_kept_predictions_are_those_of_the_same_images(tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    arguments = ("--backend", "onnxruntime", "--predictions", tmp_path / "kept", "--json")
    run("evaluate", tiny_onnx, *on(copy), *arguments)
    image, status = copy / "1.png", (copy / "1.png").stat()
    cv2.imwrite(str(image), np.zeros_like(cv2.imread(str(image))))
    image.write_bytes(image.read_bytes().ljust(status.st_size, b"\0"))  # corrected in place: size and time tell nothing
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = json.loads(run("evaluate", tiny_onnx, *on(copy), *arguments).stdout)
    assert again["resumed_images"] == 0


@pytest.mark.parametrize(
    ("source", "change"),
    [
        ("read_machine", {"processor": "another"}),
        ("read_machine", {"cpu_features": ("avx",)}),
        ("recorded_versions", {"pillow": "0.1"}),
    ],
)
def test_what_another_processor_or_library_detected_is_not_taken_for_this_ones(
    tiny_onnx: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, change: dict[str, object]
) -> None:
    """A folder of predictions may lie on a disk that machines share."""
    arguments = ("evaluate", tiny_onnx, *on(data), "--backend", "onnxruntime", "--predictions", tmp_path, "--json")
    run(*arguments)
    assert json.loads(run(*arguments).stdout)["resumed_images"] == 4
    facts = getattr(predictions, source)()
    other = facts | change if isinstance(facts, dict) else dataclasses.replace(facts, **change)
    monkeypatch.setattr(predictions, source, lambda: other)
    assert json.loads(run(*arguments).stdout)["resumed_images"] == 0


WIDER = ("--input-size", "160x192")


def test_a_checkpoint_is_read_as_its_options_say(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Also as the reference; and what was kept of one reading is not taken for another's."""
    kept = ("--predictions", tmp_path / "kept", "--json")
    own = json.loads(run("evaluate", tiny_checkpoint, *on(data), *kept).stdout)
    wider = json.loads(run("evaluate", tiny_checkpoint, *on(data), *kept, *WIDER).stdout)
    assert (own["resumed_images"], wider["resumed_images"]) == (0, 0)
    assert own["ap"] != wider["ap"]
    options = tmp_path / "options.toml"
    for line in ("norm_eps = 1e-4", "stride_in_1x1 = true", "iou_threshold = 0.5", "centerness_on_reg = false"):
        options.write_text(line)
        read_anew = run("evaluate", tiny_checkpoint, *on(data), *kept, "--checkpoint-options", options)
        assert json.loads(read_anew.stdout)["resumed_images"] == 0, line
    arguments = (tiny_checkpoint, "--reference", tiny_checkpoint, *on(data), *kept, *WIDER)
    both = json.loads(run("evaluate", *arguments, "--min-match-rate", 1.0, "--judge", "point").stdout)
    assert (both["resumed_images"], both["ap"]) == (4, wider["ap"])


def test_options_are_the_checkpoints_where_the_other_model_has_a_contract(
    tiny_onnx: Path, tiny_checkpoint: Path, data: Path
) -> None:
    where = ("--images", data, "--threads", 1, "--limit", 2)
    for arguments in (
        ("evaluate", tiny_onnx, "--reference", tiny_checkpoint, *where, "--resamples", 0, "--json"),
        ("compare", tiny_checkpoint, tiny_onnx, *where, "--no-speed", "--json"),
    ):
        rates = []
        for options in ((), WIDER):
            done = run(*arguments, *options)
            assert done.exit_code == 0, done.output
            found = json.loads(done.stdout)
            one = found["accuracy"][1] if "accuracy" in found else found
            rates.append(one["agreement"]["match_rate"])
        assert rates[0] == 1.0 > rates[1]


@pytest.mark.parametrize("command", ["evaluate", "compare", "report"])
def test_options_without_a_checkpoint_are_refused(command: str, tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    other = (tiny_onnx,) if command == "compare" else ("--reference", tiny_onnx)
    output = ("-o", tmp_path / "r.html") if command == "report" else ()
    done = run(command, tiny_onnx, *other, "--images", data, *output, *WIDER)
    assert done.exit_code == 2, done.output
    assert "carries its own contract" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_about_the_checkpoint_as_its_options_say(
    tiny_onnx: Path, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    where = ("--reference", tiny_checkpoint, "--images", data, "--limit", 2, "--rounds", 1, "--threads", 1)
    refused = run("report", tiny_onnx, *where, "-o", tmp_path / "r.html", "--input-size", "100x160")
    assert refused.exit_code == 2
    assert "100x160 is not a multiple of 32" in refused.stderr
    done = run("report", tiny_onnx, *where, "-o", tmp_path / "r.html", *WIDER)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.md").is_file()


def test_detectors_are_closed_before_the_next_opens(
    tiny_onnx: Path, tiny_checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Detector] = []
    original = DetectorSpec.open

    def recording(self: DetectorSpec) -> Detector:
        assert all(detector.session.closed for detector in opened)
        opened.append(original(self))
        return opened[-1]

    monkeypatch.setattr(DetectorSpec, "open", recording)
    result = run("evaluate", tiny_onnx, *on(data), "--reference", tiny_checkpoint, "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    assert len(opened) == 2


def test_evaluation_runs_without_torch_and_onnx(tiny_onnx: Path, data: Path) -> None:
    program = (
        "import sys\nsys.modules['torch'] = sys.modules['onnx'] = None\nfrom fcos_deploy.cli.app import main\nmain()\n"
    )
    arguments = ["evaluate", tiny_onnx, *on(data), "--backend", "onnxruntime", "--json"]
    command = [sys.executable, "-c", program, *(str(a) for a in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["images"] == 4


def test_parity_holds_and_is_told(demo_onnx: Path) -> None:
    arguments = ("--reference", CHECKPOINT, "--images", DEMO / "evaluation", "--limit", 2, "--threads", 1)
    result = run("parity", demo_onnx, *arguments, "--backend", "onnxruntime", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["passed"]
    assert found["first"] is None
    assert len(found["stages"]) == 1 + 5 * 3 + 3


def test_parity_that_fails_is_exit_4(tiny_onnx: Path, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """A graph whose one weight was changed behind its contract's back."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(tiny_onnx))
    weights = [t for t in model.graph.initializer if len(t.dims) == 4]
    target = weights[len(weights) // 2]
    target.CopyFrom(onnx.numpy_helper.from_array(1.05 * onnx.numpy_helper.to_array(target), target.name))
    onnx.save(model, str(tmp_path / "spoilt.onnx"))
    arguments = ("--reference", tiny_checkpoint, "--images", data, "--limit", 1, "--threads", 1)
    result = run("parity", tmp_path / "spoilt.onnx", *arguments, "--backend", "onnxruntime", "--layers", "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["first"].endswith(("class", "box", "centerness"))
    assert found["layer"]["causes"][0]["name"] == "weights"
    assert "by 5.00% (RMS)" in found["layer"]["causes"][0]["sentence"]


def test_a_report_puts_bundles_side_by_side(tiny_bundle: Path, tiny_ir_bundle: Path, tmp_path: Path) -> None:
    """By what they record; names of folders are text in both files."""
    third = Path(shutil.copytree(tiny_bundle, tmp_path / "<b>|x"))
    result = run("report", tiny_bundle, tiny_ir_bundle, third, "--compare", "-o", tmp_path / "three.html")
    assert result.exit_code == 0, result.output
    page, text = (tmp_path / "three.html").read_text(), (tmp_path / "three.md").read_text()
    for shown in (page, text):
        assert shown.count(tiny_bundle.parent.name) >= 2
        assert str(tiny_ir_bundle) in shown
        assert "golden images" in shown
        assert "To reproduce" in shown
    assert "<b>" not in page
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")}
    assert columns <= {5, 7}
    for words in (
        (tiny_bundle, tiny_ir_bundle),
        (tiny_bundle, "--compare"),
        (tiny_bundle, third / "SIGNATURE", "--compare"),
    ):
        assert run("report", *words).exit_code == 2
    assert run("report", tiny_bundle, third, "--compare", "--limit", 3).exit_code == 2


def test_compare_writes_a_report(demo_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = tmp_path / "compare.html"
    arguments = (*on_demo(4), "--no-speed", "--min-match-rate", 0.98, "--judge", "point", "--report", report, "--json")
    result = run("compare", CHECKPOINT, demo_onnx, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [e["backend"] for e in found["accuracy"]] == ["pytorch", "onnxruntime"]
    assert found["speed"] is None
    page = report.read_text(encoding="utf-8")
    assert "The variant is as accurate as the reference on 4 images, by the 95 % interval." in page
    assert page.count("<svg viewBox") == 20  # 12 samples, and the 4 images of each variant as its worst
    assert report.with_suffix(".md").is_file()


def test_classes_that_do_not_fit_are_refused_before_anything_is_run(
    tiny_onnx: Path, data: Path, tmp_path: Path
) -> None:
    content = json.loads((data / "annotations.json").read_text())
    content["categories"] = [{**category, "name": f"other {category['id']}"} for category in content["categories"]]
    (tmp_path / "other.json").write_text(json.dumps(content))
    arguments = ("--images", data, "--annotations", tmp_path / "other.json", "--predictions", tmp_path / "kept")
    refused = run("evaluate", tiny_onnx, *arguments, "--backend", "onnxruntime")
    assert refused.exit_code == 2
    assert "which the model does not know" in refused.stderr
    assert not (tmp_path / "kept").exists()
