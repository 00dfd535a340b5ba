"""How our own torch operators are written in ONNX, and those of torch that its exporter would decompose first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fcos_deploy.core.require import require

__all__ = ["translations"]


_NATIVE_GROUP_NORM = 21  # the first opset whose GroupNormalization has a scale for every channel, as torch's has


def translations(*, opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``."""
    torch = require("torch", extra="export")
    require("onnxscript", extra="export")
    require("fcos_deploy.model.suppress", extra="export")  # registers the operators
    own, aten = torch.ops.fcos_deploy, torch.ops.aten
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        own.nms_keep.default: _nms_keep,
        own.divide.default: _divide,
        aten.batch_norm.default: _batch_norm,
        aten.detach_.default: _itself,
        aten.to.dtype: _cast,
    }
    if opset < _NATIVE_GROUP_NORM:
        table[aten.group_norm.default] = _group_norm
    return table


def _itself(tensor: Any) -> Any:
    return require("onnxscript", extra="export").opset18.Identity(tensor)


def _cast(tensor: Any, dtype: int, non_blocking: bool = False, copy: bool = False) -> Any:  # noqa: ARG001
    return require("onnxscript", extra="export").opset18.Cast(tensor, to=dtype)


def _batch_norm(  # noqa: PLR0917  (the operator's own signature)
    images: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool = False,  # noqa: ARG001  (what is exported is in eval mode)
    momentum: float = 0.1,  # noqa: ARG001
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    op = require("onnxscript", extra="export").opset18
    return op.BatchNormalization(images, weight, bias, mean, variance, epsilon=eps)


def _group_norm(  # noqa: PLR0917  (the operator's own signature)
    images: Any,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    """InstanceNormalization with each group as one channel: what torch's exporter writes, less what it works out."""
    op = require("onnxscript", extra="export").opset18
    ones, zeros = (op.Constant(value_floats=[value] * groups) for value in (1.0, 0.0))
    grouped = op.Reshape(images, op.Constant(value_ints=[0, groups, -1]))
    result = op.Reshape(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), op.Shape(images))
    inner = op.Constant(value_ints=list(range(1, len(images.shape) - 1)))
    result = result if weight is None else op.Mul(result, op.Unsqueeze(weight, inner))
    return result if bias is None else op.Add(result, op.Unsqueeze(bias, inner))


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
