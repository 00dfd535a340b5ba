"""The host path against what the original libraries made of the same head outputs and pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, BoxFilter, DecodeSpec, location_strides
from fcos_deploy.core.detections import postprocess
from fcos_deploy.core.image import read_image
from fcos_deploy.core.preprocess import (
    ChannelOrder,
    InputDtype,
    Letterbox,
    PreprocessSpec,
    ResizeFilter,
    ResizeOrder,
    SizeRule,
    preprocess,
)

pytestmark = pytest.mark.usefixtures("host_path")

FIVE, THREE = (8, 16, 32, 64, 128), (8, 16, 32)
CAFFE_1, CAFFE_2 = (102.9801, 115.9465, 122.7717), (103.53, 116.28, 123.675)
ONES = (1.0, 1.0, 1.0)
IMAGENET_255 = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
MMDET = {"size_rule": SizeRule.MMDETECTION, "resize_filter": ResizeFilter.CV2}
DETECTRON = {"size_rule": SizeRule.DETECTRON2, "resize_filter": ResizeFilter.PIL, "channel_order": ChannelOrder.BGR}
TORCHVISION = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "pixel_scale": 255.0,
    "size_rule": SizeRule.TORCHVISION,
    "resize_filter": ResizeFilter.TORCH,
    "resize_order": ResizeOrder.NORMALIZE_FIRST,
}

# The rules of each reference, written out from its json (thresholds are compared with the json below).
REFERENCES: dict[str, tuple[DecodeSpec, dict[str, Any]]] = {
    "adelaidet_R_50_1x": (
        DecodeSpec(profile=PROFILES["adelaidet"], score_threshold=0.05, iou_threshold=0.6),
        {"mean": CAFFE_2, "std": ONES, **DETECTRON},
    ),
    "adelaidet_FCOS-RT_MS_DLA_34_4x_syncbn_shared_towers_bn_head": (
        DecodeSpec(profile=PROFILES["adelaidet"], score_threshold=0.05, iou_threshold=0.6, strides=THREE),
        {"mean": CAFFE_2, "std": ONES, **DETECTRON},
    ),
    "detectron2_fcos_R_50_FPN_1x": (
        DecodeSpec(profile=PROFILES["detectron2"], score_threshold=0.2, iou_threshold=0.6),
        {"mean": CAFFE_2, "std": ONES, **DETECTRON},
    ),
    "mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco": (
        DecodeSpec(profile=PROFILES["mmdetection"], score_threshold=0.05, iou_threshold=0.5),
        {"mean": CAFFE_1, "std": ONES, "channel_order": ChannelOrder.BGR, **MMDET},
    ),
    "mmdet_fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco": (
        DecodeSpec(profile=PROFILES["mmdetection"], score_threshold=0.05, iou_threshold=0.6),
        {**IMAGENET_255, **MMDET},
    ),
    "torchvision_fcos_resnet50_fpn_91": (
        DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.05, iou_threshold=0.6),
        TORCHVISION,
    ),
}
WITH_DETECTIONS = [name for name in REFERENCES if not name.startswith("torchvision")]


def _spec(rules: dict[str, Any]) -> PreprocessSpec:
    return PreprocessSpec(shortest=256, longest=426, input_dtype=InputDtype.FLOAT32, **rules)


def _thresholds(name: str, golden_dir: Path) -> tuple[float, float, int, int]:
    """Score threshold, IoU threshold, top-k and detections that the library ran with."""
    said = json.loads((golden_dir / f"{name}.json").read_text())
    if "FCOS" in said:
        fcos = said["FCOS"]
        return (
            fcos["INFERENCE_TH_TEST"],
            fcos["NMS_TH"],
            fcos["PRE_NMS_TOPK_TEST"],
            fcos["POST_NMS_TOPK_TEST"],
        )
    if "test_cfg" in said:
        cfg = said["test_cfg"]
        return cfg["score_thr"], cfg["nms"]["iou_threshold"], cfg["nms_pre"], cfg["max_per_img"]
    if "meta" in said:
        meta = said["meta"]
        return meta["score_thresh"], meta["nms_thresh"], meta["topk_candidates"], meta["detections_per_img"]
    return said["test_score_thresh"], said["test_nms_thresh"], said["topk"], said["max_det"]


def _distances(name: str, reg: np.ndarray, *, strides: tuple[int, ...]) -> np.ndarray:
    """The library's box output -> pixels (how each returns it: README of the reference outputs)."""
    if name.startswith("mmdet"):
        return reg
    return np.maximum(reg, 0) * location_strides(256, 320, strides=strides)[:, None]


def _logits(name: str, recorded: np.ndarray) -> np.ndarray:
    # detectron2 takes the sigmoid in place, and its outputs were recorded after that.
    return np.log(recorded / (1 - recorded)) if name.startswith("detectron2") else recorded


