"""Finds the plug-ins: modules of ours that define the marker, and entry points of other distributions."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from typing import Protocol, TypeVar

from fcos_deploy.core.backend import Backend
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError, unknown_name
from fcos_deploy.core.exporter import Exporter

__all__ = ["all_backends", "all_exporters", "backends_for", "discover", "get_backend", "get_exporter", "get_plugin"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


PluginT = TypeVar("PluginT", bound=_Named)


def discover(package: str, *, marker: str, kind: type[PluginT]) -> dict[str, PluginT]:
    """Plug-ins by name, sorted: what public modules of ``package`` call ``marker``, and what entry points load.

    A module that defines several has a tuple of them.

    The group of the entry points is ``fcos_deploy.`` and the last word of ``package``: ``fcos_deploy.runtimes``.

    Raises:
        ConfigError: two plug-ins of one name, or one that is not a ``kind``.
    """
    plugins: dict[str, PluginT] = {}

    def add(plugin: object, origin: str) -> None:
        if not isinstance(plugin, kind):
            raise ConfigError(f"{origin} is not a {kind.__name__}.")
        if plugin.name in plugins:
            raise ConfigError(f"Two plug-ins are named '{plugin.name}'.")
        plugins[plugin.name] = plugin

    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not module_info.name.startswith("_"):
            module = importlib.import_module(f"{package}.{module_info.name}")
            plugin = getattr(module, marker, ())
            for each in plugin if isinstance(plugin, tuple) else (plugin,):
                add(each, f"'{marker}' of '{module.__name__}'")
    for entry in importlib.metadata.entry_points(group=f"fcos_deploy.{package.rpartition('.')[2]}"):
        add(entry.load(), f"Entry point '{entry.name}' of '{entry.value}'")
    return dict(sorted(plugins.items()))


def get_plugin(plugins: Mapping[str, PluginT], name: str, *, role: str) -> PluginT:
    """The plug-in of this name; ``role`` is what messages call it, such as "backend".

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in plugins:
        raise unknown_name(role, name, sorted(plugins))
    return plugins[name]


@functools.cache
def all_backends() -> dict[str, Backend]:
    """All runtimes by name, installed libraries or not."""
    return discover("runtimes", marker="BACKEND", kind=Backend)  # type: ignore[type-abstract]  # for isinstance only


@functools.cache
def all_exporters() -> dict[str, Exporter]:
    """All makers of artifacts by name."""
    return discover("exporters", marker="EXPORTER", kind=Exporter)  # type: ignore[type-abstract]  # for isinstance only


def backends_for(kind: ArtifactKind) -> list[Backend]:
    """The runtimes that open this kind, by name."""
    return [backend for backend in all_backends().values() if kind in backend.accepts]


def get_backend(name: str) -> Backend:
    """One runtime; ConfigError names those that exist."""
    return get_plugin(all_backends(), name, role="backend")


def get_exporter(name: str) -> Exporter:
    """One maker of artifacts; ConfigError names those that exist."""
    return get_plugin(all_exporters(), name, role="exporter")
