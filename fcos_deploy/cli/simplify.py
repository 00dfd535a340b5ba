"""``fcos-deploy simplify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar

__all__ = ["command"]


def command(
    model: cli.Graph, *, output: Annotated[Path, cli.output("ONNX file to write.")], as_json: cli.Json = False
) -> None:
    """Simplify an ONNX graph and check that its outputs stay the same; dynamic axes stay dynamic."""
    from exporters.simplify import simplify_onnx

    with progress_bar() as progress:
        result = simplify_onnx(model, output, progress=progress)
    note(result.summary())
    if as_json:
        print_json(result.to_json())
