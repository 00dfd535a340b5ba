"""The detector and the images that come with fcos-deploy."""

from __future__ import annotations

from pathlib import Path

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.pipeline.request import DeployRequest

__all__ = ["DEMO_DATA", "demo_request"]

DEMO_DATA = Path(__file__).parent.parent / "demo_data"


def demo_request(output: Path) -> DeployRequest:
    """Deploy the bundled blood-cell detector for every backend of this machine.

    Raises:
        ConfigError: this installation came without the demo's data.
    """
    checkpoint = DEMO_DATA / "fcos_bccd.safetensors"
    if not checkpoint.is_file():
        raise ConfigError("This installation has no demo data.", hint="install fcos-deploy from its wheel or a clone")
    return DeployRequest(
        checkpoint=checkpoint,
        output=output,
        calibration_images=DEMO_DATA / "calibration",
        images=DEMO_DATA / "evaluation",
        annotations=DEMO_DATA / "evaluation.json",
        command=f"fcos-deploy demo -o {output.name}",
    )
