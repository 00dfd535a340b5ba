"""The nms tail with TensorRT's plug-in: its node, and its detections when NumPy does what the plug-in does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from exporters import efficient_nms  # noqa: E402
from exporters.efficient_nms import DOMAIN, EFFICIENT_NMS, convert_to_efficient_nms, with_efficient_nms  # noqa: E402
from exporters.onnx_file import load_onnx, with_contract  # noqa: E402
from exporters.step_check import Feeds, onnx_runner  # noqa: E402
from exporters.torch_onnx import ExportOptions, export_onnx  # noqa: E402
from fcos_deploy.core.backend import SessionOptions  # noqa: E402
from fcos_deploy.core.contract import (  # noqa: E402
    ModelContract,
    read_contract,
)
from fcos_deploy.core.decode import PROFILES, DecodeSpec  # noqa: E402
from fcos_deploy.core.enums import NmsForm, Tail  # noqa: E402
from fcos_deploy.core.errors import ConfigError, FcosDeployError  # noqa: E402
from fcos_deploy.core.onnx_file import onnx_interface  # noqa: E402
from fcos_deploy.core.preprocess import PreprocessSpec  # noqa: E402
from fcos_deploy.core.registry import get_backend  # noqa: E402
from fcos_deploy.model.fcos import LevelOutput  # noqa: E402

pytestmark = pytest.mark.slow

SIZE = (128, 160)
STRIDES = (8, 16, 32)
GRIDS = ((16, 20), (8, 10), (4, 5))
NODE_OUTPUTS = tuple(f"efficient_nms/{name}" for name in ("count", "boxes", "scores", "classes"))
Case = tuple[Path, ModelContract]


class Head(torch.nn.Module):
    """In place of a network: random outputs on both sides of the threshold, which follow one pixel of each image."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for level, ((rows, columns), stride) in enumerate(zip(GRIDS, STRIDES, strict=True)):
            self.register_buffer(f"cls{level}", torch.randn((1, 3, rows, columns), generator=generator) * 2)
            self.register_buffer(f"box{level}", torch.rand((1, 4, rows, columns), generator=generator) * 3 * stride)
            self.register_buffer(f"ctr{level}", torch.randn((1, 1, rows, columns), generator=generator))

    def forward(self, images: torch.Tensor) -> list[LevelOutput]:
        pixel = images[:, :1, :1, :1]
        return [self.level(index, pixel) for index in range(len(GRIDS))]

    def level(self, index: int, pixel: torch.Tensor) -> LevelOutput:
        cls, box, ctr = (getattr(self, f"{kind}{index}") for kind in ("cls", "box", "ctr"))
        return LevelOutput(cls + 12 * pixel - 8, box + pixel, ctr + pixel)


class Loaded:
    def __init__(self, profile: str) -> None:
        preprocess = PreprocessSpec(
            mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), pixel_scale=255.0, height=SIZE[0], width=SIZE[1]
        )
        decode = DecodeSpec(profile=PROFILES[profile], score_threshold=0.2, iou_threshold=0.6, strides=STRIDES)
        self.model = Head()
        self.contract = ModelContract(class_names=("a", "b", "c"), preprocess=preprocess, decode=decode)


