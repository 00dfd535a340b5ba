"""``fcos-deploy verify-signature``: who signed a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    bundle: Annotated[Path, typer.Argument(help="folder or .tar made by 'fcos-deploy deploy'")],
    public_key: Annotated[
        list[str], typer.Option(metavar="PEM", help="trusted key, a file or its text; may be repeated")
    ],
    json: Annotated[bool, typer.Option("--json", help="print the key's id as JSON on stdout")] = False,
) -> None:
    """Check that one of the keys signed the bundle and that no file changed since; runs nothing."""
    from fcos_deploy.bundle import open_bundle
    from fcos_deploy.cli.output import note, print_json

    with open_bundle(bundle, public_keys=tuple(public_key)) as opened:
        note(f"'{bundle}' is signed by key {opened.signed_by[:16]}..., and every file is as it was signed")
        if json:
            print_json({"key_id": opened.signed_by, "bundle": str(bundle), "files": len(opened.manifest.all_files)})
