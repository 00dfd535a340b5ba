"""Whether this machine prepares images as the one that made the bundle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.bundle.golden import GoldenImage, fingerprint, fingerprint_difference, read_golden_image
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.preprocess import preprocess
from fcos_deploy.core.preprocess_spec import ChannelOrder, PreprocessSpec
from fcos_deploy.verification.records import PreprocessingResult

__all__ = ["check_preprocessing"]

# In levels of an 8-bit image, over cells of at least 64 pixels: other versions of OpenCV and Pillow round single
# pixels differently by one level; a wrong channel order, mean or offset moves a cell by several.
_MAX_CELL_DIFFERENCE = 0.5


def check_preprocessing(bundle: Bundle) -> PreprocessingResult:
    """Prepare every golden image and compare the tensors with their fingerprints; the largest fault is named."""
    spec = bundle.manifest.contract.preprocess
    exact, largest, problem = 0, 0.0, ""
    for golden in bundle.manifest.golden:
        image = read_golden_image(bundle.path(golden.path), golden)
        tensor, _ = preprocess(image, spec)
        found = fingerprint(tensor)
        difference = fingerprint_difference(found, golden.fingerprint, spec=spec)
        exact += found.sha256 == golden.fingerprint.sha256
        if difference > largest:
            largest = difference
            problem = f"'{golden.path}': {_name_fault(image, golden, spec=spec)}"
    passed = largest <= _MAX_CELL_DIFFERENCE
    return PreprocessingResult(
        exact=exact,
        images=len(bundle.manifest.golden),
        # JSON has no infinity: another shape or dtype is more than any difference of levels.
        difference=round(min(largest, 1e9), 4),
        passed=passed,
        problem="" if passed else problem,
        allowed=_MAX_CELL_DIFFERENCE,
    )


def _name_fault(image: NDArray[np.uint8], golden: GoldenImage, *, spec: PreprocessSpec) -> str:
    """Try the usual suspects, so that the message can name the culprit."""
    tensor, _ = preprocess(image, spec)
    wanted, found = golden.fingerprint, fingerprint(tensor)
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return f"the tensor must be {wanted.dtype}{list(wanted.shape)}, it is {found.dtype}{list(found.shape)}"
    other = ChannelOrder.BGR if spec.channel_order is ChannelOrder.RGB else ChannelOrder.RGB
    swapped, _ = preprocess(image, replace(spec, channel_order=other))
    if fingerprint_difference(fingerprint(swapped), wanted, spec=spec) <= _MAX_CELL_DIFFERENCE:
        return f"the colour channels are swapped: they are {spec.channel_order}, they must be {other}"
    difference = fingerprint_difference(found, wanted, spec=spec)
    return f"a region differs by {difference:.2f} of 255 levels (allowed: {_MAX_CELL_DIFFERENCE})"
