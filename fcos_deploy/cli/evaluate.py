"""``fcos-deploy evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import (
    PublicKeys,
    RequireSignature,
    for_checkpoints,
    reference_keys,
    trusted_keys,
    with_checkpoint_options,
)
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision

__all__ = ["command"]


@with_checkpoint_options
def command(
    model: Annotated[Path, typer.Argument(help="Checkpoint, ONNX file, engine or bundle.")],
    *,
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations; without, --reference is the ground truth.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Runtime; may be repeated.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Of a bundle; may be repeated.")] = None,
    reference: Annotated[Path | None, typer.Option(help="Model to compare with, usually the checkpoint.")] = None,
    max_map_drop: Annotated[float | None, typer.Option(help="Exit 4 when AP falls by more (0.01 is a point).")] = None,
    min_ap: Annotated[float | None, typer.Option(help="Exit 4 when AP is lower.")] = None,
    min_match_rate: Annotated[float | None, typer.Option(help="Exit 4 when fewer detections agree (0..1).")] = None,
    certain: Annotated[bool, typer.Option(help="Judge the upper end of the drop's interval.")] = False,
    device: Annotated[str, typer.Option(help="In the runtime's own words, such as GPU.0 or cuda:0.")] = "",
    compute: Annotated[ComputeType, typer.Option(help="What the runtime computes in.")] = ComputeType.F32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap; 0 for no intervals.")] = 1000,
    predictions: Annotated[Path | None, typer.Option(help="Folder to keep detections in; a rerun goes on.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the verdicts as JUnit XML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list of several.")] = False,
    options: CheckpointOptions,
) -> None:
    """COCO AP of a model on one or more backends, with its uncertainty and a gate.

    The options of 'export' say how MODEL and --reference are read where they are checkpoints.
    """
    from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
    from fcos_deploy.accuracy.gate import require_all, write_junit
    from fcos_deploy.accuracy.summary import TABLE_COLUMNS, evaluation_json, evaluation_row
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.core.gate import Gate
    from fcos_deploy.detector import DetectorSpec

    keys = trusted_keys(public_key, required=require_signature)
    checkpoint = for_checkpoints(options, [model, *([reference] if reference else [])])
    session = SessionOptions(
        device=device, compute=compute, threads=threads, public_keys=keys, checkpoint=checkpoint[model]
    )
    candidates = tuple(
        DetectorSpec(model=model, backend=b, precision=p, options=session)
        for b in backend or [""]
        for p in [*(precision or []), *([] if precision else [None])]
    )
    against = None
    if reference is not None:
        signers = reference_keys(reference, keys)
        reference_session = SessionOptions(threads=threads, public_keys=signers, checkpoint=checkpoint[reference])
        against = DetectorSpec(model=reference, options=reference_session)
    request = EvaluationRequest(
        candidates=candidates,
        images=images,
        annotations=annotations,
        reference=against,
        gate=Gate(max_map_drop=max_map_drop, min_ap=min_ap, min_match_rate=min_match_rate, certain=certain),
        resamples=resamples,
        limit=limit,
        predictions=predictions,
    )
    with progress_bar() as progress:
        result = evaluate(request, progress=progress)
    shown = ([result.reference] if result.reference else []) + list(result.candidates)
    table("Accuracy", TABLE_COLUMNS, [evaluation_row(e) for e in shown])
    if as_json:
        documents = [evaluation_json(e) for e in result.candidates]
        print_json(documents[0] if len(documents) == 1 else documents)
    if junit is not None:
        write_junit(junit, result.verdicts, suite="fcos-deploy evaluate")
    for verdict in result.verdicts:
        note(f"{'pass' if verdict.passed else 'FAIL'}  {verdict.subject}: {verdict.message}")
    require_all(result.verdicts)
