"""The stages between an image and its detections, each given the reference's own input.

Because no stage sees what an earlier one made of it, a fault shows in the stage that has it and in none after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import Candidates, HeadOutputs, decode
from fcos_deploy.core.decode_spec import DecodeSpec
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.locations import level_sizes
from fcos_deploy.core.preprocess_spec import InputDtype, PreprocessSpec

__all__ = ["HEAD_OUTPUTS", "LevelSlice", "decoded", "level_slices", "network_input", "same_candidates", "split_levels"]

# Name of each output of the raw tail, as people call it.
HEAD_OUTPUTS: dict[str, str] = {"cls_logits": "class", "distances": "box", "centerness": "centerness"}


@dataclass(frozen=True, slots=True)
class LevelSlice:
    """Where a pyramid level lies among the L locations: ``P3`` has stride 8."""

    name: str
    start: int
    stop: int
    rows: int
    columns: int


def level_slices(input_size: tuple[int, int], strides: tuple[int, ...]) -> list[LevelSlice]:
    """The levels of a padded input (H, W), finest first."""
    slices, start = [], 0
    for (rows, columns), stride in zip(level_sizes(*input_size, strides=strides), strides, strict=True):
        slices.append(LevelSlice(f"P{stride.bit_length() - 1}", start, start + rows * columns, rows, columns))
        start += rows * columns
    return slices


def split_levels(outputs: Tensors, levels: Sequence[LevelSlice]) -> Iterator[tuple[LevelSlice, str, NDArray[Any]]]:
    """(level, output name, (n, l, channels)) of the raw tail, in the order in which a network computes them."""
    for level in levels:
        for name in HEAD_OUTPUTS:
            yield level, name, outputs[name][:, level.start : level.stop]


def network_input(tensor: NDArray[Any], spec: PreprocessSpec) -> NDArray[np.float32]:
    """What the first convolution sees of an input tensor (n, 3, H, W): normalised float32, whichever side does it."""
    if spec.input_dtype is InputDtype.FLOAT32:
        return tensor.astype(np.float32, copy=False)
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (spec.mean, spec.std))
    normalized: NDArray[np.float32] = (tensor.astype(np.float32) / np.float32(spec.pixel_scale) - mean) / std
    return normalized


def decoded(outputs: Tensors, spec: DecodeSpec, *, index: int, input_size: tuple[int, int]) -> Candidates:
    """The candidates of one image from the raw tail's outputs, before suppression."""
    head = HeadOutputs(*(outputs[name][index] for name in HEAD_OUTPUTS))
    return decode(head, spec, input_size=input_size)


def same_candidates(first: Candidates, second: Candidates) -> bool:
    """Whether two decodes of the same outputs gave exactly the same."""
    return (
        np.array_equal(first.channels, second.channels)
        and np.array_equal(first.scores, second.scores)
        and np.array_equal(first.boxes, second.boxes)
    )


def shows_head(contract: ModelContract) -> bool:
    """Whether the head's outputs can be seen: behind the other tails they cannot."""
    return contract.tail is Tail.RAW
