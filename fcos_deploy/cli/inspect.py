"""``fcos-deploy inspect``: what a checkpoint, ONNX file, engine or bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, trusted_keys, with_checkpoint_options
from fcos_deploy.core.checkpoint_options import CheckpointOptions

if TYPE_CHECKING:
    from fcos_deploy.pipeline.inspect import Inspection

__all__ = ["command"]


@with_checkpoint_options
def command(
    file: Annotated[Path, typer.Argument(help="Checkpoint, ONNX file, IR, engine or bundle.")],
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
    *,
    options: CheckpointOptions,
) -> None:
    """Say what a file is, and who decided what its tensors do not tell."""
    from fcos_deploy.cli.output import print_json, table

    found = _inspect(file, trusted_keys(public_key, required=require_signature), options)
    if as_json:
        print_json(found.to_json())
        return
    table(f"{found.path.name}: {found.kind}", ("what", "value"), found.facts)
    if found.decisions:
        rows = [(decision.name, decision.value, decision.source) for decision in found.decisions]
        table("Decisions", ("what", "value", "who says so"), rows)


def _inspect(file: Path, keys: tuple[Path | str, ...], options: CheckpointOptions) -> Inspection:
    # A plain file does without the bundle package, whose import takes a tenth of a second.
    if keys or file.is_dir() or file.suffix == ".tar":
        from fcos_deploy.bundle.store import is_bundle
        from fcos_deploy.pipeline.inspect import inspect_bundle

        if keys or is_bundle(file):
            return inspect_bundle(file, public_keys=keys)
    from fcos_deploy.pipeline.inspect import inspect_file

    return inspect_file(file, options=options)
