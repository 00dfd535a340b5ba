"""``benchmark`` and ``soak`` on a tiny real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fcos_deploy import SessionOptions
from fcos_deploy.benchmark import measure
from fcos_deploy.benchmark.run import BenchmarkRequest, demo_image, result_row, run_benchmark
from fcos_deploy.cli.app import build_app
from fcos_deploy.detector import DetectorSpec

pytest.importorskip("onnxruntime")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def run(*arguments: object) -> Result:
    return invoke("benchmark", *arguments)


FAST = ("--threads", 1, "--rounds", 2, "--warmup", 1, "--seconds", 0.1)


def test_two_backends_in_turns(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    output = tmp_path / "baseline.json"
    both = ("--backend", "onnxruntime", "--backend", "openvino", "--no-cold-start")
    result = run(tiny_onnx, *FAST, *both, "--json", "--output", output)
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)
    assert [e["backend"] for e in entries] == ["onnxruntime", "openvino"]
    for entry in entries:
        assert set(entry["latency_ms"]) >= {"mean", "p50", "p90", "p99"}
        assert entry["latency_ms"]["count"] == 10
        assert all(entry["stages_ms"][stage] > 0 for stage in ("preprocess", "infer", "decode"))
        assert entry["throughput_fps"] > 0
        assert entry["file_bytes"] == tiny_onnx.stat().st_size
        assert entry["power"]["watts"] is not None or entry["power"]["problem"]
        assert entry["cold_start"] is None
    assert json.loads(output.read_text()) == entries


def test_models_are_timed_in_turns_and_a_bundle_has_the_size_of_what_ran(tiny_onnx: Path, tiny_bundle: Path) -> None:
    result = run(tiny_onnx, tiny_bundle, *FAST, "--backend", "onnxruntime", "--no-cold-start", "--json")
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)
    assert [entry["model"] for entry in entries] == [tiny_onnx.name, "bundle"]
    assert {entry["file_bytes"] for entry in entries} == {tiny_onnx.stat().st_size}
    assert "times as fast as " in result.stderr
    assert str(tiny_bundle) in result.stderr
    twice = run(tiny_onnx, tiny_onnx, *FAST)
    assert (twice.exit_code, "given twice" in twice.stderr) == (2, True)


@pytest.mark.parametrize(("second", "rounds"), [([10.0] * 4, 2), ([10.0, 20.0, 10.0, 10.0], 4)])
def test_rounds_end_when_every_ratio_is_settled_and_only_what_is_asked_for_runs_alone(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, second: list[float], rounds: int
) -> None:
    """Of two detectors the second takes as long as the first, or takes twice as long in one round."""
    specs = [DetectorSpec(model=tiny_onnx, backend="onnxruntime", options=SessionOptions(threads=n)) for n in (1, 2)]
    times: dict[str, list[float]] = {"1": [10.0] * 4, "2": second}

    def time_block(detector: Any, _: Any, *, block: int, timing: measure.Timing) -> None:
        timing.rounds.append(times[detector.session.description["threads"]][len(timing.rounds)])
        timing.whole.append(timing.rounds[-1])
        timing.stages.append((1.0, block, 1.0))

    monkeypatch.setattr(measure, "_time_block", time_block)
    timing = measure.TimingOptions(rounds=4, warmup=0, throughput_seconds=0.01, settled_after=2)
    request = BenchmarkRequest(candidates=tuple(specs), timing=timing, cold_start=False, alone=(specs[1],))
    results = run_benchmark(request).results
    assert [len(result.rounds_ms) for result in results] == [rounds, rounds]
    assert [result.throughput_fps is None for result in results] == [True, False]
    assert result_row(results[0])[9] == "-"


def test_cold_start_is_a_process_of_its_own(tiny_onnx: Path) -> None:
    result = run(tiny_onnx, *FAST, "--backend", "onnxruntime", "--json")
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)
    cold = entry["cold_start"]
    assert 0 < cold["imported"] < cold["opened"] < cold["first_detection"] == entry["cold_start_s"]
    assert entry["peak_memory_mib"] > 20


def test_a_checkpoint_is_timed_as_its_options_say(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    """In the process of the cold start too: without the names, and with a size of its own, it could not open this."""
    pytest.importorskip("torch")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{'n' * 250}{i}" for i in range(3)))  # nearly as long as a name may be
    wrong = tmp_path / "wrong.safetensors"
    stated = json.dumps({"ecosystem": "torchvision", "input_size": "100x160"})
    wrong.write_bytes(_with_metadata(tiny_checkpoint.read_bytes(), {"fcos_deploy": stated}))
    refused = run(wrong, *FAST)
    assert refused.exit_code == 2
    assert "The size comes from the file's metadata." in refused.stderr
    options = ("--input-size", "96x160", "--classes", names)
    result = run(wrong, *FAST, "--also", tiny_onnx, *options, "--json")
    assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout)
    assert [entry["backend"] for entry in entries] == ["pytorch", "onnxruntime"]
    assert all(entry["cold_start_s"] > 0 for entry in entries)
    assert run(tiny_onnx, *FAST, *options).exit_code == 2


def _with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with other metadata: 8 bytes of length, a JSON header, data."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8 : 8 + size]), "__metadata__": metadata}).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def test_peak_memory_is_not_that_of_the_process_that_asks(tiny_onnx: Path) -> None:
    ballast = np.ones(150_000_000)  # 1.1 GiB, more than the small model's process needs
    spec = DetectorSpec(model=tiny_onnx, backend="onnxruntime", options=SessionOptions(threads=1))
    peak = measure.measure_cold_start(spec, demo_image()).peak_memory_mib
    assert peak < ballast.nbytes / 2**20


def test_slower_than_the_baseline_is_exit_4(tiny_onnx: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.json"
    same = (tiny_onnx, *FAST, "--backend", "onnxruntime", "--no-cold-start")
    assert run(*same, "--output", baseline).exit_code == 0
    assert run(*same, "--baseline", baseline, "--tolerance", 1000).exit_code == 0
    entries = json.loads(baseline.read_text())
    for entry in entries:
        entry["latency_ms"] = {key: value and value / 1000 for key, value in entry["latency_ms"].items()}
    baseline.write_text(json.dumps(entries))
    result = run(*same, "--baseline", baseline)
    assert result.exit_code == 4
    assert "Slower than the baseline by more than 10%: onnxruntime fp32" in result.output


def test_errors_are_one_screen(tiny_onnx: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "gone.onnx", *FAST).exit_code in (1, 2)
    result = run(tiny_onnx, *FAST, "--baseline", tmp_path / "gone.json")
    assert result.exit_code == 2
    assert "Cannot read the baseline" in result.output
    (tmp_path / "text.jpg").write_text("hello")
    result = run(tiny_onnx, *FAST, "--image", tmp_path / "text.jpg")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_soak_compares_every_result(tiny_onnx: Path, smooth_images: Path) -> None:
    usual = ("soak", tiny_onnx, "--inferences", "60", "--concurrency", "3", "--images", smooth_images, "--json")
    done = invoke(*usual, "--max-memory-growth", "0.5")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["inferences"], document["threads"], document["different"]) == (60, 3, 0)
    assert document["backend"] == "onnxruntime"


def test_soak_reads_a_checkpoint_as_its_options_say(tiny_checkpoint: Path, smooth_images: Path) -> None:
    usual = ("--inferences", "6", "--concurrency", "2", "--images", smooth_images, "--max-memory-growth", "1", "--json")
    refused = invoke("soak", tiny_checkpoint, *usual, "--input-size", "100x160")
    assert refused.exit_code == 2
    assert "not a multiple of 32" in refused.stderr
    done = invoke("soak", tiny_checkpoint, *usual, "--input-size", "96x160")
    assert done.exit_code == 0, done.stderr
