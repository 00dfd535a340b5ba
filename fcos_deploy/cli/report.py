"""``fcos-deploy report``."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import command_line, note, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.gate import Judge

__all__ = ["command"]


@cli.with_common_checkpoint_options
def command(
    model: cli.Model,
    *,
    reference: cli.Reference,
    images: cli.Images,
    annotations: cli.Annotations = None,
    also: cli.Also = None,
    limit: cli.Limit = None,
    rounds: cli.Rounds = 20,
    max_map_drop: cli.MaxMapDrop = None,
    judge: cli.JudgeBy = Judge.INTERVAL,
    allow_inconclusive: cli.AllowInconclusive = False,
    backend: cli.Backends = None,
    precision: cli.BundlePrecisions = None,
    threads: cli.Threads = None,
    require_signature: cli.RequireSignature = False,
    public_key: cli.PublicKeys = None,
    trust_local_builds: cli.TrustLocalBuilds = False,
    output: Annotated[Path, cli.output("HTML file to write; the same in Markdown goes beside it.")] = Path(
        "report.html"
    ),
    title: Annotated[
        str, cli.option("Title of the report. Default: the names of the two models.", panel=cli.OUTPUT)
    ] = "",
    options: CheckpointOptions,
) -> None:
    """Report how a model compares with its reference: accuracy, speed and images side by side, as HTML and Markdown.

    Checkpoint options apply to the models that are checkpoints. The report is written in any case; exit code 4: a limit
    does not hold, or the data cannot decide it.
    """
    from fcos_deploy.accuracy.evaluate import TABLE_COLUMNS, evaluation_row
    from fcos_deploy.accuracy.gate import require_all, verdict_line
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.core.gate import Gate
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.comparison import ComparisonRequest, compare_models, comparison_report
    from fcos_deploy.report import write_report

    models = [model, *(also or [])]
    keys = cli.trusted_keys(public_key, required=require_signature)
    base = SessionOptions(threads=threads, public_keys=keys, trust_local_builds=trust_local_builds)
    sessions = cli.session_options(base, [*models, reference], checkpoint=options)
    precisions: list[Precision] | list[None] = precision or [None]
    request = ComparisonRequest(
        reference=DetectorSpec(model=reference, options=cli.reference_options(sessions[reference])),
        candidates=tuple(
            DetectorSpec(model=path, backend=name, precision=value, options=sessions[path])
            for path, name, value in product(models, backend or [""], precisions)
        ),
        images=images,
        annotations=annotations,
        gate=Gate(max_map_drop=max_map_drop, judge=judge),
        timing=TimingOptions(rounds=rounds),
        limit=limit,
    )
    with progress_bar() as progress:
        comparison = compare_models(request, progress=progress)
    table("Accuracy", TABLE_COLUMNS, [evaluation_row(evaluation) for evaluation in comparison.all])
    title = title or f"{model.name} against {reference.name}"
    for path in write_report(comparison_report(comparison, title=title, command=command_line()), output):
        note(f"wrote {path}")
    for verdict in comparison.evaluations.verdicts:
        note(verdict_line(verdict))
    require_all(comparison.evaluations.verdicts, allow_inconclusive=allow_inconclusive)
