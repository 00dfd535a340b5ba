"""``fcos-deploy deploy``, ``demo`` and ``init``, and how a finished deployment is printed."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import conclude, note, print_json, progress_bar, table
from fcos_deploy.cli.settings import PROJECT_FILE, command_line, option_name, project_text, typed_name
from fcos_deploy.core.checkpoint_options import CheckpointOptions, option_infos
from fcos_deploy.core.enums import Precision, Tail
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.files import write_text
from fcos_deploy.core.gate import Judge, overall_outcome
from fcos_deploy.core.serialize import to_json

if TYPE_CHECKING:
    from fcos_deploy.pipeline.deploy import Deployment

__all__ = ["demo_command", "deploy_command", "init_command", "show_deployment"]


FAST_IMAGES = 32
_SIZES = ("ap_small", "ap_medium", "ap_large")


@cli.with_all_checkpoint_options
def deploy_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Checkpoint, ONNX file with a contract, or package.module:function (with --run-code)."
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
        cli.RUNTIME.option(
            "Backend to build for, repeatable. Default: every backend that runs on this machine.",
            metavar="NAME",
            autocompletion=cli.complete_backend,
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        cli.RUNTIME.option("Precision to build, repeatable. Default: fp32 and int8; of a --target, its profile's."),
    ] = None,
    tail: Annotated[
        Tail | None, cli.RUNTIME.option("Where the graphs end. Default: raw; of a --target, its profile's.")
    ] = None,
    max_map_drop: Annotated[
        float | None,
        cli.GATE.option("Largest loss of AP of INT8; needs annotations. Default: 0.01, one point.", metavar="AP"),
    ] = None,
    max_precision_drop: cli.MaxPrecisionDrop = None,
    max_recall_drop: cli.MaxRecallDrop = None,
    min_match_rate: cli.MinInt8MatchRate = None,
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
            "that they give."
        ),
    ] = False,
    run_code: cli.RunCode = False,
    dry_run: Annotated[
        bool,
        cli.option(
            "Plan of what would be built, without building it; checkpoint and images are read as for the build."
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
        bool, cli.option("No project file: the fcos-deploy.toml in the current folder is ignored.")
    ] = False,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Deploy a checkpoint: export, quantize, build, measure and pack it into a verified bundle.

    An interrupted run resumes where it stopped. Exit code 4: a limit does not hold, or the images
    cannot decide it; in the latter case the bundle is kept, and says so.
    """
    from fcos_deploy.accuracy.operating_point import OperatingGoal
    from fcos_deploy.pipeline.deploy import backends_to_measure, check_inputs, deploy
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
        if not plans:
            kinds, backends = ", ".join(request.precisions), ", ".join(backends_to_measure(request))
            note(f"Checkpoint, images and annotations can be used. Without --dry-run: {kinds} for {backends}.")
        if as_json:
            print_json(to_json(plans))
        return
    with progress_bar() as progress:
        deployment = deploy(request, progress=progress)
    show_deployment(deployment, as_json=as_json, allow_inconclusive=allow_inconclusive)


_COLUMNS = {  # what the table shows of a row
    **{"backend": "backend", "precision": "precision", "compute": "float in", "ap": "AP", "ap50": "AP50"},
    **{"ap_small": "small/medium/large", "drop": "drop", "match_rate": "agree", "outcome": "verdict"},
    **{"p50_ms": "p50 ms", "p90_ms": "p90 ms", "speedup": "speed-up", "throughput_fps": "images/s", "size_mib": "MiB"},
}


def show_deployment(deployment: Deployment, *, as_json: bool, allow_inconclusive: bool = False) -> None:
    """A table for people on stderr; with ``as_json`` one document on stdout.

    Raises:
        InconclusiveError: the bundle was made, but its images cannot decide a limit, and that was not allowed.
    """
    verdicts = deployment.evaluations.verdicts
    rows = [_row(deployment, index) for index in range(len(deployment.rows))]
    annotated = deployment.evaluations.dataset.annotated
    shown = [key for key in _COLUMNS if key != "match_rate" or not annotated]
    cells = [[_cell(row, key) for key in shown] for row in rows]
    table(str(deployment.bundle), [_COLUMNS[key] for key in shown], cells)
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
    if as_json:
        parts = {name: to_json(getattr(deployment, name)) for name in ("stages", "outcome", "findings")}
        content = {"bundle": str(deployment.bundle), "seconds": seconds, "images": images, "variants": rows}
        print_json({**content, **parts, "verdicts": to_json(verdicts)})
    conclude(verdicts, allow_inconclusive=allow_inconclusive)


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


def _cell(row: dict[str, Any], key: str) -> str:
    """As the table shows it: APs by size in one cell, and a doubtful speed-up with a question mark."""
    from fcos_deploy.accuracy.evaluate import size_cell

    value = row[key]
    if key == _SIZES[0]:
        return size_cell(row[size] for size in _SIZES)
    if value is None or isinstance(value, str):
        return value or "-"
    text = f"{value:.{4 if abs(value) < 1 else 2}f}"
    return f"{text} (?)" if key == "speedup" and row["speedup_problem"] else text


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


_DEPLOY = inspect.signature(deploy_command).parameters
_NEEDED = [name for name, parameter in _DEPLOY.items() if parameter.default is inspect.Parameter.empty]
_OF_A_RUN = {"config", "no_config", "dry_run", "run_code", "as_json"}  # no part of what is deployed
_UsageError: Any = typer.BadParameter.__base__  # Any: a class that Typer does not export
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")


