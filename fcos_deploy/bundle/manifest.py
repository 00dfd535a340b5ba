"""The manifest of a bundle: what it holds, where it comes from, what it needs and what was measured, as JSON.

The bill of materials says the same in CycloneDX 1.6 with a model card (cyclonedx.org/docs/1.6/json).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fcos_deploy.core.contract import Decision, ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, ComputeType, PerformanceHint, Precision, StrEnum
from fcos_deploy.core.errors import BundleError, FcosDeployError, ManifestVersionError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Finding, Gate, Outcome, ScoreDrift
from fcos_deploy.core.progress import StageRecord
from fcos_deploy.core.serialize import from_json, to_json, unique_keys

__all__ = [
    "BOM_NAME",
    "DEFAULT_GATES",
    "DIGEST_NAME",
    "LAYERS_FOLDER",
    "LOG_NAME",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "MODEL_SIGNATURE_NAME",
    "SIGNATURE_NAME",
    "UNLISTED",
    "AccuracyFigure",
    "Artifact",
    "BenchmarkFigure",
    "CalibrationRecord",
    "FileRecord",
    "GoldenDetections",
    "GoldenImage",
    "GoldenRun",
    "Manifest",
    "Provenance",
    "Requirements",
    "RunDefaults",
    "StepRecord",
    "TensorFingerprint",
    "VersionRule",
    "bill_of_materials",
    "carried_scores",
    "check_relative_path",
    "manifest_text",
    "parse_manifest",
]

MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"
SIGNATURE_NAME = "SIGNATURE"
LOG_NAME = "verification.jsonl"
MODEL_SIGNATURE_NAME = "model.sig"  # for the tools of others (signature.py), never read here
# Files of a bundle that its manifest cannot list; each one that is read has a check of its own.
UNLISTED = frozenset({MANIFEST_NAME, DIGEST_NAME, SIGNATURE_NAME, LOG_NAME, MODEL_SIGNATURE_NAME})
LAYERS_FOLDER = "device"  # what was built on a device, with manifests of its own (device_layer.py); never listed
MAX_MANIFEST_BYTES = 32 << 20

_SCHEMA_VERSION = 1
_MAX_PIXELS = 50_000_000  # of a golden image
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_PATH = 240  # bytes; leaves room for a prefix within the 255 of common file systems


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """A file of the bundle: path relative to the bundle, SHA-256 in hexadecimal, size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        check_relative_path(self.path)
        if not _SHA256.fullmatch(self.sha256):
            raise BundleError(f"'{self.path}' has {self.sha256[:80]!r} in place of a SHA-256.")
        if not 0 <= self.size < 1 << 40:
            raise BundleError(f"'{self.path}' cannot have {self.size} bytes.")

    def is_intact(self, folder: Path) -> bool:
        """Whether the file in ``folder`` is a plain one of this size and these contents."""
        path = folder / self.path
        plain = path.is_file() and not path.is_symlink()
        return plain and path.stat().st_size == self.size and sha256_file(path) == self.sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """How an artifact was made: options, versions of the tools, wall-clock seconds, machine."""

    name: str
    config: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    platform: str = ""


