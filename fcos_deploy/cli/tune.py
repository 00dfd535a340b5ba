"""``fcos-deploy tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import conclude, note, print_json, progress_bar, table
from fcos_deploy.cli.settings import command_line
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import ComputeType, Precision, Tail
from fcos_deploy.core.errors import MissingDependencyError
from fcos_deploy.core.gate import Judge
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import Trust

if TYPE_CHECKING:
    from fcos_deploy.pipeline.tune import Tuning

__all__ = ["tune_command"]


@cli.with_all_checkpoint_options
@cli.with_signature_options
def tune_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint, ONNX file with a contract, bundle, or package.module:function (with --run-code).",
        ),
    ],
    *,
    output: Annotated[Path, cli.output("Folder of the answer, its bundle and the trials.", metavar="DIR")],
    images: cli.Images,
    annotations: Annotated[
        Path | None,
        cli.option(
            "COCO annotations of the images. Default: the model's detections at its own size are the ground truth.",
            metavar="FILE",
        ),
    ] = None,
    calibration_images: Annotated[
        Path | None,
        cli.option(
            "Images to calibrate INT8 on: a folder, list file or COCO JSON. Default: none, and INT8 is not tried.",
            metavar="PATH",
        ),
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        cli.option("Longest time of one image; the highest AP within it is chosen. Default: no limit.", metavar="MS"),
    ] = None,
    min_ap: Annotated[
        float | None,
        cli.option(
            "Lowest AP; alone, the fastest configuration that reaches it is chosen. Default: no limit.", metavar="AP"
        ),
    ] = None,
    max_memory_mib: Annotated[
        float | None, cli.option("Largest memory of a process that runs the model. Default: no limit.", metavar="MIB")
    ] = None,
    max_watts: Annotated[
        float | None,
        cli.option(
            "Largest power at full load, from RAPL or a Jetson's INA3221; inconclusive where the system does not tell "
            "it. Default: no limit.",
            metavar="W",
        ),
    ] = None,
    throughput: Annotated[bool, cli.option("Search by throughput, in images per second, in place of latency.")] = False,
    min_throughput: Annotated[
        float | None,
        cli.option(
            "Lowest throughput in images per second; the highest AP that reaches it is chosen. Default: no limit.",
            metavar="N",
        ),
    ] = None,
    percentile: Annotated[int, cli.option("Percentile of the latency that keeps the limit: 50 or 90.")] = 50,
    size: Annotated[
        list[str] | None,
        cli.option(
            "Input size to try, such as 320x416, or shortest:longest such as 800:1333; repeatable. Default: six "
            "sizes from half to five quarters of the model's own.",
            metavar="HxW|S:L",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        cli.RUNTIME.option(
            "Backend to try, repeatable. Default: every backend that runs on this machine.",
            metavar="NAME",
            autocompletion=cli.complete_backend,
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        cli.RUNTIME.option("Precision to try, repeatable. Default: fp32, and int8 with --calibration-images."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        cli.RUNTIME.option("Number of threads to try, repeatable. Default: all cores, and half of them.", min=1),
    ] = None,
    streams: Annotated[
        list[int] | None,
        cli.RUNTIME.option(
            "Number of concurrent requests to try with --throughput, repeatable. Default: 1, half the cores, all.",
            min=1,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        cli.RUNTIME.option("Batch size to try with --throughput, repeatable. Default: 1 and 4.", min=1),
    ] = None,
    compute: Annotated[
        list[ComputeType] | None,
        cli.RUNTIME.option(
            "Type of float layers to try, repeatable. Default: f32, and bf16 where runtime and processor have it."
        ),
    ] = None,
    max_map_drop: Annotated[
        float | None,
        cli.GATE.option(
            "Largest loss of AP of the chosen INT8 against the model at that size; needs annotations. Default: 0.01.",
            metavar="AP",
        ),
    ] = None,
    max_precision_drop: cli.MaxPrecisionDrop = None,
    max_recall_drop: cli.MaxRecallDrop = None,
    min_match_rate: cli.MinInt8MatchRate = None,
    at_precision: cli.AtPrecision = None,
    at_recall: cli.AtRecall = None,
    judge: cli.JudgeBy = Judge.INTERVAL,
    allow_inconclusive: cli.AllowInconclusive = False,
    allow_overlap: cli.AllowOverlap = False,
    calibration_count: cli.CalibrationCount = None,
    own_ranges: Annotated[
        bool, cli.option("Calibration of INT8 at every size. Default: one at the model's own size serves all of them.")
    ] = False,
    seed: cli.Seed = 0,
    tail: Annotated[
        Tail | None, cli.RUNTIME.option("Where the graphs end. Default: raw; of a graph or bundle, its own tail.")
    ] = None,
    opset: cli.Opset = None,
    run_code: cli.RunCode = False,
    trust: Trust,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Find the input size, backend, precision and threads that meet a budget, and make a bundle of them.

    Every trial is kept in DIR: an interrupted search resumes, and a wider one measures only what is new. Exit
    code 4: no configuration meets the limits, and the nearest is named; or the images cannot decide a limit.
    """
    from fcos_deploy.accuracy.operating_point import OperatingGoal
    from fcos_deploy.pipeline.source import run_user_code
    from fcos_deploy.pipeline.tune import tune
    from fcos_deploy.pipeline.tune_models import InputSize
    from fcos_deploy.pipeline.tune_search import TuneRequest

    request = TuneRequest(
        model=run_user_code(model, allowed=run_code) or Path(model),
        output=output,
        images=images,
        annotations=annotations,
        calibration_images=calibration_images,
        max_latency_ms=max_latency_ms,
        min_throughput=min_throughput,
        min_ap=min_ap,
        max_memory_mib=max_memory_mib,
        max_watts=max_watts,
        throughput=throughput,
        percentile=percentile,
        sizes=tuple(dict.fromkeys(map(InputSize.parse, size or ()))),
        backends=tuple(dict.fromkeys(backend or ())),
        precisions=tuple(dict.fromkeys(precision or ())),
        threads=tuple(threads or ()),
        streams=tuple(streams or ()),
        batches=tuple(batch or ()),
        computes=tuple(dict.fromkeys(compute or ())),
        options=options,
        max_map_drop=max_map_drop,
        max_precision_drop=max_precision_drop,
        max_recall_drop=max_recall_drop,
        min_match_rate=min_match_rate,
        operating_goal=OperatingGoal.asked(precision=at_precision, recall=at_recall),
        tail=tail,
        opset=opset,
        judge=judge,
        allow_overlap=allow_overlap,
        calibration_count=calibration_count,
        own_ranges=own_ranges,
        seed=seed,
        trust=trust,
        command=command_line(),
    )
    with progress_bar() as progress:
        tuning = tune(request, progress=progress)
    _show(tuning, output, as_json=as_json, allow_inconclusive=allow_inconclusive)


