"""PyTorch FCOS -> ONNX, checked against PyTorch before it gets its name."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from exporters._trace import OPSETS, Axes, trace
from exporters.efficient_nms import check_servable, with_efficient_nms
from exporters.onnx_file import opset_of, require_writable, save_onnx, with_contract
from exporters.onnx_fp16 import half_precision
from exporters.simplify import simplified
from exporters.step_check import Feeds, StepCheck, compare, onnx_runner, provoking_feed, remembering
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import NmsForm, Precision, StrEnum, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.require import require

__all__ = ["DEFAULT_OPSET", "ExportOptions", "NmsForm", "OnnxExport", "export_onnx", "parse_options"]

DEFAULT_OPSET = 17  # docs/export.md has the measurements
_TOLERANCE = 1e-3  # relative; torch and ONNX Runtime sum convolutions in different orders
_DYNAMIC_EXAMPLE = (256, 320)
_Word = TypeVar("_Word", bound=StrEnum)


class HasModel(Protocol):
    """What is exported: the network and its contract (``LoadedCheckpoint`` is one)."""

    @property
    def model(self) -> Any: ...  # Any: torch.nn.Module; this package imports torch in functions only
    @property
    def contract(self) -> ModelContract: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """``batch`` None leaves the batch open. ``nms_boxes`` and ``nms_rounds`` are those of ``StaticNms``."""

    opset: int = DEFAULT_OPSET
    tail: Tail = Tail.RAW
    batch: int | None = 1
    simplify: bool = True
    precision: Precision = Precision.FP32
    nms_form: NmsForm = NmsForm.ONNX
    nms_boxes: int = 1000
    nms_rounds: int = 16

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise ConfigError(
                f"Opset {self.opset} is not supported.",
                hint=f"choose {OPSETS.start} to {OPSETS.stop - 1}; docs/export.md says who reads which",
            )
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"The batch must be at least 1, got {self.batch}.", hint="or 'dynamic'")
        if self.precision is Precision.INT8:
            raise ConfigError("An export is fp32 or fp16.", hint="INT8 is made by 'fcos-deploy quantize'")


def parse_options(
    *, opset: int | None, tail: Tail, batch: str, simplify: bool, precision: str, nms_form: str
) -> ExportOptions:
    """``ExportOptions`` from the command line's words; ``batch`` is a number or "dynamic".

    Raises:
        ConfigError: a word that is none of those possible.
    """
    if batch != "dynamic" and not batch.isdigit():
        raise ConfigError(f"--batch must be a number or 'dynamic', got '{batch}'.")
    return ExportOptions(
        opset=DEFAULT_OPSET if opset is None else opset,
        tail=tail,
        batch=None if batch == "dynamic" else int(batch),
        simplify=simplify,
        precision=_word(Precision, precision, "--precision"),
        nms_form=_word(NmsForm, nms_form, "--nms-form"),
    )


def _word(kind: type[_Word], text: str, option: str) -> _Word:
    if text not in [member.value for member in kind]:
        raise ConfigError(f"{option} must be one of {', '.join(m.value for m in kind)}, got '{text}'.")
    return kind(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExport:
    """What was written, and what was measured on the way. ``parameter_bytes``: the weights' own size, each once."""

    path: Path
    contract: ModelContract
    opset: int
    nodes: int
    file_bytes: int
    parameter_bytes: int
    seconds: float
    checks: tuple[StepCheck, ...] = field(default=())

    def summary(self) -> str:
        """One line a check for people."""
        head = f"{self.path}: opset {self.opset}, {self.nodes} nodes, {self.file_bytes / 1e6:.2f} MB"
        return "\n".join([head, *(f"  {check}" for check in self.checks)])

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return {
            "path": str(self.path),
            "tail": str(self.contract.tail),
            "precision": str(self.contract.precision),
            "opset": self.opset,
            "nodes": self.nodes,
            "bytes": self.file_bytes,
            "parameter_bytes": self.parameter_bytes,
            "seconds": round(self.seconds, 3),
            "checks": [str(check) for check in self.checks],
        }


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Tracing makes millions of objects that stay; looking for garbage among them takes a tenth of the time.

    Collection belongs to the whole process: other threads are without it as well until the export is done.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def export_onnx(
    loaded: HasModel, output: Path, *, options: ExportOptions | None = None, progress: ProgressFn = no_progress
) -> OnnxExport:
    """Write ``loaded`` as an ONNX file that carries its contract.

    Raises:
        ConfigError: impossible options, or a folder that cannot be written.
        ExportError: torch cannot export the model.
        StepCheckError: the graph, or a step on the way to it, does not give PyTorch's numbers.
    """
    options = options or ExportOptions()
    started = time.perf_counter()
    require_writable(output)
    contract = replace(loaded.contract, tail=options.tail, precision=Precision.FP32)
    if options.nms_form is NmsForm.PLUGIN:
        check_servable(contract)
    label, steps = "export to ONNX", 4
    progress(label, 0, steps)
    module = _exportable(loaded.model, contract, options)
    model = trace(
        module,
        _example(module, contract, options),
        opset=options.opset,
        dynamic_batch=options.batch is None,
        size=Axes.DYNAMIC if contract.preprocess.canvas is None else Axes.FIXED,
    )
    progress(label, 1, steps)
    feeds = _feeds(module, contract, options)
    run = remembering(onnx_runner(model))
    checks = [compare(_torch_runner(module), run, feeds, step="export", tolerance=_TOLERANCE)]
    progress(label, 2, steps)
    if options.simplify:
        model, check = simplified(model, feeds, run=run)
        checks.append(check)
    progress(label, 3, steps)
    if options.precision is Precision.FP16:
        model, check = half_precision(model, feeds, contract=contract)
        checks.append(check)
        contract = replace(contract, precision=Precision.FP16)
    model = _without_extra_outputs(model, contract)
    if options.nms_form is NmsForm.PLUGIN:
        model, check = with_efficient_nms(model, feeds, contract=contract)
        checks.append(check)
    model = with_contract(model, contract, record=_record(checks))
    save_onnx(model, output)
    progress(label, steps, steps)
    return OnnxExport(
        path=output,
        contract=contract,
        opset=opset_of(model),
        nodes=len(model.graph.node),
        file_bytes=output.stat().st_size,
        parameter_bytes=sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        seconds=time.perf_counter() - started,
        checks=tuple(checks),
    )


