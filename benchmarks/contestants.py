"""The contestants of ``end_to_end.py``: how each is built from the same weights, and how it detects.

What takes long to build (exports, calibrated and quantized graphs) is kept in a folder and found there again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ComputeType, Precision, Tail
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.preprocess import InputDtype, resized_size
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
    calibrated_on: int

    @property
    def contract(self) -> ModelContract:
        """What surrounds the network."""
        return self.loaded.contract

    def options(self, **changes: Any) -> SessionOptions:
        """The same number of threads for all."""
        return SessionOptions(threads=self.threads, **changes)


def demo_subject(threads: int) -> Subject:
    """The trained blood-cell detector, with annotated images."""
    from fcos_deploy.checkpoints.load import load_checkpoint

    loaded = load_checkpoint(DEMO / "fcos_bccd.safetensors")
    return Subject(loaded, DEMO / "calibration", DEMO / "evaluation", DEMO / "evaluation.json", threads, 40)


def resnet_subject(threads: int, *, size: tuple[int, int], classes: int, depth: int = 50) -> Subject:
    """A ResNet FCOS with random weights, biased so that a few hundred candidates pass, as on a busy photograph."""
    import torch

    from fcos_deploy.checkpoints.load import LoadedCheckpoint
    from fcos_deploy.core.network import resnet_config
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    config = resnet_config(depth, num_classes=classes)
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
    loaded = LoadedCheckpoint(model, contract)
    return Subject(loaded, DEMO / "calibration", DEMO / "evaluation", None, threads, 8)


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
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    path, contract = plain_export(subject, folder)
    host = PlainHost(contract, lambda _: [])
    inputs = {i.name for i in onnxruntime.InferenceSession(str(path)).get_inputs()}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({k: v for k, v in f.items() if k in inputs} for f in _calibration_feeds(subject, host))

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantized = folder / "static.onnx"
    if not quantized.exists():
        with atomic_file(quantized) as temporary:
            quantize_static(str(path), str(temporary), Reader())
    return PlainHost(contract, _onnxruntime(quantized, subject.threads))


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
    import openvino

    path, contract = plain_export(subject, folder)
    quantized, finished = folder / "nncf.xml", folder / "nncf.finished"
    if not finished.exists():
        import nncf

        model = openvino.convert_model(str(path))
        host = PlainHost(contract, lambda _: [])
        wanted = {port.any_name for port in model.inputs}
        feeds = [{k: v for k, v in f.items() if k in wanted} for f in _calibration_feeds(subject, host)]
        openvino.save_model(nncf.quantize(model, nncf.Dataset(feeds)), str(quantized), compress_to_fp16=False)
        finished.touch()
    return PlainHost(contract, _openvino(str(quantized), subject.threads))


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
    images = list_images(subject.calibration)[: subject.calibrated_on]
    return (host.feeds(read_image(path)) for path in images)


def ours(backend: str, precision: Precision) -> Callable[[Subject, Path], Detect]:
    """``fcos-deploy`` on a backend."""

    def build(subject: Subject, folder: Path) -> Detect:
        path = ours_export(subject, folder)
        if precision is Precision.INT8:
            path = _ours_int8(subject, path, folder / f"ours.int8.{backend}.onnx", backend=backend)
        return Detector.open(path, backend=backend, options=subject.options()).detect

    return build


def _ours_int8(subject: Subject, source: Path, output: Path, *, backend: str) -> Path:
    calibration = output.with_name("calibration.json")
    if not calibration.exists():
        images = ["--images", subject.calibration, "--count", subject.calibrated_on]
        _command("calibrate", source, *images, "-o", calibration)
    if not output.exists():
        _command("quantize", source, "--calibration", calibration, "--for", backend, "-o", output)
    return output


def _command(*words: Any) -> None:
    from typer.testing import CliRunner

    from fcos_deploy.cli.app import build_app

    result = CliRunner().invoke(build_app(), [str(word) for word in words])
    if result.exit_code:
        raise RuntimeError(result.output.strip().splitlines()[-1])


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
