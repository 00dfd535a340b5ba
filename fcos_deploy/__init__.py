"""fcos-deploy: from a trained FCOS detector to a verified engine.

The public names below are imported when they are first used, so that ``import fcos_deploy`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcos_deploy.accuracy.verify import verify_bundle
    from fcos_deploy.bundle import open_bundle
    from fcos_deploy.checkpoints.load import load_checkpoint
    from fcos_deploy.core.backend import Session, SessionOptions
    from fcos_deploy.core.checkpoint_options import CheckpointOptions
    from fcos_deploy.core.contract import ModelContract
    from fcos_deploy.core.decode import PROFILES, DecodeSpec
    from fcos_deploy.core.detections import Detections
    from fcos_deploy.core.enums import ArtifactKind, ComputeType, PerformanceHint, Precision, Tail
    from fcos_deploy.core.errors import FcosDeployError
    from fcos_deploy.core.image import read_image
    from fcos_deploy.core.preprocess import PreprocessSpec
    from fcos_deploy.detector import Detector
    from fcos_deploy.model.wrap import BoxOutput, Grouping, OutputConvention, WrappedModule, wrap_module
    from fcos_deploy.pipeline.deploy import deploy
    from fcos_deploy.pipeline.steps import DeployRequest

__all__ = [
    "PROFILES",
    "ArtifactKind",
    "BoxOutput",
    "CheckpointOptions",
    "ComputeType",
    "DecodeSpec",
    "DeployRequest",
    "Detections",
    "Detector",
    "FcosDeployError",
    "Grouping",
    "ModelContract",
    "OutputConvention",
    "PerformanceHint",
    "Precision",
    "PreprocessSpec",
    "Session",
    "SessionOptions",
    "Tail",
    "WrappedModule",
    "deploy",
    "load_checkpoint",
    "open_bundle",
    "read_image",
    "verify_bundle",
    "wrap_module",
]

_HOMES = {
    "PROFILES": "fcos_deploy.core.decode",
    "ArtifactKind": "fcos_deploy.core.enums",
    "BoxOutput": "fcos_deploy.model.wrap",
    "CheckpointOptions": "fcos_deploy.core.checkpoint_options",
    "ComputeType": "fcos_deploy.core.enums",
    "DecodeSpec": "fcos_deploy.core.decode",
    "DeployRequest": "fcos_deploy.pipeline.steps",
    "Detections": "fcos_deploy.core.detections",
    "Detector": "fcos_deploy.detector",
    "FcosDeployError": "fcos_deploy.core.errors",
    "Grouping": "fcos_deploy.model.wrap",
    "ModelContract": "fcos_deploy.core.contract",
    "OutputConvention": "fcos_deploy.model.wrap",
    "PerformanceHint": "fcos_deploy.core.enums",
    "Precision": "fcos_deploy.core.enums",
    "PreprocessSpec": "fcos_deploy.core.preprocess",
    "Session": "fcos_deploy.core.backend",
    "SessionOptions": "fcos_deploy.core.backend",
    "Tail": "fcos_deploy.core.enums",
    "WrappedModule": "fcos_deploy.model.wrap",
    "deploy": "fcos_deploy.pipeline.deploy",
    "load_checkpoint": "fcos_deploy.checkpoints.load",
    "open_bundle": "fcos_deploy.bundle",
    "read_image": "fcos_deploy.core.image",
    "verify_bundle": "fcos_deploy.accuracy.verify",
    "wrap_module": "fcos_deploy.model.wrap",
}


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for; type checkers read the imports above
    if name not in _HOMES:
        raise AttributeError(f"module 'fcos_deploy' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
