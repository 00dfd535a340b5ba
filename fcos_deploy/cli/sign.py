"""``fcos-deploy sign``: an Ed25519 signature over a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    bundle: Annotated[Path | None, typer.Argument(help="folder made by 'fcos-deploy deploy'")] = None,
    key: Annotated[Path, typer.Option(help="private key, PEM")] = Path("fcos-deploy-key.pem"),
    generate_key: Annotated[
        bool, typer.Option("--generate-key", help="first make a key pair: --key and the same name ending in .pub.pem")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="print the key's id as JSON on stdout")] = False,
) -> None:
    """Sign a bundle's manifest, and thereby every file that it lists; the bundle is checked first."""
    from fcos_deploy.bundle.signature import generate_key as make_key
    from fcos_deploy.bundle.store import sign
    from fcos_deploy.cli.output import note, print_json
    from fcos_deploy.core.errors import ConfigError

    if bundle is None and not generate_key:
        raise ConfigError("Nothing to sign.", hint="give a bundle, or --generate-key")
    identity = ""
    if generate_key:
        public = key.with_suffix(".pub.pem")
        identity = make_key(key, public=public)
        note(f"wrote '{key}' (keep it secret) and '{public}' (give it to the devices)")
    if bundle is not None:
        identity = sign(bundle, private_key=key)
        note(f"signed '{bundle}' with key {identity[:16]}...")
    if json:
        print_json({"key_id": identity, "bundle": str(bundle) if bundle else None})
