"""``fcos-deploy deploy`` and ``demo``, and how a finished deployment is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.cli.settings import command_line
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.gate import Judge, overall_outcome
from fcos_deploy.core.serialize import to_json

if TYPE_CHECKING:
    from fcos_deploy.pipeline.deploy import Deployment

__all__ = ["demo_command", "deploy_command", "show_deployment"]

FAST_IMAGES = 32
_SIZES = ("ap_small", "ap_medium", "ap_large")


@cli.with_all_checkpoint_options
def deploy_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint, ONNX file with a contract, or package.module:function (with --run-code).",
        ),
    ],
    *,
    output: Annotated[Path, cli.output("Folder of the bundle.", metavar="DIR")],
    calibration_images: Annotated[
        Path, cli.option("Images to calibrate INT8 on: a folder, list file or COCO JSON.", metavar="PATH")
    ],
    images: Annotated[
        Path | None, cli.option("Images to measure the accuracy on. Default: the calibration images.", metavar="DIR")
    ] = None,
    annotations: cli.Annotations = None,
    allow_overlap: cli.AllowOverlap = False,
    target: Annotated[
        list[str] | None,
        cli.option(
            "Device profile to build for, such as jetson-orin-nano; repeatable. Default: none.",
            metavar="NAME",
            autocompletion=cli.complete_target,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        cli.option(
            "Backend to build for, repeatable. Default: every backend that runs on this machine.",
            metavar="NAME",
            panel=cli.RUNTIME,
            autocompletion=cli.complete_backend,
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        cli.option(
            "Precision to build, repeatable. Default: fp32 and int8; of a --target, its profile's.", panel=cli.RUNTIME
        ),
    ] = None,
    tail: Annotated[
        Tail | None,
        cli.option("Where the graphs end. Default: raw; of a --target, its profile's.", panel=cli.RUNTIME),
    ] = None,
    max_map_drop: Annotated[
        float | None,
        cli.option(
            "Largest loss of AP of INT8; needs annotations. Default: 0.01, one point.", metavar="AP", panel=cli.GATE
        ),
    ] = None,
    max_precision_drop: cli.MaxPrecisionDrop = None,
    max_recall_drop: cli.MaxRecallDrop = None,
    min_match_rate: Annotated[
        float | None,
        cli.option(
            "Smallest share of INT8's detections that agree with the float model's. Default: 0.97 without annotations.",
            metavar="SHARE",
            panel=cli.GATE,
        ),
    ] = None,
    judge: cli.JudgeBy = Judge.INTERVAL,
    allow_inconclusive: cli.AllowInconclusive = False,
    calibration_count: cli.CalibrationCount = None,
    seed: cli.Seed = 0,
    opset: cli.Opset = None,
    cache: Annotated[
        Path | None,
        cli.option(
            "Folder that keeps finished steps, so that a later deployment with one changed option makes only what "
            "depends on it. Default: none.",
            metavar="DIR",
        ),
    ] = None,
    at_precision: cli.AtPrecision = None,
    at_recall: cli.AtRecall = None,
    fast: Annotated[
        bool,
        cli.option(
            f"Accuracy from {FAST_IMAGES} of the images, spread over classes and object sizes, with the wider interval "
            "that they give.",
            "--fast",
        ),
    ] = False,
    run_code: cli.RunCode = False,
    dry_run: Annotated[
        bool,
        cli.option(
            "Plan of what would be built, without building it; checkpoint and images are read as for the build.",
            "--dry-run",
        ),
    ] = False,
    config: Annotated[  # noqa: ARG001  (the application has read it)
        Path | None,
        cli.option(
            "Project file of these options; variables and the command line override it. Default: fcos-deploy.toml in "
            "the current folder, if any.",
            metavar="FILE",
        ),
    ] = None,
    no_config: Annotated[  # noqa: ARG001  (the same)
        bool, cli.option("The fcos-deploy.toml in the current folder is not read.", "--no-config")
    ] = False,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Deploy a checkpoint: export, quantize, build, measure and pack it into a verified bundle.

    An interrupted run resumes where it stopped. Exit code 4: a limit does not hold, or the images
    cannot decide it; in the latter case the bundle is kept, and says so.
    """
    from fcos_deploy.accuracy.operating_point import OperatingGoal
    from fcos_deploy.pipeline.deploy import check_inputs, deploy
    from fcos_deploy.pipeline.source import run_user_code, source_operators
    from fcos_deploy.pipeline.steps import DeployRequest, plan_targets

    source = run_user_code(checkpoint, allowed=run_code) or Path(checkpoint)
    plans = plan_targets(
        tuple(target or ()),
        backends=tuple(dict.fromkeys(backend or ())),
        precisions=tuple(dict.fromkeys(precision or ())),
        tail=tail,
        input_size=options.input_size,
        operators=source_operators(source, options=options) if target else frozenset(),
    )
    request = DeployRequest(
        checkpoint=source,
        output=output,
        calibration_images=calibration_images,
        backends=() if target else tuple(backend or ()),
        plans=plans,
        precisions=tuple(precision or (Precision.FP32, Precision.INT8)),
        tail=tail or Tail.RAW,
        options=options,
        images=images,
        annotations=annotations,
        max_map_drop=max_map_drop,
        max_precision_drop=max_precision_drop,
        max_recall_drop=max_recall_drop,
        min_match_rate=min_match_rate,
        judge=judge,
        allow_overlap=allow_overlap,
        calibration_count=calibration_count,
        seed=seed,
        opset=opset,
        cache=cache,
        sample=FAST_IMAGES if fast else None,
        operating_goal=OperatingGoal.asked(precision=at_precision, recall=at_recall),
        command=command_line(),
    )
    if dry_run:
        check_inputs(request)
        for plan in plans:
            rows = [(a.path, str(a.precision), a.where, a.how) for a in plan.artifacts]
            table(plan.profile.title, ("file", "precision", "built", "how"), rows)
            for line in (*plan.commands, *([plan.trtexec] if plan.trtexec else []), *plan.notes):
                note(f"  {line}")
        if as_json:
            print_json(to_json(plans))
        return
    with progress_bar() as progress:
        deployment = deploy(request, progress=progress)
    show_deployment(deployment, as_json=as_json, allow_inconclusive=allow_inconclusive)


