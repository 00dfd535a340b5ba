"""Networks and configurations that are not the libraries' defaults give the detections of the libraries.

Each file of references holds, for each case, the mean magnitude of each level's head outputs and the final detections
of the library's own preprocessing, network and decoding (mmdetection 3.3.0, torchvision 0.28.0, detectron2 at
02b5c4e2, AdelaiDet at 3672122), with the weights of ``_fill_weights.py``. Their compiled suppression was replaced by
greedy suppression in Python.
"""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporters.torch_onnx import export_onnx
from fcos_deploy.checkpoints.load import CheckpointOptions, LoadedCheckpoint, load_checkpoint
from fcos_deploy.core.detections import Detections, image_sizes_row, postprocess
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, preprocess
from fcos_deploy.detector import Detector
from fcos_deploy.model.tails import ExportableFcos, StaticNms

DATA = Path(__file__).parents[1] / "data"
REFERENCES = {
    "mmdetection": json.loads((DATA / "mmdetection" / "configurations.json").read_text()),
    "torchvision": json.loads((DATA / "torchvision" / "recipes.json").read_text()),
    "detectron2": json.loads((DATA / "detectron2" / "recipes.json").read_text()),
    "adelaidet": json.loads((DATA / "adelaidet" / "recipes.json").read_text()),
}
CASES = [(library, name) for library, references in REFERENCES.items() for name in references["cases"]]
ABSENT = "<absent>"


def configuration(name: str) -> dict[str, Any]:
    """mmdetection's configuration of a reference: the base, and its changes by dotted path."""
    references = REFERENCES["mmdetection"]
    config: dict[str, Any] = copy.deepcopy(ast.literal_eval(references["base"]))
    for path, value in ast.literal_eval(references["cases"][name]["changes"]).items():
        *parents, last = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section.pop(last, None)
        if value != ABSENT:
            section[last] = value
    return config


@pytest.fixture
def load(tmp_path: Path, fill_weights: ModuleType) -> Callable[[str, str], LoadedCheckpoint]:
    """Loads a file as the library writes it: mmdetection with its configuration as text, torchvision weights alone."""

    def load(library: str, name: str) -> LoadedCheckpoint:
        case = REFERENCES[library]["cases"][name]
        shapes = REFERENCES[library]["networks"][case["network"]]
        weights = {key: torch.as_tensor(fill_weights.fill(key, tuple(shape))) for key, shape in shapes.items()}
        said: dict[str, Any] = {key: _as_option(key, value) for key, value in case.get("options", {}).items()}
        content: dict[str, Any] = weights
        if library == "mmdetection":
            text = "\n".join(f"{key} = {value!r}" for key, value in configuration(name).items())
            content = {"meta": {"cfg": text}, "state_dict": weights}
        else:
            threshold = {"torchvision": 0.1, "detectron2": 0.3, "adelaidet": 0.05}[library]
            said = {"shortest": 192, "longest": 256, "score_threshold": threshold, "max_detections": 60, **said}
        torch.save(content, tmp_path / "model.pth")
        options = CheckpointOptions(input_dtype=InputDtype.FLOAT32, **said)
        return load_checkpoint(tmp_path / "model.pth", options=options)

    return load


def _as_option(name: str, value: Any) -> Any:
    if name == "channel_order":
        return ChannelOrder(value)
    return tuple(value) if isinstance(value, list) else value


def _image() -> NDArray[np.uint8]:
    """(190, 250, 3) RGB: waves and noise, as the references have it."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:190, :250].astype(np.float64)
    planes = [127 + 60 * np.sin(x / (9 + 5 * k) + y / (17 + 3 * k)) + 50 * np.cos(y / (7 + 4 * k)) for k in range(3)]
    noisy = np.stack(planes, -1) + rng.integers(-12, 13, (190, 250, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _image_of(case: dict[str, Any]) -> NDArray[np.uint8]:
    """Its green as gray, where the library was given that."""
    return np.repeat(_image()[:, :, 1:2], 3, 2) if case.get("image") == "green" else _image()


def _detect(loaded: LoadedCheckpoint, tail: Tail, image: NDArray[np.uint8]) -> Detections:
    """Through the tail as PyTorch runs it: the nms tail with the static suppression."""
    contract = loaded.contract
    pixels, letterbox = preprocess(image, contract.preprocess)
    contract = replace(contract, tail=tail)
    graph = ExportableFcos(loaded.model, contract, suppression=StaticNms(boxes=2000, rounds=40))
    sizes = torch.from_numpy(image_sizes_row(letterbox))[None] if contract.needs_image_sizes else None
    with torch.inference_mode():
        arrays = [tensor.numpy() for tensor in graph(torch.from_numpy(pixels)[None], sizes)]
    outputs = dict(zip(graph.output_names, arrays, strict=True))
    return postprocess(outputs, contract, index=0, input_size=pixels.shape[1:], letterbox=letterbox)


def _assert_same(detections: Detections, case: dict[str, Any]) -> None:
    assert detections.labels.tolist() == case["labels"]
    np.testing.assert_allclose(detections.scores, case["scores"], atol=2e-6)
    np.testing.assert_allclose(detections.boxes, case["boxes"], atol=2e-3)


@pytest.mark.parametrize(("library", "name"), CASES)
def test_detections_are_those_of_the_library(
    library: str, name: str, load: Callable[[str, str], LoadedCheckpoint]
) -> None:
    case = REFERENCES[library]["cases"][name]
    loaded = load(library, name)
    pixels, _ = preprocess(_image_of(case), loaded.contract.preprocess)
    with torch.inference_mode():
        levels = loaded.model(torch.from_numpy(pixels)[None])
    means = [[float(tensor.abs().double().mean()) for tensor in level] for level in levels]
    np.testing.assert_allclose(means, case["levels"], rtol=1e-5)  # P6 and P7 have few of the best detections.
    _assert_same(_detect(loaded, Tail.RAW, _image_of(case)), case)


@pytest.mark.parametrize("tail", [Tail.CANDIDATES, Tail.NMS])
@pytest.mark.parametrize(
    "name", ["class-agnostic", "min-bbox-size", "min-bbox-size-absent", "no-clip", "pad-larger", "nms-pre-20"]
)
def test_every_tail_follows_the_configuration(
    name: str, tail: Tail, load: Callable[[str, str], LoadedCheckpoint]
) -> None:
    _assert_same(_detect(load("mmdetection", name), tail, _image()), REFERENCES["mmdetection"]["cases"][name])


@pytest.mark.parametrize(
    ("library", "name"), [("mmdetection", "bilinear"), ("mmdetection", "divisor-1"), ("torchvision", "pooled-p2-p6")]
)
def test_an_exported_graph_of_open_size_gives_them_too(
    library: str, name: str, load: Callable[[str, str], LoadedCheckpoint], tmp_path: Path
) -> None:
    pytest.importorskip("onnx")
    export_onnx(load(library, name), tmp_path / "model.onnx")
    with Detector.open(tmp_path / "model.onnx", backend="onnxruntime") as detector:
        _assert_same(detector.detect(_image()), REFERENCES[library]["cases"][name])
