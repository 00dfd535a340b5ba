"""Opens a bundle, whose files are checked against its manifest before they are parsed, and keeps its log."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fcos_deploy.bundle.archive import is_archive, is_layout, pack_files, unpack
from fcos_deploy.bundle.manifest import (
    DIGEST_NAME,
    LAYERS_FOLDER,
    LOG_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    SIGNATURE_NAME,
    UNLISTED,
    Artifact,
    FileRecord,
    Manifest,
    parse_manifest,
)
from fcos_deploy.bundle.signature import (
    Envelope,
    check_envelope,
    check_signature,
    require_no_rollback,
    sign_manifest,
    write_model_signature,
)
from fcos_deploy.core.errors import (
    BackendLoadError,
    BundleError,
    BundleReplacedError,
    ChecksumError,
    ConfigError,
    SignatureError,
    some_names,
)
from fcos_deploy.core.files import PrivateFiles, checked_bytes, lock_file, read_file, sha256_file
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.onnx_file import external_locations
from fcos_deploy.core.progress import map_ahead
from fcos_deploy.core.trust import Trust

__all__ = [
    "Bundle",
    "append_log",
    "check_external_data",
    "check_folder",
    "digest_line",
    "is_bundle",
    "open_bundle",
    "open_trusted",
    "pack",
    "read_log",
    "sign",
]

_MAX_FILES = 10_000
# What a killed 'sign' leaves (``atomic_file``), never read.
_UNFINISHED = re.compile(rf"\.({SIGNATURE_NAME}|model)\.[0-9a-f]{{8}}\.partial(\.sig)?")
_MAX_DIGEST_BYTES = 1024
_REPLACED_TRIES = 20  # each takes as long as reading the bundle, a redeploy two moves
_REMAKE = "copy the bundle again from where it was made, or make it again with 'fcos-deploy deploy'"


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A manifest whose files were checked: its bytes, and the folder that they were read in."""

    content: bytes
    manifest: Manifest
    envelope: Envelope | None
    inode: tuple[int, int]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file that the manifest lists, or that of a layer: ``record`` and all paths in it are relative to ``folder``.

    ``prefix`` is what the bundle's name of the file has in front of that path.
    """

    record: FileRecord
    folder: Path
    prefix: str = ""

    @property
    def source(self) -> Path:
        return self.folder / self.record.path


class Bundle:
    """A checked bundle. Close it (or use ``with``) to remove what was unpacked from an archive."""

    def __init__(
        self, root: Path, content: CheckedFolder, *, source: Path, trust: Trust, temporary: bool = False
    ) -> None:
        self.root = root
        self.manifest = content.manifest
        self.manifest_bytes = content.content  # those that were checked
        self.manifest_sha256 = content.sha256  # identifies this bundle in records
        # Id of the key that was checked, and the version that it signed; '' and 0 when no key was asked for.
        envelope = content.envelope
        self.signed_by, self.version = (envelope.key_id, envelope.version) if envelope else ("", 0)
        self.source = source
        self.trust = trust
        self.is_archive = temporary
        self._inode = content.inode
        self._files = {name: _Listed(record, root) for name, record in content.manifest.all_files.items()}
        self._private: PrivateFiles | None = None

    def __repr__(self) -> str:
        return f"Bundle('{self.source}')"

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def log_path(self) -> Path | None:
        """Where verifications are recorded; None for an archive, which is never written to."""
        return None if self.is_archive else self.root / LOG_NAME

    def adopt(self, layer: str, records: Iterable[FileRecord], *, folder: Path) -> None:
        """Let ``path`` find the files of the device layer in ``folder``, once they are checked."""
        self._files |= {f"{layer}/{record.path}": _Listed(record, folder, f"{layer}/") for record in records}

    def require_not_replaced(self) -> None:
        """Raise when another bundle has taken the place of this one since it was opened.

        Call it after the last file was read: what was read is then from one bundle, the one that was checked.

        Raises:
            BundleReplacedError: another folder lies there.
        """
        if not self.is_archive and _inode(self.root) != self._inode:
            raise BundleReplacedError(
                f"The bundle '{self.source}' was replaced by another one while it was opened.",
                hint="run the command again",
            )

    def path(self, name: str) -> Path:
        """A file with exactly the bytes that were checked, which nobody can change; until ``release``.

        ``name`` is that of a listed file, or of one of a layer that was adopted. Beside an artifact lie its companions
        and, of a graph, the files that its tensors refer to.

        Raises:
            BundleError: the manifest does not list it, or it was changed or replaced since it was checked.
        """
        listed = self._listed(name)
        if self.is_archive:
            return listed.source  # unpacked into a folder of this user alone
        if self._private is None:
            self._private = PrivateFiles()
        with self._checking():
            path = self._private.add(name, listed.source, sha256=listed.record.sha256)
            companions = listed.record.companions if isinstance(listed.record, Artifact) else ()
            beside = {f"{listed.prefix}{companion}" for companion in companions}
            if name.endswith(".onnx") and (locations := external_locations(path)):
                # A runtime does not follow links to the data of tensors, lest they lead out of the folder.
                path = self._private.add_on_disk(name, listed.source, sha256=listed.record.sha256)
                for location in locations:
                    data = str(PurePosixPath(name).parent / location)
                    weights = self._listed(data)
                    self._private.add_on_disk(data, weights.source, sha256=weights.record.sha256)
                    beside.discard(data)
            for companion in beside:
                listed = self._listed(companion)
                self._private.add(companion, listed.source, sha256=listed.record.sha256)
        return path

    def read(self, name: str) -> bytes:
        """The contents of a file that ``path`` would find."""
        listed = self._listed(name)
        with self._checking():
            return checked_bytes(listed.source, sha256=listed.record.sha256)

    def shipped_files(self) -> dict[str, str]:
        """Names of all files that travel with the bundle, with the SHA-256 of each; '' where the manifest has none."""
        files = {name: record.sha256 for name, record in self.manifest.all_files.items()}
        files |= {name: "" for name in UNLISTED if (self.root / name).is_file()}
        return files | {MANIFEST_NAME: self.manifest_sha256}

    def release(self) -> None:
        """Forget the files of ``path``, once a runtime has opened them."""
        if self._private is not None:
            self._private.close()
            self._private = None

    def _listed(self, name: str) -> _Listed:
        if name not in self._files:
            raise BundleError(f"The bundle '{self.source}' has no file '{name}'.")
        return self._files[name]

    @contextlib.contextmanager
    def _checking(self) -> Iterator[None]:
        """What a file that was changed or removed leads to, here: a bundle that took the place of this one, or that."""
        try:
            yield
        except (ChecksumError, OSError) as error:
            self.require_not_replaced()
            if isinstance(error, ChecksumError):
                raise
            raise BundleError(f"Cannot read the bundle '{self.source}': {error}.") from error

    def close(self) -> None:
        """Remove what was unpacked and what ``path`` gave; may be called twice."""
        self.release()
        if self.is_archive:
            shutil.rmtree(self.root, ignore_errors=True)


def is_bundle(path: Path) -> bool:
    """Whether ``path`` looks like a bundle: a folder with a manifest, an archive, or an OCI image layout."""
    return is_archive(path) or (path / MANIFEST_NAME).is_file() or is_layout(path)


def open_bundle(
    path: Path,
    *,
    public_keys: tuple[Path | str, ...] = (),
    trust_local_builds: bool = False,
    expect_name: str = "",
    min_version: int = 0,
) -> Bundle:
    """Open a folder, a .tar or an OCI image layout and check every file; with ``public_keys`` one must have signed it.

    A key is a file in PEM form, or such text itself. ``trust_local_builds``: with keys too, layers that this user built
    on this device count without a signature. ``expect_name`` and ``min_version`` refuse another bundle of the same
    signer, and one that is signed as an older version.

    Raises:
        BundleError: it is missing or incomplete, or has files that do not belong to it.
        ChecksumError: a file was changed.
        SignatureError: a signature is asked for and missing or wrong, or it is another bundle.
    """
    trust = Trust(public_keys=public_keys, local_builds=trust_local_builds, name=expect_name, min_version=min_version)
    return open_trusted(path, trust)


def open_trusted(path: Path, trust: Trust) -> Bundle:
    """As ``open_bundle``, with what the bundle must be in one value."""
    if is_archive(path) or is_layout(path):
        folder = Path(tempfile.mkdtemp(prefix="fcos-deploy-"))
        try:
            unpack(path, folder, sizes=lambda: _listed_sizes(folder, trust))
            checked = check_folder(folder, trust)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        bundle = Bundle(folder, checked, source=path, trust=trust, temporary=True)
        atexit.register(bundle.close)
        return bundle
    if not path.is_dir():
        problem = f"'{path}' is a file, not a bundle." if path.exists() else f"There is no bundle '{path}'."
        raise BundleError(problem, hint="give the folder or .tar that 'fcos-deploy deploy' made")
    return Bundle(path, _check_unreplaced(path, trust), source=path, trust=trust)


def _check_unreplaced(root: Path, trust: Trust) -> CheckedFolder:
    """As ``check_folder``, again when another bundle took the place of this one meanwhile."""
    for _ in range(_REPLACED_TRIES):
        before = _inode(root)
        try:
            checked = check_folder(root, trust)
        except BundleError:
            if _inode(root) == before:
                raise
            continue
        if _inode(root) == before == checked.inode:
            return checked
    raise BundleReplacedError(f"The bundle '{root}' keeps being replaced.", hint="wait until that has ended")


def _inode(root: Path) -> tuple[int, int]:
    """What tells a folder from another one that takes its name; zeros while there is none."""
    try:
        facts = root.stat()
    except OSError:
        return (0, 0)
    return facts.st_dev, facts.st_ino


def _listed_sizes(root: Path, trust: Trust) -> dict[str, int]:
    """What the manifest in ``root`` lists, once its signature is checked where one is asked for."""
    content = _manifest_bytes(root)
    if trust.public_keys:
        check_signature(root, manifest=content, public_keys=trust.public_keys)
    return {name: record.size for name, record in _parsed(content, root).all_files.items()}


def check_folder(root: Path, trust: Trust) -> CheckedFolder:
    """Check the bundle in ``root``: manifest, signature, every file, and that it is the one that is meant.

    The signature first, since a manifest is parsed; what is parsed are the bytes that the signature was checked on.
    Errors are those of ``open_bundle``.
    """
    keys = trust.public_keys
    inode = _inode(root)
    try:
        content = _manifest_bytes(root)
        envelope = check_signature(root, manifest=content, public_keys=keys) if keys else None
        manifest = _parsed(content, root)
        _check_files(root, manifest)
        _require_identity(root, manifest, envelope, trust)
        if envelope is not None:
            require_no_rollback(manifest.name, envelope, memory=trust.memory)
    except OSError as error:
        raise BundleError(f"Cannot read the bundle '{root}': {error}.", hint="check its permissions") from error
    return CheckedFolder(content, manifest, envelope, inode)


def _require_identity(root: Path, manifest: Manifest, envelope: Envelope | None, trust: Trust) -> None:
    """Raise unless this is the bundle that is meant."""
    if trust.name and manifest.name != trust.name:
        raise SignatureError(
            f"The bundle '{root}' is '{manifest.name}', not '{trust.name}'.",
            hint="open the right bundle, or name it with --expect-name",
        )
    version = envelope.version if envelope else 0
    if version < trust.min_version:
        raise SignatureError(
            f"The bundle '{root}' is signed as version {version}, {trust.min_version} or later is needed.",
            hint="get a newer one from the one who signed it",
        )


def pack(bundle: Path, tar: Path, *, trust: Trust | None = None) -> None:
    """Write the bundle in the folder ``bundle`` to one uncompressed .tar, after checking it.

    Raises:
        ConfigError: ``tar`` is not named ``*.tar``.
    """
    if tar.suffix != ".tar":
        raise ConfigError(f"A bundle's archive is named '*.tar', got '{tar}'.")
    with open_trusted(bundle, trust or Trust()) as opened:
        pack_files(opened.root, files=opened.shipped_files(), output=tar)


def sign(
    bundle: Path, *, private_key: Path, version: int = 0, expires: str = "", openssf_key: Path | None = None
) -> str:
    """Check the bundle in the folder ``bundle`` and sign it; returns the key's id.

    ``version`` rises from release to release, ``expires`` is a date; 0 and '' claim nothing. ``openssf_key``: an EC key
    that signs in the OpenSSF format too.

    Raises:
        ConfigError: an archive, or a key that cannot be used.
    """
    if is_archive(bundle) or is_layout(bundle):
        raise ConfigError("An archive cannot be signed in place.", hint="sign the folder, then pack it")
    with open_bundle(bundle) as opened:
        for entry in opened.root.iterdir():
            if _UNFINISHED.fullmatch(entry.name):
                entry.unlink(missing_ok=True)
        if openssf_key is not None:
            listed = {record.path: record.sha256 for record in opened.manifest.all_files.values()}
            digest = digest_line(opened.manifest_sha256).encode()
            listed |= {MANIFEST_NAME: opened.manifest_sha256, DIGEST_NAME: hashlib.sha256(digest).hexdigest()}
            write_model_signature(opened.root, name=opened.manifest.name, files=listed, private_key=openssf_key)
        manifest = opened.manifest_bytes
        return sign_manifest(
            opened.root, manifest=manifest, private_key=private_key, version=version, expires=expires
        ).key_id


def digest_line(manifest_sha256: str) -> str:
    """Contents of manifest.sha256, in the form that ``sha256sum --check`` reads."""
    return f"{manifest_sha256}  {MANIFEST_NAME}\n"


def _manifest_bytes(root: Path) -> bytes:
    """Contents of manifest.json, read once; neither it nor manifest.sha256 may be a link, a pipe or a device."""
    path = root / MANIFEST_NAME
    try:
        content = read_file(path, limit=MAX_MANIFEST_BYTES, follow_links=False)
        digest = read_file(root / DIGEST_NAME, limit=_MAX_DIGEST_BYTES, follow_links=False)
    except OSError as error:
        name = Path(str(error.filename)).name
        absent = isinstance(error, FileNotFoundError)
        reason = f"it has no '{name}'" if absent else f"of '{name}', {error.strerror}"
        raise BundleError(f"'{root}' is not a complete bundle: {reason}.", hint=_REMAKE) from error
    if digest != digest_line(hashlib.sha256(content).hexdigest()).encode():
        raise ChecksumError(f"'{path}' does not match '{DIGEST_NAME}'.", hint=_REMAKE)
    return content


def _parsed(content: bytes, root: Path) -> Manifest:
    path = root / MANIFEST_NAME
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"'{path}' is not UTF-8 text: {error}.", hint=_REMAKE) from error
    return parse_manifest(text, where=str(path))


def _check_files(root: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: none missing, none extra, no links, sizes first, then hashes."""
    present, listed = _present_files(root), manifest.all_files
    extra = sorted(name for name in present - set(listed) - UNLISTED if not _UNFINISHED.fullmatch(name))
    missing = sorted(set(listed) - present)
    if missing:
        raise BundleError(f"The bundle '{root}' lacks {some_names(missing)}.", hint=_REMAKE)
    if extra:
        raise BundleError(
            f"The bundle '{root}' has files that its manifest does not list: {some_names(extra)}.", hint=_REMAKE
        )
    for record in listed.values():
        path, size = root / record.path, (root / record.path).stat().st_size
        if size != record.size:
            raise ChecksumError(f"'{path}' must have {record.size} bytes, it has {size}.", hint=_REMAKE)
    with ThreadPoolExecutor(usable_cpus()) as pool:
        hashes = dict(zip(listed, map_ahead(pool, sha256_file, [root / name for name in listed]), strict=True))
    for name, record in listed.items():
        if hashes[name] != record.sha256:
            raise ChecksumError(
                f"'{root / name}' was changed: its SHA-256 must be {record.sha256[:16]}..., "
                f"it is {hashes[name][:16]}....",
                hint=_REMAKE,
            )
        if record.path.endswith(".onnx"):
            check_external_data(root, record.path, allowed=frozenset(listed))
    if SIGNATURE_NAME in present:
        check_envelope(root / SIGNATURE_NAME)


