"""Opens a checkpoint file without torch: files of ``torch.save`` (new and old), safetensors, plain pickles.

Tensors stay in the file. Their shapes and dtypes are known at once, their numbers are read when they are asked for. The
weights are every state dict of a network in it, in whichever container and wrapper a training script put them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.checkpoints.pickle_reader import MAX_AXES, Inert, PickledArray, read_pickle
from fcos_deploy.core.artifact import CheckpointFormat, checkpoint_format
from fcos_deploy.core.checkpoint_options import OPTION
from fcos_deploy.core.errors import CheckpointError, ConfigError, brief
from fcos_deploy.core.files import open_regular
from fcos_deploy.core.serialize import unique_keys

__all__ = [
    "ITEM_SIZES",
    "CheckpointFile",
    "StoredTensor",
    "StoredWeights",
    "TensorFacts",
    "count_of",
    "find_weights",
    "flat_values",
    "open_checkpoint",
]

# Names that NumPy and torch share (bfloat16 is only torch's), the letters of ``struct``, and what safetensors and the
# storages of torch call them. bfloat16, the upper half of a float32, is read as an integer.
_DTYPES = (
    ("float64", "d", "F64", "Double"),
    ("float32", "f", "F32", "Float"),
    ("float16", "e", "F16", "Half"),
    ("bfloat16", "H", "BF16", "BFloat16"),
    ("int64", "q", "I64", "Long"),
    ("int32", "i", "I32", "Int"),
    ("int16", "h", "I16", "Short"),
    ("int8", "b", "I8", "Char"),
    ("uint8", "B", "U8", "Byte"),
    ("bool", "?", "BOOL", "Bool"),
)
_LETTERS = {name: letter for name, letter, _, _ in _DTYPES}
_SAFETENSORS_DTYPES = {code: name for name, _, code, _ in _DTYPES}
_STORAGE_DTYPES = {"UntypedStorage": "uint8", **{f"{prefix}Storage": name for name, _, _, prefix in _DTYPES}}

# Bytes of a number.
ITEM_SIZES = {name: struct.calcsize("<" + letter) for name, letter in _LETTERS.items()}

_INCOMPLETE = "was the file copied completely?"
_MOST_VALUES = 8192
_LARGEST_SIZE = 1 << 62  # of an axis or a place in a file


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
    """Its numbers row by row; for small tensors.

    Raises:
        CheckpointError: it has more than 8192, four times the channels of the widest layer that is read this way.
    """
    count = count_of(tensor)
    if count > _MOST_VALUES:
        raise CheckpointError(f"A tensor of {brief(count)} numbers stands where one for each channel should.")
    numbers = tensor.tolist()
    for _ in tensor.shape[1:]:
        numbers = [number for row in numbers for number in row]
    return [float(number) for number in numbers] if tensor.shape else [float(numbers)]


@dataclass(slots=True, eq=False)
class _Archive:
    """A file, and its storages by key with the byte at which each begins. Filled in after tensors refer to them."""

    path: Path
    size: int  # bytes
    storages: dict[str, _Storage] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Storage:
    """A run of ``count`` numbers of an archive."""

    archive: _Archive
    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor over a storage; ``offset`` and ``strides`` count numbers of ``dtype``."""

    storage: _Storage
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
                f"'{archive.path}' lacks the data of tensor storage {brief(self.storage.key)}.", hint=_INCOMPLETE
            )
        return start

    @property
    def elements(self) -> int:
        """How many numbers of this tensor's dtype the storage holds."""
        return self.storage.count * ITEM_SIZES[self.storage.dtype] // ITEM_SIZES[self.dtype]

    def check(self) -> None:
        """Raise CheckpointError when the tensor is impossible, or reaches beyond its storage or the file."""
        numbers = (self.offset, *self.shape, *self.strides)
        possible = all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in numbers)
        if not possible or len(self.shape) != len(self.strides):
            raise CheckpointError("A tensor has a shape, strides or an offset that no tensor can have.")
        _ = self.start
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        # The second bound refuses tensors that repeat their elements without end (stride 0).
        if 0 not in self.shape and (last >= self.elements or math.prod(self.shape) > self.elements):
            raise CheckpointError(f"A tensor of shape {list(self.shape)} reaches beyond its {self.elements} elements.")

    def read(self) -> NDArray[Any]:
        """A copy of its numbers alone, of a storage that may be gigabytes; those of bfloat16 as uint16.

        Raises:
            CheckpointError: as ``check``, or the file became shorter.
        """
        self.check()
        item, dtype = ITEM_SIZES[self.dtype], np.dtype("<" + _LETTERS[self.dtype])
        path, place = self.storage.archive.path, self.start + self.offset * ITEM_SIZES[self.dtype]
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if place + reach * item > len(data):
                raise CheckpointError(f"'{path}' became shorter while it was read.", hint=_INCOMPLETE)
            # Mapped, so that only the pages of the numbers are read, however far apart they lie.
            flat = np.frombuffer(data, dtype, reach, place)
            numbers = np.array(np.lib.stride_tricks.as_strided(flat, self.shape, [s * item for s in self.strides]))
            del flat  # before the map is closed
        return numbers

    def tolist(self) -> Any:  # Any: nested lists
        """The numbers, read from the file; for small tensors.

        Raises:
            CheckpointError: as ``read``.
        """
        numbers = self.read()
        if self.dtype == "bfloat16":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.tolist()


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """What a file holds. ``reader`` says how it was read; ``metadata`` is that of a safetensors file.

    Tensors in ``content`` are ``StoredTensor`` or ``PickledArray``.
    """

    content: object
    reader: str
    metadata: Mapping[str, str] = field(default_factory=dict)


