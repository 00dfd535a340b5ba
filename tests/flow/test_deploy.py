"""Checkpoint to bundle: the whole path, and its gate."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from calibration import mixed_precision
from calibration.mixed_precision import find_trade_offs
from fcos_deploy.bundle import BundleWriter, open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core import libraries
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import ArtifactKind, ComputeType, Precision
from fcos_deploy.core.errors import AccuracyGateError
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.detector import Detector
from fcos_deploy.pipeline.deploy import DEMO_DATA
from fcos_deploy.pipeline.inspect import inspect_bundle
from fcos_deploy.pipeline.steps import quantize

CHECKPOINT = DEMO_DATA / "fcos_bccd.safetensors"
pytest.importorskip("torch")  # here, or the first deployment would spend its seconds on the import
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_measurements")]


def _arguments(output: Path, *more: str) -> list[str]:
    """On 40 of the 87 evaluation images, which are enough for every step but cannot decide a small limit."""
    data = ["--calibration-images", str(DEMO_DATA / "calibration"), "--calibration-count", "8"]
    coco = json.loads((DEMO_DATA / "evaluation.json").read_text(encoding="utf-8"))
    coco["images"] = coco["images"][:40]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    annotations = output.with_suffix(".json")
    annotations.write_text(json.dumps(coco), encoding="utf-8")
    proof = ["--images", str(DEMO_DATA / "evaluation"), "--annotations", str(annotations), "--allow-inconclusive"]
    return ["deploy", str(CHECKPOINT), "-o", str(output), *data, *proof, "--backend", "openvino", *more]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    bundle = tmp_path_factory.mktemp("deploy") / "bundle"
    limits = ("--max-map-drop", "0.02", "--max-recall-drop", "0.5", "--json")
    result = CliRunner().invoke(build_app(), _arguments(bundle, *limits))
    assert result.exit_code == 0, result.stderr
    return bundle, json.loads(result.stdout)


def test_bundle_holds_every_variant_and_its_hashes_check(deployed: tuple[Path, dict[str, object]]) -> None:
    with open_bundle(deployed[0]) as bundle:
        made = {(a.backend or a.placement, a.precision) for a in bundle.manifest.artifacts}
        assert {"bom.cdx.json", "report.html"} <= set(bundle.manifest.all_files)
        assert {("openvino", Precision.FP32), ("openvino", Precision.INT8), ("portable", Precision.INT8)} <= made
        assert bundle.manifest.accuracy[0].metrics["ap"] > 0.4
        int8 = next(figure for figure in bundle.manifest.accuracy if figure.precision is Precision.INT8)
        assert int8.score_drift is not None
        assert set(int8.thresholds) == {"RBC", "WBC", "Platelets"}
        assert {"ap_small", "ap_large"} <= set(int8.metrics)
        assert 0.1 < int8.score_drift.threshold < 0.5, "the threshold that keeps as many detections as 0.3 did in float"
        assert any(sentence.startswith("max_recall_drop: recall at the operating") for sentence in int8.verdicts)
        assert bundle.manifest.gates[Precision.INT8].max_recall_drop == 0.5


def test_thresholds_of_a_bundle_are_the_operating_point_it_is_judged_at(deployed: tuple[Path, Any]) -> None:
    """The same images and models give what deploy gave; with a goal thresholds are chosen anew."""
    bundle, content = deployed
    where = ["--images", str(DEMO_DATA / "evaluation"), "--annotations", str(bundle.with_suffix(".json"))]
    models = [str(bundle), "--backend", "openvino", "--precision", "int8", "--reference", str(bundle)]
    for goal, origin in (((), "the bundle"), (("--at-recall", "0.5"), "recall 0.5")):
        done = CliRunner().invoke(build_app(), ["evaluate", *models, *where, "--limit", "12", *goal, "--json"])
        assert done.exit_code == 0, done.stderr
        points = json.loads(done.stdout)["operating_points"]
        assert {point["goal"] for point in points} == {origin}
        figures = {(f.precision, f.details["compute"]): f for f in open_bundle(bundle).manifest.accuracy}
        carried = figures[Precision.INT8, "f32"].thresholds  # a processor with bf16 has another figure besides
        assert ([point["score"] for point in points] == [carried[point["name"]] for point in points]) is not bool(goal)
    assert {"recall_drop", "ap_small"} <= set(content["variants"][-1])


def test_the_operating_point_is_applied_where_it_is_asked_for(deployed: tuple[Path, Any]) -> None:
    """Each class at the threshold that the bundle carries for what runs, from Python and on the command line."""
    bundle, _ = deployed
    image = next(iter(sorted((DEMO_DATA / "evaluation").glob("*.jpg"))))
    figures = [f for f in open_bundle(bundle).manifest.accuracy if f.backend == "openvino"]
    (carried,) = (f.thresholds for f in figures if (f.precision, f.details["compute"]) == (Precision.FP32, "f32"))
    options: dict[str, Any] = {"precision": Precision.FP32, "options": SessionOptions(compute=ComputeType.F32)}
    with Detector.open(bundle, **options) as detector:
        limits = np.array([carried[name] for name in detector.names])
        everything = detector.detect(image)
        expected = everything.above((limits + 1e-7).astype(np.float32)[everything.labels])
    with Detector.open(bundle, operating_point=True, **options) as detector:
        kept = detector.detect(image)
    assert 0 < len(kept) < len(everything)
    assert kept.scores.tolist() == expected.scores.tolist()
    words = ["predict", str(bundle), str(image), "--precision", "fp32", "--compute", "f32", "--operating-point"]
    done = CliRunner().invoke(build_app(), [*words, "--json"])
    assert len(json.loads(done.stdout)[0]["detections"]) == len(kept)
    done = CliRunner().invoke(build_app(), ["predict", str(CHECKPOINT), str(image), "--operating-point"])
    assert done.exit_code == 2
    assert "carries no score thresholds" in " ".join(done.stderr.split())


def test_what_is_said_of_thresholds_names_what_each_was_measured_in(deployed: tuple[Path, dict[str, object]]) -> None:
    names = [name for name, _ in inspect_bundle(deployed[0]).facts]
    assert "threshold, openvino int8 f32" in names
    assert len(names) == len(set(names))


def test_fp32_equals_the_reference_to_three_decimals(deployed: tuple[Path, dict[str, object]]) -> None:
    shown: Any = deployed[1]["variants"]
    # A processor with bf16 has variants that compute in it besides.
    variants = {(v["backend"], v["precision"]): v for v in shown if v["compute"] != "bf16"}
    assert abs(variants["pytorch", "fp32"]["ap"] - variants["openvino", "fp32"]["ap"]) < 0.0005


def test_an_artifact_is_evaluated_once_and_the_stages_say_where_the_time_went(
    deployed: tuple[Path, dict[str, object]],
) -> None:
    content: Any = deployed[1]
    stages = {stage["name"]: stage for stage in content["stages"]}
    assert stages["calibrate"]["inferences"] == 8, "one inference an image"
    # The search for the goal has evaluated both IRs in float32; what is left is the reference, and bf16.
    evaluated = [v for v in content["variants"] if v["backend"] == "pytorch" or v["compute"] == "bf16"]
    assert stages["accuracy"]["inferences"] == 40 * len(evaluated)
    assert stages["quantize portable"]["inferences"] < 2 * 40, "its float graph was evaluated as OpenVINO's IR"
    assert stages["golden images"]["inferences"] == 0, "every graph was evaluated, or what was built from it"
    assert sum(stage["seconds"] for stage in content["stages"]) == pytest.approx(content["seconds"], rel=0.2)
    with open_bundle(deployed[0]) as bundle:
        recorded = [stage.name for stage in bundle.manifest.stages]
        runs = {run.artifact: run for run in bundle.manifest.golden_runs if run.compute is ComputeType.F32}
        graphs = {a.path: (a.placement, a.sha256) for a in bundle.manifest.artifacts if a.kind is ArtifactKind.ONNX}
        built = {a.parent: a.path for a in bundle.manifest.artifacts if a.kind is ArtifactKind.OPENVINO_IR}
        # Both IRs detect in the golden images, from the bundle; in bf16 the same files are opened only.
        assert stages["verify"]["inferences"] == len(built) * len(bundle.manifest.golden)
    for path, (placement, sha256) in graphs.items():
        if placement == "portable":  # which other devices build from as well
            assert runs[path].backend == "onnxruntime"
        else:
            assert (runs[path].backend, runs[path].detections) == ("openvino", runs[built[sha256]].detections)
    assert [*recorded, "verify"] == list(stages), "the check of the finished bundle comes after its manifest"


def test_report_is_one_file_that_names_every_variant(deployed: tuple[Path, dict[str, object]]) -> None:
    html = (deployed[0] / "report.html").read_text(encoding="utf-8")
    assert "openvino" in html
    assert "int8" in html
    assert 'src="http' not in html


def test_report_and_manifest_have_the_version_of_every_library_that_ran(deployed: tuple[Path, Any]) -> None:
    html = (deployed[0] / "report.html").read_text(encoding="utf-8")
    with open_bundle(deployed[0]) as bundle:
        tools = bundle.manifest.provenance.tools
    for name in ("numpy", "pillow", "torch", "onnx", "onnxsim", "onnxruntime", "openvino"):
        assert tools[name] == importlib.metadata.version(name), name
        assert tools[name] in html, name
    assert any(name.startswith("opencv-") for name in tools)


def test_report_of_a_bundle_alone_is_the_one_that_it_holds(
    deployed: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        build_app(), ["report", str(deployed[0]), "-o", str(tmp_path / "again.html"), "--allow-inconclusive"]
    )
    assert done.exit_code == 0, done.stderr
    for suffix in (".html", ".md"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (deployed[0] / f"report{suffix}").read_bytes()


def test_verify_holds_for_both_precisions(deployed: tuple[Path, dict[str, object]]) -> None:
    for precision in ("fp32", "int8"):
        result = CliRunner().invoke(build_app(), ["verify", str(deployed[0]), "--precision", precision])
        assert result.exit_code == 0, result.stderr


def _tiny_arguments(checkpoint: Path, images: Path, output: Path, *more: str) -> list[str]:
    data = ["--calibration-images", str(images), "--calibration-count", "8", "--backend", "onnxruntime"]
    return ["deploy", str(checkpoint), "-o", str(output), *data, *more]


def test_a_bundle_with_the_nms_tail_is_packaged_for_deepstream(
    tmp_path: Path, tiny_checkpoint: Path, smooth_images: Path
) -> None:
    bundle, packed = tmp_path / "bundle", tmp_path / "packed"
    arguments = _tiny_arguments(
        tiny_checkpoint, smooth_images, bundle, "--tail", "nms", "--precision", "fp32", "--allow-inconclusive"
    )
    deployed = CliRunner().invoke(build_app(), arguments)
    assert deployed.exit_code == 0, deployed.stderr
    with open_bundle(bundle) as opened:
        (artifact,) = opened.manifest.artifacts
        assert (artifact.path, artifact.precision) == ("model.fp32.nms.onnx", Precision.FP32)
        assert opened.manifest.calibration == ()
        held = [verdict for figure in opened.manifest.accuracy for verdict in figure.verdicts]
        assert held, "every variant is judged"
        assert all(verdict.startswith("min_match_rate: ") for verdict in held), "no AP is lost without annotations"
    done = CliRunner().invoke(build_app(), ["package", str(bundle), "--for", "deepstream", "-o", str(packed)])
    assert done.exit_code == 0, done.stderr
    assert (packed / "labels.txt").read_text() == "red\nwhite\nplatelet\n"
    assert "output-blob-names=boxes;scores;labels;num_detections" in (packed / "config_infer.txt").read_text()


def test_a_deformable_detector_of_one_class_is_deployed_for_every_runtime_and_verified(
    tmp_path: Path, deformable_checkpoint: Path, smooth_images: Path
) -> None:
    """Each runtime gets its own form of the layers; the portable INT8 graph is in plain operators."""
    bundle = tmp_path / "bundle"
    words = ["--backend", "openvino", "--precision", "int8", "--min-match-rate", "0", "--judge", "point"]
    arguments = _tiny_arguments(deformable_checkpoint, smooth_images, bundle, *words, "--allow-inconclusive")
    deployed = CliRunner().invoke(build_app(), arguments)
    assert deployed.exit_code == 0, deployed.stderr
    for backend in ("onnxruntime", "openvino"):
        verified = CliRunner().invoke(build_app(), ["verify", str(bundle), "--backend", backend])
        assert verified.exit_code == 0, verified.stderr
        image = next(smooth_images.glob("*/*.png"))
        predicted = CliRunner().invoke(
            build_app(), ["predict", str(bundle), str(image), "--backend", backend, "--json"]
        )
        (document,) = json.loads(predicted.stdout)
        assert {detection["name"] for detection in document["detections"]} == {"cell"}
    with open_bundle(bundle) as opened:
        sampling = {
            artifact.backend or artifact.placement: {"DeformConv", "GridSample"}
            & onnx_interface(opened.path(artifact.path)).operators
            for artifact in opened.manifest.artifacts
            if artifact.kind is ArtifactKind.ONNX
        }
    assert sampling["onnxruntime"] == {"DeformConv"}
    assert sampling["portable"] == {"GridSample"}
    target = ["--target", "jetson-agx-orin", "--dry-run"]
    planned = CliRunner().invoke(
        build_app(), _tiny_arguments(deformable_checkpoint, smooth_images, tmp_path / "b")[:-2] + target
    )
    assert planned.exit_code == 0, planned.stderr
    assert "fall back to the GPU: the sampling of deformable convolutions, GroupNorm" in planned.stderr


def test_every_backend_and_precision_of_a_target_is_planned(
    tiny_checkpoint: Path, smooth_images: Path, tmp_path: Path
) -> None:
    words = ["--target", "intel-core", "--backend", "openvino", "--backend", "onnxruntime", "--tail", "candidates"]
    arguments = _tiny_arguments(tiny_checkpoint, smooth_images, tmp_path / "b", *words, "--dry-run", "--json")
    result = CliRunner().invoke(build_app(), [*arguments, "--precision", "fp32", "--precision", "int8"])
    assert result.exit_code == 0, result.stderr
    planned = {(plan["backend"], plan["precision"], plan["tail"]) for plan in json.loads(result.stdout)}
    both = ("openvino", "onnxruntime")
    assert planned == {(backend, precision, "candidates") for backend in both for precision in ("fp32", "int8")}
    refused = CliRunner().invoke(build_app(), [*arguments, "--target", "jetson-orin-nano"])
    assert refused.exit_code == 2
    assert "does not run there" in refused.stderr


def test_what_was_measured_before_an_interruption_is_not_measured_again(
    tmp_path: Path, tiny_checkpoint: Path, smooth_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is the last step: it shows those figures, and is as it was as well."""
    bundle = tmp_path / "bundle"
    arguments = _tiny_arguments(
        tiny_checkpoint, smooth_images, bundle, "--min-match-rate", "0", "--judge", "point", "--allow-inconclusive"
    )
    with monkeypatch.context() as cut:
        cut.setattr(BundleWriter, "finish", lambda *_, **__: sys.exit("cut off"))
        assert CliRunner().invoke(build_app(), arguments).exit_code == 1
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".bundle.work" / "files").iterdir()}
    assert "report.html" in written
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 0, done.stderr
    assert written == {name: (bundle / name).stat().st_mtime_ns for name in written}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_cache_lends_another_bundle_what_was_made_from_the_same(
    tmp_path: Path, tiny_checkpoint: Path, smooth_images: Path
) -> None:
    limits = ("--cache", str(tmp_path / "cache"), "--judge", "point", "--allow-inconclusive", "--precision", "fp32")

    def deployed(name: str, *more: str) -> dict[str, Any]:
        arguments = _tiny_arguments(tiny_checkpoint, smooth_images, tmp_path / name, *limits, "--json", *more)
        result = CliRunner().invoke(build_app(), arguments)
        assert result.exit_code == 0, result.stderr
        stages: dict[str, Any] = {stage["name"]: stage for stage in json.loads(result.stdout)["stages"]}
        return stages

    first, again = deployed("a"), deployed("b", "--fast")
    assert (first["export"]["inferences"], again["export"]["inferences"]) != (0, 0)
    assert again["export"]["inferences"] == 0
    assert again["accuracy"]["inferences"] == 0, "the same artifacts on the same images"
    assert again["speed"]["inferences"] > 0, "times are of today"
    a, b = (open_bundle(tmp_path / name).manifest.artifacts[0].sha256 for name in "ab")
    assert a == b
    for record in (tmp_path / "cache").glob("*/step.json"):
        record.write_text(record.read_text().replace("export", "forged"))
    assert deployed("c")["export"]["inferences"] == first["export"]["inferences"], "a forged record is made anew"


