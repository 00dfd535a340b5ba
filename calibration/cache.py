"""calibration.json: the ranges of one graph, by every method, readable and tied to that graph."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.placement import load_graph
from calibration.ranges import Range, RangeMethod
from fcos_deploy.core.errors import CalibrationError, ConfigError
from fcos_deploy.core.files import sha256_file, write_text
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from runtimes._tensorrt_library import calibration_cache_number

__all__ = [
    "DEFAULT_METHOD",
    "Calibration",
    "ImageRecord",
    "TensorRanges",
    "cache_lines",
    "load_calibration",
    "save_calibration",
    "write_trt_cache",
]

SCHEMA_VERSION = 1
# Shares the lead over the models and placements of docs/int8.md.
DEFAULT_METHOD = RangeMethod.PERCENTILE


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image that was used."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorRanges:
    """What was seen of a tensor, and what each method makes of it.

    ``channel_means``: numbers in one text, so that the file stays readable; empty where they are not known.
    """

    minimum: float
    maximum: float
    zero_share: float
    ranges: dict[str, Range]
    channel_means: str = ""

    def means(self) -> NDArray[np.float32]:
        """(channels,), or (0,) when they are not known.

        Raises:
            CalibrationError: the text is not one of finite numbers.
        """
        try:
            means = np.array(self.channel_means.split(), np.float32)
        except ValueError as error:
            raise CalibrationError("The calibration's channel means are damaged.", hint="calibrate again") from error
        if not np.isfinite(means).all():
            raise CalibrationError("The calibration's channel means are not finite.", hint="calibrate again")
        return means


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Ranges of the activations of the graph with this hash.

    ``method`` is the one a quantizer uses unless ``overrides`` names another for a tensor.
    """

    graph_sha256: str
    method: RangeMethod
    preprocess: PreprocessSpec
    seed: int
    engine: str
    images: tuple[ImageRecord, ...]
    tensors: dict[str, TensorRanges]
    overrides: dict[str, RangeMethod]
    schema_version: int = SCHEMA_VERSION

    def range_of(self, tensor: str) -> Range:
        """The range to quantize a tensor with.

        Raises:
            CalibrationError: the tensor was not observed.
        """
        if tensor not in self.tensors:
            raise CalibrationError(f"The calibration has no range for tensor '{tensor}'.", hint="calibrate again")
        return self.tensors[tensor].ranges[self.overrides.get(tensor, self.method)]

    def with_method(self, method: RangeMethod) -> Calibration:
        """The same statistics under another method."""
        return replace(self, method=method, overrides={})


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it, atomically."""
    write_text(path, json.dumps(to_json(calibration), indent=1, sort_keys=True) + "\n")


def load_calibration(path: Path, *, graph: Path | None = None) -> Calibration:
    """Read a calibration, and check that it belongs to ``graph``.

    Raises:
        CalibrationError: not a calibration file, of a newer version, or of another graph.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"'{path}' is not a calibration file: {error}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CalibrationError(
            f"'{path}' has calibration schema version {version!r}, this fcos-deploy reads {SCHEMA_VERSION}.",
            hint="calibrate again",
        )
    try:
        calibration = from_json(Calibration, content, where="calibration")
    except ConfigError as error:
        raise CalibrationError(f"'{path}' is damaged: {error.message}", hint="calibrate again") from error
    if graph is not None:
        check_graph(calibration, graph)
    return calibration


def check_graph(calibration: Calibration, graph: Path) -> None:
    """Raise CalibrationError unless the calibration was made on this file."""
    found = sha256_file(graph)
    if found != calibration.graph_sha256:
        raise CalibrationError(
            f"The calibration belongs to the graph {calibration.graph_sha256[:12]}, '{graph}' is {found[:12]}.",
            hint=f"fcos-deploy calibrate {graph} --images DIR -o calibration.json",
        )


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
    header = f"TRT-{calibration_cache_number(version)}-{_ALGORITHM}"
    return [header, *(f"{name}: {_hex(a / 127.0)}" for name, a in amax.items())]


def _hex(scale: float) -> str:
    """Eight digits: the float32 scale, most significant byte first."""
    return struct.pack("!f", scale).hex()
