"""ONNX to OpenVINO's intermediate representation: an .xml, a .bin with the weights, and the contract beside them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from exporters.step_check import StepCheck, compare_sessions
from fcos_deploy.core.artifact import OnnxGraph, write_sidecar
from fcos_deploy.core.backend import backends_for
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BuildError, ConfigError
from fcos_deploy.core.exporter import BuildRequest, BuildResult, Exporter
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import lazy_import
from runtimes.openvino import open_model

__all__ = ["EXPORTER"]

ov = lazy_import("openvino", extra="openvino")

_STEP = "convert to OpenVINO IR"
# For ``compare``. The same arithmetic on the same numbers; and on weights rounded to 11 bits.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 5e-2


class _OpenVinoExporter(Exporter):
    """Keeps fp32 weights as they are; ``precision`` fp16 stores them in half the size. INT8 graphs keep their Q/DQ."""

    name = "openvino"
    source = ArtifactKind.ONNX
    produces = ArtifactKind.OPENVINO_IR
    extra = "openvino"

    def build(self, request: BuildRequest) -> BuildResult:
        """Convert and compare.

        Raises:
            BackendLoadError: the ONNX file is damaged, carries no contract, or was quantized for another runtime.
            BuildError: OpenVINO cannot read the graph.
            StepCheckError: the IR does not compute what the ONNX file does.
        """
        request.options.refuse_all_but("precision", builder=self.name)
        if request.output.suffix != ".xml":
            raise ConfigError(f"An OpenVINO IR is named '*.xml', got '{request.output.name}'.")
        graph = OnnxGraph(request.source)
        contract = graph.contract
        for backend in backends_for(self.produces):
            backend.check_placement(contract)
            backend.check_operators(request.source)
        if request.options.precision is Precision.INT8 and contract.precision is not Precision.INT8:
            raise ConfigError(
                f"'{request.source.name}' is {contract.precision}; converting does not make it INT8.",
                hint="quantize it first with 'fcos-deploy quantize'",
            )
        if request.options.precision is Precision.FP32 and contract.precision is not Precision.FP32:
            raise ConfigError(f"'{request.source.name}' is {contract.precision} and cannot become fp32 again.")
        started = time.perf_counter()
        half = Precision.FP16 in (contract.precision, request.options.precision)
        request.progress(_STEP, 0, 1)
        weights, check = _convert(request, contract=contract, half=half)
        request.progress(_STEP, 1, 1)
        record = {
            "builder": self.name,
            "version": ov.__version__,
            "onnx_sha256": graph.sha256,
            "weights": "fp16" if half else "as in the source",
            "check": str(check),
            "seconds": f"{time.perf_counter() - started:.2f}",
        }
        if half and contract.precision is Precision.FP32:  # An INT8 graph stays one when its float weights are halved.
            contract = replace(contract, precision=Precision.FP16)
        sidecar = write_sidecar(request.output, contract, record)
        return BuildResult(files=(request.output, weights, sidecar), record=record)


EXPORTER = _OpenVinoExporter()


def _convert(request: BuildRequest, *, contract: ModelContract, half: bool) -> tuple[Path, StepCheck]:
    """Write .xml and .bin under their names once they compute what the ONNX graph does; returns the .bin too."""
    weights = request.output.with_suffix(".bin")
    # The .xml takes its name last: a reader that finds it finds its weights too.
    with atomic_file(request.output) as xml, atomic_file(weights) as binary:
        written = xml.with_suffix(".bin")
        try:
            ov.save_model(ov.Core().read_model(str(request.source)), str(xml), compress_to_fp16=half)
            with open_model(request.source) as source, open_model(xml, keep=True) as converted:
                tolerance = _HALF_TOLERANCE if half else _TOLERANCE
                check = compare_sessions(source, converted, contract, step=_STEP, tolerance=tolerance)
            written.replace(binary)
        except (RuntimeError, UnicodeDecodeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            disk_full = "iostream error" in str(error)
            raise BuildError(
                f"OpenVINO cannot convert '{request.source}': {lines[-1]}",
                hint=f"is there room in '{request.output.parent}'?" if disk_full else "",
            ) from error
        finally:
            written.unlink(missing_ok=True)
    return weights, check
