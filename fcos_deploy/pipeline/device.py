"""A bundle on its device: set up there, and installed behind a link, which goes back again if it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fcos_deploy.accuracy.golden import read_golden_image
from fcos_deploy.accuracy.verify import (
    VerificationRecord,
    VerifyOptions,
    require_verified,
    verify_bundle,
    write_record,
)
from fcos_deploy.benchmark.measure import TimingOptions, time_in_turns
from fcos_deploy.bundle.device_layer import (
    Choice,
    layer_room,
    sign_layers,
    usable_layers,
    write_layer,
)
from fcos_deploy.bundle.selection import Selection, select_runnable, tuned_options
from fcos_deploy.bundle.signature import remember_version
from fcos_deploy.bundle.store import Bundle, open_trusted
from fcos_deploy.bundle.versions import InstalledVersions
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.core.enums import ArtifactKind, PerformanceHint, Precision
from fcos_deploy.core.errors import (
    AccuracyGateError,
    BundleError,
    ConfigError,
    DeviceError,
    FcosDeployError,
    InconclusiveError,
    MissingDependencyError,
)
from fcos_deploy.core.gate import Outcome
from fcos_deploy.core.machine import MachineFacts, kernel_text, read_machine
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.trust import Trust, VersionMemory
from fcos_deploy.detector import Detector
from fcos_deploy.pipeline.build import ArtifactRequest, build_artifact

__all__ = [
    "CheckedFact",
    "InstallReport",
    "InstallRequest",
    "RollbackRequest",
    "SetupReport",
    "SetupRequest",
    "install",
    "roll_back",
    "set_up",
]

_ROOM = 4  # times the size of the graph: the engine, what the builder needs meanwhile, and the layer it replaces
_TIMING = TimingOptions(rounds=10, block=4, warmup=3)
_ROOT = Path("/")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupRequest:
    """``backend`` empty: the bundle's own. ``trust``: what the bundle must be; local builds count in any case."""

    bundle: Path
    backend: str = ""
    trust: Trust = field(default_factory=Trust)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFact:
    """Something of this machine that matters to the bundle; ``warning`` is empty where it is as it should be."""

    name: str
    value: str
    warning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupReport:
    """What was found, built, verified and chosen. ``built`` and ``kept`` are names of artifacts.

    ``latency_ms``: the median of each precision, where there was a choice. ``chosen``: the artifact that commands take
    from now on.
    """

    backend: str
    facts: tuple[CheckedFact, ...]
    built: tuple[str, ...]
    kept: tuple[str, ...]
    skipped: dict[str, str]
    records: tuple[VerificationRecord, ...]
    chosen: VerificationRecord
    latency_ms: dict[str, float]
    signed: tuple[str, ...] = ()


def set_up(request: SetupRequest, *, progress: ProgressFn = no_progress) -> SetupReport:
    """Make the bundle run on this device; what an earlier, interrupted run finished is kept.

    Layers that are built here count, since the user asked for them; where the bundle's signature is required they are
    signed with the device key.

    Raises:
        DeviceError, MissingDependencyError: the runtime cannot run here, or there is no room.
        ConfigError: the bundle has nothing for the backend, and nothing to build it from.
        AccuracyGateError: what was built is not the certified detector.
        InconclusiveError: the golden images cannot decide it.
    """
    with open_trusted(request.bundle, replace(request.trust, local_builds=True)) as bundle:
        backend = request.backend or bundle.manifest.defaults.backend
        facts = _check_machine(bundle, backend)
        built: list[str] = []
        kept: list[str] = []
        skipped: dict[str, str] = {}
        for precision in _candidates(bundle):
            try:
                selection = _runnable(bundle, backend, precision)
                if selection is not None:
                    kept.append(selection.artifact.path)
                else:
                    built.append(_build(request, bundle, backend, precision, progress))
            except ConfigError as error:  # The backend does not take this precision, the others may do.
                skipped[str(precision)] = error.message
        if not built and not kept:
            raise ConfigError(
                f"'{request.bundle}' has nothing that '{backend}' could run here. {'; '.join(skipped.values())}",
                hint="name another one with --backend",
            )
        records = _verify(bundle, backend, skipped, progress)
        passed = [record for record in records if record.outcome is Outcome.PASSED]
        latency = _measure(bundle, backend, passed, progress)
        chosen = _choose(bundle, records, latency)
        if len(passed) > 1:
            choice = Choice(precision=chosen.precision, latency_ms=latency)
            write_layer(bundle, backend=backend, choice=choice)
        layers = [state for state in usable_layers(bundle, backend=backend) if state.layer and state.layer.artifacts]
        signed = sign_layers(bundle) if request.trust.public_keys and layers else []
        for record in records:
            write_record(record, bundle=bundle)
        return SetupReport(
            backend=backend,
            facts=facts,
            built=tuple(built),
            kept=tuple(kept),
            skipped=skipped,
            records=tuple(records),
            chosen=chosen,
            latency_ms=latency,
            signed=tuple(signed),
        )


