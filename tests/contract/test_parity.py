"""Every backend gives torchvision's own detections, from the pictures on."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy import Detections, Detector, SessionOptions
from fcos_deploy.core.backend import get_backend

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a ResNet-50 is exported

_LOGGER = logging.getLogger(__name__)
_NAME = "torchvision_fcos_resnet50_fpn_91"
_TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference(golden_dir: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((golden_dir / f"{_NAME}.json").read_text())
    return document


@pytest.fixture(scope="module")
def models(reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Detector]]:
    """Detectors by backend: the checkpoint in torchvision's own keys, and the ONNX file made of it."""
    from exporters.torch_onnx import export_onnx
    from fcos_deploy.checkpoints.load import CheckpointOptions, load_checkpoint

    folder, meta = tmp_path_factory.mktemp("parity"), reference["meta"]
    path = folder / "torchvision.pth"
    torch.save({name: torch.from_numpy(_fill(name, shape)) for name, shape in reference["state_dict"].items()}, path)
    options = CheckpointOptions(
        shortest=meta["min_size"],
        longest=meta["max_size"],
        score_threshold=meta["score_thresh"],
        iou_threshold=meta["nms_thresh"],
        max_detections=meta["detections_per_img"],
        pre_nms_top_k=meta["topk_candidates"],
    )
    loaded = load_checkpoint(path, options=options)
    onnx = export_onnx(loaded, folder / "torchvision.onnx").path
    one = SessionOptions(threads=1)
    return {
        "pytorch": lambda: Detector.of_network(loaded.model, loaded.contract, options=one),
        "onnxruntime": lambda: Detector.open(onnx, backend="onnxruntime", options=one),
        "openvino": lambda: Detector.open(onnx, backend="openvino", options=one),
    }


def _fill(name: str, shape: list[int]) -> NDArray[Any]:
    spec = importlib.util.spec_from_file_location("fill_weights", _TESTS / "golden" / "_fill_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return np.asarray(module.fill(name, tuple(shape)))


# The golden data's own tolerances; convolutions that sum in another order move scores and boxes by a little more.
@pytest.mark.parametrize(
    ("backend", "score", "pixels"), [("pytorch", 1e-5, 1e-2), ("onnxruntime", 2e-5, 1e-2), ("openvino", 2e-5, 1e-2)]
)
def test_final_detections_are_torchvisions(
    models: dict[str, Callable[[], Detector]],
    reference: dict[str, Any],
    golden_dir: Path,
    backend: str,
    score: float,
    pixels: float,
) -> None:
    if not get_backend(backend).probe().available:
        pytest.skip(f"{backend} is not installed")
    golden = np.load(golden_dir / f"{_NAME}.npz")
    with models[backend]() as detector:
        for index, image in enumerate(reference["images"]):
            found = detector.detect(golden_dir / "images" / image)
            expected = Detections(*(golden[f"det{index}_{part}"] for part in ("boxes", "scores", "labels")))
            assert len(found) == len(expected)
            worst_score, worst_pixels = _largest_differences(found, expected)
            _LOGGER.info("%s, %s: score %.2g, box %.2g px", backend, image, worst_score, worst_pixels)
            assert worst_score <= score
            assert worst_pixels <= pixels


def _largest_differences(found: Detections, expected: Detections) -> tuple[float, float]:
    """Of scores and of box edges in pixels, each detection with the nearest unused one of its label."""
    unused = set(range(len(found)))
    scores, edges = [], []
    for box, value, label in zip(expected.boxes, expected.scores, expected.labels, strict=True):
        same = [index for index in unused if found.labels[index] == label]
        assert same, f"no detection of label {label} is left"
        nearest = min(same, key=lambda index: float(np.abs(found.boxes[index] - box).max()))
        unused.remove(nearest)
        scores.append(abs(float(found.scores[nearest] - value)))
        edges.append(float(np.abs(found.boxes[nearest] - box).max()))
    return max(scores), max(edges)
