"""Names, types and sizes of a served model's tensors, as its contract fixes them."""

from __future__ import annotations

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.locations import level_sizes
from fcos_deploy.core.preprocess_spec import InputDtype
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["input_specs", "output_specs"]


def input_specs(contract: ModelContract) -> tuple[TensorSpec, ...]:
    """Inputs with a dynamic batch as first axis.

    Raises:
        ConfigError: when the input size follows the image, for which serving engines cannot batch.
    """
    height, width = _canvas(contract)
    dtype = "uint8" if contract.preprocess.input_dtype is InputDtype.UINT8 else "float32"
    images = TensorSpec("images", dtype, (None, 3, height, width))
    sizes = (TensorSpec("image_sizes", "float32", (None, 4)),) if contract.needs_image_sizes else ()
    return (images, *sizes)


def output_specs(contract: ModelContract) -> tuple[TensorSpec, ...]:
    """Outputs with a dynamic batch as first axis, in the contract's order."""
    return tuple(
        TensorSpec(name, dtype, (None, *shape)) for name, (dtype, shape) in _SHAPES[contract.tail](contract).items()
    )


def _canvas(contract: ModelContract) -> tuple[int, int]:
    if contract.preprocess.canvas is None:
        raise ConfigError("A model whose input size varies cannot be served.", hint="export it with a canvas")
    return contract.preprocess.canvas


_Shapes = dict[str, tuple[str, tuple[int, ...]]]


def _raw(contract: ModelContract) -> _Shapes:
    locations, classes = sum(_locations(contract)), _channels(contract)
    return {
        "cls_logits": ("float32", (locations, classes)),
        "distances": ("float32", (locations, 4)),
        "centerness": ("float32", (locations, 1)),
    }


def _candidates(contract: ModelContract) -> _Shapes:
    top_k, classes = contract.decode.pre_nms_top_k, _channels(contract)
    count = sum(min(top_k, locations * classes) for locations in _locations(contract))
    return {"boxes": ("float32", (count, 4)), "scores": ("float32", (count,)), "labels": ("int32", (count,))}


def _nms(contract: ModelContract) -> _Shapes:
    count = contract.decode.max_detections
    return {
        "boxes": ("float32", (count, 4)),
        "scores": ("float32", (count,)),
        "labels": ("int32", (count,)),
        "num_detections": ("int32", (1,)),
    }


_SHAPES = {Tail.RAW: _raw, Tail.CANDIDATES: _candidates, Tail.NMS: _nms}


def _channels(contract: ModelContract) -> int:
    return len(contract.decode.label_map) or len(contract.class_names)


def _locations(contract: ModelContract) -> list[int]:
    height, width = _canvas(contract)
    return [rows * columns for rows, columns in level_sizes(height, width, strides=contract.decode.strides)]
