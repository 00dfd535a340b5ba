"""The report that a person reads: one HTML file that needs nothing else, and the same in Markdown."""

from fcos_deploy.report.data import (
    ChainLink,
    ClassRow,
    ImagePanel,
    KeyFigure,
    LatencyRow,
    LayerRow,
    MixedPrecisionPart,
    PanelBox,
    PrecisionCurve,
    Provenance,
    ReportData,
    ReportVerdict,
    ScoreDrift,
    TrialPoint,
    VariantRow,
)
from fcos_deploy.report.render import write_report

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
    "write_report",
]
