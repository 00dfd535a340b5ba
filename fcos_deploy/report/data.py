"""What a report is made of: plain data, filled by whoever measured it. AP, shares and scores are in 0..1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.score_drift import ScoreDrift as MovedScores

__all__ = [
    "ChainLink",
    "ClassRow",
    "ImagePanel",
    "KeyFigure",
    "LatencyRow",
    "LayerRow",
    "MixedPrecisionPart",
    "PanelBox",
    "PrecisionCurve",
    "Provenance",
    "ReportData",
    "ReportVerdict",
    "ScoreDrift",
    "TrialPoint",
    "VariantRow",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportVerdict:
    """``headline``: one sentence that can be signed; ``details``: what it rests on; ``passed`` None: nothing judged."""

    passed: bool | None
    headline: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """A number with its unit that belongs beside the verdict, and what it is."""

    value: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantRow:
    """One artifact on one backend. None is shown as a dash: it was not measured.

    Latencies in milliseconds of one image, sizes in bytes and MiB; ``int8_share``: of the convolutions that really run
    in INT8; ``drop``: AP of the reference minus this one's, with its interval.
    """

    label: str
    backend: str
    precision: str
    artifact: str = ""
    reference: bool = False
    passed: bool | None = None
    ap: float | None = None
    ap_interval: tuple[float, float] | None = None
    ap50: float | None = None
    ap75: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    match_rate: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    throughput_fps: float | None = None
    file_bytes: int | None = None
    peak_memory_mib: float | None = None
    int8_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """AP of one class, in the order of ``ReportData.variants``."""

    name: str
    ap: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionCurve:
    """Interpolated precision at recall 0, 0.01, ..., 1 (101 numbers), at IoU 0.5, of one class and variant."""

    variant: str
    class_name: str
    precision: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreDrift:
    """(reference, variant) scores of the detections that both have, and the thresholds that follow; None: not known."""

    variant: str
    pairs: tuple[tuple[float, float], ...]
    moved: MovedScores | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """Every time measured, and the median of each stage, in milliseconds."""

    variant: str
    samples_ms: tuple[float, ...]
    preprocess_ms: float
    infer_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """What quantizing this layer alone does where an object is seen: root mean square errors.

    ``classes``, ``centerness``: of probabilities. ``boxes``: of sides, as a share of the box. ``ignored``: the
    chosen model leaves it in float.
    """

    layer: str
    classes: float
    boxes: float
    centerness: float
    ignored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPoint:
    """A candidate of the search; ``p50_ms`` None: another one beats it in INT8 share and in AP, it was not timed."""

    float_layers: int
    int8_share: float
    ap: float
    p50_ms: float | None = None
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecisionPart:
    """One search, whose goal was to lose at most ``max_drop`` of ``float_ap``: candidates, and layers worst first."""

    placement: str
    backend: str
    max_drop: float
    float_ap: float
    float_p50_ms: float | None
    trials: tuple[TrialPoint, ...]
    layers: tuple[LayerRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelBox:
    """A box xyxy in image pixels.

    ``partner``: whether the other detector has it too; ``moved``: by how much it scores more than that one.
    """

    box: tuple[float, float, float, float]
    score: float
    name: str
    partner: bool = True
    moved: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImagePanel:
    """One image as the reference and a variant see it. pixels: (h, w, 3) uint8 RGB."""

    name: str
    variant: str
    pixels: NDArray[np.uint8]
    reference: tuple[PanelBox, ...]
    candidate: tuple[PanelBox, ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainLink:
    """A file of the bundle: what it is, its hash, its size in bytes, and from which file it was made by which step."""

    path: str
    kind: str
    sha256: str
    size: int
    parent: str = ""
    step: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where everything comes from, and how to make it again."""

    created: str = ""
    chain: tuple[ChainLink, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    machine: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()
    decisions: tuple[tuple[str, str, str], ...] = ()  # what, value, on whose word


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """A whole report. ``data``: a sentence about the evaluation images; ``notes``: what a reader must know."""

    title: str
    verdict: ReportVerdict
    data: str
    variants: tuple[VariantRow, ...]
    figures: tuple[KeyFigure, ...] = ()
    classes: tuple[ClassRow, ...] = ()
    curves: tuple[PrecisionCurve, ...] = ()
    drifts: tuple[ScoreDrift, ...] = ()
    latencies: tuple[LatencyRow, ...] = ()
    mixed: tuple[MixedPrecisionPart, ...] = ()
    images: tuple[ImagePanel, ...] = ()
    provenance: Provenance = Provenance()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        labels = [row.label for row in self.variants]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"The variants of a report need different labels, got {labels}.")
        for row in self.classes:
            if len(row.ap) != len(labels):
                raise ConfigError(f"Class '{row.name}' needs {len(labels)} figures, got {len(row.ap)}.")
