"""Packages an artifact of a bundle for a serving engine: the model file, its contract in the engine's own terms."""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from fcos_deploy.bundle.manifest import Artifact
from fcos_deploy.bundle.selection import select_artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.contract import ModelContract, TensorSpec
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError, printable
from fcos_deploy.core.files import atomic_directory
from fcos_deploy.core.libraries import discover, get_plugin
from fcos_deploy.core.onnx_file import onnx_interface

__all__ = ["Packager", "ServedModel", "ServingOptions", "all_packagers", "package_bundle"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_ANY_BATCH = 1 << 16
_IR_INPUT = re.compile(rb'<layer[^>]*type="Parameter"[^>]*>\s*<data[^>]*shape="([^",]*)')


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """How a model is served.

    ``name`` empty: the bundle's. ``backend`` and ``precision`` choose the artifact; empty: what the bundle was made
    for. ``max_batch`` 0: requests are not joined; otherwise they are joined up to it, waiting at most
    ``queue_delay_us`` microseconds. ``instances`` of the model on each of ``gpus``, or on the CPU. ``url`` is the
    address of a model that is served already, for its description. ``target``: the device profile of a package that
    is built on the device.
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
    target: str = ""

    def __post_init__(self) -> None:
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(f"'{self.name}' is not a name that servers accept.", hint="letters, digits, _ . -")
        if self.version < 1 or self.instances < 1 or self.max_batch < 0 or self.queue_delay_us < 0:
            raise ConfigError("version and instances must be at least 1, max_batch and queue_delay_us at least 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a packager needs: the model file, its companions, the contract of that file, and the options.

    ``backend``: the one that reads the file. ``bundle``: where it is from, for packages that repeat the proof.
    """

    name: str
    path: Path
    companions: tuple[Path, ...]
    artifact: Artifact
    contract: ModelContract
    options: ServingOptions
    bundle: Bundle | None = None
    backend: str = ""

    def copy_to(self, folder: Path, *, suffix: str = "") -> None:
        """Copy the model file to ``model`` with ``suffix`` (its own by default), and its companions beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, folder / f"model{suffix or self.path.suffix}")
        for companion in self.companions:
            # External data keeps its name, by which the ONNX file refers to it.
            name = f"model{companion.suffix}" if companion.stem == self.path.stem else companion.name
            shutil.copyfile(companion, folder / name)

    @property
    def label_text(self) -> str:
        """Class names, one a line, by class channel, as the graph's ``cls_logits`` and ``labels`` count."""
        return "".join(f"{printable(name)}\n" for name in self.contract.channel_names)

    def require_nms_tail(self, reader: str) -> None:
        """Refuse a model whose outputs ``reader`` would have to decode.

        Raises:
            ConfigError: with the deployment that it reads.
        """
        if self.contract.tail is not Tail.NMS:
            raise ConfigError(
                f"{reader} decodes no FCOS outputs: it needs the nms tail, '{self.artifact.path}' has "
                f"'{self.contract.tail}'.",
                hint="make the bundle with 'fcos-deploy deploy --tail nms'",
            )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs with a dynamic batch as first axis.

        Raises:
            ConfigError: the input size follows the image, and serving engines cannot batch such tensors.
        """
        if self.contract.preprocess.canvas is None:
            raise ConfigError(
                "A model whose input size varies cannot be served.", hint="export it with --input-size HxW"
            )
        return self.contract.input_specs

    @property
    def max_batch(self) -> int:
        """1 for a fixed batch, otherwise the largest that the artifact takes.

        Raises:
            BackendLoadError: the file is not of its kind.
        """
        dynamic = False
        if self.artifact.kind is ArtifactKind.ONNX:
            dynamic = all(spec.shape[:1] == (None,) for spec in onnx_interface(self.path).inputs)
        elif self.artifact.kind is ArtifactKind.OPENVINO_IR:
            batches = _IR_INPUT.findall(self.path.read_bytes())
            dynamic = bool(batches) and not any(batch.isdigit() for batch in batches)
        return _ANY_BATCH if dynamic else 1


class Packager(ABC):
    """Writes the files of one serving engine. A module here that defines ``PACKAGER`` registers one.

    ``readers``: the backend that executes an artifact of each kind inside the engine, by its name here; empty: the
    engine serves whatever the bundle runs by default. ``tail``: what it prefers, None for the bundle's own.
    """

    name: str
    readers: ClassVar[Mapping[ArtifactKind, str]] = {}
    tail: Tail | None = None

    @abstractmethod
    def write(self, model: ServedModel, folder: Path) -> None:
        """Fill the empty ``folder``.

        Raises:
            ConfigError: the engine cannot serve this model or these options.
        """


def _served_name(name: str) -> str:
    """A bundle's name as servers accept it, and as a folder beside nothing else: never ``..``."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip("_.-")[:128] or "fcos"


@cache
def all_packagers() -> dict[str, Packager]:
    """All packagers by name."""
    return discover("fcos_deploy.serving", marker="PACKAGER", kind=Packager)  # type: ignore[type-abstract]  # for isinstance only


def package_bundle(bundle: Bundle, *, server: str, output: Path, options: ServingOptions | None = None) -> ServedModel:
    """Write what ``server`` reads to the folder ``output``, which must not hold anything else yet.

    Raises:
        ConfigError: no such server, a folder in use, or no artifact that the server reads.
    """
    options = options or ServingOptions()
    packager = get_plugin(all_packagers(), server, role="packager")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"'{output}' is not empty.", hint="choose another folder")
    selection = select_artifact(
        bundle,
        backend=options.backend,
        precisions=(options.precision,) if options.precision else (),
        tail=packager.tail,
        readers=packager.readers or None,
        purpose=f"server '{server}'" + (f" with backend '{options.backend}'" if options.backend else ""),
    )
    artifact = selection.artifact
    path = bundle.path(artifact.path)
    model = ServedModel(
        name=options.name or _served_name(bundle.manifest.name),
        path=path,
        companions=tuple(bundle.path(name) for name in artifact.companions),
        artifact=artifact,
        backend=selection.backend,
        contract=read_contract(path),
        options=options,
        bundle=bundle,
    )
    with atomic_directory(output) as folder:
        packager.write(model, folder)
    return model
