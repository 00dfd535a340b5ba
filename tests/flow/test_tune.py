"""From a budget to a bundle: what is chosen, what is kept, and what is said when nothing fits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fcos_deploy.accuracy.verify import verify_bundle
from fcos_deploy.benchmark.measure import (
    Contention,
    ContentionMeter,
    PowerMeter,
    PowerReading,
    Timing,
    time_in_turns,
)
from fcos_deploy.bundle import open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import ComputeType, Precision, Tail
from fcos_deploy.core.errors import BudgetError, ConfigError, DeviceError
from fcos_deploy.core.gate import Judge, Outcome
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.detector import Detector
from fcos_deploy.pipeline.tune import open_search
from fcos_deploy.pipeline.tune_models import InputSize
from fcos_deploy.pipeline.tune_search import TuneRequest

pytest.importorskip("torch")
pytestmark = pytest.mark.slow


def arguments(checkpoint: Path, images: Path, output: Path, *more: str) -> list[str]:
    axes = ["--size", "128x160", "--size", "160x224", "--backend", "onnxruntime", "--threads", "1"]
    return ["tune", str(checkpoint), "--images", str(images), "-o", str(output), *axes, *more]


def answer(words: list[str], *, exit_code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(build_app(), [*words, "--json"])
    assert result.exit_code == exit_code, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return {**content, "said": " ".join(result.stderr.split())}


def times(output: Path, *, undisturbed: bool = False) -> dict[str, int]:
    """What was measured, and when; ``undisturbed``: only what no other program disturbed."""
    paths = (output / "trials" / "times").glob("time-*.json")
    return {
        path.name: path.stat().st_mtime_ns
        for path in paths
        if not (undisturbed and json.loads(path.read_text())["problem"])
    }


def test_a_killed_search_goes_on_where_it_was_and_within_a_budget_the_highest_ap_is_deployed(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tuned"
    words = arguments(tiny_checkpoint, smooth_images, output)
    program = "import sys; from fcos_deploy.cli.app import main; main()"
    with subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not times(output) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = times(output, undisturbed=True)
    assert times(output)
    with monkeypatch.context() as patch:
        patch.setattr(ContentionMeter, "stop", lambda _: Contention(others=0.5))
        limits = ["--max-latency-ms", "60000", "--max-memory-mib", "50000"]
        content = answer([*words, "--size", "64x96", *limits, "--allow-inconclusive"])
    assert before.items() <= times(output).items(), "what was timed is not timed again"
    by_size = {p["size"]: p for p in content["points"]}
    assert "cannot be made" in by_size["64x96"]["reason"], "its top level would have a single location"
    assert by_size["128x160"]["status"] == "chosen", "the detections at its own size are the ground truth"
    assert by_size["160x224"]["status"] == "next best"
    assert by_size["160x224"]["ap"] < by_size["128x160"]["ap"]
    assert {"tune.html", "tune.md", "tune.json", "bundle"} <= {path.name for path in output.iterdir()}
    assert "data:image/svg+xml" in (output / "tune.html").read_text(encoding="utf-8")
    with open_bundle(output / "bundle") as bundle:
        assert bundle.manifest.contract.preprocess.canvas == (128, 160)
        assert [a.precision for a in bundle.manifest.artifacts] == [Precision.FP32]
    (on_time,) = (v for v in content["verdicts"] if v["name"] == "max_latency_ms")
    assert on_time["outcome"] == "passed"
    assert 0 < on_time["value"] < 60000 == on_time["limit"]
    (on_memory,) = (v for v in content["verdicts"] if v["name"] == "max_memory_mib")
    assert on_memory["message"].endswith(" MiB of memory in a new process, at most 50000 asked for")
    with Detector.open(output / "bundle") as detector:
        assert detector.session.description["threads"] == ("all cores" if usable_cpus() == 1 else "1")

    assert any("used 50% of the processors" in path.read_text() for path in (output / "trials" / "times").iterdir())
    assert "Times are doubtful: other programs used" in content["said"]


def slow_bundles(monkeypatch: pytest.MonkeyPatch, *slow: tuple[int, int]) -> None:
    """Bundles of these sizes take a minute an image, and nothing disturbs a measurement."""

    def timed(detectors: list[Detector], image: Any, **options: Any) -> list[Timing]:
        timings = time_in_turns(detectors, image, **options)
        for detector, timing in zip(detectors, timings, strict=True):
            if "artifact" in detector.session.description and detector.contract.preprocess.canvas in slow:
                timing.whole = [60000.0 + ms for ms in timing.whole]
        return timings

    monkeypatch.setattr("fcos_deploy.pipeline.tune_search.time_in_turns", timed)
    monkeypatch.setattr(ContentionMeter, "stop", lambda _: Contention())


def test_a_bundle_slower_than_its_limit_gives_way_to_the_next_best(
    tiny_checkpoint: Path, tiny_bundle: Path, smooth_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "tuned"
    (output / "trials").mkdir(parents=True, mode=0o700)
    shutil.copytree(tiny_bundle, output / "bundle")
    slow_bundles(monkeypatch, (160, 224))
    words = ["tune", str(tiny_checkpoint), "--images", str(smooth_images), "-o", str(output), "--threads", "1"]
    words += ["--backend", "onnxruntime", "--max-latency-ms", "50000", "--allow-inconclusive", "--size", "160x224"]
    content = answer(words, exit_code=4)
    assert "The nearest is 160x224 onnxruntime fp32, 1 thread: 600" in content["said"]
    assert "as deployed" in content["said"]
    assert content["bundle"] is None
    manifests = [(folder / "manifest.json").read_bytes() for folder in (tiny_bundle, output / "bundle")]
    assert manifests[0] == manifests[1], "an earlier answer stays until there is another one"
    assert "bundle' is the answer of an earlier search" in content["said"]
    assert not (output / "trials" / "work").exists(), "the one that is too slow is not left behind"

    # The trial is kept: what was too slow is not deployed again when the search is widened.
    content = answer([*words, "--size", "128x160", "--size", "160x192"])
    by_size = {p["size"]: p for p in content["points"]}
    assert "ms in its bundle, beyond the limit" in by_size["160x224"]["reason"]
    assert by_size["128x160"]["status"] == "chosen"
    assert by_size["160x192"]["status"] == "next best"
    with open_bundle(output / "bundle") as bundle:
        assert bundle.manifest.contract.preprocess.canvas == (128, 160)
    (on_time,) = (v for v in content["verdicts"] if v["name"] == "max_latency_ms")
    assert on_time["outcome"] == "passed"
    assert 0 < on_time["value"] < 50000 == on_time["limit"]
    assert f"Its bundle: {on_time['message']}." in content["notes"]


def test_a_folder_that_is_no_bundle_is_not_replaced(tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir(mode=0o700)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("mine")
    request = TuneRequest(model=tiny_checkpoint, output=tmp_path, images=smooth_images)
    with pytest.raises(ConfigError, match="is not a bundle, so it is not replaced"), open_search(request):
        pass


def test_nothing_within_the_budget_names_the_nearest_and_what_it_costs(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    content = answer(arguments(tiny_checkpoint, smooth_images, output, "--max-latency-ms", "0.001"), exit_code=4)
    assert "The nearest is 128x160 onnxruntime fp32, 1 thread" in content["said"]
    assert ", AP 0." in content["said"]
    by_size = {p["size"]: p for p in content["points"]}
    assert "ms at 128x160 already" in by_size["160x224"]["reason"], "the larger size was not exported"
    assert by_size["160x224"]["p50_ms"] is None
    assert not (output / "bundle").exists()


def test_memory_and_power_limit_the_choice_where_they_can_be_read(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ["--max-memory-mib", "1", "--max-watts", "1000"]
    content = answer(arguments(tiny_checkpoint, smooth_images, tmp_path, *limits), exit_code=4)
    assert "MiB of memory" in content["said"]
    assert content["goal"] == "Asked for: the highest AP with at most 1 MiB of memory and at most 1000 W."
    monkeypatch.setattr(PowerMeter, "stop", lambda _: PowerReading(watts=None, problem="no sensor"))
    request = TuneRequest(
        model=tiny_checkpoint,
        output=tmp_path,
        images=smooth_images,
        backends=("onnxruntime",),
        sizes=(InputSize(128, 160),),
        threads=(1,),
        max_watts=10.0,
    )
    with open_search(request) as (search, found):
        search.run()
        found.race()
        found.choose()
        assert [(v.name, v.outcome, v.message) for v in found.verdicts] == [
            ("max_watts", Outcome.INCONCLUSIVE, "no sensor")
        ]


def annotate(checkpoint: Path, images: Path, path: Path) -> Path:
    """COCO annotations of what the model detects, and of the classes that occur."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    with Detector.open(checkpoint) as detector:
        content["categories"] = [{"id": k, "name": name} for k, name in enumerate(detector.names)]
        for number, file in enumerate(sorted(images.rglob("*.png"))):
            name = file.relative_to(images).as_posix()
            content["images"].append({"id": number, "file_name": name, "height": 80, "width": 96})
            found = detector.detect(file).above(0.4)
            for (x, y, right, bottom), label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
                box = [x, y, right - x, bottom - y]
                if min(box[2:]) < 1:  # of random weights: clipped to a line
                    continue
                number_of = len(content["annotations"])
                content["annotations"].append(
                    {"id": number_of, "image_id": number, "category_id": label, "bbox": box, "area": box[2] * box[3]}
                )
    seen = {item["category_id"] for item in content["annotations"]}
    content["categories"] = [category for category in content["categories"] if category["id"] in seen]
    path.write_text(json.dumps(content))
    return path


