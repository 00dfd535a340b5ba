"""``fcos-deploy setup``."""

from __future__ import annotations

from dataclasses import replace

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.trust import Trust

__all__ = ["command"]


@cli.with_signature_options
def command(
    bundle: cli.Bundle,
    *,
    backend: cli.Backend = "",
    trust: Trust,
    export: cli.DeviceRecord = None,
    as_json: cli.Json = False,
) -> None:
    """Set a bundle up on this device: build what must be built here, verify it, and choose by measured latency.

    The certified files stay as they are. An interrupted run goes on where it stopped. Exit code 4: what was built is
    not the certified detector, or the golden images cannot decide it.
    """
    from fcos_deploy.accuracy.device_record import export_record
    from fcos_deploy.bundle import open_trusted
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.pipeline.setup import SetupRequest, set_up

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