@pytest.fixture(scope="module", params=["torchvision", "mmdetection"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The nms tail in its onnx form, open batch; mmdetection measures overlaps in the original image's pixels."""
    path = tmp_path_factory.mktemp("nms") / f"{request.param}.onnx"
    made = export_onnx(Loaded(request.param), path, options=ExportOptions(tail=Tail.NMS, batch=None))
    return made.path, made.contract


def feeds(model: Any) -> Feeds:
    """Three images: of many, some and few detections."""
    images = np.zeros((3, 3, *SIZE), np.float32 if model.graph.input[0].type.tensor_type.elem_type == 1 else np.uint8)
    images[:, :, 0, 0] = np.array([255, 128, 0])[:, None]
    sizes = np.float32([[124, 149, 250, 300], [128, 160, 128, 160], [100, 160, 300, 90]])
    has_sizes = "image_sizes" in {i.name for i in model.graph.input}
    return {"images": images, "image_sizes": sizes} if has_sizes else {"images": images}


def plugin(boxes: np.ndarray, scores: np.ndarray, values: dict[str, Any]) -> dict[str, np.ndarray]:
    """EfficientNMS_TRT with corner boxes, class-aware, no activation: as its CUDA source reads, one image at a time."""
    most = values["max_output_boxes"]
    shape = (len(boxes), most)
    count, kept = np.zeros((len(boxes), 1), np.int32), np.zeros((*shape, 4), np.float32)
    kept_scores, classes = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for image in range(len(boxes)):
        anchor, label = np.nonzero(scores[image] >= np.float32(values["score_threshold"]))
        assert len(anchor) <= 4095, "the plug-in writes out of bounds"
        order = np.argsort(-scores[image][anchor, label], kind="stable")
        dead = np.zeros(len(order), bool)
        for position, index in enumerate(order):
            if dead[position] or count[image, 0] == most:
                continue
            row = int(count[image, 0])
            box = boxes[image, anchor[index]]
            kept[image, row], classes[image, row] = box, label[index]
            kept_scores[image, row] = scores[image, anchor[index], label[index]]
            count[image, 0] += 1
            overlaps = iou(box, boxes[image, anchor[order]]) >= np.float32(values["iou_threshold"])
            dead |= overlaps & (label[order] == label[index])
    return dict(zip(NODE_OUTPUTS, (count, kept, kept_scores, classes), strict=True))


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    sides = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None)
    inter = sides[:, 0] * sides[:, 1]
    union = (box[2] - box[0]) * (box[3] - box[1]) + np.prod(others[:, 2:] - others[:, :2], axis=1) - inter
    return np.where(inter > 0, inter / np.where(union > 0, union, 1), 0).astype(np.float32)


def run_with_plugin(model: Any, given: Feeds) -> Feeds:
    """ONNX Runtime up to the plug-in's inputs, NumPy in its place, ONNX Runtime from its outputs on."""
    (node,) = (n for n in model.graph.node if n.op_type == EFFICIENT_NMS)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    before, after = onnx.ModelProto(), onnx.ModelProto()
    before.CopyFrom(model)
    del before.graph.output[:]
    before.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in node.input)
    keep = list(model.graph.node)
    position = keep.index(node)
    del before.graph.node[position:]
    after.CopyFrom(model)
    del after.graph.node[: position + 1]
    types = (6, 1, 1, 6)
    after.graph.input.extend(
        onnx.helper.make_tensor_value_info(n, kind, None) for n, kind in zip(NODE_OUTPUTS, types, strict=True)
    )
    boxes, scores = (onnx_runner(before)(given)[name] for name in node.input)
    return onnx_runner(after)(given | plugin(boxes, scores, values))


def converted(case: Case) -> tuple[Any, Any]:
    model = load_onnx(case[0])
    result, check = with_efficient_nms(model, [feeds(model)], contract=case[1])
    assert check.unmatched == 0
    return model, result


def assert_same(found: Feeds, wanted: Feeds) -> None:
    assert found["num_detections"].tolist() == wanted["num_detections"].tolist()
    assert found["labels"].tolist() == wanted["labels"].tolist()
    np.testing.assert_array_equal(found["scores"], wanted["scores"])
    np.testing.assert_allclose(found["boxes"], wanted["boxes"], rtol=1e-6)


def test_detections_are_those_of_the_operator(case: Case) -> None:
    model, result = converted(case)
    wanted = onnx_runner(model)(feeds(model))
    assert 0 < wanted["num_detections"].min() < 100 == wanted["num_detections"].max()
    assert_same(run_with_plugin(result, feeds(model)), wanted)


