"""Files that are either complete under their name or not there, bounded reads, locks, and copies nobody can change.

What only POSIX systems have (flags of ``open``, folders that can be synced, ``flock``) is looked up here.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import hashlib
import importlib
import os
import shutil
import stat
import sys
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fcos_deploy.core.errors import ChecksumError, ConfigError

__all__ = [
    "MAX_TEXT_BYTES",
    "PrivateFiles",
    "atomic_directory",
    "atomic_file",
    "checked_bytes",
    "copy_file",
    "decoded_text",
    "lock_file",
    "open_flags",
    "open_regular",
    "read_file",
    "replace_folder",
    "require_name",
    "require_writable",
    "restore_folder",
    "scratch_directory",
    "sha256_file",
    "sync_folder",
    "sync_tree",
    "write_text",
]


MAX_TEXT_BYTES = 64 << 20  # of a sidecar, a calibration or another file of ours that is read whole
_LOCKED_BYTE = 1 << 40  # beyond the end of any file that is locked, so that Windows lets others read the file meanwhile


def open_flags(*names: str) -> int:
    """Flags of ``os.open`` such as ``"O_NOFOLLOW"``, without those that this system does not have; never text mode."""
    flags = 0
    for name in ("O_CLOEXEC", "O_BINARY", *names):
        flags |= getattr(os, name, 0)
    return flags


def lock_file(descriptor: int, *, wait: bool = True) -> None:
    """Lock an open file for this process; the system unlocks it when it is closed, also by the death of the process.

    Raises:
        BlockingIOError: another process has it locked, and ``wait`` is False.
    """
    try:
        fcntl = importlib.import_module("fcntl")
    except ModuleNotFoundError:
        msvcrt = importlib.import_module("msvcrt")
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process has it locked") from error
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def open_regular(path: Path, *, follow_links: bool = True) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device, which may have no end, is refused without waiting for it.

    Raises:
        OSError: it cannot be opened, is not a regular file, or is a link that is not to be followed.
    """
    # Without O_NONBLOCK opening a pipe waits for its writer; for a regular file it means nothing.
    flags = os.O_RDONLY | open_flags("O_NONBLOCK", *(() if follow_links else ("O_NOFOLLOW",)))
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: Path, *, limit: int, follow_links: bool = True) -> bytes:
    """The contents of a regular file of at most ``limit`` bytes.

    Raises:
        OSError: as ``open_regular``, or it is larger.
    """
    with open_regular(path, follow_links=follow_links) as stream:
        # The size first: a file of gigabytes is not read up to the limit, and a small one asks for little memory.
        size = os.fstat(stream.fileno()).st_size
        content = b"" if size > limit else stream.read(size + 1)
        if len(content) > size:  # it grew, or is one of /proc, which has no size
            content += stream.read(limit - size)
        if os.fstat(stream.fileno()).st_size > limit or len(content) > limit:
            raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
    return content


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk: without its name a power cut loses a file.

    Windows cannot open folders; there it does nothing.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | open_flags("O_DIRECTORY"))
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know it, as some network ones
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all files and names below ``folder`` are on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open_regular(Path(parent, name), follow_links=False) as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(parent))


def require_name(path: Path) -> None:
    """Refuse names that must not be taken: ``.``, ``..``, ``/``, devices and pipes.

    A file takes its name by replacing what is there, and root can replace ``/dev/null``.

    Raises:
        ConfigError: for these.
    """
    if path.name in ("", ".."):
        raise ConfigError(f"'{path}' has no name to write under.", hint="give the name of a file or a new folder")
    try:
        mode = path.stat().st_mode  # of what a link leads to, since /dev/stdout is one
    except (OSError, ValueError):  # nothing is there; a name that no file can have fails when it is written
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"'{path}' is a device or a pipe, which is not replaced.", hint="give the name of a file")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, same suffix; it takes the name when the block ends, goes when it fails.

    When this returns, file and name are on the disk.

    Raises:
        ConfigError: when the file cannot be written. An OSError of the block about another file stays what it is.
    """
    require_name(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``; it takes the place of the folder ``path`` when the block ends.

    When this returns, all that is in it is on the disk.

    Raises:
        ConfigError: when ``path`` is a file or cannot be written. An OSError of the block about another file stays what
            it is.
    """
    require_name(path)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"'{path}' is a file, a folder was to be written.", hint="choose another name")
    with scratch_directory(path) as temporary:
        yield temporary
        sync_tree(temporary)
        replace_folder(temporary, path)  # an older folder then lies at ``temporary``


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``, where there is room for what it is made from.

    Raises:
        ConfigError: when it cannot be written. An OSError of the block about another file stays what it is.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with _writing(path):
            temporary.mkdir(parents=True)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError about ``path`` into a ConfigError; one of the block about another file stays what it is."""
    try:
        yield
    except OSError as error:
        if _is_of_another_file(error, path):
            raise
        raise _unwritable(path, error) from error


def replace_folder(new: Path, target: Path) -> None:
    """Move ``new`` to ``target``; an older ``target`` is swapped with it and afterwards lies at ``new``.

    Where the file system cannot swap (NFS, some overlays) it takes two moves; ``restore_folder`` repairs what a power
    cut between them leaves.

    Raises:
        OSError: both folders are then where they were.
    """
    if not target.exists():
        new.rename(target)
    elif not _swap(new, target):
        restore_folder(target)
        target.rename(_aside(target))
        try:
            new.rename(target)
        except OSError:
            _aside(target).rename(target)
            raise
        _aside(target).rename(new)
    sync_folder(target.parent)


def restore_folder(target: Path) -> None:
    """Bring back the older folder when ``replace_folder`` was interrupted between its two moves."""
    aside = _aside(target)
    if aside.exists() and not target.exists():
        aside.rename(target)
    elif aside.exists():
        shutil.rmtree(aside)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _swap(first: Path, second: Path) -> bool:
    """``renameat2`` with RENAME_EXCHANGE, for which Python has no function; False where it is not supported."""
    at_current_folder, rename_exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    rename = None
    if sys.platform.startswith("linux"):
        rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(at_current_folder, os.fsencode(first), at_current_folder, os.fsencode(second), rename_exchange):
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL, errno.EXDEV):
            return False
        raise OSError(code, os.strerror(code), str(second))
    return True


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
    require_name(path)
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


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file, which is not a link, to ``target``, whose folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source, follow_links=False) as stream, target.open("wb") as copy:
        shutil.copyfileobj(stream, copy, _BLOCK)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with open_regular(path) as stream:
        return _hash(stream)


def _hash(stream: BinaryIO, *, copy: BinaryIO | None = None) -> str:
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK):
        digest.update(block)
        if copy is not None:
            copy.write(block)
    return digest.hexdigest()


_BLOCK = 1 << 20


class PrivateFiles:
    """Copies of files, each compared with its hash while it is made; they last until ``close``.

    A copy is a file in memory, sealed against writing, behind a link in a folder of this user (mode 0700). Where the
    system has no such files the copy lies in that folder.
    """

    def __init__(self) -> None:
        """Make the folder."""
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
        """As ``add``, for what follows no links: the copy itself lies in the folder."""
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
    with open_regular(source, follow_links=False) as stream:
        _require(_hash(stream, copy=target), sha256, source)


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


# UTF-32 first: its mark begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decoded_text(content: bytes) -> str:
    """The text of a file in UTF-8, with or without byte order mark, or in UTF-16 or UTF-32 with one.

    Raises:
        ValueError: it is in none of them.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 (byte {error.start})") from error
