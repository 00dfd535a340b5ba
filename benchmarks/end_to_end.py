"""From pixels to detections: fcos-deploy against what one would use instead, on the same weights, image and machine.

    python benchmarks/end_to_end.py --model demo -o end_to_end_demo.md
    python benchmarks/end_to_end.py --model resnet50 --size 640x640 -o end_to_end_resnet50.md

All contestants are timed in turns, a few detections of each in every round, in rotating order; the table has medians
and the ratio to PyTorch eager, which is the median of the ratios of the rounds. What cannot be built or run is a row
with the reason.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import coco_scores
from fcos_deploy.accuracy.dataset import Dataset, label_index, load_coco
from fcos_deploy.benchmark.machine import machine_facts
from fcos_deploy.core.backend import ComputeType, SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.errors import FcosDeployError
from fcos_deploy.core.image_io import list_images, read_image
from fcos_deploy.core.preprocess_spec import InputDtype
from fcos_deploy.core.resized_size import resized_size
from fcos_deploy.detector import Detector

DEMO = Path(__file__).parents[1] / "fcos_deploy" / "demo_data"
Image = NDArray[np.uint8]
Detect = Callable[[Image], Detections]


@dataclass(frozen=True)
class Subject:
    """The network and the images that everybody gets."""

    loaded: Any
    calibration: Path
    images: Path
    annotations: Path | None
    threads: int

    @property
    def contract(self) -> ModelContract:
        """What surrounds the network."""
        return self.loaded.contract

    def options(self, **changes: Any) -> SessionOptions:
        """The same number of threads for all."""
        return SessionOptions(threads=self.threads, **changes)


def demo_subject(threads: int) -> Subject:
    """The trained blood-cell detector, with annotated images."""
    from fcos_deploy.model.checkpoint import load_checkpoint

    loaded = load_checkpoint(DEMO / "fcos_bccd.safetensors")
    return Subject(loaded, DEMO / "calibration", DEMO / "evaluation", DEMO / "evaluation.json", threads)


def resnet50_subject(threads: int, *, size: tuple[int, int], classes: int) -> Subject:
    """A ResNet-50 FCOS with random weights, biased so that a few hundred candidates pass, as on a busy photograph."""
    import torch

    from fcos_deploy.core.network import resnet_config
    from fcos_deploy.model.checkpoint import LoadedCheckpoint
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    config = resnet_config(50, num_classes=classes)
    model = Fcos(config).eval()
    with torch.no_grad():
        model.head.classification_head.cls_logits.weight.normal_(std=0.03)
        model.head.classification_head.cls_logits.bias.fill_(-5.0)
        model.head.regression_head.bbox_reg.bias.fill_(2.0)
    contract = demo_subject(threads).contract
    spec = replace(contract.preprocess, height=size[0], width=size[1])
    names = tuple(f"class{i}" for i in range(classes))
    decode = replace(contract.decode, score_threshold=0.2)
    contract = replace(contract, class_names=names, preprocess=spec, decode=decode)
    return Subject(LoadedCheckpoint(model, contract, config), DEMO / "calibration", DEMO / "evaluation", None, threads)


class PlainHost:
    """The host code of most deployment examples: resize, normalise, transpose, pad; the graph does the rest."""

    def __init__(self, contract: ModelContract, run: Callable[[dict[str, Any]], list[Any]]) -> None:
        self.contract, self.run = contract, run

    def __call__(self, image: Image) -> Detections:
        """Detections of (h, w, 3) uint8 RGB, in its pixels."""
        feeds = self.feeds(image)
        boxes, scores, labels, count = self.run(feeds)
        n = int(count.reshape(-1)[0])
        scale = image.shape[1] / feeds["image_sizes"][0, 1], image.shape[0] / feeds["image_sizes"][0, 0]
        factors = np.array([scale[0], scale[1]] * 2, np.float32)
        return Detections(
            (boxes[0, :n] * factors).astype(np.float32),
            scores[0, :n].astype(np.float32),
            labels[0, :n].astype(np.int64),
        )

    def feeds(self, image: Image) -> dict[str, Any]:
        """Inputs of the plain export."""
        spec = self.contract.preprocess
        height, width = resized_size(*image.shape[:2], spec)
        pixels = cv2.resize(image, (width, height)).astype(np.float32) / spec.pixel_scale
        pixels = (pixels - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
        tensor = np.zeros((1, 3, *spec.canvas), np.float32)
        tensor[0, :, :height, :width] = pixels.transpose(2, 0, 1)
        sizes = np.array([[height, width, image.shape[0], image.shape[1]]], np.float32)
        return {"images": tensor, "image_sizes": sizes}


def plain_export(subject: Subject, folder: Path) -> tuple[Path, ModelContract]:
    """``torch.onnx.export`` with float input, decoding and NMS in the graph, and nothing after it."""
    from exporters.torch_onnx import ExportOptions, export_onnx

    spec = replace(subject.contract.preprocess, input_dtype=InputDtype.FLOAT32)
    contract = subject.contract.with_preprocess(spec)
    path = folder / "plain.onnx"
    if not path.exists():
        export_onnx(
            replace(subject.loaded, contract=contract), path, options=ExportOptions(tail=Tail.NMS, simplify=False)
        )
    return path, contract


def ours_export(subject: Subject, folder: Path) -> Path:
    """What ``fcos-deploy export`` writes."""
    from exporters.torch_onnx import export_onnx

    path = folder / "ours.onnx"
    if not path.exists():
        export_onnx(subject.loaded, path)
    return path


def torch_eager(compute: ComputeType) -> Callable[[Subject, Path], Detect]:
    """With our host code, which flatters it."""

    def build(subject: Subject, _: Path) -> Detect:
        options = subject.options(compute=compute)
        return Detector.of_network(subject.loaded.model, subject.contract, options=options).detect

    return build


def plain_onnxruntime(subject: Subject, folder: Path) -> Detect:
    """ONNX Runtime as its documentation shows it."""
    path, contract = plain_export(subject, folder)
    return PlainHost(contract, _onnxruntime(path, subject.threads))


def static_onnxruntime(subject: Subject, folder: Path) -> Detect:
    """``quantize_static`` as its documentation shows it."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    path, contract = plain_export(subject, folder)
    host = PlainHost(contract, lambda _: [])
    inputs = {i.name for i in __import__("onnxruntime").InferenceSession(str(path)).get_inputs()}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{k: v for k, v in f.items() if k in inputs} for f in _calibration_feeds(subject, host)])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantize_static(str(path), str(folder / "static.onnx"), Reader())
    return PlainHost(contract, _onnxruntime(folder / "static.onnx", subject.threads))


def _onnxruntime(path: Path, threads: int) -> Callable[[dict[str, Any]], list[Any]]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    return lambda feeds: session.run(None, {k: v for k, v in feeds.items() if k in wanted})


def plain_openvino(subject: Subject, folder: Path) -> Detect:
    """OpenVINO's converter and its own default precision: bf16 where the processor has it."""
    import openvino

    path, contract = plain_export(subject, folder)
    return PlainHost(contract, _openvino(openvino.convert_model(str(path)), subject.threads))


def nncf_openvino(subject: Subject, folder: Path) -> Detect:
    """``nncf.quantize`` with its defaults."""
    import nncf
    import openvino

    path, contract = plain_export(subject, folder)
    model = openvino.convert_model(str(path))
    host = PlainHost(contract, lambda _: [])
    wanted = {port.any_name for port in model.inputs}
    feeds = [{k: v for k, v in f.items() if k in wanted} for f in _calibration_feeds(subject, host)]
    return PlainHost(contract, _openvino(nncf.quantize(model, nncf.Dataset(feeds)), subject.threads))


def _openvino(model: Any, threads: int) -> Callable[[dict[str, Any]], list[Any]]:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    wanted = {port.any_name for port in compiled.inputs}

    def run(feeds: dict[str, Any]) -> list[Any]:
        found = compiled({k: v for k, v in feeds.items() if k in wanted})
        return [found[i] for i in range(4)]

    return run


def _calibration_feeds(subject: Subject, host: PlainHost) -> Iterator[dict[str, Any]]:
    return (host.feeds(read_image(path)) for path in list_images(subject.calibration))


def ours(backend: str, precision: Precision) -> Callable[[Subject, Path], Detect]:
    """``fcos-deploy`` on a backend."""

    def build(subject: Subject, folder: Path) -> Detect:
        path = ours_export(subject, folder)
        if precision is Precision.INT8:
            path = _ours_int8(subject, path, folder / f"ours.int8.{backend}.onnx", backend=backend)
        return Detector.open(path, backend=backend, options=subject.options()).detect

    return build


def _ours_int8(subject: Subject, source: Path, output: Path, *, backend: str) -> Path:
    from typer.testing import CliRunner

    from fcos_deploy.cli.app import build_app

    calibration = output.with_name("calibration.json")
    commands = [
        ["calibrate", source, "--images", subject.calibration, "-o", calibration],
        ["quantize", source, "--calibration", calibration, "--for", backend, "-o", output],
    ]
    for command in commands[calibration.exists() :]:
        result = CliRunner().invoke(build_app(), [str(part) for part in command])
        if result.exit_code:
            raise RuntimeError(result.output.strip().splitlines()[-1])
    return output


