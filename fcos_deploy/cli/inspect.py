"""``fcos-deploy inspect`` and ``doctor``: what a file is, and what works on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions, format_checkpoint_options
from fcos_deploy.core.errors import ConfigError, DeviceError
from fcos_deploy.core.files import write_text
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import Trust

if TYPE_CHECKING:
    from fcos_deploy.pipeline.inspect import Inspection

__all__ = ["doctor_command", "inspect_command"]


@cli.with_all_checkpoint_options
@cli.with_signature_options
def inspect_command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Checkpoint, ONNX file, OpenVINO IR, engine, bundle, or COCO annotations (.json)."
        ),
    ],
    *,
    trust: Trust,
    images: Annotated[
        Path | None,
        cli.option("Folder of the annotated images, to check the annotations with. Default: none.", metavar="DIR"),
    ] = None,
    write_options: Annotated[
        Path | None,
        cli.OUTPUT.option(
            "TOML file to write with all options that were decided for a checkpoint, for --checkpoint-options.",
            metavar="FILE",
        ),
    ] = None,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Show what a file is and, for a checkpoint, every decision that its tensors leave open.

    For COCO annotations it shows images, objects and classes, and what is wrong with them.
    """
    from fcos_deploy.bundle.store import is_bundle
    from fcos_deploy.pipeline.inspect import inspect_annotations, inspect_bundle, inspect_file, is_annotations

    if is_annotations(model):
        inspection = inspect_annotations(model, images=images)
    elif images is not None:
        raise ConfigError(f"'{model}' holds no annotations, which --images would be checked with.")
    elif trust != Trust() or is_bundle(model):
        inspection = inspect_bundle(model, trust=trust)
    else:
        inspection = inspect_file(model, options=options)
    if write_options is not None:
        if inspection.options is None:
            raise ConfigError(f"'{model}' carries its own contract; only a checkpoint has options.")
        sources = {decision.name: decision.source for decision in inspection.decisions}
        write_text(write_options, format_checkpoint_options(inspection.options, sources=sources))
        note(f"wrote '{write_options}'")
    if as_json:
        print_json(inspection.to_json())
    else:
        _show(inspection)


def _show(inspection: Inspection) -> None:
    table(f"{inspection.path.name}: {inspection.kind}", ("fact", "value"), inspection.facts)
    if inspection.decisions:
        rows = [(decision.name, decision.value, decision.source) for decision in inspection.decisions]
        table("Decisions", ("decision", "value", "decided by"), rows)
    if inspection.classes:
        counts = [(name, str(objects), str(images), box) for name, objects, images, box in inspection.classes]
        table("Classes", ("class", "objects", "images", "median box"), counts)
    for finding in inspection.findings or ():
        note(finding.line)
    if inspection.findings == ():
        note("nothing speaks against these annotations")


def doctor_command(*, target: cli.Target = "", as_json: cli.Json = False) -> None:
    """List what works on this machine, what does not, and how to fix it.

    With --target the machine is compared with a device profile; exit code 1 when it differs.
    """
    from fcos_deploy.targets.doctor import compare, difference_lines, examine, lines
    from fcos_deploy.targets.profiles import load_profile

    profile = load_profile(target) if target else None
    examination = examine()
    differences = compare(examination, profile) if profile else ()
    if as_json:
        print_json({"findings": to_json(examination.findings), "differences": to_json(differences)})
    for line in (*lines(examination.findings), *difference_lines(differences)):
        note(line)
    if differences:
        raise DeviceError(f"This machine is not a '{target}': {', '.join(d.name for d in differences)}.")
