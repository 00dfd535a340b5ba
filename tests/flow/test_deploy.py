"""Checkpoint to bundle: the whole path, its gate, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fcos_deploy.bundle import open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.enums import Precision
from fcos_deploy.pipeline.demo import DEMO_DATA

CHECKPOINT = DEMO_DATA / "fcos_bccd.safetensors"
pytestmark = pytest.mark.slow


def _arguments(output: Path, *more: str) -> list[str]:
    data = ["--calibration-images", str(DEMO_DATA / "calibration"), "--calibration-count", "8"]
    proof = ["--images", str(DEMO_DATA / "evaluation"), "--annotations", str(DEMO_DATA / "evaluation.json")]
    return ["deploy", str(CHECKPOINT), "-o", str(output), *data, *proof, "--backend", "openvino", *more]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fcos_deploy.cli.app import main; main()", *arguments]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    bundle = tmp_path_factory.mktemp("deploy") / "bundle"
    result = CliRunner().invoke(build_app(), _arguments(bundle, "--max-map-drop", "0.02", "--json"))
    assert result.exit_code == 0, result.stderr
    return bundle, json.loads(result.stdout)


def test_bundle_holds_every_variant_and_its_hashes_check(deployed: tuple[Path, dict[str, object]]) -> None:
    with open_bundle(deployed[0]) as bundle:
        made = {(a.backend or a.placement, a.precision) for a in bundle.manifest.artifacts}
        assert {("openvino", Precision.FP32), ("openvino", Precision.INT8), ("portable", Precision.INT8)} <= made
        assert bundle.manifest.accuracy[0].metrics["ap"] > 0.4


def test_fp32_equals_the_reference_to_three_decimals(deployed: tuple[Path, dict[str, object]]) -> None:
    variants = {(v["backend"], v["precision"]): v for v in deployed[1]["variants"]}  # type: ignore[attr-defined]  # JSON
    assert abs(variants["pytorch", "fp32"]["ap"] - variants["openvino", "fp32"]["ap"]) < 0.0005


def test_report_is_one_file_that_names_every_variant(deployed: tuple[Path, dict[str, object]]) -> None:
    html = (deployed[0] / "report.html").read_text(encoding="utf-8")
    assert "openvino" in html
    assert "int8" in html
    assert 'src="http' not in html


def test_verify_holds_for_both_precisions(deployed: tuple[Path, dict[str, object]]) -> None:
    for precision in ("fp32", "int8"):
        result = CliRunner().invoke(build_app(), ["verify", str(deployed[0]), "--precision", precision])
        assert result.exit_code == 0, result.stderr


def test_missed_gate_is_exit_code_4_and_leaves_no_bundle(tmp_path: Path) -> None:
    result = CliRunner().invoke(build_app(), _arguments(tmp_path / "bundle", "--max-map-drop", "0"))
    if result.exit_code == 0:
        pytest.skip("INT8 lost nothing at all on these images")
    assert result.exit_code == 4, result.stderr
    assert "mAP" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_killed_run_leaves_nothing_under_the_name_and_a_rerun_completes(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    process = subprocess.Popen(_command(*_arguments(bundle, "--max-map-drop", "0.02")), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(tmp_path.glob(".bundle.work/files/model.fp32.onnx")):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not bundle.exists()
    graph = tmp_path / ".bundle.work" / "files" / "model.fp32.onnx"
    made_at = graph.stat().st_mtime_ns
    result = CliRunner().invoke(build_app(), _arguments(bundle, "--max-map-drop", "0.02"))
    assert result.exit_code == 0, result.stderr
    assert (bundle / "model.fp32.onnx").stat().st_mtime_ns == made_at, "the finished export was done again"
    assert {p.name for p in tmp_path.iterdir()} == {"bundle"}
