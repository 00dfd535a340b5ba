"""Device records: what a device verified, as one file that comes home to the person who signs a bundle off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.accuracy.verify import VerificationRecord
from fcos_deploy.bundle.device_layer import Layer, device_facts, usable_layers
from fcos_deploy.bundle.signature import (
    Envelope,
    check_bytes,
    device_public_key,
    public_key_text,
    sign_with_device_key,
)
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.errors import ConfigError, FcosDeployError, SignatureError
from fcos_deploy.core.files import read_file, write_text
from fcos_deploy.core.registry import all_backends
from fcos_deploy.core.serialize import from_json, parse_json, to_json

__all__ = ["DeviceRecord", "ReadRecord", "export_record", "read_records"]

_FORMAT = "fcos-deploy device record, version 1"
_PREFIX = f"{_FORMAT}\n".encode()
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """``verification`` on the device that ``device`` describes; ``layer`` where the artifact was built there.

    ``latency_ms``: medians that ``setup`` measured, by precision. ``public_key`` is the device's, in PEM form.
    """

    verification: VerificationRecord
    device: dict[str, str]
    layer: Layer | None = None
    latency_ms: dict[str, float] | None = None
    public_key: str = ""
    format: str = _FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class _Signed:
    record: DeviceRecord
    signature: Envelope | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRecord:
    """A record that was read and belongs to the bundle; ``signed_by`` is '' for one that nobody signed."""

    path: Path
    record: DeviceRecord
    signed_by: str = ""

    @property
    def device(self) -> str:
        """The device in words."""
        facts = self.record.device
        return facts.get("board") or facts.get("gpus") or facts.get("processor", "unknown")


def export_record(
    path: Path,
    verification: VerificationRecord,
    *,
    bundle: Bundle,
    latency_ms: dict[str, float] | None = None,
) -> str:
    """Write the record; signed, and the key's id returned, where this user has a device key.

    Raises:
        ConfigError: the file cannot be written.
    """
    known = verification.backend in all_backends()
    layers = usable_layers(bundle, backend=verification.backend) if known else []
    layer = next((s.layer for s in layers if verification.artifact in {a.path for a in s.artifacts}), None)
    key = device_public_key()
    record = DeviceRecord(
        verification=verification,
        device=device_facts(verification.backend) if known else dict(verification.machine),
        layer=layer,
        latency_ms=latency_ms or None,
        public_key=public_key_text(key) if key else "",
    )
    signature = sign_with_device_key(_PREFIX + _content(record)) if key else None
    signed = _Signed(record=record, signature=signature)
    write_text(path, json.dumps(to_json(signed), indent=1, sort_keys=True, allow_nan=False) + "\n")
    return signature.key_id if signature else ""


def _content(record: DeviceRecord) -> bytes:
    """What is signed: the record in one spelling of its JSON."""
    return json.dumps(to_json(record), sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def read_records(
    paths: Sequence[Path], *, bundle: Bundle, public_keys: tuple[Path | str, ...] = ()
) -> list[ReadRecord]:
    """Read the records of several devices, all of this bundle; with ``public_keys`` one of them must have signed each.

    Raises:
        ConfigError: naming a file that is no record, is of another bundle or artifact, or contradicts another one.
        SignatureError: naming one whose signature does not fit, or is not of a given key.
    """
    records = [_read(path, bundle=bundle, public_keys=public_keys) for path in paths]
    seen: dict[tuple[str, ...], ReadRecord] = {}
    for item in records:
        verification = item.record.verification
        key = (
            json.dumps(item.record.device, sort_keys=True),
            item.record.public_key,
            verification.artifact_sha256,
            verification.backend,
        )
        earlier = seen.setdefault(key, item)
        if earlier is not item and earlier.record.verification.outcome is not verification.outcome:
            raise ConfigError(
                f"'{earlier.path}' and '{item.path}' contradict each other: the same device and artifact, "
                f"{earlier.record.verification.outcome} and {verification.outcome}.",
                hint="verify again on the device, and give its last record alone",
            )
    return records


def _read(path: Path, *, bundle: Bundle, public_keys: tuple[Path | str, ...]) -> ReadRecord:
    again = "write it on the device: fcos-deploy verify BUNDLE --export record.json"
    try:
        signed = from_json(_Signed, parse_json(read_file(path, limit=_MAX_BYTES)), where=path.name)
    except OSError as error:
        raise ConfigError(f"Cannot read the record '{path}': {error.strerror or error}.", hint=again) from error
    except (ValueError, TypeError, FcosDeployError) as error:
        raise ConfigError(f"'{path}' is not a device record: {error}.", hint=again) from error
    record = signed.record
    verification, layer = record.verification, record.layer
    if record.format != _FORMAT:
        raise ConfigError(f"'{path}' is not a device record of this version.", hint=again)
    if verification.manifest_sha256 != bundle.manifest_sha256:
        raise ConfigError(
            f"'{path}' is of another bundle: its manifest is {verification.manifest_sha256[:16]}..., that of "
            f"'{bundle.source}' is {bundle.manifest_sha256[:16]}....",
            hint="give the records of this bundle",
        )
    _require_known_artifact(path, verification, layer, bundle)
    signed_by = ""
    if signed.signature is not None:
        keys: tuple[Path | str, ...] = public_keys or (record.public_key,)
        try:
            signed_by = check_bytes(_PREFIX + _content(record), signed.signature, public_keys=keys, subject=f"'{path}'")
        except ConfigError as error:
            raise SignatureError(f"'{path}': {error.message}") from error
    elif public_keys:
        raise SignatureError(
            f"'{path}' is not signed.", hint="make a device key on the device: fcos-deploy sign --device BUNDLE"
        )
    return ReadRecord(path=path, record=record, signed_by=signed_by)


def _require_known_artifact(path: Path, verification: VerificationRecord, layer: Layer | None, bundle: Bundle) -> None:
    """Refuse a record of an artifact that is neither the bundle's nor built from a graph of it."""
    certified = bundle.manifest.artifacts
    hashes = {artifact.sha256 for artifact in certified}
    if layer is not None and layer.parent == bundle.manifest_sha256:
        hashes |= {artifact.sha256 for artifact in layer.artifacts if artifact.parent in hashes}
    if verification.artifact_sha256 not in hashes:
        raise ConfigError(
            f"'{path}' is of an artifact, '{verification.artifact}', that is neither the bundle's nor built from one "
            "of its graphs.",
            hint="give the records of this bundle",
        )
