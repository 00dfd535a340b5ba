"""What evaluating costs beside the network: the share of the time that is not inference.

    python benchmarks/evaluation_overhead.py [--backend openvino] [--images 40]

Runs what ``fcos-deploy evaluate`` runs on the demo detector: opening it, reading, preprocessing, the network, decoding,
storing, AP and the bootstrap. The sizes of images, model and annotations are the demo's own.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from exporters.torch_onnx import export_onnx
from fcos_deploy.accuracy.collect import Target, collect_detections
from fcos_deploy.accuracy.dataset import load_coco
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate_run
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.model.checkpoint import load_checkpoint

DEMO = Path(__file__).parents[1] / "fcos_deploy" / "demo_data"


def main() -> None:
    """Evaluate once and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo.onnx"
        export_onnx(load_checkpoint(DEMO / "fcos_bccd.safetensors"), model)
        target = Target(model=model, backend=options.backend, options=SessionOptions(threads=options.threads))
        request = EvaluationRequest(
            targets=(target,),
            images=DEMO / "evaluation",
            annotations=DEMO / "evaluation.json",
            resamples=options.resamples,
        )
        marks = [time.perf_counter()]
        dataset = load_coco(DEMO / "evaluation.json", images=DEMO / "evaluation").first(options.images)
        marks.append(time.perf_counter())
        run = collect_detections(target, dataset.images)
        marks.append(time.perf_counter())
        evaluate_run(dataset, run, request=request)
        marks.append(time.perf_counter())
    annotations, collecting, scoring = (b - a for a, b in itertools.pairwise(marks))
    seconds = run.seconds
    opening, whole = collecting - seconds.total, marks[-1] - marks[0]
    rows = {
        "inference": seconds.infer,
        "images beside it (read, prepare, decode, store)": seconds.total - seconds.infer,
        "annotations, AP and bootstrap": annotations + scoring,
        "importing and compiling the model": opening,
    }
    print(f"{options.backend}, {len(dataset.images)} images, {whole:.2f} s in all")
    for name, value in rows.items():
        print(f"  {name:48s} {value:8.3f} s  {value / whole:6.1%}")
    hidden = {"read": seconds.read, "preprocess": seconds.preprocess, "decode": seconds.decode}
    print("  in threads meanwhile: " + ", ".join(f"{name} {value:.3f} s" for name, value in hidden.items()))
    running = whole - opening
    print(f"  everything but inference, once the model is loaded: {1 - seconds.infer / running:.1%}")


if __name__ == "__main__":
    main()
