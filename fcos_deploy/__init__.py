"""fcos-deploy: from a trained FCOS detector to a verified engine.

The public names below are imported when they are first used, so that ``import fcos_deploy`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fcos_deploy.core.backend import ComputeType, PerformanceHint, Session, SessionOptions
    from fcos_deploy.core.contract import ModelContract
    from fcos_deploy.core.detections import Detections
    from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
    from fcos_deploy.core.errors import FcosDeployError
    from fcos_deploy.core.image_io import read_image
    from fcos_deploy.detector import Detector

__all__ = [
    "ArtifactKind",
    "ComputeType",
    "Detections",
    "Detector",
    "FcosDeployError",
    "ModelContract",
    "PerformanceHint",
    "Precision",
    "Session",
    "SessionOptions",
    "Tail",
    "read_image",
]

_HOMES = {
    "ArtifactKind": "fcos_deploy.core.enums",
    "ComputeType": "fcos_deploy.core.backend",
    "Detections": "fcos_deploy.core.detections",
    "Detector": "fcos_deploy.detector",
    "FcosDeployError": "fcos_deploy.core.errors",
    "ModelContract": "fcos_deploy.core.contract",
    "PerformanceHint": "fcos_deploy.core.backend",
    "Precision": "fcos_deploy.core.enums",
    "Session": "fcos_deploy.core.backend",
    "SessionOptions": "fcos_deploy.core.backend",
    "Tail": "fcos_deploy.core.enums",
    "read_image": "fcos_deploy.core.image_io",
}


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for; type checkers read the imports above
    if name not in _HOMES:
        raise AttributeError(f"module 'fcos_deploy' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
