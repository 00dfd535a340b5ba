"""One file of a bundle, and what a machine must have to run it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fcos_deploy.core.contract import Decision
from fcos_deploy.core.enums import ArtifactKind, Precision, StrEnum
from fcos_deploy.core.errors import BundleError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.score_drift import ScoreDrift

__all__ = [
    "DEFAULT_GATES",
    "AccuracyFigure",
    "Artifact",
    "BenchmarkFigure",
    "CalibrationRecord",
    "FileRecord",
    "Provenance",
    "Requirements",
    "RunDefaults",
    "StepRecord",
    "VersionRule",
    "check_relative_path",
]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_PATH = 240  # bytes; leaves room for a prefix within the 255 of common file systems


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


def _check_file(path: str, sha256: str, size: int) -> None:
    check_relative_path(path)
    if not _SHA256.fullmatch(sha256):
        raise BundleError(f"'{path}' has {sha256[:80]!r} in place of a SHA-256.")
    if not 0 <= size < 1 << 40:
        raise BundleError(f"'{path}' cannot have {size} bytes.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Path relative to the bundle, SHA-256 in hexadecimal, size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        _check_file(self.path, self.sha256, self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """How an artifact was made: options, versions of the tools, wall-clock seconds, machine."""

    name: str
    config: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    platform: str = ""


class VersionRule(StrEnum):
    """Which runtime versions open an artifact: the very one, one of the same major number, or that one and newer."""

    EXACT = "exact"
    SAME_MAJOR = "same-major"
    AT_LEAST = "at-least"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What must be true of a machine before the artifact is opened; empty fields ask for nothing.

    ``compute_capabilities`` such as ("8.7",), one of which the GPU must have; with ``hardware_compatible`` it may be
    newer. ``driver`` is the lowest. ``machine`` is the processor architecture as ``platform.machine()`` names it,
    ``cpu_features`` are flags of /proc/cpuinfo. ``device`` must occur among the backend's devices. ``max_batch`` and
    ``input_sizes`` (height, width) bound the requests that its input profile accepts; 0 and empty: no bound.
    ``rebuild`` is the command that makes the artifact for another machine.
    """

    backend_version: str = ""
    version_rule: VersionRule = VersionRule.EXACT
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    driver: str = ""
    machine: str = ""
    cpu_features: tuple[str, ...] = ()
    device: str = ""
    max_batch: int = 0
    input_sizes: tuple[tuple[int, int], ...] = ()
    rebuild: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A model file.

    ``backend`` is the runtime it was made for and certified with; empty: any that accepts the kind. ``placement`` is
    the Q/DQ placement of an INT8 graph. ``parent`` is the SHA-256 of what it was made from. ``companions`` are files
    without which it does not open (weights of an IR, the sidecar with the contract).
    """

    path: str
    kind: ArtifactKind
    precision: Precision
    sha256: str
    size: int
    step: StepRecord
    parent: str = ""
    backend: str = ""
    placement: str = ""
    companions: tuple[str, ...] = ()
    requires: Requirements = field(default_factory=Requirements)

    def __post_init__(self) -> None:
        _check_file(self.path, self.sha256, self.size)
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
class CalibrationRecord:
    """Where INT8 ranges came from. ``path``: the calibration file in the bundle; ``images``: their SHA-256, sorted."""

    path: str
    method: str
    images: tuple[str, ...] = ()
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyFigure:
    """Accuracy of one artifact on one backend. Metrics are fractions (0..1), such as ``ap`` and ``ap50``.

    ``drop`` is reference AP minus this AP, ``drop_interval`` its 95 % confidence interval. ``score_drift``: how the
    scores moved, and the thresholds that keep the reference's operating points; None for the reference itself.
    """

    artifact: str
    backend: str
    precision: Precision
    dataset: str
    images: int
    metrics: dict[str, float]
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    score_drift: ScoreDrift | None = None
    details: dict[str, str] = field(default_factory=dict)


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

    ``fallback``: the backends that may take its place, in this order, when the operator allows it.
    """

    backend: str
    precision: Precision
    profile: str = ""
    device: str = ""
    fallback: tuple[str, ...] = ()


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
