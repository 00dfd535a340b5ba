"""ONNX to ONNX as ONNX Runtime optimizes it: fused and folded once, at build time, instead of at every start."""

from __future__ import annotations

import time

from exporters.step_check import compare_sessions
from fcos_deploy.core.artifact import OnnxGraph, find_contract
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BackendLoadError, BuildError, ConfigError
from fcos_deploy.core.exporter import BuildRequest, BuildResult, Exporter
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import lazy_import
from runtimes.onnxruntime import GraphOptimization, open_model

__all__ = ["EXPORTER"]

ort = lazy_import("onnxruntime", extra="onnxruntime")

_STEP = "optimize for ONNX Runtime"
# For ``compare``: fusing changes the order of float32 sums; where a Q/DQ pair was fused into a convolution, integer
# kernels round once instead of twice, and a step of the scale goes through the rest of the network.
_TOLERANCES = {Precision.FP32: 1e-3, Precision.FP16: 5e-2, Precision.INT8: 5e-1}


class _OnnxRuntimeExporter(Exporter):
    """Optimizes at the level EXTENDED: beyond it, files hold layouts of the very processor they were made on."""

    name = "onnxruntime"
    source = ArtifactKind.ONNX
    produces = ArtifactKind.ONNX
    extra = "onnxruntime"

    def build(self, request: BuildRequest) -> BuildResult:
        """Optimize and compare. The result has operators of ONNX Runtime's own, and opens nowhere else.

        Raises:
            BackendLoadError: the ONNX file is damaged, carries no contract, or was quantized for another runtime.
            BuildError: ONNX Runtime cannot read the graph.
            StepCheckError: the result does not compute what its source does.
        """
        request.options.refuse_all_but(builder=self.name)
        if request.output.suffix != ".onnx":
            raise ConfigError(f"A model for ONNX Runtime is named '*.onnx', got '{request.output.name}'.")
        if request.output.resolve() == request.source.resolve():
            raise ConfigError(f"'{request.output}' would overwrite its source.", hint="give another output name")
        graph = OnnxGraph(request.source)
        contract = graph.contract
        get_backend(self.name).check_placement(contract)
        started = time.perf_counter()
        request.progress(_STEP, 0, 2)
        with atomic_file(request.output) as temporary:
            try:
                open_model(request.source, optimization=GraphOptimization.EXTENDED, save_optimized=temporary).close()
            except BackendLoadError as error:
                raise BuildError(error.message, hint=error.hint) from error
            if find_contract(temporary) is None:
                raise BuildError(f"ONNX Runtime {ort.__version__} lost the contract of '{request.source}'.")
            request.progress(_STEP, 1, 2)
            with (
                open_model(request.source, optimization=GraphOptimization.DISABLED) as source,
                open_model(temporary) as result,
            ):
                tolerance = _TOLERANCES[contract.precision]
                check = compare_sessions(source, result, contract, step=_STEP, tolerance=tolerance)
        request.progress(_STEP, 2, 2)
        record = {
            "builder": self.name,
            "version": ort.__version__,
            "onnx_sha256": graph.sha256,
            "optimization": "extended",
            "check": str(check),
            "seconds": f"{time.perf_counter() - started:.2f}",
        }
        return BuildResult(files=(request.output,), record=record)


EXPORTER = _OnnxRuntimeExporter()
