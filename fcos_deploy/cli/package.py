"""``fcos-deploy package``: a bundle as a serving engine wants it, or as one .tar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, trusted_keys
from fcos_deploy.core.enums import Precision

__all__ = ["command"]


def command(
    bundle: Annotated[Path, typer.Argument(help="folder or .tar made by 'fcos-deploy deploy'")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write; a name ending in .tar packs")],
    server: Annotated[str, typer.Option("--for", help="triton, ovms, deepstream or kserve")] = "",
    url: Annotated[str, typer.Option(help="address of the served model, for --for kserve")] = "",
    name: Annotated[str, typer.Option(help="name of the served model; the bundle's when not given")] = "",
    backend: Annotated[str, typer.Option(help="serve the artifact made for this runtime")] = "",
    precision: Annotated[Precision | None, typer.Option(help="serve the artifact of this precision")] = None,
    version: Annotated[int, typer.Option(help="version of the served model")] = 1,
    max_batch: Annotated[int, typer.Option(help="join requests to batches of at most this many")] = 0,
    queue_delay_us: Annotated[int, typer.Option(help="longest wait for a batch to fill, in microseconds")] = 2000,
    instances: Annotated[int, typer.Option(help="copies of the model that run side by side")] = 1,
    gpu: Annotated[list[int] | None, typer.Option(help="GPU to serve on; may be given several times")] = None,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
) -> None:
    """Write what a serving engine reads, from a checked bundle; without --for, pack the bundle into one .tar."""
    from fcos_deploy.bundle import open_bundle, pack
    from fcos_deploy.cli.output import note
    from fcos_deploy.serving import ServingOptions, package_bundle

    keys = trusted_keys(public_key, required=require_signature)
    if not server:
        pack(bundle, output, public_keys=keys)
        note(f"packed '{bundle}' into '{output}'")
        return
    options = ServingOptions(
        name=name,
        url=url,
        backend=backend,
        precision=precision,
        version=version,
        max_batch=max_batch,
        queue_delay_us=queue_delay_us,
        instances=instances,
        gpus=tuple(gpu or ()),
    )
    with open_bundle(bundle, public_keys=keys) as opened:
        model = package_bundle(opened, server=server, output=output, options=options)
    note(f"wrote '{output}' for {server}: model '{model.name}' from {model.artifact.path} ({model.artifact.precision})")
