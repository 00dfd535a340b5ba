"""``fcos-deploy package``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note
from fcos_deploy.core.trust import Trust

__all__ = ["package_command"]


@cli.with_signature_options
def package_command(
    bundle: cli.Bundle,
    *,
    output: Annotated[
        Path, cli.output("Folder to write; without --for the .tar file to pack the bundle into.", metavar="PATH")
    ],
    serving: Annotated[
        str,
        cli.option(
            "Its use: triton, ovms, deepstream, dlstreamer, kserve, trtexec, cpp, oci. Default: none, pack a .tar.",
            "--for",
            metavar="NAME",
        ),
    ] = "",
    backend: cli.Backend = "",
    target: cli.Target = "",
    precision: cli.BundlePrecision = None,
    name: Annotated[
        str, cli.option("Name of the served model. Default: the bundle's.", metavar="NAME", panel=cli.SERVING)
    ] = "",
    version: Annotated[int, cli.option("Version of the served model.", panel=cli.SERVING)] = 1,
    server: cli.Server = "",
    max_batch: Annotated[int, cli.option("Largest batch to join requests into; 0 for none.", panel=cli.SERVING)] = 0,
    queue_delay_us: Annotated[
        int, cli.option("Longest wait for a batch to fill, in microseconds.", metavar="US", panel=cli.SERVING)
    ] = 2000,
    instances: Annotated[int, cli.option("Instances of the model that run side by side.", panel=cli.SERVING)] = 1,
    gpu: Annotated[
        list[int] | None, cli.option("GPU to serve on, repeatable. Default: the engine's choice.", panel=cli.SERVING)
    ] = None,
    trust: Trust,
) -> None:
    """Package a checked bundle for a serving engine, or as one .tar file."""
    from fcos_deploy.bundle import open_trusted, pack
    from fcos_deploy.serving import ServingOptions, package_bundle

    if not serving:
        pack(bundle, output, trust=trust)
        note(f"packed '{bundle}' into '{output}'")
        return
    options = ServingOptions(
        name=name,
        url=server,
        backend=backend,
        precision=precision,
        target=target,
        version=version,
        max_batch=max_batch,
        queue_delay_us=queue_delay_us,
        instances=instances,
        gpus=tuple(gpu or ()),
    )
    with open_trusted(bundle, trust) as opened:
        model = package_bundle(opened, server=serving, output=output, options=options)
    note(
        f"wrote '{output}' for {serving}: model '{model.name}' from {model.artifact.path} ({model.artifact.precision})"
    )
