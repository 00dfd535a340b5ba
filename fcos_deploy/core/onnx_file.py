"""Walks the protobuf wire format, so that ONNX files can be looked into without the onnx package."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fcos_deploy.core.enums import NmsForm
from fcos_deploy.core.errors import BackendLoadError
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["ByteSource", "OnnxInterface", "length_delimited_fields", "onnx_interface"]


class ByteSource(Protocol):
    """Bytes or a memory map."""

    def __getitem__(self, index: int) -> int: ...


def length_delimited_fields(data: ByteSource, *, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each length-delimited field of the message in ``data[start:end]``.

    Raises:
        ValueError: when the bytes are not a protobuf message.
        IndexError: when they end too early.
    """
    position = start
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("field number 0")
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 2:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("truncated field")
            yield number, position, position + length
            position += length
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
    if position != end:
        raise ValueError("truncated message")


def _varint(data: ByteSource, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_PRODUCER, _MODEL_OPSET = 7, 2, 8
_NODE_OPERATOR = 4
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}


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
    def nms_form(self) -> NmsForm:
        """How a graph with the nms tail suppresses."""
        return NmsForm.ONNX if "NonMaxSuppression" in self.operators else NmsForm.STATIC


def onnx_interface(path: Path) -> OnnxInterface:
    """Look into an ONNX file; weights are skipped.

    Raises:
        BackendLoadError: when the file is missing, damaged or no ONNX model.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _model(data, len(data))
    except OSError as error:
        raise BackendLoadError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except (IndexError, KeyError, ValueError) as error:
        raise BackendLoadError(f"'{path}' is not a complete ONNX file.", hint="export it again") from error


def _model(data: mmap.mmap, size: int) -> OnnxInterface:
    parts = list(length_delimited_fields(data, start=0, end=size))
    graph = next(((a, b) for n, a, b in parts if n == _MODEL_GRAPH), None)
    if graph is None:
        raise ValueError("no graph")
    entries: dict[int, list[bytes]] = {_GRAPH_INPUT: [], _GRAPH_OUTPUT: [], _GRAPH_INITIALIZER: []}
    nodes, operators = 0, set()
    for number, start, end in length_delimited_fields(data, start=graph[0], end=graph[1]):
        if number == _GRAPH_NODE:
            nodes += 1
            operators.add(_operator(data, start, end))
        if number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            entries[number].append(data[start:end])
    opsets = [_opset(data[a:b]) for n, a, b in parts if n == _MODEL_OPSET]
    return OnnxInterface(
        inputs=tuple(map(_tensor, entries[_GRAPH_INPUT])),
        outputs=tuple(map(_tensor, entries[_GRAPH_OUTPUT])),
        opset=max(opsets, default=0),
        producer=next((data[a:b].decode() for n, a, b in parts if n == _MODEL_PRODUCER), ""),
        nodes=nodes,
        operators=frozenset(operators),
    )


def _operator(data: mmap.mmap, start: int, end: int) -> str:
    fields = length_delimited_fields(data, start=start, end=end)
    return next((data[a:b].decode() for number, a, b in fields if number == _NODE_OPERATOR), "")


def _opset(message: bytes) -> int:
    fields = dict(_fields(message))
    return 0 if fields.get(1, b"") not in (b"", b"ai.onnx") else int(fields.get(2, 0))


def _tensor(message: bytes) -> TensorSpec:
    """onnx.ValueInfoProto: 1 name, 2 type; TypeProto: 1 tensor; Tensor: 1 element type, 2 shape."""
    value = dict(_fields(message))
    tensor = dict(_fields(_bytes(dict(_fields(_bytes(value[2])))[1])))
    shape = _bytes(tensor[2]) if 2 in tensor else b""
    dims = [dict(_fields(_bytes(dim))).get(1) for number, dim in _fields(shape) if number == 1]
    sizes = tuple(None if dim is None else int(dim) for dim in dims)
    return TensorSpec(_bytes(value[1]).decode(), _DTYPES[int(tensor[1])], sizes)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of all fields that are numbers or length-delimited."""
    position = 0
    while position < len(message):
        tag, position = _varint_onnx_interface(message, position)
        if tag & 7 == 0:
            value, position = _varint_onnx_interface(message, position)
            yield tag >> 3, value
        elif tag & 7 == 2:
            length, position = _varint_onnx_interface(message, position)
            if position + length > len(message):
                raise ValueError("truncated field")
            yield tag >> 3, message[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {tag & 7}")


def _varint_onnx_interface(data: ByteSource, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("varint too long")
