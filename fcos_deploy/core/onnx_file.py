"""Reads an ONNX file without the onnx package: its interface, its metadata and the files that hold its weights.

Wire format: protobuf.dev/programming-guides/encoding. Field numbers: onnx/onnx.proto of the onnx repository.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.enums import NmsForm
from fcos_deploy.core.errors import BackendLoadError
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["OnnxInterface", "external_locations", "onnx_interface", "onnx_metadata"]

_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
_MAX_DEPTH = 64  # of nested messages; real graphs stay under 20
# Every way from a model to the external_data of a tensor: message -> field number -> message.
_TO_EXTERNAL_DATA: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


# What quantizers write: Q/DQ pairs, the operators on integers, ONNX Runtime's fused ones.
_INTEGER_OPERATORS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QGemm",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class OnnxInterface:
    """What a graph takes and gives; ``opset`` is that of the standard operators, 0 when the file does not say.

    ``operators``: the types of its nodes.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    producer: str
    nodes: int
    operators: frozenset[str] = frozenset()

    @property
    def is_quantized(self) -> bool:
        """Whether some of it computes in integers, by whichever tool."""
        return not _INTEGER_OPERATORS.isdisjoint(self.operators)

    @property
    def nms_form(self) -> NmsForm:
        """How a graph with the nms tail suppresses."""
        return NmsForm.ONNX if "NonMaxSuppression" in self.operators else NmsForm.STATIC


def onnx_interface(path: Path) -> OnnxInterface:
    """The inputs, outputs and operators of an ONNX file.

    Raises:
        BackendLoadError: when the file is missing, damaged or no ONNX model.
    """
    with _open(path) as model:
        graph = model.first(7, "graph")
        operators = [next((name.text() for name in node.messages(4)), "") for node in graph.messages(1)]
        return OnnxInterface(
            inputs=tuple(map(_tensor_spec, graph.messages(11))),
            outputs=tuple(map(_tensor_spec, graph.messages(12))),
            opset=max(map(_standard_opset, model.messages(8)), default=0),
            producer=next((producer.text() for producer in model.messages(2)), ""),
            nodes=len(operators),
            operators=frozenset(operators),
        )


def onnx_metadata(path: Path) -> dict[str, str]:
    """The metadata properties of an ONNX file.

    Raises:
        BackendLoadError: when the file is missing, damaged or no ONNX model.
    """
    with _open(path) as model:
        return dict(map(_string_pair, model.messages(14)))


def external_locations(path: Path) -> set[str]:
    """The files that tensors of an ONNX file keep their data in, as it names them: initializers, attributes, functions.

    Raises:
        BackendLoadError: when the file is missing, damaged or no ONNX model.
    """
    locations: set[str] = set()
    with _open(path) as model:
        pending = [("model", model, 0)]
        while pending:
            kind, message, depth = pending.pop()
            if depth > _MAX_DEPTH:
                raise ValueError("its graphs are nested too deeply")
            for number, value in message.fields():
                child = _TO_EXTERNAL_DATA[kind].get(number)
                if child is None or isinstance(value, int):
                    continue
                if child == "external":
                    key, location = _string_pair(value)
                    locations.update([location] if key == "location" else [])
                else:
                    pending.append((child, value, depth + 1))
    return locations


@dataclass(frozen=True, slots=True)
class _Message:
    """The protobuf message in ``data[start:end]``; its fields are found when they are asked for."""

    data: mmap.mmap
    start: int
    end: int

    def fields(self) -> Iterator[tuple[int, int | _Message]]:
        """(field number, value) of the integers, and of what has a length: messages, strings, packed lists.

        Raises:
            ValueError, IndexError: when the bytes are not a protobuf message.
        """
        position = self.start
        while position < self.end:
            tag, position = self._varint(position)
            number, wire_type = tag >> 3, tag & 7
            if number == 0:
                raise ValueError("field number 0")
            if wire_type == 0:
                value, position = self._varint(position)
                yield number, value
            elif wire_type == 2:
                length, position = self._varint(position)
                if position + length > self.end:
                    raise ValueError("truncated field")
                yield number, _Message(self.data, position, position + length)
                position += length
            elif wire_type in (1, 5):  # fixed 8 or 4 bytes, floating-point numbers: nothing here reads them
                position += 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
        if position != self.end:
            raise ValueError("truncated message")

    def messages(self, number: int) -> Iterator[_Message]:
        """The fields of this number."""
        for field, value in self.fields():
            if field == number:
                if isinstance(value, int):
                    raise ValueError("a number where a message should be")
                yield value

    def first(self, number: int, name: str) -> _Message:
        """The first field of this number; ``name`` is for the error that it is missing."""
        for message in self.messages(number):
            return message
        raise ValueError(f"no {name}")

    def text(self) -> str:
        """As a string."""
        return self.data[self.start : self.end].decode()

    def _varint(self, position: int) -> tuple[int, int]:
        """A number in groups of 7 bits, lowest first; at most 10 bytes for 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
        raise ValueError("varint too long")


@contextmanager
def _open(path: Path) -> Iterator[_Message]:
    """The onnx.ModelProto of a file; what a damaged one leads to, here and in the caller, becomes BackendLoadError."""
    try:
        if path.stat().st_size == 0:
            raise BackendLoadError(f"'{path}' is empty.", hint="export it again")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield _Message(data, 0, len(data))
    except OSError as error:
        raise BackendLoadError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except (IndexError, KeyError, ValueError) as error:
        raise BackendLoadError(f"'{path}' is not a complete ONNX file: {error}.", hint="export it again") from error


def _string_pair(entry: _Message) -> tuple[str, str]:
    """onnx.StringStringEntryProto: 1 key, 2 value."""
    texts = {number: value.text() for number, value in entry.fields() if isinstance(value, _Message)}
    return texts[1], texts.get(2, "")


def _standard_opset(entry: _Message) -> int:
    """onnx.OperatorSetIdProto: 1 domain, 2 version; 0 for the operators of another domain."""
    domain, version = "", 0
    for number, value in entry.fields():
        if number == 1 and isinstance(value, _Message):
            domain = value.text()
        elif number == 2 and isinstance(value, int):
            version = value
    return version if domain in ("", "ai.onnx") else 0


def _tensor_spec(value_info: _Message) -> TensorSpec:
    """onnx.ValueInfoProto: 1 name, 2 type; TypeProto: 1 tensor; Tensor: 1 element type, 2 shape; Dimension: 1 size."""
    name = value_info.first(1, "name").text()
    tensor = value_info.first(2, "type").first(1, "tensor")
    fields = dict(tensor.fields())
    element, shape = fields.get(1), fields.get(2)
    if not isinstance(element, int) or element not in _DTYPES:
        raise ValueError(f"'{name}' has an element type that is not supported")
    dimensions = shape.messages(1) if isinstance(shape, _Message) else ()
    sizes = (dict(dimension.fields()).get(1) for dimension in dimensions)
    return TensorSpec(name, _DTYPES[element], tuple(size if isinstance(size, int) else None for size in sizes))
