"""``fcos-deploy report``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
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
from fcos_deploy.cli.output import note, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision

__all__ = ["command"]


@with_checkpoint_options
def command(
    model: Annotated[Path, typer.Argument(help="ONNX file, engine or bundle.")],
    *,
    reference: Annotated[Path, typer.Option(help="What it must equal, usually the checkpoint.")],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations; without, the reference is the ground truth.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file; the same in Markdown beside it.")] = Path(
        "report.html"
    ),
    also: Annotated[list[Path] | None, typer.Option(help="Another model for the same report.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Runtime; may be repeated.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Of a bundle; may be repeated.")] = None,
    max_map_drop: Annotated[float | None, typer.Option(help="What the verdict allows (0.01 is a point).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtimes.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of the benchmark.")] = 20,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    title: Annotated[str, typer.Option(help="Of the report.")] = "",
    options: CheckpointOptions,
) -> None:
    """Measure a model against its reference, and write the report that a person signs.

    The options of 'export' say how the models are read where they are checkpoints.
    """
    from fcos_deploy.accuracy.summary import TABLE_COLUMNS, evaluation_row
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.core.gate import Gate
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.comparison import ComparisonRequest, compare_models, comparison_report
    from fcos_deploy.report import write_report

    keys = trusted_keys(public_key, required=require_signature)
    models = [model, *(also or [])]
    checkpoint = for_checkpoints(options, [*models, reference])
    session = SessionOptions(threads=threads, public_keys=keys)
    precisions: list[Precision | None] = [*(precision or [])] or [None]
    candidates = tuple(
        DetectorSpec(model=m, backend=b, precision=p, options=replace(session, checkpoint=checkpoint[m]))
        for m in models
        for b in backend or [""]
        for p in precisions
    )
    request = ComparisonRequest(
        reference=DetectorSpec(
            model=reference,
            options=SessionOptions(
                threads=threads,
                public_keys=reference_keys(reference, keys),
                checkpoint=checkpoint[reference],
            ),
        ),
        candidates=candidates,
        images=images,
        annotations=annotations,
        gate=Gate(max_map_drop=max_map_drop),
        timing=TimingOptions(rounds=rounds),
        limit=limit,
    )
    with progress_bar() as progress:
        found = compare_models(request, progress=progress)
    table("Accuracy", TABLE_COLUMNS, [evaluation_row(e) for e in found.all])
    made = shlex.join(["fcos-deploy", *sys.argv[1:]])
    data = comparison_report(found, title=title or f"{model.name} against {reference.name}", command=made)
    for path in write_report(data, output):
        note(f"wrote {path}")