def test_an_ap_is_reached_by_the_whole_interval_or_is_inconclusive(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    def outcome(min_ap: float, judge: Judge = Judge.INTERVAL) -> tuple[Outcome, float]:
        request = TuneRequest(
            model=tiny_checkpoint,
            output=tmp_path / "tuned",
            images=smooth_images,
            annotations=annotations,
            backends=("onnxruntime",),
            sizes=(InputSize(128, 160),),
            threads=(1,),
            min_ap=min_ap,
            judge=judge,
        )
        with open_search(request) as (search, answer):
            search.run()
            answer.race()
            answer.choose()
            (verdict,) = answer.verdicts
        assert verdict.value is not None
        return verdict.outcome, verdict.value

    annotations = annotate(tiny_checkpoint, smooth_images, tmp_path / "annotations.json")
    passed, ap = outcome(0.05)
    assert passed is Outcome.PASSED
    assert outcome(ap - 0.0001)[0] is Outcome.INCONCLUSIVE
    with pytest.raises(BudgetError, match=r"The nearest is 128x160 .*, AP 0\.") as error:
        outcome(1.0, Judge.POINT)
    assert error.value.exit_code == 4

    # Changed annotations are judged anew, and those that cannot be this model's decide nothing.
    content = json.loads(annotations.read_text())
    for number, item in enumerate(content["annotations"]):
        item["bbox"] = [3 * (number % 20), 3 * (number // 20 % 20), 4, 4]
    annotations.write_text(json.dumps(content))
    assert outcome(0.0, Judge.POINT) == (Outcome.INCONCLUSIVE, 0.0)
    annotations.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ConfigError, match="There is nothing to tune on: the annotations hold no object"):
        outcome(0.0)


def test_int8_of_all_sizes_is_calibrated_once_and_the_front_has_no_bundle(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    int8 = ["--calibration-images", str(smooth_images), "--allow-overlap", "--throughput", "--streams", "1"]
    content = answer(arguments(tiny_checkpoint, smooth_images, output, *int8, "--batch", "1", "--batch", "3"))
    timed = [p for p in content["points"] if p["images_per_second"]]
    assert {(p["size"], p["precision"]) for p in timed} == {
        (size, precision) for size in ("160x224", "128x160") for precision in ("fp32", "int8")
    }
    assert {(p["batch"], p["precision"]) for p in timed if p["size"] == "160x224"} == {
        (batch, precision) for batch in (1, 3) for precision in ("fp32", "int8")
    }
    records = [json.loads(path.read_text()) for path in (output / "trials" / "steps").glob("*/step.json")]
    names = [record["name"] for record in records]
    assert len([name for name in names if name.startswith("calibrate")]) == 1
    assert 3 <= len([name for name in names if name.startswith("int8")]) <= 4, "of each size and batch that was timed"
    assert content["bundle"] is None
    assert any(p["status"] == "front" for p in content["points"])


def test_batches_and_the_format_of_floats_are_axes_of_throughput(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    output, axes = tmp_path / "tuned", ["--backend", "openvino", "--threads", "1", "--size", "128x160"]
    words = ["tune", str(tiny_checkpoint), "--images", str(smooth_images), "-o", str(output), *axes]
    words += ["--min-throughput", "0.001", "--batch", "3", "--streams", "1", "--judge", "point"]
    words += ["--allow-inconclusive", "--compute", "f32", "--compute", "bf16"]
    content = answer(words)
    (chosen,) = [p for p in content["points"] if p["status"] == "chosen"]
    assert (chosen["batch"], chosen["compute"]) == (3, "f32"), "the float32 graph detects what the reference does"
    (in_bf16,) = [p for p in content["points"] if p["compute"] == "bf16"]
    assert in_bf16["reason"] in (
        "a more exact precision keeps the limit at this size",
        "it does not compute in bf16 here",
    )
    (on_time,) = (v for v in content["verdicts"] if v["name"] == "min_throughput")
    assert 0.001 == on_time["limit"] < on_time["value"], "images a second, as the limit"
    assert on_time["subject"] == "128x160 openvino fp32, 1 thread, 1 at a time in batches of 3"
    assert on_time["message"].endswith(" images/s as deployed, at least 0.001 asked for")
    with Detector.open(output / "bundle") as detector:  # by default as it was chosen
        assert detector.batch == 3
        assert {"hint": "throughput", "streams": "1", "threads": "1"}.items() <= detector.session.description.items()
        assert detector.session.inputs[0].shape[0] is None
        assert len(detector.detect_batch([np.zeros((64, 64, 3), np.uint8)] * 4)) == 4
    try:
        Detector.open(output / "bundle", options=SessionOptions(compute=ComputeType.BF16)).close()
        offered = {ComputeType.F32, ComputeType.BF16}
    except DeviceError:
        offered = {ComputeType.F32}
    if ComputeType.BF16 in offered:
        words = ["tune", str(tiny_checkpoint), "--images", str(smooth_images), "-o", str(output), *axes]
        # Random weights have scores near the threshold: a tenth of the detections has no partner in bf16.
        limits = ["--max-latency-ms", "60000", "--min-match-rate", "0.5"]
        content = answer([*words, "--compute", "bf16", *limits, "--allow-inconclusive"])
        (on_time,) = (v for v in content["verdicts"] if v["name"] == "max_latency_ms")
        assert on_time["subject"] == "128x160 openvino fp32 bf16, 1 thread"
        with Detector.open(output / "bundle") as detector:
            assert {"compute": "bf16", "hint": "latency"}.items() <= detector.session.description.items()
        with open_bundle(output / "bundle") as bundle:
            assert verify_bundle(bundle).session["compute"] == "bf16", "it is verified as it runs"
        assert "ms an image as deployed (median), at most 60000" in on_time["message"]
        assert any("as it opens by default " in n and "MiB of memory in a new process" in n for n in content["notes"])
    request = TuneRequest(
        model=tiny_checkpoint,
        output=output,
        images=smooth_images,
        backends=("onnxruntime", "openvino"),
        sizes=(InputSize(128, 160),),
        threads=(1,),
    )
    with open_search(request) as (search, _):
        search.run()
        assert {c.compute for c in search.measured if c.backend == "openvino"} == offered
        assert {c.compute for c in search.measured if c.backend == "onnxruntime"} == {ComputeType.F32}


def test_a_dynamic_graph_and_its_bundle_are_tuned_without_torch(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tmp_path / "dynamic.onnx"
    edges = ["--shortest", "128", "--longest", "160", "--input-dtype", "uint8", "--tail", "candidates"]
    exported = CliRunner().invoke(build_app(), ["export", str(tiny_checkpoint), "-o", str(graph), *edges])
    assert exported.exit_code == 0, exported.stderr
    annotations = annotate(tiny_checkpoint, smooth_images, tmp_path / "annotations.json")
    monkeypatch.setitem(sys.modules, "torch", None)
    limit = ["--max-latency-ms", "60000", "--allow-inconclusive"]
    content = answer(arguments(graph, smooth_images, tmp_path / "tuned", *limit))
    (chosen,) = [p["size"] for p in content["points"] if p["status"] == "chosen"]
    with open_bundle(tmp_path / "tuned" / "bundle") as bundle:
        canvas = bundle.manifest.contract.preprocess.canvas
    assert canvas is not None
    assert chosen == f"{canvas[0]}x{canvas[1]}"
    # The bundle at another size and in INT8, whose random weights lose what trained ones keep.
    words = ["tune", str(tmp_path / "tuned" / "bundle"), "--images", str(smooth_images), "-o", str(tmp_path / "int8")]
    words += ["--annotations", str(annotations), "--min-ap", "0", "--max-map-drop", "1", "--judge", "point"]
    words += ["--precision", "int8", "--calibration-images", str(smooth_images), "--calibration-count", "8"]
    words += ["--backend", "onnxruntime", "--threads", "1", "--allow-overlap", "--size", "160x192"]
    content = answer([*words, "--allow-inconclusive"])
    (on_ap,) = (v for v in content["verdicts"] if v["name"] == "min_ap")
    assert on_ap["subject"] == "160x192 onnxruntime int8, 1 thread"
    with Detector.open(tmp_path / "int8" / "bundle") as detector:
        assert (detector.contract.precision, detector.contract.tail) == (Precision.INT8, Tail.CANDIDATES)


def test_annotations_of_other_classes_are_refused_before_anything_is_measured(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    annotations = annotate(tiny_checkpoint, smooth_images, tmp_path / "annotations.json")
    annotations.write_text(annotations.read_text().replace('"platelet"', '"plaquette"'))
    more = ["--annotations", str(annotations)]
    result = CliRunner().invoke(build_app(), arguments(tiny_checkpoint, smooth_images, tmp_path / "tuned", *more))
    assert result.exit_code == 2
    assert "has objects of 'plaquette', which the model does not know" in " ".join(result.stderr.split())
    assert not times(tmp_path / "tuned")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max-latency-ms", "5", "--min-throughput", "3"], "two different goals"),
        (["--min-ap", "0.5"], "without annotations"),
        (["--precision", "int8"], "--calibration-images"),
        (["--size", "640"], "height x width"),
        (["--size", "100x100"], "the nearest is 96x96"),
        (["--percentile", "99"], "50 or 90"),
        (["--batch", "2"], "are for throughput"),
        (["--throughput", "--streams", "4"], "Nothing can be tried: --streams is above"),
        (["--compute", "bf16"], "it does not compute in bf16 here"),
        (["--compute", "f16"], "Float layers are tried in f32 and in bf16"),
        (["--threads", "99999"], "99999 threads are more than the"),
        (["--max-latency-ms", "inf"], "max_latency_ms must be a positive number, got inf"),
        (["--throughput", "--percentile", "90"], "Percentiles are of the latency"),
        (["--size", "0x0"], "at least 1 pixel"),
        (["--at-recall", "0.9"], "needs annotations"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    result = CliRunner().invoke(build_app(), arguments(tiny_checkpoint, smooth_images, tmp_path / "tuned", *more))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
