"""Opens a bundle, checks it, and finds the artifact to run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fcos_deploy.bundle.archive import is_archive, pack_files, unpack
from fcos_deploy.bundle.artifact import Artifact
from fcos_deploy.bundle.integrity import check_files, read_manifest
from fcos_deploy.bundle.manifest import LOG_NAME, MANIFEST_NAME, UNLISTED, Manifest
from fcos_deploy.bundle.signature import check_signature, sign_bundle
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BundleError, ConfigError
from fcos_deploy.core.registry import backend as backend_named

__all__ = ["Bundle", "Selection", "is_bundle", "open_bundle", "pack", "select_artifact", "sign"]


@dataclass(frozen=True, slots=True)
class Selection:
    """An artifact and the backend that runs it."""

    artifact: Artifact
    backend: str


class Bundle:
    """A checked bundle. Close it (or use ``with``) to remove what was unpacked from an archive."""

    def __init__(
        self, root: Path, manifest: Manifest, *, source: Path, temporary: bool = False, signed_by: str = ""
    ) -> None:
        self.root = root
        self.manifest = manifest
        self.source = source
        self.signed_by = signed_by  # id of the key that was checked; '' when none was asked for
        self._temporary = temporary

    def __repr__(self) -> str:
        return f"Bundle('{self.source}')"

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def log_path(self) -> Path | None:
        """Where verifications are recorded; None for an archive, which is never written to."""
        return None if self._temporary else self.root / LOG_NAME

    @property
    def manifest_sha256(self) -> str:
        """What identifies this bundle in records."""
        return sha256_file(self.root / MANIFEST_NAME)

    def path(self, name: str) -> Path:
        """Where a listed file lies."""
        if name not in self.manifest.all_files:
            raise BundleError(f"The bundle '{self.source}' has no file '{name}'.")
        return self.root / name

    def select(self, *, backend: str = "", precision: Precision | None = None) -> Selection:
        """The artifact for a backend and precision; the target's where they are not given.

        Raises:
            ConfigError: when the bundle has none, or several and nothing says which.
        """
        target = self.manifest.target
        name = backend or target.backend
        found = [a for a in self.manifest.artifacts if _fits(a, name)]
        wanted = precision or _default_precision(found, target.precision)
        chosen = [a for a in found if wanted is None or a.precision is wanted]
        # An artifact made for this backend goes before one that it merely accepts, its own placement before another.
        chosen = [a for a in chosen if a.backend == name] or chosen
        own = backend_named(name).placements
        chosen = next(filter(None, ([a for a in chosen if a.placement == p] for p in own)), chosen)
        if len(chosen) == 1:
            return Selection(chosen[0], name)
        problem = "has several artifacts" if chosen else "has no artifact"
        raise ConfigError(
            f"The bundle '{self.source}' {problem} for backend '{name}'{f' in {precision}' if precision else ''}.",
            hint=f"it has: {self._contents()}",
        )

    def _contents(self) -> str:
        return (
            ", ".join(f"{a.path} ({a.precision}, {a.backend or a.kind})" for a in self.manifest.artifacts) or "nothing"
        )

    def close(self) -> None:
        """Remove what was unpacked; may be called twice."""
        if self._temporary:
            shutil.rmtree(self.root, ignore_errors=True)


def _fits(artifact: Artifact, backend: str) -> bool:
    if artifact.backend:
        return artifact.backend == backend
    runtime = backend_named(backend)
    return artifact.kind in runtime.accepts and (not artifact.placement or artifact.placement in runtime.placements)


def _default_precision(artifacts: list[Artifact], preferred: Precision) -> Precision | None:
    return preferred if any(a.precision is preferred for a in artifacts) else None


def is_bundle(path: Path) -> bool:
    """Whether ``path`` looks like a bundle: a folder with a manifest, or an archive."""
    return is_archive(path) or (path / MANIFEST_NAME).is_file()


def open_bundle(path: Path, *, public_keys: tuple[Path | str, ...] = ()) -> Bundle:
    """Open a folder or .tar and check every file of it; with ``public_keys`` one of them must have signed it.

    A key is a file in PEM form, or such text itself.

    Raises:
        BundleError: when it is missing or incomplete, or has files that do not belong to it.
        ChecksumError: when a file was changed.
        SignatureError: when a signature is asked for and missing or wrong.
    """
    if is_archive(path):
        return _open_archive(path, public_keys)
    if not path.is_dir():
        raise BundleError(
            f"There is no bundle '{path}'.", hint="give the folder or .tar that 'fcos-deploy deploy' made"
        )
    manifest, signer = _checked(path, public_keys)
    return Bundle(path, manifest, source=path, signed_by=signer)


def _checked(root: Path, public_keys: tuple[Path | str, ...]) -> tuple[Manifest, str]:
    try:
        signer = check_signature(root, public_keys=public_keys) if public_keys else ""
        manifest = read_manifest(root)
        check_files(root, manifest)
    except OSError as error:
        raise BundleError(f"Cannot read the bundle '{root}': {error}.", hint="check its permissions") from error
    return manifest, signer


def _open_archive(path: Path, public_keys: tuple[Path | str, ...]) -> Bundle:
    folder = Path(tempfile.mkdtemp(prefix="fcos-deploy-"))
    try:
        unpack(path, folder)
        manifest, signer = _checked(folder, public_keys)
        bundle = Bundle(folder, manifest, source=path, temporary=True, signed_by=signer)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    atexit.register(bundle.close)
    return bundle


def pack(bundle: Path, tar: Path, *, public_keys: tuple[Path | str, ...] = ()) -> None:
    """Write the bundle in the folder ``bundle`` to one uncompressed .tar, after checking it.

    Raises:
        ConfigError: when ``tar`` is not named ``*.tar``.
    """
    if tar.suffix != ".tar":
        raise ConfigError(f"A bundle's archive is named '*.tar', got '{tar}'.")
    with open_bundle(bundle, public_keys=public_keys) as opened:
        extra = [name for name in UNLISTED if (opened.root / name).is_file()]
        pack_files(opened.root, names=[*opened.manifest.all_files, *extra], output=tar)


def sign(bundle: Path, *, private_key: Path) -> str:
    """Check the bundle in the folder ``bundle`` and sign it; returns the key's id.

    Raises:
        ConfigError: for an archive, or a key that cannot be used.
    """
    if is_archive(bundle):
        raise ConfigError("An archive cannot be signed in place.", hint="sign the folder, then pack it")
    with open_bundle(bundle) as opened:
        return sign_bundle(opened.root, private_key=private_key).key_id


def select_artifact(path: Path, *, backend: str = "", precision: Precision | None = None) -> tuple[Path, str]:
    """Open a bundle, check it, and return the path of the artifact to run and the name of its backend.

    What an archive needs is unpacked to a temporary folder, which goes when the process ends.
    """
    bundle = open_bundle(path)
    selection = bundle.select(backend=backend, precision=precision)
    return bundle.path(selection.artifact.path), selection.backend