def test_a_changed_option_or_file_remakes_what_depends_on_it_and_nothing_else(
    tmp_path: Path, tiny_checkpoint: Path, smooth_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, others = tmp_path / "images", tmp_path / "others"
    for folder, flip in ((images, 1), (others, -1)):
        folder.mkdir()
        for path in sorted(smooth_images.glob("*/*.png"))[:8]:
            cv2.imwrite(str(folder / path.name), cv2.imread(str(path))[:, ::flip])
    made: list[str] = []
    step = BundleWriter.step

    def watched(writer: BundleWriter, name: str, **given: Any) -> Any:
        result = step(writer, name, **given)
        made.extend([] if result.skipped or not given.get("cache") else [name])
        return result

    def remade(*more: str) -> tuple[set[str], int]:
        """Which steps made models or ranges, and the inferences of the accuracy stage."""
        made.clear()
        number = len(list(tmp_path.glob("bundle-*")))
        words = (
            "--images",
            str(others),
            "--cache",
            str(tmp_path / "cache"),
            "--judge",
            "point",
            "--allow-inconclusive",
        )
        arguments = _tiny_arguments(tiny_checkpoint, images, tmp_path / f"bundle-{number}", *words, "--json", *more)
        result = CliRunner().invoke(build_app(), arguments)
        assert result.exit_code == 0, result.stderr
        stages = {stage["name"]: stage["inferences"] for stage in json.loads(result.stdout)["stages"]}
        return set(made), stages["accuracy"]

    def corrected(image: Path) -> None:
        """In place: its name, size and time tell nothing."""
        status = image.stat()
        cv2.imwrite(str(image), cv2.imread(str(image)) // 2)
        image.write_bytes(image.read_bytes().ljust(status.st_size, b"\0"))
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))

    monkeypatch.setattr(BundleWriter, "step", watched)
    limit = ("--min-match-rate", "0.1")
    int8 = {"quantize-onnxruntime-cpu-raw", "quantize-portable-raw"}
    everything = {"export-fp32-raw", "calibrate-raw", *int8}
    assert remade(*limit) == (everything, 8)
    assert remade(*limit, "--precision", "int8") == (set(), 0), "nor for the name of the bundle, its report's title"
    assert remade("--min-match-rate", "0.05") == (int8, 0)
    with monkeypatch.context() as fewer:
        fewer.setattr(mixed_precision, "usable_cpus", lambda: 64)
        assert remade(*limit) == (int8, 0), "threads round otherwise"
    corrected(next(images.glob("*.png")))
    assert remade(*limit) == (everything - {"export-fp32-raw"}, 0), "INT8 alone is another one"
    corrected(next(others.glob("*.png")))
    assert remade(*limit) == (int8, 8), "the reference runs; the others did when INT8 was searched for"
    installed = libraries.library_versions
    monkeypatch.setattr(libraries, "library_versions", lambda *names: {**installed(*names), "openvino": "0.1"})
    assert remade(*limit) == (everything - {"export-fp32-raw"}, 8)


