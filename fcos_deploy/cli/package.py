"""``fcos-deploy package``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import (
    SERVING,
    Backend,
    Bundle,
    BundlePrecision,
    PublicKeys,
    RequireSignature,
    Server,
    output,
    trusted_keys,
)
from fcos_deploy.cli.output import note

__all__ = ["command"]


def command(
    bundle: Bundle,
    *,
    output: Annotated[
        Path, output("Folder to write; without --for the .tar file to pack the bundle into.", metavar="PATH")
    ],
    serving: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="NAME",
            help="Serving engine: triton, ovms, deepstream or kserve. Default: none, pack a .tar.",
        ),
    ] = "",
    backend: Backend = "",
    precision: BundlePrecision = None,
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Name of the served model. Default: the bundle's.",
            rich_help_panel=SERVING,
            show_default=False,
        ),
    ] = "",
    version: Annotated[
        int, typer.Option(metavar="N", help="Version of the served model.", rich_help_panel=SERVING)
    ] = 1,
    server: Server = "",
    max_batch: Annotated[
        int,
        typer.Option(metavar="N", help="Largest batch to join requests into; 0 for none.", rich_help_panel=SERVING),
    ] = 0,
    queue_delay_us: Annotated[
        int,
        typer.Option(metavar="US", help="Longest wait for a batch to fill, in microseconds.", rich_help_panel=SERVING),
    ] = 2000,
    instances: Annotated[
        int, typer.Option(metavar="N", help="Instances of the model that run side by side.", rich_help_panel=SERVING)
    ] = 1,
    gpu: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="GPU to serve on, repeatable. Default: the engine's choice.", rich_help_panel=SERVING
        ),
    ] = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
) -> None:
    """Package a checked bundle for a serving engine, or as one .tar file."""
    from fcos_deploy.bundle import open_bundle, pack
    from fcos_deploy.serving import ServingOptions, package_bundle

    keys = trusted_keys(public_key, required=require_signature)
    if not serving:
        pack(bundle, output, public_keys=keys)
        note(f"packed '{bundle}' into '{output}'")
        return
    options = ServingOptions(
        name=name,
        url=server,
        backend=backend,
        precision=precision,
        version=version,
        max_batch=max_batch,
        queue_delay_us=queue_delay_us,
        instances=instances,
        gpus=tuple(gpu or ()),
    )
    with open_bundle(bundle, public_keys=keys) as opened:
        model = package_bundle(opened, server=serving, output=output, options=options)
    note(
        f"wrote '{output}' for {serving}: model '{model.name}' from {model.artifact.path} ({model.artifact.precision})"
    )
