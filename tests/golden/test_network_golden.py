"""The network reproduces the head outputs of the original libraries, from files in their own keys."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fcos_deploy.checkpoints.load import CheckpointOptions, load_checkpoint
from fcos_deploy.core.decode import location_strides
from fcos_deploy.core.preprocess import ChannelOrder
from fcos_deploy.model.fcos import flatten_levels

DATA = Path(__file__).parent / "data"
NAMES = sorted(path.stem for path in DATA.glob("*.json"))
CANVAS = (256, 320)
TOLERANCE = 1e-4


def _fill(name: str, shape: list[int]) -> NDArray[Any]:
    path = Path(__file__).with_name("_fill_weights.py")
    spec = importlib.util.spec_from_file_location("golden_fill_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    filled: NDArray[Any] = np.asarray(module.fill(name, tuple(shape)))
    return filled


def _checkpoint(name: str, reference: dict[str, Any], folder: Path) -> Path:
    """A file as the ecosystem writes it."""
    weights = {key: torch.from_numpy(_fill(key, shape)) for key, shape in reference["state_dict"].items()}
    if reference["ecosystem"].startswith("mmdet"):
        content: dict[str, Any] = {"state_dict": weights, "meta": reference["meta"]}
    elif reference["ecosystem"].startswith("torchvision"):
        content = weights
    else:
        content = {"model": weights}
    torch.save(content, folder / f"{name}.pth")
    return folder / f"{name}.pth"


def _expected_distances(reference: dict[str, Any], raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """The library's box output in network-input pixels (README of the golden data)."""
    if reference["ecosystem"].startswith(("mmdet", "tianzhi")):
        return raw
    count = 3 if "RT" in reference["config"] else 5
    strides = location_strides(*CANVAS, strides=(8, 16, 32, 64, 128)[:count])
    return np.maximum(raw, 0) * strides[:, None]


def _relative(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_head_outputs_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    reference = json.loads((DATA / f"{name}.json").read_text())
    golden = np.load(DATA / f"{name}.npz")
    # Random batch norm statistics do not show an MSRA backbone.
    msra: dict[str, Any] = {"mean": (103.53, 116.28, 123.675), "std": (1, 1, 1), "channel_order": ChannelOrder.BGR}
    said = {"stride_in_1x1": True, **msra} if name.startswith(("adelaidet_R_50", "detectron2")) else {}
    loaded = load_checkpoint(
        _checkpoint(name, reference, tmp_path), options=CheckpointOptions(input_size=CANVAS, **said)
    )
    with torch.inference_mode():
        outputs = flatten_levels(loaded.model(torch.from_numpy(golden["input"])))
    cls_logits, distances, centerness = (tensor[0].numpy() for tensor in outputs)
    if reference["ecosystem"] == "detectron2":
        # Its inference applies the sigmoid in place, so what was recorded after it are probabilities.
        cls_logits, centerness = (1 / (1 + np.exp(-logits)) for logits in (cls_logits, centerness))
    assert _relative(cls_logits, golden["cls"]) < TOLERANCE
    assert _relative(distances, _expected_distances(reference, golden["reg"])) < TOLERANCE
    assert _relative(centerness, golden["ctr"]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_reference_thresholds_are_what_the_rules_say(name: str, tmp_path: Path) -> None:
    """The json files hold the thresholds of the library's own configuration."""
    reference = json.loads((DATA / f"{name}.json").read_text())
    test = reference.get("FCOS") or reference.get("test_cfg") or reference
    if name.startswith("torchvision"):
        pytest.skip("this model was built with thresholds of its own")
    from fcos_deploy.checkpoints.load import StoredWeights, describe_weights

    weights = {
        n: torch.zeros(s) if "running" in n or n.endswith("scale") else torch.empty(s, device="meta")
        for n, s in reference["state_dict"].items()
    }
    stored = StoredWeights(weights, {"meta": reference.get("meta")}, container="")
    described = describe_weights(stored, file_name=f"{name}.pth", stated={}, options=CheckpointOptions())
    decode = described.contract.decode
    assert decode.score_threshold == test.get("INFERENCE_TH_TEST", test.get("score_thr", test.get("test_score_thresh")))
    nms = test.get("nms", {}).get("iou_threshold")
    assert decode.iou_threshold == test.get("NMS_TH", test.get("test_nms_thresh", nms))
    assert decode.pre_nms_top_k == test.get("PRE_NMS_TOPK_TEST", test.get("nms_pre", test.get("topk")))
    assert decode.max_detections == test.get("POST_NMS_TOPK_TEST", test.get("max_per_img", test.get("max_det")))
    pixels = reference.get("preprocess") or {"mean": reference["pixel_mean"], "std": reference["pixel_std"]}
    assert described.contract.preprocess.mean == pytest.approx(tuple(pixels["mean"]), abs=1e-4)
    assert described.contract.preprocess.std == tuple(pixels["std"])
