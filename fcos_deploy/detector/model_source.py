"""From what the user calls a model to a file and the backend that opens it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.artifact_files import kinds_of
from fcos_deploy.core.backend import Backend
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BackendLoadError, ConfigError, DeviceError
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.registry import backends, backends_for

__all__ = ["ModelSource", "find_model"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file and the runtime that is to open it."""

    path: Path
    backend: Backend


def find_model(model: Path, *, backend: str = "", precision: Precision | None = None) -> ModelSource:
    """A checkpoint, ONNX file, IR or engine as it is; of a bundle the artifact for this backend and precision.

    Raises:
        ConfigError: no such backend, or one that does not open this kind of file, or a bundle without such an artifact.
        BackendLoadError: nothing is there.
        BundleError: the bundle is damaged.
    """
    if not model.exists():
        raise BackendLoadError(
            f"'{model}' is not there.", hint="give a checkpoint, an ONNX file, an engine or a bundle"
        )
    if model.is_dir() or model.suffix == ".tar":
        from fcos_deploy.bundle import select_artifact

        path, name = select_artifact(model, backend=backend, precision=precision)
        return ModelSource(path, backend_named(name))
    kinds = kinds_of(model)
    return ModelSource(model, _named(backend, model, kinds=kinds) if backend else _default(model, kinds=kinds))


def _named(name: str, model: Path, *, kinds: tuple[ArtifactKind, ...]) -> Backend:
    backend = backend_named(name)
    if backend.accepts.isdisjoint(kinds):
        fitting = [other.name for other in backends().values() if not other.accepts.isdisjoint(kinds)]
        raise ConfigError(
            f"Backend '{name}' does not open '{model.name}' ({' or '.join(kinds)}).",
            hint=f"it opens {', '.join(sorted(backend.accepts))}; '{model.name}' is for {', '.join(fitting) or 'none'}",
        )
    return backend


def _default(model: Path, *, kinds: tuple[ArtifactKind, ...]) -> Backend:
    """The backend that is meant for the kind; if it is not installed, the only one that is.

    Raises:
        ConfigError: none is installed, or several and none is meant more than the others.
    """
    able = [backend for kind in kinds for backend in backends_for(kind)]
    meant = [backend for backend in able if not backend.preferred_for.isdisjoint(kinds)]
    others = [backend for backend in able if backend not in meant]
    # One after the other: probing imports the runtime, which the start of a program should not pay for in vain.
    installed = _installed(meant) or _installed(others)
    if len(installed) == 1:
        return installed[0]
    if installed:
        names = ", ".join(backend.name for backend in installed)
        raise ConfigError(f"Several backends open '{model.name}'.", hint=f"name one with --backend: {names}")
    for backend in able:
        probe = backend.probe()
        if probe.version:  # installed, but unable to run: that is what the user wants to know
            raise DeviceError(f"'{model.name}' cannot run here. {backend.name}: {probe.problem}", hint=probe.remedy)
    raise ConfigError(
        f"No backend is installed that opens '{model.name}'.",
        hint=" or ".join(f"pip install 'fcos-deploy[{backend.extra}]'" for backend in able),
    )


def _installed(candidates: list[Backend]) -> list[Backend]:
    return [backend for backend in candidates if backend.probe().available]
