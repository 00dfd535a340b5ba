"""``verify``, ``compare`` and ``package`` of bundles as a user types them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from fcos_deploy import Detections, Detector, SessionOptions
from fcos_deploy.accuracy.dataset import EvaluationImage
from fcos_deploy.accuracy.predictions import DetectionRun, DetectionRuns, StageSeconds
from fcos_deploy.accuracy.verify import VerifyOptions, verify_bundle
from fcos_deploy.bundle.store import open_bundle, read_log
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.progress import no_progress
from fcos_deploy.pipeline.proof import replay_verify
from fcos_deploy.pipeline.steps import Variant

pytest.importorskip("onnxruntime")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy at another place: bundles can be moved."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "moved" / "cells"))


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def _remake(bundle: Path, change: object) -> None:
    """Change the manifest and make its digest fit, as one who is allowed to would."""
    value = json.loads((bundle / "manifest.json").read_text())
    change(value)  # type: ignore[operator]
    text = json.dumps(value)
    (bundle / "manifest.json").write_text(text)
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")


def test_a_moved_bundle_is_verified_and_the_record_is_kept(bundle: Path) -> None:
    junit = bundle.parent / "junit.xml"
    done = _run("verify", bundle, "--json", "--junit", junit)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    (suite,) = ElementTree.parse(junit).getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", "0")
    assert [case.attrib["name"] for case in suite] == ["preprocessing", "min_match_rate", "values"]
    assert (record["outcome"], record["matched"], record["backend"]) == ("passed", 1.0, "onnxruntime")
    assert record["preprocessing"]["exact"] == record["preprocessing"]["images"] == 4
    assert sum(image["expected"] for image in record["images"]) > 10
    assert record["machine"]["processor"]
    (kept,) = read_log(bundle / "verification.jsonl")
    assert {key: kept[key] for key in record} == record
    assert _run("verify", bundle).exit_code == 0
    assert len(read_log(bundle / "verification.jsonl")) == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_every_place_of_a_request_is_verified(
    damaged: bool, bundle: Path, tiny_export: Callable[..., Path], tmp_path: Path
) -> None:
    """A model of a fixed batch whose second place has other scores than the first, which alone is used here."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tiny_export(batch=2))
    if damaged:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([[[1]], [[1.5]]]), "places"))
        name = "cls_logits"
        (last,) = (node for node in model.graph.node if name in node.output)
        last.output[list(last.output).index(name)] = "before"
        model.graph.node.append(onnx.helper.make_node("Mul", ["before", "places"], [name]))
    file = bundle / "model.fp32.onnx"
    onnx.save(model, file)
    facts = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size": file.stat().st_size}

    def change(manifest: dict) -> None:
        for record in (*manifest["artifacts"], *manifest["files"]):
            record.update(facts if record["path"] == file.name else {})

    _remake(bundle, change)
    result = _run("verify", bundle)
    assert result.exit_code == (4 if damaged else 0), result.output


def _record(manifest: dict, *, ap: float, milliseconds: float) -> None:
    figure = {"artifact": "model.fp32.onnx", "backend": "onnxruntime", "precision": "fp32"}
    data = {"dataset": "annotated", "images": 40, "metrics": {"ap": ap, "ap50": 0.8}}
    manifest["accuracy"] = [{**figure, **data}]
    manifest["benchmark"] = [{**figure, "device": "a laptop", "metrics": {"total_p50_ms": milliseconds}}]


@pytest.mark.parametrize("more", [("--max-map-drop", "0.01"), ("--images", "."), ("--also", "b")])
def test_records_are_judged_by_the_bundles_own_gates_alone(more: tuple[str, ...], tmp_path: Path) -> None:
    result = _run("report", tmp_path, "--records", tmp_path / "record.json", *more)
    assert result.exit_code == 2
    assert "leave out limits, --reference, --images" in " ".join(result.stderr.split())


def test_two_bundles_are_compared_by_what_they_record(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))

    def change(manifest: dict) -> None:
        _record(manifest, ap=0.59, milliseconds=40.0)
        manifest["contract"]["decode"]["iou_threshold"] = 0.5

    _remake(bundle, lambda manifest: _record(manifest, ap=0.6, milliseconds=50.0))
    _remake(other, change)
    limits = ("--json", "--min-match-rate", 1, "--max-map-drop", 0.02)
    undecided = _run("compare", bundle, other, *limits)
    assert undecided.exit_code == 4
    assert "not how the drop varies between images" in undecided.stderr
    assert _run("compare", bundle, other, *limits, "--allow-inconclusive").exit_code == 0
    done = _run("compare", bundle, other, *limits, "--judge", "point")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert figures["AP"]["difference"] == pytest.approx(-0.01)
    assert (figures["p50"]["first"], figures["p50"]["second"]) == (50.0, 40.0)
    assert figures["size"]["difference"] == 0
    assert found["contract"] == ["the IoU threshold is 0.5 in place of 0.6"]
    assert found["golden"]["images"] == 4  # the same pictures in both
    assert (found["golden"]["missed"], found["golden"]["extra"]) == (0, 0)
    assert "-10.0 (x 0.80)" in done.stderr
    assert _run("compare", bundle, other, "--max-map-drop", 0.005, "--judge", "point").exit_code == 4


