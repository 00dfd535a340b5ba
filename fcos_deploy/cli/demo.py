"""``fcos-deploy demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the bundle.")] = Path("fcos-demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Take the bundled blood-cell detector to a verified bundle: export, INT8, engines, accuracy, speed, report."""
    from fcos_deploy.cli.deploy import show
    from fcos_deploy.cli.output import note, progress_bar
    from fcos_deploy.pipeline.deploy import demo_request, deploy

    with progress_bar() as progress:
        made = deploy(demo_request(output), progress=progress)
    show(made, as_json=as_json)
    note(f"\nreport:  {made.bundle / 'report.html'}\nverify:  fcos-deploy verify {made.bundle}")
