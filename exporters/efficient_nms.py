"""The nms tail with TensorRT's plug-in EfficientNMS_TRT in the place of ONNX NonMaxSuppression (TensorRT up to 10).

ONNX NonMaxSuppression gives outputs of unknown size, which no CUDA graph can record and which are slow in 10.x; the
plug-in gives padded ones. What it does was read in its source (NVIDIA/TensorRT, plugin/efficientNMSPlugin):

- it takes part with ``score >= score_threshold``, and below a threshold of 0.007 it lets everything take part;
- it drops a box with ``IoU >= iou_threshold`` of a better one of its class, where ONNX says ``>``;
- it looks at the 4096 best only, in five shares of 819: one more than 4095 is written out of its arrays' bounds;
- it pads with zeros, and gives boxes, scores and classes, but not which candidates they were.

So scores are multiplied by 2^15 (exact), of which 2^-7 is the smallest that takes part; the IoU threshold is the next
float32; and no more than 3840 candidates get in. A graph with this node runs in TensorRT only; to compare it with its
source the node is defined by standard operators (``runnable``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters._efficient_nms_definition import DOMAIN, EFFICIENT_NMS, runnable
from exporters.onnx_file import opset_of, with_contract
from exporters.simplify import Simplification, rewrite_onnx
from exporters.step_check import Feeds, StepCheck, compare, onnx_runner
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import NmsSpace
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.libraries import require
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["DOMAIN", "EFFICIENT_NMS", "check_servable", "convert_to_efficient_nms", "with_efficient_nms"]

_MOST_CANDIDATES = 3840  # the plug-in can take 4095, TensorRT's TopK 3840
_SCALE = 2.0**15  # fits half precision too, should a weakly typed build choose it
_LEAST = 2.0**-7  # above 0.007; of the score itself 2^-22
_TOLERANCE = 1e-4


def convert_to_efficient_nms(source: Path, output: Path, *, progress: ProgressFn = no_progress) -> Simplification:
    """Write ``source``, whose nms tail is in its ``onnx`` form, with the plug-in; float or INT8.

    Raises:
        ExportError: ``source`` is not a complete ONNX model.
        ConfigError: it has no NonMaxSuppression node, its profile cannot be served, or ``output`` cannot be
            written.
        StepCheckError: the result gives other detections.
    """

    def rewrite(model: Any, contract: ModelContract, feeds: list[Feeds]) -> tuple[Any, StepCheck]:
        result, check = with_efficient_nms(model, feeds, contract=contract)
        return with_contract(result, contract), check

    return rewrite_onnx(source, output, step="EfficientNMS", rewrite=rewrite, progress=progress)


def with_efficient_nms(model: Any, feeds: list[Feeds], *, contract: ModelContract) -> tuple[Any, StepCheck]:
    """``model`` (onnx.ModelProto, left as it is) with the plug-in, compared on ``feeds``. Raises as the above does."""
    check_servable(contract)
    result = _rewritten(model, contract)
    expected, actual = onnx_runner(model), onnx_runner(runnable(result))
    return result, compare(expected, actual, feeds, step=EFFICIENT_NMS, tolerance=_TOLERANCE)


def check_servable(contract: ModelContract) -> None:
    """Refuse what the plug-in cannot give.

    Raises:
        ConfigError: another tail, or a profile whose detections are not sorted by score.
    """
    if contract.tail is not Tail.NMS:
        raise ConfigError(f"{EFFICIENT_NMS} is a form of the nms tail, this graph has '{contract.tail}'.")
    if not contract.decode.profile.sort_by_score:
        raise ConfigError(
            f"{EFFICIENT_NMS} gives the best detections first, '{contract.decode.profile.name}' keeps the order "
            "of the candidates.",
            hint="export with --nms-form onnx, or with --tail candidates",
        )


@dataclass(frozen=True, slots=True)
class _Names:
    """Tensors that the new nodes read: boxes (n, K, 4), score planes (n, C, K); ``candidates``: K where known."""

    boxes: str
    planes: str
    candidates: int | None


def _rewritten(model: Any, contract: ModelContract) -> Any:
    onnx, ir = require("onnx", extra="export"), require("onnx_ir", extra="export")
    names = _find(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:  # The old ends give up the outputs' names; nothing reads them then.
        for index, name in enumerate(node.output):
            if name in contract.outputs:
                node.output[index] = f"{name}.onnx"
    nodes, weights = _nodes(onnx, names, contract, opset=opset_of(model))
    result.graph.node.extend(nodes)
    result.graph.initializer.extend(weights)
    result.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    passes = require("onnx_ir.passes.common", extra="export")
    cleaned = ir.to_proto(passes.RemoveUnusedNodesPass()(ir.from_proto(result)).model)
    del cleaned.graph.value_info[:]
    del cleaned.graph.output[:]
    cleaned.graph.output.extend(model.graph.output)
    onnx.checker.check_model(cleaned)
    return cleaned


def _find(model: Any) -> _Names:
    found = [node for node in model.graph.node if node.op_type == "NonMaxSuppression"]
    if len(found) != 1:
        raise ConfigError(
            f"The graph has {len(found)} NonMaxSuppression nodes, one is needed.",
            hint="export with '--tail nms --nms-form onnx'",
        )
    boxes, planes = found[0].input[:2]
    inferred = require("onnx.shape_inference", extra="export").infer_shapes(model)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    counts = [shapes[name][axis].dim_value for name, axis in ((boxes, 1), (planes, 2)) if name in shapes]
    return _Names(boxes, planes, max(counts, default=0) or None)


class _Writer:
    """Collects nodes and constants under names of their own; methods return the names of tensors."""

    def __init__(self, onnx: Any, *, opset: int) -> None:
        self._onnx = onnx
        self._opset = opset
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def constant(self, value: Any, dtype: str) -> str:
        name = f"efficient_nms/constant_{len(self.weights)}"
        self.weights.append(self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:  # Any: ONNX attributes
        return self.add_all(kind, *inputs, to=(to or f"efficient_nms/{kind}_{len(self.nodes)}",), **attributes)[0]

    def largest_of_classes(self, planes: str) -> str:
        """(n, C, K) -> (n, K); the axes are an input from opset 18 on."""
        if self._opset < 18:
            return self.add("ReduceMax", planes, axes=[1], keepdims=0)
        return self.add("ReduceMax", planes, self.constant([1], "int64"), keepdims=0)

    def add_all(self, kind: str, *inputs: str, to: tuple[str, ...], **attributes: Any) -> tuple[str, ...]:
        name = f"efficient_nms/{kind}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), list(to), name=name, **attributes))
        return to


def _nodes(onnx: Any, names: _Names, contract: ModelContract, *, opset: int) -> tuple[list[Any], list[Any]]:
    writer = _Writer(onnx, opset=opset)
    boxes, planes = _best(writer, names, contract)
    scores = writer.add("Mul", writer.add("Transpose", planes, perm=[0, 2, 1]), writer.constant(_SCALE, "float32"))
    found = tuple(f"efficient_nms/{name}" for name in ("count", "boxes", "scores", "classes"))
    count, boxes, scores, classes = writer.add_all(
        EFFICIENT_NMS, boxes, scores, to=found, domain=DOMAIN, **_attributes(contract)
    )
    _outputs(writer, count, boxes, scores, classes, contract=contract)
    return writer.nodes, writer.weights


def _attributes(contract: ModelContract) -> dict[str, Any]:
    decode = contract.decode
    return {
        "plugin_version": "1",
        "score_threshold": _LEAST,
        "iou_threshold": float(np.nextafter(np.float32(decode.iou_threshold), np.float32(2))),
        "max_output_boxes": decode.max_detections,
        "background_class": -1,
        "score_activation": 0,
        "class_agnostic": 0,
        "box_coding": 0,
    }


def _best(writer: _Writer, names: _Names, contract: ModelContract) -> tuple[str, str]:
    """The candidates as they are, or the best of them where there may be more than the plug-in takes."""
    decode = contract.decode
    if (names.candidates or len(decode.strides) * decode.pre_nms_top_k) <= _MOST_CANDIDATES:
        return names.boxes, names.planes
    if names.candidates is None:
        raise ConfigError(
            f"{EFFICIENT_NMS} takes {_MOST_CANDIDATES} candidates, this graph of open size has up to "
            f"{len(decode.strides) * decode.pre_nms_top_k}.",
            hint="export with a fixed input size, or a smaller pre_nms_top_k",
        )
    best = writer.largest_of_classes(names.planes)
    count = writer.constant([_MOST_CANDIDATES], "int64")
    _, rows = writer.add_all("TopK", best, count, to=("efficient_nms/best", "efficient_nms/rows"), axis=1)
    middle, last = writer.constant([1], "int64"), writer.constant([2], "int64")
    of_boxes = writer.add("Tile", writer.add("Unsqueeze", rows, last), writer.constant([1, 1, 4], "int64"))
    classes = writer.constant([1, len(contract.class_names), 1], "int64")
    of_planes = writer.add("Tile", writer.add("Unsqueeze", rows, middle), classes)
    return (
        writer.add("GatherElements", names.boxes, of_boxes, axis=1),
        writer.add("GatherElements", names.planes, of_planes, axis=2),
    )


def _outputs(writer: _Writer, count: str, boxes: str, scores: str, classes: str, *, contract: ModelContract) -> None:
    """The contract's outputs: rows after the count are zeros with label -1, boxes are in network-input pixels."""
    position = writer.constant([list(range(contract.decode.max_detections))], "int32")
    valid = writer.add("Less", position, count)
    last = writer.constant([2], "int64")
    boxes = _to_input_pixels(writer, boxes, contract)
    writer.add("Where", writer.add("Unsqueeze", valid, last), boxes, writer.constant(0, "float32"), to="boxes")
    writer.add("Mul", scores, writer.constant(1 / _SCALE, "float32"), to="scores")
    writer.add("Where", valid, classes, writer.constant(-1, "int32"), to="labels")
    writer.add("Identity", count, to="num_detections")


def _to_input_pixels(writer: _Writer, boxes: str, contract: ModelContract) -> str:
    """Undo what the graph does to boxes before overlaps are measured (``fcos_deploy.model.tails``)."""
    profile = contract.decode.profile
    if profile.iou_offset:
        boxes = writer.add("Sub", boxes, writer.constant([0, 0, profile.iou_offset, profile.iou_offset], "float32"))
    if profile.nms_space is NmsSpace.ORIGINAL:
        resized, original = (
            writer.add("Gather", "image_sizes", writer.constant(columns, "int64"), axis=1)
            for columns in ([1, 0, 1, 0], [3, 2, 3, 2])  # height, width -> x, y, x, y
        )
        middle = writer.constant([1], "int64")
        scale = writer.add("Unsqueeze", writer.add("Div", resized, original), middle)
        boxes = writer.add("Mul", boxes, scale)
    return boxes
