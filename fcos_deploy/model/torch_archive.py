"""Reads files of ``torch.save`` as data, memory-mapped: the zip format, and the one before torch 1.6."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.pickle_stubs import UnsafeGlobalError
from fcos_deploy.model.restricted_pickle import PickleHooks, read_pickle

__all__ = ["LEGACY_MAGIC", "TensorReference", "read_legacy_archive", "read_zip_archive"]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LARGEST_PICKLE = 256 << 20  # bytes; a checkpoint's structure takes less than 20 MB, its tensors are outside

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype

    def __call__(self) -> None:
        raise UnsafeGlobalError("The pickle makes a storage of its own.")


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of numbers in the file: ``count`` elements under ``key``."""

    archive: _Archive
    key: str
    dtype: torch.dtype
    count: int


class _Archive:
    """Where in a file each storage lies; ``offsets`` may be filled after the references were made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}
        self.seen: dict[str, _Storage] = {}
        self._bytes: Tensor | None = None

    def elements(self, storage: _Storage) -> Tensor:
        """The storage as a vector, over the mapped file where it is aligned."""
        start = self.offsets.get(storage.key)
        size = storage.count * storage.dtype.itemsize
        file_size = self.path.stat().st_size
        if start is None or storage.count < 0 or start + size > file_size:
            raise CheckpointError(f"'{self.path}' lacks the data of tensor storage '{storage.key}'.", hint=_TRUNCATED)
        if start % storage.dtype.itemsize:  # Old files do not align; a copy of mapped pages would count twice.
            return self._read(start, size).view(storage.dtype)
        if self._bytes is None:
            self._bytes = torch.from_file(str(self.path), shared=False, size=file_size, dtype=torch.uint8)
        return self._bytes[start : start + size].view(storage.dtype)

    def _read(self, start: int, size: int) -> Tensor:
        content = torch.empty(size, dtype=torch.uint8)
        with self.path.open("rb") as stream:
            stream.seek(start)
            if stream.readinto(content.numpy().data) != size:
                raise CheckpointError(f"'{self.path}' became shorter while it was read.", hint=_TRUNCATED)
        return content


_TRUNCATED = "was the file copied completely?"


@dataclass(frozen=True, slots=True)
class TensorReference:
    """A tensor that is still in the file."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def resolve(self) -> Tensor:
        """The tensor, over the mapped file.

        Raises:
            CheckpointError: when it reaches beyond its storage.
        """
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(self.shape) != len(self.strides):
            raise CheckpointError(f"A tensor has the impossible shape {self.shape} and strides {self.strides}.")
        elements = self.storage.archive.elements(self.storage)
        elements = elements if elements.dtype == self.dtype else elements.view(self.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        # The second bound refuses tensors that repeat their elements without end (stride 0).
        if 0 not in self.shape and (last >= len(elements) or math.prod(self.shape) > len(elements)):
            raise CheckpointError(f"A tensor of shape {list(self.shape)} reaches beyond its {len(elements)} elements.")
        return elements.as_strided(self.shape, self.strides, elements.storage_offset() + self.offset)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> TensorReference:
    if not isinstance(storage, _Storage):
        raise CheckpointError("A tensor in the file has no storage.")
    return TensorReference(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorReference:
    reference = _rebuild_tensor(storage, offset, shape, strides)
    dtype = rest[2] if len(rest) > 2 else None  # after requires_grad and backward hooks
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError("A tensor in the file has no dtype.")
    return dataclasses.replace(reference, dtype=dtype)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _size(shape: object = (), *_: object) -> object:
    return shape


def _device(*names: object) -> str:
    return ":".join(str(n)[:16] for n in names[:2])


def _hooks(archive: _Archive) -> PickleHooks:
    table: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
        ("torch", "Size"): _size,
        ("torch", "device"): _device,
    }
    for name, dtype in _STORAGE_DTYPES.items():
        for module in ("torch", "torch.storage", "torch.cuda"):
            table[module, name] = _StorageType(dtype)
    for dtype in set(_STORAGE_DTYPES.values()):
        table["torch", str(dtype).removeprefix("torch.")] = dtype
    return PickleHooks(table, lambda pid: _storage(pid, archive))


def _storage(pid: Any, archive: _Archive) -> _Storage:  # Any: a tuple, if the file is sound
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
        raise CheckpointError("The file refers to a storage in a way that torch does not.")
    if not isinstance(pid[2], str) or not isinstance(pid[4], int):
        raise CheckpointError("The file refers to a storage in a way that torch does not.")
    if len(pid) > 5 and pid[5] is not None:
        raise CheckpointError("The file has storages that share memory (torch before 0.4), which are not read.")
    storage = _Storage(archive, pid[2], pid[1].dtype, pid[4])
    archive.seen[storage.key] = storage
    return storage


def _checked_entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries of a torch zip file by name without its folder; nothing in it is compressed.

    Raises:
        CheckpointError: when the zip is damaged or is not one of ``torch.save``.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"'{path}' is a damaged zip file: {error}.", hint=_TRUNCATED) from error
    by_name = {entry.filename.partition("/")[2]: entry for entry in entries}
    if "data.pkl" not in by_name:
        shown = ", ".join(f"'{e.filename}'" for e in entries[:3])
        raise CheckpointError(f"'{path}' is a zip file, but not one of torch.save: it holds {shown or 'nothing'}.")
    if "constants.pkl" in by_name:
        raise CheckpointError(
            f"'{path}' is a TorchScript program, not a checkpoint.", hint="save the weights: torch.save(m.state_dict())"
        )
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or by_name["data.pkl"].file_size > _LARGEST_PICKLE:
        raise CheckpointError(f"'{path}' is compressed or has a structure of gigabytes; torch.save makes neither.")
    return by_name


