"""Runs float and quantized graphs: sessions for calibration, noise of quantization, and the share that runs in INT8."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import runtimes.onnxruntime
import runtimes.openvino
from calibration.placement import ConvGraph
from fcos_deploy.core.artifact import OnnxGraph
from fcos_deploy.core.backend import Session, Tensors, get_backend
from fcos_deploy.core.detections import image_sizes_row
from fcos_deploy.core.errors import (
    BackendError,
    CalibrationError,
    ConfigError,
    MissingDependencyError,
    StepCheckError,
)
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_file import with_outputs
from fcos_deploy.core.preprocess import preprocess

__all__ = [
    "ENGINES",
    "PROFILERS",
    "ExecutedShare",
    "Feeder",
    "Fidelity",
    "compare_models",
    "conv_macs",
    "default_engine",
    "executed_share",
    "open_engine",
]

onnx = lazy_import("onnx", extra="export")

# In the order in which they are preferred.
ENGINES: dict[str, Callable[..., Session]] = {
    "onnxruntime": runtimes.onnxruntime.open_model,
    "openvino": runtimes.openvino.open_model,
}


class Feeder:
    """Turns (h, w, 3) uint8 RGB into feeds for a graph; an exported batch larger than one repeats the image."""

    def __init__(self, source: OnnxGraph) -> None:
        inputs = {value.name: value for value in source.model.graph.input}
        if "images" not in inputs:
            raise CalibrationError(
                f"The graph has no input 'images', but {sorted(inputs)}.", hint="export it with 'fcos-deploy export'"
            )
        self._preprocess = source.contract.preprocess
        self._batch = int(inputs["images"].type.tensor_type.shape.dim[0].dim_value) or 1
        self._needs_sizes = "image_sizes" in inputs

    def __call__(self, image: NDArray[np.uint8]) -> Tensors:
        """``images`` (n, 3, H, W) of the contract's dtype, and ``image_sizes`` (n, 4) where the graph asks for it."""
        tensor, letterbox = preprocess(image, self._preprocess)
        feeds = {"images": np.repeat(tensor[None], self._batch, axis=0)}
        if self._needs_sizes:
            feeds["image_sizes"] = np.repeat(image_sizes_row(letterbox)[None], self._batch, axis=0)
        return feeds


