"""The contract of a model: what makes a detector of its network. It travels with every artifact."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.decode import BoxClip, DecodeSpec, NmsSpace, level_sizes
from fcos_deploy.core.enums import NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError, TensorMismatchError
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.core.serialize import to_json

__all__ = [
    "METADATA_KEY",
    "SOURCE_OUTPUTS",
    "TAIL_OUTPUTS",
    "Decision",
    "ModelContract",
    "TensorSpec",
    "contract_to_text",
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """``dtype`` is NumPy's name; ``None`` in ``shape`` is a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("A tensor needs a name.")
        try:
            np.dtype(self.dtype)
        except TypeError as error:
            raise ConfigError(f"Tensor '{self.name}' has the unknown dtype '{self.dtype}'.") from error

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"

    def check(self, array: NDArray[Any]) -> None:
        """Raise TensorMismatchError unless ``array`` has this dtype and shape."""
        fits = len(array.shape) == len(self.shape) and all(
            n is None or n == m for n, m in zip(self.shape, array.shape, strict=True)
        )
        if array.dtype != np.dtype(self.dtype) or not fits:
            got = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
            raise TensorMismatchError(f"Tensor '{self.name}' must be {self}, got {got}.")


_LONGEST_CLASS_NAME = 256

# Names of the outputs per tail; shapes in `ModelContract`.
TAIL_OUTPUTS: dict[Tail, tuple[str, ...]] = {
    Tail.RAW: ("cls_logits", "distances", "centerness"),
    Tail.CANDIDATES: ("boxes", "scores", "labels"),
    Tail.NMS: ("boxes", "scores", "labels", "num_detections"),
}

# What the outputs of a tail are made from, which an export shows its checks and then takes out of the graph.
SOURCE_OUTPUTS: dict[Tail, tuple[str, ...]] = {
    Tail.RAW: (),
    Tail.CANDIDATES: TAIL_OUTPUTS[Tail.RAW],
    Tail.NMS: ("candidate_boxes", "candidate_scores", "candidate_labels", *TAIL_OUTPUTS[Tail.RAW]),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that tensors do not tell: what was assumed, and on whose word."""

    name: str
    value: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContract:
    """Input, output and meaning of an artifact.

    Input ``images``: (N, 3, H, W), or (N, 1, H, W) of gray images, uint8 or float32 as ``preprocess.input_dtype`` says,
    channels in its order.

    Outputs by ``tail``, boxes and distances always in network-input pixels, L locations finest level first, row by row:

    - raw: ``cls_logits`` (N, L, C) and ``centerness`` (N, L, 1) before the sigmoid, ``distances`` (N, L, 4) left, top,
      right, bottom, activated and in pixels.
    - candidates: ``boxes`` (N, K, 4) xyxy float32, not clipped; ``scores`` (N, K) float32, the final score, -1 where
      the gate did not pass; ``labels`` (N, K) int32 class channels. K = sum over levels
      of ``DecodeSpec.candidates_per_level``, in the levels' order, best rank first within a level (by position where
      the profile does not sort by score).
    - nms: ``boxes`` (N, D, 4), ``scores`` (N, D), ``labels`` (N, D) int32 best first and padded with zeros (labels -1),
      ``num_detections`` (N, 1) int32, D = ``decode.max_detections``. Where the profile clips or suppresses in image
      pixels the graph has a second input ``image_sizes`` (N, 4) float32: resized height and width, original height and
      width. In the static form there is ``settled`` (N, 1) int32 as well: 0 where the detections may not be those of
      greedy suppression.

    ``placement`` names the Q/DQ placement of an INT8 graph, by the runtime that it is for; '' for float graphs.
    ``nms_form`` is how the nms tail suppresses.
    """

    class_names: tuple[str, ...]
    preprocess: PreprocessSpec
    decode: DecodeSpec
    tail: Tail = Tail.RAW
    nms_form: NmsForm = NmsForm.ONNX
    precision: Precision = Precision.FP32
    placement: str = ""
    ecosystem: str = ""
    source_sha256: str = ""
    decisions: tuple[Decision, ...] = ()
    schema_version: int = 1

    def __post_init__(self) -> None:
        if self.schema_version != 1:
            raise ConfigError(
                f"This contract has schema version {self.schema_version}, this fcos-deploy reads 1.",
                hint="upgrade fcos-deploy",
            )
        if not self.class_names:
            raise ConfigError("A detector needs at least one class name.")
        longest = max(map(len, self.class_names))
        if longest > _LONGEST_CLASS_NAME:
            raise ConfigError(f"A class name has {longest} characters, at most {_LONGEST_CLASS_NAME} are allowed.")

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        static = self.tail is Tail.NMS and self.nms_form is NmsForm.STATIC
        return (*TAIL_OUTPUTS[self.tail], *(("settled",) if static else ()))

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the graph has the second input ``image_sizes``."""
        profile = self.decode.profile
        in_image_pixels = profile.clip not in {BoxClip.NONE, BoxClip.INPUT} or profile.nms_space is not NmsSpace.INPUT
        return self.tail is Tail.NMS and in_image_pixels

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The class name of each class channel; what names the channels of ``cls_logits`` and a graph's ``labels``.

        ``class_names`` has a name for every label, which may be more: a background that no channel maps to.
        """
        labels = self.decode.label_map or range(len(self.class_names))
        return tuple(self.class_names[label] for label in labels)

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the graph, with a dynamic batch, and a dynamic height and width where there is no canvas."""
        height, width = self.preprocess.canvas or (None, None)
        images = TensorSpec("images", str(self.preprocess.input_dtype), (None, self.preprocess.channels, height, width))
        return (images, TensorSpec("image_sizes", "float32", (None, 4))) if self.needs_image_sizes else (images,)

    @property
    def output_specs(self) -> tuple[TensorSpec, ...]:
        """Outputs of the graph with a dynamic batch; the number of locations is None where there is no canvas."""
        decode, classes = self.decode, len(self.channel_names)
        locations: int | None = None
        rows: int | None = decode.max_detections if self.tail is Tail.NMS else None
        if self.preprocess.canvas is not None:
            levels = [height * width for height, width in level_sizes(*self.preprocess.canvas, strides=decode.strides)]
            locations = sum(levels)
            if self.tail is Tail.CANDIDATES:
                rows = sum(decode.candidates_per_level(level, classes=classes) for level in levels)
        shapes: dict[str, tuple[int | None, ...]] = {
            "cls_logits": (locations, classes),
            "distances": (locations, 4),
            "centerness": (locations, 1),
            "boxes": (rows, 4),
            "scores": (rows,),
            "labels": (rows,),
            "num_detections": (1,),
            "settled": (1,),
        }
        integers = ("labels", "num_detections", "settled")
        return tuple(
            TensorSpec(name, "int32" if name in integers else "float32", (None, *shapes[name])) for name in self.outputs
        )

    def with_preprocess(self, preprocess: PreprocessSpec) -> ModelContract:
        """The same detector behind another preprocessing."""
        return replace(self, preprocess=preprocess)


METADATA_KEY = "fcos_deploy.contract"


def contract_to_text(contract: ModelContract) -> str:
    """One line of JSON."""
    return json.dumps(to_json(contract), separators=(",", ":"), sort_keys=True)
