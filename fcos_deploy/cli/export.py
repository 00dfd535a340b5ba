"""``fcos-deploy export`` and ``simplify``: ONNX graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import DeformForm, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError

__all__ = ["export_command", "simplify_command"]


@cli.with_all_checkpoint_options
def export_command(
    checkpoint: cli.Checkpoint,
    *,
    output: Annotated[Path, cli.output("ONNX file to write.")],
    tail: Annotated[
        Tail,
        cli.option("End of the graph. raw: head outputs; candidates: decoded boxes before NMS; nms: final detections."),
    ] = Tail.RAW,
    batch: Annotated[str, cli.option("Batch size of the graph.", metavar="N|dynamic")] = "1",
    precision: Annotated[Precision, cli.option("Type of the weights.", metavar="fp32|fp16")] = Precision.FP32,
    opset: cli.Opset = None,
    simplify: Annotated[bool, cli.option("Simplification of the graph.", "--simplify/--no-simplify")] = True,
    nms_form: Annotated[
        NmsForm,
        cli.option("NMS of the nms tail. onnx: the operator NonMaxSuppression; static: plain tensor operators."),
    ] = NmsForm.ONNX,
    nms_boxes: Annotated[
        int, cli.option("Number of best candidates that the static NMS looks at, up to 3840.", metavar="N", min=1)
    ] = 1000,
    deform_form: Annotated[
        DeformForm,
        cli.option(
            "Deformable convolutions. grid-sample: plain operators, for every runtime; operator: DeformConv, which is "
            "faster in ONNX Runtime and which OpenVINO and TensorRT do not have."
        ),
    ] = DeformForm.GRID_SAMPLE,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Export a checkpoint to an ONNX graph that carries its contract, and compare the graph with PyTorch."""
    from exporters.torch_onnx import ExportOptions, export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint

    if batch != "dynamic" and not batch.isdecimal():
        raise ConfigError(f"--batch must be a number or 'dynamic', got '{batch}'.")
    export_options = ExportOptions(
        opset=opset,
        tail=tail,
        batch=None if batch == "dynamic" else int(batch),
        simplify=simplify,
        precision=precision,
        nms_form=nms_form,
        nms_boxes=nms_boxes,
        deform_form=deform_form,
    )
    with progress_bar() as progress:
        loaded = load_checkpoint(checkpoint, options=options)
        export = export_onnx(loaded, output, options=export_options, progress=progress)
    note(export.summary())
    if as_json:
        print_json(export.to_json())


def simplify_command(
    model: cli.Graph, *, output: Annotated[Path, cli.output("ONNX file to write.")], as_json: cli.Json = False
) -> None:
    """Simplify an ONNX graph and check that its outputs stay the same; dynamic axes stay dynamic."""
    from exporters.simplify import simplify_onnx

    with progress_bar() as progress:
        result = simplify_onnx(model, output, progress=progress)
    note(result.summary())
    if as_json:
        print_json(result.to_json())