_EXPECTED = "expected a file of torch.save (.pth, .pt), a safetensors file, or a detectron2 .pkl"
_OTHER_FORMATS = (
    (b"\x89HDF", "an HDF5 (Keras) file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x7fELF", "an executable"),
    (b"<?xml", "an XML file (OpenVINO models are built from ONNX)"),
    (b"\x08", "perhaps an ONNX file, which needs no export"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run 'git lfs pull')"),
)


def open_checkpoint(path: Path) -> CheckpointFile:
    """Read a checkpoint; tensors stay in the file.

    Raises:
        CheckpointError: when it is missing, damaged, not a checkpoint, or names what is not data.
    """
    try:
        with open_regular(path) as stream:
            head = stream.read(64)
        return _reader_for(path, head)(path)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "it takes more memory than there is"
        raise CheckpointError(f"Cannot read '{path}': {reason}.") from error
    except CheckpointError as error:
        message = error.message if str(path) in error.message else f"'{path}': {error.message}"
        raise type(error)(message, hint=error.hint) from error
    except Exception as error:  # A damaged container can fail in any way; none of them is a bug here.
        raise CheckpointError(f"'{path}' is damaged: {type(error).__name__}.", hint=_INCOMPLETE) from error


def _reader_for(path: Path, head: bytes) -> Callable[[Path], CheckpointFile]:
    written_as = checkpoint_format(head, size=path.stat().st_size)
    if written_as is not None:
        return _READERS[written_as]
    if not head:
        raise CheckpointError(f"'{path}' is empty.", hint=_EXPECTED)
    kind = next((name for magic, name in _OTHER_FORMATS if head.startswith(magic)), "of an unknown format")
    if kind == "of an unknown format" and all(32 <= byte < 127 or byte in b"\t\n\r" for byte in head):
        kind = f"a text file beginning {head[:24].decode('ascii')!r}"
    raise CheckpointError(f"'{path}' is not a checkpoint: it is {kind}.", hint=_EXPECTED)


# ---- safetensors: the length of the header in 8 bytes, the header in JSON, the numbers ----

_LARGEST_HEADER = 16 << 20  # bytes, of the 100 MB that the format allows: FCOS has hundreds of tensors


def _read_safetensors(path: Path) -> CheckpointFile:
    archive = _Archive(path, path.stat().st_size)
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > min(_LARGEST_HEADER, archive.size - 8):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique_keys)
        metadata = dict(header.pop("__metadata__", {}))
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        tensors = {name: _safetensor(name, entry, archive, begin=8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = error.args[0][:200] if error.args and isinstance(error.args[0], str) else type(error).__name__
        raise CheckpointError(f"'{path}' is a damaged safetensors file: {reason}.", hint=_INCOMPLETE) from error
    return CheckpointFile(tensors, "safetensors", metadata)


def _safetensor(name: str, entry: dict[str, Any], archive: _Archive, *, begin: int) -> StoredTensor:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{brief(name)} is of type {brief(entry['dtype'])}, which is not read")
    dtype, sizes = _SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
    first, end = entry["data_offsets"]
    shape = tuple(sizes) if isinstance(sizes, list) and len(sizes) <= MAX_AXES else (None,)
    if not all(type(n) is int and 0 <= n < _LARGEST_SIZE for n in (first, end, *shape)):
        raise ValueError(f"{brief(name)} has an impossible shape or place")
    count = math.prod(shape)
    if end - first != count * ITEM_SIZES[dtype] or begin + end > archive.size:
        raise ValueError(f"{brief(name)} of shape {list(shape)} does not lie in bytes {first} to {end}")
    archive.offsets[name] = begin + first
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return StoredTensor(_Storage(archive, name, dtype, count), 0, shape, strides, dtype)


# ---- torch.save: a pickle that refers to storages outside of itself ----

_LARGEST_PICKLE = 256 << 20  # bytes; a checkpoint's structure takes less than 20 MB, its tensors are outside
_LARGEST_DIRECTORY = 16 << 20  # bytes of a zip file's list of entries; a thousand tensors take 0.1 MB


def _read_zip(path: Path) -> CheckpointFile:
    """Since torch 1.6: a zip file of one folder with ``data.pkl``, and ``data/0``, ``data/1``, ... uncompressed."""
    try:
        with path.open("rb") as stream:
            # Before ZipFile reads it: each entry becomes an object of half a kilobyte.
            end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]  # the standard library's, not in its stubs
        if end and end[zipfile._ECD_SIZE] > _LARGEST_DIRECTORY:  # type: ignore[attr-defined]  # as above
            raise ValueError("its directory takes megabytes")
        with zipfile.ZipFile(path) as container:
            entries = {entry.filename.partition("/")[2]: entry for entry in container.infolist()}
            shown = ", ".join(map(brief, container.namelist()[:3]))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise CheckpointError(f"'{path}' is a damaged zip file: {error}.", hint=_INCOMPLETE) from error
    if "data.pkl" not in entries:
        raise CheckpointError(f"'{path}' is a zip file, but not one of torch.save: it holds {shown or 'nothing'}.")
    if "constants.pkl" in entries:
        raise CheckpointError(
            f"'{path}' is a TorchScript program, not a checkpoint.", hint="save the weights: torch.save(m.state_dict())"
        )
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
    if compressed or entries["data.pkl"].file_size > _LARGEST_PICKLE:
        raise CheckpointError(f"'{path}' is compressed or has a structure of gigabytes; torch.save makes neither.")
    archive = _Archive(path, path.stat().st_size)
    with path.open("rb") as stream:
        for name, entry in entries.items():
            if name.startswith("data/"):
                archive.offsets[name.removeprefix("data/")] = _data_offset(stream.fileno(), entry)
        order = _content(stream.fileno(), entries["byteorder"], limit=16) if "byteorder" in entries else b"little"
        pickled = _content(stream.fileno(), entries["data.pkl"], limit=archive.size)
    if order != b"little":
        raise CheckpointError(f"'{path}' was written on a big-endian machine, which is not read.")
    return CheckpointFile(_read_torch_pickle(pickled, archive), "torch")


def _data_offset(descriptor: int, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose extra field differs from the directory's."""
    # 30 bytes, the lengths of name and extra field at 26 and 28, then these two (zip's APPNOTE, 4.3.7).
    header = os.pread(descriptor, 30, entry.header_offset)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise CheckpointError("The zip file's directory does not fit its contents.", hint=_INCOMPLETE)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + name + extra


def _content(descriptor: int, entry: zipfile.ZipInfo, *, limit: int) -> bytes:
    return os.pread(descriptor, min(entry.file_size, limit), _data_offset(descriptor, entry))


def _read_legacy(path: Path) -> CheckpointFile:
    """Before torch 1.6: pickles one after another, then the keys of the storages, then size and numbers of each."""
    archive = _Archive(path, path.stat().st_size)
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(3):  # magic number, protocol version, sizes of the C types
            read_pickle(data)
        content = _read_torch_pickle(data, archive)
        keys = read_pickle(data)
        for key in keys if isinstance(keys, list) else []:
            storage = archive.storages.get(key) if isinstance(key, str) else None
            if storage is None or int.from_bytes(data.read(8), "little") != storage.count:
                raise CheckpointError(f"'{path}' lacks the data of tensor storage {brief(key)}.", hint=_INCOMPLETE)
            archive.offsets[storage.key] = data.tell()
            data.seek(min(len(data), data.tell() + storage.count * ITEM_SIZES[storage.dtype]))
    return CheckpointFile(content, "torch before 1.6")


@dataclass(frozen=True, slots=True)
class _Dtype:
    """In place of ``torch.float32`` and the like."""

    name: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    """In place of ``torch.FloatStorage`` and the like."""

    dtype: str


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise CheckpointError("A tensor in the file has no storage.")
    if not all(isinstance(sizes, (tuple, list)) and len(sizes) <= MAX_AXES for sizes in (shape, strides)):
        raise CheckpointError(f"A tensor in the file has more than {MAX_AXES} axes, or no shape.")
    return StoredTensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StoredTensor:
    stored = _rebuild_tensor(storage, offset, shape, strides)
    dtype = rest[2] if len(rest) > 2 else None  # after requires_grad and backward hooks
    if not isinstance(dtype, _Dtype):
        raise CheckpointError("A tensor in the file has no dtype.")
    return replace(stored, dtype=dtype.name)


def _first(value: object = (), *_: object) -> object:
    return value


# A storage type or a dtype that a pickle calls is an error of its own: they are not callable.
_TORCH_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch", "Size"): _first,
    ("torch", "device"): Inert,
    **{
        (module, name): _StorageType(dtype)
        for module in ("torch", "torch.storage", "torch.cuda")
        for name, dtype in _STORAGE_DTYPES.items()
    },
    **{("torch", dtype): _Dtype(dtype) for dtype in ITEM_SIZES},
}


def _read_torch_pickle(source: Any, archive: _Archive) -> Any:  # Any: a stream or bytes; whatever was pickled
    """A pickle of torch; each storage that it refers to is entered into ``archive.storages``."""

    def storage(pid: Any) -> _Storage:  # Any: ("storage", type, key, location, count, ...) if the file is sound
        sound = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)
        if not sound or not isinstance(pid[2], str) or type(pid[4]) is not int or not 0 <= pid[4] < _LARGEST_SIZE:
            raise CheckpointError("The file refers to a storage in a way that torch does not.")
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError("The file has storages that share memory (torch before 0.4), which are not read.")
        archive.storages[pid[2]] = _Storage(archive, pid[2], pid[1].dtype, pid[4])
        return archive.storages[pid[2]]

    return read_pickle(source, known=_TORCH_GLOBALS, storage=storage)


