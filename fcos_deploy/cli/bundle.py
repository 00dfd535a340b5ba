"""``fcos-deploy package``, ``sign`` and ``verify-signature``: a bundle on its way to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.trust import Trust

__all__ = ["package_command", "sign_command", "verify_signature_command"]


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
            autocompletion=cli.complete_serving,
        ),
    ] = "",
    backend: cli.Backend = "",
    target: cli.Target = "",
    precision: cli.BundlePrecision = None,
    name: Annotated[str, cli.SERVING.option("Name of the served model. Default: the bundle's.", metavar="NAME")] = "",
    version: Annotated[int, cli.SERVING.option("Version of the served model.")] = 1,
    server: cli.Server = "",
    max_batch: Annotated[int, cli.SERVING.option("Largest batch to join requests into; 0 for none.")] = 0,
    queue_delay_us: Annotated[
        int, cli.SERVING.option("Longest wait for a batch to fill, in microseconds.", metavar="US")
    ] = 2000,
    instances: Annotated[int, cli.SERVING.option("Instances of the model that run side by side.")] = 1,
    gpu: Annotated[
        list[int] | None, cli.SERVING.option("GPU to serve on, repeatable. Default: the engine's choice.")
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


def sign_command(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Bundle: the folder that 'fcos-deploy deploy' wrote.")
    ] = None,
    *,
    key: Annotated[Path, cli.TRUST.option("Private key file.", metavar="PEM")] = Path("fcos-deploy-key.pem"),
    generate_key: Annotated[
        bool,
        cli.TRUST.option(
            "New key pair, written before signing: --key and the same name ending in .pub.pem. With --openssf-key, "
            "whichever of the two pairs is missing."
        ),
    ] = False,
    version: Annotated[
        int,
        cli.TRUST.option(
            "Version of the bundle, signed with it; a device refuses lower ones than it has opened. 0: no version.",
            min=0,
        ),
    ] = 0,
    expires: Annotated[
        str, cli.TRUST.option("Last day on which the signature is valid. Default: no end.", metavar="YYYY-MM-DD")
    ] = "",
    openssf_key: Annotated[
        Path | None,
        cli.TRUST.option(
            "EC private key that signs in the OpenSSF Model Signing format too, as model.sig. Default: none.",
            metavar="PEM",
        ),
    ] = None,
    device: Annotated[
        bool,
        cli.TRUST.option(
            "Signature of what was built on this device, with this user's device key (made on first use), in place of "
            "the bundle's with --key."
        ),
    ] = False,
    as_json: cli.Json = False,
) -> None:
    """Sign a bundle's manifest with an Ed25519 key, and thereby every file it lists; the bundle is checked first."""
    from fcos_deploy.bundle import open_bundle
    from fcos_deploy.bundle.device_layer import sign_layers
    from fcos_deploy.bundle.signature import device_public_key, generate_ec_key
    from fcos_deploy.bundle.signature import generate_key as write_key_pair
    from fcos_deploy.bundle.store import sign

    if bundle is None and not generate_key:
        raise ConfigError("Nothing to sign.", hint="give a bundle, or --generate-key")
    if device:
        if bundle is None or generate_key:
            raise ConfigError("--device signs what was built for a bundle.", hint="give the bundle alone")
        with open_bundle(bundle) as opened:
            layers = sign_layers(opened)
        note(f"signed {', '.join(layers)} with the device key; its public half is '{device_public_key()}'")
        if as_json:
            print_json({"layers": layers, "public_key": str(device_public_key()), "bundle": str(bundle)})
        return
    identity = ""
    if generate_key:
        if openssf_key is None or openssf_key.exists() or not key.exists():
            public = key.with_suffix(".pub.pem")
            identity = write_key_pair(key, public=public)
            note(f"wrote '{key}' (keep it secret) and '{public}' (give it to the devices)")
        if openssf_key is not None and not openssf_key.exists():
            generate_ec_key(openssf_key, public=openssf_key.with_suffix(".pub.pem"))
            note(f"wrote '{openssf_key}' (keep it secret) and '{openssf_key.with_suffix('.pub.pem')}'")
    if bundle is not None:
        identity = sign(bundle, private_key=key, version=version, expires=expires, openssf_key=openssf_key)
        note(f"signed '{bundle}' with key {identity[:16]}...")
    if as_json:
        print_json({"key_id": identity, "bundle": str(bundle) if bundle else None})


@cli.with_required_signature
def verify_signature_command(bundle: cli.Bundle, *, trust: Trust, as_json: cli.Json = False) -> None:
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
