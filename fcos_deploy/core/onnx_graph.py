"""ONNX graphs: opened once and passed on in place of a path; written whole, with the contract that travels in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text, read_contract
from fcos_deploy.core.errors import BackendLoadError
from fcos_deploy.core.files import atomic_file, sha256_file
from fcos_deploy.core.libraries import lazy_import

__all__ = [
    "NAMES_KEY",
    "OnnxGraph",
    "fits_one_file",
    "opset_of",
    "sampling_nodes",
    "save_onnx",
    "tensor_bytes",
    "with_contract",
    "without_initializers",
]

onnx = lazy_import("onnx", extra="export")

# JSON list by class channel, as the graph counts, for people and for tools that don't know the contract.
NAMES_KEY = "fcos_deploy.class_names"


class OnnxGraph:
    """One ONNX file. Every property is computed when it is first asked for, and only then.

    Raises:
        BackendLoadError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise BackendLoadError(f"'{path}' is not there.")
        self.path = path

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, in hexadecimal."""
        return sha256_file(self.path)

    @cached_property
    def contract(self) -> ModelContract:
        """The contract that the file carries.

        Raises:
            BackendLoadError: it carries none, or is damaged.
        """
        return read_contract(self.path)

    @cached_property
    def model(self) -> Any:  # an onnx.ModelProto; the onnx package has no types
        """The checked model. Everyone shares it, so nobody changes it.

        Raises:
            BackendLoadError: the file is not a complete ONNX model.
            MissingDependencyError: onnx is not installed.
        """
        load, check = onnx.load, onnx.checker.check_model  # outside of the try: onnx may be missing
        try:
            model = load(str(self.path))
            # What does not fit into one message is checked as a file.
            check(model if fits_one_file(model) else str(self.path))
        except Exception as error:  # protobuf's and the checker's own exceptions have no common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise BackendLoadError(
                f"'{self.path}' is not a complete ONNX model: {reason}.", hint="export it again"
            ) from error
        return model


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
    inside = [0 if head.is_whole else tensor_bytes(t) for head, t in zip(heads, model.graph.initializer, strict=True)]
    length = len(graph) + sum(len(head.content) for head in heads) + sum(inside)
    yield shell.SerializeToString(deterministic=True) + _GRAPH + _varint(length) + graph
    for head, tensor in zip(heads, model.graph.initializer, strict=True):
        yield head.content
        if not head.is_whole:
            yield from _pieces(tensor, folder)


class _InitializerHead(NamedTuple):
    """The field of an initializer up to its raw numbers, or all of it where they are stored otherwise."""

    content: bytes
    is_whole: bool


def _initializer_head(tensor: Any, folder: Path | None) -> _InitializerHead:
    outside = folder is not None and bool(tensor.external_data)
    if not outside and not tensor.raw_data:
        whole = tensor.SerializeToString(deterministic=True)
        return _InitializerHead(_INITIALIZER + _varint(len(whole)) + whole, is_whole=True)
    facts = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    size = tensor_bytes(tensor)
    head = facts.SerializeToString(deterministic=True) + _RAW_DATA + _varint(size)
    return _InitializerHead(_INITIALIZER + _varint(len(head) + size) + head, is_whole=False)


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
