"""One picture as the inputs of an exported graph, by the graph's own contract."""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.placement import ConvGraph, ConvSite, load_graph
from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.errors import CalibrationError, ConfigError, MissingDependencyError, StepCheckError, unknown_name
from fcos_deploy.core.libraries import require
from fcos_deploy.core.postprocess import image_sizes_row
from fcos_deploy.core.preprocess import preprocess

__all__ = [
    "ENGINES",
    "PROFILERS",
    "DetectionEffect",
    "EffectMeter",
    "ExecutedShare",
    "Feeder",
    "Fidelity",
    "Run",
    "SignalToNoise",
    "Tensors",
    "compare_models",
    "compiled_run",
    "conv_macs",
    "executed_share",
    "expose",
    "gradient_image",
    "int8_convolutions",
    "memory_groups",
    "open_engine",
    "pick_engine",
]


class Feeder:
    """Turns (h, w, 3) uint8 RGB into feeds for ``model``; an exported batch larger than one repeats the image."""

    def __init__(self, model: Any, contract: ModelContract) -> None:  # onnx.ModelProto, untyped
        self._contract = contract
        inputs = {value.name: value for value in model.graph.input}
        if "images" not in inputs:
            raise CalibrationError(
                f"The graph has no input 'images', but {sorted(inputs)}.", hint="export it with 'fcos-deploy export'"
            )
        batch = inputs["images"].type.tensor_type.shape.dim[0]
        self._batch = int(batch.dim_value) or 1
        self._wants_sizes = "image_sizes" in inputs

    def __call__(self, picture: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """``images`` (n, 3, H, W) of the contract's dtype, and ``image_sizes`` (n, 4) where the graph asks for it."""
        tensor, letterbox = preprocess(picture, self._contract.preprocess)
        feeds = {"images": np.repeat(tensor[None], self._batch, axis=0)}
        if self._wants_sizes:
            feeds["image_sizes"] = np.repeat(image_sizes_row(letterbox)[None], self._batch, axis=0)
        return feeds


def gradient_image() -> NDArray[np.uint8]:
    """(480, 640, 3) uint8: a smooth colour gradient, for runs whose values do not matter."""
    rows, columns = np.mgrid[0:480, 0:640]
    return np.stack([rows * 255 // 479, columns * 255 // 639, (rows + columns) * 255 // 1118], 2).astype(np.uint8)


Tensors = Mapping[str, NDArray[Any]]
Run = Callable[[Tensors], dict[str, NDArray[Any]]]


def expose(model: Any, names: Sequence[str]) -> Any:  # onnx.ModelProto, untyped
    """A copy of the model whose outputs are the named float tensors."""
    onnx = require("onnx", extra="export")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    return copy


def memory_groups(model: Any, names: Sequence[str], *, memory: int) -> list[list[str]]:
    """The names in order, cut where their float32 tensors together would exceed ``memory`` bytes.

    A group has at least one. A tensor whose shape is dynamic counts as an eighth of the memory.
    """
    onnx = require("onnx", extra="export")
    shapes = {v.name: v.type.tensor_type.shape for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    groups: list[list[str]] = []
    used = budget = float(memory)
    for name in names:
        sizes = [dim.dim_value for dim in shapes[name].dim] if name in shapes else [0]
        need = 4.0 * math.prod(sizes) if all(sizes) else budget / 8
        if used + need > budget or not groups:
            groups.append([])
            used = 0.0
        groups[-1].append(name)
        used += need
    return groups


def _onnxruntime(model: Any, *, threads: int | None) -> Run:
    ort = require("onnxruntime", extra="onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _openvino(model: Any, *, threads: int | None) -> Run:
    ov = require("openvino", extra="openvino")
    names = [output.name for output in model.graph.output]
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", config)
    return compiled_run(compiled, names)


def compiled_run(compiled: Any, names: Sequence[str] = ()) -> Run:
    """Inference of a compiled OpenVINO model; ``names`` of the outputs, empty for all.

    The arrays that it returns are overwritten by the next call.
    """
    names = names or [port.get_any_name() for port in compiled.outputs]
    ports = [compiled.output(name) for name in names]

    def run(feeds: Tensors) -> dict[str, NDArray[Any]]:
        results = compiled(dict(feeds), share_outputs=True)
        return {name: np.asarray(results[port]) for name, port in zip(names, ports, strict=True)}

    return run


# Seconds. Trying OpenVINO, which compiles, costs two to four; it seldom saves a third of a pass.
_SHORT = 8.0

# In the order in which they are tried.
ENGINES: dict[str, Callable[..., Run]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def open_engine(name: str, model: Any, *, threads: int | None = None) -> Run:
    """A function from feeds to the model's outputs.

    Raises:
        ConfigError: there is no such engine.
        MissingDependencyError: it is not installed.
    """
    if name not in ENGINES:
        raise unknown_name("calibration engine", name, ["auto", *ENGINES])
    return ENGINES[name](model, threads=threads)


@dataclass(frozen=True, slots=True)
class _Trial:
    seconds: float
    name: str


def pick_engine(model: Any, feeds: Tensors, *, images: int, threads: int | None = None) -> str:
    """The engine that runs this model fastest on this machine, of those installed.

    An engine that gets through that many ``images`` in less time than others take to compile is taken at once.
    """
    trials: list[_Trial] = []
    for name in ENGINES:
        try:
            run = open_engine(name, model, threads=threads)
        except MissingDependencyError:
            continue
        run(feeds)
        start = time.perf_counter()
        run(feeds)
        trials.append(_Trial(time.perf_counter() - start, name))
        if trials[-1].seconds * images < _SHORT:
            break
    if not trials:
        raise MissingDependencyError(
            "Calibration needs onnxruntime or openvino.", hint="pip install 'fcos-deploy[onnxruntime]'"
        )
    return min(trials, key=lambda trial: trial.seconds).name


class SignalToNoise:
    """Signal-to-quantization-noise ratio of one tensor over any number of images."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, reference: NDArray[Any], result: NDArray[Any]) -> None:
        """Compare two arrays of the same shape."""
        wanted = reference.astype(np.float64)
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(result.astype(np.float64) - wanted).sum())

    @property
    def decibel(self) -> float:
        """10 log10 of the ratio of energies; 200 when nothing differs."""
        return 200.0 if not self._noise else float(10 * np.log10(max(self._signal, 1e-300) / self._noise))


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Decibel per output, over ``images`` pictures; no pictures means that a gradient was used."""

    sqnr_db: dict[str, float]
    images: int


def compare_models(
    source: Any,
    result: Any,
    *,
    contract: ModelContract,
    pictures: Sequence[NDArray[np.uint8]] = (),
    engine: str = "onnxruntime",
) -> Fidelity:
    """Run two ONNX models (protos) on the same pictures.

    Raises:
        StepCheckError: the result does not run, or gives values that are not finite.
    """
    feeder = Feeder(source, contract)
    runs = (open_engine(engine, source), _open_result(engine, result))
    ratios = {output.name: SignalToNoise() for output in source.graph.output}
    for picture in pictures or [gradient_image()]:
        feeds = feeder(picture)
        wanted, got = (run(feeds) for run in runs)
        for name, ratio in ratios.items():
            _check_finite(name, got[name])
            ratio.add(wanted[name], got[name])
    return Fidelity({name: round(ratio.decibel, 2) for name, ratio in ratios.items()}, len(pictures))


def _open_result(engine: str, model: Any) -> Run:
    try:
        return open_engine(engine, model)
    except Exception as error:
        raise StepCheckError(f"The quantized graph does not open in {engine}: {error}.") from error


def _check_finite(name: str, values: NDArray[Any]) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise StepCheckError(f"Output '{name}' of the quantized graph is not finite.", hint="calibrate on other images")


# A location takes part in a detection from about this probability on.
_FOREGROUND = 0.05


@dataclass(frozen=True, slots=True)
class DetectionEffect:
    """Root mean square errors over the locations that see an object.

    ``classes``, ``centerness``: of probabilities. ``boxes``: of distances, as a share of the box's size.
    """

    classes: float
    boxes: float
    centerness: float

    @property
    def total(self) -> float:
        """One number to rank by: a box side off by 1 % weighs as much as a probability off by 0.01."""
        return float(np.sqrt(self.classes**2 + self.boxes**2 + self.centerness**2))


class EffectMeter:
    """Accumulates over images."""

    def __init__(self) -> None:
        self._squares = np.zeros(3)
        self._count = 0

    def add(self, reference: Mapping[str, NDArray[Any]], result: Mapping[str, NDArray[Any]]) -> None:
        """Compare the raw outputs (``ModelContract``, tail raw) of one run."""
        wanted, got = _sigmoid(reference["cls_logits"]), _sigmoid(result["cls_logits"])
        seen = np.maximum(wanted, got).max(2) > _FOREGROUND  # (n, L)
        if not seen.any():
            return
        distances = reference["distances"].astype(np.float64)
        size = np.maximum((distances[..., :2] + distances[..., 2:])[seen], 1.0)  # (m, 2) width and height
        error = (result["distances"] - distances)[seen] / np.concatenate([size, size], 1)
        centerness = (_sigmoid(result["centerness"]) - _sigmoid(reference["centerness"]))[seen]
        self._squares += [
            np.square((got - wanted)[seen]).max(1).sum(),
            np.square(error).mean(1).sum(),
            np.square(centerness).sum(),
        ]
        self._count += int(seen.sum())

    @property
    def effect(self) -> DetectionEffect:
        """Of everything added; zeros when no location saw an object."""
        return DetectionEffect(*(float(v) for v in np.sqrt(self._squares / max(self._count, 1))))


def _sigmoid(logits: NDArray[Any]) -> NDArray[np.float64]:
    positive: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
    return positive


@dataclass(frozen=True, slots=True)
class ExecutedShare:
    """Multiply-accumulates of the convolutions for one image, and the nodes that ran in float."""

    backend: str
    int8_macs: int
    total_macs: int
    float_nodes: tuple[str, ...]

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.int8_macs / self.total_macs


def executed_share(source: Path, result: Path, backend: str) -> ExecutedShare:
    """Run ``result`` (ONNX or IR, made from the float ``source``) on a backend of this machine and look.

    Raises:
        ConfigError: the backend cannot be asked here.
        MissingDependencyError: it is not installed.
    """
    if backend not in PROFILERS:
        raise ConfigError(f"'{backend}' cannot be profiled here.", hint=f"backends: {', '.join(sorted(PROFILERS))}")
    graph, contract = load_graph(source), read_contract(source)
    feeds = Feeder(graph.model, contract)(gradient_image())
    macs = conv_macs(graph, contract)
    quantized = PROFILERS[backend](result, feeds, graph)
    return ExecutedShare(
        backend,
        sum(macs[name] for name in quantized),
        sum(macs.values()),
        tuple(name for name in macs if name not in quantized),
    )


def conv_macs(graph: ConvGraph, contract: ModelContract) -> dict[str, int]:
    """Multiply-accumulates of each convolution node for one run, from the shapes that a run shows."""
    run = open_engine("onnxruntime", expose(graph.model, [conv.output for conv in graph.convs]))
    outputs = run(Feeder(graph.model, contract)(gradient_image()))
    return {
        conv.name: outputs[conv.output].size * math.prod(graph.initializers[conv.weight].dims[1:])
        for conv in graph.convs
    }


def _onnxruntime_executed(result: Path, feeds: Tensors, graph: ConvGraph) -> set[str]:
    """Convolutions that the profile of one run shows as QLinearConv."""
    ort = require("onnxruntime", extra="onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        options.log_severity_level = 3
        session = ort.InferenceSession(str(result), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    quantized = [event["name"] for event in events if event.get("args", {}).get("op_name") == "QLinearConv"]
    # The event is named after the node; a fused one has a number of the optimizer's own behind its name.
    ran = {re.sub(r"(_token_\d+)?_kernel_time$", "", name) for name in quantized}
    return {conv.name for conv in graph.convs if conv.name in ran}


def _openvino_executed(result: Path, feeds: Tensors, graph: ConvGraph) -> set[str]:
    """Convolutions whose primitive in the compiled model computes in eight bits."""
    del feeds  # Compiling is enough: the compiled model names its primitives.
    ov = require("openvino", extra="openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    return int8_convolutions(ov.Core().compile_model(str(result), "CPU", config), graph.convs)


def int8_convolutions(compiled: Any, convs: Sequence[ConvSite]) -> set[str]:
    """Names of the convolutions that a compiled OpenVINO model computes in eight bits."""
    names = {label: conv.name for conv in convs for label in (conv.name, conv.output)}
    found: set[str] = set()
    for node in compiled.get_runtime_model().get_ops():
        found |= _int8_layers(node.get_rt_info(), names)
    return found


def _int8_layers(info: Mapping[str, Any], names: Mapping[str, str]) -> set[str]:
    def text(key: str) -> str:
        return str(info[key].astype(str)) if key in info else ""

    if text("layerType") != "Convolution" or text("runtimePrecision") not in {"i8", "u8", "I8", "U8"}:
        return set()
    # OpenVINO renames a convolution whose bias it splits off.
    labels = [label.removesuffix("/WithoutBiases") for label in text("originalLayersNames").split(",")]
    # A primitive that fused other nodes lists them too; only convolutions are in `names`.
    return {names[label] for label in labels if label in names}


PROFILERS: dict[str, Callable[[Path, Tensors, ConvGraph], set[str]]] = {
    "onnxruntime": _onnxruntime_executed,
    "openvino": _openvino_executed,
}
