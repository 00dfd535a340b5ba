"""Chooses the artifact of a bundle and hands it to the writer of one serving engine."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fcos_deploy.bundle.artifact import Artifact
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.atomic import atomic_directory
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import ConfigError

__all__ = ["Packager", "ServedModel", "ServingOptions", "package_bundle", "packagers"]

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
def packagers() -> dict[str, Packager]:
    """All writers by name."""
    package = importlib.import_module("fcos_deploy.serving")
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        packager = getattr(importlib.import_module(f"fcos_deploy.serving.{module}"), "PACKAGER", None)
        if isinstance(packager, Packager):
            found[packager.name] = packager
    return found


def package_bundle(bundle: Bundle, *, server: str, output: Path, options: ServingOptions | None = None) -> ServedModel:
    """Write what ``server`` reads to the folder ``output``, which must not hold anything else yet.

    Raises:
        ConfigError: no such server, a folder in use, or an artifact that the server does not read.
    """
    options = options or ServingOptions()
    if server not in packagers():
        raise ConfigError(f"There is no packager '{server}'.", hint=f"there are: {', '.join(packagers())}")
    packager = packagers()[server]
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
    target = bundle.manifest.target
    best = [artifact for artifact in fitting if artifact.backend == target.backend]
    chosen = [artifact for artifact in best if artifact.precision is target.precision] or best or fitting
    if len(chosen) == 1:
        return chosen[0]
    listed = ", ".join(f"{a.path} ({a.precision}, {a.backend or a.kind})" for a in bundle.manifest.artifacts)
    problem = "Several artifacts of the bundle are" if chosen else "No artifact of the bundle is"
    raise ConfigError(
        f"{problem} for '{packager.name}', which reads {', '.join(sorted(packager.accepts))}.",
        hint=f"name one with --precision and --backend; the bundle has {listed}",
    )
