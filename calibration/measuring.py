"""A graph that measures its own tensors.

A graph that hands out its activations holds all of them until the inference ends: gigabytes for a ResNet-50 at
800x1333. A graph that measures them itself hands out half a megabyte of each at most, whatever the image's size, so
that one inference is enough.
"""

from __future__ import annotations

import heapq
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import runtimes.onnxruntime
from calibration.execution import open_engine
from fcos_deploy.core.backend import Session, Tensors
from fcos_deploy.core.errors import BackendLoadError, CalibrationError
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_file import with_outputs

__all__ = [
    "SAMPLES",
    "TensorSample",
    "in_order_of_release",
    "measure",
    "measuring_model",
    "open_measuring",
    "read_sample",
]

onnx = lazy_import("onnx", extra="export")

# Values of one tensor of one image that enter its histogram.
SAMPLES = 1 << 17
_MARK = "fcos_deploy.statistics"  # begins the names of everything that is added to a graph


@dataclass(frozen=True, slots=True)
class TensorSample:
    """A tensor of one image.

    ``values``: (n,) float32, evenly spaced ones in the tensor's order. ``minimum``, ``maximum``: of all of its values.
    ``channel_means``: (channels,) float64 of a tensor (n, channels, h, w), empty for others. ``finite``: whether no
    value is NaN or infinite.
    """

    values: NDArray[np.float32]
    minimum: float
    maximum: float
    channel_means: NDArray[np.float64]
    finite: bool


