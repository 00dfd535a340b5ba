"""``fcos-deploy evaluate``, ``compare`` and ``parity``: how good models are, and how far they agree."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import conclude, note, note_placements, print_json, progress_bar, show_accuracy, table
from fcos_deploy.cli.settings import command_line
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.serialize import to_json

if TYPE_CHECKING:
    from fcos_deploy.detector import DetectorSpec

__all__ = ["compare_command", "evaluate_command", "parity_command"]


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads", "allow_engine_code")
@cli.with_server_options
@cli.with_gate_options("max_map_drop", "max_precision_drop", "max_recall_drop", "min_ap", "min_match_rate")
def evaluate_command(
    model: cli.Model,
    *,
    images: cli.Images,
    annotations: cli.Annotations = None,
    reference: Annotated[
        Path | None, cli.option("Model to compare with, usually the checkpoint.", metavar="MODEL")
    ] = None,
    limit: cli.Limit = None,
    resamples: Annotated[
        int,
        cli.option("Number of bootstrap resamples; with 0 there are no intervals, and limits stay undecided.", min=0),
    ] = 1000,
    predictions: Annotated[
        Path | None, cli.option("Folder to keep detections in; an interrupted run resumes from it.", metavar="DIR")
    ] = None,
    at_precision: cli.AtPrecision = None,
    at_recall: cli.AtRecall = None,
    gate: Gate,
    allow_inconclusive: cli.AllowInconclusive = False,
    backend: cli.Backends = None,
    precision: cli.BundlePrecisions = None,
    session: SessionOptions,
    junit: cli.Junit = None,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Evaluate a model on one or more backends: COCO AP, its confidence interval, and a gate.

    Checkpoint options apply to MODEL and --reference where they are checkpoints. Exit code 4: a limit does not hold, or
    the data cannot decide it.
    """
    from fcos_deploy.accuracy.evaluate import CURVE_COLUMNS, EvaluationRequest, curve_rows, evaluate, evaluation_json
    from fcos_deploy.accuracy.operating_point import OPERATING_COLUMNS, OperatingGoal, operating_rows
    from fcos_deploy.detector import DetectorSpec

    sessions = cli.session_options(session, [model, *([reference] if reference else [])], checkpoint=options)
    request = EvaluationRequest(
        candidates=cli.detector_specs({model: sessions[model]}, backend, precision),
        images=images,
        annotations=annotations,
        reference=DetectorSpec(model=reference, options=cli.reference_options(sessions[reference]))
        if reference
        else None,
        gate=gate,
        resamples=resamples,
        limit=limit,
        predictions=predictions,
        operating_goal=OperatingGoal.asked(precision=at_precision, recall=at_recall),
    )
    with progress_bar() as progress:
        result = evaluate(request, progress=progress)
    shown = [*([result.reference] if result.reference else []), *result.candidates]
    for finding in result.dataset.findings:
        note(finding.line)
    show_accuracy(shown)
    note_placements(evaluation.run.description for evaluation in shown)
    for evaluation in shown:
        if evaluation.operating_points:
            table(f"{evaluation.run.subject}: precision by recall, IoU 0.5", CURVE_COLUMNS, curve_rows(evaluation))
            title = f"{evaluation.run.subject}: at a score threshold for each class, IoU 0.5"
            table(title, OPERATING_COLUMNS, operating_rows(evaluation.operating_points))
    if as_json:
        findings = to_json(result.dataset.findings)
        documents = [{**evaluation_json(evaluation), "findings": findings} for evaluation in result.candidates]
        print_json(documents[0] if len(documents) == 1 else documents)
    conclude(result.verdicts, allow_inconclusive=allow_inconclusive, junit=junit, command="evaluate")


