"""Golden images: the pictures whose detections a bundle promises on every machine."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.bundle.records import check_relative_path
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import BundleError, ImageError
from fcos_deploy.core.libraries import require
from fcos_deploy.core.preprocess import InputDtype, PreprocessSpec

__all__ = [
    "GOLDEN_FOLDER",
    "GoldenDetections",
    "GoldenImage",
    "TensorFingerprint",
    "fingerprint",
    "fingerprint_difference",
    "make_golden",
    "read_golden_image",
]

GOLDEN_FOLDER = "golden"
_GRID = 8  # cells per side of the numeric summary
_MAX_PIXELS = 50_000_000
_PNG_HEADER = struct.Struct(">8sI4sII")  # signature, chunk length, chunk name, width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFingerprint:
    """One preprocessed tensor: SHA-256 of its bytes, and the means of a grid of cells, which tolerate rounding.

    ``shape`` is (3, H, W); ``cells`` are 3 * 8 * 8 means, channel by channel and row by row, in the tensor's own unit.
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
        """Keep what a detector said."""
        boxes = [(float(a), float(b), float(c), float(d)) for a, b, c, d in detections.boxes]
        return cls(
            boxes=tuple(boxes),
            scores=tuple(float(s) for s in detections.scores),
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
    """A picture in the bundle, what preprocessing makes of it, and what the reference sees in it."""

    path: str
    height: int
    width: int
    fingerprint: TensorFingerprint
    detections: GoldenDetections

    def __post_init__(self) -> None:
        check_relative_path(self.path)
        if self.height < 1 or self.width < 1 or self.height * self.width > _MAX_PIXELS:
            raise BundleError(f"Golden image '{self.path}' cannot be {self.height}x{self.width}.")


def fingerprint(tensor: NDArray[Any]) -> TensorFingerprint:
    """Summarise a preprocessed tensor (3, H, W), uint8 or float32; H and W at least 8."""
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


def fingerprint_difference(found: TensorFingerprint, wanted: TensorFingerprint, *, spec: PreprocessSpec) -> float:
    """Largest difference of two cells, in levels of an 8-bit image; infinite when dtype or shape differ."""
    if found.sha256 == wanted.sha256 and found.shape == wanted.shape and found.dtype == wanted.dtype:
        return 0.0
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape) or len(found.cells) != len(wanted.cells):
        return float("inf")
    difference = np.abs(np.subtract(found.cells, wanted.cells)).reshape(len(spec.std), -1).max(1)
    if spec.input_dtype is InputDtype.FLOAT32:
        difference = difference * np.asarray(spec.std) * spec.pixel_scale
    return float(difference.max())


def make_golden(
    images: Iterable[NDArray[np.uint8]],
    *,
    folder: Path,
    contract: ModelContract,
    detect: Callable[[NDArray[np.uint8]], Detections],
) -> tuple[GoldenImage, ...]:
    """Write ``images`` ((h, w, 3) uint8 RGB) losslessly under ``folder``/golden and record what must come of them.

    ``detect`` is the reference detector. Returned paths are relative to ``folder``.
    """
    from fcos_deploy.core.preprocess import preprocess

    records = []
    (folder / GOLDEN_FOLDER).mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        path = f"{GOLDEN_FOLDER}/{index:03d}.png"
        _write_png(folder / path, image)
        tensor, _ = preprocess(image, contract.preprocess)
        records.append(
            GoldenImage(
                path=path,
                height=image.shape[0],
                width=image.shape[1],
                fingerprint=fingerprint(tensor),
                detections=GoldenDetections.from_detections(detect(image)),
            )
        )
    if not any(record.detections.scores for record in records):
        raise BundleError(
            "The reference detects nothing on the golden images, so that they would prove nothing.",
            hint="choose images with objects, or lower the score threshold",
        )
    return tuple(records)


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    cv2 = require("cv2")
    done, encoded = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))
    if not done:
        raise ImageError(f"Cannot write '{path}' as PNG.")
    path.write_bytes(encoded.tobytes())


def read_golden_image(path: Path, golden: GoldenImage) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 RGB; the header's size is compared with the manifest before anything is decoded.

    Raises:
        ImageError: when the file is not a PNG of the recorded size.
    """
    from fcos_deploy.core.image import read_image

    header = path.read_bytes()[: _PNG_HEADER.size]
    if len(header) < _PNG_HEADER.size or not header.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ImageError(f"Golden image '{path}' is not a PNG file.")
    *_, width, height = _PNG_HEADER.unpack(header)
    if (height, width) != (golden.height, golden.width):
        raise ImageError(f"Golden image '{path}' must be {golden.height}x{golden.width}, got {height}x{width}.")
    return read_image(path)
