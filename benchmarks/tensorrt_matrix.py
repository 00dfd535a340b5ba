"""Every kind of graph as a TensorRT-RTX engine for three generations of GPUs, built without one.

    python benchmarks/tensorrt_matrix.py > table.md

The bundled demo detector and a ResNet-50 FCOS of random weights, at 128x160: each tail (nms in its static form), fp32,
fp16 and Q/DQ int8 (ranges of eight images), fixed and open batch, for SM86, SM89 and SM120. Prints a table, and fails
if the engines for the three GPUs take other types, or convolutions of an int8 engine take anything but int8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from calibration.calibrate import collect_ranges
from calibration.dataset import SampleOptions, collect_images
from calibration.placement import open_graph, placement_for
from calibration.quantizers import quantize_qdq
from exporters.rewrite import convert_to_fp16
from exporters.torch_onnx import ExportOptions, export_onnx
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import NmsForm, Precision, Tail
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, SizeRange, get_exporter
from fcos_deploy.core.network import resnet_config

DEMO = Path(__file__).parents[1] / "fcos_deploy/demo_data"
CAPABILITIES = ("8.6", "8.9", "12.0")
SIZE = (128, 160)
OPEN_BATCH = SizeRange(1, 2, 4)


@dataclass(frozen=True)
class Detector:
    """What ``export_onnx`` takes."""

    model: Any  # torch.nn.Module
    contract: ModelContract


def demo() -> Detector:
    """The bundled checkpoint."""
    from fcos_deploy.checkpoints.load import load_checkpoint

    loaded = load_checkpoint(DEMO / "fcos_bccd.safetensors", options=CheckpointOptions(input_size=SIZE))
    return Detector(loaded.model, loaded.contract)


def resnet50() -> Detector:
    """Random weights: which kernels an engine has does not depend on them."""
    import torch

    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    contract = demo().contract
    return Detector(Fcos(resnet_config(50, num_classes=len(contract.class_names))).eval(), contract)


DETECTORS: dict[str, Callable[[], Detector]] = {"demo": demo, "ResNet-50": resnet50}


def graphs(detector: Detector, folder: Path, *, tail: Tail, batch: int | None) -> Iterator[tuple[Precision, Path]]:
    """The fp32 graph, and what is made of it."""
    source = folder / "fp32.onnx"
    options = ExportOptions(tail=tail, batch=batch, nms_form=NmsForm.STATIC, nms_boxes=200)
    export_onnx(detector, source, options=options)
    yield Precision.FP32, source
    yield Precision.FP16, convert_to_fp16(source, folder / "fp16.onnx").path
    graph, placement = open_graph(source), placement_for("tensorrt-rtx")
    ranges = collect_ranges(graph, collect_images(DEMO / "calibration", options=SampleOptions(count=8)))
    yield Precision.INT8, quantize_qdq(graph, ranges, folder / "int8.onnx", placement=placement).path


def build(source: Path, folder: Path, *, capability: str, batch: SizeRange) -> dict[str, str]:
    """The record of one build."""
    options = BuildOptions(compute_capabilities=(capability,), batch=batch)
    request = BuildRequest(source=source, output=folder / f"{source.stem}.engine", options=options)
    return dict(get_exporter("tensorrt-rtx").build(request).record)


def row(name: str, tail: Tail, precision: Precision, records: list[dict[str, str]], *, batch: str) -> str:
    """One line of the table, after the check that the three engines compute in the same types."""
    types = {record["convolution_inputs"] for record in records}
    counts: dict[str, int] = json.loads(types.pop())
    if types or (precision is Precision.INT8 and set(counts) != {"Int8"}):
        sys.exit(f"{name} {tail} {precision}: convolutions take {[r['convolution_inputs'] for r in records]}")
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    seconds = statistics.median(float(record["seconds"]) for record in records)
    size = statistics.median(int(record["engine_bytes"]) for record in records) / 1e6
    return f"| {name} | {tail} | {precision} | {batch} | {words} | {seconds:.1f} | {size:.1f} |"


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", action="append", choices=sorted(DETECTORS), help="may be repeated; without: both")
    parser.add_argument("--fixed", action="store_true", help="only the fixed batch")
    arguments = parser.parse_args()
    chosen, batches = arguments.detector or list(DETECTORS), (1,) if arguments.fixed else (1, None)
    print("| detector | tail | precision | batch | inputs of convolutions | build s | engine MB |")
    print("|---|---|---|---|---|---|---|")
    for name, tail, batch in product(chosen, Tail, batches):
        limits = OPEN_BATCH if batch is None else SizeRange()
        words = "1 to 4" if batch is None else "1"
        with tempfile.TemporaryDirectory() as folder:
            for precision, source in graphs(DETECTORS[name](), Path(folder), tail=tail, batch=batch):
                records = [build(source, Path(folder), capability=c, batch=limits) for c in CAPABILITIES]
                print(row(name, tail, precision, records, batch=words), flush=True)


if __name__ == "__main__":
    main()
