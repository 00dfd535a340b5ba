"""``fcos-deploy deploy``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import with_checkpoint_options
from fcos_deploy.core.checkpoint_options import CheckpointOptions

__all__ = ["command"]


@with_checkpoint_options
def command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of any supported ecosystem.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the bundle.")],
    calibration_images: Annotated[Path, typer.Option(help="Images, list file or COCO json to calibrate INT8 on.")],
    backend: Annotated[list[str] | None, typer.Option(help="Build for it; without, for all that run here.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Device profile, such as jetson-orin-nano.")] = None,
    images: Annotated[Path | None, typer.Option(help="Images that prove the accuracy.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Their COCO json; without, PyTorch is the truth.")] = None,
    max_map_drop: Annotated[float, typer.Option(help="Most AP that INT8 may lose (0.01 is one point).")] = 0.01,
    calibration_count: Annotated[int | None, typer.Option(help="Calibration images to take.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration images.")] = 0,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 17 to 23.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
    options: CheckpointOptions,
) -> None:
    """Take a checkpoint to a verified bundle; a killed run goes on where it was. Exit code 4: a gate does not hold."""
    from fcos_deploy.cli.deployment import show, show_plans
    from fcos_deploy.cli.output import progress_bar
    from fcos_deploy.pipeline import DeployRequest, deploy, plan_targets

    wanted_backend = backend[0] if backend and target else ""
    plans = plan_targets(tuple(target or ()), backend=wanted_backend, input_size=options.input_size)
    if dry_run:
        show_plans(plans, as_json=as_json)
        return
    request = DeployRequest(
        checkpoint=checkpoint,
        output=output,
        calibration_images=calibration_images,
        backends=() if target else tuple(backend or ()),
        plans=plans,
        options=options,
        images=images,
        annotations=annotations,
        max_map_drop=max_map_drop,
        calibration_count=calibration_count,
        seed=seed,
        opset=opset,
        command=shlex.join(["fcos-deploy", *sys.argv[1:]]),
    )
    with progress_bar() as progress:
        made = deploy(request, progress=progress)
    show(made, as_json=as_json)
