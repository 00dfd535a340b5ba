"""Version numbers as tuples."""

from __future__ import annotations

import re

from fcos_deploy.core.errors import ConfigError

__all__ = ["parse_version"]


def parse_version(text: str) -> tuple[int, ...]:
    """``"10.13.3.9"`` -> ``(10, 13, 3, 9)``; suffixes such as ``.post1`` or ``+cuda12`` are left out."""
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise ConfigError(f"'{text}' is not a version number.")
    return tuple(int(part) for part in match.group().split("."))
