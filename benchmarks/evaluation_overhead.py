"""What evaluating costs beside the networks: the share of the time that is not inference.

    python benchmarks/evaluation_overhead.py [--images 40] [--threads 2]

Runs what ``fcos-deploy evaluate`` runs, on the demo detector: the checkpoint as the reference, and its ONNX file on
ONNX Runtime and OpenVINO. Loading models is shown, and left out of the share.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from exporters.torch_onnx import export_onnx
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.checkpoints.load import load_checkpoint
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.detector import DetectorSpec

DEMO = Path(__file__).parents[1] / "fcos_deploy" / "demo_data"
CHECKPOINT = DEMO / "fcos_bccd.safetensors"


def main() -> None:
    """Evaluate once and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resamples", type=int, default=1000)
    asked = parser.parse_args()
    options = SessionOptions(threads=asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = export_onnx(load_checkpoint(CHECKPOINT), Path(folder) / "demo.onnx").path
        request = EvaluationRequest(
            candidates=tuple(
                DetectorSpec(model=model, backend=b, options=options) for b in ("onnxruntime", "openvino")
            ),
            reference=DetectorSpec(model=CHECKPOINT, options=options),
            images=DEMO / "evaluation",
            annotations=DEMO / "evaluation.json",
            limit=asked.images,
            resamples=asked.resamples,
        )
        started = time.perf_counter()
        found = evaluate(request)
        whole = time.perf_counter() - started
    runs = [e.run for e in (found.reference, *found.candidates) if e is not None]
    opening, inference = (sum(getattr(run.seconds, part) for run in runs) for part in ("open", "infer"))
    beside = sum(run.seconds.total for run in runs) - inference
    rest = whole - opening - inference - beside
    print(f"{len(runs)} models, {len(found.dataset.images)} images each, {whole:.2f} s, {opening:.2f} s of it loading")
    rows = {"inference": inference, "images beside it": beside, "annotations, AP, bootstrap, matching": rest}
    for name, value in rows.items():
        print(f"  {name:38s} {value:8.3f} s  {value / (whole - opening):6.1%}")
    for run in runs:
        stages = ("read", "preprocess", "infer", "decode")
        parts = ", ".join(f"{stage} {getattr(run.seconds, stage):.2f}" for stage in stages)
        print(f"  {run.subject}: {run.seconds.total:.2f} s by the clock ({parts})")
    print(f"  everything but inference: {1 - inference / (whole - opening):.1%}")


if __name__ == "__main__":
    main()
