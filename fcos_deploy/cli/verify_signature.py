"""``fcos-deploy verify-signature``."""

from __future__ import annotations

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json

__all__ = ["command"]


def command(
    bundle: cli.Bundle,
    *,
    public_key: cli.PublicKeys = None,
    expect_name: cli.ExpectName = "",
    min_version: cli.MinVersion = 0,
    as_json: cli.Json = False,
) -> None:
    """Check that a trusted key signed a bundle and that no file was changed since; nothing is run."""
    from fcos_deploy.bundle import open_bundle

    with open_bundle(bundle, public_keys=cli.trusted_keys(public_key, required=True)) as opened:
        opened.require_identity(name=expect_name, version=min_version)
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
