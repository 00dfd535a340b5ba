"""ONNX files: read without the onnx package, and written whole with the contract that travels in them.

Wire format: protobuf.dev/programming-guides/encoding. Field numbers: onnx/onnx.proto of the onnx repository.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcos_deploy.core.contract import METADATA_KEY, ModelContract, TensorSpec, contract_to_text
from fcos_deploy.core.enums import NmsForm
from fcos_deploy.core.errors import BackendLoadError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import lazy_import

__all__ = [
    "NAMES_KEY",
    "OnnxInterface",
    "external_locations",
    "fits_one_file",
    "onnx_interface",
    "onnx_metadata",
    "opset_of",
    "sampling_nodes",
    "save_onnx",
    "tensor_bytes",
    "with_contract",
    "with_outputs",
    "without_initializers",
]


onnx = lazy_import("onnx", extra="export")

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
        data, position = self.data, self.start
        while position < self.end:
            tag, position = data[position], position + 1  # mostly of one byte, as lengths are
            if tag >= 0x80:
                tag, position = self._varint(position - 1)
            number, wire_type = tag >> 3, tag & 7
            if number == 0:
                raise ValueError("field number 0")
            if wire_type == 0:
                value, position = self._varint(position)
                yield number, value
            elif wire_type == 2:
                length, position = data[position], position + 1
                if length >= 0x80:
                    length, position = self._varint(position - 1)
                if position + length > self.end:
                    raise ValueError("truncated field")
                yield number, _Message(data, position, position + length)
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


# JSON list by class channel, as the graph counts, for people and for tools that don't know the contract.
NAMES_KEY = "fcos_deploy.class_names"

_LARGEST_FILE = 1_900_000_000  # bytes of weights inside of an ONNX file; protobuf ends at 2 GiB
_EXTERNAL = 1024  # bytes; smaller tensors stay inside, where shapes and factors are read
_PIECE = 16 << 20  # bytes of a tensor that are copied at once
# Tags of protobuf fields that have a length (number << 3 | 2): the graph of a model, an initializer of a graph, the raw
# data of a tensor.
_GRAPH, _INITIALIZER, _RAW_DATA = (bytes([number << 3 | 2]) for number in (7, 5, 9))


def save_onnx(model: Any, path: Path, *, folder: Path | None = None) -> None:  # Any: onnx.ModelProto, without types
    """Write a model under its final name once it is complete, without a copy of its weights in memory.

    Weights that do not fit into one file go into another beside it, whose name is the model's and ``.data``.
    ``folder``: where the files of weights lie that the model refers to, if it does.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not fits_one_file(model):
        data = path.with_name(path.name + ".data")
        with atomic_file(data) as temporary:
            model, folder = _with_external_weights(model, temporary, location=data.name, folder=folder), None
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        stream.writelines(_serialized(model, folder))


def fits_one_file(model: Any) -> bool:
    """Whether the model with its weights is one protobuf message."""
    return sum(map(tensor_bytes, model.graph.initializer)) <= _LARGEST_FILE


def tensor_bytes(tensor: Any) -> int:
    """Bytes of the numbers of an initializer (onnx.TensorProto), in the model or in another file."""
    return int(_external_data(tensor).get("length", len(tensor.raw_data)))


def _external_data(tensor: Any) -> dict[str, str]:
    """Location, offset and length of the numbers in another file; empty where they are in the model."""
    return {entry.key: entry.value for entry in tensor.external_data}


def _pieces(tensor: Any, folder: Path | None) -> Iterator[bytes]:
    """The raw numbers of an initializer, a few megabytes at once."""
    place = _external_data(tensor)
    if not place or folder is None:
        yield tensor.raw_data
        return
    with (folder / place["location"]).open("rb") as stream:
        stream.seek(int(place.get("offset", 0)))
        left = tensor_bytes(tensor)
        while left:
            piece = stream.read(min(left, _PIECE))
            if not piece:
                raise BackendLoadError(f"The file of weights '{stream.name}' is too short.", hint="export again")
            left -= len(piece)
            yield piece


def _serialized(model: Any, folder: Path | None) -> Iterator[bytes]:
    """The model as one protobuf message; with ``folder``, weights that lie there are in it."""
    shell = without_initializers(model)
    graph = shell.graph.SerializeToString(deterministic=True)
    shell.ClearField("graph")
    heads = [_initializer_head(tensor, folder) for tensor in model.graph.initializer]
    length = len(graph) + sum(len(head) + size for head, size in heads)
    yield shell.SerializeToString(deterministic=True) + _GRAPH + _varint(length) + graph
    for (head, size), tensor in zip(heads, model.graph.initializer, strict=True):
        yield head
        if size:
            yield from _pieces(tensor, folder)


