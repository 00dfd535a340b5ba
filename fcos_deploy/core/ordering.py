"""Descending order of scores, with earlier entries first among equal ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["best_first"]

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
