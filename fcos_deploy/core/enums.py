"""The closed sets of words that contracts, manifests and command-line options share."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from fcos_deploy.core.errors import ConfigError

__all__ = [
    "ArtifactKind",
    "CenterMode",
    "ComputeType",
    "DeformForm",
    "NmsForm",
    "Orientation",
    "PerformanceHint",
    "Precision",
    "StrEnum",
    "Tail",
]


_Word = TypeVar("_Word", bound="StrEnum")


class StrEnum(str, Enum):
    """An enumeration whose members are their text (the standard one needs Python 3.11, JetPack 6 has 3.10)."""

    __str__ = str.__str__

    @classmethod
    def of(cls: type[_Word], word: str, *, option: str) -> _Word:
        """The member that ``word`` is or names; ``option`` is what the user calls it.

        Raises:
            ConfigError: there is no such word.
        """
        try:
            return cls(word)
        except ValueError:
            words = ", ".join(f"'{member.value}'" for member in cls)
            raise ConfigError(f"'{option}' must be one of {words}, got {word!r}.") from None


class Precision(StrEnum):
    """The number format in which an artifact's convolutions are written."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class ArtifactKind(StrEnum):
    """What a file is, which decides the runtimes that can open it."""

    CHECKPOINT = "checkpoint"
    ONNX = "onnx"
    OPENVINO_IR = "openvino-ir"
    TENSORRT_ENGINE = "tensorrt-engine"
    TENSORRT_RTX_ENGINE = "tensorrt-rtx-engine"
    REMOTE_MODEL = "remote-model"


class Tail(StrEnum):
    """Where the exported graph ends (docs/export.md).

    ``raw``: class logits, box distances and centerness logits of all locations; the host does the rest.
    ``candidates``: scores, labels and decoded boxes after the per-level top-k; the host suppresses.
    ``nms``: ready detections, padded, and their count.
    """

    RAW = "raw"
    CANDIDATES = "candidates"
    NMS = "nms"


class DeformForm(StrEnum):
    """How an exported graph computes deformable convolutions; the numbers are the same.

    ``grid-sample``: plain operators with GridSample, which every runtime has. ``operator``: ONNX DeformConv, from opset
    19 on, for runtimes that have it.
    """

    GRID_SAMPLE = "grid-sample"
    OPERATOR = "operator"


class NmsForm(StrEnum):
    """How the nms tail suppresses; the contract is the same.

    ``onnx``: the operator NonMaxSuppression. ``static``: a fixed number of plain tensor operators.
    """

    ONNX = "onnx"
    STATIC = "static"


class ComputeType(StrEnum):
    """The number format in which a runtime computes what the graph leaves in float."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"


class PerformanceHint(StrEnum):
    """Shortest time of one request, or most requests a second."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Orientation(StrEnum):
    """Which way up an image file is read: as its EXIF orientation says, or as its pixels are stored.

    ``exif``: mmdetection (OpenCV's decoder turns images) and detectron2 and AdelaiDet (``detection_utils.read_image``).
    ``stored``: torchvision and tianzhi, whose datasets open files with PIL and don't transpose. PIL turns TIFF files by
    itself, and those are turned here as well.
    """

    EXIF = "exif"
    STORED = "stored"


class CenterMode(StrEnum):
    """How a location's column and row become a point.

    ``half``: ``(i + 0.5) * stride`` (mmdetection, detectron2, AdelaiDet, tianzhi).
    ``torchvision``: ``i * (padded size // grid size)``, which differs from the stride on P6 and P7, without an offset.
    """

    HALF = "half"
    TORCHVISION = "torchvision"