# ---- plain pickles ----


def _read_plain_pickle(path: Path) -> CheckpointFile:
    """detectron2's model zoo: ``{'model': {name: ndarray}, '__author__': ...}``."""
    with path.open("rb") as stream:
        return CheckpointFile(read_pickle(_Bounded(stream, path.stat().st_size)), "pickle")


class _Bounded:
    """A stream that never allocates more for a read than the file holds, whatever length a pickle claims."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.readline = stream.readline

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""
        return self._stream.read(size if 0 <= size < 4096 else min(size, self._size))


_READERS: dict[CheckpointFormat, Callable[[Path], CheckpointFile]] = {
    CheckpointFormat.TORCH: _read_zip,
    CheckpointFormat.TORCH_LEGACY: _read_legacy,
    CheckpointFormat.SAFETENSORS: _read_safetensors,
    CheckpointFormat.PICKLE: _read_plain_pickle,
}


_PLAIN = frozenset(
    ("", "state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params")
)
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged|shadow)(?:[._]|$)")
# Components of names that wrappers add, wherever they stand: DataParallel and FSDP, torch.compile, activation
# checkpoints, Lightning's strategies.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
_BACKBONE = re.compile(r"(?:^|\.)backbone\.")  # how the tensors of every ecosystem's backbone begin
# What is stored with a network and belongs to its training: counters of thop, buffers of losses and metrics.
_OF_TRAINING = re.compile(
    r"n_averaged|(?:.*\.)?total_(?:ops|params)|(?:criterion|loss(?:es|_\w+)?|metrics?|\w+_metrics?)\..+"
)
# Bounds of a state dict. The largest FCOS has 1,400 tensors with names of 80 characters; weights that are shared
# between modules are stored once and named twice.
_MAX_TENSORS = 20_000
_MAX_NAME = 512
_MAX_SHARED = 8
_DEEPEST = 3  # containers within containers
_SAME_NETWORK = 0.9  # share of names that two sets of weights of one network have in common

_Tensors = dict[str, "StoredTensor | PickledArray"]


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Tensors by the names that they have in the file, without wrappers' prefixes.

    ``metadata`` is all that the file holds beside them; ``container`` is the key they were under, or ''; ``source``
    says who chose it. ``left_out``: tensors beside them that are not the network's.
    """

    tensors: Mapping[str, TensorFacts]
    metadata: dict[str, Any]  # Any: whatever a training script stored
    container: str
    source: str = ""
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _WeightSet:
    """One state dict: ``name`` is its container's, with the prefix where that tells it from another."""

    name: str
    tensors: _Tensors
    left_out: tuple[str, ...] = ()

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(self.name.lower()) is not None


