"""How library functions report progress."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ProgressFn", "no_progress"]

# (what is being done, steps done, steps in all); 0 in all means that the end is not known.
ProgressFn = Callable[[str, int, int], None]


def no_progress(label: str, done: int, total: int) -> None:
    """Report nothing."""
