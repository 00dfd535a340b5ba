"""What a deployment is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.device_plan import Plan
from fcos_deploy.core.errors import ConfigError

__all__ = ["DeployRequest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRequest:
    """From ``checkpoint`` to the bundle ``output``.

    ``backends`` to build for; empty takes every one that this machine can run. ``images`` (and ``annotations``) prove
    the accuracy; without them the calibration images and the reference's own detections do. ``plans`` are devices that
    get artifacts of their own. ``max_map_drop`` is the most AP (0..1) that INT8 may lose.
    """

    checkpoint: Path
    output: Path
    calibration_images: Path
    backends: tuple[str, ...] = ()
    plans: tuple[Plan, ...] = ()
    options: CheckpointOptions = field(default_factory=CheckpointOptions)
    images: Path | None = None
    annotations: Path | None = None
    max_map_drop: float = 0.01
    calibration_count: int | None = None
    seed: int = 0
    opset: int | None = None
    golden_count: int = 4
    benchmark_iterations: int = 30
    command: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_map_drop <= 1.0:
            raise ConfigError(
                f"max_map_drop is a share of 1 (0.01 is one AP point), in [0, 1], got {self.max_map_drop}."
            )
        if self.annotations is not None and self.images is None:
            raise ConfigError("Annotations need the images they belong to.", hint="give --images DIR as well")
        if self.golden_count < 1:
            raise ConfigError("A bundle needs at least one golden image.")
