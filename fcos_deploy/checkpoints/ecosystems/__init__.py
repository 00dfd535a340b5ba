"""The ecosystems whose checkpoints are read: every public module here that defines ``ECOSYSTEM`` is one."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from fcos_deploy.checkpoints.rules import Ecosystem
from fcos_deploy.core.errors import CheckpointError
from fcos_deploy.core.libraries import discover, get_plugin

__all__ = ["all_ecosystems", "detect_ecosystem", "get_ecosystem"]


@functools.cache
def all_ecosystems() -> dict[str, Ecosystem]:
    """All ecosystems by name."""
    return discover(__name__, marker="ECOSYSTEM", kind=Ecosystem)


def get_ecosystem(name: str) -> Ecosystem:
    """One ecosystem; ConfigError names those that exist."""
    return get_plugin(all_ecosystems(), name, role="ecosystem")


def detect_ecosystem(names: Iterable[str]) -> Ecosystem:
    """The one ecosystem whose signature the names of a checkpoint bear.

    Raises:
        CheckpointError: when none or several fit, with names that were found.
    """
    present = frozenset(names)
    fitting = [item for item in all_ecosystems().values() if not item.missing(present)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"The tensors' names fit {' and '.join(e.name for e in fitting)}.", hint="choose one with --ecosystem"
        )
    shown = ", ".join(f"'{n}'" for n in sorted(present)[:4])
    raise CheckpointError(
        f"This is not a known FCOS checkpoint. Its {len(present)} tensors have names such as {shown}.",
        hint=f"known: {', '.join(all_ecosystems())}; for a network of your own see docs/your-own-fcos.md",
    )
