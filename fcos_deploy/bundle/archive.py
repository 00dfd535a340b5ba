"""A bundle as one .tar file."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fcos_deploy.bundle.manifest import (
    DIGEST_NAME,
    LAYERS_FOLDER,
    LOG_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MODEL_SIGNATURE_NAME,
    SIGNATURE_NAME,
    check_relative_path,
)
from fcos_deploy.core.errors import BundleError, ChecksumError, FcosDeployError
from fcos_deploy.core.files import atomic_file, open_regular
from fcos_deploy.core.model_files import is_checkpoint

__all__ = ["is_archive", "pack_files", "unpack"]

_MAX_MEMBERS = 20_000
_MAX_BYTES = 64 << 30
_MAX_NAME = 1024
_MAX_HEADER = 1 << 16  # bytes of an extended header: names of 1024 characters and times
_FIRST = (MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME)
_BLOCK = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a file named ``*.tar`` that is not a checkpoint, as ``model.pth.tar`` is."""
    return path.suffix == ".tar" and path.is_file() and not is_checkpoint(path)


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self.digest.update(block)
        return block


def pack_files(root: Path, *, files: Mapping[str, str], output: Path) -> None:
    """Write ``files`` of ``root``, by their names with the SHA-256 of each or '', to the uncompressed ``output``.

    The archive is the same byte for byte for the same contents: sorted names, no times, no owners.

    Raises:
        ChecksumError: a file has another hash.
    """
    with atomic_file(output) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, sha256 in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.mode = 0o644
            with open_regular(root / name, follow_links=False) as stream:
                member.size = os.fstat(stream.fileno()).st_size
                hashing = _Hashing(stream)
                archive.addfile(member, hashing)
            if sha256 and hashing.digest.hexdigest() != sha256:
                raise ChecksumError(f"'{root / name}' was changed while it was packed.", hint="pack it again")


class _Member(tarfile.TarInfo):
    """A member whose extended header, which tarfile reads whole, is bounded."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # documented as to be overridden
        return member


def unpack(path: Path, folder: Path, *, sizes: Callable[[], Mapping[str, int]] | None = None) -> None:
    """Extract a bundle's archive into the empty ``folder``.

    Only plain files and folders with plain relative names are accepted; nothing is written beyond the archive's own
    size, so that neither sparse members nor compression can fill a disk. ``sizes`` is called when manifest and
    signature are extracted, before anything else is, for what the manifest lists: other files and other sizes are
    refused.

    Raises:
        BundleError: the archive is damaged, contains anything else, or does not fit the disk.
    """
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="strict", tarinfo=_Member) as archive:
            members = _members(archive, limit=min(path.stat().st_size, _MAX_BYTES, shutil.disk_usage(folder).free))
            for name in (name for name in members if name in _FIRST):
                if members[name].size > MAX_MANIFEST_BYTES:
                    raise BundleError(f"Member '{name}' of the archive is larger than any manifest.")
                _write(archive, members[name], folder / name)
            listed = sizes() if sizes else None
            for name, member in members.items():
                # Layers are of a device, and no part of an archive; 'tar' takes them along.
                if name in _FIRST or (listed is not None and name.startswith(f"{LAYERS_FOLDER}/")):
                    continue
                unlisted = name == LOG_NAME or (name == MODEL_SIGNATURE_NAME and member.size <= MAX_MANIFEST_BYTES)
                if listed is not None and not unlisted and listed.get(name) != member.size:
                    raise ChecksumError(f"Member '{name}' of the archive is not what its manifest lists.")
                _write(archive, member, folder.joinpath(*PurePosixPath(name).parts))
    except FcosDeployError:
        raise
    except (tarfile.TarError, EOFError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise BundleError(f"'{path}' is not a bundle's archive: {error}.", hint="copy it again") from error
    except OSError as error:
        raise BundleError(f"Cannot unpack '{path}': {error.strerror or error}.") from error


def _members(archive: tarfile.TarFile, *, limit: int) -> dict[str, tarfile.TarInfo]:
    """The plain files by their names in the bundle, from their headers alone.

    ``tar cf cells.tar cells/`` puts the folder's name before all of them, ``tar cf cells.tar -C cells .`` a dot.
    ``limit`` bounds the bytes of all members together: an uncompressed archive cannot hold more than its size.
    """
    remaining, seen = limit, dict[str, tarfile.TarInfo]()
    for count, member in enumerate(archive, 1):
        if count > _MAX_MEMBERS:
            raise BundleError(f"The archive has more than {_MAX_MEMBERS} members.")
        name = member.name.removeprefix("./")
        if len(name) > _MAX_NAME:
            raise BundleError("The archive has a member whose name is too long.")
        if member.isdir() and name == ".":
            continue
        check_relative_path(name)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or name in seen:
            raise BundleError(f"Member '{name}' of the archive is not a plain file, or occurs twice.")
        seen[name] = member
        remaining -= member.size
        if member.size < 0 or remaining < 0:
            raise BundleError(f"Member '{name}' of the archive is larger than the archive or than the free space.")
    prefix = next(iter(seen), "").partition("/")[0] + "/"
    if MANIFEST_NAME not in seen and prefix + MANIFEST_NAME in seen and all(name.startswith(prefix) for name in seen):
        return {name.removeprefix(prefix): member for name, member in seen.items()}
    return seen


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = archive.extractfile(member)
    if source is None:
        raise BundleError(f"Member '{member.name}' of the archive cannot be read.")
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with source, target.open("xb") as stream:
        while left > 0:
            block = source.read(min(_BLOCK, left))
            if not block:
                raise BundleError(f"Member '{member.name}' of the archive is truncated.")
            stream.write(block)
            left -= len(block)
