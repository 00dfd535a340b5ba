"""ONNX to ONNX as ONNX Runtime optimises it: fused and folded once, at build time, instead of at every start."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters.step_check import Feeds, Runner, StepCheck, compare, feed_of
from fcos_deploy.core.contract import METADATA_KEY, ModelContract, read_contract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BuildError, ConfigError
from fcos_deploy.core.exporter import BuildRequest, BuildResult, Exporter
from fcos_deploy.core.files import atomic_file, sha256_file
from fcos_deploy.core.libraries import require
from fcos_deploy.core.registry import get_backend

__all__ = ["EXPORTER"]

_FATAL_ONLY = 4
# For ``compare``: fusing changes the order of float32 sums; where a Q/DQ pair was fused into a convolution, integer
# kernels round once instead of twice, and a step of the scale goes through the rest of the network.
_TOLERANCES = {Precision.FP32: 1e-3, Precision.FP16: 5e-2, Precision.INT8: 5e-1}


class _OnnxRuntimeExporter(Exporter):
    """Optimises at the level EXTENDED: beyond it, files hold layouts of the very processor they were made on."""

    name = "onnxruntime"
    source = ArtifactKind.ONNX
    produces = ArtifactKind.ONNX
    extra = "onnxruntime"

    def build(self, request: BuildRequest) -> BuildResult:
        """Optimise and compare. The result has operators of ONNX Runtime's own, and opens nowhere else.

        Raises:
            BackendLoadError: the ONNX file is damaged, carries no contract, or was quantized for another runtime.
            BuildError: ONNX Runtime cannot read the graph.
            StepCheckError: the result does not compute what its source does.
        """
        runtime = require("onnxruntime", extra=self.extra)
        request.options.refuse_all_but(builder=self.name)
        contract = self._contract(request)
        started = time.perf_counter()
        request.progress("optimise for ONNX Runtime", 0, 2)
        with atomic_file(request.output) as temporary:
            _optimise(runtime, request.source, temporary)
            request.progress("optimise for ONNX Runtime", 1, 2)
            check = _check(runtime, request.source, temporary, contract=contract)
        request.progress("optimise for ONNX Runtime", 2, 2)
        record = {
            "builder": "onnxruntime",
            "version": runtime.__version__,
            "onnx_sha256": sha256_file(request.source),
            "optimisation": "extended",
            "check": str(check),
            "seconds": f"{time.perf_counter() - started:.2f}",
        }
        return BuildResult(files=(request.output,), record=record)

    def _contract(self, request: BuildRequest) -> ModelContract:
        if request.output.suffix != ".onnx":
            raise ConfigError(f"A model for ONNX Runtime is named '*.onnx', got '{request.output.name}'.")
        if request.output.resolve() == request.source.resolve():
            raise ConfigError(f"'{request.output}' would overwrite its source.", hint="give another output name")
        contract = read_contract(request.source)
        get_backend(self.name).check_placement(contract)
        return contract


EXPORTER = _OnnxRuntimeExporter()


def _optimise(runtime: ModuleType, source: Path, output: Path) -> None:
    settings = _settings(runtime, runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
    settings.optimized_model_filepath = str(output)
    session = _session(runtime, source, settings)
    if METADATA_KEY not in session.get_modelmeta().custom_metadata_map:
        raise BuildError(f"ONNX Runtime {runtime.__version__} lost the contract of '{source}'.")


def _check(runtime: ModuleType, source: Path, result: Path, *, contract: ModelContract) -> StepCheck:
    """Run the source unoptimised, and the result as it will be run."""
    levels = runtime.GraphOptimizationLevel
    plain = _session(runtime, source, _settings(runtime, levels.ORT_DISABLE_ALL))
    fused = _session(runtime, result, _settings(runtime, levels.ORT_ENABLE_ALL))
    shapes = {i.name: tuple(n if isinstance(n, int) else None for n in i.shape) for i in plain.get_inputs()}
    return compare(
        _runner(plain),
        _runner(fused),
        [feed_of(contract, shapes)],
        step="optimise for ONNX Runtime",
        tolerance=_TOLERANCES[contract.precision],
    )


def _runner(session: Any) -> Runner:  # Any: onnxruntime ships no types
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run


def _settings(runtime: ModuleType, level: Any) -> Any:
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = level
    settings.log_severity_level = _FATAL_ONLY
    return settings


def _session(runtime: ModuleType, path: Path, settings: Any) -> Any:
    state = runtime.capi.onnxruntime_pybind11_state
    failures = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.InvalidArgument, state.NotImplemented)
    try:
        return runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"], enable_fallback=0)
    except failures as error:
        raise BuildError(f"ONNX Runtime cannot read '{path}': {str(error).strip().splitlines()[-1]}") from error
