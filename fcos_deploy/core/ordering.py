"""Descending order of scores, with earlier entries first among equal ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_first", "best_of_groups"]

_LOW = np.uint64(0xFFFFFFFF)


def best_first(scores: NDArray[np.float32], *, limit: int | None = None) -> NDArray[np.intp]:
    """Indices of the ``limit`` best of (n,) float32 scores >= 0, best first; the earlier index first among equals."""
    # The bits of non-negative floats sort as the floats do. With the index below them keys are unique, so that NumPy's
    # vectorised sort, which is not stable, gives the stable order; it is several times faster than the stable one.
    keys = (~np.ascontiguousarray(scores, np.float32).view(np.uint32)).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    if limit is not None and limit < len(keys):
        keys = np.partition(keys, limit)[:limit]
    keys.sort()
    return (keys & _LOW).astype(np.intp)


def best_of_groups(scores: NDArray[np.float32], ends: Sequence[int], *, limit: int | None = None) -> NDArray[np.intp]:
    """Indices of the ``limit`` best of each group of (n,) scores >= 0; groups in order, best first within a group.

    ``ends``: where the groups, which lie one after the other, end; at most 8 of them.
    """
    starts = [0, *ends[:-1]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    if limit is not None and max(sizes) > limit:
        parts = [best_first(scores[a:b], limit=limit) + a for a, b in zip(starts, ends, strict=True) if b > a]
        return np.concatenate(parts)
    # All in one sort: 3 bits of group, 31 of the score (its sign is 0), 30 of index.
    keys = (~np.ascontiguousarray(scores, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)).astype(np.uint64)
    keys <<= np.uint64(30)
    keys |= np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(61), sizes)
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0x3FFFFFFF)).astype(np.intp)
