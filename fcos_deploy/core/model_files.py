"""What a model file is, by its content; and what the files of a bundle are called."""

from __future__ import annotations

import stat
from pathlib import Path

from fcos_deploy.core.enums import ArtifactKind, DeformForm, Precision, StrEnum, Tail
from fcos_deploy.core.errors import ConfigError

__all__ = [
    "KINDS_BY_SUFFIX",
    "CheckpointFormat",
    "checkpoint_format",
    "engine_file",
    "files_of",
    "graph_file",
    "is_checkpoint",
    "kinds_of",
]

_ENGINES = (ArtifactKind.TENSORRT_ENGINE, ArtifactKind.TENSORRT_RTX_ENGINE)

# Engines of TensorRT and TensorRT-RTX look alike, to their names and to us; the backend says which is meant.
KINDS_BY_SUFFIX: dict[str, tuple[ArtifactKind, ...]] = {
    ".pth": (ArtifactKind.CHECKPOINT,),
    ".pt": (ArtifactKind.CHECKPOINT,),
    ".pkl": (ArtifactKind.CHECKPOINT,),
    ".safetensors": (ArtifactKind.CHECKPOINT,),
    ".onnx": (ArtifactKind.ONNX,),
    ".xml": (ArtifactKind.OPENVINO_IR,),
    ".engine": _ENGINES,
    ".plan": _ENGINES,
    ".trt": _ENGINES,
    ".kserve": (ArtifactKind.REMOTE_MODEL,),
}


class CheckpointFormat(StrEnum):
    """How a checkpoint is written; ``torch-legacy`` is what ``torch.save`` wrote before torch 1.6."""

    TORCH = "torch"
    TORCH_LEGACY = "torch-legacy"
    SAFETENSORS = "safetensors"
    PICKLE = "pickle"


_HEAD = 64  # bytes; enough to tell every format
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def checkpoint_format(head: bytes, *, size: int) -> CheckpointFormat | None:
    """The format that a file of ``size`` bytes beginning with ``head`` is in; None when it is no checkpoint."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return CheckpointFormat.TORCH
    if head.startswith(_LEGACY_MAGIC):
        return CheckpointFormat.TORCH_LEGACY
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return CheckpointFormat.SAFETENSORS
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return CheckpointFormat.PICKLE
    return None


def kinds_of(path: Path) -> tuple[ArtifactKind, ...]:
    """The kinds that a model file can be: a checkpoint by its content, whatever its name; others by their suffix.

    Raises:
        ConfigError: it is no file, or neither its content nor its suffix is known.
    """
    if is_checkpoint(path):
        return (ArtifactKind.CHECKPOINT,)
    kinds = KINDS_BY_SUFFIX.get(path.suffix.lower())
    if kinds is None:
        raise ConfigError(
            f"'{path}' is not a model: its content is not a checkpoint's, and the suffix '{path.suffix}' is unknown.",
            hint=f"give a checkpoint, a bundle, or a file that ends in {', '.join(KINDS_BY_SUFFIX)}",
        )
    return kinds


def is_checkpoint(path: Path) -> bool:
    """Whether the content is a checkpoint's; a folder is none, whatever its name.

    Raises:
        ConfigError: there is nothing, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a folder; or a pipe, which would block
            return False
        with path.open("rb") as stream:
            return checkpoint_format(stream.read(_HEAD), size=path.stat().st_size) is not None
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror or error}.") from error


def files_of(model: Path) -> list[Path]:
    """A model's file, then those that belong beside it and are there: an IR's weights and contract, external data."""
    if is_checkpoint(model):
        return [model]
    beside = (model.with_suffix(".bin"), model.with_suffix(".json"), model.with_name(model.name + ".data"))
    return [model, *(path for path in beside if path.is_file())]


def graph_file(
    precision: Precision, *, tail: Tail, placement: str = "", deform_form: DeformForm = DeformForm.GRID_SAMPLE
) -> str:
    """A graph in a bundle: ``model.fp32.onnx``, ``model.int8.portable.onnx``, ``model.fp16.candidates.onnx``.

    With DeformConv, which not every runtime has, ``model.fp32.deform-conv.onnx``; a placement says it already.
    """
    operator = "deform-conv" if deform_form is DeformForm.OPERATOR and not placement else ""
    parts = (str(precision), placement, operator, "" if tail is Tail.RAW else str(tail))
    return ".".join(["model", *filter(None, parts), "onnx"])


def engine_file(precision: Precision, *, backend: str, kind: ArtifactKind) -> str:
    """What a backend's builder makes: ``model.int8.openvino.xml``, ``model.fp16.tensorrt.engine``."""
    suffix = next(suffix for suffix, kinds in KINDS_BY_SUFFIX.items() if kind in kinds)
    return f"model.{precision}.{backend}{suffix}"
