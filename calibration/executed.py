"""How much of an INT8 graph a runtime really executes in INT8: it is asked, not assumed."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.engines import Tensors, expose, open_engine
from calibration.feeds import Feeder, plain_picture
from calibration.graph import ConvGraph, ConvSite, load_graph
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.require import require

__all__ = ["PROFILERS", "ExecutedShare", "conv_macs", "executed_share", "int8_convolutions"]


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
    feeds = Feeder(graph.model, contract)(plain_picture())
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
    outputs = run(Feeder(graph.model, contract)(plain_picture()))
    return {
        conv.name: outputs[conv.output].size * math.prod(graph.initializers[conv.weight].dims[1:])
        for conv in graph.convs
    }


def _onnxruntime(result: Path, feeds: Tensors, graph: ConvGraph) -> set[str]:
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


def _openvino(result: Path, feeds: Tensors, graph: ConvGraph) -> set[str]:
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
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
