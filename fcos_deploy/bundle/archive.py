"""A bundle in one piece: as a .tar, or as an OCI image layout, the folder that tools for container registries copy.

A layout holds one manifest of the ModelPack format, whose layers are the bundle's files as they are, so that a layer's
digest is the SHA-256 that the bundle's own manifest lists. Sources: the OCI image specification 1.1 (image-layout.md,
manifest.md, descriptor.md) and modelpack/model-spec (docs/spec.md, docs/config.md, docs/annotations.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from fcos_deploy.bundle.manifest import (
    DIGEST_NAME,
    LAYERS_FOLDER,
    LOG_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MODEL_SIGNATURE_NAME,
    SIGNATURE_NAME,
    UNLISTED,
    check_relative_path,
)
from fcos_deploy.core.artifact import is_checkpoint
from fcos_deploy.core.errors import BundleError, ChecksumError, FcosDeployError
from fcos_deploy.core.files import atomic_file, copy_file, open_regular, sha256_file
from fcos_deploy.core.serialize import parse_json

if TYPE_CHECKING:
    from fcos_deploy.bundle.store import Bundle

__all__ = ["is_archive", "is_layout", "pack_files", "unpack", "write_layout"]

_MAX_MEMBERS = 20_000
_MAX_BYTES = 64 << 30
_MAX_NAME = 1024
_MAX_HEADER = 1 << 16  # bytes of an extended header: names of 1024 characters and times
_FIRST = (MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME)
_BLOCK = 1 << 20

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


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a file named ``*.tar`` that is not a checkpoint, as ``model.pth.tar`` is."""
    return path.suffix == ".tar" and path.is_file() and not is_checkpoint(path)


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self.digest.update(block)
        return block


def pack_files(root: Path, *, files: Mapping[str, str], output: Path) -> None:
    """Write ``files`` of ``root``, by their names with the SHA-256 of each or '', to the uncompressed ``output``.

    The archive is the same byte for byte for the same contents: sorted names, no times, no owners.

    Raises:
        ChecksumError: a file has another hash.
    """
    with atomic_file(output) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, sha256 in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.mode = 0o644
            with open_regular(root / name, follow_links=False) as stream:
                member.size = os.fstat(stream.fileno()).st_size
                hashing = _Hashing(stream)
                archive.addfile(member, hashing)
            if sha256 and hashing.digest.hexdigest() != sha256:
                raise ChecksumError(f"'{root / name}' was changed while it was packed.", hint="pack it again")


class _TarMember(tarfile.TarInfo):
    """A member whose extended header, which tarfile reads whole, is bounded."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and self.size > _MAX_HEADER:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # documented as to be overridden
        return member


def unpack(path: Path, folder: Path, *, sizes: Callable[[], Mapping[str, int]] | None = None) -> None:
    """Extract a bundle's archive, or the folder or archive of its OCI layout, into the empty ``folder``.

    Only plain files and folders with plain relative names are accepted; nothing is written beyond the archive's own
    size, so that neither sparse members nor compression can fill a disk. ``sizes`` is called when manifest and
    signature are extracted, before anything else is, for what the manifest lists: other files and other sizes are
    refused.

    Raises:
        BundleError: the archive is damaged, contains anything else, or does not fit the disk.
    """
    try:
        if path.is_dir():
            _extract(layout_members(layout_files(path)), folder, sizes)
            return
        with tarfile.open(path, "r:", encoding="utf-8", errors="strict", tarinfo=_TarMember) as archive:
            limit = min(path.stat().st_size, _MAX_BYTES, shutil.disk_usage(folder).free)
            members = {
                name: PackedFile(name=member.name, size=member.size, open=partial(archive.extractfile, member))
                for name, member in _members(archive, limit=limit).items()
            }
            _extract(layout_members(members) if LAYOUT_NAME in members else members, folder, sizes)
    except FcosDeployError:
        raise
    except (tarfile.TarError, EOFError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise BundleError(f"'{path}' is not a bundle's archive: {error}.", hint="copy it again") from error
    except OSError as error:
        raise BundleError(f"Cannot unpack '{path}': {error.strerror or error}.") from error


def _extract(members: Mapping[str, PackedFile], folder: Path, sizes: Callable[[], Mapping[str, int]] | None) -> None:
    for name in (name for name in members if name in _FIRST):
        if members[name].size > MAX_MANIFEST_BYTES:
            raise BundleError(f"Member '{name}' of the archive is larger than any manifest.")
        _write(members[name], folder / name)
    listed = sizes() if sizes else None
    for name, member in members.items():
        # Layers are of a device, and no part of an archive; 'tar' takes them along.
        if name in _FIRST or (listed is not None and name.startswith(f"{LAYERS_FOLDER}/")):
            continue
        unlisted = name == LOG_NAME or (name == MODEL_SIGNATURE_NAME and member.size <= MAX_MANIFEST_BYTES)
        if listed is not None and not unlisted and listed.get(name) != member.size:
            raise ChecksumError(f"Member '{name}' of the archive is not what its manifest lists.")
        _write(member, folder.joinpath(*PurePosixPath(name).parts))


def _members(archive: tarfile.TarFile, *, limit: int) -> dict[str, tarfile.TarInfo]:
    """The plain files by their names in the bundle, from their headers alone.

    ``tar cf cells.tar cells/`` puts the folder's name before all of them, ``tar cf cells.tar -C cells .`` a dot.
    ``limit`` bounds the bytes of all members together: an uncompressed archive cannot hold more than its size.
    """
    remaining, seen = limit, dict[str, tarfile.TarInfo]()
    for count, member in enumerate(archive, 1):
        if count > _MAX_MEMBERS:
            raise BundleError(f"The archive has more than {_MAX_MEMBERS} members.")
        name = member.name.removeprefix("./")
        if len(name) > _MAX_NAME:
            raise BundleError("The archive has a member whose name is too long.")
        if member.isdir() and name == ".":
            continue
        check_relative_path(name)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or name in seen:
            raise BundleError(f"Member '{name}' of the archive is not a plain file, or occurs twice.")
        seen[name] = member
        remaining -= member.size
        if member.size < 0 or remaining < 0:
            raise BundleError(f"Member '{name}' of the archive is larger than the archive or than the free space.")
    prefix = next(iter(seen), "").partition("/")[0] + "/"
    if MANIFEST_NAME not in seen and prefix + MANIFEST_NAME in seen and all(name.startswith(prefix) for name in seen):
        return {name.removeprefix(prefix): member for name, member in seen.items()}
    return seen


def _write(member: PackedFile, target: Path) -> None:
    source, digest = member.open(), hashlib.sha256()
    if source is None:
        raise BundleError(f"Member '{member.name}' of the archive cannot be read.")
    target.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with source, target.open("xb") as stream:
        while left > 0:
            block = source.read(min(_BLOCK, left))
            if not block:
                raise BundleError(f"Member '{member.name}' of the archive is truncated.")
            stream.write(block)
            digest.update(block)
            left -= len(block)
    if member.sha256 and digest.hexdigest() != member.sha256:
        raise ChecksumError(f"Blob '{member.name}' was changed: it has another SHA-256.", hint="copy it again")


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
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [{**reference, "annotations": {_REFERENCE: tag}}]}
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