def _exportable(model: Any, contract: ModelContract, options: ExportOptions) -> Any:
    """The network with its tail, in float32 on the CPU, leaving ``model`` as it is."""
    tails = require("fcos_deploy.model.tails", extra="export")
    static = require("fcos_deploy.model.static_nms", extra="export")
    suppression = None
    if options.nms_form is NmsForm.STATIC:
        suppression = static.StaticNms(boxes=options.nms_boxes, rounds=options.nms_rounds)
    network = copy.deepcopy(model).to(device="cpu").float()
    return tails.ExportableFcos(network, contract, suppression=suppression, with_raw=True).eval()


def _shape(contract: ModelContract, options: ExportOptions) -> tuple[int, int, int, int]:
    """Input shape of the example; of open axes some usual value, at least 2, which torch does not specialise."""
    height, width = contract.preprocess.canvas or _DYNAMIC_EXAMPLE
    return (options.batch or 2, 3, height, width)


def _example(module: Any, contract: ModelContract, options: ExportOptions) -> tuple[Any, ...]:
    torch = require("torch", extra="export")
    feed = _feed(module, contract, _shape(contract, options))
    return tuple(torch.from_numpy(feed[name]) for name in module.input_names)


def _feeds(module: Any, contract: ModelContract, options: ExportOptions) -> list[Feeds]:
    """A feed of the example's shape; where axes are open, of a single image and of another size as well."""
    batch, channels, height, width = _shape(contract, options)
    shapes = [(batch, channels, height, width)]
    if options.batch is None:
        shapes.append((1, channels, height, width))
    if contract.preprocess.canvas is None:
        shapes.append((batch, channels, height // 2 + 32, width + 64))
    return [_feed(module, contract, shape) for shape in shapes]


def _feed(module: Any, contract: ModelContract, shape: tuple[int, int, int, int]) -> Feeds:
    dtype = contract.preprocess.input_dtype.value
    return provoking_feed(shape, dtype=dtype, image_sizes="image_sizes" in module.input_names)


def _torch_runner(module: Any) -> Any:
    torch = require("torch", extra="export")

    def run(feeds: Feeds) -> Feeds:
        with torch.inference_mode():
            tensors = module(*(torch.from_numpy(feeds[name]) for name in module.input_names))
        return {name: tensor.numpy() for name, tensor in zip(module.output_names, tensors, strict=True)}

    return run


def _without_extra_outputs(model: Any, contract: ModelContract) -> Any:
    """The graph without the raw outputs that the checks looked at; what only they needed goes with them."""
    keep = [output for output in model.graph.output if output.name in contract.outputs]
    if len(keep) == len(model.graph.output):
        return model
    trimmed = copy.deepcopy(model)
    del trimmed.graph.output[:]
    trimmed.graph.output.extend(keep)
    passes = require("onnx_ir.passes.common", extra="export")
    ir = require("onnx_ir", extra="export")
    return ir.to_proto(passes.RemoveUnusedNodesPass()(ir.from_proto(trimmed)).model)


def _record(checks: list[StepCheck]) -> dict[str, str]:
    torch = require("torch", extra="export")
    return {"exporter": f"torch {torch.__version__} dynamo", "checks": "; ".join(map(str, checks))}