@cli.with_common_checkpoint_options
@cli.with_session_options("threads")
@cli.with_server_options
@cli.with_gate_options("max_map_drop", "max_precision_drop", "max_recall_drop", "min_match_rate")
def compare_command(
    first: Annotated[
        Path, typer.Argument(metavar="FIRST", help="Model to compare with: checkpoint, ONNX file, engine or bundle.")
    ],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Model to compare with FIRST.")],
    *,
    images: Annotated[
        Path | None,
        cli.option("Folder of the images. Default: two bundles are compared by what they record.", metavar="DIR"),
    ] = None,
    annotations: cli.Annotations = None,
    limit: cli.Limit = None,
    speed: Annotated[bool, cli.option("Benchmark of both in turns.", "--speed/--no-speed")] = True,
    rounds: cli.Rounds = 10,
    at_precision: cli.AtPrecision = None,
    at_recall: cli.AtRecall = None,
    gate: Gate,
    allow_inconclusive: cli.AllowInconclusive = False,
    backend: cli.Backend = "",
    second_backend: Annotated[
        str, cli.RUNTIME.option("Runtime of the second model. Default: that of --backend.", metavar="NAME")
    ] = "",
    precision: cli.BundlePrecision = None,
    second_precision: Annotated[
        Precision | None, cli.RUNTIME.option("Precision of the second bundle. Default: that of --precision.")
    ] = None,
    session: SessionOptions,
    report: Annotated[Path | None, cli.OUTPUT.option("HTML report of the comparison to write.", metavar="FILE")] = None,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Compare two models or bundles: AP with its confidence interval, single detections, speed.

    Without --images both must be bundles: their recorded figures are shown, and both run on their golden images.
    Checkpoint options apply to the models that are checkpoints. Exit code 4: a limit does not hold, or the
    data cannot decide it.
    """
    from fcos_deploy.accuracy.evaluate import evaluation_json
    from fcos_deploy.accuracy.operating_point import OperatingGoal
    from fcos_deploy.benchmark import run
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.proof import ComparisonRequest, compare_models, comparison_report
    from fcos_deploy.report import write_report

    sessions = cli.session_options(session, [first, second], checkpoint=options)
    reference = DetectorSpec(model=first, backend=backend, precision=precision, options=sessions[first])
    candidate = DetectorSpec(
        model=second,
        backend=second_backend or backend,
        precision=second_precision or precision,
        options=sessions[second],
    )
    if images is None:
        if annotations is not None or report is not None:
            raise ConfigError("--annotations and --report need images.", hint="give --images DIR")
        _compare_bundles(reference, candidate, gate=gate, as_json=as_json, allow_inconclusive=allow_inconclusive)
        return
    request = ComparisonRequest(
        reference=reference,
        candidates=(candidate,),
        images=images,
        annotations=annotations,
        gate=gate,
        timing=TimingOptions(rounds=rounds) if speed else None,
        limit=limit,
        operating_goal=OperatingGoal.asked(precision=at_precision, recall=at_recall),
    )
    with progress_bar() as progress:
        comparison = compare_models(request, progress=progress)
    show_accuracy(comparison.all)
    if comparison.benchmark is not None:
        table("Speed", run.TABLE_COLUMNS, [run.result_row(measured) for measured in comparison.benchmark.results])
    if as_json:
        timed = run.benchmark_json(comparison.benchmark) if comparison.benchmark else None
        print_json({"accuracy": [evaluation_json(evaluation) for evaluation in comparison.all], "speed": timed})
    if report is not None:
        title = f"{second.name} against {first.name}"
        write_report(comparison_report(comparison, title=title, command=command_line()), report)
        note(f"wrote {report}")
    conclude(comparison.evaluations.verdicts, allow_inconclusive=allow_inconclusive)


def _compare_bundles(
    first: DetectorSpec, second: DetectorSpec, *, gate: Gate, as_json: bool, allow_inconclusive: bool
) -> None:
    from fcos_deploy.accuracy import bundle_comparison as bundles

    with progress_bar() as progress:
        comparison = bundles.compare_bundles(first, second, gate=gate, progress=progress)
    table("Bundles", ("", "first", "second"), comparison.facts)
    table("Recorded figures", bundles.FIGURE_COLUMNS, bundles.figure_rows(comparison))
    for sentence in comparison.contract:
        note(f"contract: {sentence}")
    agreement, (reference, candidate) = comparison.agreement, comparison.subjects
    share = "neither detects anything" if agreement.empty else f"{agreement.match_rate:.1%} of the detections agree"
    note(
        f"golden images ({agreement.images}), {reference} against {candidate}, run here: {share}, "
        f"{agreement.missed} missed, {agreement.extra} extra"
    )
    if as_json:
        print_json(bundles.bundles_json(comparison))
    conclude(comparison.verdicts, allow_inconclusive=allow_inconclusive)


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads")
@cli.with_server_options
def parity_command(
    model: cli.Model,
    *,
    reference: cli.Reference,
    images: cli.Images,
    limit: Annotated[int, cli.option("Number of images to use.", min=1)] = 4,
    strict: Annotated[bool, cli.option("Tolerances of float32, whatever the model's precision.")] = False,
    layers: Annotated[bool, cli.option("Search for the first layer that diverges (ONNX files).")] = False,
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
    from fcos_deploy.pipeline.proof import ParityRequest, check_parity, find_layer

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
