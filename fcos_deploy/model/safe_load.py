"""Opens a checkpoint file without running anything in it (spec 8.8).

``torch.load(weights_only=True)`` is not used. It runs no code either, but a hostile file of a megabyte ends the process
(keys nested so deeply that hashing them overflows the C stack), sound files with ``argparse.Namespace`` or NumPy
scalars are refused, files from before torch 1.6 are not memory-mapped, and memory is not bounded by the file's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.model.restricted_pickle import PickleHooks, read_pickle
from fcos_deploy.model.safetensors_file import read_safetensors
from fcos_deploy.model.torch_archive import LEGACY_MAGIC, read_legacy_archive, read_zip_archive

__all__ = ["CheckpointFile", "open_checkpoint"]

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


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """What a file holds. ``reader`` says how it was read; ``metadata`` is that of a safetensors file.

    Tensors in ``content`` are ``StoredTensor`` or ``PickledArray``.
    """

    content: object
    reader: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(path: Path) -> CheckpointFile:
    """Read a checkpoint; tensors stay in the mapped file.

    Raises:
        CheckpointError: when it is missing, damaged, not a checkpoint, or names what is not data.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"Cannot read '{path}': {error.strerror or error}.") from error
    try:
        return _reader_for(path, head)(path)
    except CheckpointError as error:
        message = error.message if str(path) in error.message else f"'{path}': {error.message}"
        raise type(error)(message, hint=error.hint) from error
    except OSError as error:
        raise CheckpointError(f"Cannot read '{path}': {error.strerror or error}.") from error


def _reader_for(path: Path, head: bytes) -> Callable[[Path], CheckpointFile]:
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _read_zip
    if head.startswith(LEGACY_MAGIC):
        return _read_legacy
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _read_plain_pickle
    if not head:
        raise CheckpointError(f"'{path}' is empty.", hint=_EXPECTED)
    found = next((what for magic, what in _OTHER_FORMATS if head.startswith(magic)), None)
    text = all(32 <= b < 127 or b in b"\t\n\r" for b in head)
    found = found or (f"a text file beginning {head[:24].decode('ascii')!r}" if text else "of an unknown format")
    raise CheckpointError(f"'{path}' is not a checkpoint: it is {found}.", hint=_EXPECTED)


def _read_safetensors(path: Path) -> CheckpointFile:
    tensors, metadata = read_safetensors(path)
    return CheckpointFile(tensors, "safetensors", metadata)


def _read_zip(path: Path) -> CheckpointFile:
    return CheckpointFile(read_zip_archive(path), "torch")


def _read_legacy(path: Path) -> CheckpointFile:
    return CheckpointFile(read_legacy_archive(path), "torch before 1.6")


def _read_plain_pickle(path: Path) -> CheckpointFile:
    """detectron2's model zoo: ``{'model': {name: ndarray}, '__author__': ...}``."""
    with path.open("rb") as stream:
        return CheckpointFile(read_pickle(_Bounded(stream, path.stat().st_size), hooks=PickleHooks({})), "pickle")


class _Bounded:
    """A stream that never allocates more for a read than the file holds, whatever length a pickle claims."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self.readline = stream.readline

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""
        return self._stream.read(size if 0 <= size < 4096 else min(size, self._size))
