"""Smallest, usual and largest of a size, as text."""

from __future__ import annotations

from fcos_deploy.core.errors import ConfigError

__all__ = ["optional_range", "size_range"]


def size_range(text: str) -> tuple[int, int, int]:
    """``"4"`` -> (4, 4, 4), ``"1,4,8"`` -> (1, 4, 8).

    Raises:
        ConfigError: anything else, or sizes that are not in order.
    """
    parts = text.split(",")
    sizes = [int(part) for part in parts if part.strip().isdecimal()]
    if len(sizes) != len(parts) or len(sizes) not in (1, 3):
        raise ConfigError(f"A size is 'N' or 'SMALLEST,USUAL,LARGEST', got '{text}'.", hint="for example 1,4,8")
    smallest, usual, largest = sizes * 3 if len(sizes) == 1 else sizes
    if not 1 <= smallest <= usual <= largest:
        raise ConfigError(f"Sizes must be at least 1 and in order, got '{text}'.")
    return smallest, usual, largest


def optional_range(text: str) -> tuple[int, int, int] | None:
    """As ``size_range``; None for empty text."""
    return size_range(text) if text else None