BASE = "PyTorch eager fp32"
CONTESTANTS: dict[str, Callable[[Subject, Path], Detect]] = {
    BASE: torch_eager(ComputeType.F32),
    "PyTorch eager bf16": torch_eager(ComputeType.BF16),
    "torch.onnx, NMS in the graph, ONNX Runtime": plain_onnxruntime,
    "torch.onnx, NMS in the graph, OpenVINO's defaults": plain_openvino,
    "quantize_static defaults, ONNX Runtime": static_onnxruntime,
    "NNCF defaults, OpenVINO": nncf_openvino,
    "**fcos-deploy fp32, ONNX Runtime**": ours("onnxruntime", Precision.FP32),
    "**fcos-deploy int8, ONNX Runtime**": ours("onnxruntime", Precision.INT8),
    "**fcos-deploy fp32, OpenVINO**": ours("openvino", Precision.FP32),
    "**fcos-deploy int8, OpenVINO**": ours("openvino", Precision.INT8),
}


def build_all(subject: Subject, folder: Path) -> tuple[dict[str, Detect], dict[str, str]]:
    """Whoever can run, and why the others cannot."""
    image = read_image(list_images(subject.images)[0])
    ready, failed = {}, {}
    for name, build in CONTESTANTS.items():
        started = time.perf_counter()
        try:
            detect = build(subject, folder)
            detect(image)
            ready[name] = detect
        except (FcosDeployError, RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
            failed[name] = str(error).strip().splitlines()[0][:120]
        print(f"{name}: {failed.get(name, 'ready')} ({time.perf_counter() - started:.0f} s)", flush=True)
    return ready, failed


def time_all(ready: dict[str, Detect], image: Image, *, rounds: int, block: int) -> dict[str, NDArray[np.float64]]:
    """Milliseconds (rounds, block) of each."""
    times: dict[str, list[list[float]]] = {name: [] for name in ready}
    names = list(ready)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            detect = ready[name]
            detect(image)  # caches and spinning threads are still another contestant's
            row = []
            for _ in range(block):
                started = time.perf_counter()
                detect(image)
                row.append(1000 * (time.perf_counter() - started))
            times[name].append(row)
    return {name: np.array(rows) for name, rows in times.items()}


def accuracy(subject: Subject, detect: Detect, dataset: Dataset) -> float | None:
    """AP on all images of ``dataset``."""
    index = np.append(label_index(subject.contract.class_names, dataset), -1)
    found = {}
    for image in dataset.images:
        one = detect(read_image(image.path))
        found[image.image_id] = Detections(one.boxes, one.scores, index[one.labels])
    return coco_scores(dataset, found).ap


def table(times: dict[str, NDArray[np.float64]], failed: dict[str, str], scores: dict[str, float | None]) -> str:
    """Markdown, a row for every contestant."""
    base = np.median(times[BASE], axis=1)
    lines = ["| | median ms | fastest ms | times PyTorch fp32 | AP |", "|---|---:|---:|---:|---:|"]
    for name in CONTESTANTS:
        if name in failed:
            lines.append(f"| {name} | fails: {failed[name]} | | | |")
            continue
        rows = times[name]
        ratio = float(np.median(base / np.median(rows, axis=1)))
        ap = scores.get(name)
        lines.append(
            f"| {name} | {np.median(rows):.1f} | {rows.min():.1f} | {ratio:.2f} | {'' if ap is None else f'{ap:.3f}'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse, build, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "resnet50"), default="demo")
    parser.add_argument("--size", default="640x640", help="of resnet50, height x width")
    parser.add_argument("--classes", type=int, default=80, help="of resnet50")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--images", type=int, default=None, help="evaluate on the first images only; 0 for none")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    height, width = (int(v) for v in options.size.split("x"))
    if options.model == "demo":
        subject = demo_subject(options.threads)
    else:
        subject = resnet50_subject(options.threads, size=(height, width), classes=options.classes)
    scores: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        ready, failed = build_all(subject, Path(folder))
        image = read_image(list_images(subject.images)[0])
        times = time_all(ready, image, rounds=options.rounds, block=options.block)
        if subject.annotations is not None and options.images != 0:
            dataset = load_coco(subject.annotations, images=subject.images).first(options.images)
            scores = {name: accuracy(subject, detect, dataset) for name, detect in ready.items()}
    facts = machine_facts()
    head = (
        f"{options.model}, input {'x'.join(map(str, subject.contract.preprocess.canvas or ()))}, {facts.processor}, "
        f"{options.threads} threads, {options.rounds} rounds in turns, load {facts.load}\n\n"
    )
    text = head + table(times, failed, scores)
    with suppress(OSError):
        options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
