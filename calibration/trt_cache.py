"""Writes the same ranges as a TensorRT calibration cache, for TensorRT up to 10 and for DLAs (spec 2.3)."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from calibration.calibration_file import Calibration, check_graph
from calibration.graph import load_graph
from fcos_deploy.core.atomic import write_text
from fcos_deploy.core.errors import ConfigError

__all__ = ["cache_lines", "write_trt_cache"]

_ALGORITHM = "EntropyCalibration2"  # The only one that DLAs take; with a complete cache it computes nothing.


def write_trt_cache(calibration: Calibration, graph: Path, output: Path, *, version: str) -> None:
    """Write the cache for the float graph that the calibration belongs to and one TensorRT version, such as "10.3.0".

    Tensors are named as in the ONNX graph. TensorRT refuses a cache of another version than its own.

    Raises:
        ConfigError: a version that has no calibration cache, or is none.
        CalibrationError: the calibration is of another graph.
    """
    check_graph(calibration, graph)
    write_text(output, "\n".join(cache_lines(calibration, graph, version=version)) + "\n")


def cache_lines(calibration: Calibration, graph: Path, *, version: str) -> list[str]:
    """Header and one line a tensor, in graph order."""
    found = load_graph(graph)
    amax = {name: calibration.range_of(name).amax for name in found.activations()}
    # TensorRT fuses the ReLU, but asks for the scale of what stands before it as well.
    amax |= {conv.output: amax[conv.result] for conv in found.convs}
    amax |= {add.output: amax[add.result] for add in found.adds}
    return [f"TRT-{_version_number(version)}-{_ALGORITHM}", *(f"{name}: {_hex(a / 127.0)}" for name, a in amax.items())]


def _hex(scale: float) -> str:
    """Eight digits: the float32 scale, most significant byte first."""
    return struct.pack("!f", scale).hex()


def _version_number(version: str) -> int:
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.\d+)*", version)
    if match is None:
        raise ConfigError(f"'{version}' is not a TensorRT version.", hint="such as 8.5.2 or 10.3.0")
    major, minor, patch = (int(part or 0) for part in match.groups())
    if not 7 <= major <= 10:
        raise ConfigError(
            f"TensorRT {version} takes no calibration cache.", hint="build from the portable INT8 graph instead"
        )
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch
