"""Puts a finished folder in the place of an older one, so that at every moment one of the two is there."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

__all__ = ["replace_folder", "restore_folder"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def replace_folder(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``; an older ``target`` is swapped with it and afterwards lies at ``new``.

    Where the file system cannot swap (NFS, some overlays) it takes two moves; ``restore_folder`` repairs what a power
    cut between them leaves.

    Raises:
        OSError: both folders are then where they were.
    """
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        target.rename(_aside(target))
        new.rename(target)
        _aside(target).rename(new)
    _sync(target.parent)


def restore_folder(target: Path) -> None:
    """Bring back the older folder when ``replace_folder`` was interrupted between its two moves."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    elif aside.exists():
        shutil.rmtree(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _exchange(first: Path, second: Path) -> bool:
    """``renameat2`` with RENAME_EXCHANGE, for which Python has no function; False where it is not supported."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV):
            return False
        raise OSError(code, os.strerror(code), str(second))
    return True


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
