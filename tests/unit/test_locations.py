"""Grids and centres of the pyramid levels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcos_deploy.core.decode import CenterMode, level_sizes, location_centers, location_strides

STRIDES = (8, 16, 32, 64, 128)

# Padded input -> grid and step (x, y) of P6 and P7 in torchvision.
TORCHVISION_STEPS = {
    (800, 1088): (((13, 17), (64, 61)), ((7, 9), (120, 114))),
    (800, 1216): (((13, 19), (64, 61)), ((7, 10), (121, 114))),
    (800, 1344): (((13, 21), (64, 61)), ((7, 11), (122, 114))),
    (608, 800): (((10, 13), (61, 60)), ((5, 7), (114, 121))),
    (640, 1280): (((10, 20), (64, 64)), ((5, 10), (128, 128))),
}


@pytest.mark.parametrize(("size", "expected"), TORCHVISION_STEPS.items())
def test_torchvision_steps_are_floored_ratios(size: tuple[int, int], expected: tuple[object, ...]) -> None:
    sizes = level_sizes(*size, strides=STRIDES)
    centers = location_centers(*size, strides=STRIDES, mode=CenterMode.TORCHVISION)
    start = sum(h * w for h, w in sizes[:3])
    found = []
    for rows, columns in sizes[3:]:
        level = centers[start : start + rows * columns].reshape(rows, columns, 2)
        assert level[0, 0].tolist() == [0, 0]
        found.append(((rows, columns), (int(level[0, 1, 0]), int(level[1, 0, 1]))))
        start += rows * columns
    assert tuple(found) == expected


def test_half_centers_lie_in_the_middle_of_cells_row_by_row() -> None:
    centers = location_centers(32, 64, strides=(16, 32), mode=CenterMode.HALF)
    level = [[x, y] for y in (8, 24) for x in (8, 24, 40, 56)]
    assert centers.dtype == np.float32
    assert centers.tolist() == [*level, [16, 16], [48, 16]]


@given(height=st.integers(1, 60), width=st.integers(1, 60))
def test_each_level_is_half_of_the_finer_one_rounded_up(height: int, width: int) -> None:
    """The convolutions with stride 2 and padding 1 that make the levels."""
    sizes = level_sizes(height * 32, width * 32, strides=STRIDES)
    for (fine_h, fine_w), coarse in itertools.pairwise(sizes):
        assert coarse == ((fine_h + 1) // 2, (fine_w + 1) // 2)


@pytest.mark.parametrize("mode", CenterMode)
def test_centers_and_strides_have_one_entry_a_location(mode: CenterMode) -> None:
    count = sum(h * w for h, w in level_sizes(96, 160, strides=STRIDES))
    assert location_centers(96, 160, strides=STRIDES, mode=mode).shape == (count, 2)
    strides = location_strides(96, 160, strides=STRIDES)
    assert strides.shape == (count,)
    assert strides[0] == 8
    assert strides[-1] == 128
