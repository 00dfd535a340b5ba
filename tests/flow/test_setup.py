"""``fcos-deploy setup``: what must be built on a device is built there, verified, chosen, and its record comes home."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fcos_deploy.bundle import open_bundle
from fcos_deploy.bundle.store import read_log
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import ComputeType, PerformanceHint, Precision, Tail
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.progress import no_progress
from fcos_deploy.detector import Detector
from fcos_deploy.pipeline import device

pytest.importorskip("openvino")

ROOT = Path(__file__).parents[2]
_PROGRAM = "from fcos_deploy.cli.app import main; main()"
KILLS = int(os.environ.get("FCOS_DEPLOY_KILLS", "6"))
# Python of an environment with the oldest runtimes that are promised, without the export extra; see the Makefile.
OLD_PYTHON = os.environ.get("FCOS_DEPLOY_OLD_OPENVINO_PYTHON", "")
REQUIRED = "old-openvino" in os.environ.get("FCOS_DEPLOY_REQUIRE", "")

Fcos = Callable[..., "subprocess.CompletedProcess[str]"]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def _hashes(bundle: Path) -> dict[str, str]:
    """Of the certified files."""
    return {
        path.relative_to(bundle).as_posix(): sha256_file(path)
        for path in sorted(bundle.rglob("*"))
        if path.is_file() and path.relative_to(bundle).parts[0] not in ("device", "verification.jsonl")
    }


@pytest.fixture
def bundle(tiny_ir_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_ir_bundle, tmp_path / "cells"))


@pytest.fixture
def old(tmp_path: Path) -> Fcos:
    """``fcos-deploy`` on a device with the oldest runtimes, run in ``tmp_path``."""
    if not OLD_PYTHON:
        if REQUIRED:
            pytest.fail("FCOS_DEPLOY_OLD_OPENVINO_PYTHON is not set: 'make old-openvino-env' makes the environment")
        pytest.skip("FCOS_DEPLOY_OLD_OPENVINO_PYTHON names no environment with an older OpenVINO")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FCOS_DEPLOY_STATE": str(tmp_path / "state-of-the-device"),
        "FCOS_DEPLOY_CACHE": str(tmp_path / "cache-of-the-device"),
    }

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [OLD_PYTHON, "-c", _PROGRAM, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return run


def test_what_fits_is_kept_and_the_fastest_is_chosen(bundle: Path) -> None:
    before = _hashes(bundle)
    done = _run("setup", bundle, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["built"] == []
    assert report["kept"] == ["model.fp32.openvino.xml", "model.fp16.openvino.xml"]
    assert set(report["latency_ms"]) == {"fp32", "fp16"}
    fastest = min(report["latency_ms"], key=report["latency_ms"].get)
    assert report["chosen"]["precision"] == fastest
    assert {fact["name"] for fact in report["facts"]} >= {"runtime", "memory", "free disk"}
    verified = json.loads(_run("verify", bundle, "--json").stdout)
    assert verified["precision"] == fastest, "what setup chose is the default on this device"
    assert len(read_log(bundle / "verification.jsonl")) == 3
    assert _hashes(bundle) == before


def test_precisions_are_timed_as_the_bundle_opens_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[SessionOptions | None] = []

    def opening(*arguments: Any, **given: Any) -> Detector:
        options.append(given["options"])
        return Detector.open(*arguments, **given)

    monkeypatch.setattr(device, "Detector", SimpleNamespace(open=opening))
    tuned = {"precision": Precision.FP16, "compute": ComputeType.F32, "threads": 1, "hint": PerformanceHint.LATENCY}
    with open_bundle(bundle) as opened:
        defaults = replace(opened.manifest.defaults, **tuned)
        monkeypatch.setattr(opened, "manifest", replace(opened.manifest, defaults=defaults))
        records = [SimpleNamespace(precision=precision) for precision in (Precision.FP32, Precision.FP16)]
        assert set(device._measure(opened, "openvino", records, no_progress)) == {"fp32", "fp16"}
    assert options == [SessionOptions(hint="latency"), SessionOptions(hint="latency", compute="f32", threads=1)]


def test_a_newer_ir_is_rebuilt_on_an_older_openvino_and_the_record_comes_home(
    bundle: Path, old: Fcos, tmp_path: Path
) -> None:
    """The whole way with two versions: made with the newer, set up and verified on the older, signed off at home."""
    before = _hashes(bundle)
    refused = old("verify", "cells")
    assert refused.returncode != 0
    hint = re.search(r"rebuild it here: fcos-deploy ([^;]+)", " ".join(refused.stderr.split()))
    assert hint is not None, refused.stderr
    assert old(*hint[1].split()).returncode == 0
    assert json.loads(old("verify", "cells", "--json").stdout)["artifact"].startswith("device/openvino-")
    shutil.rmtree(bundle / "device")
    done = old("setup", "cells", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [name.split("/")[0] for name in report["built"]] == ["device", "device"]
    assert report["chosen"]["outcome"] == "passed"
    signed = old("sign", "--device", "cells")
    assert signed.returncode == 0, signed.stderr
    verified = old("verify", "cells", "--export", "record.json", "--json")
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["artifact"].startswith("device/openvino-")
    assert old("setup", "cells", "--json").returncode == 0
    kept = json.loads(old("setup", "cells", "--json").stdout)
    assert kept["built"] == []
    assert _hashes(bundle) == before
    page = tmp_path / "sign-off.html"
    home = _run("report", bundle, "--records", tmp_path / "record.json", "-o", page)
    assert home.exit_code == 0, home.stderr
    text = page.with_suffix(".md").read_text()
    assert "2025.0.0" in text
    assert "passed" in text
    # Moved back to this machine the layer is not used, and nothing is refused.
    assert json.loads(_run("verify", bundle, "--json").stdout)["artifact"].startswith("model.")


@pytest.mark.parametrize("tail", ["raw", "candidates", "nms"])
def test_the_oldest_onnx_runtime_runs_what_is_exported(
    tail: str, tiny_export: Callable[..., Path], smooth_images: Path, old: Fcos
) -> None:
    model, image = tiny_export(tail=Tail(tail)), next(smooth_images.rglob("*.png"))
    older = old("predict", model, image, "--json")
    assert older.returncode == 0, older.stderr
    expected = json.loads(_run("predict", model, image, "--json").stdout)[0]["detections"]
    found = json.loads(older.stdout)[0]["detections"]
    assert len(found) == len(expected) > 0
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in expected], abs=1e-4)


def test_setup_that_is_killed_leaves_a_bundle_that_opens_and_the_next_one_completes(
    bundle: Path, old: Fcos, tmp_path: Path
) -> None:
    """SIGKILL at points in time that are spread over a whole run, which builds two layers where OpenVINO is older."""
    before = _hashes(bundle)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FCOS_DEPLOY_STATE": str(tmp_path / "state"),
        "FCOS_DEPLOY_CACHE": "",
    }
    started = time.monotonic()
    python = OLD_PYTHON or sys.executable
    command = [python, "-c", _PROGRAM, "setup", "cells", "--json"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    whole = time.monotonic() - started
    for kill in range(KILLS):
        shutil.rmtree(bundle / "device", ignore_errors=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, cwd=tmp_path, env=environment, **quiet) as process:
            time.sleep(whole * (0.2 + 0.8 * kill / KILLS))  # the beginning is the interpreter's
            process.send_signal(signal.SIGKILL)
            process.wait()
        with open_bundle(bundle) as opened:
            assert opened.manifest.name == "tiny"
        assert _hashes(bundle) == before
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((bundle / "device").glob(".*.partial"))


def test_records_that_are_foreign_or_contradict_each_other_are_refused_by_name(
    bundle: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    record = tmp_path / "first.json"
    assert _run("verify", bundle, "--export", record).exit_code == 0
    content = json.loads(record.read_text())

    def written(name: str, **changes: object) -> Path:
        changed = json.loads(json.dumps(content))
        changed["signature"] = None
        changed["record"]["verification"].update(changes)
        (tmp_path / name).write_text(json.dumps(changed))
        return tmp_path / name

    cases = {
        "'foreign.json' belongs to another bundle": [written("foreign.json", manifest_sha256="ab" * 32)],
        "'unknown.json' is of an artifact": [written("unknown.json", artifact_sha256="ab" * 32)],
        "contradict each other": [written("one.json", outcome="passed"), written("two.json", outcome="failed")],
        "'no.json' is not a device record": [tmp_path / "no.json"],
    }
    (tmp_path / "no.json").write_text("{}")
    for message, paths in cases.items():
        arguments = [word for path in paths for word in ("--records", path)]
        refused = _run("report", bundle, *arguments, "-o", tmp_path / "page.html")
        assert refused.exit_code != 0
        assert message.split("'")[-1] in refused.stderr
        assert paths[0].name in refused.stderr


def test_a_signed_record_that_was_changed_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography")
    from fcos_deploy.bundle.signature import sign_with_device_key

    monkeypatch.setenv("FCOS_DEPLOY_STATE", str(tmp_path / "state"))
    sign_with_device_key(b"makes the key")
    record = tmp_path / "record.json"
    assert _run("verify", bundle, "--export", record).exit_code == 0
    public = tmp_path / "state" / "device-key.pub.pem"
    page = tmp_path / "page.html"
    accepted = _run("report", bundle, "--records", record, "--public-key", public, "-o", page)
    assert accepted.exit_code == 0, accepted.stderr
    unsigned = _run("report", bundle, "--records", record, "--require-signature", "--public-key", public, "-o", page)
    assert unsigned.exit_code == 1
    assert "is not signed" in unsigned.stderr
    record.write_text(record.read_text().replace('"outcome": "passed"', '"outcome": "failed"'))
    refused = _run("report", bundle, "--records", record, "-o", page)
    assert refused.exit_code == 1
    assert "does not match" in refused.stderr
