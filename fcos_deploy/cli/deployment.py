"""How a finished deployment is printed; shared by ``deploy`` and ``demo``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fcos_deploy.cli.output import note, print_json, table

if TYPE_CHECKING:
    from fcos_deploy.core.device_plan import Plan
    from fcos_deploy.pipeline import Deployment

__all__ = ["show", "show_plans"]

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
