"""A bundle as one .tar file."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path, PurePosixPath

from fcos_deploy.bundle.manifest import check_relative_path
from fcos_deploy.core.errors import BundleError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.model_files import is_checkpoint

__all__ = ["is_archive", "pack_files", "unpack"]

_MAX_MEMBERS = 20_000
_MAX_BYTES = 64 << 30
_MAX_NAME = 1024
_BLOCK = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a file named ``*.tar`` that is not a checkpoint, as ``model.pth.tar`` is."""
    return path.suffix == ".tar" and path.is_file() and not is_checkpoint(path)


def pack_files(root: Path, *, names: list[str], output: Path) -> None:
    """Write the files ``names`` of ``root`` to the uncompressed archive ``output``.

    The archive is the same byte for byte for the same contents: sorted names, no times, no owners.
    """
    with atomic_file(output) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(names):
            member = tarfile.TarInfo(name)
            member.size = (root / name).stat().st_size
            member.mode = 0o644
            with (root / name).open("rb") as stream:
                archive.addfile(member, stream)


def unpack(path: Path, folder: Path) -> None:
    """Extract a bundle's archive into the empty ``folder``.

    Only plain files and folders with plain relative names are accepted; nothing is written beyond the archive's own
    size, so that neither sparse members nor compression can fill a disk.

    Raises:
        BundleError: the archive is damaged, contains anything else, or does not fit the disk.
    """
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="strict") as archive:
            _extract(archive, folder, limit=min(path.stat().st_size, _MAX_BYTES))
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, RecursionError) as error:
        raise BundleError(f"'{path}' is not a bundle's archive: {error}.", hint="copy it again") from error
    except OSError as error:
        raise BundleError(f"Cannot unpack '{path}': {error.strerror or error}.") from error


def _extract(archive: tarfile.TarFile, folder: Path, *, limit: int) -> None:
    """``limit`` bounds the bytes of all members together: an uncompressed archive cannot hold more than its size."""
    remaining, seen = min(limit, shutil.disk_usage(folder).free), set[str]()
    for count, member in enumerate(archive, 1):
        if count > _MAX_MEMBERS:
            raise BundleError(f"The archive has more than {_MAX_MEMBERS} members.")
        name = member.name
        if len(name) > _MAX_NAME:
            raise BundleError("The archive has a member whose name is too long.")
        check_relative_path(name)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or name in seen:
            raise BundleError(f"Member '{name}' of the archive is not a plain file, or occurs twice.")
        seen.add(name)
        remaining -= member.size
        if member.size < 0 or remaining < 0:
            raise BundleError(f"Member '{name}' of the archive is larger than the archive or than the free space.")
        _write(archive, member, folder.joinpath(*PurePosixPath(name).parts))


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
