"""Whether a model file takes batches of any size, read without the frameworks."""

from __future__ import annotations

import mmap
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fcos_deploy.bundle.records import Artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.decode import level_sizes
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.files import atomic_directory
from fcos_deploy.core.onnx_file import ByteSource, length_delimited_fields
from fcos_deploy.core.preprocess import InputDtype
from fcos_deploy.core.registry import discover, get_plugin
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = [
    "Packager",
    "ServedModel",
    "ServingOptions",
    "all_packagers",
    "input_specs",
    "largest_batch",
    "output_specs",
    "package_bundle",
]

_ANY = 1 << 16
# ModelProto.graph, GraphProto.input, ValueInfoProto.type, TypeProto.tensor_type, TypeProto.Tensor.shape
_TO_SHAPE = (7, 11, 2, 1, 2)
_DIMENSION, _DIMENSION_NAME = 1, 2
_IR_INPUT = re.compile(rb'<layer[^>]*type="Parameter"[^>]*>\s*<data[^>]*shape="([^",]*)')


def largest_batch(path: Path, artifact: Artifact) -> int:
    """1 for a fixed batch, otherwise the largest that it takes.

    Raises:
        BackendLoadError: when the file is not of its kind.
    """
    if artifact.requires.max_batch:
        return artifact.requires.max_batch
    look = _LOOK.get(artifact.kind)
    return _ANY if look is not None and look(path) else 1


def _onnx_is_dynamic(path: Path) -> bool:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            shapes = list(_shapes(data, 0, len(data), _TO_SHAPE))
            return bool(shapes) and all(_first_is_dynamic(data, *shape) for shape in shapes)
        except (IndexError, ValueError) as error:
            raise BackendLoadError(f"'{path}' is not a complete ONNX file.") from error


def _shapes(data: ByteSource, start: int, end: int, fields: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    if not fields:
        yield start, end
        return
    for number, first, last in length_delimited_fields(data, start=start, end=end):
        if number == fields[0]:
            yield from _shapes(data, first, last, fields[1:])


def _first_is_dynamic(data: ByteSource, start: int, end: int) -> bool:
    """A dimension with a name, or with nothing, is dynamic; one with a number has no length-delimited field."""
    for number, first, last in length_delimited_fields(data, start=start, end=end):
        if number == _DIMENSION:
            named = any(n == _DIMENSION_NAME for n, _, _ in length_delimited_fields(data, start=first, end=last))
            return named or first == last
    return False


def _ir_is_dynamic(path: Path) -> bool:
    batches = _IR_INPUT.findall(path.read_bytes())
    return bool(batches) and all(not batch.isdigit() for batch in batches)


_LOOK: dict[ArtifactKind, Callable[[Path], bool]] = {
    ArtifactKind.ONNX: _onnx_is_dynamic,
    ArtifactKind.OPENVINO_IR: _ir_is_dynamic,
}


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


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How a model is served.

    ``name`` empty: the bundle's. ``max_batch`` 0: only what a request brings; otherwise requests are joined up to it,
    waiting at most ``queue_delay_us`` microseconds. ``instances`` of the model on each of ``gpus``, or on the CPU.
    ``url`` is the address of a model that is served already, for its description.
    """

    name: str = ""
    backend: str = ""
    precision: Precision | None = None
    version: int = 1
    max_batch: int = 0
    queue_delay_us: int = 2000
    instances: int = 1
    gpus: tuple[int, ...] = ()
    url: str = ""

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(f"'{self.name}' is not a name that servers accept.", hint="letters, digits, _ . -")
        if self.version < 1 or self.instances < 1 or self.max_batch < 0 or self.queue_delay_us < 0:
            raise ConfigError("version and instances must be at least 1, max_batch and queue_delay_us at least 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a writer needs: the model file, its companions, the contract of that file, and the options."""

    name: str
    path: Path
    companions: tuple[Path, ...]
    artifact: Artifact
    contract: ModelContract
    options: ServingOptions

    def copy_to(self, folder: Path, *, stem: str = "model", suffix: str = "") -> None:
        """Copy the model file and what it needs beside it, renamed to ``stem``; the model itself to ``suffix``."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / f"{stem}{suffix or self.path.suffix}")
        for companion in self.companions:
            # External data keeps its name, by which the ONNX file refers to it.
            name = f"{stem}{companion.suffix}" if companion.stem == self.path.stem else companion.name
            shutil.copyfile(companion, folder / name)

    @property
    def label_text(self) -> str:
        """Class names, one a line, by label."""
        return "".join(f"{name}\n" for name in self.contract.class_names)


class Packager(ABC):
    """Writes the files of one serving engine. A module here that defines ``PACKAGER`` registers one."""

    name: str
    accepts: frozenset[ArtifactKind]

    @abstractmethod
    def write(self, model: ServedModel, folder: Path) -> None:
        """Fill the empty ``folder``.

        Raises:
            ConfigError: the engine cannot serve this model or these options.
        """


@cache
def all_packagers() -> dict[str, Packager]:
    """All writers by name."""
    return discover("fcos_deploy.serving", marker="PACKAGER", kind=Packager)  # type: ignore[type-abstract]  # for isinstance only


def package_bundle(bundle: Bundle, *, server: str, output: Path, options: ServingOptions | None = None) -> ServedModel:
    """Write what ``server`` reads to the folder ``output``, which must not hold anything else yet.

    Raises:
        ConfigError: no such server, a folder in use, or an artifact that the server does not read.
    """
    options = options or ServingOptions()
    packager = get_plugin(all_packagers(), server, role="packager")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"'{output}' is not empty.", hint="choose another folder")
    model = _served_model(bundle, packager, options)
    with atomic_directory(output) as folder:
        packager.write(model, folder)
    return model


def _served_model(bundle: Bundle, packager: Packager, options: ServingOptions) -> ServedModel:
    artifact = _choose(bundle, packager, options)
    path = bundle.path(artifact.path)
    return ServedModel(
        name=options.name or re.sub(r"[^A-Za-z0-9_.-]", "_", bundle.manifest.name) or "fcos",
        path=path,
        companions=tuple(bundle.path(name) for name in artifact.companions),
        artifact=artifact,
        contract=read_contract(path),
        options=options,
    )


def _choose(bundle: Bundle, packager: Packager, options: ServingOptions) -> Artifact:
    fitting = [
        artifact
        for artifact in bundle.manifest.artifacts
        if artifact.kind in packager.accepts
        and options.precision in (None, artifact.precision)
        and options.backend in ("", artifact.backend)
    ]
    defaults = bundle.manifest.defaults
    best = [artifact for artifact in fitting if artifact.backend == defaults.backend]
    chosen = [artifact for artifact in best if artifact.precision is defaults.precision] or best or fitting
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(f"{a.path} ({a.precision}, {a.backend or a.kind})" for a in bundle.manifest.artifacts)
    problem = "Several artifacts of the bundle are" if chosen else "No artifact of the bundle is"
    raise ConfigError(
        f"{problem} for '{packager.name}', which reads {', '.join(sorted(packager.accepts))}.",
        hint=f"name one with --precision and --backend; the bundle has {listed}",
    )
