"""Where OpenVINO spends its time: milliseconds by kind of layer and kernel, of several models in turns.

    python benchmarks/openvino_layers.py A.xml B.onnx --rounds 5

From OpenVINO's own profile of the network alone, on noise: medians of the rounds, the first not counted.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino

SHOWN = 8  # kinds of layers


def feeds(model: Any) -> dict[str, np.ndarray]:
    """Noise for every input; what is no picture is the size of the first that is, twice."""
    generator = np.random.default_rng(0)
    inputs = {port.any_name: (port.shape, port.element_type.to_dtype()) for port in model.inputs}
    height, width = next(shape[2:] for shape, _ in inputs.values() if len(shape) == 4)
    sizes = np.array([[height, width, height, width]])
    return {
        name: (generator.random(shape) * (255 if kind == np.uint8 else 1)).astype(kind)
        if len(shape) == 4
        else sizes.astype(kind)
        for name, (shape, kind) in inputs.items()
    }


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    models = [core.compile_model(str(path), "CPU", settings) for path in options.models]
    requests = [(model.create_infer_request(), feeds(model)) for model in models]
    whole: list[list[float]] = [[] for _ in models]
    kinds: list[list[Counter[str]]] = [[] for _ in models]
    for turn in range(options.rounds + 1):
        for index, (request, feed) in enumerate(requests):
            started = time.perf_counter()
            request.infer(feed)
            taken = 1000 * (time.perf_counter() - started)
            if turn:
                whole[index].append(taken)
                kinds[index].append(by_kind(request))
    for path, times, counted in zip(options.models, whole, kinds, strict=True):
        print(f"\n| {path.name}: {np.median(times):.0f} ms | ms |\n|---|---:|")
        medians = {kind: float(np.median([one[kind] for one in counted])) for kind in counted[0]}
        for kind, value in sorted(medians.items(), key=lambda item: -item[1])[:SHOWN]:
            print(f"| {kind} | {value:.1f} |")


def by_kind(request: Any) -> Counter[str]:
    """Milliseconds of the last inference."""
    found: Counter[str] = Counter()
    for layer in request.profiling_info:
        found[f"{layer.node_type} {layer.exec_type}"] += 1000 * layer.real_time.total_seconds()
    return found


if __name__ == "__main__":
    main()
