"""What tensors may enter a session."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_deploy.core.errors import ConfigError, TensorMismatchError
from fcos_deploy.core.tensor_spec import TensorSpec

IMAGES = TensorSpec("images", "uint8", (None, 3, 64, 64))


@pytest.mark.parametrize("batch", [1, 5])
def test_dynamic_axes_take_any_length(batch: int) -> None:
    IMAGES.check(np.zeros((batch, 3, 64, 64), np.uint8))


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.zeros((1, 3, 64, 64), np.float32), r"got float32\[1, 3, 64, 64\]"),
        (np.zeros((1, 64, 64, 3), np.uint8), r"got uint8\[1, 64, 64, 3\]"),
        (np.zeros((3, 64, 64), np.uint8), r"got uint8\[3, 64, 64\]"),
    ],
)
def test_mismatch_says_what_was_expected_and_what_came(array: np.ndarray, got: str) -> None:
    with pytest.raises(TensorMismatchError, match=rf"Tensor 'images' must be uint8\[\?, 3, 64, 64\], {got}\."):
        IMAGES.check(array)


def test_impossible_specs_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        TensorSpec("", "uint8", (1,))
    with pytest.raises(ConfigError, match="unknown dtype 'bfloat17'"):
        TensorSpec("images", "bfloat17", (1,))
