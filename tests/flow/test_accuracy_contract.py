"""The accuracy contract on a detector that plain INT8 ruins: held by a mixture, or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calibration.calibrate import CalibrationRequest, StatisticsOptions, calibrate
from calibration.dataset import SampleOptions
from calibration.mixed_precision import find_trade_offs
from calibration.ranges import RangeMethod
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.files import sha256_file
from fcos_deploy.detector import DetectorSpec
from fcos_deploy.pipeline.deploy import DEMO_DATA

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("faster_coco_eval")

# A channel between a norm and the convolution behind its ReLU may be scaled: the result is the same function, but one
# channel takes the whole range of the activations, and the others share what is left of 256 values.
_SPOILED = {
    "backbone.body.layer1.0.bn1": "backbone.body.layer1.0.conv2",
    "backbone.body.layer3.0.bn1": "backbone.body.layer3.0.conv2",
    "head.classification_head.conv.1": "head.classification_head.conv.3",
    "head.regression_head.conv.4": "head.regression_head.conv.6",
}
_FACTOR = 100.0
_IMAGES = tuple(f"BloodImage_{number:05}.jpg" for number in (0, 14, 28, 30, 37, 55, 72, 89))
GOAL = 0.01


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo detector made hard: model.onnx at half size, calibration.json, val/ and val.json."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from exporters.torch_onnx import export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint

    folder, source = tmp_path_factory.mktemp("hard"), DEMO_DATA / "fcos_bccd.safetensors"
    state = load_file(source)
    for norm, conv in _SPOILED.items():
        state[f"{norm}.weight"][0] *= _FACTOR
        state[f"{norm}.bias"][0] *= _FACTOR
        state[f"{conv}.weight"][:, 0] /= _FACTOR
    with safe_open(source, "pt") as file:
        save_file(state, folder / "hard.safetensors", metadata=file.metadata())
    loaded = load_checkpoint(folder / "hard.safetensors", options=CheckpointOptions(input_size=(160, 224)))
    model = export_onnx(loaded, folder / "model.onnx").path
    _write_images(folder)
    calibrate(
        CalibrationRequest(
            model=model,
            images=DEMO_DATA / "calibration",
            output=folder / "calibration.json",
            sample=SampleOptions(count=8),
            statistics=StatisticsOptions(method=RangeMethod.MINMAX, engine="onnxruntime", threads=1),
        )
    )
    return folder


def _write_images(folder: Path) -> None:
    coco = json.loads((DEMO_DATA / "evaluation.json").read_text(encoding="utf-8"))
    coco["images"] = [image for image in coco["images"] if image["file_name"] in _IMAGES]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    (folder / "val.json").write_text(json.dumps(coco), encoding="utf-8")
    (folder / "val").mkdir()
    for image in coco["images"]:
        shutil.copy(DEMO_DATA / "evaluation" / image["file_name"], folder / "val")


def _arguments(hard: Path, output: Path, *more: str) -> list[str]:
    sources = [str(hard / "model.onnx"), "--calibration", str(hard / "calibration.json"), "-o", str(output)]
    proof = ["--images", str(hard / "val"), "--annotations", str(hard / "val.json"), "--threads", "1"]
    return [
        "quantize",
        *sources,
        *proof,
        "--for",
        "onnxruntime",
        "--max-map-drop",
        str(GOAL),
        "--judge",
        "point",
        *more,
    ]


def _ap(hard: Path, model: Path) -> float:
    candidate = DetectorSpec(model=model, backend="onnxruntime", options=SessionOptions(threads=1))
    request = EvaluationRequest(
        candidates=(candidate,), images=hard / "val", annotations=hard / "val.json", resamples=0, reference=None
    )
    ap = evaluate(request).candidates[0].scores.ap
    assert ap is not None
    return ap


def _measured_layers(state: Path) -> list[Any]:
    return json.loads(state.read_text(encoding="utf-8"))["ranking"] if state.exists() else []


def test_search_goes_on_after_a_kill_and_holds_the_goal(hard: Path, tmp_path: Path) -> None:
    arguments, state = _arguments(hard, tmp_path / "q.onnx", "--json"), tmp_path / ".q.search.json"
    start = [sys.executable, "-c", "from fcos_deploy.cli.app import main; main()"]
    process = subprocess.Popen([*start, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and len(_measured_layers(state)) < 5:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = _measured_layers(state)
    assert len(before) >= 5
    assert not (tmp_path / "q.onnx").exists()
    # Were a layer measured again, its true effect would replace this one.
    kept = json.loads(state.read_text(encoding="utf-8"))
    kept["ranking"][0]["effect"]["centerness"] = 0.0123456789
    state.write_text(json.dumps(kept), encoding="utf-8")

    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.stderr
    assert "Trade-offs" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"q.onnx", "q.mixed-precision.json"}
    (found,) = find_trade_offs([tmp_path / "q.onnx"])
    plain = found.trials[0]
    assert plain.ignored_layers == ()
    assert found.float_score - plain.score > 0.05
    assert found.float_score - _ap(hard, tmp_path / "q.onnx") <= GOAL + 1e-6
    chosen = next(trial for trial in found.trials if trial.ignored_layers == found.ignored_layers)
    assert 0.5 < chosen.int8_share < 1.0
    assert chosen.p50_ms is not None
    assert 0.0123456789 in [item.effect.centerness for item in found.ranking]
    # Those that are hurt most write or read a spoiled channel.
    assert found.ranking[0].layer.rpartition(".conv")[0] in {conv.rpartition(".conv")[0] for conv in _SPOILED.values()}


def test_goal_that_is_not_reached_is_refused_with_the_trade_offs(hard: Path, tmp_path: Path) -> None:
    model = sha256_file(hard / "model.onnx")
    result = CliRunner().invoke(build_app(), _arguments(hard, tmp_path / "q.onnx", "--evaluations", "1"))
    assert result.exit_code == 4
    assert "INT8 misses the goal" in result.stderr
    assert "INT8  float  score" in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert sha256_file(hard / "model.onnx") == model
