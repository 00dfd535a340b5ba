"""``fcos-deploy evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.gate import Judge

__all__ = ["command"]


@cli.with_common_checkpoint_options
@cli.with_session_options("device", "compute", "threads", "allow_engine_code")
@cli.with_server_options
def command(
    model: cli.Model,
    *,
    images: cli.Images,
    annotations: cli.Annotations = None,
    reference: Annotated[
        Path | None, cli.option("Model to compare with, usually the checkpoint.", metavar="MODEL")
    ] = None,
    limit: cli.Limit = None,
    resamples: Annotated[
        int, cli.option("Bootstrap resamples of the intervals; 0 for no intervals, and limits stay undecided.", min=0)
    ] = 1000,
    predictions: Annotated[
        Path | None, cli.option("Folder to keep detections in; an interrupted run resumes from it.", metavar="DIR")
    ] = None,
    at_precision: cli.AtPrecision = None,
    at_recall: cli.AtRecall = None,
    max_map_drop: cli.MaxMapDrop = None,
    min_ap: Annotated[
        float | None, cli.option("Smallest AP; exit code 4 below it. Default: no limit.", metavar="AP", panel=cli.GATE)
    ] = None,
    min_match_rate: cli.MinMatchRate = None,
    judge: cli.JudgeBy = Judge.INTERVAL,
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
    from fcos_deploy.accuracy.evaluate import (
        TABLE_COLUMNS,
        EvaluationRequest,
        evaluate,
        evaluation_json,
        evaluation_row,
        size_sentence,
    )
    from fcos_deploy.accuracy.gate import require_all, verdict_line, write_junit
    from fcos_deploy.accuracy.operating_point import OPERATING_COLUMNS, OperatingGoal, operating_rows
    from fcos_deploy.core.gate import Gate
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.detector import DetectorSpec

    sessions = cli.session_options(session, [model, *([reference] if reference else [])], checkpoint=options)
    request = EvaluationRequest(
        candidates=cli.detector_specs({model: sessions[model]}, backend, precision),
        images=images,
        annotations=annotations,
        reference=DetectorSpec(model=reference, options=cli.reference_options(sessions[reference]))
        if reference
        else None,
        gate=Gate(max_map_drop=max_map_drop, min_ap=min_ap, min_match_rate=min_match_rate, judge=judge),
        resamples=resamples,
        limit=limit,
        predictions=predictions,
        operating_goal=OperatingGoal(precision=at_precision, recall=at_recall),
    )
    with progress_bar() as progress:
        result = evaluate(request, progress=progress)
    shown = [*([result.reference] if result.reference else []), *result.candidates]
    for finding in result.dataset.findings:
        note(finding.line)
    table("Accuracy", TABLE_COLUMNS, [evaluation_row(evaluation) for evaluation in shown])
    for evaluation in shown:
        if sizes := size_sentence(evaluation):
            note(sizes)
        if evaluation.operating_points:
            title = f"{evaluation.run.subject}: at a score threshold for each class, IoU 0.5"
            table(title, OPERATING_COLUMNS, operating_rows(evaluation.operating_points))
    if as_json:
        findings = to_json(result.dataset.findings)
        documents = [{**evaluation_json(evaluation), "findings": findings} for evaluation in result.candidates]
        print_json(documents[0] if len(documents) == 1 else documents)
    if junit is not None:
        write_junit(junit, result.verdicts, suite="fcos-deploy evaluate", allow_inconclusive=allow_inconclusive)
    for verdict in result.verdicts:
        note(verdict_line(verdict))
    require_all(result.verdicts, allow_inconclusive=allow_inconclusive)
