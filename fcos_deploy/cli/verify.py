"""``fcos-deploy verify``: whether this machine gives the certified detections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import AllowFallback, PublicKeys, RequireSignature, trusted_keys
from fcos_deploy.core.enums import Precision

__all__ = ["command"]


def command(
    bundle: Annotated[Path, typer.Argument(help="folder or .tar made by 'fcos-deploy deploy'")],
    backend: Annotated[str, typer.Option(help="runtime to verify; the bundle's own choice when not given")] = "",
    precision: Annotated[Precision | None, typer.Option(help="the bundle's own choice when not given")] = None,
    server: Annotated[
        str,
        typer.Option(help="verify a served model in place of a local runtime, such as http://HOST:8000/v2/models/NAME"),
    ] = "",
    device: Annotated[str, typer.Option(help="device in the backend's own words, such as cpu, GPU.0, cuda:0")] = "",
    allow_fallback: AllowFallback = False,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    log: Annotated[Path | None, typer.Option(help="append the record here, not to the bundle's own log")] = None,
    junit: Annotated[Path | None, typer.Option(help="write the verdicts as JUnit XML")] = None,
    json: Annotated[bool, typer.Option("--json", help="print the record as JSON on stdout")] = False,
) -> None:
    """Replay the bundle's golden images on this machine; exit 0 when the certified detections come out, 4 when not."""
    from fcos_deploy.accuracy.gate import write_junit
    from fcos_deploy.accuracy.verify import (
        VerifyOptions,
        record_verdicts,
        require_verified,
        verify_bundle,
        write_record,
    )
    from fcos_deploy.bundle import open_bundle
    from fcos_deploy.cli.output import note, print_json, progress_bar
    from fcos_deploy.core.backend import SessionOptions
    from fcos_deploy.core.serialize import to_json

    options = VerifyOptions(
        backend=backend,
        server=server,
        precision=precision,
        allow_fallback=allow_fallback,
        session=SessionOptions(device=device),
    )
    keys = trusted_keys(public_key, required=require_signature)
    with open_bundle(bundle, public_keys=keys) as opened, progress_bar() as progress:
        record = verify_bundle(opened, options=options, signed_by=opened.signed_by, progress=progress)
        written = write_record(record, bundle=opened, log=log)
    if json or written is None:
        print_json(to_json(record))
    if junit is not None:
        write_junit(junit, record_verdicts(record), suite="fcos-deploy verify")
    for fallback in record.fallbacks:
        note(f"fallback from {fallback.backend}: {fallback.reason}")
    require_verified(record)
    note(f"verified: {record.artifact} on {record.backend} in {record.seconds:.1f} s; {record.summary}")
