"""Run a float graph and hand out intermediate tensors: the two runtimes that can."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import ConfigError, MissingDependencyError
from fcos_deploy.core.require import require

__all__ = ["ENGINES", "Run", "Tensors", "compiled_run", "expose", "memory_groups", "open_engine", "pick_engine"]

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
        raise ConfigError(f"There is no calibration engine '{name}'.", hint=f"engines: {', '.join(ENGINES)}, auto")
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
