"""``package --for trtexec``: build and proof on a device that has trtexec and Python 3.8, compared on the workstation.

``trtexec`` is a stand-in that reads the options that NVIDIA's has, and computes with ONNX Runtime.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fcos_deploy.cli.app import build_app

pytest.importorskip("onnxruntime")

_TRTEXEC = """#!{python}
import json, shutil, sys
import numpy as np
import onnxruntime
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
known = {{"onnx", "saveEngine", "buildOnly", "noTF32", "memPoolSize", "fp16", "int8", "loadEngine", "loadInputs",
         "exportOutput", "shapes"}}
if set(options) - known:
    sys.exit("Unknown option: %s" % (set(options) - known))
print("&&&& RUNNING TensorRT.trtexec [TensorRT v8502]")
print("[I] TensorRT version: 8.5.2")
if "onnx" in options:
    shutil.copyfile(options["onnx"], options["saveEngine"])
    sys.exit()
session = onnxruntime.InferenceSession(open(options["loadEngine"], "rb").read(), providers=["CPUExecutionProvider"])
feeds = {{}}
for item in options["loadInputs"].split(","):
    name, _, path = item.partition(":")
    spec = next(i for i in session.get_inputs() if i.name == name)
    dtype = np.uint8 if spec.type == "tensor(uint8)" else np.float32
    feeds[name] = np.fromfile(path, dtype).reshape([d if isinstance(d, int) else 1 for d in spec.shape])
outputs = session.run(None, feeds)
with open(options["exportOutput"], "w") as stream:
    json.dump([{{"name": o.name, "dimensions": "x".join(map(str, a.shape)), "values": (a * {factor}).ravel().tolist()}}
               for o, a in zip(session.get_outputs(), outputs)], stream)
print("[I] GPU Compute Time: min = 1.0 ms, max = 2.0 ms, mean = 1.5 ms, median = 1.25 ms, percentile(99%) = 2 ms")
"""


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def run_on_device(package: Path, trtexec: Path, *, factor: float = 1.0) -> subprocess.CompletedProcess[str]:
    trtexec.write_text(_TRTEXEC.format(python=sys.executable, factor=factor))
    trtexec.chmod(0o755)
    command = [sys.executable, "-I", package / "run_trtexec.py", trtexec]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def package(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trtexec") / "package"
    done = _run("package", tiny_bundle, "--for", "trtexec", "--target", "jetson-xavier", "-o", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def test_the_proof_of_trtexec_is_made_on_the_workstation(package: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    device = Path(shutil.copytree(package, tmp_path / "device"))
    done = run_on_device(device, tmp_path / "trtexec")
    assert done.returncode == 0, done.stdout + done.stderr
    record = device / "trtexec-record.json"
    verified = _run("verify", tiny_bundle, "--trtexec-record", record, "--log", tmp_path / "log", "--json")
    assert verified.exit_code == 0, verified.stderr
    result = json.loads(verified.stdout)
    assert result["outcome"] == "passed"
    assert result["session"]["version"] == "8.5.2"
    assert result["session"]["median_ms"] == "1.25"
    assert result["time"] == json.loads(record.read_text())["time"]
    script = (device / "run_trtexec.py").read_text()
    ast.parse(script, feature_version=(3, 8))


def test_an_engine_that_computes_otherwise_fails_there(package: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    device = Path(shutil.copytree(package, tmp_path / "device"))
    assert run_on_device(device, tmp_path / "trtexec", factor=0.5).returncode == 0
    record = device / "trtexec-record.json"
    verified = _run("verify", tiny_bundle, "--trtexec-record", record, "--log", tmp_path / "log")
    assert verified.exit_code == 4


def test_records_of_others_and_changed_graphs_are_refused(
    package: Path, tiny_bundle: Path, tiny_ir_bundle: Path, tmp_path: Path
) -> None:
    device = Path(shutil.copytree(package, tmp_path / "device"))
    assert run_on_device(device, tmp_path / "trtexec").returncode == 0
    refused = _run("verify", tiny_ir_bundle, "--trtexec-record", device / "trtexec-record.json")
    assert refused.exit_code == 2
    assert "to another bundle" in refused.stderr
    (device / "trtexec-record.json").write_text("{}")
    assert (
        "not a record of trtexec"
        in _run("verify", tiny_bundle, "--trtexec-record", device / "trtexec-record.json").stderr
    )
    with (device / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    changed = run_on_device(device, tmp_path / "trtexec")
    assert changed.returncode == 1
    assert "was changed" in changed.stderr


def test_the_lines_are_for_one_version(tiny_bundle: Path, package: Path, tmp_path: Path) -> None:
    lines = (package / "commands.sh").read_text()
    assert "trtexec --onnx=model.onnx --saveEngine=model.engine --buildOnly" in lines
    assert "--loadInputs=images:golden/0.images.bin --exportOutput=golden/0.outputs.json" in lines
    refused = _run("package", tiny_bundle, "--for", "trtexec", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--target" in refused.stderr