def find_weights(content: object, *, prefer: str = "") -> StoredWeights:
    """The state dict in the contents of a file.

    ``prefer`` is 'ema', 'model', the name of a container, or '' for the averaged weights where there are any, which is
    what torchvision's reference scripts evaluate.

    Raises:
        CheckpointError: when there is none, or a tensor reaches beyond the file.
        ConfigError: when ``prefer`` asks for weights that the file does not hold, or has to say which.
    """
    if not isinstance(content, dict):
        raise CheckpointError(
            f"The file holds a {type(content).__name__}, expected a dict of tensors.",
            hint="save the weights: torch.save(model.state_dict(), path)",
        )
    state_dicts = list(_state_dicts(content, seen=set()))
    if any(len(tensors) > _MAX_TENSORS or max(map(len, tensors)) > _MAX_NAME for _, tensors in state_dicts):
        raise CheckpointError("The file has more tensors, or longer names, than an FCOS can have.")
    sets = _of_one_network([item for path, tensors in state_dicts for item in _split(path, tensors)])
    if not sets:
        keys = ", ".join(map(brief, list(content)[:6]))
        raise CheckpointError(f"The file holds no tensors, only {keys or 'nothing'}.")
    # mmengine's EMA hook swaps, so that its ``state_dict`` holds the averaged weights.
    meta = content.get("meta")
    swapped = "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)
    chosen, source = _choose(sets, prefer=prefer, swapped=swapped)
    for name, value in chosen.tensors.items():
        try:
            value.check()
        except CheckpointError as error:
            raise CheckpointError(f"Tensor '{name}': {error.message}", hint=error.hint) from error
    _refuse_multiples(chosen.tensors.values())
    metadata: dict[str, Any] = {
        name: chosen.tensors[name] for name in ("pixel_mean", "pixel_std") if name in chosen.tensors
    }
    containers = {item.name.partition(".")[0] for item in sets}
    metadata |= {
        key: value
        for key, value in content.items()
        if key not in containers and not isinstance(value, (StoredTensor, PickledArray))
    }
    return StoredWeights(chosen.tensors, metadata, chosen.name, source, chosen.left_out)


def _refuse_multiples(tensors: Iterable[StoredTensor | PickledArray]) -> None:
    """Raise CheckpointError when many tensors repeat few stored bytes: loaded they would take terabytes."""
    stored: dict[object, int] = {}
    claimed, file_size = 0, sys.maxsize
    for tensor in tensors:
        if isinstance(tensor, StoredTensor):
            archive, item = tensor.storage.archive, ITEM_SIZES[tensor.storage.dtype]
            stored[archive.path, tensor.start] = tensor.storage.count * item
            claimed += count_of(tensor) * ITEM_SIZES[tensor.dtype]
            file_size = archive.size  # Entries of a zip file may overlap.
        else:
            stored[tensor.stored_at] = tensor.nbytes
            claimed += tensor.nbytes
    if claimed > _MAX_SHARED * min(file_size, sum(stored.values())):
        raise CheckpointError(f"The tensors together have more than {_MAX_SHARED} times the numbers that are stored.")


def _state_dicts(
    content: Mapping[Any, Any], path: str = "", depth: int = 0, *, seen: set[int]
) -> Iterator[tuple[str, _Tensors]]:
    """Every mapping of names to tensors in ``content``, with the keys that lead to it; each once, as ``seen`` tells."""
    if id(content) in seen:
        return
    seen.add(id(content))
    tensors = {n: v for n, v in content.items() if isinstance(n, str) and isinstance(v, (StoredTensor, PickledArray))}
    if tensors:
        yield path, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _state_dicts(value, f"{path}.{key}".removeprefix("."), depth + 1, seen=seen)


