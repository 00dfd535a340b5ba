"""``fcos-deploy doctor``."""

from __future__ import annotations

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json

__all__ = ["command"]


def command(*, target: cli.Target = "", as_json: cli.Json = False) -> None:
    """List what works on this machine, what does not, and how to fix it.

    With --target the machine is compared with a device profile; exit code 1 when it differs.
    """
    from fcos_deploy.core.errors import DeviceError
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.targets.doctor import compare, difference_lines, examine, lines
    from fcos_deploy.targets.profiles import load_profile

    profile = load_profile(target) if target else None
    examination = examine()
    differences = compare(examination, profile) if profile else ()
    if as_json:
        print_json({"findings": to_json(examination.findings), "differences": to_json(differences)})
    for line in (*lines(examination.findings), *difference_lines(differences)):
        note(line)
    if differences:
        raise DeviceError(f"This machine is not a '{target}': {', '.join(d.name for d in differences)}.")
