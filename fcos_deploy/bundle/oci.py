"""A bundle as an OCI image layout, the folder that tools for container registries copy from and to.

One manifest of the ModelPack format, whose layers are the bundle's files as they are, so that a layer's digest is the
SHA-256 that the bundle's own manifest lists. Sources: opencontainers/image-spec 1.1 (image-layout.md, manifest.md,
descriptor.md) and modelpack/model-spec (docs/spec.md, docs/config.md, docs/annotations.md).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fcos_deploy.bundle.manifest import MANIFEST_NAME, UNLISTED, check_relative_path
from fcos_deploy.core.errors import BundleError, ChecksumError
from fcos_deploy.core.files import copy_file, open_regular, sha256_file
from fcos_deploy.core.serialize import parse_json

if TYPE_CHECKING:
    from fcos_deploy.bundle.store import Bundle

__all__ = ["LAYOUT_NAME", "PackedFile", "is_layout", "layout_files", "layout_members", "write_layout"]

LAYOUT_NAME, _INDEX_NAME, _BLOBS = "oci-layout", "index.json", "blobs/sha256"
_INDEX = "application/vnd.oci.image.index.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_MODEL = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG = "application/vnd.cncf.model.config.v1+json"
_FILE_PATH, _TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"
_REFERENCE = "org.opencontainers.image.ref.name"
_FORMATS = {"onnx": "onnx", "openvino-ir": "openvino", "tensorrt-engine": "tensorrt"}
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_MAX_TEXT = 4 << 20  # what registries accept of a manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A file of a packed bundle: its name and size, what opens it, and its SHA-256 where the packing records one."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]
    sha256: str = ""


def is_layout(path: Path) -> bool:
    """Whether ``path`` is the folder of an OCI image layout."""
    return (path / LAYOUT_NAME).is_file()


def write_layout(bundle: Bundle, folder: Path, *, tag: str) -> None:
    """Write the checked ``bundle`` to the empty ``folder``: the same bytes for the same bundle and tag.

    Raises:
        ChecksumError: a file was changed since it was checked.
    """
    blobs = folder / _BLOBS
    blobs.mkdir(parents=True)
    layers = []
    for name, listed in sorted(bundle.shipped_files().items()):
        source = bundle.root / name
        sha256 = listed or sha256_file(source)
        copy_file(source, blobs / sha256)
        if sha256_file(blobs / sha256) != sha256:
            raise ChecksumError(f"'{source}' was changed while it was packed.", hint="pack it again")
        size = (blobs / sha256).stat().st_size
        annotations = {_FILE_PATH: name, _TITLE: name}
        layers.append({**_descriptor(_media_type(bundle, name), sha256, size), "annotations": annotations})
    defaults, manifest = bundle.manifest.defaults, bundle.manifest
    kinds = [artifact.kind for artifact in manifest.artifacts if artifact.backend in ("", defaults.backend)]
    config = {
        "descriptor": {"name": manifest.name},
        "config": {
            "architecture": "cnn",
            "format": next((_FORMATS[kind] for kind in reversed(kinds) if kind in _FORMATS), "onnx"),
            "precision": str(defaults.precision),
            "capabilities": {"inputTypes": ["image"], "outputTypes": ["other"]},
        },
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
    image = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "artifactType": _MODEL,
        "config": _write_blob(blobs, config, media_type=_CONFIG),
        "layers": layers,
    }
    reference = {**_write_blob(blobs, image, media_type=_MANIFEST), "artifactType": _MODEL}
    index = {
        "schemaVersion": 2,
        "mediaType": _INDEX,
        "manifests": [{**reference, "annotations": {_REFERENCE: tag}}],
    }
    (folder / _INDEX_NAME).write_bytes(_json_bytes(index))
    (folder / LAYOUT_NAME).write_bytes(_json_bytes({"imageLayoutVersion": "1.0.0"}))


def _media_type(bundle: Bundle, name: str) -> str:
    """ModelPack's type of a layer that is one file, by what the file is to the bundle."""
    artifacts = bundle.manifest.artifacts
    weights = {path for artifact in artifacts for path in (artifact.path, *artifact.companions)}
    golden = {record.path for record in bundle.manifest.golden}
    role = "doc"
    if name in weights:
        role = "weight"
    elif name in UNLISTED:
        role = "weight.config"
    elif name in golden:
        role = "dataset"
    return f"application/vnd.cncf.model.{role}.v1.raw"