def test_what_cannot_be_compared_is_said(bundle: Path, tiny_onnx: Path) -> None:
    no_bundle = _run("compare", bundle, tiny_onnx)
    assert no_bundle.exit_code == 2
    assert "is not a bundle" in no_bundle.stderr
    assert "--images" in no_bundle.stderr
    no_record = _run("compare", bundle, bundle, "--max-map-drop", 0.01)
    assert no_record.exit_code == 2
    assert "record no AP" in no_record.stderr


def test_another_backend_is_verified_by_name(bundle: Path) -> None:
    pytest.importorskip("openvino")
    done = _run("verify", bundle, "--backend", "openvino", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["session"]["backend"] == "openvino"


def test_detections_that_are_not_the_certified_ones_give_exit_code_4(bundle: Path) -> None:
    def shift(manifest: dict) -> None:
        for golden in manifest["golden"]:
            for box in golden["detections"]["boxes"]:
                box[0] += 20
                box[2] += 20

    _remake(bundle, shift)
    done = _run("verify", bundle)
    assert done.exit_code == 4
    assert "not the certified detector" in done.stderr
    (kept,) = read_log(bundle / "verification.jsonl")
    assert kept["outcome"] == "failed"


@pytest.mark.parametrize(
    ("output", "factor", "offset", "fault"),
    [
        ("distances", 1.0, (-0.5, 0.0, 0.5, 0.0), "shift in x differs by +"),
        ("distances", 0.9, (0.0, 0.0, 0.0, 0.0), "width differs by -1"),
        ("centerness", 1.0, (-0.8,), "score differs by -"),
    ],
)
def test_small_damage_that_every_detection_shares_is_found(
    bundle: Path, output: str, factor: float, offset: tuple[float, ...], fault: str
) -> None:
    """The engine itself is damaged, and every box overlaps the certified one by more than the INT8 gate asks for."""
    onnx = pytest.importorskip("onnx")
    path = bundle / "model.fp32.onnx"
    model = onnx.load(str(path))
    (node,) = (node for node in model.graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "undamaged"
    for name, value in (("factor", [factor]), ("offset", list(offset))):
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [len(value)], value)
        model.graph.initializer.append(tensor)
    model.graph.node.append(onnx.helper.make_node("Mul", ["undamaged", "factor"], ["scaled"]))
    model.graph.node.append(onnx.helper.make_node("Add", ["scaled", "offset"], [output]))
    onnx.save(model, str(path))
    loose = {"min_iou": 0.5, "max_score_delta": 0.3, "min_match_rate": 0.5, "max_map_drop": 0.01}

    def change(manifest: dict) -> None:
        record = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
        manifest["artifacts"][0].update(record)
        manifest["gates"]["fp32"].update(loose)

    _remake(bundle, change)
    done = _run("verify", bundle, "--json")
    assert done.exit_code == 4
    problems = json.loads(done.stdout)["values"]["problems"]
    assert any(problem.startswith(fault) for problem in problems), problems


def _another_tensor(manifest: dict) -> None:
    manifest["golden"][0]["fingerprint"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("shift", "change", "outcome", "ran"),
    [
        (0.0, None, "passed", 0),
        (3.0, None, "failed", 0),
        (3.0, _another_tensor, "passed", 4),  # what was detected in other tensors says nothing
    ],
)
def test_what_the_same_bytes_detected_is_judged_again_and_not_run_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, shift: float, change: object, outcome: str, ran: int
) -> None:
    if change is not None:
        _remake(bundle, change)
    calls, detect = [], Detector.detect
    monkeypatch.setattr(Detector, "detect", lambda self, image: calls.append(image) or detect(self, image))
    with open_bundle(bundle) as opened:
        golden = [image.detections.to_detections() for image in opened.manifest.golden]
        seen = tuple(dataclasses.replace(d, boxes=d.boxes + np.float32(shift)) for d in golden)
        known = {artifact.sha256: seen for artifact in opened.manifest.artifacts}
        record = verify_bundle(opened, options=VerifyOptions(detected=known))
        assert record.session, "the artifact was opened all the same"
        assert (str(record.outcome), len(calls)) == (outcome, ran)
        calls.clear()
        assert verify_bundle(opened, options=VerifyOptions(detected={"another file": seen})).passed
        assert len(calls) == 4


