"""``fcos-deploy compare``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, for_checkpoints, trusted_keys, with_checkpoint_options
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError

if TYPE_CHECKING:
    from fcos_deploy.core.gate import Gate
    from fcos_deploy.detector import DetectorSpec

__all__ = ["command"]


@with_checkpoint_options
def command(
    first: Annotated[Path, typer.Argument(help="The one to compare with: bundle, engine, ONNX file or checkpoint.")],
    second: Annotated[Path, typer.Argument(help="The one that is compared.")],
    *,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; without, two bundles are compared by what they record.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations; without, the first is the ground truth.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Runtime of both.")] = "",
    second_backend: Annotated[str, typer.Option(help="Runtime of the second, if another.")] = "",
    precision: Annotated[Precision | None, typer.Option(help="Of both, where they are bundles.")] = None,
    second_precision: Annotated[Precision | None, typer.Option(help="Of the second, if another.")] = None,
    max_map_drop: Annotated[float | None, typer.Option(help="Exit 4 when the second loses more AP.")] = None,
    min_match_rate: Annotated[float | None, typer.Option(help="Exit 4 when fewer detections agree (0..1).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtimes.")] = None,
    speed: Annotated[bool, typer.Option(help="Also time them in turns.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of the benchmark.")] = 10,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    report: Annotated[Path | None, typer.Option(help="Write the comparison as an HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    options: CheckpointOptions,
) -> None:
    """Put two models or bundles side by side: AP with its interval, single detections, speed.

    Without --images both must be bundles: their recorded figures are shown, and both run on their golden images.
    The options of 'export' say how the models are read where they are checkpoints.
    """
    from fcos_deploy.accuracy.gate import require_all
    from fcos_deploy.accuracy.summary import TABLE_COLUMNS, evaluation_json, evaluation_row
    from fcos_deploy.benchmark import run as speeds
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.core.gate import Gate
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.comparison import ComparisonRequest, compare_models, comparison_report
    from fcos_deploy.report import write_report

    keys = trusted_keys(public_key, required=require_signature)
    checkpoint = for_checkpoints(options, [first, second])
    session = SessionOptions(threads=threads, public_keys=keys)
    other, other_precision = second_backend or backend, second_precision or precision
    reference = DetectorSpec(
        model=first, backend=backend, precision=precision, options=replace(session, checkpoint=checkpoint[first])
    )
    candidate = DetectorSpec(
        model=second, backend=other, precision=other_precision, options=replace(session, checkpoint=checkpoint[second])
    )
    gate = Gate(max_map_drop=max_map_drop, min_match_rate=min_match_rate)
    if images is None:
        if annotations is not None or report is not None:
            raise ConfigError("--annotations and --report need images.", hint="give --images DIR")
        _show_bundles(reference, candidate, gate=gate, as_json=as_json)
        return
    request = ComparisonRequest(
        reference=reference,
        candidates=(candidate,),
        images=images,
        annotations=annotations,
        gate=gate,
        timing=TimingOptions(rounds=rounds) if speed else None,
        limit=limit,
    )
    with progress_bar() as progress:
        found = compare_models(request, progress=progress)
    table("Accuracy", TABLE_COLUMNS, [evaluation_row(e) for e in found.all])
    if found.benchmark is not None:
        table("Speed", speeds.TABLE_COLUMNS, [speeds.result_row(r) for r in found.benchmark.results])
    if as_json:
        timed = speeds.benchmark_json(found.benchmark) if found.benchmark else None
        print_json({"accuracy": [evaluation_json(e) for e in found.all], "speed": timed})
    if report is not None:
        made = shlex.join(["fcos-deploy", *sys.argv[1:]])
        write_report(comparison_report(found, title=f"{second.name} against {first.name}", command=made), report)
        note(f"wrote {report}")
    require_all(found.evaluations.verdicts)


def _show_bundles(first: DetectorSpec, second: DetectorSpec, *, gate: Gate, as_json: bool) -> None:
    from fcos_deploy.accuracy.bundle_comparison import (
        FIGURE_COLUMNS,
        BundleComparisonRequest,
        bundles_json,
        compare_bundles,
        fact_rows,
        figure_rows,
    )
    from fcos_deploy.accuracy.gate import require_all

    request = BundleComparisonRequest(first=first, second=second, gate=gate)
    with progress_bar() as progress:
        found = compare_bundles(request, progress=progress)
    table("Bundles", ("", "first", "second"), fact_rows(found))
    table("Recorded figures", FIGURE_COLUMNS, figure_rows(found))
    for sentence in found.contract:
        note(f"contract: {sentence}")
    agreement = found.agreement
    note(
        f"golden images ({agreement.images}), {found.subjects[0]} against {found.subjects[1]}, run here: "
        f"{agreement.match_rate:.1%} of the detections agree, {agreement.missed} missed, {agreement.extra} extra"
    )
    if as_json:
        print_json(bundles_json(found))
    require_all(found.verdicts)
