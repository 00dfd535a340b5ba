"""From what the user calls a model to a file and the backend that opens it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.core.artifact_files import kinds_of
from fcos_deploy.core.backend import Backend, SessionOptions
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BackendLoadError, ConfigError, DeviceError, SignatureError
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.registry import backends, backends_for

if TYPE_CHECKING:
    from fcos_deploy.bundle.preflight import StepDown

__all__ = ["ModelSource", "find_model"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file, the runtime that is to open it, and those of the bundle that were passed over for it."""

    path: Path
    backend: Backend
    stepped_down: tuple[StepDown, ...] = ()


def find_model(
    model: Path, *, backend: str = "", precision: Precision | None = None, options: SessionOptions | None = None
) -> ModelSource:
    """A checkpoint, ONNX file, IR or engine as it is; of a bundle the artifact for this backend and precision.

    Raises:
        ConfigError: no such backend, or one that does not open this kind of file, or a bundle without such an artifact.
        BackendLoadError: nothing is there.
        BundleError: the bundle is damaged.
        SignatureError: a signature is asked for, and this is not a bundle that one of the keys signed.
        DeviceError: the bundle's artifact does not fit this machine.
    """
    options = options or SessionOptions()
    if not model.exists():
        raise BackendLoadError(
            f"'{model}' is not there.", hint="give a checkpoint, an ONNX file, an engine or a bundle"
        )
    if model.is_dir() or model.suffix == ".tar":
        return _of_bundle(model, backend=backend, precision=precision, options=options)
    if options.public_keys:
        raise SignatureError(
            f"'{model}' is not a bundle, so nobody has signed it.", hint="give the signed bundle that it belongs to"
        )
    kinds = kinds_of(model)
    return ModelSource(model, _named(backend, model, kinds=kinds) if backend else _default(model, kinds=kinds))


def _of_bundle(model: Path, *, backend: str, precision: Precision | None, options: SessionOptions) -> ModelSource:
    from fcos_deploy.bundle import open_bundle
    from fcos_deploy.bundle.preflight import choose

    bundle = open_bundle(model, public_keys=options.public_keys)
    selection, passed = choose(bundle, backend=backend, precision=precision, allow_fallback=options.allow_fallback)
    for step in passed:
        _LOG.warning("'%s' steps down from '%s': %s", model, step.backend, step.reason)
    return ModelSource(bundle.path(selection.artifact.path), backend_named(selection.backend), passed)


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
