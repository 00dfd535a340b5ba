"""``fcos-deploy quantize``."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer

from fcos_deploy.cli.output import note, print_json, progress_bar, table

__all__ = ["command"]


def command(
    model: Annotated[Path, typer.Argument(help="Float ONNX graph.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="INT8 model to write: .onnx, for nncf .xml.")],
    calibration: Annotated[Path | None, typer.Option(help="calibration.json of this graph.")] = None,
    consumer: Annotated[str, typer.Option("--for", help="Backend, or placement, it is meant for.")] = "portable",
    quantizer: Annotated[str, typer.Option(help="qdq, or nncf for OpenVINO.")] = "qdq",
    method: Annotated[str, typer.Option(help="Range method, in place of the calibration's.")] = "",
    weights: Annotated[str, typer.Option(help="Range of weights: pairwise, reduced or full.")] = "",
    ignored_layers: Annotated[
        list[str] | None, typer.Option("--ignore-layer", help="Layer to leave in float; may be repeated.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Images to measure accuracy or noise on; for nncf to calibrate on.")
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(help="COCO json of the images; without, the float model's detections are the ground truth."),
    ] = None,
    max_map_drop: Annotated[
        float | None, typer.Option(min=0.0, help="Largest loss of AP (0.01 is a point): reached, or exit code 4.")
    ] = None,
    evaluations: Annotated[
        int, typer.Option(min=1, help="Most mixtures of INT8 and float to evaluate; 1: all layers in INT8 or nothing.")
    ] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime that measures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Make an INT8 model from a float ONNX graph."""
    from calibration.placement import weight_range
    from calibration.quantizers import QuantizeRequest
    from calibration.trade_offs import TRADE_OFF_COLUMNS, find_trade_offs, trade_off_rows
    from fcos_deploy.pipeline.quantize import accuracy_goal, quantize_model

    request = QuantizeRequest(
        source=model,
        output=output,
        consumer=consumer,
        calibration=calibration,
        images=images,
        method=method,
        weights=weight_range(weights),
        ignored_layers=tuple(ignored_layers or ()),
    )
    goal = accuracy_goal(
        max_map_drop,
        images=images,
        annotations=annotations,
        placement=request.placement,
        threads=threads,
        evaluations=evaluations,
    )
    with progress_bar() as progress:
        made = quantize_model(request, kind=quantizer, goal=goal, progress=progress)
    rows = [(key.replace("_", " "), shorten(value, 90, placeholder=" ...")) for key, value in made.record.items()]
    table(made.files[0].name, ("what", "value"), [row for row in rows if row[1]])
    for found in find_trade_offs(made.files[:1]):
        table("Trade-offs, most INT8 first", TRADE_OFF_COLUMNS, trade_off_rows(found))
    note(f"wrote {', '.join(str(file) for file in made.files)}")
    if as_json:
        print_json({"files": [str(file) for file in made.files], "record": dict(made.record)})
