"""Whether a model file takes batches of any size, read without the frameworks."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fcos_deploy.bundle.artifact import Artifact
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import BackendLoadError
from fcos_deploy.core.protobuf_wire import ByteSource, length_delimited_fields

__all__ = ["largest_batch"]

_ANY = 1 << 16
# ModelProto.graph, GraphProto.input, ValueInfoProto.type, TypeProto.tensor_type, TypeProto.Tensor.shape
_TO_SHAPE = (7, 11, 2, 1, 2)
_DIMENSION, _DIMENSION_NAME = 1, 2
_IR_INPUT = re.compile(rb'<layer[^>]*type="Parameter"[^>]*>\s*<data[^>]*shape="([^",]*)')


def largest_batch(path: Path, artifact: Artifact) -> int:
    """1 for a fixed batch, otherwise the largest that it takes.

    Raises:
        BackendLoadError: when the file is not of its kind.
    """
    if artifact.requires.max_batch:
        return artifact.requires.max_batch
    look = _LOOK.get(artifact.kind)
    return _ANY if look is not None and look(path) else 1


def _onnx_is_dynamic(path: Path) -> bool:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            shapes = list(_shapes(data, 0, len(data), _TO_SHAPE))
            return bool(shapes) and all(_first_is_dynamic(data, *shape) for shape in shapes)
        except (IndexError, ValueError) as error:
            raise BackendLoadError(f"'{path}' is not a complete ONNX file.") from error


def _shapes(data: ByteSource, start: int, end: int, fields: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    if not fields:
        yield start, end
        return
    for number, first, last in length_delimited_fields(data, start=start, end=end):
        if number == fields[0]:
            yield from _shapes(data, first, last, fields[1:])


def _first_is_dynamic(data: ByteSource, start: int, end: int) -> bool:
    """A dimension with a name, or with nothing, is dynamic; one with a number has no length-delimited field."""
    for number, first, last in length_delimited_fields(data, start=start, end=end):
        if number == _DIMENSION:
            named = any(n == _DIMENSION_NAME for n, _, _ in length_delimited_fields(data, start=first, end=last))
            return named or first == last
    return False


def _ir_is_dynamic(path: Path) -> bool:
    batches = _IR_INPUT.findall(path.read_bytes())
    return bool(batches) and all(not batch.isdigit() for batch in batches)


_LOOK: dict[ArtifactKind, Callable[[Path], bool]] = {
    ArtifactKind.ONNX: _onnx_is_dynamic,
    ArtifactKind.OPENVINO_IR: _ir_is_dynamic,
}
