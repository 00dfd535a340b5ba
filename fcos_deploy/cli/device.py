"""``fcos-deploy setup``, ``verify``, ``install`` and ``rollback``: a bundle on the device that it is to run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import Trust

__all__ = ["install_command", "rollback_command", "setup_command", "verify_command"]


@cli.with_signature_options
def setup_command(
    bundle: cli.Bundle,
    *,
    backend: cli.Backend = "",
    trust: Trust,
    export: cli.DeviceRecord = None,
    as_json: cli.Json = False,
) -> None:
    """Set a bundle up on this device: build what must be built here, verify it, and choose by measured latency.

    The certified files stay as they are. An interrupted run resumes. Exit code 4: what was built is
    not the certified detector, or the golden images cannot decide it.
    """
    from fcos_deploy.accuracy.verify import export_record
    from fcos_deploy.bundle import open_trusted
    from fcos_deploy.pipeline.device import SetupRequest, set_up

    with progress_bar() as progress:
        report = set_up(SetupRequest(bundle=bundle, backend=backend, trust=trust), progress=progress)
    for fact in report.facts:
        note(f"{fact.name}: {fact.value}" + (f" ({fact.warning})" if fact.warning else ""))
    for name in report.built:
        note(f"built: {name}")
    for name in report.kept:
        note(f"kept: {name}")
    for precision, reason in report.skipped.items():
        note(f"without {precision}: {reason}")
    for record in report.records:
        time = f", {report.latency_ms[record.precision]:.1f} ms" if record.precision in report.latency_ms else ""
        note(f"{record.outcome}: {record.artifact}{time}; {record.summary}")
    note(f"chosen: {report.chosen.artifact}")
    if export is not None:
        with open_trusted(bundle, replace(trust, local_builds=True)) as opened:
            signer = export_record(export, report.chosen, bundle=opened, latency_ms=report.latency_ms)
        note(f"wrote '{export}'" + (f", signed by device key {signer[:16]}..." if signer else ", not signed"))
    if as_json:
        print_json(to_json(report))


@cli.with_trust_options
@cli.with_server_options
def verify_command(
    bundle: cli.Bundle,
    *,
    backend: cli.Backend = "",
    precision: cli.BundlePrecision = None,
    device: cli.Device = "",
    server: cli.Server = "",
    trtexec_record: Annotated[
        Path | None,
        cli.RUNTIME.option(
            "Record that run_trtexec.py of 'package --for trtexec' wrote on a device, in place of a runtime.",
            metavar="FILE",
        ),
    ] = None,
    allow_fallback: cli.AllowFallback = False,
    trust: Trust,
    allow_engine_code: cli.AllowEngineCode = False,
    log: Annotated[
        Path | None, cli.OUTPUT.option("Log to append the record to. Default: the bundle's.", metavar="FILE")
    ] = None,
    export: cli.DeviceRecord = None,
    allow_inconclusive: cli.AllowInconclusive = False,
    junit: cli.Junit = None,
    as_json: cli.Json = False,
) -> None:
    """Verify on this machine that a bundle gives the detections it was certified with, on its golden images.

    Exit code 4: the detections differ, or the golden images cannot decide it.
    """
    from fcos_deploy.accuracy import verify
    from fcos_deploy.accuracy.gate import write_junit
    from fcos_deploy.bundle import open_trusted

    options = verify.VerifyOptions(
        backend=backend,
        server=server,
        recorded=verify.read_recorded_run(trtexec_record) if trtexec_record else None,
        precision=precision,
        allow_fallback=allow_fallback,
        session=SessionOptions(device=device, allow_engine_code=allow_engine_code or bool(trust.public_keys)),
    )
    with open_trusted(bundle, trust) as opened, progress_bar() as progress:
        record = verify.verify_bundle(opened, options=options, progress=progress)
        written = verify.write_record(record, bundle=opened, log=log)
        if export is not None:
            verify.export_record(export, record, bundle=opened)
    if as_json or written is None:
        print_json(to_json(record))
    if junit is not None:
        verdicts = verify.record_verdicts(record)
        write_junit(junit, verdicts, suite="fcos-deploy verify", allow_inconclusive=allow_inconclusive)
    for fallback in record.fallbacks:
        note(f"fallback from {fallback.backend}: {fallback.reason}")
    verify.require_verified(record, allow_inconclusive=allow_inconclusive)
    word = "verified" if record.passed else record.outcome
    note(f"{word}: {record.artifact} on {record.backend} in {record.seconds:.1f} s; {record.summary}")


@cli.with_signature_options
def install_command(
    bundle: cli.Bundle,
    link: cli.InstalledLink,
    *,
    backend: cli.Backend = "",
    keep: Annotated[int, cli.option("Earlier versions that stay on the disk, for 'rollback'.", min=1)] = 1,
    trust: Trust,
    allow_inconclusive: cli.AllowInconclusive = False,
    as_json: cli.Json = False,
) -> None:
    """Install a bundle on this device: copy it, build what must be built here, verify it, and switch LINK to it.

    LINK points to a complete, verified bundle at all times. Exit code 0: the new version is in use. With any other
    code the old one still is; 4: the new one is not the certified detector here, or the golden images cannot decide it.
    """
    from fcos_deploy.pipeline.device import InstallRequest, install

    request = InstallRequest(
        bundle=bundle, link=link, backend=backend, trust=trust, keep=keep, allow_inconclusive=allow_inconclusive
    )
    with progress_bar() as progress:
        report = install(request, progress=progress)
    for name in report.built:
        note(f"built: {name}")
    for name in report.removed:
        note(f"removed: version {name}")
    before = f", before {report.previous}" if report.previous not in ("", report.version) else ""
    note(f"installed: '{report.link}' is '{report.bundle}', version {report.version}{before}; {report.record.summary}")
    if as_json:
        print_json(to_json(report))


@cli.with_signature_options
def rollback_command(
    link: cli.InstalledLink,
    *,
    backend: cli.Backend = "",
    trust: Trust,
    allow_inconclusive: cli.AllowInconclusive = False,
    as_json: cli.Json = False,
) -> None:
    """Go back to the version that LINK led to before, after verifying it on this device.

    Versions that are damaged or no longer verified here are passed over. Exit code 0: an earlier version is in use.
    Any other: LINK is as it was.
    """
    from fcos_deploy.pipeline.device import RollbackRequest, roll_back

    request = RollbackRequest(link=link, backend=backend, trust=trust, allow_inconclusive=allow_inconclusive)
    with progress_bar() as progress:
        report = roll_back(request, progress=progress)
    for name, reason in report.passed_over.items():
        note(f"passed over: version {name}: {reason}")
    note(f"rolled back: '{report.link}' is '{report.bundle}', version {report.version}, before {report.previous}")
    if as_json:
        print_json(to_json(report))