def _present_files(root: Path) -> set[str]:
    """Paths of all files, relative, after refusing everything that is neither a plain file nor a folder."""
    present: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=False):
        if Path(folder) == root and LAYERS_FOLDER in folders and not (root / LAYERS_FOLDER).is_symlink():
            folders.remove(LAYERS_FOLDER)  # Layers have manifests of their own, and a damaged one stops nothing.
        for name in (*folders, *files):
            path = Path(folder, name)
            mode = path.lstat().st_mode
            reserved = Path(folder) == root and name in UNLISTED
            if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not reserved)):
                raise BundleError(f"'{path}' is not a plain file, which a bundle cannot contain.", hint=_REMAKE)
            if stat.S_ISREG(mode):
                present.add(path.relative_to(root).as_posix())
        if len(present) > _MAX_FILES:
            raise BundleError(f"'{root}' has more than {_MAX_FILES} files.", hint="is this the folder of a bundle?")
    return present


def check_external_data(root: Path, name: str, *, allowed: frozenset[str]) -> None:
    """Refuse an ONNX file whose external data is not a listed file of the bundle.

    A runtime opens the files that tensors refer to, so that a path out of the bundle would read any file of the user.

    Raises:
        BundleError: a location leaves the bundle or is not listed, or the file is not ONNX.
    """
    path = root / name
    try:
        locations = external_locations(path)
    except BackendLoadError as error:
        raise BundleError(error.message, hint=_REMAKE) from error
    folder = PurePosixPath(name).parent
    for location in sorted(locations):
        if (folder / location).as_posix() not in allowed or ".." in PurePosixPath(location).parts:
            raise BundleError(f"'{path}' refers to the data file {location[:80]!r}, which is not in the bundle.")


