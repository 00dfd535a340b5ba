"""``fcos-deploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import with_checkpoint_options
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision, Tail

__all__ = ["command"]


@with_checkpoint_options
def command(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of any supported ecosystem.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write.")],
    tail: Annotated[Tail, typer.Option(help="End of the graph: head outputs, candidates or detections.")] = Tail.RAW,
    batch: Annotated[str, typer.Option(help="Images an inference, or 'dynamic'.")] = "1",
    precision: Annotated[str, typer.Option(metavar="fp32|fp16", help="Format of the weights.")] = Precision.FP32.value,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 17 to 23.")] = None,
    simplify: Annotated[bool, typer.Option("--simplify/--no-simplify", help="Simplify the graph.")] = True,
    nms_form: Annotated[str, typer.Option(metavar="onnx|static", help="How the nms tail suppresses.")] = "onnx",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
    options: CheckpointOptions,
) -> None:
    """Write a checkpoint as an ONNX graph that carries its contract, compared with PyTorch."""
    from exporters.torch_onnx import export_onnx, parse_options
    from fcos_deploy.checkpoints.load import load_checkpoint

    chosen = parse_options(
        opset=opset, tail=tail, batch=batch, simplify=simplify, precision=precision, nms_form=nms_form
    )
    with progress_bar() as progress:
        made = export_onnx(load_checkpoint(checkpoint, options=options), output, options=chosen, progress=progress)
    note(made.summary())
    if as_json:
        print_json(made.to_json())