_COLUMNS = (
    *("backend", "precision", "float in", "AP", "AP50", "small/medium/large", "drop", "agree", "verdict"),
    *("p50 ms", "p90 ms", "speed-up", "images/s", "MiB"),
)


def show_deployment(deployment: Deployment, *, as_json: bool, allow_inconclusive: bool = False) -> None:
    """A table for people on stderr; with ``as_json`` one document on stdout.

    Raises:
        InconclusiveError: the bundle was made, but its images cannot decide a limit, and that was not allowed.
    """
    from fcos_deploy.accuracy.gate import require_all, verdict_line

    verdicts = deployment.evaluations.verdicts
    rows = [_row(deployment, index) for index in range(len(deployment.rows))]
    annotated = deployment.evaluations.dataset.annotated
    columns = tuple(column for column in _COLUMNS if column != "agree" or not annotated)
    hidden = {"precision_drop", "recall_drop", *(["match_rate"] if annotated else [])}
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    table(str(deployment.bundle), columns, [_cells(row) for row in shown])
    images, seconds = deployment.rows[0].scores.images, deployment.seconds
    count = deployment.benchmark.results[0].latency.count
    note(
        f"AP over {images} images; times are medians of {count}, taken in turns on this machine; speed-ups are ratios "
        f"of the fastest rounds. {seconds:.0f} s in all."
    )
    total = max(seconds, 1e-9)
    rows_of_stages = [
        (s.name, f"{s.seconds:.1f}", f"{s.seconds / total:.0%}", str(s.inferences)) for s in deployment.stages
    ]
    rest = seconds - sum(s.seconds for s in deployment.stages)
    table(
        "Where the time went",
        ("stage", "seconds", "share", "inferences"),
        [*rows_of_stages, ("everything else", f"{rest:.1f}", f"{rest / total:.0%}", "")],
    )
    for problem in dict.fromkeys(row["speedup_problem"] for row in rows if row["speedup_problem"]):
        note(f"(?) speed-ups are doubtful: {problem}")
    if not annotated:
        note("No annotations: AP is agreement with the reference's own detections, and what agrees has the limit.")
    for finding in deployment.findings:
        note(finding.line)
    for verdict in verdicts:
        note(verdict_line(verdict))
    if as_json:
        content = {
            "bundle": str(deployment.bundle),
            "seconds": seconds,
            "images": images,
            "stages": to_json(deployment.stages),
            "outcome": deployment.outcome,
        }
        print_json(
            {**content, "variants": rows, "verdicts": to_json(verdicts), "findings": to_json(deployment.findings)}
        )
    require_all(verdicts, allow_inconclusive=allow_inconclusive)


def _row(deployment: Deployment, index: int) -> dict[str, Any]:  # Any: text, a number or None
    evaluation = deployment.rows[index]
    agreement = evaluation.agreement
    speed, reference = deployment.benchmark.results[index], deployment.benchmark.results[0]
    speedup = deployment.benchmark.speedup(speed, reference=reference)
    return {
        "backend": evaluation.run.backend,
        "precision": evaluation.run.precision,
        "compute": evaluation.run.description["compute"],
        "ap": evaluation.scores.ap,
        "ap50": evaluation.scores.ap50,
        **{name: getattr(evaluation.scores, name) for name in _SIZES},
        "drop": evaluation.drop.value if evaluation.drop else None,
        "precision_drop": evaluation.precision_drop.drop.value if evaluation.precision_drop else None,
        "recall_drop": evaluation.recall_drop.drop.value if evaluation.recall_drop else None,
        "match_rate": agreement.match_rate if agreement and not agreement.empty else None,
        "outcome": overall_outcome(verdict.outcome for verdict in evaluation.verdicts),
        "p50_ms": speed.latency.p50,
        "p90_ms": speed.latency.p90,
        "speedup": speedup.ratio,
        "speedup_problem": speedup.problem,
        "throughput_fps": speed.throughput_fps,
        "size_mib": speed.file_bytes / 2**20,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """As ``_COLUMNS`` names them; a doubtful speed-up has a question mark."""
    from fcos_deploy.accuracy.evaluate import size_cell

    cells = []
    for name, value in row.items():
        if name == _SIZES[0]:
            cells.append(size_cell(row[size] for size in _SIZES))
        if name in (*_SIZES, "speedup_problem"):
            continue
        known = value is not None and not isinstance(value, str)
        text = f"{value:.{4 if abs(value) < 1 else 2}f}" if known else value or "-"
        cells.append(text + (" (?)" if name == "speedup" and row["speedup_problem"] else ""))
    return tuple(cells)


def demo_command(
    *,
    output: Annotated[Path, cli.output("Folder of the bundle.", metavar="DIR")] = Path("fcos-demo"),
    as_json: cli.Json = False,
) -> None:
    """Deploy the blood-cell detector that comes with fcos-deploy: export, INT8, engines, accuracy, speed, report."""
    from fcos_deploy.pipeline.deploy import demo_request, deploy

    with progress_bar() as progress:
        deployment = deploy(demo_request(output), progress=progress)
    note(f"report:  {deployment.bundle / 'report.html'}\nverify:  fcos-deploy verify {deployment.bundle}\n")
    show_deployment(deployment, as_json=as_json)
