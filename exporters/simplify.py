"""onnxsim plus our own passes where it leaves something; the outputs are compared before anything is returned."""

from __future__ import annotations

from typing import Any

from exporters.step_check import Feeds, StepCheck, compare, onnx_runner
from fcos_deploy.core.errors import ExportError
from fcos_deploy.core.require import require

__all__ = ["simplified"]

_TOLERANCE = 1e-4


def simplified(model: Any, feeds: list[Feeds]) -> tuple[Any, StepCheck]:
    """A smaller graph with the same outputs on ``feeds``."""
    onnxsim = require("onnxsim", extra="export")
    try:
        result, _ = onnxsim.simplify(model, check_n=0)
    except Exception as error:  # onnxsim raises whatever its C++ core reports
        raise ExportError(f"onnxsim cannot simplify this graph: {error}.", hint="--no-simplify") from error
    return result, compare(onnx_runner(model), onnx_runner(result), feeds, step="simplify", tolerance=_TOLERANCE)
