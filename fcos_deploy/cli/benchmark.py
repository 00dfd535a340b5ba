"""``fcos-deploy benchmark``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, for_checkpoints, trusted_keys, with_checkpoint_options
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision

__all__ = ["command"]


@with_checkpoint_options
def command(
    model: Annotated[Path, typer.Argument(help="Checkpoint, ONNX file, engine or bundle.")],
    *,
    backend: Annotated[list[str] | None, typer.Option(help="Runtime; may be repeated.")] = None,
    precision: Annotated[list[Precision] | None, typer.Option(help="Of a bundle; may be repeated.")] = None,
    also: Annotated[list[Path] | None, typer.Option(help="Another model to time in turns with this one.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to detect on; without, one that comes along.")] = None,
    device: Annotated[str, typer.Option(help="In the runtime's own words, such as GPU.0 or cuda:0.")] = "",
    compute: Annotated[ComputeType, typer.Option(help="What the runtime computes in.")] = ComputeType.F32,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns; each times 5 detections of every backend.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Detections before the first is timed.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long throughput is measured.")] = 3.0,
    cold_start: Annotated[bool, typer.Option(help="Also time a new process, and read its peak memory.")] = True,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    output: Annotated[Path | None, typer.Option(help="Save the JSON, as a baseline for later.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Compare with an earlier run; exit 4 when slower.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Slow-down that is let pass (0.1 is 10 %).")] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, an object for each backend.")] = False,
    options: CheckpointOptions,
) -> None:
    """Latency by stage, throughput, cold start and memory; several backends are timed in turns.

    The options of 'export' say how MODEL and --also are read where they are checkpoints.
    """
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.benchmark.run import (
        TABLE_COLUMNS,
        BenchmarkRequest,
        benchmark_json,
        compare_with_baseline,
        read_baseline,
        require_no_slowdown,
        result_row,
        run_benchmark,
        save_benchmark,
    )
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.detector import DetectorSpec

    keys = trusted_keys(public_key, required=require_signature)
    models = [model, *(also or [])]
    checkpoint = for_checkpoints(options, models)
    session = SessionOptions(device=device, compute=compute, threads=threads, public_keys=keys)
    candidates = tuple(
        DetectorSpec(model=m, backend=b, precision=p, options=replace(session, checkpoint=checkpoint[m]))
        for m in models
        for b in backend or [""]
        for p in [*(precision or []), *([] if precision else [None])]
    )
    timing = TimingOptions(rounds=rounds, warmup=warmup, throughput_seconds=seconds)
    earlier = read_baseline(baseline) if baseline else None
    with progress_bar() as progress:
        request = BenchmarkRequest(candidates=candidates, image=image, timing=timing, cold_start=cold_start)
        result = run_benchmark(request, progress=progress)
    table("Speed", TABLE_COLUMNS, [result_row(r) for r in result.results])
    if as_json:
        print_json(benchmark_json(result))
    if output is not None:
        save_benchmark(output, result)
    if earlier is not None:
        comparisons = compare_with_baseline(result, earlier)
        for c in comparisons:
            note(f"{c.backend} {c.precision}: p50 {c.p50_before:.2f} -> {c.p50_now:.2f} ms")
        require_no_slowdown(comparisons, tolerance=tolerance)
