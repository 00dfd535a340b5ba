"""Copies that nobody can change any more, so that a runtime opens by path exactly the bytes that were checked."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

from fcos_deploy.core.errors import ChecksumError, ConfigError
from fcos_deploy.core.files import open_regular

__all__ = ["PrivateFiles", "checked_bytes"]

_BLOCK = 1 << 20


class PrivateFiles:
    """Copies of files, each compared with its hash while it is made; they last until ``close``.

    A copy is a file in memory, sealed against writing, behind a link in a folder of this user (mode 0700). Where the
    system has no such files the copy lies in that folder.
    """

    def __init__(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: there is no place for it.
        """
        self._folder = _private_folder()
        self._descriptors: list[int] = []
        self.close = weakref.finalize(self, _remove, self._folder, self._descriptors)

    def add(self, name: str, source: Path, *, sha256: str) -> Path:
        """A copy of ``source`` that is called ``name``, a path relative to the folder of all copies.

        Raises:
            ChecksumError: the file has another hash.
            OSError: it cannot be read, or there is no room.
        """
        target = self._place(name)
        if not target.is_symlink():
            try:
                descriptor = os.memfd_create(target.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            except (AttributeError, OSError):  # another system, or one that forbids it
                return self.add_on_disk(name, source, sha256=sha256)
            self._descriptors.append(descriptor)
            with os.fdopen(os.dup(descriptor), "wb") as stream:
                _copy(source, stream, sha256=sha256)
            fcntl = importlib.import_module("fcntl")  # is there where files in memory are
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            # By the number of this process, which is right in its children too.
            target.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
            if not target.exists():  # /proc is not mounted
                target.unlink()
                return self.add_on_disk(name, source, sha256=sha256)
        return target

    def add_on_disk(self, name: str, source: Path, *, sha256: str) -> Path:
        """As ``add``, for what follows no links: the copy itself lies in the folder.

        Raises:
            ChecksumError, OSError: as ``add``.
        """
        target = self._place(name)
        if not target.exists():
            with target.open("xb") as stream:
                _copy(source, stream, sha256=sha256)
        return target

    def _place(self, name: str) -> Path:
        target = self._folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def _private_folder() -> Path:
    problem = None
    for parent in (None, "/dev/shm"):  # noqa: S108  (a new folder in it, of this user alone)
        try:
            return Path(tempfile.mkdtemp(prefix="fcos-deploy-", dir=parent))
        except OSError as error:
            problem = error
    raise ConfigError(
        f"There is no place for temporary files: {problem}.", hint="name a folder that you can write in TMPDIR"
    ) from problem


def checked_bytes(source: Path, *, sha256: str) -> bytes:
    """The contents of a file, read once.

    Raises:
        ChecksumError: they have another hash.
        OSError: the file cannot be read.
    """
    with open_regular(source, follow_links=False) as stream:
        content = stream.read()
    _require(hashlib.sha256(content).hexdigest(), sha256, source)
    return content


def _copy(source: Path, target: BinaryIO, *, sha256: str) -> None:
    digest = hashlib.sha256()
    with open_regular(source, follow_links=False) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            target.write(block)
    _require(digest.hexdigest(), sha256, source)


def _require(present: str, expected: str, source: Path) -> None:
    if present != expected:
        raise ChecksumError(
            f"'{source}' was changed after it was checked: its SHA-256 must be {expected[:16]}..., it is "
            f"{present[:16]}....",
            hint="let nobody write the bundle while it is used, and run the command again",
        )


def _remove(folder: Path, descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)
