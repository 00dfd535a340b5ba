"""Reads files of ``torch.save`` as data, memory-mapped: the zip format, and the one before torch 1.6."""

from __future__ import annotations

import mmap
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.pickle_stubs import UnsafeGlobalError
from fcos_deploy.model.restricted_pickle import PickleHooks, read_pickle
from fcos_deploy.model.stored_tensor import ITEM_SIZES, TRUNCATED, Archive, Storage, StoredTensor

__all__ = ["LEGACY_MAGIC", "read_legacy_archive", "read_zip_archive"]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LARGEST_PICKLE = 256 << 20  # bytes; a checkpoint's structure takes less than 20 MB, its tensors are outside

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}


@dataclass(frozen=True, slots=True)
class _Dtype:
    """In place of ``torch.float32`` and the like."""

    name: str

    def __call__(self) -> None:
        raise UnsafeGlobalError("The pickle calls a dtype.")


@dataclass(frozen=True, slots=True)
class _StorageType:
    """In place of ``torch.FloatStorage`` and the like."""

    dtype: str

    def __call__(self) -> None:
        raise UnsafeGlobalError("The pickle makes a storage of its own.")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise CheckpointError("A tensor in the file has no storage.")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    stored = _rebuild_tensor(storage, offset, shape, strides)
    dtype = rest[2] if len(rest) > 2 else None  # after requires_grad and backward hooks
    if not isinstance(dtype, _Dtype):
        raise CheckpointError("A tensor in the file has no dtype.")
    return replace(stored, dtype=dtype.name)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _size(shape: object = (), *_: object) -> object:
    return shape


def _device(*names: object) -> str:
    return ":".join(str(n)[:16] for n in names[:2])


def _hooks(archive: Archive, seen: dict[str, Storage]) -> PickleHooks:
    """``seen`` receives each storage that the pickle refers to."""
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
    for dtype in ITEM_SIZES:
        table["torch", dtype] = _Dtype(dtype)
    return PickleHooks(table, lambda pid: _storage(pid, archive, seen))


def _storage(pid: Any, archive: Archive, seen: dict[str, Storage]) -> Storage:  # Any: a tuple, if the file is sound
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
        raise CheckpointError("The file refers to a storage in a way that torch does not.")
    if not isinstance(pid[2], str) or not isinstance(pid[4], int):
        raise CheckpointError("The file refers to a storage in a way that torch does not.")
    if len(pid) > 5 and pid[5] is not None:
        raise CheckpointError("The file has storages that share memory (torch before 0.4), which are not read.")
    storage = Storage(archive, pid[2], pid[1].dtype, pid[4])
    seen[storage.key] = storage
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
        raise CheckpointError(f"'{path}' is a damaged zip file: {error}.", hint=TRUNCATED) from error
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
    """The object of a zip file of ``torch.save``, tensors as ``StoredTensor``.

    Raises:
        CheckpointError: when it is damaged or names what is not data.
    """
    entries = _checked_entries(path)
    archive = Archive(path, path.stat().st_size)
    with path.open("rb") as stream:
        for name, entry in entries.items():
            if name.startswith("data/"):
                archive.offsets[name.removeprefix("data/")] = _data_offset(stream.fileno(), entry)
        order = _content(stream.fileno(), entries["byteorder"]) if "byteorder" in entries else b"little"
        content = _content(stream.fileno(), entries["data.pkl"])
    if order != b"little":
        raise CheckpointError(f"'{path}' was written on a big-endian machine, which is not read.")
    return read_pickle(content, hooks=_hooks(archive, {}))


def _data_offset(descriptor: int, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose extra field differs from the directory's."""
    header = os.pread(descriptor, 30, entry.header_offset)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError("The zip file's directory does not fit its contents.", hint=TRUNCATED)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + name + extra


def _content(descriptor: int, entry: zipfile.ZipInfo) -> bytes:
    return os.pread(descriptor, entry.file_size, _data_offset(descriptor, entry))


def read_legacy_archive(path: Path) -> Any:  # Any: whatever was saved
    """The object of a file that torch before 1.6 saved, tensors as ``StoredTensor``.

    Raises:
        CheckpointError: when it is damaged or names what is not data.
    """
    archive, seen = Archive(path, path.stat().st_size), dict[str, Storage]()
    hooks = _hooks(archive, seen)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(3):  # magic number, protocol version, sizes of the C types
            read_pickle(data)
        content = read_pickle(data, hooks=hooks)
        keys = read_pickle(data)
        for key in keys if isinstance(keys, list) else []:
            storage = seen.get(key) if isinstance(key, str) else None
            if storage is None or int.from_bytes(data.read(8), "little") != storage.count:
                raise CheckpointError(f"'{path}' lacks the data of tensor storage '{key}'.", hint=TRUNCATED)
            archive.offsets[storage.key] = data.tell()
            data.seek(min(len(data), data.tell() + storage.count * ITEM_SIZES[storage.dtype]))
    return content
