"""Everything around a network that makes it a detector; travels with every artifact."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fcos_deploy.core.decode_spec import BoxClip, DecodeSpec, NmsSpace
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess_spec import PreprocessSpec

__all__ = ["TAIL_OUTPUTS", "Decision", "ModelContract"]

# Names of the outputs per tail; shapes in `ModelContract`.
TAIL_OUTPUTS: dict[Tail, tuple[str, ...]] = {
    Tail.RAW: ("cls_logits", "distances", "centerness"),
    Tail.CANDIDATES: ("boxes", "scores", "labels"),
    Tail.NMS: ("boxes", "scores", "labels", "num_detections"),
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

    Input ``images``: (N, 3, H, W), uint8 or float32 as ``preprocess.input_dtype`` says, channels in its order.

    Outputs by ``tail``, boxes and distances always in network-input pixels, L locations finest level first, row by row:

    - raw: ``cls_logits`` (N, L, C) and ``centerness`` (N, L, 1) before the sigmoid, ``distances`` (N, L, 4) left, top,
      right, bottom, activated and in pixels.
    - candidates: ``boxes`` (N, K, 4) xyxy float32, not clipped; ``scores`` (N, K) float32, the final score, -1 where
      the gate did not pass; ``labels`` (N, K) int32 class channels. K = sum over levels of min(top-k, h * w * C), in
      the levels' order, best rank first within a level (by position where the profile does not sort by score).
    - nms: ``boxes`` (N, D, 4), ``scores`` (N, D), ``labels`` (N, D) int32 best first and padded with zeros (labels -1),
      ``num_detections`` (N, 1) int32, D = ``decode.max_detections``. Where the profile clips or suppresses in image
      pixels the graph has a second input ``image_sizes`` (N, 4) float32: resized height and width, original height and
      width.

    ``placement`` is the Q/DQ placement of an INT8 graph (whose runtime it was made for), '' for float graphs.
    """

    class_names: tuple[str, ...]
    preprocess: PreprocessSpec
    decode: DecodeSpec
    tail: Tail = Tail.RAW
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

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs."""
        return TAIL_OUTPUTS[self.tail]

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the graph has the second input ``image_sizes``."""
        profile = self.decode.profile
        in_image_pixels = profile.clip is not BoxClip.NONE or profile.nms_space is not NmsSpace.INPUT
        return self.tail is Tail.NMS and in_image_pixels

    def with_preprocess(self, preprocess: PreprocessSpec) -> ModelContract:
        """The same detector behind another preprocessing."""
        return replace(self, preprocess=preprocess)