# The verification log: one JSON record a line, each bound to the one before by a hash.

_MAX_LOG_BYTES = 256 << 20
_FIRST_HASH = "0" * 64


def append_log(path: Path, record: dict[str, Any]) -> None:
    """Add ``record``, with the hash that binds it to the log so far, and flush it to the disk.

    Raises:
        OSError: the file cannot be written; the log is then as it was.
        ChecksumError: the log so far was changed.
    """
    with path.open("a+b") as stream:
        lock_file(stream.fileno())
        stream.seek(0)
        lines, complete = _complete_lines(stream.read(_MAX_LOG_BYTES + 1), path)
        text = json.dumps({**record, "previous": _check_chain(lines, path)}, sort_keys=True, allow_nan=False)
        line = json.dumps({**json.loads(text), "sha256": _line_hash(text)}, sort_keys=True) + "\n"
        stream.truncate(complete)  # drops what a power cut left of the last append
        try:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(stream.fileno(), complete)
            raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records, oldest first, without what an interrupted append left behind them.

    Raises:
        BundleError: the file is too large, or no plain file.
        ChecksumError: a line was changed, inserted or removed.
    """
    try:
        content = read_file(path, limit=_MAX_LOG_BYTES, follow_links=False)
    except OSError as error:
        raise BundleError(f"Cannot read '{path}': {error.strerror}.", hint="move it away") from error
    lines, _ = _complete_lines(content, path)
    _check_chain(lines, path)
    return [json.loads(line) for line in lines]


def _complete_lines(content: bytes, path: Path) -> tuple[list[bytes], int]:
    """Complete lines, and how many bytes they take.

    What a power cut leaves of the last append is not among them: a line without its end, in any state, and one that
    has bytes of zero, which JSON never has: a block of the file that was allocated and not written.
    """
    if len(content) > _MAX_LOG_BYTES:
        raise BundleError(f"'{path}' is larger than {_MAX_LOG_BYTES >> 20} MiB.", hint="move it away")
    *lines, rest = content.split(b"\n")
    complete = len(content) - len(rest)
    if lines and b"\0" in lines[-1]:
        complete -= len(lines.pop()) + 1
    return lines, complete


def _check_chain(lines: list[bytes], path: Path) -> str:
    """The hash of the last line, after checking that every line holds the hash of the one before and its own."""
    previous = _FIRST_HASH
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            claimed = record.pop("sha256")
            text = json.dumps(record, sort_keys=True, allow_nan=False)
            intact = record["previous"] == previous and claimed == _line_hash(text)
            # Another spelling of the same JSON (spaces, escapes) is a change as well.
            exact = json.dumps({**record, "sha256": claimed}, sort_keys=True).encode() == line
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise _changed_line(path, number) from error
        if not (intact and exact):
            raise _changed_line(path, number)
        previous = claimed
    return previous


def _line_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _changed_line(path: Path, number: int) -> ChecksumError:
    return ChecksumError(
        f"Line {number} of '{path}' is not what was written.", hint="move the log away to start a new one"
    )
