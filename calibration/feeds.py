"""One picture as the inputs of an exported graph, by the graph's own contract."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CalibrationError
from fcos_deploy.core.postprocess import image_sizes_row
from fcos_deploy.core.preprocess import preprocess

__all__ = ["Feeder", "plain_picture"]


class Feeder:
    """Turns (h, w, 3) uint8 RGB into feeds for ``model``; an exported batch larger than one repeats the image."""

    def __init__(self, model: Any, contract: ModelContract) -> None:  # onnx.ModelProto, untyped
        self._contract = contract
        inputs = {value.name: value for value in model.graph.input}
        if "images" not in inputs:
            raise CalibrationError(
                f"The graph has no input 'images', but {sorted(inputs)}.", hint="export it with 'fcos-deploy export'"
            )
        batch = inputs["images"].type.tensor_type.shape.dim[0]
        self._batch = int(batch.dim_value) or 1
        self._wants_sizes = "image_sizes" in inputs

    def __call__(self, picture: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """``images`` (n, 3, H, W) of the contract's dtype, and ``image_sizes`` (n, 4) where the graph asks for it."""
        tensor, letterbox = preprocess(picture, self._contract.preprocess)
        feeds = {"images": np.repeat(tensor[None], self._batch, axis=0)}
        if self._wants_sizes:
            feeds["image_sizes"] = np.repeat(image_sizes_row(letterbox)[None], self._batch, axis=0)
        return feeds


def plain_picture() -> NDArray[np.uint8]:
    """(480, 640, 3) uint8: a smooth colour gradient, for runs whose values do not matter."""
    rows, columns = np.mgrid[0:480, 0:640]
    return np.stack([rows * 255 // 479, columns * 255 // 639, (rows + columns) * 255 // 1118], 2).astype(np.uint8)