def _gradient() -> NDArray[np.uint8]:
    """(480, 640, 3) uint8: a smooth image, for runs whose values do not matter."""
    rows, columns = np.mgrid[0:480, 0:640]
    return np.stack([rows * 255 // 479, columns * 255 // 639, (rows + columns) * 255 // 1118], 2).astype(np.uint8)


def open_engine(name: str, model: Any, *, threads: int | None = None) -> Session:
    """A session of an onnx.ModelProto in memory, of the engine with this name in ``ENGINES``.

    Raises:
        MissingDependencyError: it is not installed.
        BackendLoadError: it cannot read the model.
    """
    return ENGINES[name](model.SerializeToString(), threads=threads)


def default_engine() -> str:
    """The first engine that is installed: the pass itself takes the same time on both, and ONNX Runtime opens sooner.

    Raises:
        MissingDependencyError: there is none.
    """
    for name in ENGINES:
        if get_backend(name).probe().available:
            return name
    raise MissingDependencyError(
        "Calibration needs onnxruntime or openvino.", hint="pip install 'fcos-deploy[onnxruntime]'"
    )


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Signal-to-noise ratio of each output in decibel, over ``images`` images; 0 images means a colour gradient."""

    sqnr_db: dict[str, float]
    images: int


def compare_models(source: OnnxGraph, result: Any, *, images: Sequence[NDArray[np.uint8]] = ()) -> Fidelity:
    """Run a graph and what was made of it (an onnx.ModelProto) on the same images, (h, w, 3) uint8 RGB.

    Raises:
        StepCheckError: the result does not run, or one of the two gives values that are not finite.
    """
    feeder, names = Feeder(source), [output.name for output in source.model.graph.output]
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    feeds = [feeder(image) for image in images or [_gradient()]]
    float_outputs = _float_outputs(source, feeds)
    try:
        session = open_engine("onnxruntime", result)
    except BackendError as error:
        raise StepCheckError(f"The quantized graph does not run: {error.message}") from error
    with session:
        for feed, expected in zip(feeds, float_outputs, strict=True):
            measured = session.borrow(feed)
            for name in names:
                for which, values in (("float", expected[name]), ("quantized", measured[name])):
                    if values.dtype.kind == "f" and not np.isfinite(values).all():
                        raise StepCheckError(
                            f"Output '{name}' of the {which} graph is not finite.",
                            hint="calibrate on other images" if which == "quantized" else "is the model complete?",
                        )
                exact = expected[name].astype(np.float64)
                signal[name] += float(np.square(exact).sum())
                noise[name] += float(np.square(measured[name].astype(np.float64) - exact).sum())
    # 10 log10 of the ratio of energies; 200 dB stands for equal, where the ratio has no value.
    ratios = {n: 10 * np.log10(max(signal[n], 1e-300) / noise[n]) if noise[n] else 200.0 for n in names}
    return Fidelity({name: round(float(ratio), 2) for name, ratio in ratios.items()}, len(images))


# Of the float graph that was compared last, by hash of graph and feed: every placement is compared with the same one.
_FLOAT_OUTPUTS: dict[str, Tensors] = {}


def _float_outputs(source: OnnxGraph, feeds: Sequence[Tensors]) -> list[Tensors]:
    """What a graph gives for each feed; those of the last call are kept."""
    keys = []
    for feed in feeds:
        digest = hashlib.sha256(source.sha256.encode())
        for name in sorted(feed):
            digest.update(f"{name} {feed[name].dtype} {feed[name].shape}".encode() + feed[name].tobytes())
        keys.append(digest.hexdigest())
    outputs = {key: _FLOAT_OUTPUTS[key] for key in keys if key in _FLOAT_OUTPUTS}
    if len(outputs) < len(set(keys)):
        with open_engine("onnxruntime", source.model) as session:
            outputs = {key: session.run(feed) for key, feed in zip(keys, feeds, strict=True)}
    _FLOAT_OUTPUTS.clear()
    _FLOAT_OUTPUTS.update(outputs)
    return [outputs[key] for key in keys]


@dataclass(frozen=True, slots=True)
class ExecutedShare:
    """Multiply-accumulates of the convolutions for one image, those in INT8 and all."""

    int8_macs: int
    total_macs: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.int8_macs / self.total_macs


def executed_share(graph: ConvGraph, result: Path, backend: str) -> ExecutedShare:
    """Ask a backend of this machine which convolutions of ``result`` (ONNX or IR, made from ``graph``) run in INT8.

    Raises:
        ConfigError: the backend cannot be asked here.
        MissingDependencyError: it is not installed.
    """
    if backend not in PROFILERS:
        raise ConfigError(f"'{backend}' cannot be profiled here.", hint=f"backends: {', '.join(sorted(PROFILERS))}")
    macs, quantized = conv_macs(graph), PROFILERS[backend](result, graph)
    return ExecutedShare(sum(macs[name] for name in quantized), sum(macs.values()))


def conv_macs(graph: ConvGraph) -> dict[str, int]:
    """Multiply-accumulates of each convolution node for one run on a landscape image."""
    feeds = Feeder(graph.source)(_gradient())
    shapes = _inferred_shapes(graph.source.model, feeds)
    unknown = [conv.output for conv in graph.convs if conv.output not in shapes]
    if unknown:
        # The shapes alone: the outputs themselves are gigabytes at 800x1333.
        names = {f"fcos_deploy.shape:{output}": output for output in unknown}
        model = with_outputs(graph.source.model, names, types=dict.fromkeys(names, onnx.TensorProto.INT64))
        model.graph.node.extend(onnx.helper.make_node("Shape", [output], [name]) for name, output in names.items())
        with open_engine("onnxruntime", model) as session:
            shapes |= {names[n]: tuple(v.tolist()) for n, v in session.run(feeds).items() if n in names}
    return {
        conv.name: math.prod(shapes[conv.output]) * math.prod(graph.initializers[conv.weight].dims[1:])
        for conv in graph.convs
    }


_SIZES = 64  # elements of a constant that may be a size; weights have more, and stay out of a model that is copied


def _inferred_shapes(model: Any, feeds: Tensors) -> dict[str, tuple[int, ...]]:
    """The shapes that an onnx.ModelProto gives to tensors for such feeds, as far as ONNX knows its operators."""
    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.output.extend(model.graph.output)
    value = onnx.helper.make_tensor_value_info
    for given in model.graph.input:
        bare.graph.input.append(value(given.name, given.type.tensor_type.elem_type, feeds[given.name].shape))
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SIZES:
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(value(tensor.name, tensor.data_type, tensor.dims))
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return {}
    described = {info.name: info.type.tensor_type.shape.dim for info in (*inferred.value_info, *inferred.output)}
    return {
        name: tuple(dim.dim_value for dim in dims)
        for name, dims in described.items()
        if dims and all(dim.HasField("dim_value") for dim in dims)
    }


def _int8_in_onnxruntime(result: Path, graph: ConvGraph) -> set[str]:
    """Convolutions that one run executes as QLinearConv."""
    kernels = runtimes.onnxruntime.executed_kernels(result, Feeder(graph.source)(_gradient()))
    return {conv.name for conv in graph.convs} & {node for node, operator in kernels if operator == "QLinearConv"}


def _int8_in_openvino(result: Path, graph: ConvGraph) -> set[str]:
    """Convolutions whose primitive in the compiled model computes in eight bits."""
    names = {label: conv.name for conv in graph.convs for label in (conv.name, conv.output)}
    quantized: set[str] = set()
    with runtimes.openvino.open_model(result, keep=result.suffix == ".xml") as session:
        primitives = runtimes.openvino.executed_primitives(session)
    for facts in primitives:
        if facts.get("layerType") == "Convolution" and facts.get("runtimePrecision") in {"i8", "u8", "I8", "U8"}:
            # OpenVINO renames a convolution whose bias it splits off; a primitive lists the nodes that it fused as
            # well, of which only the convolutions are in `names`.
            labels = [label.removesuffix("/WithoutBiases") for label in facts["originalLayersNames"].split(",")]
            quantized |= {names[label] for label in labels if label in names}
    return quantized


PROFILERS: dict[str, Callable[[Path, ConvGraph], set[str]]] = {
    "onnxruntime": _int8_in_onnxruntime,
    "openvino": _int8_in_openvino,
}
