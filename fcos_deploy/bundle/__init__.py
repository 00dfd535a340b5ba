"""The bundle: a detector, the contract around it and the proof, in one folder that can be trusted."""

from fcos_deploy.bundle.manifest import (
    DEFAULT_GATES,
    AccuracyFigure,
    Artifact,
    BenchmarkFigure,
    CalibrationRecord,
    FileRecord,
    GoldenDetections,
    GoldenImage,
    GoldenRun,
    Manifest,
    Provenance,
    Requirements,
    RunDefaults,
    StepRecord,
    VersionRule,
)
from fcos_deploy.bundle.selection import Selection, select_artifact
from fcos_deploy.bundle.signature import required_keys
from fcos_deploy.bundle.store import Bundle, is_bundle, open_bundle, open_trusted, pack
from fcos_deploy.bundle.writer import ArtifactDraft, BundleWriter, StepCache, StepOutput, StepResult

__all__ = [
    "DEFAULT_GATES",
    "AccuracyFigure",
    "Artifact",
    "ArtifactDraft",
    "BenchmarkFigure",
    "Bundle",
    "BundleWriter",
    "CalibrationRecord",
    "FileRecord",
    "GoldenDetections",
    "GoldenImage",
    "GoldenRun",
    "Manifest",
    "Provenance",
    "Requirements",
    "RunDefaults",
    "Selection",
    "StepCache",
    "StepOutput",
    "StepRecord",
    "StepResult",
    "VersionRule",
    "is_bundle",
    "open_bundle",
    "open_trusted",
    "pack",
    "required_keys",
    "select_artifact",
]