def _split(path: str, stored: _Tensors) -> list[_WeightSet]:
    """The networks in one mapping: one for each prefix under which there is a backbone.

    Raises:
        CheckpointError: two names differ only by a wrapper, or FSDP has flattened the parameters.
    """
    flat = next((name for name in stored if "_flat_param" in name), None)
    if flat is not None:
        raise CheckpointError(
            f"'{flat}' holds parameters that FSDP has flattened.", hint="save a full state dict (FULL_STATE_DICT)"
        )
    tensors: _Tensors = {}
    for name, value in stored.items():
        plain = _WRAPPERS.sub("", name)
        if plain in tensors:
            raise CheckpointError(f"Tensor '{plain}' is stored twice, by the names of two wrappers.")
        tensors[plain] = value
    prefixes = Counter(name[: m.end() - len("backbone.")] for name in tensors if (m := _BACKBONE.search(name)))
    if not prefixes:
        return [_WeightSet(path, {n: v for n, v in tensors.items() if n != "n_averaged"})]
    sets = []
    # Longer prefixes first, so that the shortest, which may be empty, gets what is left.
    for prefix in sorted(prefixes, key=len, reverse=True):
        own = [name for name in tensors if name.startswith(prefix)]
        of_network = {name.removeprefix(prefix): tensors.pop(name) for name in own}
        left_out = tuple(name for name in of_network if _OF_TRAINING.fullmatch(name))
        kept = {name: value for name, value in of_network.items() if name not in left_out}
        name = ".".join(filter(None, (path, prefix.rstrip(".") if len(prefixes) > 1 else "")))
        sets.append(_WeightSet(name, kept, left_out))
    beside = tuple(sorted(tensors))  # under none of the prefixes
    return [_WeightSet(item.name, item.tensors, (*item.left_out, *beside)) for item in reversed(sets)]


def _of_one_network(sets: list[_WeightSet]) -> list[_WeightSet]:
    """The largest set, and those of the same network: optimizers' states are not."""
    backbones = [item for item in sets if any(_BACKBONE.match(name) for name in item.tensors)]
    candidates = backbones or sets
    if not candidates:
        return []
    largest = max(candidates, key=lambda item: len(item.tensors))
    needed = _SAME_NETWORK * len(largest.tensors)
    return [item for item in candidates if len(item.tensors.keys() & largest.tensors.keys()) >= needed]


def _choose(sets: list[_WeightSet], *, prefer: str, swapped: bool) -> tuple[_WeightSet, str]:
    """The set that is asked for, or the one that the file's own convention evaluates, and who decided it."""
    averaged = [item for item in sets if item.is_averaged]
    plain = [item for item in sets if item.name.rpartition(".")[2] in _PLAIN and not item.is_averaged]
    names = ", ".join(f"'{item.name}'" if item.name else "the file's own" for item in sets)
    if swapped and len(averaged) == len(plain) == 1:
        averaged, plain = plain, averaged
    named = [item for item in sets if prefer and item.name == prefer]
    if prefer == "ema" and not (named or averaged):
        raise ConfigError("The file holds no averaged (EMA) weights.", hint="leave --weights out")
    if prefer and not named:
        named = {"ema": averaged, "model": plain or (sets if len(sets) == 1 else [])}.get(prefer, [])
    if len(named) == 1:
        return named[0], OPTION
    if prefer and not named:
        raise ConfigError(f"The file holds no weights '{prefer}', only {names}.", hint="--weights NAME, one of these")
    if not prefer and len(sets) == 1:
        return sets[0], "the only weights in the file"
    if not prefer and len(sets) == 2 and len(averaged) == len(plain) == 1:
        rule = (
            "mmengine's: 'state_dict' has the averaged weights" if swapped else "averaged weights are what is evaluated"
        )
        return averaged[0], f"rule: {rule}; '{plain[0].name}' has the others"
    raise ConfigError(
        f"The file holds {len(sets)} sets of weights: {names}. Which of them was evaluated, it does not say.",
        hint="choose one with --weights NAME",
    )
