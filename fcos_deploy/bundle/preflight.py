"""Compares a machine with what an artifact needs, before the artifact is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fcos_deploy.bundle.records import Artifact, Requirements, VersionRule
from fcos_deploy.bundle.selection import Selection, select_artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.backend import BackendProbe
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError, DeviceError, FcosDeployError
from fcos_deploy.core.machine import MachineFacts, read_machine
from fcos_deploy.core.registry import get_backend

__all__ = ["Difference", "Fallback", "PreflightRequest", "choose", "preflight", "require_fit"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that does not fit: what, what is needed, what is there."""

    what: str
    needed: str
    found: str

    def __str__(self) -> str:
        return f"{self.what} must be {self.needed}, it is {self.found or 'unknown'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightRequest:
    """What will be asked of the session: images in a batch, and the input (height, width) where it is not the usual."""

    batch: int = 1
    input_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """A backend that was passed over, and why; for records and logs."""

    backend: str
    artifact: str
    reason: str


def preflight(
    artifact: Artifact,
    *,
    probe: BackendProbe,
    machine: MachineFacts,
    request: PreflightRequest | None = None,
) -> tuple[Difference, ...]:
    """Everything that keeps this machine from running ``artifact``; empty when it fits."""
    needs = artifact.requires
    if not probe.available:
        return (Difference("the runtime", "installed", probe.problem or "missing"),)
    return (
        *_version(needs, probe.version),
        *_gpu(needs, machine),
        *_processor(needs, machine),
        *_device(needs, probe),
        *_profile(needs, request or PreflightRequest()),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _version(needs: Requirements, found: str) -> Iterator[Difference]:
    wanted = needs.backend_version
    fits = {
        VersionRule.EXACT: lambda: found == wanted,
        VersionRule.SAME_MAJOR: lambda: _numbers(found)[:1] == _numbers(wanted)[:1],
        VersionRule.AT_LEAST: lambda: _numbers(found) >= _numbers(wanted),
    }
    if wanted and not fits[needs.version_rule]():
        rule = {VersionRule.EXACT: "", VersionRule.SAME_MAJOR: " (same major)", VersionRule.AT_LEAST: " or newer"}
        yield Difference("the runtime's version", wanted + rule[needs.version_rule], found)


def _gpu(needs: Requirements, machine: MachineFacts) -> Iterator[Difference]:
    capabilities = [capability for _, capability in machine.gpus]
    if needs.compute_capabilities and not any(_capability_fits(needs, capability) for capability in capabilities):
        newer = " or newer" if needs.hardware_compatible else ""
        found = ", ".join(f"{capability} ({name})" for name, capability in machine.gpus) or "no NVIDIA GPU"
        yield Difference("the GPU's compute capability", " or ".join(needs.compute_capabilities) + newer, found)
    if needs.driver and _numbers(machine.nvidia_driver) < _numbers(needs.driver):
        yield Difference("the NVIDIA driver", f"{needs.driver} or newer", machine.nvidia_driver)


def _capability_fits(needs: Requirements, found: str) -> bool:
    if needs.hardware_compatible:
        return _numbers(found) >= min(map(_numbers, needs.compute_capabilities))
    return found in needs.compute_capabilities


def _processor(needs: Requirements, machine: MachineFacts) -> Iterator[Difference]:
    if needs.machine and needs.machine != machine.machine:
        yield Difference("the processor's architecture", needs.machine, machine.machine)
    missing = sorted(set(needs.cpu_features) - set(machine.cpu_features))
    if missing:
        yield Difference("the processor", f"one with {', '.join(missing)}", f"{machine.processor}, without")


def _device(needs: Requirements, probe: BackendProbe) -> Iterator[Difference]:
    devices = [device.lower() for device in probe.devices]
    wanted = needs.device.lower()
    if wanted and not any(re.split(r"[.: ]", device)[0] == wanted or device == wanted for device in devices):
        yield Difference("the device", needs.device, ", ".join(probe.devices) or "none")


def _profile(needs: Requirements, request: PreflightRequest) -> Iterator[Difference]:
    if needs.max_batch and request.batch > needs.max_batch:
        yield Difference("the batch", f"at most {needs.max_batch}", str(request.batch))
    if needs.input_sizes and request.input_size and request.input_size not in needs.input_sizes:
        sizes = " or ".join(f"{height}x{width}" for height, width in needs.input_sizes)
        yield Difference("the input size", sizes, "x".join(map(str, request.input_size)))


def require_fit(
    bundle: Bundle,
    selection: Selection,
    *,
    machine: MachineFacts | None = None,
    request: PreflightRequest | None = None,
) -> None:
    """Refuse an artifact that this machine cannot run.

    Raises:
        DeviceError: naming everything that differs, and the command that rebuilds.
    """
    probe = get_backend(selection.backend).probe()
    found = preflight(selection.artifact, probe=probe, machine=machine or read_machine(), request=request)
    if found:
        raise DeviceError(
            f"'{selection.artifact.path}' cannot run here with '{selection.backend}': {'; '.join(map(str, found))}.",
            hint=_remedy(bundle, selection, probe),
        )


def _remedy(bundle: Bundle, selection: Selection, probe: BackendProbe) -> str:
    if not probe.available and probe.remedy:
        return probe.remedy
    rebuild = selection.artifact.requires.rebuild or bundle.manifest.provenance.command
    chain = ", then ".join(bundle.manifest.defaults.fallback)
    fallback = f"; or --allow-fallback to use {chain}" if chain else ""
    return f"rebuild it here: {rebuild or 'fcos-deploy deploy'}{fallback}"


def choose(
    bundle: Bundle,
    *,
    backend: str = "",
    precision: Precision | None = None,
    allow_fallback: bool = False,
    machine: MachineFacts | None = None,
    request: PreflightRequest | None = None,
) -> tuple[Selection, tuple[Fallback, ...]]:
    """The artifact to run after preflight, and the backends that were passed over on the way to it.

    Without ``allow_fallback`` nothing is ever passed over. With it, the manifest's declared chain is gone through in
    order, each backend with the precision that the bundle has for it.

    Raises:
        DeviceError: nothing that may be run fits this machine.
    """
    first = backend or bundle.manifest.defaults.backend
    chain = [name for name in bundle.manifest.defaults.fallback if name != first] if allow_fallback else []
    fallbacks: list[Fallback] = []
    for name in (first, *chain):
        selection: Selection | None = None
        try:
            precisions = (precision,) if precision and name == first else ()
            selection = select_artifact(bundle, backend=name, precisions=precisions)
            require_fit(bundle, selection, machine=machine, request=request)
        except (DeviceError, ConfigError) as error:
            if not allow_fallback:
                raise
            path = selection.artifact.path if selection else ""
            fallbacks.append(Fallback(backend=name, artifact=path, reason=error.message))
            continue
        return selection, tuple(fallbacks)
    raise _nothing_fits(bundle, fallbacks)


def _nothing_fits(bundle: Bundle, fallbacks: list[Fallback]) -> FcosDeployError:
    reasons = "; ".join(f"{item.backend}: {item.reason}" for item in fallbacks)
    return DeviceError(
        f"No backend of the bundle's chain can run here. {reasons}",
        hint=bundle.manifest.provenance.command or "make the bundle for this machine with 'fcos-deploy deploy'",
    )
