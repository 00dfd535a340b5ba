"""Model files: of which kind they are, what a bundle calls them, and the contract that each carries."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fcos_deploy.core.contract import METADATA_KEY, ModelContract
from fcos_deploy.core.enums import ArtifactKind, DeformForm, Precision, StrEnum, Tail
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file, sha256_file, write_text
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_file import fits_one_file, onnx_interface, onnx_metadata
from fcos_deploy.core.serialize import from_json, to_json

__all__ = [
    "KINDS_BY_SUFFIX",
    "CheckpointFormat",
    "OnnxGraph",
    "checkpoint_format",
    "engine_file",
    "files_of",
    "find_contract",
    "graph_file",
    "graph_tail",
    "is_checkpoint",
    "kinds_of",
    "read_contract",
    "sidecar_path",
    "write_sidecar",
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


def graph_tail(path: str) -> Tail:
    """The tail of a graph in a bundle, which ``graph_file`` has put into its name."""
    last = path.removesuffix(".onnx").rpartition(".")[2]
    return Tail(last) if last in set(Tail) else Tail.RAW


def engine_file(precision: Precision, *, backend: str, kind: ArtifactKind) -> str:
    """What a backend's builder makes: ``model.int8.openvino.xml``, ``model.fp16.tensorrt.engine``."""
    suffix = next(suffix for suffix, kinds in KINDS_BY_SUFFIX.items() if kind in kinds)
    return f"model.{precision}.{backend}{suffix}"


def sidecar_path(path: Path) -> Path:
    """The json file that belongs to an engine or IR: ``model.int8.xml`` -> ``model.int8.json``."""
    return path.with_suffix(".json")


def write_sidecar(path: Path, contract: ModelContract, record: dict[str, str] | None = None) -> Path:
    """Write the contract, and the record of the build, beside an artifact."""
    content = {"contract": to_json(contract), "record": record or {}}
    write_text(sidecar_path(path), json.dumps(content, indent=1, sort_keys=True) + "\n")
    return sidecar_path(path)


def read_contract(path: Path) -> ModelContract:
    """The contract of an ONNX file, engine or IR.

    Raises:
        BackendLoadError: when the file is missing or damaged, or has no contract.
    """
    contract = find_contract(path)
    if contract is not None:
        return contract
    if path.suffix.lower() == ".onnx":
        raise BackendLoadError(
            f"'{path}' carries no fcos-deploy contract, which says how images are prepared and outputs are read.",
            hint="export the checkpoint that it was made from: fcos-deploy export CHECKPOINT -o FILE",
        )
    raise BackendLoadError(f"'{path}' has no '{sidecar_path(path).name}' beside it.", hint="copy both files together")


def find_contract(path: Path) -> ModelContract | None:
    """As ``read_contract``, but None for an artifact of another tool, which carries none.

    Raises:
        BackendLoadError: when the file is missing, damaged or a checkpoint.
    """
    _require_artifact(path)
    is_graph, sidecar = path.suffix.lower() == ".onnx", sidecar_path(path)
    try:
        if is_graph:
            text = onnx_metadata(path).get(METADATA_KEY)
            content = None if text is None else {"contract": json.loads(text)}
        else:
            content = json.loads(read_file(sidecar, limit=MAX_TEXT_BYTES)) if sidecar.is_file() else None
        if content is None:
            return None
        if not isinstance(content, dict) or "contract" not in content:
            raise BackendLoadError(f"'{sidecar}' holds no fcos-deploy contract.", hint="copy the one of this artifact")
        contract = from_json(ModelContract, content["contract"], where="contract")
    except ConfigError as error:
        raise BackendLoadError(f"Cannot read the contract of '{path}': {error.message}", hint=error.hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BackendLoadError(f"Cannot read the contract of '{path}': {error}.") from error
    # Another tool may quantize the graph and keep its metadata: the operators are what runs.
    quantized = is_graph and contract.precision is not Precision.INT8 and onnx_interface(path).is_quantized
    return replace(contract, precision=Precision.INT8) if quantized else contract


def _require_artifact(path: Path) -> None:
    if path.is_dir():
        raise BackendLoadError(f"'{path}' is a folder, not a file.", hint="give the ONNX file, engine or IR")
    if not path.is_file():
        raise BackendLoadError(f"'{path}' does not exist.")
    if is_checkpoint(path):
        raise BackendLoadError(f"'{path}' is a checkpoint.", hint="make a graph of it first, with 'fcos-deploy export'")


onnx = lazy_import("onnx", extra="export")


class OnnxGraph:
    """One ONNX file. Every property is computed when it is first asked for, and only then.

    Raises:
        BackendLoadError: there is no such file, or it is a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        _require_artifact(path)
        self.path = path

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, in hexadecimal."""
        return sha256_file(self.path)

    @cached_property
    def contract(self) -> ModelContract:
        """The contract that the file carries.

        Raises:
            BackendLoadError: it carries none, or is damaged.
        """
        return read_contract(self.path)

    @cached_property
    def model(self) -> Any:  # an onnx.ModelProto; the onnx package has no types
        """The checked model. Everyone shares it, so nobody changes it.

        Raises:
            BackendLoadError: the file is not a complete ONNX model.
            MissingDependencyError: onnx is not installed.
        """
        load, check = onnx.load, onnx.checker.check_model  # outside of the try: onnx may be missing
        try:
            model = load(str(self.path))
            # What does not fit into one message is checked as a file.
            check(model if fits_one_file(model) else str(self.path))
        except Exception as error:  # protobuf's and the checker's own exceptions have no common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise BackendLoadError(
                f"'{self.path}' is not a complete ONNX model: {reason}.", hint="export it again"
            ) from error
        return model
