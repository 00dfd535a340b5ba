"""How our own torch operators are written in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcos_deploy.core.require import require

__all__ = ["translations"]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    torch = require("torch", extra="export")
    require("onnxscript", extra="export")
    require("fcos_deploy.model.suppress", extra="export")  # registers the operators
    operators = torch.ops.fcos_deploy
    return {operators.nms_keep.default: _nms_keep, operators.divide.default: _divide}


def _divide(index: Any, divisor: int) -> Any:
    op = require("onnxscript", extra="export").opset18
    return op.Div(index, op.Constant(value_int=divisor))


def _nms_keep(  # noqa: PLR0917  (the operator's own signature)
    boxes: Any, scores: Any, labels: Any, classes: int, iou_threshold: float, limit: int
) -> Any:
    """NonMaxSuppression once over (n, classes, K) scores, and its list of survivors as a mask of fixed shape.

    A score plane of its own for each class keeps suppression exact: the usual trick of moving classes apart by adding
    to coordinates costs their last bits.
    """
    onnx = require("onnx", extra="export")
    op = require("onnxscript", extra="export").opset18
    channel = onnx.helper.make_tensor("channels", onnx.TensorProto.INT64, [1, classes, 1], list(range(classes)))
    axis = op.Constant(value_ints=[1])
    of_class = op.Equal(op.Unsqueeze(labels, axis), op.Constant(value=channel))
    planes = op.Where(of_class, op.Unsqueeze(scores, axis), op.Constant(value_float=-1.0))
    selected = op.NonMaxSuppression(
        boxes,
        planes,
        op.Constant(value_ints=[limit]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
        center_point_box=0,
    )
    image_and_row = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(selected, start=0, end=1))
    mask = op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), image_and_row, ones)
    return op.Greater(mask, op.Constant(value_float=0.5))
