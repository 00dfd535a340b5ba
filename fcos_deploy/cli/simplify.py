"""``fcos-deploy simplify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.output import note, print_json, progress_bar

__all__ = ["command"]


def command(
    model: Annotated[Path, typer.Argument(help="ONNX graph.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Write a smaller graph with the same outputs; open axes stay open."""
    from exporters.simplify import simplify_onnx

    with progress_bar() as progress:
        made = simplify_onnx(model, output, progress=progress)
    note(made.summary())
    if as_json:
        print_json(made.to_json())