def test_without_other_images_and_annotations_agreement_is_the_goal_and_nothing_is_passed(
    tmp_path: Path, tiny_checkpoint: Path, smooth_images: Path
) -> None:
    """Random weights sit on every threshold, so that plain INT8 does not reproduce all of their detections.

    0.79 of them: the limit is a little more, which takes a few trials and not a dozen.
    """
    limit = ("--min-match-rate", "0.8", "--judge", "point", "--json")
    result = CliRunner().invoke(
        build_app(), _tiny_arguments(tiny_checkpoint, smooth_images, tmp_path / "bundle", *limit)
    )
    assert result.exit_code == 4
    assert "evaluated on its own calibration images" in result.stderr
    content = json.loads(result.stdout)
    assert "no-evaluation-images" in [finding["kind"] for finding in content["findings"]]
    assert content["outcome"] == "inconclusive"
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert "no-evaluation-images" in [finding.kind for finding in manifest.calibration[0].findings]
    assert manifest.gate(Precision.INT8).max_map_drop is not None, "or verify has nothing to hold it to"
    assert "evaluated on its own calibration images" in (tmp_path / "bundle" / "report.md").read_text()
    for search in find_trade_offs([tmp_path / "bundle"]):
        chosen = next(trial for trial in search.trials if trial.ignored_layers == search.ignored_layers)
        assert search.quantity == "agreement with the float model's detections"
        assert chosen.score >= 0.8
    copies = tmp_path / "copies"  # the same pixels in other files
    copies.mkdir()
    for path in smooth_images.rglob("*.png"):
        assert cv2.imwrite(str(copies / f"copy-of-{path.stem}.bmp"), cv2.imread(str(path)))
    later = ["evaluate", str(tmp_path / "bundle"), "--images", str(copies), "--min-match-rate", "0.1"]
    later += ["--reference", str(tmp_path / "bundle" / "model.fp32.onnx"), "--judge", "point"]
    for precision, code in (("int8", 4), ("fp32", 0)):
        judged = CliRunner().invoke(build_app(), [*later, "--precision", precision])
        assert judged.exit_code == code, judged.stderr
        assert "images are calibration images of 'bundle'" in judged.stderr


def test_a_bundle_without_the_portable_int8_graph_alone_says_that_it_holds_the_others(
    tmp_path: Path, tiny_checkpoint: Path, smooth_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*arguments: Any, consumer: str, **given: Any) -> Any:
        if consumer == "portable":
            raise AccuracyGateError("INT8 misses the goal.", hint="give more images")
        return quantize(*arguments, consumer=consumer, **given)

    monkeypatch.setattr("fcos_deploy.pipeline.deploy.quantize", refusing)
    words = ("--precision", "int8", "--min-match-rate", "0", "--judge", "point", "--allow-inconclusive")
    arguments = _tiny_arguments(tiny_checkpoint, smooth_images, tmp_path / "bundle", *words)
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 4, result.stderr
    assert "INT8 misses the goal." in result.stderr
    assert "holds the other artifacts." in " ".join(result.stderr.split())
    with open_bundle(tmp_path / "bundle") as bundle:
        placements = {a.placement for a in bundle.manifest.artifacts if a.precision is Precision.INT8}
    assert placements == {"onnxruntime-cpu"}
