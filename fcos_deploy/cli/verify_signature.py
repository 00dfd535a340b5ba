"""``fcos-deploy verify-signature``."""

from __future__ import annotations

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json
from fcos_deploy.core.trust import Trust

__all__ = ["command"]


@cli.with_required_signature
def command(
    bundle: cli.Bundle,
    *,
    trust: Trust,
    as_json: cli.Json = False,
) -> None:
    """Check that a trusted key signed a bundle and that no file was changed since; nothing is run."""
    from fcos_deploy.bundle import open_trusted

    with open_trusted(bundle, trust) as opened:
        note(f"'{bundle}' is signed by key {opened.signed_by[:16]}..., and every file is as it was signed")
        if as_json:
            print_json(
                {
                    "key_id": opened.signed_by,
                    "bundle": str(bundle),
                    "name": opened.manifest.name,
                    "version": opened.version,
                    "files": len(opened.manifest.all_files),
                }
            )
