"""``fcos-deploy install`` and ``rollback``."""

from __future__ import annotations

from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.trust import Trust

__all__ = ["install_command", "rollback_command"]


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

    LINK leads to a whole, verified bundle at every moment. Exit code 0: the new version is in use. Any other: the old
    one still is; 4: the new one is not the certified detector here, or the golden images cannot decide it.
    """
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.pipeline.install import InstallRequest, install

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
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.pipeline.install import RollbackRequest, roll_back

    request = RollbackRequest(link=link, backend=backend, trust=trust, allow_inconclusive=allow_inconclusive)
    with progress_bar() as progress:
        report = roll_back(request, progress=progress)
    for name, reason in report.passed_over.items():
        note(f"passed over: version {name}: {reason}")
    note(f"rolled back: '{report.link}' is '{report.bundle}', version {report.version}, before {report.previous}")
    if as_json:
        print_json(to_json(report))
