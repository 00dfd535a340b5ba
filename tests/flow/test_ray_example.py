"""``examples/ray``: a pool that loses a worker and then a node gives the AP of a single process, to the last digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fcos_deploy import Detector, SessionOptions
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.detector import DetectorSpec

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
# Python of an environment with Ray and this project's libraries; see the Makefile.
RAY_PYTHON = os.environ.get("FCOS_DEPLOY_RAY_PYTHON", "")

# Two nodes with a worker each. Kills the process of the first result, and the second node after the second; prints how
# often which process answered, and how often the bundle was checked on each node.
DRIVER = r"""
import importlib.util, json, os, signal, sys
from collections import Counter
from ray.cluster_utils import Cluster
spec = importlib.util.spec_from_file_location("ray_example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
sys.modules["ray_example"] = example
spec.loader.exec_module(example)
from pathlib import Path
bundle, images, annotations, kept = map(Path, sys.argv[2:])
example.CHUNK = 2
dataset = example.load_coco(annotations, images=images)
node = {"num_cpus": 1, "object_store_memory": 80 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
second = cluster.add_node(**node)
example.ray.init(address=cluster.address, log_to_driver=False)
answers, checked = Counter(), Counter()
place = example.NodeBundle.options
def options_of_check(**options):
    checked[options["scheduling_strategy"].node_id] += 1
    return place(**options)
example.NodeBundle.options = options_of_check
def on_result(process, done):
    answers[process] += 1
    if sum(answers.values()) == 1:
        os.kill(process, signal.SIGKILL)
    if sum(answers.values()) == 2:
        cluster.remove_node(second, allow_graceful=False)
options = example.SessionOptions(threads=1)
detections, _ = example.collect(bundle, dataset.images, folder=kept, workers=2, options=options, trust=example.Trust(),
                                on_result=on_result)
example.ray.shutdown()
cluster.shutdown()
print(json.dumps({"images": len(detections), "answers": dict(answers), "checked": list(checked.values())}))
"""


@pytest.fixture(scope="module")
def annotations(tiny_bundle: Path, smooth_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second detection of the model, moved by two pixels, as the ground truth."""
    file = tmp_path_factory.mktemp("ray") / "annotations.json"
    images, objects = [], []
    with Detector.open(tiny_bundle) as detector:
        for number, path in enumerate(sorted(smooth_images.rglob("*.png")), start=1):
            name = path.relative_to(smooth_images).as_posix()
            images.append({"id": number, "file_name": name, "width": 96, "height": 80})
            for item in detector.detect(path).to_list(detector.names)[::2]:
                x1, y1, x2, y2 = item["box"]
                box = [x1, y1, max(x2 - x1 - 2, 1), max(y2 - y1 - 2, 1)]
                objects.append(
                    {"id": len(objects) + 1, "image_id": number, "category_id": item["label"] + 1, "bbox": box}
                    | {"area": box[2] * box[3], "iscrowd": 0}
                )
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(detector.names)]
    file.write_text(json.dumps({"images": images, "annotations": objects, "categories": categories}))
    return file


@pytest.mark.skipif(not RAY_PYTHON, reason="FCOS_DEPLOY_RAY_PYTHON names no environment with Ray: make ray-env")
def test_a_pool_that_loses_a_worker_and_a_node_evaluates_as_one_process_does(
    tiny_bundle: Path, smooth_images: Path, annotations: Path, tmp_path: Path
) -> None:
    spec = DetectorSpec(model=tiny_bundle, options=SessionOptions(threads=1))
    request = {"candidates": (spec,), "images": smooth_images, "annotations": annotations, "resamples": 50}
    kept = tmp_path / "kept"
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no report, no file in the home folder
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    script = ROOT / "examples" / "ray" / "evaluate.py"
    command = [RAY_PYTHON, "-c", DRIVER, *map(str, (script, tiny_bundle, smooth_images, annotations, kept))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index('{"images"') :])
    assert report["images"] == 12
    assert sum(report["answers"].values()) == 6, "each chunk once"
    assert report["checked"] == [1, 1], "the bundle is checked once on each node"
    lines = next(kept.iterdir()).read_text().splitlines()
    assert len(lines) == 12
    (single,) = evaluate(EvaluationRequest(**request)).candidates
    (merged,) = evaluate(EvaluationRequest(**request, predictions=kept)).candidates
    assert merged.run.resumed == 12, "nothing was detected again"
    sys.stdout.write(f"AP of one process {single.scores.ap!r}, of the pool {merged.scores.ap!r}\n")
    assert 0.1 < single.scores.ap < 0.9
    assert merged.scores == single.scores
    assert merged.interval == single.interval
