"""How a finished deployment is printed; shared by ``deploy`` and ``demo``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcos_deploy.cli.options import with_checkpoint_options
from fcos_deploy.cli.output import note, print_json, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions

if TYPE_CHECKING:
    from fcos_deploy.pipeline.deploy import Deployment
    from fcos_deploy.targets.plan import Plan

__all__ = ["command", "show", "show_plans"]

_COLUMNS = (
    "backend",
    "precision",
    "float in",
    "AP",
    "AP50",
    "drop",
    "p50 ms",
    "p90 ms",
    "speed-up",
    "images/s",
    "MiB",
)


def show(made: Deployment, *, as_json: bool) -> None:
    """A table for people on stderr; with ``as_json`` one document on stdout."""
    rows = [_row(made, index) for index in range(len(made.rows))]
    table(f"{made.bundle}", _COLUMNS, [tuple(_text(v) for v in row.values()) for row in rows])
    images = made.rows[0].scores.images
    note(f"AP over {images} images; times are medians, taken in turns on this machine. {made.seconds:.0f} s in all.")
    if as_json:
        print_json({"bundle": str(made.bundle), "seconds": made.seconds, "images": images, "variants": rows})


def _row(made: Deployment, index: int) -> dict[str, Any]:
    evaluation = made.rows[index]
    speed, reference = made.benchmark.results[index], made.benchmark.results[0]
    return {
        "backend": evaluation.run.backend,
        "precision": evaluation.run.precision,
        "compute": evaluation.run.description["compute"],
        "ap": evaluation.scores.ap,
        "ap50": evaluation.scores.ap50,
        "drop": evaluation.drop.value if evaluation.drop else None,
        "p50_ms": speed.latency.p50,
        "p90_ms": speed.latency.p90,
        "speedup": reference.latency.p50 / speed.latency.p50,
        "throughput_fps": speed.throughput_fps,
        "size_mib": speed.file_bytes / 2**20,
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def show_plans(plans: tuple[Plan, ...], *, as_json: bool) -> None:
    """What would be built for each device, where, and with which commands."""
    from fcos_deploy.core.serialize import to_json

    for plan in plans:
        rows = [(a.path, str(a.precision), a.where, a.how) for a in plan.artifacts]
        table(plan.profile.title, ("file", "precision", "made", "how"), rows)
        for line in (*plan.commands, *([plan.trtexec] if plan.trtexec else []), *plan.notes):
            note(f"  {line}")
    if as_json:
        print_json(json.loads(json.dumps(to_json(plans), default=str)))


@with_checkpoint_options
def command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of any supported ecosystem.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the bundle.")],
    calibration_images: Annotated[Path, typer.Option(help="Images, list file or COCO json to calibrate INT8 on.")],
    backend: Annotated[list[str] | None, typer.Option(help="Build for it; without, for all that run here.")] = None,
    target: Annotated[list[str] | None, typer.Option(help="Device profile, such as jetson-orin-nano.")] = None,
    images: Annotated[Path | None, typer.Option(help="Images that prove the accuracy.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Their COCO json; without, PyTorch is the ground truth.")
    ] = None,
    max_map_drop: Annotated[float, typer.Option(help="Most AP that INT8 may lose (0.01 is one point).")] = 0.01,
    calibration_count: Annotated[int | None, typer.Option(help="Calibration images to take.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of calibration images.")] = 0,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 17 to 23.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
    options: CheckpointOptions,
) -> None:
    """Take a checkpoint to a verified bundle; a killed run goes on where it was. Exit code 4: a gate does not hold."""
    from fcos_deploy.cli.output import progress_bar
    from fcos_deploy.pipeline.deploy import deploy
    from fcos_deploy.pipeline.steps import DeployRequest, plan_targets

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
