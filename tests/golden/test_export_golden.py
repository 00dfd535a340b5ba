"""Exported graphs in ONNX Runtime give the detections of the original libraries, each ecosystem with each tail."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from exporters.onnx_file import load_onnx  # noqa: E402
from exporters.step_check import onnx_runner  # noqa: E402
from exporters.torch_onnx import ExportOptions, export_onnx  # noqa: E402
from fcos_deploy.core.decode_spec import BoxFilter  # noqa: E402
from fcos_deploy.core.detections import Detections  # noqa: E402
from fcos_deploy.core.enums import Tail  # noqa: E402
from fcos_deploy.core.image_io import read_image  # noqa: E402
from fcos_deploy.core.postprocess import image_sizes_row, postprocess  # noqa: E402
from fcos_deploy.core.preprocess import Letterbox, preprocess  # noqa: E402
from fcos_deploy.core.preprocess_spec import InputDtype  # noqa: E402
from fcos_deploy.model.checkpoint import CheckpointOptions, LoadedCheckpoint, load_checkpoint  # noqa: E402

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))
SCORE, PIXELS = 1e-3, 0.1  # what float32 in another order of sums may do


def _fill(name: str, shape: list[int]) -> Any:
    spec = importlib.util.spec_from_file_location("golden_fill_weights", Path(__file__).with_name("_fill_weights.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return torch.from_numpy(np.asarray(module.fill(name, tuple(shape))))


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(reference, arrays, checkpoint file in the ecosystem's own keys)."""
    reference = json.loads((DATA / f"{request.param}.json").read_text())
    weights = {name: _fill(name, shape) for name, shape in reference["state_dict"].items()}
    wrapped = {"state_dict": weights, "meta": reference["meta"]} if request.param.startswith("mmdet") else weights
    path = tmp_path_factory.mktemp("golden") / "model.pth"
    torch.save(wrapped, path)
    return reference, np.load(DATA / f"{request.param}.npz"), path


def _load(path: Path, size: tuple[int, int], reference: dict[str, Any]) -> LoadedCheckpoint:
    threshold = reference["meta"]["score_thresh"] if reference["ecosystem"].startswith("torchvision") else None
    return load_checkpoint(
        path, options=CheckpointOptions(input_size=size, input_dtype=InputDtype.FLOAT32, score_threshold=threshold)
    )


def _inputs(case: Any) -> list[tuple[np.ndarray, Letterbox, Detections]]:
    """Input tensors as the library made them, how they came about, and its detections in image pixels."""
    reference, golden, path = case
    if not reference["ecosystem"].startswith("torchvision"):
        wanted = Detections(golden["boxes"], golden["scores"], golden["labels"])
        return [(golden["input"], Letterbox(256, 320, 256, 320), wanted)]
    meta = reference["meta"]
    options = CheckpointOptions(shortest=meta["min_size"], longest=meta["max_size"], input_dtype=InputDtype.FLOAT32)
    spec = load_checkpoint(path, options=options).contract.preprocess
    found = []
    for index, name in enumerate(reference["images"]):
        tensor, letterbox = preprocess(read_image(DATA / "images" / name), spec)
        wanted = Detections(*(golden[f"det{index}_{what}"] for what in ("boxes", "scores", "labels")))
        found.append((tensor[None], letterbox, wanted))
    return found


def _largest_differences(found: Detections, wanted: Detections) -> tuple[float, float]:
    """Of scores and of boxes, every wanted detection paired with the nearest of its label and score."""
    assert sorted(found.labels) == sorted(wanted.labels)
    score = float(np.abs(found.scores - wanted.scores).max())
    boxes = 0.0
    for box, value, label in zip(wanted.boxes, wanted.scores, wanted.labels, strict=True):
        near = (found.labels == label) & (np.abs(found.scores - value) <= SCORE)
        boxes = max(boxes, float(np.abs(found.boxes[near] - box).max(1).min(initial=np.inf)))
    return score, boxes


@pytest.mark.slow
@pytest.mark.parametrize("tail", list(Tail))
def test_detections_are_those_of_the_library(
    case: Any, tail: Tail, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    reference, _, path = case
    inputs = _inputs(case)
    height, width = inputs[0][0].shape[2:]
    made = export_onnx(_load(path, (height, width), reference), tmp_path / "m.onnx", options=ExportOptions(tail=tail))
    model = load_onnx(made.path)
    run = onnx_runner(model, optimized=True)
    for tensor, letterbox, wanted in inputs:
        feeds = {"images": tensor, "image_sizes": image_sizes_row(letterbox)[None]}
        outputs = run({i.name: feeds[i.name] for i in model.graph.input})
        found = postprocess(outputs, made.contract, index=0, input_size=(height, width), letterbox=letterbox)
        if made.contract.decode.profile.box_filter is BoxFilter.AFTER_FINAL_CLIP:
            # Recorded before the library's own final clip.
            wanted = Detections(wanted.boxes.clip(0, np.float32([320, 256, 320, 256])), wanted.scores, wanted.labels)  # noqa: PLW2901
        score, pixels = _largest_differences(found, wanted)
        record_property(f"{reference['ecosystem']} {reference['config']}", f"score {score:.1e}, box {pixels:.1e} px")
        assert len(wanted) >= 50
        assert score < SCORE
        assert pixels < PIXELS
