"""Where the locations of each pyramid level lie in the network input (spec 10.2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.enums import CenterMode

__all__ = ["CenterMode", "level_sizes", "location_centers", "location_strides"]


def level_sizes(height: int, width: int, *, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Grid (h, w) of each level for a padded network input; every halving rounds up (spec 2.1)."""
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def location_centers(height: int, width: int, *, strides: tuple[int, ...], mode: CenterMode) -> NDArray[np.float32]:
    """Centres (L, 2) float32 as x, y in network-input pixels; levels finest first, row by row."""
    centers = []
    for (rows, columns), stride in zip(level_sizes(height, width, strides=strides), strides, strict=True):
        if mode is CenterMode.TORCHVISION:
            step_x, step_y, offset = width // columns, height // rows, 0.0
        else:
            step_x, step_y, offset = stride, stride, 0.5
        x, y = (np.arange(columns) + offset) * step_x, (np.arange(rows) + offset) * step_y
        centers.append(np.stack(np.broadcast_arrays(x[None, :], y[:, None]), -1).reshape(-1, 2))
    return np.concatenate(centers).astype(np.float32)


def location_strides(height: int, width: int, *, strides: tuple[int, ...]) -> NDArray[np.float32]:
    """Stride (L,) float32 of each location, in the order of ``location_centers``."""
    sizes = level_sizes(height, width, strides=strides)
    return np.repeat(np.asarray(strides, np.float32), [rows * columns for rows, columns in sizes])
