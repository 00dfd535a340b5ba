"""ONNX to OpenVINO's intermediate representation: an .xml, a .bin with the weights, and the contract beside them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from exporters.step_check import Feeds, Runner, StepCheck, compare, feed_of
from fcos_deploy.core.contract import ModelContract, read_contract, write_sidecar
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import BuildError, ConfigError
from fcos_deploy.core.exporter import BuildRequest, BuildResult, Exporter
from fcos_deploy.core.files import atomic_file, sha256_file
from fcos_deploy.core.libraries import require
from fcos_deploy.core.registry import backends_for

__all__ = ["EXPORTER"]

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
        openvino = require("openvino", extra=self.extra)
        request.options.refuse_all_but("precision", builder=self.name)
        contract = self._contract(request)
        started = time.perf_counter()
        half = contract.precision is Precision.FP16 or _wants_half(request, contract)
        request.progress("convert to OpenVINO IR", 0, 1)
        weights, check = _convert(openvino, request, contract=contract, half=half)
        request.progress("convert to OpenVINO IR", 1, 1)
        record = {
            "builder": "openvino",
            "version": openvino.__version__,
            "onnx_sha256": sha256_file(request.source),
            "weights": "fp16" if half else "as in the source",
            "check": str(check),
            "seconds": f"{time.perf_counter() - started:.2f}",
        }
        sidecar = write_sidecar(request.output, _as_built(contract, request), record)
        return BuildResult(files=(request.output, weights, sidecar), record=record)

    def _contract(self, request: BuildRequest) -> ModelContract:
        if request.output.suffix != ".xml":
            raise ConfigError(f"An OpenVINO IR is named '*.xml', got '{request.output.name}'.")
        contract = read_contract(request.source)
        for backend in backends_for(self.produces):
            backend.check_placement(contract)
        if request.options.precision is Precision.INT8 and contract.precision is not Precision.INT8:
            raise ConfigError(
                f"'{request.source.name}' is {contract.precision}; converting does not make it INT8.",
                hint="quantize it first with 'fcos-deploy quantize'",
            )
        if request.options.precision is Precision.FP32 and contract.precision is not Precision.FP32:
            raise ConfigError(f"'{request.source.name}' is {contract.precision} and cannot become fp32 again.")
        return contract


EXPORTER = _OpenVinoExporter()


def _wants_half(request: BuildRequest, contract: ModelContract) -> bool:
    return request.options.precision is Precision.FP16 and contract.precision is not Precision.FP16


def _as_built(contract: ModelContract, request: BuildRequest) -> ModelContract:
    """An INT8 graph stays one when what is float in it is halved."""
    halved = _wants_half(request, contract) and contract.precision is Precision.FP32
    return replace(contract, precision=Precision.FP16) if halved else contract


def _convert(
    openvino: ModuleType, request: BuildRequest, *, contract: ModelContract, half: bool
) -> tuple[Path, StepCheck]:
    """Write .xml and .bin under their names once they are checked; returns the .bin and what the check found."""
    weights = request.output.with_suffix(".bin")
    core = openvino.Core()
    # The .xml takes its name last: a reader that finds it finds its weights too.
    with atomic_file(request.output) as xml, atomic_file(weights) as binary:
        written = xml.with_suffix(".bin")
        try:
            model = core.read_model(str(request.source))
            openvino.save_model(model, str(xml), compress_to_fp16=half)
            check = _check(core, model, xml, contract=contract, half=half)
            written.replace(binary)
        except (RuntimeError, UnicodeDecodeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            full = "iostream error" in str(error)
            raise BuildError(
                f"OpenVINO cannot convert '{request.source}': {lines[-1]}",
                hint=f"is there room in '{request.output.parent}'?" if full else "",
            ) from error
        finally:
            written.unlink(missing_ok=True)
    return weights, check


def _check(core: Any, model: Any, converted: Path, *, contract: ModelContract, half: bool) -> StepCheck:
    """Run the ONNX graph and the IR, both in f32."""
    shapes = {
        port.any_name: tuple(d.get_length() if d.is_static else None for d in port.partial_shape)
        for port in model.inputs
    }
    return compare(
        _runner(core, model, contract.outputs),
        _runner(core, str(converted), contract.outputs),
        [feed_of(contract, shapes)],
        step="convert to OpenVINO IR",
        tolerance=_HALF_TOLERANCE if half else _TOLERANCE,
    )


def _runner(core: Any, source: Any, names: tuple[str, ...]) -> Runner:  # Any: OpenVINO's core; a path or a model
    compiled = core.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(feeds: Feeds) -> Feeds:
        results = compiled(feeds)
        return {name: results[name] for name in names}

    return run
