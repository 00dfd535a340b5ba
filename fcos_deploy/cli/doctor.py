"""``fcos-deploy doctor``: what works on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    target: Annotated[str, typer.Option(help="Device profile to compare this machine with.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Say what works here, what does not, and what mends it."""
    from fcos_deploy.cli.output import note, print_json
    from fcos_deploy.core.errors import DeviceError
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.targets.doctor import compare, difference_lines, examine, lines
    from fcos_deploy.targets.profiles import load_profile

    profile = load_profile(target) if target else None
    examination = examine()
    differences = compare(examination, profile) if profile else ()
    if as_json:
        print_json({"findings": to_json(examination.findings), "differences": to_json(differences)})
    for line in lines(examination.findings):
        note(line)
    for line in difference_lines(differences):
        note(line)
    if differences:
        raise DeviceError(f"This machine is not a '{target}': {', '.join(d.name for d in differences)}.")
