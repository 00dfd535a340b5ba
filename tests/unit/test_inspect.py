"""What ``inspect`` says of files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from fcos_deploy.checkpoints.load import load_checkpoint
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.artifact import write_sidecar
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.errors import BackendLoadError, CheckpointError, ChecksumError
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline.inspect import inspect_bundle, inspect_file

MMDET = "mmdet_fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco"


def test_a_checkpoint(tiny_checkpoint: Path) -> None:
    inspection = inspect_file(tiny_checkpoint)
    facts = dict(inspection.facts)
    assert inspection.kind == "checkpoint"
    assert facts["ecosystem"] == "torchvision"
    assert facts["backbone"] == "ResNet-18, width 8/64"
    assert facts["levels"] == "5, strides 8, 16, 32, 64, 128"
    assert facts["class names"] == "3: red, white, platelet"
    assert "uint8 rgb, 128x160" in facts["input"]
    sources = {d.name: d.source for d in inspection.decisions}
    assert sources["input_size"] == "the file's metadata"
    assert sources["stride_in_1x1"] == "rule of torchvision"


def test_layers_that_an_accelerator_lacks_are_named_for_a_checkpoint_and_its_graph(
    deformable_checkpoint: Path, deformable_onnx: Path
) -> None:
    for path in (deformable_checkpoint, deformable_onnx):
        facts = dict(inspect_file(path).facts)
        lost = "the sampling of deformable convolutions and GroupNorm"
        assert facts["on a DLA"] == f"On a DLA these layers fall back to the GPU: {lost}."
        assert facts["on an NPU"].endswith(f"{lost}.")


def test_an_onnx_file(tiny_onnx: Path) -> None:
    inspection = inspect_file(tiny_onnx)
    facts = dict(inspection.facts)
    assert facts["inputs"] == "images uint8[1, 3, 128, 160]"
    assert "cls_logits float32[1, 428, 3]" in facts["outputs"]
    assert facts["tail"] == "raw"
    assert inspection.contract is not None
    assert inspection.contract.class_names == ("red", "white", "platelet")


def test_the_interface_of_an_onnx_file_is_what_the_onnx_package_reads(tiny_onnx: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tiny_onnx)
    interface = onnx_interface(tiny_onnx)
    assert [spec.name for spec in interface.outputs] == [item.name for item in model.graph.output]
    assert interface.inputs == (TensorSpec("images", "uint8", (1, 3, 128, 160)),)
    assert interface.opset == next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    assert interface.nodes == len(model.graph.node)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_onnx_file(part: float, tiny_onnx: Path, tmp_path: Path) -> None:
    whole = tiny_onnx.read_bytes()
    (tmp_path / "m.onnx").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(BackendLoadError):
        inspect_file(tmp_path / "m.onnx")


def test_an_engine_with_its_sidecar(tiny_checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"engine")
    write_sidecar(engine, load_checkpoint(tiny_checkpoint).contract, {"tensorrt": "10.13"})
    inspection = inspect_file(engine)
    assert inspection.kind == "engine"
    assert dict(inspection.facts)["tensorrt"] == "10.13"


def test_a_bundle(make_bundle: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "cells")
    inspection = inspect_bundle(path)
    facts = dict(inspection.facts)
    assert inspection.kind == "bundle"
    assert facts["name"] == "cells"
    assert facts["checkpoint"] == "cells.pth " + "ab" * 6
    assert facts["default"] == "tensorrt, int8"
    assert facts["model.fp32.onnx"].startswith("onnx, fp32, ")
    assert facts["model.int8.engine"] == "tensorrt-engine, int8, 2,048 bytes, by quantize"
    assert inspection.contract is not None
    assert inspection.contract.class_names == ("cell", "platelet")
    printed = CliRunner().invoke(build_app(), ["inspect", str(path), "--json"])
    assert json.loads(printed.stdout)["default"] == "tensorrt, int8"
    (path / "model.int8.json").write_text("{}")
    with pytest.raises(ChecksumError):
        inspect_bundle(path)


def test_what_is_none_of_these(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello world, this is text")
    with pytest.raises(CheckpointError, match="a text file beginning"):
        inspect_file(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="not a file"):
        inspect_file(tmp_path / "nothing")


def test_the_command_prints_json(tiny_checkpoint: Path) -> None:
    result = CliRunner().invoke(build_app(), ["inspect", str(tiny_checkpoint), "--json", "--score-threshold", "0.4"])
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    assert printed["kind"] == "checkpoint"
    assert printed["contract"]["decode"]["score_threshold"] == 0.4
    assert {"name": "score_threshold", "value": "0.4", "source": "option"} in printed["decisions"]


def test_the_command_writes_the_options_that_it_decided(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    file, app = str(tmp_path / "o.toml"), build_app()
    words = ["inspect", str(tiny_checkpoint), "--iou-threshold", "0.5", "--write-options", file, "--json"]
    written = CliRunner().invoke(app, words)
    assert written.exit_code == 0, written.output
    assert "iou_threshold = 0.5  # option\n" in Path(file).read_text()
    assert "input_size = [128, 160]  # the file's metadata\n" in Path(file).read_text()
    again = CliRunner().invoke(
        app, ["inspect", str(tiny_checkpoint), "--checkpoint-options", file, "--json", "--max-detections", "7"]
    )
    sources = {decision["name"]: decision["source"] for decision in json.loads(again.stdout)["decisions"]}
    assert sources["iou_threshold"] == "option in 'o.toml'"
    assert sources["max_detections"] == "option", "the command line overrides the file"
    again = CliRunner().invoke(app, ["inspect", str(tiny_checkpoint), "--checkpoint-options", file, "--json"])
    contracts = [json.loads(result.stdout)["contract"] for result in (written, again)]
    assert {**contracts[0], "decisions": []} == {**contracts[1], "decisions": []}
    refused = CliRunner().invoke(app, ["inspect", str(tiny_onnx), "--write-options", str(tmp_path / "no.toml")])
    assert refused.exit_code == 2
    assert list(tmp_path.iterdir()) == [Path(file)]


def test_the_command_asks_for_the_variant_it_cannot_see(tmp_path: Path, state_dict_keys_dir: Path) -> None:
    names = json.loads((state_dict_keys_dir / "tianzhi_fcos_syncbn_bs32_c128_MNV2_FPN_1x.json").read_text())
    small = {n: torch.zeros(s) for n, s in names.items()}
    torch.save({"model": small}, tmp_path / "fcos.pth")
    runner, app = CliRunner(), build_app()
    silent = runner.invoke(app, ["inspect", str(tmp_path / "fcos.pth")])
    assert silent.exit_code == 2
    assert "--variant original" in silent.stderr
    told = runner.invoke(app, ["inspect", str(tmp_path / "fcos.pth"), "--variant", "original", "--json"])
    assert told.exit_code == 0
    assert json.loads(told.stdout)["backbone"] == "mobilenet-v2"


def test_onnx_files_are_inspected_without_torch_and_onnx(tiny_onnx: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from pathlib import Path; from fcos_deploy.pipeline.inspect import inspect_file\n"
        f"print(inspect_file(Path({str(tiny_onnx)!r})).kind)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "onnx"


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "pickle"])
def test_checkpoints_are_inspected_without_torch(form: str, tmp_path: Path, state_dict_keys_dir: Path) -> None:
    """Values that the decisions need, here the statistics of batch norm, are read without it as well."""
    names = json.loads((state_dict_keys_dir / f"{MMDET}.json").read_text())
    tensors = {n: torch.full(s, float(n.endswith("running_var"))) for n, s in names.items()}
    path = tmp_path / "m.bin"
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"model": {n: t.numpy() for n, t in tensors.items()}}))
    else:
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=form == "zip")
    code = (
        "import sys, fcos_deploy.cli.app as cli\n"
        f"sys.argv = ['fcos-deploy', 'inspect', {str(path)!r}, '--json']\n"
        "try:\n    cli.main()\nfinally:\n"
        "    assert not {'torch', 'onnx', 'safetensors'} & set(sys.modules), 'imported'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = json.loads(run.stdout)
    assert printed["backbone"] == "ResNet-18"
    sources = {d["name"]: d["source"] for d in printed["decisions"]}
    assert sources["stride_in_1x1"] == "the backbone's batch norm statistics are not 0 and 1"


@pytest.mark.parametrize("record", [[1], "text", 7, {"a": {"b": [1] * 1000}}])
def test_a_sidecar_whose_record_is_something_else_is_shown_without_it(
    record: object, bundle_contract: ModelContract, tmp_path: Path
) -> None:
    (tmp_path / "m.xml").write_text("<net/>")
    (tmp_path / "m.json").write_text(json.dumps({"contract": to_json(bundle_contract), "record": record}))
    assert inspect_file(tmp_path / "m.xml").kind == "openvino-ir"
