"""``fcos-deploy parity``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, trusted_keys, with_checkpoint_options
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision
from fcos_deploy.core.errors import AccuracyGateError

__all__ = ["command"]


@with_checkpoint_options
def command(
    model: Annotated[Path, typer.Argument(help="ONNX file, engine or bundle.")],
    *,
    reference: Annotated[Path, typer.Option(help="The checkpoint that it was made from.")],
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    count: Annotated[int, typer.Option(min=1, help="How many of them.")] = 4,
    backend: Annotated[str, typer.Option(help="Runtime.")] = "",
    precision: Annotated[Precision | None, typer.Option(help="Of a bundle.")] = None,
    device: Annotated[str, typer.Option(help="In the runtime's own words.")] = "",
    compute: Annotated[ComputeType, typer.Option(help="What the runtime computes in.")] = ComputeType.F32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtimes.")] = None,
    strict: Annotated[bool, typer.Option(help="Judge as float32, whatever the precision.")] = False,
    layers: Annotated[bool, typer.Option(help="Also find the first layer that diverges (ONNX files).")] = False,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    options: CheckpointOptions,
) -> None:
    """Compare with PyTorch stage by stage; name the first stage that diverges, and why. Exit 4 when one does.

    The options of 'export' say how the checkpoint is read where its own rules are not meant.
    """
    from fcos_deploy.accuracy.summary import parity_json
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.parity import ParityRequest, check_parity, find_layer

    session = SessionOptions(
        device=device,
        compute=compute,
        threads=threads,
        public_keys=trusted_keys(public_key, required=require_signature),
    )
    candidate = DetectorSpec(model=model, backend=backend, precision=precision, options=session)
    request = ParityRequest(
        candidate=candidate, checkpoint=reference, images=images, count=count, strict=strict, options=options
    )
    with progress_bar() as progress:
        report = check_parity(request, progress=progress)
        layer = find_layer(request, progress=progress) if layers else None
    rows = [(stage.stage, "ok" if stage.passed else "DIVERGES", stage.detail) for stage in report.stages]
    table("Parity with the reference", ("stage", "", "largest difference"), rows)
    for cause in report.causes:
        note(f"cause: {cause.sentence} (explains {cause.explained:.1%})")
    if layer is not None:
        note(f"first layer: {layer.layer} ({layer.kind}), after {layer.compared} that hold")
        for cause in layer.causes:
            note(f"cause: {cause.sentence}")
    if as_json:
        print_json(parity_json(report, layer))
    if report.first is not None:
        known = report.causes or layer is not None
        raise AccuracyGateError(
            f"The first stage that diverges is '{report.first.stage}': {report.first.detail}.",
            hint="" if known else "no known mistake explains it; --layers names the layer of an ONNX file",
        )
