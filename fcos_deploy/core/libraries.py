"""Optional libraries: imported when they are first used, and their version numbers."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType
from typing import Any

from fcos_deploy.core.errors import ConfigError, MissingDependencyError

__all__ = ["lazy_import", "library_versions", "parse_version", "require"]


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
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def require(module: str, *, extra: str = "") -> ModuleType:
    """Import ``module``; a missing library becomes an instruction, a broken one shows its own error.

    ``extra`` is the pip extra that brings the library; empty for one that every installation has.

    Raises:
        MissingDependencyError: when the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise  # The library is there, something it needs is not: its own message is the better one.
        package = f"'fcos-deploy[{extra}]'" if extra else "fcos-deploy"
        raise MissingDependencyError(
            f"This step needs '{error.name}', which is not installed.", hint=f"pip install {package}"
        ) from error


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
