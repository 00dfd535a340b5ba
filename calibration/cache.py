"""Calibration files: ``calibration.json``, tied to one graph, and the calibration cache of old TensorRT versions."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.placement import ConvGraph
from calibration.ranges import Range, RangeMethod
from fcos_deploy.core.errors import CalibrationError, ConfigError
from fcos_deploy.core.files import MAX_TEXT_BYTES, read_file, write_text
from fcos_deploy.core.onnx_graph import OnnxGraph
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.core.serialize import from_json, parse_json, to_json
from runtimes._tensorrt_library import calibration_cache_number

__all__ = [
    "Calibration",
    "ImageRecord",
    "TensorRanges",
    "load_calibration",
    "save_calibration",
    "write_trt_cache",
]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image that was used."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorRanges:
    """What was seen of a tensor, and the range that each method finds.

    ``ranges`` is empty for a tensor that is zero for every image: nothing tells a range, so that it stays float.
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
    """Ranges of the activations of the graph with this hash; ``method`` is the one that a quantizer uses."""

    graph_sha256: str
    method: RangeMethod
    preprocess: PreprocessSpec
    seed: int
    engine: str
    images: tuple[ImageRecord, ...]
    tensors: dict[str, TensorRanges]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            ends = [end for limits in tensor.ranges.values() for end in (limits.low, limits.high, limits.amax)]
            if not np.isfinite([tensor.minimum, tensor.maximum, tensor.zero_share, *ends]).all():
                raise CalibrationError(f"The ranges of tensor '{name}' are not finite.", hint="calibrate again")

    @property
    def zero_tensors(self) -> tuple[str, ...]:
        """Those that are zero for every image."""
        return tuple(name for name, tensor in self.tensors.items() if not tensor.ranges)

    def range_of(self, tensor: str) -> Range:
        """The range to quantize a tensor with.

        Raises:
            CalibrationError: the tensor was not observed.
        """
        ranges = self.tensors[tensor].ranges if tensor in self.tensors else {}
        if self.method not in ranges:
            raise CalibrationError(f"The calibration has no range for tensor '{tensor}'.", hint="calibrate again")
        return ranges[self.method]

    def with_method(self, method: RangeMethod) -> Calibration:
        """The same statistics under another method."""
        return replace(self, method=method)

    def check_graph(self, graph: OnnxGraph) -> None:
        """Refuse a graph that this calibration was not made on.

        Raises:
            CalibrationError: naming both hashes.
        """
        if graph.sha256 != self.graph_sha256:
            raise CalibrationError(
                f"The calibration belongs to the graph {self.graph_sha256[:12]}, '{graph.path}' is "
                f"{graph.sha256[:12]}.",
                hint=f"fcos-deploy calibrate {graph.path} --images DIR -o calibration.json",
            )


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write it, atomically."""
    write_text(path, json.dumps(to_json(calibration), indent=1, sort_keys=True) + "\n")


def load_calibration(path: Path) -> Calibration:
    """Read a calibration; whether it belongs to a graph is checked where both are used.

    Raises:
        CalibrationError: not a calibration file, or of another schema version.
    """
    try:
        content = parse_json(read_file(path, limit=MAX_TEXT_BYTES))
    except OSError as error:
        raise CalibrationError(
            f"Cannot read the calibration '{path}': {error.strerror or error}.",
            hint="'fcos-deploy calibrate' writes one",
        ) from error
    except ValueError as error:
        raise CalibrationError(f"'{path}' is not a calibration file: {error}.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CalibrationError(
            f"'{path}' has calibration schema version {version!r}, this fcos-deploy reads {SCHEMA_VERSION}.",
            hint="calibrate again",
        )
    try:
        return from_json(Calibration, content, where="calibration")
    except ConfigError as error:
        raise CalibrationError(f"'{path}' is damaged: {error.message}", hint="calibrate again") from error


_ALGORITHM = "EntropyCalibration2"  # The only one that DLAs take; with a complete cache it computes nothing.


def write_trt_cache(calibration: Calibration, graph: ConvGraph, output: Path, *, version: str) -> None:
    """Write the cache for the float graph that the calibration belongs to and one TensorRT version, such as "10.3.0".

    A header, then one line a tensor in graph order, named as in the ONNX graph, with the scale as the eight hexadecimal
    digits of a big-endian float32. TensorRT refuses a cache of another version than its own.

    Raises:
        ConfigError: a version that has no calibration cache, or is none.
        CalibrationError: the calibration is of another graph.
    """
    header = f"TRT-{calibration_cache_number(version)}-{_ALGORITHM}"
    calibration.check_graph(graph.source)
    zero = set(calibration.zero_tensors)  # TensorRT computes in float what has no scale.
    amax = {name: calibration.range_of(name).amax for name in graph.activations if name not in zero}
    # TensorRT fuses a ReLU, but asks for the scale of what stands before it as well.
    behind = {conv.output: conv.result for conv in graph.convs} | {add.output: add.result for add in graph.adds}
    amax |= {name: amax[result] for name, result in behind.items() if name not in amax and result in amax}
    # Symmetric int8: the largest magnitude becomes 127.
    scales = [f"{name}: {struct.pack('!f', value / 127.0).hex()}" for name, value in amax.items()]
    write_text(output, "\n".join([header, *scales]) + "\n")