class VersionRule(StrEnum):
    """Which runtime versions open an artifact: the very one, one of the same major number, or that one and newer.

    ``at-least`` includes older patches of the same release series, such as 2026.4.0 for 2026.4.1.
    """

    EXACT = "exact"
    SAME_MAJOR = "same-major"
    AT_LEAST = "at-least"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What must be true of a machine before the artifact is opened; empty fields ask for nothing.

    ``compute_capabilities`` such as ("8.7",), one of which the GPU must have; with ``hardware_compatible`` it may be
    newer. ``driver`` is the lowest. ``machine`` is the processor architecture as ``platform.machine()`` names it,
    ``cpu_features`` are flags of /proc/cpuinfo. ``device`` must occur among the backend's devices.
    """

    backend_version: str = ""
    version_rule: VersionRule = VersionRule.EXACT
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    driver: str = ""
    machine: str = ""
    cpu_features: tuple[str, ...] = ()
    device: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact(FileRecord):
    """A model file.

    ``backend`` is the runtime it was made for and certified with; empty: any that accepts the kind. ``placement`` is
    the Q/DQ placement of an INT8 graph. ``parent`` is the SHA-256 of what it was made from. ``companions`` are files
    without which it does not open (weights of an IR, the sidecar with the contract).
    """

    kind: ArtifactKind
    precision: Precision
    step: StepRecord
    parent: str = ""
    backend: str = ""
    placement: str = ""
    companions: tuple[str, ...] = ()
    requires: Requirements = field(default_factory=Requirements)

    def __post_init__(self) -> None:
        FileRecord.__post_init__(self)  # super() without arguments does not work in a class with slots
        if self.parent and not _SHA256.fullmatch(self.parent):
            raise BundleError(f"'{self.path}' has {self.parent[:80]!r} in place of its parent's SHA-256.")


# fp32: rounding only. fp16: 11 bits of mantissa through some sixty convolutions. int8: 8 bits. The detections of the
# golden images are held to these; AP over a data set is held to `max_map_drop`. What a detector really shows is in
# docs/accuracy.md: in fp16 boxes hardly move, but where two nearly tie in score the other one may survive.
DEFAULT_GATES: dict[Precision, Gate] = {
    Precision.FP32: Gate(max_map_drop=0.001, min_iou=0.99, max_score_delta=0.005, min_match_rate=1.0),
    Precision.FP16: Gate(max_map_drop=0.005, min_iou=0.95, max_score_delta=0.02, min_match_rate=0.97),
    Precision.INT8: Gate(max_map_drop=0.01, min_iou=0.75, max_score_delta=0.15, min_match_rate=0.9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFingerprint:
    """One preprocessed tensor: SHA-256 of its bytes, and the means of a grid of cells, which tolerate rounding.

    ``shape`` is (c, H, W); ``cells`` are c * 8 * 8 means, channel by channel and row by row, in the tensor's own unit.
    """

    sha256: str
    dtype: str
    shape: tuple[int, ...]
    cells: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenDetections:
    """The reference's detections as plain numbers: boxes xyxy in image pixels."""

    boxes: tuple[tuple[float, float, float, float], ...]
    scores: tuple[float, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.boxes) == len(self.scores) == len(self.labels):
            raise BundleError("A golden image must have as many boxes as scores and labels.")

    @classmethod
    def from_detections(cls, detections: Detections) -> GoldenDetections:
        """From a detector's result."""
        return cls(
            boxes=tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in detections.boxes),
            scores=tuple(float(score) for score in detections.scores),
            labels=tuple(int(label) for label in detections.labels),
        )

    def to_detections(self) -> Detections:
        """As arrays."""
        return Detections(
            np.asarray(self.boxes, np.float32).reshape(-1, 4),
            np.asarray(self.scores, np.float32),
            np.asarray(self.labels, np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenImage:
    """An image file of the bundle, what preprocessing makes of it, and what the reference detects in it.

    ``path`` is relative to the bundle, whose manifest lists it among its files.
    """

    path: str
    height: int
    width: int
    fingerprint: TensorFingerprint
    detections: GoldenDetections

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or self.height * self.width > _MAX_PIXELS:
            raise BundleError(f"Golden image '{self.path[:80]}' cannot be {self.height}x{self.width}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRun:
    """What one artifact detects in the golden images, in their order, on the machine that made the bundle.

    ``artifact`` is its path in the bundle. ``errors`` summarise how far that is from the reference's detections:
    ``edge_px_p50``, ``edge_px_p90`` (largest edge error of a box, image pixels), ``score_p50``, ``score_p90``.
    """

    artifact: str
    backend: str
    precision: Precision
    compute: ComputeType
    detections: tuple[GoldenDetections, ...]
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """Where INT8 ranges came from.

    ``path``: the calibration file in the bundle. ``images``: SHA-256 of the images' files, sorted. ``pixels``: of their
    decoded pixels, sorted; a copy in another format shares its original's. ``findings``: what is to be said of these
    images, and of those that INT8 was judged on.
    """

    path: str
    method: str
    images: tuple[str, ...] = ()
    pixels: tuple[str, ...] = ()
    details: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyFigure:
    """Accuracy of one artifact on one backend. Metrics are fractions (0..1), such as ``ap`` and ``ap50``.

    ``drop`` is reference AP minus this AP, ``drop_interval`` its 95 % confidence interval. ``outcome``: what judging it
    came to, ``verdicts`` the sentences behind it. ``score_drift``: how the scores moved, and the thresholds that keep
    the reference's operating points. All four are of the comparison, so the reference itself has none. ``thresholds``:
    for each class the score at which it has the best F1 on these images, or what deploy was asked for.
    """

    artifact: str
    backend: str
    precision: Precision
    dataset: str
    images: int
    metrics: dict[str, float]
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    outcome: Outcome | None = None
    verdicts: tuple[str, ...] = ()
    score_drift: ScoreDrift | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)


def carried_scores(
    figures: Sequence[AccuracyFigure], *, backend: str, precision: str, compute: str
) -> dict[str, float]:
    """The score thresholds of the figure that fits best what runs: one figure alone does, whatever runs."""
    fitting = [f for f in figures if len(figures) == 1 or (f.backend, str(f.precision)) == (backend, precision)]
    fitting.sort(key=lambda figure: figure.details.get("compute", "") != compute)
    return fitting[0].thresholds if fitting else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkFigure:
    """Speed of one artifact on one machine. Units are in the metrics' names, such as ``total_p50_ms``."""

    artifact: str
    backend: str
    precision: Precision
    device: str
    metrics: dict[str, float]
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDefaults:
    """What is run when nothing else is asked for: ``backend`` and ``precision``, made for ``profile`` or ``device``.

    ``fallback``: the backends that may take its place, in this order, when the operator allows it. The rest is how the
    bundle was tuned and measured, taken where nobody asks for something else (``tuned_options``); None is the runtime's
    own default.
    """

    backend: str
    precision: Precision
    profile: str = ""
    device: str = ""
    fallback: tuple[str, ...] = ()
    compute: ComputeType | None = None
    hint: PerformanceHint | None = None
    threads: int | None = None
    streams: int | None = None
    batch: int | None = None

    def __str__(self) -> str:
        counts = {"thread": self.threads, "stream": self.streams, "image": self.batch}
        words = [f"{n} {name}{'' if n == 1 else 's'}" for name, n in counts.items() if n is not None]
        return ", ".join(str(word) for word in (self.backend, self.precision, self.compute, self.hint, *words) if word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the bundle comes from. ``created`` is UTC, ISO 8601; ``command`` is what to type to make it again."""

    checkpoint: str
    checkpoint_sha256: str
    created: str = ""
    command: str = ""
    platform: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a bundle.

    ``contract`` is the reference's (the checkpoint's); every artifact carries its own in addition. ``artifacts`` form a
    hash chain: ``parent`` is the SHA-256 of another artifact or of the checkpoint named in ``provenance``. ``files``
    are all other files. Every file of the bundle is listed exactly once, except those in ``UNLISTED``.
    ``stages``: where the time of the run that finished the bundle went, up to its own check.
    """

    name: str
    contract: ModelContract
    provenance: Provenance
    defaults: RunDefaults
    artifacts: tuple[Artifact, ...] = ()
    files: tuple[FileRecord, ...] = ()
    gates: dict[Precision, Gate] = field(default_factory=dict)
    golden: tuple[GoldenImage, ...] = ()
    golden_runs: tuple[GoldenRun, ...] = ()
    calibration: tuple[CalibrationRecord, ...] = ()
    accuracy: tuple[AccuracyFigure, ...] = ()
    benchmark: tuple[BenchmarkFigure, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    schema_version: int = _SCHEMA_VERSION

    def check(self) -> None:
        """Raise BundleError unless the parts fit each other; done whenever a manifest is written or read."""
        listed = Counter(record.path for record in (*self.artifacts, *self.files))
        repeated = sorted(path for path, count in listed.items() if count > 1)
        if repeated:
            raise BundleError(f"The manifest lists {repeated} more than once.")
        reserved = sorted(path for path in listed if path in UNLISTED or path.split("/")[0] == LAYERS_FOLDER)
        if reserved:
            raise BundleError(f"The manifest cannot list {reserved}.")
        unlisted = [golden.path for golden in self.golden if golden.path not in listed]
        if unlisted:
            raise BundleError(f"Golden image '{unlisted[0][:80]}' is not among the manifest's files.")
        for run in self.golden_runs:
            if run.artifact not in listed or len(run.detections) != len(self.golden):
                raise BundleError(f"The golden run of '{run.artifact[:80]}' does not fit the bundle.")
        hashes = {record.sha256 for record in self.all_files.values()} | {self.provenance.checkpoint_sha256, ""}
        for artifact in self.artifacts:
            missing = sorted(set(artifact.companions) - set(listed))
            if missing:
                raise BundleError(f"Artifact '{artifact.path}' needs {missing}, which the manifest does not list.")
            if artifact.parent not in hashes:
                raise BundleError(
                    f"Artifact '{artifact.path}' was made from {artifact.parent[:12]}..., which is not in the chain."
                )

    @property
    def all_files(self) -> dict[str, FileRecord]:
        """Every listed file by its path."""
        return {record.path: record for record in (*self.artifacts, *self.files)}

    def golden_run(self, artifact: Artifact, *, backend: str, compute: ComputeType) -> GoldenRun | None:
        """What ``artifact`` gave where the bundle was made, or its nearest relative that was run there.

        That is the same file on the same backend, then on another one, then the graph that it was built from, and last
        any artifact of its precision; always computed in ``compute``.
        """
        parents = {record.path for record in self.artifacts if record.sha256 == artifact.parent}
        related = [run for run in self.golden_runs if (run.precision, run.compute) == (artifact.precision, compute)]

        def distance(run: GoldenRun) -> tuple[bool, bool, bool]:
            same = run.artifact == artifact.path
            return not same, run.artifact not in parents, not same or run.backend != backend

        return min(related, key=distance, default=None)

    def gate(self, precision: Precision) -> Gate:
        """What must hold for artifacts of this precision.

        Raises:
            BundleError: when the manifest has none, or one that leaves open what verification judges.
        """
        gate = self.gates.get(precision, Gate())
        if None in (gate.min_match_rate, gate.min_iou, gate.max_score_delta):
            raise BundleError(
                f"The bundle has no complete accuracy gate for '{precision}'.",
                hint="make the bundle again with 'fcos-deploy deploy'",
            )
        return gate


def check_relative_path(path: str) -> None:
    """Accept a plain relative path with forward slashes.

    Raises:
        BundleError: for a path that is absolute, leaves the bundle, or is not portable.
    """
    parts = path.split("/")
    plain = (
        path.isprintable()
        and "\\" not in path
        and ":" not in path
        and len(path.encode("utf-8", "replace")) <= _MAX_PATH
    )
    if not path or not plain or any(part in ("", ".", "..") for part in parts) or PurePosixPath(path).is_absolute():
        raise BundleError(f"{path[:80]!r} is not a path inside a bundle.", hint="use relative paths with '/'")


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
        value = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"'{where}' is not JSON: {error}.") from error
    version = value.get("schema_version") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"'{where}' has no schema version.")
    if version > _SCHEMA_VERSION:
        raise ManifestVersionError(
            f"'{where}' has schema version {version}, this fcos-deploy reads up to {_SCHEMA_VERSION}.",
            hint="pip install --upgrade fcos-deploy",
        )
    try:
        manifest = from_json(Manifest, value, where=MANIFEST_NAME)
    except FcosDeployError as error:
        raise BundleError(f"'{where}' is not a manifest: {error.message}", hint=error.hint) from error
    except (TypeError, OverflowError, RecursionError) as error:
        raise BundleError(f"'{where}' is not a manifest: {error}.") from error
    manifest.check()
    return manifest


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


BOM_NAME = "bom.cdx.json"
_MODEL, _CHECKPOINT = "model", "checkpoint"  # references within the document; those of files are their paths


def bill_of_materials(manifest: Manifest) -> str:
    """What the bundle of ``manifest``, which lists its files, is made of: JSON text, the same for the same manifest."""
    provenance = manifest.provenance
    tools = (provenance.tools, *(artifact.step.tools for artifact in manifest.artifacts))
    libraries = {(name, version) for versions in tools for name, version in versions.items() if version}
    files = {record.sha256: record.path for record in manifest.artifacts} | {provenance.checkpoint_sha256: _CHECKPOINT}
    dependencies = [
        {"ref": _MODEL, "dependsOn": sorted({artifact.path for artifact in manifest.artifacts})},
        *({"ref": a.path, "dependsOn": [files[a.parent]]} for a in manifest.artifacts if files.get(a.parent)),
    ]
    hashes = "".join(record.sha256 for record in manifest.all_files.values())
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, provenance.created + hashes)}",
        "version": 1,
        "metadata": {
            **({"timestamp": provenance.created} if provenance.created else {}),
            "tools": {"components": [_library("fcos-deploy", importlib.metadata.version("fcos-deploy"))]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": _MODEL,
                "name": manifest.name,
                "modelCard": _model_card(manifest),
            },
        },
        "components": [
            _hashed("machine-learning-model", _CHECKPOINT, provenance.checkpoint, provenance.checkpoint_sha256),
            *(
                {
                    **_hashed("file", a.path, a.path, a.sha256),
                    "properties": _properties(
                        {"kind": a.kind, "precision": a.precision, "backend": a.backend, "step": a.step.name}
                    ),
                }
                for a in manifest.artifacts
            ),
            *(_hashed("file", record.path, record.path, record.sha256) for record in manifest.files),
            *(_library(name, version) for name, version in sorted(libraries)),
        ],
        "dependencies": sorted(dependencies, key=lambda entry: str(entry["ref"])),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _model_card(manifest: Manifest) -> dict[str, Any]:  # Any: JSON
    contract = manifest.contract
    metrics = [
        {
            "type": name,
            "value": f"{value:.6g}",
            "slice": f"{figure.artifact} on {figure.backend}, {figure.images} images of {figure.dataset}",
        }
        for figure in manifest.accuracy
        for name, value in sorted(figure.metrics.items())
    ]
    decisions = {f"decision:{item.name}": f"{item.value} ({item.source})" for item in contract.decisions}
    return {
        "modelParameters": {
            "task": "object-detection",
            "architectureFamily": "FCOS",
            "modelArchitecture": f"FCOS of {contract.ecosystem}" if contract.ecosystem else "FCOS",
            "inputs": [{"format": f"{spec.name} {spec}"} for spec in contract.input_specs],
            "outputs": [{"format": name} for name in contract.outputs],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "properties": _properties({"classes": ", ".join(contract.class_names), **decisions}),
    }


def _hashed(kind: str, reference: str, name: str, sha256: str) -> dict[str, Any]:  # Any: JSON
    hashes = [{"alg": "SHA-256", "content": sha256}]
    return {"type": kind, "bom-ref": reference, "name": name, "hashes": hashes}


def _library(name: str, version: str) -> dict[str, Any]:  # Any: JSON
    return {"type": "library", "bom-ref": f"library:{name}@{version}", "name": name, "version": version}


def _properties(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"fcos-deploy:{name}", "value": str(value)} for name, value in values.items() if value]
