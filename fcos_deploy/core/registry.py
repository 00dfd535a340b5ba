"""Finds the plug-ins: modules of ours that define the marker, and entry points of third parties."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from typing import TypeVar

from fcos_deploy.core.backend import Backend
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import Exporter

__all__ = ["all_backends", "all_exporters", "backends_for", "get_backend", "get_exporter"]

P = TypeVar("P", Backend, Exporter)


@functools.cache
def all_backends() -> dict[str, Backend]:
    """All runtimes by name, installed libraries or not."""
    return _discover("runtimes", "BACKEND", Backend)  # type: ignore[type-abstract]  # used for isinstance only


@functools.cache
def all_exporters() -> dict[str, Exporter]:
    """All makers of artifacts by name."""
    return _discover("exporters", "EXPORTER", Exporter)  # type: ignore[type-abstract]  # used for isinstance only


def get_backend(name: str) -> Backend:
    """One runtime.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in all_backends():
        raise ConfigError(f"There is no backend '{name}'.", hint=f"backends: {', '.join(sorted(all_backends()))}")
    return all_backends()[name]


def backends_for(kind: ArtifactKind) -> list[Backend]:
    """The runtimes that open this kind, by name."""
    return [b for _, b in sorted(all_backends().items()) if kind in b.accepts]


def get_exporter(name: str) -> Exporter:
    """The maker of artifacts of this name.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in all_exporters():
        raise ConfigError(f"There is no exporter '{name}'.", hint=f"exporters: {', '.join(sorted(all_exporters()))}")
    return all_exporters()[name]


def _discover(package: str, marker: str, kind: type[P]) -> dict[str, P]:
    found: dict[str, P] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name.startswith("_"):
            continue
        plugin = getattr(importlib.import_module(f"{package}.{module.name}"), marker, None)
        if isinstance(plugin, kind):
            _add(found, plugin)
    for entry in importlib.metadata.entry_points(group=f"fcos_deploy.{package}"):
        plugin = entry.load()
        if not isinstance(plugin, kind):
            raise ConfigError(f"Entry point '{entry.name}' of '{entry.value}' is not a {kind.__name__}.")
        _add(found, plugin)
    return dict(sorted(found.items()))


def _add(found: dict[str, P], plugin: P) -> None:
    if plugin.name in found:
        raise ConfigError(f"Two plug-ins are named '{plugin.name}'.")
    found[plugin.name] = plugin
