"""``fcos-deploy demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.deploy import show_deployment
from fcos_deploy.cli.output import note, progress_bar

__all__ = ["command"]


def command(
    *,
    output: Annotated[Path, cli.output("Folder of the bundle.", metavar="DIR")] = Path("fcos-demo"),
    as_json: cli.Json = False,
) -> None:
    """Deploy the blood-cell detector that comes with fcos-deploy: export, INT8, engines, accuracy, speed, report."""
    from fcos_deploy.pipeline.deploy import demo_request, deploy

    with progress_bar() as progress:
        deployment = deploy(demo_request(output), progress=progress)
    note(f"report:  {deployment.bundle / 'report.html'}\nverify:  fcos-deploy verify {deployment.bundle}\n")
    show_deployment(deployment, as_json=as_json)
