"""Installs a bundle on a device behind a link: copied, verified there, then switched to; and goes back again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from fcos_deploy.accuracy.verify import (
    VerificationRecord,
    VerifyOptions,
    require_verified,
    verify_bundle,
    write_record,
)
from fcos_deploy.bundle.selection import select_runnable
from fcos_deploy.bundle.signature import remember_version
from fcos_deploy.bundle.store import Bundle, open_trusted
from fcos_deploy.bundle.versions import InstalledVersions
from fcos_deploy.core.errors import (
    AccuracyGateError,
    BundleError,
    ConfigError,
    DeviceError,
    FcosDeployError,
    InconclusiveError,
)
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.trust import Trust, VersionMemory
from fcos_deploy.pipeline.setup import SetupRequest, set_up

__all__ = ["InstallReport", "InstallRequest", "RollbackRequest", "install", "roll_back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verification:
    """How a version is verified before the link leads to it. ``backend`` empty: the bundle's own."""

    link: Path
    backend: str = ""
    trust: Trust = field(default_factory=Trust)
    allow_inconclusive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallRequest(_Verification):
    """``bundle``: a folder, a .tar, or an OCI image layout. ``keep``: earlier versions that stay, for ``roll_back``."""

    bundle: Path
    keep: int = 1

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"At least one earlier version is kept, got {self.keep}.", hint="--keep 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRequest(_Verification):
    """The link whose last good version is to be used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallReport:
    """What the link leads to now, and what it led to before: names of folders in ``.LINK.versions``; '' for none.

    ``signed_version``: 0 when no key was asked for. ``built``: what ``setup`` built. ``passed_over``: earlier versions
    that cannot be used, and why.
    """

    link: str
    version: str
    previous: str
    bundle: str
    manifest_sha256: str
    signed_version: int
    record: VerificationRecord
    built: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    passed_over: dict[str, str] = field(default_factory=dict)


def install(request: InstallRequest, *, progress: ProgressFn = no_progress) -> InstallReport:
    """Copy the bundle, build what must be built here, verify it, switch the link, and remove old versions.

    Until the switch nothing that is in use changes, and an error leaves no copy behind. A killed run is resumed by the
    next one of the same bundle.

    Raises:
        AccuracyGateError: it is not the certified detector here.
        InconclusiveError: the golden images cannot decide it, and that was not allowed.
        BundleError: the bundle is damaged or not the one that is meant, or another process installs here.
        DeviceError, MissingDependencyError: it cannot run here, or there is no room.
        ConfigError: the link cannot be written, or something else has its name.
    """
    request = replace(request, trust=replace(request.trust, local_builds=True, memory=VersionMemory.COMPARE))
    with open_trusted(request.bundle, request.trust) as bundle:
        parent, root = request.link.absolute().parent.resolve(), bundle.root.resolve()
        if root == parent or root in parent.parents:
            raise ConfigError(f"'{request.link}' lies in the bundle itself.", hint="choose a place outside of it")
        with InstalledVersions(request.link) as versions:
            previous = versions.current
            version, prepared = _installed(bundle, versions, request, progress)
            versions.switch(version)
            prepared.remember()
            removed = versions.prune(keep=request.keep)
            return _report(versions, version, previous, prepared, removed=tuple(removed))


def roll_back(request: RollbackRequest, *, progress: ProgressFn = no_progress) -> InstallReport:
    """Let the link lead to the last version before the current one that is whole and verified here.

    Raises:
        BundleError: there is none.
        AccuracyGateError, InconclusiveError: there is one, and it is not known as the certified detector here.
        ConfigError: the link cannot be written, or something else has its name.
    """
    request = replace(request, trust=replace(request.trust, local_builds=True, memory=VersionMemory.IGNORE))
    versions = InstalledVersions(request.link)
    if not versions.folder.is_dir():
        raise BundleError(f"Nothing is installed at '{request.link}'.", hint="fcos-deploy install BUNDLE LINK")
    with versions:
        previous = versions.current
        problems: dict[str, FcosDeployError] = {}
        for version in versions.earlier():
            try:
                prepared = _prepare(versions.path(version), request, progress)
            except FcosDeployError as error:
                problems[version] = error
                continue
            # Before the switch, so that the version is not refused as older at any moment; and after it, since
            # whoever opened the newer one in between has raised it again.
            prepared.remember()
            versions.switch_back(version)
            prepared.remember()
            reasons = {name: error.message for name, error in problems.items()}
            return _report(versions, version, previous, prepared, passed_over=reasons)
    text = " ".join(f"{version}: {error.message}" for version, error in problems.items())
    gates = [type(error) for error in problems.values() if isinstance(error, (AccuracyGateError, InconclusiveError))]
    hints = [error.hint for error in problems.values() if error.hint]
    raise (gates[0] if gates else BundleError)(
        f"'{request.link}' has no earlier version to go back to. {text}".rstrip(),
        hint=hints[0] if hints else "install a bundle with 'fcos-deploy install'",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A version that may be switched to: what it is called and signed as, and its verification."""

    bundle: str
    manifest_sha256: str
    key_id: str
    signed_version: int
    record: VerificationRecord
    built: tuple[str, ...]

    def remember(self) -> None:
        """Make its signed version the one below which no bundle of its name is opened."""
        if self.key_id:
            remember_version(self.bundle, key_id=self.key_id, version=self.signed_version)


def _report(
    versions: InstalledVersions,
    version: str,
    previous: str,
    prepared: _Prepared,
    *,
    removed: tuple[str, ...] = (),
    passed_over: dict[str, str] | None = None,
) -> InstallReport:
    return InstallReport(
        link=str(versions.link),
        version=version,
        previous=previous,
        bundle=prepared.bundle,
        manifest_sha256=prepared.manifest_sha256,
        signed_version=prepared.signed_version,
        record=prepared.record,
        built=prepared.built,
        removed=removed,
        passed_over=passed_over or {},
    )


def _installed(
    bundle: Bundle, versions: InstalledVersions, request: InstallRequest, progress: ProgressFn
) -> tuple[str, _Prepared]:
    """A verified version of the bundle: one that is there already and whole, or a new one."""
    for version in versions.copies_of(bundle):
        try:
            return version, _prepare(versions.path(version), request, progress)
        except BundleError:  # damaged; the link may lead to it, so that it is not repaired in place
            continue
    staged = versions.stage(bundle)
    try:
        prepared = _prepare(staged, request, progress)
        return versions.publish(staged), prepared
    except Exception:  # not an interruption, after which the next run goes on
        versions.discard(staged)
        raise


def _prepare(folder: Path, request: _Verification, progress: ProgressFn) -> _Prepared:
    """Check every file of a version, build what must be built here, and replay the golden images.

    Raises:
        FcosDeployError: why it cannot be switched to.
    """
    options = VerifyOptions(backend=request.backend)
    built: tuple[str, ...] = ()
    with open_trusted(folder, request.trust) as opened:
        try:
            select_runnable(opened, backend=request.backend)
        except (DeviceError, ConfigError):
            try:
                setup = SetupRequest(bundle=folder, backend=request.backend, trust=request.trust)
                built = set_up(setup, progress=progress).built
            except InconclusiveError:
                if not request.allow_inconclusive:
                    raise
        record = verify_bundle(opened, options=options, progress=progress)
        write_record(record, bundle=opened)
        require_verified(record, allow_inconclusive=request.allow_inconclusive)
        return _Prepared(
            bundle=opened.manifest.name,
            manifest_sha256=opened.manifest_sha256,
            key_id=opened.signed_by,
            signed_version=opened.version,
            record=record,
            built=built,
        )
