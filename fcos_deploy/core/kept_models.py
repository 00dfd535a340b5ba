"""Compiled models that a runtime keeps between processes, each authenticated by the secret of the user who kept it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.local_trust import authenticate, own_file_bytes, own_folder, write_own_file

__all__ = ["CACHE_VARIABLE", "KeptModel"]

_LOG = logging.getLogger(__name__)

CACHE_VARIABLE = "FCOS_DEPLOY_CACHE"  # a folder; empty turns the caches off
_KEPT = 16  # compiled models per backend; a bundle has one to three, and each takes about what its engine does
_PURPOSE = "kept model"
_MAC_BYTES = 64  # in hexadecimal, in front of the contents


class KeptModel:
    """The compiled form of one model for one runtime, version, device and set of options, which ``facts`` name.

    A runtime executes what it loads from here, so nothing is returned that this user did not keep for these facts.
    """

    def __init__(self, backend: str, *, facts: Mapping[str, str], folder: Path | None = None) -> None:
        """``folder``: where to keep it; None takes the user's cache, unless that is off or cannot be trusted.

        Raises:
            ConfigError: ``folder`` cannot be written, or others own it or can write it.
        """
        self._facts = json.dumps({**facts, "backend": backend}, sort_keys=True).encode()
        place = own_folder(folder) if folder is not None else _users_place(backend)
        if folder is not None:
            authenticate(_PURPOSE, b"")  # A user without a place for the secret can keep nothing, which is said here.
        self._path = place / f"{hashlib.sha256(self._facts).hexdigest()[:32]}.kept" if place else None

    @property
    def enabled(self) -> bool:
        """Whether there is a place for it."""
        return self._path is not None

    def load(self) -> bytes | None:
        """What was kept; None when nothing was, or something that this user did not keep, which is removed."""
        if self._path is None:
            return None
        content = own_file_bytes(self._path)
        if content is not None and hmac.compare_digest(content[:_MAC_BYTES], self._mac(content[_MAC_BYTES:])):
            with contextlib.suppress(OSError):
                self._path.touch()
            return content[_MAC_BYTES:]
        self.drop()
        return None

    def drop(self) -> None:
        """Forget it: the runtime does not take it."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)

    def store(self, content: bytes) -> None:
        """Keep ``content``; a disk that is full only costs the time to compile again."""
        if self._path is None:
            return
        try:
            write_own_file(self._path, self._mac(content) + content)
            entries = sorted(self._path.parent.glob("*.kept"), key=lambda entry: entry.stat().st_mtime)
            for entry in entries[:-_KEPT]:
                entry.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("What was compiled for this machine is not kept: %s", error)

    def _mac(self, content: bytes) -> bytes:
        return authenticate(_PURPOSE, self._facts + b"\0" + content).encode()


def _users_place(backend: str) -> Path | None:
    """The folder of this backend in the user's cache; None where that is off, cannot be written or not be trusted."""
    root = os.environ.get(CACHE_VARIABLE)
    try:
        if root is None:
            root = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fcos-deploy"))
        if not root:
            return None
        authenticate(_PURPOSE, b"")
        return own_folder(own_folder(Path(root)) / backend)
    except (ConfigError, RuntimeError) as error:  # RuntimeError: a user id that the machine does not know has no home
        _LOG.info("compiled models are not kept: %s", error)
        return None