def _check_machine(bundle: Bundle, backend: str, *, root: Path = _ROOT) -> tuple[CheckedFact, ...]:
    """The runtime, memory, disk and power mode, before anything that takes minutes.

    Raises:
        DeviceError, MissingDependencyError: the runtime cannot run here, or there is no room.
    """
    probe, machine = get_backend(backend).probe(), read_machine()
    if not probe.available:
        kind = MissingDependencyError if probe.missing else DeviceError
        raise kind(f"'{backend}' cannot run here: {probe.problem}", hint=probe.remedy)
    graphs = [a.size for a in bundle.manifest.artifacts if a.kind is ArtifactKind.ONNX]
    needed, free = _ROOM * max(graphs, default=0), layer_room(bundle)
    if free < needed:
        raise DeviceError(
            f"Building needs about {needed >> 20} MiB of disk, {free >> 20} MiB are free.", hint="make room on the disk"
        )
    return (
        CheckedFact(name="runtime", value=f"{backend} {probe.version}", warning=probe.problem),
        _memory(machine, needed),
        CheckedFact(name="free disk", value=f"{free >> 20} MiB"),
        *_power_mode(root),
    )


def _memory(machine: MachineFacts, needed: int) -> CheckedFact:
    small = bool(machine.memory_mib) and machine.memory_mib < 512 + (needed >> 20)
    warning = "a build may fail: close other programs, or add swap" if small else ""
    return CheckedFact(name="memory", value=f"{machine.memory_mib} MiB", warning=warning)


def _power_mode(root: Path) -> tuple[CheckedFact, ...]:
    """A Jetson's power mode and the governor of the first core, where the kernel tells them."""
    facts = []
    mode = kernel_text(root / "var/lib/nvpmodel/status")
    if mode:
        facts.append(CheckedFact(name="power mode", value=mode.replace("pmode:", "").lstrip("0") or "0"))
    governor = kernel_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor:
        slow = "latency is measured at a changing clock" if governor == "powersave" else ""
        facts.append(CheckedFact(name="governor", value=governor, warning=slow))
    return tuple(facts)


def _candidates(bundle: Bundle) -> list[Precision]:
    """The default precision and, to measure it against, int8 and the smallest float format that the bundle has."""
    present = {artifact.precision for artifact in bundle.manifest.artifacts}
    floats = [precision for precision in (Precision.FP16, Precision.FP32) if precision in present][:1]
    preferred = [bundle.manifest.defaults.precision, Precision.INT8, *floats]
    return [precision for precision in dict.fromkeys(preferred) if precision in present]


def _runnable(bundle: Bundle, backend: str, precision: Precision) -> Selection | None:
    """What runs here already; None: it must be built."""
    try:
        selection, _ = select_runnable(bundle, backend=backend, precision=precision)
    except (ConfigError, DeviceError, MissingDependencyError):
        return None
    return selection


def _build(request: SetupRequest, bundle: Bundle, backend: str, precision: Precision, progress: ProgressFn) -> str:
    from fcos_deploy.core.exporter import BuildOptions

    result = build_artifact(
        ArtifactRequest(
            source=request.bundle,
            output=None,
            backend=backend,
            options=BuildOptions(precision=precision),
            trust=request.trust,
        ),
        progress=progress,
    )
    bundle.require_not_replaced()
    return f"{result.record['layer']}/{result.files[0].name}"


def _verify(bundle: Bundle, backend: str, skipped: dict[str, str], progress: ProgressFn) -> list[VerificationRecord]:
    records = []
    for precision in _candidates(bundle):
        if str(precision) not in skipped:
            options = VerifyOptions(backend=backend, precision=precision)
            records.append(verify_bundle(bundle, options=options, progress=progress))
    return records


def _measure(
    bundle: Bundle, backend: str, passed: Sequence[VerificationRecord], progress: ProgressFn
) -> dict[str, float]:
    """Median milliseconds of each verified precision, in turns on a golden image; nothing where there is no choice.

    Each is opened as the bundle opens it, except that it is always for latency.
    """
    if len(passed) < 2:
        return {}
    golden = bundle.manifest.golden[0]
    image = read_golden_image(bundle.read(golden.path), golden)
    detectors: list[Detector] = []
    try:
        for record in passed:
            selection, _ = select_runnable(bundle, backend=backend, precision=record.precision)
            options = tuned_options(bundle, selection, SessionOptions(hint=PerformanceHint.LATENCY))
            path = bundle.path(selection.artifact.path)
            detectors.append(Detector.open(path, backend=selection.backend, options=options))
        timings = time_in_turns(detectors, image, options=_TIMING, progress=progress)
    finally:
        for detector in detectors:
            detector.close()
    return {
        str(record.precision): round(timing.latency().p50, 3) for record, timing in zip(passed, timings, strict=True)
    }


def _choose(bundle: Bundle, records: Sequence[VerificationRecord], latency: dict[str, float]) -> VerificationRecord:
    """The fastest that passed; the default precision where they are equal or nothing was measured.

    Raises:
        AccuracyGateError: none passed.
        InconclusiveError: none passed, and none failed.
    """
    default = bundle.manifest.defaults.precision
    passed = [record for record in records if record.outcome is Outcome.PASSED]
    if not passed:
        if not records:
            raise BundleError("Nothing was verified.")
        failed = [record for record in records if record.outcome is Outcome.FAILED]
        summary = "; ".join(f"{record.artifact}: {record.summary}" for record in failed or records)
        if failed:
            raise AccuracyGateError(
                f"What runs here is not the certified detector. {summary}.",
                hint="see which stage diverges with 'fcos-deploy parity', or make the bundle for this machine",
            )
        raise InconclusiveError(f"The golden images cannot decide it. {summary}.")
    return min(passed, key=lambda r: (latency.get(str(r.precision), 0.0), r.precision is not default))


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
        except (ConfigError, DeviceError, MissingDependencyError):
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
