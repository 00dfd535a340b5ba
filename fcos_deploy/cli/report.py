"""``fcos-deploy report``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import conclude, note, progress_bar, show_accuracy, table
from fcos_deploy.cli.settings import command_line
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.errors import AccuracyGateError, BundleError, ConfigError, InconclusiveError
from fcos_deploy.core.gate import Gate, Outcome, overall_outcome
from fcos_deploy.core.trust import Trust

__all__ = ["report_command"]


@cli.with_common_checkpoint_options
@cli.with_trust_options
@cli.with_server_options
@cli.with_gate_options("max_map_drop", "max_precision_drop", "max_recall_drop", "min_match_rate")
def report_command(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL...", help="Checkpoint, ONNX file, OpenVINO IR, engine or bundle; with --compare bundles."
        ),
    ],
    *,
    compare: Annotated[
        bool, cli.option("Report of what several bundles record, side by side; nothing is measured.")
    ] = False,
    reference: Annotated[
        Path | None,
        cli.option(
            "Model to compare with, usually the checkpoint it was made from. Needed for a comparison.", metavar="MODEL"
        ),
    ] = None,
    images: Annotated[Path | None, cli.option("Folder of the images. Needed for a comparison.", metavar="DIR")] = None,
    records: Annotated[
        list[Path] | None,
        cli.option(
            "Device record of the bundle, written by 'verify --export', repeatable: one page for its sign-off in place "
            "of a comparison.",
            metavar="FILE",
        ),
    ] = None,
    annotations: cli.Annotations = None,
    also: cli.Also = None,
    limit: cli.Limit = None,
    rounds: cli.Rounds = 20,
    at_precision: cli.AtPrecision = None,
    at_recall: cli.AtRecall = None,
    gate: Gate,
    allow_inconclusive: cli.AllowInconclusive = False,
    backend: cli.Backends = None,
    precision: cli.BundlePrecisions = None,
    threads: cli.Threads = None,
    require_signature: cli.RequireSignature = False,
    trust: Trust,
    output: Annotated[Path, cli.output("HTML file to write; the same in Markdown goes beside it.")] = Path(
        "report.html"
    ),
    title: Annotated[str, cli.OUTPUT.option("Title of the report. Default: the names of the two models.")] = "",
    options: CheckpointOptions,
) -> None:
    """Report how a model compares with its reference: accuracy, speed and images side by side, as HTML and Markdown.

    For a bundle alone, the report that 'deploy' left in it is written again, without measuring. For several bundles,
    --compare shows their recorded figures side by side.

    Checkpoint options apply to the models that are checkpoints. The report is written in any case; exit code 4: a limit
    does not hold, or the data cannot decide it.
    """
    from fcos_deploy.accuracy.operating_point import OperatingGoal
    from fcos_deploy.benchmark.measure import TimingOptions
    from fcos_deploy.bundle.store import is_bundle
    from fcos_deploy.detector import DetectorSpec
    from fcos_deploy.pipeline.proof import ComparisonRequest, compare_models, comparison_report
    from fcos_deploy.report import write_report

    if compare:
        of_both = (reference, images, records, annotations, also, limit, backend, precision, threads)
        measured = gate.has_limits or any(value is not None for value in (*of_both, at_precision, at_recall))
        _side_by_side(models, measured=measured, trust=trust, output=output, title=title)
        return
    model = models[0]
    if len(models) > 1:
        raise ConfigError(
            f"A report is about one model, got {len(models)}.",
            hint="--compare puts bundles side by side; --also adds a model that is measured against --reference",
        )
    if records:
        if gate.has_limits or images or annotations or reference or also:
            raise ConfigError(
                "Records are judged by the bundle's own gates, and are compared with nothing else.",
                hint="leave out limits, --reference, --images, --annotations and --also with --records",
            )
        # The keys are those of the devices too; only a required signature is one of the bundle as well.
        asked = trust if require_signature or trust.min_version else replace(trust, public_keys=())
        judged = _sign_off(model, records, trust=asked, keys=trust.public_keys, output=output)
        _require(*judged, output=output, inconclusive=allow_inconclusive)
        return
    asked_for_more = (reference, images, annotations, also, limit, at_precision, at_recall, backend, precision, title)
    if not (gate.has_limits or any(asked_for_more)) and is_bundle(model):
        _require(*_recorded(model, trust=trust, output=output), output=output, inconclusive=allow_inconclusive)
        return
    if reference is None or images is None:
        raise ConfigError(
            "A comparison needs a reference and images.",
            hint="give --reference and --images, or the devices' --records of a bundle",
        )
    models = [model, *(also or [])]
    base = SessionOptions(threads=threads).trusting(trust)
    sessions = cli.session_options(base, [*models, reference], checkpoint=options)
    request = ComparisonRequest(
        reference=DetectorSpec(model=reference, options=cli.reference_options(sessions[reference])),
        candidates=cli.detector_specs({path: sessions[path] for path in models}, backend, precision),
        images=images,
        annotations=annotations,
        gate=gate,
        timing=TimingOptions(rounds=rounds),
        limit=limit,
        operating_goal=OperatingGoal.asked(precision=at_precision, recall=at_recall),
    )
    with progress_bar() as progress:
        comparison = compare_models(request, progress=progress)
    show_accuracy(comparison.all)
    title = title or f"{model.name} against {reference.name}"
    for path in write_report(comparison_report(comparison, title=title, command=command_line()), output):
        note(f"wrote {path}")
    conclude(comparison.evaluations.verdicts, allow_inconclusive=allow_inconclusive)


def _side_by_side(bundles: list[Path], *, measured: bool, trust: Trust, output: Path, title: str) -> None:
    """The report of what bundles record."""
    from fcos_deploy.accuracy.bundle_comparison import tabulate_bundles
    from fcos_deploy.report.render import write_bundle_table

    if measured:
        raise ConfigError(
            "--compare shows what the bundles record, and measures nothing.",
            hint="leave the options of a measurement out, or measure two with 'fcos-deploy compare'",
        )
    compared = tabulate_bundles(bundles, trust)
    table("Bundles", ("", *compared.bundles), compared.facts)
    table("Recorded figures", ("backend", "precision", "figure", *compared.bundles), compared.figures)
    for sentence in compared.differences:
        note(f"contract: {sentence}")
    shown = title or f"{len(bundles)} bundles side by side"
    for path in write_bundle_table(compared, output, title=shown, command=command_line()):
        note(f"wrote {path}")


_Judged = tuple[Outcome | None, str, str]  # and what to say when that is failed, and when it is inconclusive


def _require(outcome: Outcome | None, failed: str, undecided: str, *, output: Path, inconclusive: bool) -> None:
    if outcome is Outcome.FAILED:
        raise AccuracyGateError(failed, hint=f"see '{output}'")
    if outcome is Outcome.INCONCLUSIVE and not inconclusive:
        raise InconclusiveError(undecided, hint=f"see '{output}'")


def _recorded(bundle: Path, *, trust: Trust, output: Path) -> _Judged:
    """The report that the bundle holds, after the bundle was checked, and its verdicts."""
    from fcos_deploy.accuracy.evaluate import size_cell
    from fcos_deploy.bundle import open_trusted
    from fcos_deploy.core.files import write_text

    with open_trusted(bundle, trust) as opened:
        figures = opened.manifest.accuracy
        try:
            texts = {suffix: opened.path(f"report{suffix}").read_text(encoding="utf-8") for suffix in (".html", ".md")}
        except BundleError as error:
            raise ConfigError(
                f"'{bundle}' holds no report.", hint="give --reference and --images to make one"
            ) from error
    rows = [
        (
            *(figure.backend, str(figure.precision), figure.details.get("compute", ""), figure.outcome or "-"),
            *(f"{figure.metrics[name]:.3f}" if name in figure.metrics else "-" for name in ("ap", "ap50")),
            size_cell(figure.metrics.get(name) for name in ("ap_small", "ap_medium", "ap_large")),
        )
        for figure in figures
    ]
    table(bundle.name, ("backend", "precision", "float in", "verdict", "AP", "AP50", "small/medium/large"), rows)
    for suffix, text in texts.items():
        write_text(output.with_suffix(suffix), text)
        note(f"wrote {output.with_suffix(suffix)}")
    return (
        overall_outcome(figure.outcome for figure in figures if figure.outcome),
        "A limit did not hold where the bundle was made.",
        "Where the bundle was made the images could not decide a limit.",
    )


def _sign_off(
    bundle: Path, records: list[Path], *, trust: Trust, keys: tuple[Path | str, ...], output: Path
) -> _Judged:
    """The page of a bundle's device records; with ``keys`` one of them must have signed each record."""
    from fcos_deploy.accuracy.verify import read_records
    from fcos_deploy.bundle import open_trusted
    from fcos_deploy.report.render import write_sign_off

    with open_trusted(bundle, trust) as opened:
        paths, outcome = write_sign_off(opened, read_records(records, bundle=opened, public_keys=keys), output)
    for path in paths:
        note(f"wrote {path}")
    return outcome, "A device does not give the certified detections.", "A device's golden images cannot decide it."
