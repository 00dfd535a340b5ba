"""From images to the tensors of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Session, Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.per_thread import PerThread
from fcos_deploy.core.postprocess import image_sizes_row
from fcos_deploy.core.preprocess import Letterbox, padded_size, preprocess
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["FeedMaker", "Prepared"]

_IMAGES, _IMAGE_SIZES = "images", "image_sizes"
_LARGEST_BATCH = 8  # of a dynamic axis: beyond it memory grows and throughput hardly does


@dataclass(frozen=True, slots=True)
class Prepared:
    """The tensors of a request and one letterbox for each image; a fixed batch may have more rows than images."""

    feeds: Tensors
    letterboxes: tuple[Letterbox, ...]


class FeedMaker:
    """Preprocesses images as the contract says, into tensors of the shapes that the session takes."""

    def __init__(self, session: Session, contract: ModelContract) -> None:
        self._spec = contract.preprocess
        self._inputs = {spec.name: spec for spec in session.inputs}
        _check_interface(session, contract)
        self._fixed_batch = self._inputs[_IMAGES].shape[0]
        self._largest = self._fixed_batch or session.max_batch or _LARGEST_BATCH
        self._buffers: PerThread[dict[tuple[int, ...], NDArray[Any]]] = PerThread(dict)

    def make(self, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """New tensors for images (h, w, 3) uint8 RGB of one input size.

        Raises:
            ConfigError: no image, more than the batch takes, or of different input sizes.
            ImageError: not (h, w, 3) uint8.
        """
        return self._fill(np.empty(self._shape(images), self._spec.input_dtype.value), images)

    def make_reused(self, images: Sequence[NDArray[np.uint8]]) -> Prepared:
        """As ``make``, in tensors that the calling thread's next call overwrites."""
        shape = self._shape(images)
        buffers = self._buffers.get()
        if shape not in buffers:
            buffers.clear()  # One at a time: images of changing sizes must not pile up.
            buffers[shape] = np.empty(shape, self._spec.input_dtype.value)
        return self._fill(buffers[shape], images)

    def chunks(self, images: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
        """Indices of images that can share a request, in order."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(self._size(image), []).append(index)
        step = self._largest
        return [same[i : i + step] for same in by_size.values() for i in range(0, len(same), step)]

    def _shape(self, images: Sequence[NDArray[np.uint8]]) -> tuple[int, ...]:
        sizes = {self._size(image) for image in images}
        if not sizes:
            raise ConfigError("There is no image.")
        if len(sizes) > 1:
            raise ConfigError(f"Images of one request need one input size, got {sorted(sizes)}.")
        if self._fixed_batch and len(images) > self._fixed_batch:
            raise ConfigError(f"The model takes {self._fixed_batch} images at a time, got {len(images)}.")
        return (self._fixed_batch or len(images), 3, *sizes.pop())

    def _size(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        return self._spec.canvas or padded_size(image.shape[0], image.shape[1], self._spec)

    def _fill(self, batch: NDArray[Any], images: Sequence[NDArray[np.uint8]]) -> Prepared:
        letterboxes = tuple(
            preprocess(image, self._spec, out=row)[1] for image, row in zip(images, batch, strict=False)
        )
        batch[len(images) :] = 0
        feeds: Tensors = {_IMAGES: batch}
        if _IMAGE_SIZES in self._inputs:
            rows = [image_sizes_row(letterbox) for letterbox in letterboxes]
            feeds[_IMAGE_SIZES] = np.stack(rows + rows[-1:] * (len(batch) - len(rows)))
        return Prepared(feeds, letterboxes)


def _check_interface(session: Session, contract: ModelContract) -> None:
    """Refuse an artifact whose tensors are not those of its contract.

    Raises:
        BackendLoadError: naming the first that differs.
    """
    inputs = {spec.name: spec for spec in session.inputs}
    outputs = {spec.name for spec in session.outputs}
    wanted = TensorSpec(
        _IMAGES, str(contract.preprocess.input_dtype), (None, 3, *(contract.preprocess.canvas or (None, None)))
    )
    if _IMAGES not in inputs or not inputs.keys() <= {_IMAGES, _IMAGE_SIZES}:
        raise BackendLoadError(f"The model must have the input '{_IMAGES}', it has {sorted(inputs)}.")
    if not _compatible(inputs[_IMAGES], wanted):
        raise BackendLoadError(f"The contract says that '{_IMAGES}' is {wanted}, the model has {inputs[_IMAGES]}.")
    missing = sorted(set(contract.outputs) - outputs)
    if missing:
        raise BackendLoadError(f"The contract's tail '{contract.tail}' has outputs {missing}, the model does not.")


def _compatible(has: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether tensors of ``wanted`` can be fed to ``has``: a dynamic axis takes any size, a fixed one only its own."""
    sizes = zip(has.shape[1:], wanted.shape[1:], strict=False)
    return has.dtype == wanted.dtype and len(has.shape) == len(wanted.shape) and all(h in (None, w) for h, w in sizes)