def read_zip_archive(path: Path) -> Any:  # Any: whatever was saved
    """The object of a zip file of ``torch.save``, tensors as ``TensorReference``.

    Raises:
        CheckpointError: when it is damaged or names what is not data.
    """
    entries = _checked_entries(path)
    archive = _Archive(path)
    with path.open("rb") as stream:
        for name, entry in entries.items():
            if name.startswith("data/"):
                archive.offsets[name.removeprefix("data/")] = _data_offset(stream.fileno(), entry)
        order = _content(stream.fileno(), entries["byteorder"]) if "byteorder" in entries else b"little"
        content = _content(stream.fileno(), entries["data.pkl"])
    if order != b"little":
        raise CheckpointError(f"'{path}' was written on a big-endian machine, which is not read.")
    return read_pickle(content, hooks=_hooks(archive))


def _data_offset(descriptor: int, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose extra field differs from the directory's."""
    header = os.pread(descriptor, 30, entry.header_offset)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError("The zip file's directory does not fit its contents.", hint=_TRUNCATED)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + name + extra


def _content(descriptor: int, entry: zipfile.ZipInfo) -> bytes:
    return os.pread(descriptor, entry.file_size, _data_offset(descriptor, entry))


def read_legacy_archive(path: Path) -> Any:  # Any: whatever was saved
    """The object of a file that torch before 1.6 saved, tensors as ``TensorReference``.

    Raises:
        CheckpointError: when it is damaged or names what is not data.
    """
    archive = _Archive(path)
    hooks = _hooks(archive)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(3):  # magic number, protocol version, sizes of the C types
            read_pickle(data)
        content = read_pickle(data, hooks=hooks)
        keys = read_pickle(data)
        for key in keys if isinstance(keys, list) else []:
            storage = archive.seen.get(key) if isinstance(key, str) else None
            if storage is None or int.from_bytes(data.read(8), "little") != storage.count:
                raise CheckpointError(f"'{path}' lacks the data of tensor storage '{key}'.", hint=_TRUNCATED)
            archive.offsets[storage.key] = data.tell()
            data.seek(min(len(data), data.tell() + storage.count * storage.dtype.itemsize))
    return content