def test_no_more_candidates_than_the_plugin_takes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 700 candidates, which is fewer than pass the gate but enough for the detections that are kept."""
    monkeypatch.setattr(efficient_nms, "_MOST_CANDIDATES", 700)
    model, result = converted(case)
    assert "TopK" in {n.op_type for n in result.graph.node if n.name.startswith("efficient_nms/")}
    assert_same(run_with_plugin(result, feeds(model)), onnx_runner(model)(feeds(model)))


def test_the_node_is_as_tensorrt_reads_it(case: Case) -> None:
    model, result = converted(case)
    (node,) = (n for n in result.graph.node if n.op_type == EFFICIENT_NMS)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert (node.domain, len(node.input), len(node.output)) == (DOMAIN, 2, 4)
    assert values.pop("iou_threshold") > case[1].decode.iou_threshold
    assert values == {
        "plugin_version": b"1",
        "score_threshold": 0.0078125,
        "max_output_boxes": 100,
        "background_class": -1,
        "score_activation": 0,
        "class_agnostic": 0,
        "box_coding": 0,
    }
    operators = {n.op_type for n in result.graph.node}
    assert not operators & {"NonMaxSuppression", "ScatterND", "NonZero"}
    assert not result.functions
    assert [o.name for o in result.graph.output] == [o.name for o in model.graph.output]


def test_overlap_of_exactly_the_threshold_is_kept(case: Case) -> None:
    """The plug-in drops at >=: with the operator's threshold, boxes that overlap by exactly 0.6 would go."""
    _, result = converted(case)
    (node,) = (n for n in result.graph.node if n.op_type == EFFICIENT_NMS)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    boxes, scores = np.float32([[[0, 0, 5, 5], [0, 0, 5, 3]]]), np.float32([[[9.0], [8.0]]])
    threshold = case[1].decode.iou_threshold
    assert iou(boxes[0, 0], boxes[0])[1] == np.float32(threshold)
    assert plugin(boxes, scores, values)[NODE_OUTPUTS[0]].tolist() == [[2]]
    assert plugin(boxes, scores, {**values, "iou_threshold": threshold})[NODE_OUTPUTS[0]].tolist() == [[1]]


def test_file_carries_the_contract_and_other_runtimes_refuse_it(case: Case, tmp_path: Path) -> None:
    made = convert_to_efficient_nms(case[0], tmp_path / "plugin.onnx")
    assert read_contract(made.path) == case[1]
    assert EFFICIENT_NMS in onnx_interface(made.path).operators
    with pytest.raises(FcosDeployError, match=EFFICIENT_NMS):
        get_backend("onnxruntime").open(made.path, SessionOptions())


def test_candidate_order_cannot_be_given(case: Case) -> None:
    tianzhi = replace(case[1], decode=replace(case[1].decode, profile=PROFILES["tianzhi"]))
    with pytest.raises(ConfigError, match="keeps the order of the candidates"):
        with_efficient_nms(load_onnx(case[0]), [], contract=tianzhi)


def test_a_graph_without_the_operator_is_refused(case: Case, tmp_path: Path) -> None:
    model = load_onnx(case[0])
    for contract, message in (
        (case[1], "has 0 NonMaxSuppression nodes"),
        (replace(case[1], tail=Tail.CANDIDATES), "a form of the nms tail, this graph has 'candidates'"),
    ):
        del model.graph.node[:]
        with pytest.raises(ConfigError, match=message):
            with_efficient_nms(with_contract(model, contract), [], contract=contract)


def test_exporting_writes_the_plugin_form(tmp_path: Path) -> None:
    options = ExportOptions(tail=Tail.NMS, nms_form=NmsForm.PLUGIN, opset=18)
    made = export_onnx(Loaded("adelaidet"), tmp_path / "m.onnx", options=options)
    assert [check.step for check in made.checks] == ["export", "simplify", EFFICIENT_NMS]
    assert EFFICIENT_NMS in onnx_interface(made.path).operators