def _contract(decode: DecodeSpec, rules: dict[str, Any], classes: int = 80) -> ModelContract:
    return ModelContract(class_names=tuple(map(str, range(classes))), preprocess=_spec(rules), decode=decode)


@pytest.mark.parametrize("name", REFERENCES)
def test_thresholds_are_those_of_the_library(name: str, golden_dir: Path) -> None:
    decode, _ = REFERENCES[name]
    ours = (decode.score_threshold, decode.iou_threshold, decode.pre_nms_top_k, decode.max_detections)
    assert ours == _thresholds(name, golden_dir)


@pytest.mark.parametrize("name", WITH_DETECTIONS)
def test_detections_are_those_of_the_library(name: str, golden_dir: Path) -> None:
    decode, rules = REFERENCES[name]
    with np.load(golden_dir / f"{name}.npz") as data:
        outputs = {
            "cls_logits": _logits(name, data["cls"])[None],
            "distances": _distances(name, data["reg"], strides=decode.strides)[None],
            "centerness": _logits(name, data["ctr"])[None],
        }
        found = postprocess(
            outputs,
            _contract(decode, rules),
            index=0,
            input_size=(256, 320),
            letterbox=Letterbox(256, 320, 256, 320),
        )
        boxes = data["boxes"]
        if decode.profile.box_filter is BoxFilter.AFTER_FINAL_CLIP:
            boxes = boxes.clip(0, [320, 256, 320, 256])  # recorded before the library's own final clip
        assert len(found) == 100
        np.testing.assert_allclose(found.scores, data["scores"], atol=1e-6)
        np.testing.assert_array_equal(found.labels, data["labels"])
        np.testing.assert_allclose(found.boxes, boxes, atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_input_tensor_is_that_of_the_library(name: str, golden_dir: Path) -> None:
    _, rules = REFERENCES[name]
    with np.load(golden_dir / f"{name}.npz") as data:
        tensor, box = preprocess(data["image"], _spec(rules))
        assert box == Letterbox(256, 320, 256, 320)
        np.testing.assert_allclose(tensor, data["input"][0], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("index", [0, 1])
def test_torchvision_from_file_to_detections(index: int, golden_dir: Path) -> None:
    """640x480 files, resized to 341x256 and padded to 352x256: resize, floored centre grid, clip and rescaling."""
    pytest.importorskip("torch")
    name = "torchvision_fcos_resnet50_fpn_91"
    decode, rules = REFERENCES[name]
    said = json.loads((golden_dir / f"{name}.json").read_text())
    image = read_image(golden_dir / "images" / said["images"][index])
    tensor, box = preprocess(image, _spec(rules))
    assert tensor.shape == (3, 256, 352)
    assert (box.resized_height, box.resized_width) == (256, 341)
    outputs = _torchvision_outputs(tensor, said["state_dict"], fill_path=golden_dir.parent / "_fill_weights.py")
    found = postprocess(outputs, _contract(decode, rules, 91), index=0, input_size=(256, 352), letterbox=box)
    with np.load(golden_dir / f"{name}.npz") as data:
        boxes, scores, labels = (data[f"det{index}_{what}"] for what in ("boxes", "scores", "labels"))
    # The network's own rounding differs, too: equal scores within 1e-5 may swap places.
    np.testing.assert_allclose(found.scores, scores, atol=1e-5)
    order, expected_order = (
        np.lexsort((b[:, 0].round(1), lab)) for b, lab in ((found.boxes, found.labels), (boxes, labels))
    )
    np.testing.assert_array_equal(found.labels[order], labels[expected_order])
    np.testing.assert_allclose(found.boxes[order], boxes[expected_order], atol=0.01)


def _torchvision_outputs(tensor: np.ndarray, shapes: dict[str, list[int]], *, fill_path: Path) -> dict[str, np.ndarray]:
    """Head outputs of our network with the reference's weights."""
    import torch

    from fcos_deploy.core.network import resnet_config
    from fcos_deploy.model.fcos import Fcos, flatten_levels

    module_spec = importlib.util.spec_from_file_location("_fill_weights", fill_path)
    assert module_spec is not None
    assert module_spec.loader is not None
    fill_weights = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(fill_weights)
    model = Fcos(resnet_config(50, num_classes=91)).eval()
    model.load_state_dict({name: torch.from_numpy(fill_weights.fill(name, shape)) for name, shape in shapes.items()})
    with torch.inference_mode():
        flat = flatten_levels(model(torch.from_numpy(tensor)[None]))
    return {name: t.numpy() for name, t in zip(("cls_logits", "distances", "centerness"), flat, strict=True)}
