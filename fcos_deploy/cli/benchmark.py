"""``fcos-deploy benchmark``."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import (
    GATE,
    OUTPUT,
    Also,
    Backends,
    BundlePrecisions,
    Compute,
    Device,
    Json,
    Model,
    PublicKeys,
    RequireSignature,
    Rounds,
    Threads,
    session_options,
    trusted_keys,
    with_common_checkpoint_options,
)
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision

__all__ = ["command"]


@with_common_checkpoint_options
def command(
    model: Model,
    *,
    also: Also = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Image to detect on. Default: one of the demo's.")
    ] = None,
    rounds: Rounds = 20,
    warmup: Annotated[
        int, typer.Option(min=0, metavar="N", help="Detections of every model before the first is timed.")
    ] = 5,
    seconds: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Duration of the throughput measurement in seconds.")
    ] = 3.0,
    cold_start: Annotated[
        bool,
        typer.Option("--cold-start/--no-cold-start", help="Start-up time and peak memory, measured in a new process."),
    ] = True,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON of an earlier run to compare with; exit code 4 when this one is slower. Default: none.",
            rich_help_panel=GATE,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SHARE",
            help="Slowdown against --baseline that passes, 0.1 for 10 %.",
            rich_help_panel=GATE,
        ),
    ] = 0.1,
    backend: Backends = None,
    precision: BundlePrecisions = None,
    device: Device = "",
    compute: Compute = ComputeType.F32,
    threads: Threads = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="JSON file to write.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Json = False,
    options: CheckpointOptions,
) -> None:
    """Benchmark a model: latency by stage, throughput, cold start and memory.

    Several models and backends are timed in turns. Checkpoint options apply to the models that are checkpoints.
    """
    from fcos_deploy.benchmark import run
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import DetectorSpec

    keys = trusted_keys(public_key, required=require_signature)
    base = SessionOptions(device=device, compute=compute, threads=threads, public_keys=keys)
    sessions = session_options(base, [model, *(also or [])], checkpoint=options)
    precisions: list[Precision] | list[None] = precision or [None]
    candidates = tuple(
        DetectorSpec(model=path, backend=name, precision=value, options=session)
        for (path, session), name, value in product(sessions.items(), backend or [""], precisions)
    )
    timing = TimingOptions(rounds=rounds, warmup=warmup, throughput_seconds=seconds)
    earlier = run.read_baseline(baseline) if baseline else None
    with progress_bar() as progress:
        request = run.BenchmarkRequest(candidates=candidates, image=image, timing=timing, cold_start=cold_start)
        result = run.run_benchmark(request, progress=progress)
    table("Speed", run.TABLE_COLUMNS, [run.result_row(measured) for measured in result.results])
    if as_json:
        print_json(run.benchmark_json(result))
    if output is not None:
        run.save_benchmark(output, result)
    if earlier is not None:
        comparisons = run.compare_with_baseline(result, earlier)
        for item in comparisons:
            note(f"{item.backend} {item.precision}: p50 {item.p50_before:.2f} -> {item.p50_now:.2f} ms")
        run.require_no_slowdown(comparisons, tolerance=tolerance)
