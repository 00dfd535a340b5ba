"""Where the noise of an INT8 graph comes from: rounded weights alone, rounded activations alone, and both.

    python benchmarks/int8_noise.py MODEL.onnx INT8.onnx [INT8.onnx ...] --images DIR

Signal-to-noise ratio of the raw outputs in dB against the float graph MODEL. Both run in float arithmetic, without a
runtime's own fusions, so that saturation has no part in it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from calibration.dataset import SampleOptions, collect_images
from calibration.execution import Feeder
from exporters.step_check import Runner, onnx_runner
from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.backend import Tensors


def without_activation_pairs(model: Any) -> Any:
    """``model`` (onnx.ModelProto) with rounded weights and biases only: what flows is not rounded."""
    result = copy.deepcopy(model)
    constants = {item.name for item in result.graph.initializer}
    source = {n.output[0]: n.input[0] for n in result.graph.node if n.op_type == "QuantizeLinear"}
    restored = {
        node.output[0]: source[node.input[0]]
        for node in result.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants
    }
    for node in result.graph.node:
        node.input[:] = [restored.get(name, name) for name in node.input]
    kept = [n for n in result.graph.node if n.output[0] not in restored and n.output[0] not in source]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def without_weight_rounding(model: Any, float_model: Any) -> Any:
    """``model`` with the weights and biases of ``float_model``: only what flows is rounded."""
    result = copy.deepcopy(model)
    convs = {node.name: node for node in float_model.graph.node if node.op_type == "Conv"}
    wanted = set()
    for node in result.graph.node:
        if node.op_type == "Conv":
            node.input[1:] = convs[node.name].input[1:]
            wanted.update(node.input[1:])
    known = {item.name for item in result.graph.initializer}
    weights = [item for item in float_model.graph.initializer if item.name in wanted]
    for item in result.graph.initializer:  # a corrected bias has the name of its source
        item.CopyFrom(next((w for w in weights if w.name == item.name), item))
    result.graph.initializer.extend(w for w in weights if w.name not in known)
    return result


def noise(reference: Runner, run: Runner, feeds: list[Tensors]) -> str:
    """Signal-to-noise ratio of every output in dB."""
    signal: dict[str, float] = {}
    error: dict[str, float] = {}
    for feed in feeds:
        wanted, got = reference(feed), run(feed)
        for name, values in wanted.items():
            signal[name] = signal.get(name, 0.0) + float(np.square(values, dtype=np.float64).sum())
            error[name] = error.get(name, 0.0) + float(np.square(got[name].astype(np.float64) - values).sum())
    return " / ".join(f"{10 * np.log10(signal[name] / error[name]):.1f}" for name in signal)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("quantized", type=Path, nargs="+")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    graph = OnnxGraph(options.model)
    feeder = Feeder(graph)
    images = collect_images(options.images, options=SampleOptions(count=options.count, minimum=1)).images
    feeds = [feeder(image.read()) for image in images]
    reference = onnx_runner(graph.model)
    print("| graph | weights alone | activations alone | both |\n|---|---|---|---|")
    for path in options.quantized:
        both = onnx.load(path)
        forms = (without_activation_pairs(both), without_weight_rounding(both, graph.model), both)
        print(
            f"| {path.name} | " + " | ".join(noise(reference, onnx_runner(m), feeds) for m in forms) + " |", flush=True
        )


if __name__ == "__main__":
    main()
