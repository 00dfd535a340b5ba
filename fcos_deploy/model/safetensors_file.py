"""Reads the header of a safetensors file: an 8-byte length, JSON, and the numbers behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.stored_tensor import ITEM_SIZES, TRUNCATED, Archive, Storage, StoredTensor

__all__ = ["read_safetensors"]

_LARGEST_HEADER = 100 << 20  # bytes; the format's own limit
_METADATA = "__metadata__"

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name, still in the file, and the file's metadata.

    Raises:
        CheckpointError: a damaged header, or one that does not fit the file.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            archive = Archive(path, path.stat().st_size)
            if length > min(_LARGEST_HEADER, archive.size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
        metadata = {str(key): str(value) for key, value in dict(header.pop(_METADATA, {})).items()}
        return {name: _tensor(name, entry, archive, begin=8 + length) for name, entry in header.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is a damaged safetensors file: {error}.", hint=TRUNCATED) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(name: str, entry: dict[str, Any], archive: Archive, *, begin: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"'{name}' is of type {entry['dtype']}, which is not read")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    first, end = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (first, end, *shape)):
        raise ValueError(f"'{name}' has an impossible shape or place")
    count = math.prod(shape)
    if end - first != count * ITEM_SIZES[dtype] or begin + end > archive.size:
        raise ValueError(f"'{name}' of shape {list(shape)} does not lie in bytes {first} to {end}")
    archive.offsets[name] = begin + first
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return StoredTensor(Storage(archive, name, dtype, count), 0, shape, strides, dtype)
