"""Fingerprints tell a real difference from rounding; golden detections are held to their gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy.accuracy.verify import compare_golden
from fcos_deploy.bundle.golden import (
    GoldenDetections,
    fingerprint,
    fingerprint_difference,
    make_golden,
    read_golden_image,
)
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import BundleError, ImageError
from fcos_deploy.core.matching import MatchOptions
from fcos_deploy.core.preprocess import InputDtype, preprocess

RULE = MatchOptions(iou_threshold=0.8, max_score_delta=0.1, min_score=0.3)


def _image() -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:90, 0:120]
    return np.stack([rows * 2, columns * 2, rows + columns], 2).astype(np.uint8)


def _detections(*rows: tuple[float, float, float, float, float, int]) -> Detections:
    table = np.array(rows, np.float64).reshape(-1, 6)
    return Detections(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64))


@pytest.mark.parametrize("dtype", list(InputDtype))
def test_one_level_of_rounding_in_single_pixels_is_tolerated(bundle_contract: ModelContract, dtype: InputDtype) -> None:
    spec = dataclasses.replace(bundle_contract.preprocess, input_dtype=dtype)
    tensor, _ = preprocess(_image(), spec)
    wanted = fingerprint(tensor)
    assert fingerprint_difference(wanted, wanted, spec=spec) == 0.0
    level = 1.0 if dtype is InputDtype.UINT8 else 1.0 / (spec.pixel_scale * max(spec.std))
    rounded = tensor.copy()
    rounded[:, ::7, ::7] = (rounded[:, ::7, ::7] + level).astype(tensor.dtype)
    assert 0 < fingerprint_difference(fingerprint(rounded), wanted, spec=spec) < 0.5


@pytest.mark.parametrize("dtype", list(InputDtype))
def test_swapped_channels_and_a_shift_are_no_rounding(bundle_contract: ModelContract, dtype: InputDtype) -> None:
    spec = dataclasses.replace(bundle_contract.preprocess, input_dtype=dtype)
    tensor, _ = preprocess(_image(), spec)
    wanted = fingerprint(tensor)
    assert fingerprint_difference(fingerprint(tensor[::-1]), wanted, spec=spec) > 5
    assert fingerprint_difference(fingerprint(np.roll(tensor, 1, axis=2)), wanted, spec=spec) > 0.5


def test_another_shape_or_dtype_is_infinitely_far(bundle_contract: ModelContract) -> None:
    spec = bundle_contract.preprocess
    tensor, _ = preprocess(_image(), spec)
    for other in (tensor[:, :32], tensor.astype(np.float32)):
        assert fingerprint_difference(fingerprint(other), fingerprint(tensor), spec=spec) == float("inf")


def test_images_come_back_pixel_by_pixel(bundle_contract: ModelContract, tmp_path: Path) -> None:
    (golden,) = make_golden(
        [_image()], [_detections((1, 2, 30, 40, 0.5, 1))], folder=tmp_path, contract=bundle_contract
    )
    np.testing.assert_array_equal(read_golden_image((tmp_path / golden.path).read_bytes(), golden), _image())
    assert golden.detections.to_detections().boxes.tolist() == [[1, 2, 30, 40]]


def test_images_without_a_single_detection_prove_nothing(bundle_contract: ModelContract, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="prove nothing"):
        make_golden([_image()], [_detections()], folder=tmp_path, contract=bundle_contract)


def test_a_png_that_claims_another_size_is_not_decoded(bundle_contract: ModelContract, tmp_path: Path) -> None:
    (golden,) = make_golden(
        [_image()], [_detections((1, 2, 30, 40, 0.5, 1))], folder=tmp_path, contract=bundle_contract
    )
    path = tmp_path / golden.path
    path.write_bytes(path.read_bytes()[:16] + (1 << 20).to_bytes(4, "big") * 2 + path.read_bytes()[24:])
    with pytest.raises(ImageError, match="must be 90x120, got 1048576x1048576"):
        read_golden_image(path.read_bytes(), golden)
    path.write_bytes(b"GIF89a")
    with pytest.raises(ImageError, match="not a PNG"):
        read_golden_image(path.read_bytes(), golden)


def test_the_same_detections_match() -> None:
    found = _detections((0, 0, 10, 10, 0.9, 0), (20, 20, 40, 40, 0.6, 1))
    result = compare_golden(found, found, options=RULE)
    assert (result.expected, result.detected, result.missed, result.extra) == (2, 2, 0, 0)
    assert (result.lowest_iou, result.largest_score_difference) == (1.0, 0.0)


@pytest.mark.parametrize(
    "other",
    [
        (0, 0, 10, 10, 0.9, 1),  # another class
        (4, 0, 14, 10, 0.9, 0),  # IoU 6 / 14
        (0, 0, 10, 10, 0.7, 0),  # score off by 0.2
    ],
)
def test_another_class_place_or_score_is_missed_and_extra(
    other: tuple[float, float, float, float, float, int],
) -> None:
    result = compare_golden(_detections((0, 0, 10, 10, 0.9, 0)), _detections(other), options=RULE)
    assert (result.missed, result.extra) == (1, 1)


def test_a_box_clipped_to_a_line_is_its_own_counterpart() -> None:
    line = _detections((0, 5, 0, 10, 0.9, 0), (3, 3, 3.2, 3.1, 0.8, 0))
    moved = _detections((0.01, 5, 0.01, 10.02, 0.9, 0), (3.02, 3, 3.2, 3.12, 0.8, 0))
    result = compare_golden(line, moved, options=RULE)
    assert (result.missed, result.extra, result.lowest_iou) == (0, 0, 1.0)


def test_a_detection_below_the_floor_may_come_or_go() -> None:
    wanted = _detections((0, 0, 10, 10, 0.9, 0), (50, 50, 60, 60, 0.25, 0))
    found = _detections((0, 0, 10, 10, 0.9, 0), (80, 80, 90, 90, 0.28, 0))
    result = compare_golden(wanted, found, options=RULE)
    assert (result.expected, result.missed, result.extra) == (1, 0, 0)


def test_one_that_falls_below_the_floor_still_is_a_counterpart() -> None:
    result = compare_golden(_detections((0, 0, 10, 10, 0.31, 0)), _detections((0, 0, 10, 10, 0.25, 0)), options=RULE)
    assert (result.expected, result.detected, result.missed) == (1, 0, 0)


def test_two_for_one_counts_as_one_extra() -> None:
    wanted = _detections((0, 0, 10, 10, 0.9, 0))
    found = _detections((0, 0, 10, 10, 0.9, 0), (0, 0, 10, 9.5, 0.85, 0))
    assert compare_golden(wanted, found, options=RULE).extra == 1


def test_nothing_on_either_side_is_no_failure_of_the_image() -> None:
    result = compare_golden(_detections(), _detections(), options=RULE)
    assert (result.expected, result.detected, result.lowest_iou) == (0, 0, 1.0)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(BundleError):
        GoldenDetections(boxes=((0, 0, 1, 1),), scores=(), labels=(1,))
