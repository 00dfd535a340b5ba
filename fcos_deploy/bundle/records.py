"""The manifest's figures: what was measured, where, and what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from fcos_deploy.core.contract import Decision
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BundleError
from fcos_deploy.core.score_drift import ScoreDrift

__all__ = ["DEFAULT_GATES", "AccuracyFigure", "BenchmarkFigure", "CalibrationRecord", "Gate", "Provenance", "Target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What must hold for artifacts of one precision.

    ``max_map_drop`` in AP (0..1) against the reference. A golden detection counts as found when one of the same class
    overlaps with at least ``min_iou`` and its score differs by at most ``max_score_difference``; at least the fraction
    ``min_matched`` must be found, and as large a fraction of the engine's own must have a counterpart.
    """

    precision: Precision
    max_map_drop: float
    min_iou: float
    max_score_difference: float
    min_matched: float

    def __post_init__(self) -> None:
        for name in ("max_map_drop", "min_iou", "max_score_difference", "min_matched"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise BundleError(f"Gate '{self.precision}': {name} must be in [0, 1], got {getattr(self, name)}.")


# fp32: rounding only. fp16: 11 bits of mantissa through some sixty convolutions. int8: 8 bits. The detections of the
# golden images are held to these; AP over a data set is held to `max_map_drop`. What a detector really shows is in
# docs/accuracy.md: in fp16 boxes hardly move, but where two nearly tie in score the other one may survive.
DEFAULT_GATES: tuple[Gate, ...] = (
    Gate(precision=Precision.FP32, max_map_drop=0.001, min_iou=0.99, max_score_difference=0.005, min_matched=1.0),
    Gate(precision=Precision.FP16, max_map_drop=0.005, min_iou=0.95, max_score_difference=0.02, min_matched=0.97),
    Gate(precision=Precision.INT8, max_map_drop=0.01, min_iou=0.75, max_score_difference=0.15, min_matched=0.9),
)


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
class Target:
    """What the bundle was made for.

    ``backend`` and ``precision`` are what is run when nothing else is asked for; ``fallback`` are the backends that
    may take its place, in this order, when the operator allows it.
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
