"""What evaluating costs beside the network: the share of the time that is not inference.

    python benchmarks/evaluation_overhead.py [--backend openvino] [--images 40]

Runs ``fcos-deploy evaluate`` on the demo detector and adds up the stages: waiting for images, preprocessing, decoding,
storing, matching and the bootstrap.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from exporters.torch_onnx import export_onnx
from fcos_deploy.accuracy.collect import Target
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
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
            limit=options.images,
            resamples=options.resamples,
        )
        started = time.perf_counter()
        (evaluation,) = evaluate(request).targets
        whole = time.perf_counter() - started
    seconds = evaluation.run.seconds
    print(f"{options.backend}, {evaluation.scores.images} images, {whole:.2f} s in all")
    rows = {
        "inference": seconds.infer,
        "waiting for images": seconds.read,
        "preprocessing": seconds.preprocess,
        "decoding": seconds.decode,
        "bookkeeping of the loop": seconds.total - seconds.infer - seconds.read - seconds.preprocess - seconds.decode,
        "opening, scores, bootstrap": whole - seconds.total,
    }
    for name, value in rows.items():
        print(f"  {name:28s} {value:8.3f} s  {value / whole:6.1%}")
    print(f"  everything but inference, while the images pass: {1 - seconds.infer / seconds.total:.1%}")


if __name__ == "__main__":
    main()
