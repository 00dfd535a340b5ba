"""The ecosystems whose checkpoints are read: every public module here that defines ``ECOSYSTEM`` is one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable

from fcos_deploy.checkpoints.rules import Ecosystem
from fcos_deploy.core.errors import CheckpointError, ConfigError

__all__ = ["detect_ecosystem", "ecosystem", "ecosystems"]


@functools.cache
def ecosystems() -> dict[str, Ecosystem]:
    """All ecosystems by name."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    found = [module.ECOSYSTEM for module in modules if hasattr(module, "ECOSYSTEM")]
    return {item.name: item for item in sorted(found, key=lambda e: e.name)}


def ecosystem(name: str) -> Ecosystem:
    """One ecosystem.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in ecosystems():
        raise ConfigError(f"There is no ecosystem '{name}'.", hint=f"ecosystems: auto, {', '.join(ecosystems())}")
    return ecosystems()[name]


def detect_ecosystem(names: Iterable[str]) -> Ecosystem:
    """The one ecosystem whose signature the names of a checkpoint bear.

    Raises:
        CheckpointError: when none or several fit, with names that were found.
    """
    present = frozenset(names)
    fitting = [item for item in ecosystems().values() if item.matches(present)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"The tensors' names fit {' and '.join(e.name for e in fitting)}.", hint="choose one with --ecosystem"
        )
    shown = ", ".join(f"'{n}'" for n in sorted(present)[:4])
    raise CheckpointError(
        f"This is not an FCOS checkpoint that we know: {len(present)} tensors, such as {shown}.",
        hint=f"known: {', '.join(ecosystems())}; for a network of your own see docs/your-own-fcos.md",
    )