def test_every_backend_that_reads_a_file_detects_anew_and_its_other_formats_do_not(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay is as the variants ran: with their threads, and once for each file and backend."""
    pytest.importorskip("openvino")
    with open_bundle(bundle) as opened:
        (artifact,), golden = opened.manifest.artifacts, opened.manifest.golden
    images = tuple(EvaluationImage(number, bundle / image.path) for number, image in enumerate(golden))
    runs, calls, sessions, detect = DetectionRuns(), Counter[str](), [], Detector.detect

    def variant(backend: str, **options: Any) -> Variant:
        return Variant(
            model=bundle / artifact.path,
            backend=backend,
            precision=artifact.precision,
            artifact=artifact,
            options=SessionOptions(threads=1, **options),
        )

    def counted(self: Detector, image: NDArray[np.uint8]) -> Detections:
        sessions.append(self.session.description)
        calls[self.session.description["backend"]] += 1
        return detect(self, image)

    # A second stream stands for bf16, which this processor may lack.
    variants = [variant("onnxruntime"), variant("openvino"), variant("openvino", streams=2)]
    with variants[0].open() as detector:
        seen = {image.image_id: detector.detect(image.path) for image in images}
        names, precision = detector.names, str(artifact.precision)
    run = DetectionRun(
        model="", backend="", precision=precision, names=names, description={}, detections=seen, seconds=StageSeconds()
    )
    for measured in variants:
        runs.collect(measured, images, run=lambda: run)
    monkeypatch.setattr(Detector, "detect", counted)
    context: Any = SimpleNamespace(runs=runs, progress=no_progress)
    evaluations: Any = SimpleNamespace(dataset=SimpleNamespace(images=images))
    replay_verify(context, bundle, variants, images=images, evaluations=evaluations)
    assert calls == {"onnxruntime": 4, "openvino": 4}
    assert {session["threads"] for session in sessions} == {"1"}


def test_a_changed_preprocessing_is_found_first_and_named(bundle: Path, tmp_path: Path) -> None:
    _remake(bundle, lambda manifest: manifest["contract"]["preprocess"].update(channel_order="bgr"))
    done = _run("verify", bundle, "--junit", tmp_path / "junit.xml")
    assert done.exit_code == 4
    assert "preprocessing differs" in done.stderr
    assert "channels are swapped" in done.stderr
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", "3")
    first = suite[0].find("failure")
    assert first is not None
    assert "channels are swapped" in first.attrib["message"]


def test_a_damaged_bundle_is_refused_before_anything_runs(bundle: Path) -> None:
    model = bundle / "model.fp32.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    done = _run("verify", bundle)
    assert done.exit_code == 1
    assert "was changed" in done.stderr


def test_a_read_only_bundle_prints_its_record(bundle: Path, tmp_path: Path) -> None:
    tar = tmp_path / "cells.tar"
    assert _run("package", bundle, "-o", tar).exit_code == 0
    done = _run("verify", tar)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["outcome"] == "passed"
    log = tmp_path / "elsewhere.jsonl"
    assert _run("verify", tar, "--log", log).stdout == ""
    assert len(read_log(log)) == 1


def test_what_does_not_fit_is_refused_and_the_chain_is_used_only_when_allowed(bundle: Path) -> None:
    pytest.importorskip("openvino")

    def need_another(manifest: dict) -> None:
        manifest["artifacts"][0]["backend"] = "onnxruntime"
        manifest["artifacts"][0]["requires"].update(backend_version="0.1")
        manifest["artifacts"].append({**manifest["artifacts"][0], "path": "b.onnx", "backend": "openvino"})
        manifest["artifacts"][1]["requires"] = {}

    shutil.copyfile(bundle / "model.fp32.onnx", bundle / "b.onnx")
    _remake(bundle, need_another)
    refused = _run("verify", bundle)
    assert refused.exit_code == 1
    assert "the runtime's version must be 0.1" in refused.stderr
    assert "rebuild it here: fcos-deploy build" in refused.stderr
    allowed = _run("verify", bundle, "--allow-fallback", "--json")
    assert allowed.exit_code == 0, allowed.output
    record = json.loads(allowed.stdout)
    assert record["backend"] == "openvino"
    assert [step["backend"] for step in record["fallbacks"]] == ["onnxruntime"]
    assert "fallback from onnxruntime" in allowed.stderr
    picture = next((bundle / "golden").glob("*.png"))
    assert _run("predict", bundle, picture).exit_code == 1
    assert "fallback from onnxruntime" in _run("predict", bundle, picture, "--allow-fallback").stderr
    with Detector.open(bundle, options=SessionOptions(allow_fallback=True)) as detector:
        assert detector.session.description["backend"] == "openvino"
        assert [step.backend for step in detector.fallbacks] == ["onnxruntime"]


def test_numpy_and_one_runtime_are_enough(bundle: Path) -> None:
    """In a process where everything else that is heavy cannot be imported."""
    blocked = (
        "torch",
        "torchvision",
        "onnx",
        "scipy",
        "matplotlib",
        "openvino",
        "nncf",
        "cryptography",
        "tritonclient",
    )
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\nfrom fcos_deploy.cli.app import main\nmain()\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(bundle), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "passed"


@pytest.mark.parametrize("arguments", [["verify", "/nowhere"], ["sign"], ["package", "/nowhere", "-o", "x.tar"]])
def test_a_mistake_is_one_line_and_no_traceback(arguments: list[str]) -> None:
    done = _run(*arguments)
    assert done.exit_code in (1, 2)
    assert "error:" in done.stderr
    assert "Traceback" not in done.output
