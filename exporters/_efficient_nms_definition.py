"""What TensorRT's plug-in EfficientNMS_TRT computes, as an ONNX function, so that ONNX Runtime can check it."""

from __future__ import annotations

from typing import Any

from exporters.onnx_file import opset_of
from fcos_deploy.core.libraries import require
from fcos_deploy.core.onnx_file import EFFICIENT_NMS

__all__ = ["DOMAIN", "EFFICIENT_NMS", "runnable"]

DOMAIN = "TRT"  # TensorRT finds plug-ins by the operator's name; a domain of its own keeps the graph valid ONNX.


def runnable(model: Any) -> Any:
    """``model`` with the plug-in defined by standard operators, as a function, so that ONNX Runtime can run it."""
    onnx = require("onnx", extra="export")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    (node,) = (node for node in result.graph.node if node.op_type == EFFICIENT_NMS)
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    result.functions.append(_definition(onnx, values, opset=opset_of(result)))
    result.ir_version = max(result.ir_version, 8)  # functions
    return result


_DEFINITION = """
<opset_import: [ "" : {opset}], domain: "{domain}">
{name} <{attributes}> (boxes, scores) => (count, kept_boxes, kept_scores, kept_classes)
{{
  planes = Transpose <perm = [0, 2, 1]> (scores)
  most = Constant <value_ints = [{max_output_boxes}]> ()
  iou = Constant <value_floats = [{iou_threshold!r}]> ()
  least = Constant <value_floats = [{score_threshold!r}]> ()
  selected = NonMaxSuppression (boxes, planes, most, iou, least)
  shape = Shape (planes)
  minus_one = Constant <value = float[1] {{-1.0}}> ()
  nothing = Expand (minus_one, shape)
  survived = GatherND (planes, selected)
  kept = ScatterND (nothing, selected, survived)
  flat = Flatten <axis = 1> (kept)
  batch = Shape <start = 0, end = 1> (planes)
  padded_shape = Concat <axis = 0> (batch, most)
  padding = Expand (minus_one, padded_shape)
  padded = Concat <axis = 1> (flat, padding)
  best, index = TopK <axis = 1> (padded, most)
  zero = Constant <value = int64 {{0}}> ()
  zero_score = Constant <value = float {{0.0}}> ()
  valid = Greater (best, zero_score)
  safe = Where (valid, index, zero)
  candidates = Shape <start = 2, end = 3> (planes)
  class = Div (safe, candidates)
  skipped = Mul (class, candidates)
  row = Sub (safe, skipped)
  two = Constant <value_ints = [2]> ()
  rows = Unsqueeze (row, two)
  four = Constant <value_ints = [1, 1, 4]> ()
  box_rows = Tile (rows, four)
  found_boxes = GatherElements <axis = 1> (boxes, box_rows)
  valid_boxes = Unsqueeze (valid, two)
  kept_boxes = Where (valid_boxes, found_boxes, zero_score)
  kept_scores = Where (valid, best, zero_score)
  kept_class = Where (valid, class, zero)
  kept_classes = Cast <to = 6> (kept_class)
  counted = Cast <to = 6> (valid)
  one = Constant <value_ints = [1]> ()
  count = ReduceSum <keepdims = 1> (counted, one)
}}
"""


def _definition(onnx: Any, values: dict[str, Any], *, opset: int) -> Any:
    """The node's meaning for these attribute values as an ``onnx.FunctionProto``."""
    text = _DEFINITION.format(opset=opset, domain=DOMAIN, name=EFFICIENT_NMS, attributes=", ".join(values), **values)
    return onnx.parser.parse_function(text)
