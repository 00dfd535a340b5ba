"""``fcos-deploy parity``."""

from __future__ import annotations

from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.errors import AccuracyGateError

__all__ = ["command"]


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads")
@cli.with_server_options
def command(
    model: cli.Model,
    *,
    reference: cli.Reference,
    images: cli.Images,
    limit: Annotated[int, cli.option("Number of images to use.", min=1)] = 4,
    strict: Annotated[bool, cli.option("Tolerances of float32, whatever the model's precision.", "--strict")] = False,
    layers: Annotated[bool, cli.option("Search for the first layer that diverges (ONNX files).", "--layers")] = False,
    backend: cli.Backend = "",
    precision: cli.BundlePrecision = None,
    session: SessionOptions,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Check a model against its checkpoint in PyTorch stage by stage, and explain the first stage that diverges.

    Checkpoint options apply to --reference. Exit code 4: a stage diverges.
    """
    from fcos_deploy.accuracy.parity import parity_json
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.parity import ParityRequest, check_parity, find_layer

    request = ParityRequest(
        candidate=DetectorSpec(model=model, backend=backend, precision=precision, options=session),
        checkpoint=reference,
        images=images,
        count=limit,
        strict=strict,
        options=options,
    )
    with progress_bar() as progress:
        parity = check_parity(request, progress=progress)
        layer = find_layer(request, progress=progress) if layers else None
    rows = [(stage.stage, "ok" if stage.passed else "DIVERGES", stage.detail) for stage in parity.stages]
    table("Parity with the reference", ("stage", "", "largest difference"), rows)
    for cause in parity.causes:
        note(f"cause: {cause.sentence} (explains {cause.explained:.1%})")
    if layer is not None:
        note(f"first layer: {layer.layer} ({layer.kind}), after {layer.compared} that hold")
        for cause in layer.causes:
            note(f"cause: {cause.sentence}")
    if as_json:
        print_json(parity_json(parity, layer))
    if parity.first is not None:
        explained = parity.causes or layer is not None
        raise AccuracyGateError(
            f"The first stage that diverges is '{parity.first.stage}': {parity.first.detail}.",
            hint="" if explained else "no known mistake explains it; --layers names the layer of an ONNX file",
        )
