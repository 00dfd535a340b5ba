"""What is installed: optional libraries, imported when they are first used, their versions; and plug-ins."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, TypeVar

from fcos_deploy.core.errors import ConfigError, MissingDependencyError, unknown_name

__all__ = [
    "discover",
    "get_plugin",
    "lazy_import",
    "library_versions",
    "missing_library",
    "parse_version",
    "recorded_versions",
    "require",
]


def parse_version(text: str) -> tuple[int, ...]:
    """``"10.13.3.9"`` -> ``(10, 13, 3, 9)``; suffixes such as ``.post1`` or ``+cuda12`` are left out."""
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise ConfigError(f"'{text}' is not a version number.")
    return tuple(int(part) for part in match.group().split("."))


def library_versions(*distributions: str) -> dict[str, str]:
    """Versions of those that are installed, in this order; a system package without metadata (Jetson) is left out."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = _version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.lru_cache(maxsize=64)
def _version(distribution: str) -> str:
    """Read once: what is imported stays what it was. Of a library that is missing nothing is kept."""
    return importlib.metadata.version(distribution)


# What figures and detections depend on, by the names of their distributions; of OpenCV and ONNX Runtime the one that is
# installed.
_RECORDED = (
    *("fcos-deploy", "numpy", "opencv-python-headless", "opencv-python", "opencv-contrib-python-headless"),
    *("opencv-contrib-python", "pillow", "torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "onnxruntime-gpu"),
    *("openvino", "nncf", "tensorrt", "tensorrt-rtx-cu13", "cuda-python", "faster-coco-eval"),
)


def recorded_versions() -> dict[str, str]:
    """Python's version and those of all libraries here that can change a result, for reports, manifests and records."""
    return {"python": platform.python_version(), **library_versions(*_RECORDED)}


# ONNX Runtime of 1.29 and later sends usage events and writes an event queue to the temporary folder; its opt-out is
# read when it is imported. OpenVINO and NNCF send theirs with the package ``openvino_telemetry``, and do without it
# where that cannot be imported; its own opt-out is a file in the home folder, which is not ours to write.
_OPT_OUT_VARIABLE = "ORT_DISABLE_TELEMETRY"
_TELEMETRY_PACKAGE = "openvino_telemetry"


def require(module: str, *, extra: str = "") -> ModuleType:
    """Import ``module`` without its telemetry; a missing library is an instruction, a broken one shows its own error.

    ``extra`` is the pip extra that brings the library; empty for one that every installation has.

    Raises:
        MissingDependencyError: when the library is not installed.
    """
    if not os.environ.get(_OPT_OUT_VARIABLE):  # what the user has set stays
        os.environ[_OPT_OUT_VARIABLE] = "1"
    sys.modules.setdefault(_TELEMETRY_PACKAGE, None)  # type: ignore[arg-type]  # None: the import fails
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # The library is there, something it needs is not: its own message is the better one.
        package = f"'fcos-deploy[{extra}]'" if extra else "fcos-deploy"
        raise MissingDependencyError(f"'{error.name}' is not installed.", hint=f"pip install {package}") from error


def missing_library(error: ModuleNotFoundError) -> MissingDependencyError | None:
    """The error with the instruction for a library of an extra whose import failed somewhere; None for any other."""
    name = (error.name or "").partition(".")[0]
    for requirement in importlib.metadata.requires("fcos-deploy") or ():
        package, extra = re.match(r"[\w-]+", requirement), re.search(r"extra == ['\"]([\w-]+)", requirement)
        if name and package and extra and package[0].lower() == name.lower():
            hint = f"pip install 'fcos-deploy[{extra[1]}]'"
            return MissingDependencyError(f"'{name}' is not installed.", hint=hint)
    return None


class _LazyModule:
    """A library that is imported when one of its attributes is first used."""

    def __init__(self, module: str, extra: str) -> None:
        self._module, self._extra = module, extra

    def __getattr__(self, name: str) -> Any:  # Any: the library's own attributes
        value = getattr(require(self._module, extra=self._extra), name)
        setattr(self, name, value)
        return value


def lazy_import(module: str, *, extra: str = "") -> Any:  # Any: stands for the module
    """Stand in for ``module`` until an attribute of it is used; the import then raises what ``require`` raises.

    Written once near the top of a file: ``ov = lazy_import("openvino", extra="openvino")``.
    """
    return _LazyModule(module, extra)


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
