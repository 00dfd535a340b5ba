"""Files that are either complete under their name or not there, and where compiled models are cached."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from fcos_deploy.core.errors import ConfigError

__all__ = [
    "CACHE_VARIABLE",
    "atomic_directory",
    "atomic_file",
    "model_cache_dir",
    "require_writable",
    "sha256_file",
    "write_text",
]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, same suffix; it takes the name when the block ends, goes when it fails.

    Raises:
        ConfigError: when the file cannot be written. An OSError of the block about another file stays what it is.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if _is_of_another_file(error, path):
            raise
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; it takes the place of the folder ``path`` when the block ends.

    Raises:
        ConfigError: when ``path`` is a file or cannot be written. An OSError of the block about another file stays what
            it is.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"'{path}' is a file, a folder was to be written.", hint="choose another name")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _take_place(temporary, path)
    except OSError as error:
        if _is_of_another_file(error, path):
            raise
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_of_another_file(error: OSError, path: Path) -> bool:
    """Whether the error names files, none of which is ``path``, its temporary, or in or above one of them."""
    names = [n for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, os.PathLike))]
    own = path.absolute()
    for named in (Path(os.fsdecode(name)).absolute() for name in names):
        # The temporary lies beside the file, and its name contains the file's.
        if any(part.parent == own.parent and own.stem in part.name for part in (named, *named.parents)):
            return False
        if named in own.parents:
            return False
    return bool(names)


def require_writable(path: Path) -> None:
    """Find out before a step of minutes, not after it, that its file ``path`` cannot be written; makes its folder.

    Raises:
        ConfigError: naming the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot write '{path}': {error.strerror or error}.", hint="choose a folder that exists and can be written"
    )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


CACHE_VARIABLE = "FCOS_DEPLOY_CACHE"  # a folder; empty turns the caches off
_KEPT = 16  # compiled models per backend; a bundle has one to three, and each takes about what its engine does


def model_cache_dir(backend: str, *, key: str) -> Path | None:
    """The cache folder of this backend and model, created if missing; None where caching is off or cannot be written.

    ``key`` names the model by its contents, so that a changed file under the same path never gets a stale entry. Of
    each backend the most recently used entries remain.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = os.environ.get(CACHE_VARIABLE, Path(base, "fcos-deploy"))
    if not root:
        return None
    folder = Path(root, backend, key)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.touch()
        entries = sorted((e for e in folder.parent.iterdir() if e.is_dir()), key=lambda e: e.stat().st_mtime)
        for entry in entries[:-_KEPT]:
            shutil.rmtree(entry, ignore_errors=True)
    except OSError:
        return None  # A read-only home only costs the time to compile.
    return folder if os.access(folder, os.W_OK) else None