def _descriptor(media_type: str, sha256: str, size: int) -> dict[str, Any]:  # Any: JSON
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": size}


def _write_blob(blobs: Path, value: Mapping[str, Any], *, media_type: str) -> dict[str, Any]:  # Any: JSON
    content = _json_bytes(value)
    sha256 = hashlib.sha256(content).hexdigest()
    (blobs / sha256).write_bytes(content)
    return _descriptor(media_type, sha256, len(content))


def _json_bytes(value: Mapping[str, Any]) -> bytes:  # Any: JSON
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def layout_files(folder: Path) -> dict[str, PackedFile]:
    """The files of a layout by their names in it; links are not followed.

    Raises:
        OSError: one of them cannot be read.
    """
    blobs = folder / _BLOBS
    names = [LAYOUT_NAME, _INDEX_NAME, *(f"{_BLOBS}/{path.name}" for path in sorted(blobs.iterdir()))]
    return {
        name: PackedFile(
            name=name,
            size=(folder / name).lstat().st_size,
            open=partial(open_regular, folder / name, follow_links=False),
        )
        for name in names
    }


def layout_members(files: Mapping[str, PackedFile]) -> dict[str, PackedFile]:
    """The files of the bundle in a layout, by their names in the bundle.

    Raises:
        BundleError: it is no layout of exactly one model, or one of its descriptors does not fit its blob.
    """
    index = _read(files, _INDEX_NAME)
    references = [
        reference
        for reference in _list(index, "manifests")
        if isinstance(reference, dict) and reference.get("mediaType") == _MANIFEST
    ]
    images = [_read(files, blob.name, sha256=blob.sha256) for blob in (_blob(files, item) for item in references)]
    models = [image for image in images if image.get("artifactType") == _MODEL]
    if len(models) != 1:
        raise BundleError(
            f"The OCI layout has {len(models)} models, a bundle is one.",
            hint="copy the one that is meant into a layout of its own",
        )
    members: dict[str, PackedFile] = {}
    for layer in _list(models[0], "layers"):
        blob = _blob(files, layer)
        annotations = layer.get("annotations")
        name = annotations.get(_FILE_PATH, annotations.get(_TITLE)) if isinstance(annotations, dict) else None
        if not isinstance(name, str) or name in members:
            raise BundleError("The OCI layout has a layer without a file's name, or two of one name.")
        check_relative_path(name)
        members[name] = PackedFile(name=name, size=blob.size, open=blob.open, sha256=blob.sha256)
    if MANIFEST_NAME not in members:
        raise BundleError(f"The model in the OCI layout has no '{MANIFEST_NAME}', so that it is no bundle.")
    return members


def _blob(files: Mapping[str, PackedFile], descriptor: Any) -> PackedFile:  # Any: JSON of somebody
    """The blob that a descriptor means, of the size that it says."""
    digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    file = files.get(f"{_BLOBS}/{match[1]}") if match else None
    if match is None or file is None or file.size != descriptor.get("size"):
        raise BundleError("The OCI layout lacks a blob, or has it in another size than its descriptor says.")
    return PackedFile(name=file.name, size=file.size, open=file.open, sha256=match[1])


def _list(value: Mapping[str, Any], key: str) -> list[Any]:  # Any: JSON of somebody
    items = value.get(key)
    if not isinstance(items, list):
        raise BundleError(f"The OCI layout has no list '{key}'.")
    return items


def _read(files: Mapping[str, PackedFile], name: str, *, sha256: str = "") -> dict[str, Any]:  # Any: JSON of somebody
    file = files.get(name)
    if file is None or file.size > _MAX_TEXT:
        raise BundleError(f"The OCI layout has no '{name}', or one that is larger than any manifest.")
    stream = file.open()
    if stream is None:
        raise BundleError(f"'{name}' of the OCI layout cannot be read.")
    with stream:
        content = stream.read(_MAX_TEXT + 1)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise ChecksumError(f"The blob '{name}' of the OCI layout was changed.", hint="copy it again")
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"'{name}' of the OCI layout is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BundleError(f"'{name}' of the OCI layout is not an object.")
    return value
