"""Golden images: the images whose detections a bundle promises on every machine."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ComputeType, Precision
from fcos_deploy.core.errors import BundleError, ImageError
from fcos_deploy.core.image import decode_image
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.preprocess import InputDtype, PreprocessSpec, preprocess

__all__ = [
    "GoldenDetections",
    "GoldenImage",
    "GoldenRun",
    "TensorFingerprint",
    "fingerprint",
    "fingerprint_difference",
    "make_golden",
    "read_golden_image",
]

cv2 = lazy_import("cv2")

_FOLDER = "golden"
_GRID = 8  # cells per side of a fingerprint
_MAX_PIXELS = 50_000_000
_PNG_HEADER = struct.Struct(">8sI4sII")  # signature, chunk length, chunk name, width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFingerprint:
    """One preprocessed tensor: SHA-256 of its bytes, and the means of a grid of cells, which tolerate rounding.

    ``shape`` is (c, H, W); ``cells`` are c * 8 * 8 means, channel by channel and row by row, in the tensor's own unit.
    """

    sha256: str
    dtype: str
    shape: tuple[int, ...]
    cells: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenDetections:
    """The reference's detections as plain numbers: boxes xyxy in image pixels."""

    boxes: tuple[tuple[float, float, float, float], ...]
    scores: tuple[float, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.labels):
            raise BundleError("A golden image must have as many boxes as scores and labels.")

    @classmethod
    def from_detections(cls, detections: Detections) -> GoldenDetections:
        """From a detector's result."""
        return cls(
            boxes=tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in detections.boxes),
            scores=tuple(float(score) for score in detections.scores),
            labels=tuple(int(label) for label in detections.labels),
        )

    def to_detections(self) -> Detections:
        """As arrays."""
        return Detections(
            np.asarray(self.boxes, np.float32).reshape(-1, 4),
            np.asarray(self.scores, np.float32),
            np.asarray(self.labels, np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenImage:
    """An image file of the bundle, what preprocessing makes of it, and what the reference detects in it.

    ``path`` is relative to the bundle, whose manifest lists it among its files.
    """

    path: str
    height: int
    width: int
    fingerprint: TensorFingerprint
    detections: GoldenDetections

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.height * self.width > _MAX_PIXELS:
            raise BundleError(f"Golden image '{self.path[:80]}' cannot be {self.height}x{self.width}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRun:
    """What one artifact detects in the golden images, in their order, on the machine that made the bundle.

    ``artifact`` is its path in the bundle. ``errors`` summarise how far that is from the reference's detections:
    ``edge_px_p50``, ``edge_px_p90`` (largest edge error of a box, image pixels), ``score_p50``, ``score_p90``.
    """

    artifact: str
    backend: str
    precision: Precision
    compute: ComputeType
    detections: tuple[GoldenDetections, ...]
    errors: dict[str, float] = field(default_factory=dict)


def fingerprint(tensor: NDArray[Any]) -> TensorFingerprint:
    """Summarise a preprocessed tensor (c, H, W), uint8 or float32; H and W at least 8."""
    rows = np.array_split(np.arange(tensor.shape[1]), _GRID)
    columns = np.array_split(np.arange(tensor.shape[2]), _GRID)
    values = tensor.astype(np.float64)
    cells = [
        float(values[channel, r[0] : r[-1] + 1, c[0] : c[-1] + 1].mean())
        for channel in range(tensor.shape[0])
        for r in rows
        for c in columns
    ]
    return TensorFingerprint(
        sha256=hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest(),
        dtype=tensor.dtype.name,
        shape=tuple(tensor.shape),
        cells=tuple(round(cell, 6) for cell in cells),
    )


def fingerprint_difference(actual: TensorFingerprint, expected: TensorFingerprint, *, spec: PreprocessSpec) -> float:
    """Largest difference of two cells, in levels of an 8-bit image; infinite when dtype or shape differ."""
    if actual == expected:
        return 0.0
    if (actual.dtype, actual.shape, len(actual.cells)) != (expected.dtype, expected.shape, len(expected.cells)):
        return float("inf")
    difference = np.abs(np.subtract(actual.cells, expected.cells)).reshape(len(spec.std), -1).max(1)
    if spec.input_dtype is InputDtype.FLOAT32:
        # A float tensor is (pixel / pixel_scale - mean) / std: a level of a pixel is 1 / (pixel_scale * std) in it.
        difference = difference * np.asarray(spec.std) * spec.pixel_scale
    return float(difference.max())


def make_golden(
    images: Sequence[NDArray[np.uint8]],
    detections: Sequence[Detections],
    *,
    folder: Path,
    contract: ModelContract,
) -> tuple[GoldenImage, ...]:
    """Write ``images`` ((h, w, 3) uint8 RGB) losslessly under ``folder``/golden, with the reference's detections.

    Returned paths are relative to ``folder``.

    Raises:
        BundleError: the reference detects nothing on any of them.
        ImageError: an image cannot be written as PNG.
    """
    golden = []
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    for index, (image, detected) in enumerate(zip(images, detections, strict=True)):
        path = f"{_FOLDER}/{index:03d}.png"
        encoded, content = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))
        if not encoded:
            raise ImageError(f"Cannot write '{folder / path}' as PNG.")
        (folder / path).write_bytes(content.tobytes())
        tensor, _ = preprocess(image, contract.preprocess)
        golden.append(
            GoldenImage(
                path=path,
                height=image.shape[0],
                width=image.shape[1],
                fingerprint=fingerprint(tensor),
                detections=GoldenDetections.from_detections(detected),
            )
        )
    if not any(image.detections.scores for image in golden):
        raise BundleError(
            "The reference detects nothing on the golden images, so they would prove nothing.",
            hint="choose images with objects, or lower the score threshold",
        )
    return tuple(golden)


def read_golden_image(content: bytes, golden: GoldenImage) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB of a PNG file; the size in its header must be the manifest's before anything is decoded.

    Raises:
        ImageError: the file is not a PNG of the recorded size.
    """
    path, header = Path(golden.path), content[: _PNG_HEADER.size]
    if len(header) < _PNG_HEADER.size or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ImageError(f"Golden image '{path}' is not a PNG file.")
    *_, width, height = _PNG_HEADER.unpack(header)
    if (height, width) != (golden.height, golden.width):
        raise ImageError(f"Golden image '{path}' must be {golden.height}x{golden.width}, got {height}x{width}.")
    return decode_image(content, path=path)
