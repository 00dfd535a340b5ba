"""The whole bundle as an OCI image layout, for registries and what pulls from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fcos_deploy.bundle.oci import write_layout
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.serving.package import Packager, ServedModel

__all__ = ["PACKAGER"]


class _Oci(Packager):
    """All files of the bundle, so that the proof and the signature travel along; the tag is the version."""

    name = "oci"
    readers: ClassVar[Mapping[ArtifactKind, str]] = {}

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.bundle is None:
            raise ConfigError("An OCI layout is made of a bundle.")
        write_layout(model.bundle, folder, tag=str(model.options.version))


PACKAGER = _Oci()