def _step(size: int, samples: int) -> int:
    """From one counted value to the next: 1 while there are at most ``samples``."""
    # ceil(size / samples), made odd: an even step would see the same columns of every row of an even-width map.
    return -(-size // samples) | 1 if size > samples else 1


def measure(values: NDArray[np.float32], *, samples: int = SAMPLES) -> TensorSample:
    """Of an array of any shape with at least one value; about ``samples`` values are kept."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    means = values.reshape(*values.shape[:2], -1).mean(2).mean(0) if values.ndim == 4 else np.zeros(0)
    low, high = float(flat.min()), float(flat.max())
    return TensorSample(
        np.ascontiguousarray(flat[:: _step(flat.size, samples)]),
        low,
        high,
        means.astype(np.float64),
        math.isfinite(low) and math.isfinite(high),
    )


def measuring_model(model: Any, names: Sequence[str], *, samples: int = SAMPLES) -> Any:  # onnx.ModelProto, untyped
    """A copy of the model whose outputs are ``measure`` of the named float tensors; ``read_sample`` reads them.

    The step between samples is computed in the graph where the shape follows the image.
    """
    copy = with_outputs(model, (f"{_MARK}.{part}:{name}" for name in names for part in _PARTS))
    known = [*onnx.shape_inference.infer_shapes(model).graph.value_info, *model.graph.output]
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in known}
    writer = _StatisticsWriter(samples)
    for name in names:
        writer.add(name, shapes.get(name, []))
    nodes = list(copy.graph.node)
    del copy.graph.node[:]
    for node in nodes:  # Each tensor's statistics stand right behind the node that makes it.
        copy.graph.node.append(node)
        for output in node.output:
            copy.graph.node.extend(writer.nodes.get(output, []))
    copy.graph.initializer.extend(writer.constants.values())
    return copy


_PARTS = ("samples", "min", "max", "means")


class _StatisticsWriter:
    """The nodes that measure tensors, by tensor, and the constants that they share."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.nodes: dict[str, list[Any]] = defaultdict(list)
        self.constants: dict[int, Any] = {}

    def add(self, tensor: str, shape: Sequence[int]) -> None:
        """``shape``: a 0 for each dimension that is not known; empty when the rank is not known either."""

        def node(operator: str, *inputs: str, part: str, **attributes: int) -> str:
            output = f"{_MARK}.{part}:{tensor}"
            self.nodes[tensor].append(onnx.helper.make_node(operator, inputs, [output], name=output, **attributes))
            return output

        flat = node("Reshape", tensor, self._constant(-1), part="flat")
        node("ReduceMin", flat, part="min", keepdims=0)
        node("ReduceMax", flat, part="max", keepdims=0)
        if len(shape) == 4:
            node("GlobalAveragePool", tensor, part="means")
        else:
            node("ReduceMean", flat, part="means", keepdims=0)
        size = math.prod(shape)
        if shape and size:
            step = self._constant(_step(size, self._samples))
        else:  # As _step: ceil(size / samples) | 1, which is 1 for a size of up to samples.
            rounded = node("Add", node("Shape", flat, part="size"), self._constant(self._samples - 1), part="rounded")
            quotient = node("Div", rounded, self._constant(self._samples), part="quotient")
            odd = node("Mod", quotient, self._constant(2), part="odd")
            even = node("Sub", quotient, odd, part="even")
            step = node("Add", even, self._constant(1), part="step")
        end = self._constant(int(np.iinfo(np.int64).max))
        node("Slice", flat, self._constant(0), end, self._constant(0), step, part="samples")

    def _constant(self, value: int) -> str:
        """The name of an int64 (1,) with this value."""
        name = f"{_MARK}.constant:{value}"
        self.constants[value] = onnx.numpy_helper.from_array(np.array([value], np.int64), name)
        return name


def read_sample(outputs: Tensors, name: str) -> TensorSample:
    """A tensor's sample out of the outputs of ``measuring_model``."""
    values, low, high, means = (outputs[f"{_MARK}.{part}:{name}"] for part in _PARTS)
    return TensorSample(
        np.ascontiguousarray(values),
        float(low),
        float(high),
        means.reshape(*means.shape[:2]).mean(0, dtype=np.float64) if means.ndim == 4 else np.zeros(0),
        # Minimum and maximum may pass over a NaN; a mean does not.
        bool(np.isfinite(means).all()) and math.isfinite(low) and math.isfinite(high),
    )


def in_order_of_release(model: Any) -> Any:  # onnx.ModelProto, untyped
    """Put the nodes of a measuring model into the order in which its tensors can be released soonest, in place.

    A tensor is measured, and brought into the layout for that, before the network goes on. ONNX Runtime's own order
    leaves both to the end, when every tensor of the network is still held.
    """
    nodes = list(model.graph.node)
    maker = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    readers: dict[int, list[int]] = defaultdict(list)
    missing = []
    for index, node in enumerate(nodes):
        sources = {maker[name] for name in node.input if name in maker}
        missing.append(len(sources))
        for source in sources:
            readers[source].append(index)

    def rank(index: int) -> tuple[bool, int]:
        node = nodes[index]
        # ReorderOutput: ONNX Runtime's operator from its blocked layout back to the graph's.
        return not (node.output[0].startswith(_MARK) or node.op_type == "ReorderOutput"), index

    ready = [rank(index) for index, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    del model.graph.node[:]
    while ready:
        _, index = heapq.heappop(ready)
        model.graph.node.append(nodes[index])
        for reader in readers[index]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, rank(reader))
    return model


def open_measuring(
    engine: str, model: Any, *, tensors: Sequence[str], samples: int = SAMPLES, threads: int | None = None
) -> Session:
    """A session of the ``measuring_model`` of a model; it holds few tensors at a time, whatever the image's size.

    Raises:
        MissingDependencyError, BackendLoadError: as ``open_engine``.
        CalibrationError: there is no room for a temporary copy of the graph.
    """
    measuring = measuring_model(model, tensors, samples=samples)
    if engine != "onnxruntime":
        return open_engine(engine, measuring, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        try:
            runtimes.onnxruntime.open_model(
                measuring.SerializeToString(), threads=threads, save_optimized=optimized
            ).close()
        except BackendLoadError as error:
            open_engine(
                engine, measuring, threads=threads
            ).close()  # Raises where it is the graph that cannot be opened.
            raise CalibrationError(
                f"Cannot write the graph of a calibration to '{folder}'.",
                hint="make room there, or name another folder in TMPDIR",
            ) from error
        del measuring  # Its weights, and those of the graph in order, are not needed beside the session's.
        content = in_order_of_release(onnx.load(str(optimized))).SerializeToString()
    return runtimes.onnxruntime.open_model(
        content,
        threads=threads,
        optimization=runtimes.onnxruntime.GraphOptimization.DISABLED,
        order=runtimes.onnxruntime.NodeOrder.FILE,
    )
