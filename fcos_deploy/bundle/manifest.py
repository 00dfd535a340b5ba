"""What a bundle says of itself: manifest.json as frozen dataclasses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from fcos_deploy.bundle.golden import GoldenImage
from fcos_deploy.bundle.records import (
    AccuracyFigure,
    Artifact,
    BenchmarkFigure,
    CalibrationRecord,
    FileRecord,
    Provenance,
    RunDefaults,
)
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BundleError, FcosDeployError, ManifestVersionError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.serialize import from_json, to_json

__all__ = [
    "DIGEST_NAME",
    "LOG_NAME",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "SCHEMA_VERSION",
    "SIGNATURE_NAME",
    "UNLISTED",
    "Manifest",
    "manifest_text",
    "parse_manifest",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"
SIGNATURE_NAME = "SIGNATURE"
LOG_NAME = "verification.jsonl"
# Files of a bundle that its manifest cannot list; each one has a check of its own.
UNLISTED = frozenset({MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME, LOG_NAME})
MAX_MANIFEST_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a bundle.

    ``contract`` is the reference's (the checkpoint's); every artifact carries its own in addition. ``artifacts`` form a
    hash chain: ``parent`` is the SHA-256 of another artifact or of the checkpoint named in ``provenance``. ``files``
    are all other files. Every file of the bundle is listed exactly once, except those in ``UNLISTED``.
    """

    name: str
    contract: ModelContract
    provenance: Provenance
    defaults: RunDefaults
    artifacts: tuple[Artifact, ...] = ()
    files: tuple[FileRecord, ...] = ()
    gates: dict[Precision, Gate] = field(default_factory=dict)
    golden: tuple[GoldenImage, ...] = ()
    calibration: tuple[CalibrationRecord, ...] = ()
    accuracy: tuple[AccuracyFigure, ...] = ()
    benchmark: tuple[BenchmarkFigure, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def check(self) -> None:
        """Raise BundleError unless the parts fit each other; done whenever a manifest is written or read."""
        paths = [*(artifact.path for artifact in self.artifacts), *(record.path for record in self.files)]
        repeated = sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []
        if repeated:
            raise BundleError(f"The manifest lists {repeated} more than once.")
        reserved = sorted(UNLISTED & set(paths))
        if reserved:
            raise BundleError(f"The manifest cannot list {reserved}.")
        listed = set(paths)
        for golden in self.golden:
            if golden.path not in listed:
                raise BundleError(f"Golden image '{golden.path}' is not among the manifest's files.")
        for artifact in self.artifacts:
            self._check_artifact(artifact, listed)

    def _check_artifact(self, artifact: Artifact, listed: set[str]) -> None:
        missing = sorted(set(artifact.companions) - listed)
        if missing:
            raise BundleError(f"Artifact '{artifact.path}' needs {missing}, which the manifest does not list.")
        hashes = {record.sha256 for record in self.all_files.values()} | {self.provenance.checkpoint_sha256}
        if artifact.parent and artifact.parent not in hashes:
            raise BundleError(
                f"Artifact '{artifact.path}' was made from {artifact.parent[:12]}..., which is not in the chain."
            )

    @property
    def all_files(self) -> dict[str, FileRecord]:
        """Every listed file by its path."""
        artifacts = (FileRecord(path=a.path, sha256=a.sha256, size=a.size) for a in self.artifacts)
        return {record.path: record for record in (*artifacts, *self.files)}

    def gate(self, precision: Precision) -> Gate:
        """What must hold for artifacts of this precision.

        Raises:
            BundleError: when the manifest has none, or one that leaves open what verification judges.
        """
        gate = self.gates.get(precision, Gate())
        if None in (gate.max_map_drop, gate.min_match_rate, gate.min_iou, gate.max_score_delta):
            raise BundleError(
                f"The bundle has no complete accuracy gate for '{precision}'.",
                hint="make the bundle again with 'fcos-deploy deploy'",
            )
        return gate

    def artifact(self, path: str) -> Artifact:
        """The artifact with this path.

        Raises:
            BundleError: naming the ones that exist.
        """
        for artifact in self.artifacts:
            if artifact.path == path:
                return artifact
        raise BundleError(
            f"The bundle has no artifact '{path}'.", hint=f"artifacts: {', '.join(a.path for a in self.artifacts)}"
        )


def manifest_text(manifest: Manifest) -> str:
    """The manifest as JSON text, the same for the same contents.

    Raises:
        BundleError: when its parts do not fit each other, or a figure is not finite.
    """
    manifest.check()
    try:
        return json.dumps(to_json(manifest), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise BundleError(f"A figure in the manifest is not finite: {error}.") from error


def parse_manifest(text: str, *, where: str) -> Manifest:
    """The inverse of ``manifest_text``; ``where`` names the file in errors.

    Raises:
        ManifestVersionError: when a newer version wrote it.
        BundleError: when it is not a manifest.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"'{where}' is not JSON: {error}.") from error
    _check_version(value, where)
    try:
        manifest = from_json(Manifest, value, where=MANIFEST_NAME)
    except FcosDeployError as error:
        raise BundleError(f"'{where}' is not a manifest: {error.message}", hint=error.hint) from error
    except (TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"'{where}' is not a manifest: {error}.") from error
    manifest.check()
    return manifest


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    if any(isinstance(v, float) and not math.isfinite(v) for v in found.values()):
        raise ValueError("a number is too large")
    return found


def _check_version(value: Any, where: str) -> None:
    version = value.get("schema_version") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"'{where}' has no schema version.")
    if version > SCHEMA_VERSION:
        raise ManifestVersionError(
            f"'{where}' has schema version {version}, this fcos-deploy reads up to {SCHEMA_VERSION}.",
            hint="pip install --upgrade fcos-deploy",
        )