def _show(tuning: Tuning, output: Path, *, as_json: bool, allow_inconclusive: bool) -> None:
    """The table and the answer on stderr, the page beside the bundle, JSON on stdout.

    Raises:
        BudgetError: nothing keeps the limits.
        InconclusiveError: the images cannot decide a limit, and that was not allowed.
    """
    from fcos_deploy.report.tuning import tuning_rows, write_tuning_report

    table(tuning.data.title, *tuning_rows(tuning.data))
    for line in (tuning.data.goal, *tuning.data.notes, tuning.data.answer):
        note(line)
    try:
        note(f"wrote {write_tuning_report(tuning.data, output / 'tune.html')[0]}")
    except MissingDependencyError as error:
        note(f"no page with the plot: {error.message} {error.hint}")
    if tuning.deployment is not None:
        note(f"bundle: {tuning.deployment.bundle} ({tuning.seconds:.0f} s in all)")
    elif tuning.earlier_bundle is not None:
        note(f"'{tuning.earlier_bundle}' is the answer of an earlier search")
    if as_json:
        print_json(
            {
                **to_json(tuning.data),
                "bundle": tuning.deployment and str(tuning.deployment.bundle),
                "verdicts": to_json(tuning.verdicts),
                "seconds": tuning.seconds,
            }
        )
    if tuning.failure is not None:
        raise tuning.failure
    conclude(tuning.verdicts, allow_inconclusive=allow_inconclusive)
