"""The description of a served model, which makes it one more backend for every command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.serving.package import Packager, ServedModel
from runtimes.kserve import RemoteModel, write_remote_model

__all__ = ["PACKAGER"]


class _KServe(Packager):
    """Only the artifact's contract is used: the server may serve any file that keeps it."""

    name = "kserve"
    readers: ClassVar[Mapping[ArtifactKind, str]] = {}

    def write(self, model: ServedModel, folder: Path) -> None:
        if not model.options.url:
            raise ConfigError("A remote model needs its address.", hint="--server http://HOST:8000/v2/models/NAME")
        write_remote_model(folder / f"{model.name}.kserve", RemoteModel(url=model.options.url, contract=model.contract))


PACKAGER = _KServe()
