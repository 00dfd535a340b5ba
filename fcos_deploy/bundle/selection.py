"""Which artifact of a bundle a command takes: one rule for running, verifying, building and packaging."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fcos_deploy.bundle.manifest import Artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.contract import find_contract
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.registry import all_exporters, get_backend

__all__ = ["Selection", "select_artifact"]


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
    fitting = [
        Selection(artifact, readers[artifact.kind])
        for artifact in (*bundle.manifest.artifacts, *layers)
        if artifact.kind in readers and backend in ("", readers[artifact.kind]) and _fits(artifact, readers)
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
        best = [s for s in best if _tail(bundle, s.artifact) is preferred_tail] or best
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
    buildable = backend in all_exporters() and any(a.kind is ArtifactKind.ONNX for a in bundle.manifest.artifacts)
    return (
        f"; build it here: {shlex.join(['fcos-deploy', 'setup', str(bundle.source), '--backend', backend])}"
        if (buildable)
        else ""
    )


def _fits(artifact: Artifact, readers: Mapping[ArtifactKind, str]) -> bool:
    reader = readers[artifact.kind]
    return artifact.backend in ("", reader) and (
        not artifact.placement or artifact.placement in get_backend(reader).placements
    )


def _tail(bundle: Bundle, artifact: Artifact) -> Tail | None:
    contract = find_contract(bundle.path(artifact.path))
    return contract.tail if contract else None
