"""What a model file is, by its name; and what the files of a bundle are called."""

from __future__ import annotations

from pathlib import Path

from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError

__all__ = ["KINDS_BY_SUFFIX", "engine_file", "files_of", "graph_file", "kinds_of"]

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


def kinds_of(path: Path) -> tuple[ArtifactKind, ...]:
    """The kinds that a file of this name can be.

    Raises:
        ConfigError: naming the suffixes that are known.
    """
    kinds = KINDS_BY_SUFFIX.get(path.suffix.lower())
    if kinds is None:
        raise ConfigError(
            f"'{path}' is not a model: the suffix '{path.suffix}' is unknown.",
            hint=f"give a bundle, or a file that ends in {', '.join(KINDS_BY_SUFFIX)}",
        )
    return kinds


def files_of(model: Path) -> list[Path]:
    """A model's file, then those that belong beside it and are there: an IR's weights and contract, external data."""
    beside = (model.with_suffix(".bin"), model.with_suffix(".json"), model.with_name(model.name + ".data"))
    return [model, *(path for path in beside if path.is_file())]


def graph_file(precision: Precision, *, tail: Tail, placement: str = "") -> str:
    """A graph in a bundle: ``model.fp32.onnx``, ``model.int8.portable.onnx``, ``model.fp16.candidates.onnx``."""
    parts = (str(precision), placement, "" if tail is Tail.RAW else str(tail))
    return ".".join(["model", *filter(None, parts), "onnx"])


def engine_file(precision: Precision, *, backend: str, kind: ArtifactKind) -> str:
    """What a backend's builder makes: ``model.int8.openvino.xml``, ``model.fp16.tensorrt.engine``."""
    suffix = next(suffix for suffix, kinds in KINDS_BY_SUFFIX.items() if kind in kinds)
    return f"model.{precision}.{backend}{suffix}"
