"""What a machine trusts: bundles by their signers' keys, and files that this user made here by a secret of the user."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.enums import StrEnum
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import open_flags, open_regular

__all__ = [
    "CACHE_VARIABLE",
    "STATE_VARIABLE",
    "KeptModel",
    "Trust",
    "VersionMemory",
    "authenticate",
    "is_own",
    "own_file_bytes",
    "own_folder",
    "state_folder",
    "write_own_file",
]

_LOG = logging.getLogger(__name__)


class VersionMemory(StrEnum):
    """What opening a signed bundle does with the highest version of it that this user has opened."""

    RAISE = "raise"  # refuses an older one, and remembers this one
    COMPARE = "compare"  # refuses an older one
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a bundle must be to be opened; the defaults ask for nothing.

    ``public_keys``: PEM texts or files, of which one must have signed it. ``local_builds``: layers that this user built
    on this device count beside it without a signature. ``name``: what it must be called. ``min_version``: the lowest
    version that it must be signed as. ``memory``: what becomes of the versions that were opened before.
    """

    public_keys: tuple[Path | str, ...] = ()
    local_builds: bool = False
    name: str = ""
    min_version: int = 0
    memory: VersionMemory = VersionMemory.RAISE

    def __post_init__(self) -> None:
        """Refuse a version without a key, since anybody can claim one."""
        if self.min_version and not self.public_keys:
            raise ConfigError(
                "A lowest version needs a key: only a signature says which version a bundle is.",
                hint="give the signer's public key: --public-key KEY.pub.pem",
            )


STATE_VARIABLE = "FCOS_DEPLOY_STATE"  # a folder
_SECRET_BYTES = 32


def is_own(facts: os.stat_result, *, others: int = 0o022) -> bool:
    """Whether this user owns it and others have none of the permissions ``others``, by default to write.

    Windows has neither owners nor permissions in these numbers; there its own access control lists are relied on.
    """
    if not hasattr(os, "geteuid"):
        return True
    return facts.st_uid == os.geteuid() and not facts.st_mode & others


def state_folder() -> Path:
    """Where keys, the secret and layers of read-only bundles are kept: a folder of this user alone, made if missing.

    Raises:
        ConfigError: it cannot be made, or others own it or can write it.
    """
    try:
        return own_folder(_user_folder(STATE_VARIABLE, "XDG_STATE_HOME", ".local/state"))
    except RuntimeError as error:
        raise ConfigError(
            "This user has no home folder.", hint=f"name a folder in the variable {STATE_VARIABLE}"
        ) from error


def _user_folder(variable: str, base: str, default: str) -> Path:
    """What ``variable`` names, or a folder of ours in the one that ``base`` names or, below the home, ``default``.

    Raises:
        RuntimeError: there is no home: the machine does not know the user's id.
    """
    return Path(os.environ.get(variable) or Path(os.environ.get(base) or Path.home() / default, "fcos-deploy"))


def own_folder(path: Path) -> Path:
    """``path`` as a folder that only this user can write, made with mode 0700 if it is missing.

    Refused are folders of other users and those that others can write: such a one may have been put there beforehand.

    Raises:
        ConfigError: naming what is wrong.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = path.lstat()
    except OSError as error:
        raise ConfigError(f"The folder '{path}' cannot be written: {error.strerror or error}.") from error
    if not stat.S_ISDIR(facts.st_mode) or not is_own(facts):
        if not stat.S_ISDIR(facts.st_mode):
            what = "is a link" if stat.S_ISLNK(facts.st_mode) else "is no folder"
        else:
            what = "can be written by others" if is_own(facts, others=0) else f"belongs to user {facts.st_uid}"
        raise ConfigError(
            f"The folder '{path}' {what}, so nothing in it can be trusted.",
            hint="remove it, name another one, or chmod 700 it if it is yours",
        )
    if not os.access(path, os.W_OK):
        raise ConfigError(f"The folder '{path}' cannot be written.", hint="choose a folder you can write")
    return path


def own_file_bytes(path: Path, *, private: bool = False) -> bytes | None:
    """The contents of a plain file of this user that others cannot write; None for anything else or none.

    ``private``: nor read.
    """
    try:
        with open_regular(path, follow_links=False) as stream:
            others = 0o077 if private else 0o022
            return stream.read() if is_own(os.fstat(stream.fileno()), others=others) else None
    except OSError:
        return None


def write_own_file(path: Path, *content: bytes, replace: bool = True) -> bool:
    """Write ``content``, which may come in parts, with mode 0600, complete or not at all; whether it was written.

    Without ``replace`` a file that is there stays, also one that another process writes at the same moment.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | open_flags(), 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.writelines(content)
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            temporary.replace(path)
        else:
            os.link(temporary, path)  # fails where the name is taken, unlike a rename
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return True


def authenticate(purpose: str, *message: bytes | memoryview) -> str:
    """The HMAC-SHA256 of ``message`` under this user's secret, in hexadecimal; compare with ``hmac.compare_digest``.

    The message may come in parts. ``purpose`` keeps what is authenticated for one use from being taken for another.

    Raises:
        ConfigError: this user has no place for a secret.
    """
    code = hmac.new(_secret(), f"fcos-deploy {purpose}, version 1\n".encode(), hashlib.sha256)
    for part in message:
        code.update(part)
    return code.hexdigest()


def _secret() -> bytes:
    """The user's secret, made on first use; a file of another length is what a power cut left, and is made anew."""
    path = state_folder() / "secret"
    for _ in range(3):
        content = own_file_bytes(path, private=True)
        if content is not None and len(content) == _SECRET_BYTES:
            return content
        try:
            if content is not None:
                path.unlink(missing_ok=True)
            if not write_own_file(path, secrets.token_bytes(_SECRET_BYTES), replace=False) and content is None:
                content = own_file_bytes(path, private=True)
                if content is None:
                    break
        except OSError as error:
            raise ConfigError(f"The secret '{path}' cannot be written: {error.strerror or error}.") from error
    raise ConfigError(
        f"The secret '{path}' can be read or written by others, so it is no secret.",
        hint="remove it: a new one is made, and what it authenticated is built again",
    )


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
        model = memoryview(content or b"")[_MAC_BYTES:]  # hundreds of megabytes, which are not copied to be hashed
        if content is not None and hmac.compare_digest(content[:_MAC_BYTES], self._mac(model)):
            with contextlib.suppress(OSError):
                self._path.touch()
            return bytes(model)
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
            write_own_file(self._path, self._mac(content), content)
            entries = sorted(self._path.parent.glob("*.kept"), key=lambda entry: entry.stat().st_mtime)
            for entry in entries[:-_KEPT]:
                entry.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("What was compiled for this machine is not kept: %s", error)

    def _mac(self, content: bytes | memoryview) -> bytes:
        return authenticate(_PURPOSE, self._facts + b"\0", content).encode()


def _users_place(backend: str) -> Path | None:
    """The folder of this backend in the user's cache; None where that is off, cannot be written or not be trusted."""
    if os.environ.get(CACHE_VARIABLE) == "":
        return None
    try:
        authenticate(_PURPOSE, b"")
        return own_folder(own_folder(_user_folder(CACHE_VARIABLE, "XDG_CACHE_HOME", ".cache")) / backend)
    except (ConfigError, RuntimeError) as error:
        _LOG.info("compiled models are not kept: %s", error)
        return None