def _initializer_head(tensor: Any, folder: Path | None) -> tuple[bytes, int]:
    """The field of an initializer up to its raw numbers, and their bytes; all of it, and 0, where it has none."""
    outside = folder is not None and bool(tensor.external_data)
    if not outside and not tensor.raw_data:
        whole = tensor.SerializeToString(deterministic=True)
        return _INITIALIZER + _varint(len(whole)) + whole, 0
    facts = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    size = tensor_bytes(tensor)
    head = facts.SerializeToString(deterministic=True) + _RAW_DATA + _varint(size)
    return _INITIALIZER + _varint(len(head) + size) + head, size


def _varint(number: int) -> bytes:
    """protobuf's: 7 bits a byte, lowest first, the highest bit set but in the last one."""
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def _with_external_weights(model: Any, data: Path, *, location: str, folder: Path | None) -> Any:
    """The model with its larger weights written to ``data``, which it will find as ``location``."""
    shell = without_initializers(model)
    with data.open("wb") as stream:
        for tensor in model.graph.initializer:
            size = tensor_bytes(tensor)
            if size <= _EXTERNAL:
                shell.graph.initializer.append(tensor)
                continue
            outside = shell.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            outside.data_location = onnx.TensorProto.EXTERNAL
            stream.write(b"\0" * (-stream.tell() % 4096))  # So that runtimes can map each tensor.
            for key, value in (("location", location), ("offset", stream.tell()), ("length", size)):
                outside.external_data.add(key=key, value=str(value))
            stream.writelines(_pieces(tensor, folder))
    return shell


def without_initializers(model: Any) -> Any:
    """A copy of the model without its initializers, which takes no memory of their size."""
    shell = onnx.ModelProto()
    for message, copy in ((model, shell), (model.graph, shell.graph)):
        for field, value in message.ListFields():
            if field.name in {"graph", "initializer"}:
                continue
            if isinstance(value, (int, float, str, bytes)):
                setattr(copy, field.name, value)
            elif hasattr(value, "CopyFrom"):
                getattr(copy, field.name).CopyFrom(value)
            else:
                getattr(copy, field.name).extend(value)
    return shell


def with_contract(model: Any, contract: ModelContract, *, record: Mapping[str, str] | None = None) -> Any:
    """A copy of the model that carries ``contract``, its class names and how it was made."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    properties = {p.key: p.value for p in model.metadata_props}
    properties |= {METADATA_KEY: contract_to_text(contract), NAMES_KEY: json.dumps(list(contract.channel_names))}
    properties |= {f"fcos_deploy.{key}": value for key, value in (record or {}).items()}
    onnx.helper.set_model_props(copy, dict(sorted(properties.items())))
    # The oldest format that has the operators: runtimes refuse a newer one than they know (ONNX Runtime 1.17: 10).
    copy.ir_version = onnx.helper.find_min_ir_version_for(copy.opset_import)
    return copy


# Operators that sample a map, and which of their inputs say where, or with what weight.
_STEERING_INPUTS = {"GridSample": (1,), "DeformConv": (2, 4)}
_READ_NO_VALUES = {"Shape", "Size"}


def with_outputs(model: Any, names: Iterable[str], *, types: Mapping[str, int] | None = None) -> Any:
    """A copy of the model whose outputs are the named tensors, of any shape; ``types``: ONNX's, where not float32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for name in names:
        kind = (types or {}).get(name, onnx.TensorProto.FLOAT)
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return copy


def sampling_nodes(model: Any) -> frozenset[str]:
    """First outputs of the nodes that sample a map where the network says, and of all that computes where.

    That is a deformable convolution with its offsets and its mask, each back to the convolution that gives them. A
    position with the 8 or 11 bits of INT8 or fp16 is pixels off on a large map, so these nodes stay in float32.
    """
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    names: set[str] = set()
    steering: list[str] = []
    for node in model.graph.node:
        if node.op_type not in _STEERING_INPUTS:
            continue
        sampled = str(node.output[0])
        steering += [node.input[index] for index in _STEERING_INPUTS[node.op_type] if index < len(node.input)]
        masked = [r for r in readers.get(sampled, []) if node.op_type == "GridSample" and r.op_type == "Mul"]
        steering += [name for product in masked for name in product.input if name != sampled]
        names |= {sampled, *(str(product.output[0]) for product in masked)}
    return frozenset(names | _back_to_convolutions(model, steering))


def _back_to_convolutions(model: Any, tensors: list[str]) -> set[str]:
    """First outputs of the nodes that compute ``tensors``, back to the convolutions that begin the computation."""
    producers = {name: node for node in model.graph.node for name in node.output}
    names: set[str] = set()
    while tensors:
        node = producers.get(tensors.pop())
        if node is None or node.output[0] in names:
            continue
        names.add(str(node.output[0]))
        if node.op_type not in {"Conv", *_READ_NO_VALUES}:
            tensors.extend(node.input)
    return names


def opset_of(model: Any) -> int:
    """Version of the standard operator set."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))
