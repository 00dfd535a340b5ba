"""``fcos-deploy benchmark`` and ``soak``: how fast a model is, and whether it runs for long without faults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, note_placements, print_json, progress_bar, table
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.serialize import to_json

__all__ = ["benchmark_command", "soak_command"]


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads", "allow_engine_code")
@cli.with_server_options
def benchmark_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Checkpoints, ONNX files, OpenVINO IRs, engines and bundles to time."),
    ],
    *,
    also: cli.Also = None,
    image: Annotated[Path | None, cli.option("Image to detect on. Default: one of the demo's.", metavar="FILE")] = None,
    rounds: cli.Rounds = 20,
    warmup: Annotated[int, cli.option("Detections of every model before the first is timed.", min=0)] = 5,
    seconds: Annotated[
        float, cli.option("Duration of the throughput measurement in seconds.", min=0.1, metavar="S")
    ] = 3.0,
    cold_start: Annotated[
        bool, cli.option("Start-up time and peak memory, measured in a new process.", "--cold-start/--no-cold-start")
    ] = True,
    baseline: Annotated[
        Path | None,
        cli.GATE.option(
            "JSON of an earlier run to compare with; exit code 4 when this one is slower. Default: none.",
            metavar="FILE",
        ),
    ] = None,
    tolerance: Annotated[
        float, cli.GATE.option("Allowed slowdown against --baseline, 0.1 for 10 %.", min=0.0, metavar="SHARE")
    ] = 0.1,
    backend: cli.Backends = None,
    precision: cli.BundlePrecisions = None,
    session: SessionOptions,
    output: Annotated[Path | None, cli.OUTPUT.option("JSON file to write.", "-o", "--output", metavar="FILE")] = None,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Benchmark models: latency by stage, throughput, cold start and memory.

    Several models and backends are timed in turns, so that other load on the machine affects all of them alike.
    Checkpoint options apply to the models that are checkpoints.
    """
    from fcos_deploy.benchmark import run
    from fcos_deploy.benchmark.measure import TimingOptions

    every = [*models, *(also or [])]
    if len(set(every)) < len(every):
        raise ConfigError("A model is given twice.", hint="give each once; --backend is repeatable")
    sessions = cli.session_options(session, every, checkpoint=options)
    candidates = cli.detector_specs(sessions, backend, precision)
    timing = TimingOptions(rounds=rounds, warmup=warmup, throughput_seconds=seconds)
    earlier = run.read_baseline(baseline) if baseline else None
    with progress_bar() as progress:
        request = run.BenchmarkRequest(candidates=candidates, image=image, timing=timing, cold_start=cold_start)
        result = run.run_benchmark(request, progress=progress)
    rows = [run.result_row(measured) for measured in result.results]
    if len(sessions) > 1:
        rows = [(str(candidate.model), *row) for candidate, row in zip(candidates, rows, strict=True)]
    table("Speed", (*(["model"] if len(sessions) > 1 else []), *run.TABLE_COLUMNS), rows)
    for row, measured in zip(rows[1:], result.results[1:], strict=True):
        speedup = result.speedup(measured, reference=result.results[0])
        names = [" ".join(cells[: len(cells) - len(run.TABLE_COLUMNS) + 2]) for cells in (row, rows[0])]
        doubt = f" (?) doubtful: {speedup.problem}" if speedup.problem else ""
        note(f"{names[0]}: {speedup.ratio:.2f} times as fast as {names[1]}{doubt}")
    note_placements(measured.session for measured in result.results)
    if result.contention.problem:
        note(f"disturbed: {result.contention.problem}; measure again on a quiet machine")
    if as_json:
        print_json(run.benchmark_json(result))
    if output is not None:
        run.save_benchmark(output, result)
    if earlier is not None:
        comparisons = run.compare_with_baseline(result, earlier)
        for item in comparisons:
            note(str(item))
        run.require_no_slowdown(comparisons, tolerance=tolerance)


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "hint", "threads")
@cli.with_server_options
def soak_command(
    model: cli.Model,
    *,
    images: Annotated[
        Path | None, cli.option("Folder of the images. Default: generated images.", metavar="DIR")
    ] = None,
    inferences: Annotated[int, cli.option("Number of inferences in all.", min=1)] = 20_000,
    concurrency: Annotated[int, cli.option("Number of threads that call the detector at a time.", min=1)] = 8,
    max_memory_growth: Annotated[
        float, cli.GATE.option("Allowed growth of memory after the warm-up, 0.02 for 2 %.", min=0.0, metavar="SHARE")
    ] = 0.02,
    backend: cli.Backend = "",
    precision: cli.BundlePrecision = None,
    session: SessionOptions,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Soak-test a model from many threads: every result must equal the single-threaded one, and nothing may leak.

    Exit code 1: a result differs, or memory or the number of open files grew.
    """
    from fcos_deploy.benchmark.soak import require_sound, soak, soak_images
    from fcos_deploy.detector import Detector

    session = replace(session, checkpoint=options)
    opened = Detector.open(model, backend=backend, precision=precision, options=session)
    with opened as detector, progress_bar() as progress:
        frames = soak_images(images, orientation=detector.contract.preprocess.orientation)
        result = soak(detector, frames, inferences=inferences, threads=concurrency, progress=progress)
    if as_json:
        growth = {"memory_growth": result.memory_growth}
        print_json({**detector.session.description, **to_json(result), **growth})
    note(str(result))
    require_sound(result, max_memory_growth=max_memory_growth)
