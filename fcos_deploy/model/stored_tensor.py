"""Tensors that are still in a file: shape and dtype are known, the numbers are read when they are wanted."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fcos_deploy.core.errors import CheckpointError

__all__ = ["ITEM_SIZES", "TRUNCATED", "Archive", "Storage", "StoredTensor", "TensorFacts", "count_of", "flat_values"]

TRUNCATED = "was the file copied completely?"

# The letters by which ``struct`` knows them; bfloat16, the upper half of a float32, is read as an integer.
_LETTERS = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "bfloat16": "H",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
    "bool": "?",
}

# Bytes of a number, by the names that NumPy and torch share; bfloat16 is only torch's.
ITEM_SIZES = {name: struct.calcsize("<" + letter) for name, letter in _LETTERS.items()}


class TensorFacts(Protocol):
    """What is asked of a tensor before a network is built; ``torch.Tensor`` answers it as well."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> object:
        """Its name, or what prints as ``torch.`` and its name."""

    def tolist(self) -> Any:  # Any: nested lists
        """The numbers."""


def count_of(tensor: TensorFacts) -> int:
    """How many numbers it has."""
    return math.prod(tensor.shape)


def flat_values(tensor: TensorFacts) -> list[float]:
    """Its numbers row by row; for small tensors."""
    numbers = tensor.tolist()
    for _ in tensor.shape[1:]:
        numbers = [number for row in numbers for number in row]
    return [float(number) for number in numbers] if tensor.shape else [float(numbers)]


@dataclass(slots=True, eq=False)
class Archive:
    """A file, and at which byte each run of numbers begins; filled in after tensors refer to them."""

    path: Path
    size: int  # bytes
    offsets: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of ``count`` numbers of an archive."""

    archive: Archive
    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor over a storage; ``offset`` and ``strides`` count numbers of ``dtype``."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def start(self) -> int:
        """The byte of the file at which the storage begins.

        Raises:
            CheckpointError: when the file does not hold the whole storage.
        """
        archive = self.storage.archive
        start = archive.offsets.get(self.storage.key)
        size = self.storage.count * ITEM_SIZES[self.storage.dtype]
        if start is None or size < 0 or start + size > archive.size:
            raise CheckpointError(
                f"'{archive.path}' lacks the data of tensor storage '{self.storage.key}'.", hint=TRUNCATED
            )
        return start

    @property
    def elements(self) -> int:
        """How many numbers of this tensor's dtype the storage holds."""
        return self.storage.count * ITEM_SIZES[self.storage.dtype] // ITEM_SIZES[self.dtype]

    def check(self) -> None:
        """Raise CheckpointError when the tensor is impossible, or reaches beyond its storage or the file."""
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(self.shape) != len(self.strides):
            raise CheckpointError(f"A tensor has the impossible shape {self.shape} and strides {self.strides}.")
        _ = self.start
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        # The second bound refuses tensors that repeat their elements without end (stride 0).
        if 0 not in self.shape and (last >= self.elements or math.prod(self.shape) > self.elements):
            raise CheckpointError(f"A tensor of shape {list(self.shape)} reaches beyond its {self.elements} elements.")

    def tolist(self) -> Any:  # Any: nested lists
        """The numbers, read from the file; for small tensors.

        Raises:
            CheckpointError: as ``check``, or the file became shorter.
        """
        self.check()
        return _nested(_numbers(self._read(), self.dtype), self.offset, shape=self.shape, strides=self.strides)

    def _read(self) -> bytes:
        size = self.elements * ITEM_SIZES[self.dtype]
        with self.storage.archive.path.open("rb") as stream:
            stream.seek(self.start)
            content = stream.read(size)
        if len(content) != size:
            raise CheckpointError(f"'{self.storage.archive.path}' became shorter while it was read.", hint=TRUNCATED)
        return content


def _numbers(content: bytes, dtype: str) -> Sequence[float]:
    numbers = struct.unpack(f"<{len(content) // ITEM_SIZES[dtype]}{_LETTERS[dtype]}", content)
    if dtype != "bfloat16":
        return numbers
    return struct.unpack(f"<{len(numbers)}f", b"".join(struct.pack("<I", number << 16) for number in numbers))


def _nested(
    numbers: Sequence[float], offset: int, *, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Any:  # Any: nested lists
    if not shape:
        return numbers[offset]
    if len(shape) == 1 and strides[0]:
        return list(numbers[offset : offset + shape[0] * strides[0] : strides[0]])
    return [
        _nested(numbers, offset + place * strides[0], shape=shape[1:], strides=strides[1:]) for place in range(shape[0])
    ]
