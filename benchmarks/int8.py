"""INT8 by every range method and placement: average precision, share executed in INT8, latency.

    python benchmarks/int8.py MODEL.onnx --train DIR --train-annotations FILE --images DIR --annotations FILE -o OUT.md

Writes a Markdown table, and beside it the figures as JSON. A killed run continues. Latencies are medians of interleaved
runs, so that other work on the machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.calibrate import StatisticsOptions, collect_ranges, load_calibration, save_calibration
from calibration.dataset import SampleOptions, collect_images
from calibration.execution import Feeder, executed_share, open_engine
from calibration.placement import PLACEMENTS, open_graph
from calibration.quantizers import NncfOptions, quantize_nncf, quantize_qdq
from calibration.ranges import RangeMethod
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.detector import DetectorSpec

# Which runtimes a placement is measured on: those that execute it in INT8.
RUNS_ON = {"portable": ("openvino",), "onnxruntime-cpu": ("onnxruntime",), "openvino": ("openvino",)}


@dataclass(frozen=True)
class Variant:
    """A model file, the runtime it is measured on, and how it was made."""

    path: Path
    backend: str
    placement: str
    method: str

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.placement} {self.method} {self.backend}"


def main() -> None:
    """Measure what is not measured yet, then write the table."""
    options = _arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    variants = make_variants(options)
    for variant in variants:
        if variant.key not in results:
            results[variant.key] = measure(variant, options)
            options.results.write_text(json.dumps(results, indent=1))
            print(variant.key, results[variant.key], flush=True)
    for key, latency in latencies(variants, options).items():
        results[key]["latency_ms"] = latency
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    options.output.write_text(markdown(variants, results, options))
    print(options.output.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name in ("--train", "--images", "--annotations"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--train-annotations", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and detections")
    parser.add_argument("--methods", nargs="+", default=[str(method) for method in RangeMethod])
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    options.results = options.work / "results.json"
    return options


def make_variants(options: argparse.Namespace) -> list[Variant]:
    """The float model, every method in every placement, and NNCF in our and its own settings."""
    graph, sample = open_graph(options.model), SampleOptions(count=options.count)
    images = collect_images(options.train, annotations=options.train_annotations, options=sample)
    file = options.work / "calibration.json"
    if not file.is_file():
        settings = StatisticsOptions(threads=options.threads)
        save_calibration(collect_ranges(graph, images, options=settings, state=file.with_suffix(".npz")), file)
    calibration = load_calibration(file)
    variants = [Variant(options.model, name, "float", "fp32") for name in ("onnxruntime", "openvino")]
    for name, placement in PLACEMENTS.items():
        for method in map(RangeMethod, options.methods):
            path = options.work / f"{name}.{method}.onnx"
            if not path.is_file():
                quantize_qdq(graph, calibration.with_method(method), path, placement=placement)
            variants += [Variant(path, runtime, name, str(method)) for runtime in RUNS_ON[name]]
    for name, nncf_options in NNCF_SETTINGS.items():
        path = options.work / f"nncf.{name}.xml"
        if not path.is_file():
            quantize_nncf(graph.source, images, path, options=nncf_options)
        variants.append(Variant(path, "openvino", "nncf", name))
    return variants


NNCF_SETTINGS = {
    "minmax": NncfOptions(),
    "minmax, full weights": NncfOptions(overflow_fix="disable"),
    "minmax, bias correction": NncfOptions(bias_correction=True),
}


def measure(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """AP on all evaluation images, executed share, signal-to-noise of the raw outputs."""
    candidate = DetectorSpec(
        model=variant.path, backend=variant.backend, options=SessionOptions(threads=options.threads)
    )
    request = EvaluationRequest(
        candidates=(candidate,),
        images=options.images,
        annotations=options.annotations,
        resamples=0,
        predictions=options.work,
    )
    scores = evaluate(request).candidates[0].scores
    found: dict[str, Any] = {"ap": scores.ap, "ap50": scores.ap50, "ap75": scores.ap75}
    if variant.placement != "float":
        found["int8_share"] = executed_share(open_graph(options.model), variant.path, variant.backend).share
        found["sqnr_db"] = noise(variant, options)
    return found


def noise(variant: Variant, options: argparse.Namespace) -> dict[str, float]:
    """Of the runtime's own INT8 arithmetic against the float graph, on four evaluation images."""
    source = OnnxGraph(options.model)
    feeder, contract = Feeder(source), source.contract
    reference = open_engine("onnxruntime", source.model, threads=options.threads)
    signal, error = dict.fromkeys(contract.outputs, 0.0), dict.fromkeys(contract.outputs, 0.0)
    images = collect_images(options.images, options=SampleOptions(count=4, minimum=1)).images
    with get_backend(variant.backend).open(variant.path, SessionOptions(threads=options.threads)) as session:
        for image in images:
            feeds = feeder(image.read())
            wanted, got = reference.run(feeds), session.run(feeds)
            for name in contract.outputs:
                signal[name] += float(np.square(wanted[name], dtype=np.float64).sum())
                error[name] += float(np.square(got[name].astype(np.float64) - wanted[name]).sum())
    return {name: round(10 * np.log10(signal[name] / error[name]), 1) for name in contract.outputs}


def latencies(variants: list[Variant], options: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of one inference for the float models and the default method's, interleaved."""
    chosen = [v for v in variants if v.placement in {"float", "nncf"} or v.method == "percentile"]
    picture = collect_images(options.images, options=SampleOptions(count=1, minimum=1)).images[0]
    feeds = Feeder(OnnxGraph(options.model))(picture.read())
    sessions = {v.key: get_backend(v.backend).open(v.path, SessionOptions(threads=options.threads)) for v in chosen}
    times: dict[str, list[float]] = {key: [] for key in sessions}
    for round_number in range(options.rounds + 2):
        for key, session in sessions.items():
            start = time.perf_counter()
            session.run(feeds)
            if round_number >= 2:
                times[key].append((time.perf_counter() - start) * 1e3)
    return {key: round(float(np.median(values)), 2) for key, values in times.items()}


def markdown(variants: list[Variant], results: dict[str, Any], options: argparse.Namespace) -> str:
    """The table, with the machine it was measured on."""
    lines = [
        f"{options.count} calibration images, {options.threads} threads, {_processor()}.",
        "",
        "| placement | ranges | runtime | AP | AP50 | AP75 | drop, points | in INT8 | SQNR cls / box / ctr, dB | ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in variants:
        found = results[variant.key]
        base = results[f"float fp32 {variant.backend}"]["ap"]
        share = f"{found['int8_share']:.1%}" if "int8_share" in found else ""
        ratios = " / ".join(f"{v:.1f}" for v in found.get("sqnr_db", {}).values())
        aps = " | ".join(f"{100 * found[name]:.2f}" for name in ("ap", "ap50", "ap75"))
        drop = f"{100 * (base - found['ap']):+.2f}" if variant.placement != "float" else ""
        cells = [variant.placement, variant.method, variant.backend, aps, drop, share, ratios]
        lines.append("| " + " | ".join([*cells, str(found.get("latency_ms", ""))]) + " |")
    return "\n".join(lines) + "\n"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if name in flags.split()]
    return f"{names[0] if names else platform.processor()} ({', '.join(known)})"


if __name__ == "__main__":
    main()