def _with_options_of_deploy(command: Callable[..., None]) -> Callable[..., None]:
    """Give it every option of ``deploy``, none of which it needs; it receives their values as ``values``."""

    def with_values(
        *, context: typer.Context, config: Path, yes: bool, **values: Any
    ) -> None:  # Any: each option's own
        command(context=context, config=config, yes=yes, values=values)

    added = [
        parameter.replace(default=None if name in _NEEDED else parameter.default)
        for name, parameter in _DEPLOY.items()
        if name not in _OF_A_RUN
    ]
    return cli.with_parameters(with_values, command, added, hidden="values")


@_with_options_of_deploy
def init_command(
    *,
    context: typer.Context,
    config: Annotated[Path, cli.option("Project file to write; it must not exist.", metavar="FILE")] = Path(
        PROJECT_FILE
    ),
    yes: Annotated[
        bool, cli.option("No questions, as without a terminal; what is left open is an error.", "-y", "--yes")
    ] = False,
    values: dict[str, Any],  # Any: each option's own type
) -> None:
    """Write the project file of a deployment, after asking what the checkpoint and the options leave open.

    The given options go into the file; every other option of 'deploy' is in it as a comment.
    """
    from fcos_deploy.pipeline.source import names_a_function

    if config.exists() or config.is_symlink():
        raise ConfigError(f"'{config}' exists.", hint="edit it, remove it, or write another one with --config FILE")
    ask = not yes and sys.stdin.isatty()
    sources = {name: context.get_parameter_source(name) for name in values}
    given = {name: values[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
    if ask and "checkpoint" not in given:
        given |= _answer(context, "checkpoint")
    if "checkpoint" in given:
        given = _settle_checkpoint(context, given, ask=ask)
    missing = [name for name in _NEEDED if name not in given]
    if missing and not ask:
        names = ", ".join(typed_name(p) for p in context.command.params if p.name in missing)
        raise ConfigError(
            f"The project file needs {names}.", hint="give them here, or run it on a terminal, which asks"
        )
    for name in missing:
        given |= _answer(context, name)
    if not names_a_function(given["checkpoint"]):
        given["checkpoint"] = Path(given["checkpoint"])
    kept = [parameter for parameter in context.command.params if parameter.name in _DEPLOY.keys() - _OF_A_RUN]
    text = project_text(kept, {name: _from_folder_of(config, value) for name, value in given.items()})
    write_text(config, text)
    where = "" if config == Path(PROJECT_FILE) else f" --config {shlex.quote(str(config))}"
    note(f"wrote '{config}'\nplan:    fcos-deploy deploy{where} --dry-run\nbundle:  fcos-deploy deploy{where}")


def _settle_checkpoint(context: typer.Context, given: dict[str, Any], *, ask: bool) -> dict[str, Any]:
    """``given`` with the answers to what the checkpoint leaves open.

    Raises:
        ConfigError: it leaves something open, and nobody can be asked.
        CheckpointError: the same, or the file is no checkpoint.
    """
    from fcos_deploy.checkpoints.rules import UNKNOWN_CLASS_NAMES
    from fcos_deploy.pipeline.inspect import inspect_file
    from fcos_deploy.pipeline.source import names_a_function

    if names_a_function(given["checkpoint"]):
        return given  # Only running it would tell.
    while True:
        texts = {name: value for name, value in given.items() if name in option_infos()}
        try:
            options = cli.checkpoint_options_of(texts, file=given.get("checkpoint_options"))
            inspection = inspect_file(Path(given["checkpoint"]), options=options)
        except (ConfigError, CheckpointError) as error:
            known = {flag for p in context.command.params for flag in (*p.opts, *p.secondary_opts)}
            named = dict.fromkeys(_OPTION.findall(f"{error.hint} {error.message}"))
            flags = [flag for flag in named if flag in known]
            if not (ask and flags):
                raise
            note(f"{error.message}\n{error.hint}".rstrip())
            given = {**given, **_answered_options(context, flags)}
            continue
        unnamed = any(decision.source == UNKNOWN_CLASS_NAMES for decision in inspection.decisions)
        return given | (_answer(context, "class_names", default="") if unnamed and ask else {})


def _answered_options(context: typer.Context, flags: list[str]) -> dict[str, Any]:
    """What a person answers to a hint that names these options: options with values, or the value of the only one."""
    while True:
        words = shlex.split(typer.prompt(f"Your answer, such as {flags[0]} ...", err=True))
        if words and not words[0].startswith("-"):
            if len(flags) > 1:  # it would be taken for the checkpoint
                note(f"Give it with its option: {flags[0]} {words[0]}")
                continue
            words.insert(0, flags[0])
        try:
            typed: Mapping[str, Any] = context.command.make_parser(context).parse_args(args=words)[0]
            answers = {
                p.name: p.process_value(context, typed[p.name]) for p in context.command.params if p.name in typed
            }
            return {str(name): value for name, value in answers.items() if value is not None}
        except _UsageError as error:
            note(error.format_message())


def _answer(context: typer.Context, name: str, *, default: str | None = None) -> dict[str, Any]:
    """What a person says to a parameter; without a ``default`` the project file needs it."""
    parameters: list[Any] = context.command.params  # Any: Typer's copy of Click's parameter, which has a help
    (parameter,) = (p for p in parameters if p.name == name)
    text = f"{option_name(parameter)}: {parameter.help.rstrip('.')}"
    return {name: typer.prompt(text, default=default, show_default=bool(default), err=True)}


def _from_folder_of(config: Path, value: Any) -> Any:  # Any: an option's own type
    """A path as a project file in another folder has it: not relative, as that would be to its own folder."""
    return Path.cwd() / value if isinstance(value, Path) and config.parent != Path() else value
