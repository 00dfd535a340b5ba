"""Which artifact of a bundle a command takes, one rule for all of them, and whether this machine can run it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fcos_deploy.bundle.device_layer import renew_command, usable_layers
from fcos_deploy.bundle.manifest import Artifact, Requirements, VersionRule
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.artifact import graph_tail
from fcos_deploy.core.backend import BackendProbe, SessionOptions, get_backend
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError, DeviceError, MissingDependencyError
from fcos_deploy.core.exporter import all_exporters
from fcos_deploy.core.machine import MachineFacts, read_machine, usable_cpus

__all__ = [
    "Fallback",
    "Selection",
    "preflight",
    "select_artifact",
    "select_runnable",
    "select_with_layers",
    "tuned_options",
]


@dataclass(frozen=True, slots=True)
class Selection:
    """An artifact and the backend that reads it."""

    artifact: Artifact
    backend: str


def select_artifact(
    bundle: Bundle,
    *,
    backend: str = "",
    precisions: Sequence[Precision] = (),
    tail: Tail | None = None,
    readers: Mapping[ArtifactKind, str] | None = None,
    purpose: str = "",
    layers: Sequence[Artifact] = (),
    preferred: Precision | None = None,
) -> Selection:
    """The artifact of ``bundle`` that ``backend`` reads; by default the bundle's own backend.

    ``precisions``: the first of them that the bundle has; empty prefers the bundle's default. ``readers``: the backend
    that reads each kind of artifact, where that is not ``backend`` with the kinds it accepts: a builder reads ONNX
    files, a server has a backend for each kind. ``backend`` then restricts them, and ``purpose`` takes its place in
    errors. ``layers``: artifacts that were built on this device, which go before the bundle's own of their precision.
    ``preferred``: the precision that was chosen on this device, in place of the bundle's default.

    Never taken: an artifact that was built for another backend, and one whose Q/DQ placement its reader does not
    execute as meant. Several that remain are ranked: first by the bundle's default backend, then by its default
    precision, then what was built for its reader, then the placement that is fastest there, and last ``tail`` (by
    default that of the bundle's contract).

    Raises:
        ConfigError: no artifact, or several of the same rank; the hint lists what the bundle has.
    """
    defaults = bundle.manifest.defaults
    if readers is None:
        backend = backend or defaults.backend
        readers = dict.fromkeys(get_backend(backend).accepts, backend)
    readable = [
        Selection(artifact, readers[artifact.kind])
        for artifact in (*bundle.manifest.artifacts, *layers)
        if artifact.kind in readers and backend in ("", readers[artifact.kind])
    ]
    fitting = [
        selection
        for selection in readable
        if selection.artifact.backend in ("", selection.backend)
        and selection.artifact.placement in ("", *get_backend(selection.backend).placements)
    ]
    if precisions:
        by_precision = ([s for s in fitting if s.artifact.precision is precision] for precision in precisions)
        fitting = next(filter(None, by_precision), [])

    def rank(selection: Selection) -> tuple[bool, bool, bool, bool, int]:
        artifact, placements = selection.artifact, get_backend(selection.backend).placements
        return (
            selection.backend != defaults.backend,
            artifact.precision is not (preferred or defaults.precision),
            artifact not in layers,
            artifact.backend != selection.backend,
            placements.index(artifact.placement) if artifact.placement else len(placements),
        )

    first = min(map(rank, fitting), default=None)
    best = [selection for selection in fitting if rank(selection) == first]
    if len(best) > 1:
        preferred_tail = tail or bundle.manifest.contract.tail
        best = [s for s in best if graph_tail(s.artifact.path) is preferred_tail] or best
    if len(best) == 1:
        return best[0]
    contents = ", ".join(f"{a.path} ({a.precision}, {a.backend or a.kind})" for a in bundle.manifest.artifacts)
    asked = f" in {' or '.join(precisions)}" if precisions else ""
    reader = purpose or f"backend '{backend}'"
    raise ConfigError(
        f"The bundle '{bundle.source}' has {'several artifacts' if best else 'no artifact'} for {reader}{asked}.",
        hint=f"it has: {contents or 'nothing'}{'' if best else _build_hint(bundle, backend)}",
    )


def _build_hint(bundle: Bundle, backend: str) -> str:
    """How to build here what the bundle lacks, where it has a graph to build from."""
    command = shlex.join(["fcos-deploy", "setup", str(bundle.source), "--backend", backend])
    return f"; build it here: {command}" if _is_buildable(bundle, backend) else ""


def _is_buildable(bundle: Bundle, backend: str) -> bool:
    return backend in all_exporters() and any(a.kind is ArtifactKind.ONNX for a in bundle.manifest.artifacts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """A backend that was passed over for the next one of the bundle's chain, and why; for records and logs."""

    backend: str
    artifact: str
    reason: str


def select_with_layers(bundle: Bundle, *, backend: str, precision: Precision | None = None) -> Selection:
    """As ``select_artifact``, with what was built and chosen on this device."""
    layers = usable_layers(bundle, backend=backend)
    return select_artifact(
        bundle,
        backend=backend,
        precisions=(precision,) if precision else (),
        layers=[artifact for layer in layers for artifact in layer.artifacts],
        preferred=next((layer.choice.precision for layer in layers if layer.choice), None),
    )


def select_runnable(
    bundle: Bundle, *, backend: str = "", precision: Precision | None = None, allow_fallback: bool = False
) -> tuple[Selection, tuple[Fallback, ...]]:
    """The artifact to run after preflight, and the backends that were passed over on the way to it.

    Without ``allow_fallback`` nothing is ever passed over. With it, the chain that the manifest declares is tried in
    order, each backend with the precision that the bundle has for it.

    Raises:
        ConfigError: the bundle has no artifact for the backend, or several that nothing tells apart.
        MissingDependencyError: the library of its runtime is not installed.
        DeviceError: nothing that may be run fits this machine.
    """
    defaults = bundle.manifest.defaults
    first = backend or defaults.backend
    fallbacks: list[Fallback] = []
    for name in dict.fromkeys((first, *(defaults.fallback if allow_fallback else ()))):
        path = ""
        try:
            selection = select_with_layers(bundle, backend=name, precision=precision if name == first else None)
            path = selection.artifact.path
            _require_fit(bundle, selection)
        except (DeviceError, MissingDependencyError, ConfigError) as error:
            if not allow_fallback:
                raise
            fallbacks.append(Fallback(backend=name, artifact=path, reason=error.message))
        else:
            return selection, tuple(fallbacks)
    raise DeviceError(
        "None of the backends that the bundle lists can run here. "
        + "; ".join(f"{f.backend}: {f.reason}" for f in fallbacks),
        hint="make the bundle for this machine with 'fcos-deploy deploy'",
    )


def tuned_options(bundle: Bundle, selection: Selection, options: SessionOptions) -> SessionOptions:
    """``options`` with what the bundle was tuned with where they leave it open, if its default artifact is selected.

    Threads, streams and batch are those of one goal: they are not taken for another one, and threads and streams
    neither on a machine with fewer cores, nor where one of the two is asked for.
    """
    defaults = bundle.manifest.defaults
    if (selection.backend, selection.artifact.precision) != (defaults.backend, defaults.precision):
        return options
    options = replace(options, compute=options.compute or defaults.compute)
    tuned = SessionOptions(hint=defaults.hint, threads=defaults.threads, streams=defaults.streams, batch=defaults.batch)
    if options.hint not in (None, tuned.goal):
        return options
    options = replace(options, hint=options.hint or tuned.hint, batch=options.batch or tuned.batch)
    needed = max(tuned.threads or 1, tuned.streams or 1)
    if needed > usable_cpus() or options.threads is not None or options.streams is not None:
        return options
    return replace(options, threads=tuned.threads, streams=tuned.streams)


def _require_fit(bundle: Bundle, selection: Selection) -> None:
    """Refuse an artifact that this machine cannot run, naming all that differs, and the command that rebuilds."""
    probe = get_backend(selection.backend).probe()
    differences = preflight(selection.artifact, probe=probe, machine=read_machine())
    if not differences:
        return
    # Never a line of the manifest: pasted into a shell it would be a program of whoever wrote it.
    rebuild = "fcos-deploy deploy"
    if _is_buildable(bundle, selection.backend):
        rebuild = renew_command(bundle, backend=selection.backend, precision=selection.artifact.precision)
    chain = ", then ".join(bundle.manifest.defaults.fallback)
    hint = f"rebuild it here: {rebuild}" + (f"; or --allow-fallback to use {chain}" if chain else "")
    problem = "; ".join(differences) if probe.available else probe.problem.rstrip(".") or "it is missing"
    refusal = MissingDependencyError if probe.missing else DeviceError
    raise refusal(
        f"'{selection.artifact.path}' cannot run here with '{selection.backend}': {problem}.",
        hint=hint if probe.available else probe.remedy or hint,
    )


def preflight(artifact: Artifact, *, probe: BackendProbe, machine: MachineFacts) -> tuple[str, ...]:
    """Everything that keeps this machine from running ``artifact``, in sentences; empty when it fits."""
    needs = artifact.requires
    if not probe.available:
        return (_differs("the runtime", "installed", probe.problem or "missing"),)
    return (*_version(needs, probe.version), *_gpu(needs, machine), *_host(needs, machine, probe))


def _differs(what: str, needed: str, present: str) -> str:
    return f"{what} must be {needed}, it is {present or 'unknown'}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _version(needs: Requirements, present: str) -> Iterator[str]:
    needed = needs.backend_version
    fits, words = {
        VersionRule.EXACT: (present == needed, ""),
        VersionRule.SAME_MAJOR: (_numbers(present)[:1] == _numbers(needed)[:1], " (same major)"),
        VersionRule.AT_LEAST: (
            # Within a release series (2026.4) older patches read what newer ones wrote.
            _numbers(present) >= _numbers(needed) or _numbers(present)[:2] == _numbers(needed)[:2],
            " or newer",
        ),
    }[needs.version_rule]
    if needed and not fits:
        yield _differs("the runtime's version", needed + words, present)


def _gpu(needs: Requirements, machine: MachineFacts) -> Iterator[str]:
    capabilities = [capability for _, capability in machine.gpus]
    if needs.hardware_compatible:
        oldest = min(map(_numbers, needs.compute_capabilities), default=())
        fits = any(_numbers(capability) >= oldest for capability in capabilities)
    else:
        fits = any(capability in needs.compute_capabilities for capability in capabilities)
    if needs.compute_capabilities and not fits:
        newer = " or newer" if needs.hardware_compatible else ""
        present = ", ".join(f"{capability} ({name})" for name, capability in machine.gpus) or "no NVIDIA GPU"
        yield _differs("the GPU's compute capability", " or ".join(needs.compute_capabilities) + newer, present)
    if needs.driver and _numbers(machine.nvidia_driver) < _numbers(needs.driver):
        yield _differs("the NVIDIA driver", f"{needs.driver} or newer", machine.nvidia_driver)


def _host(needs: Requirements, machine: MachineFacts, probe: BackendProbe) -> Iterator[str]:
    if needs.machine and needs.machine != machine.machine:
        yield _differs("the processor's architecture", needs.machine, machine.machine)
    missing = sorted(set(needs.cpu_features) - set(machine.cpu_features))
    if missing:
        yield _differs("the processor", f"one with {', '.join(missing)}", f"{machine.processor}, without")
    # Backends name devices such as "GPU.1", "cuda:0" or "GPU (NVIDIA ...)": the word before the index is the kind.
    devices = [device.lower() for device in probe.devices]
    needed = needs.device.lower()
    if needed and not any(needed in (device, re.split(r"[.: ]", device)[0]) for device in devices):
        yield _differs("the device", needs.device, ", ".join(probe.devices) or "none")
