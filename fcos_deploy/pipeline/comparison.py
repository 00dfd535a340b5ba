"""Comparison of models with a reference: accuracy, agreement and speed, and parity stage by stage or layer by layer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.mixed_precision import find_trade_offs
from fcos_deploy.accuracy.dataset import folder_images
from fcos_deploy.accuracy.diagnosis import OnnxLayers, explain, first_diverging_layer
from fcos_deploy.accuracy.evaluate import Evaluation, EvaluationRequest, Evaluations, evaluate
from fcos_deploy.accuracy.operating_point import OperatingGoal
from fcos_deploy.accuracy.parity import (
    LayerFinding,
    ParityImage,
    ParityReport,
    Tolerance,
    compare_stages,
    tolerance_for,
)
from fcos_deploy.benchmark.measure import Contention, TimingOptions
from fcos_deploy.benchmark.run import Benchmark, BenchmarkRequest, model_bytes, run_benchmark
from fcos_deploy.checkpoints.rules import UNKNOWN_CLASS_NAMES
from fcos_deploy.core.artifact import kinds_of
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ComputeType, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.libraries import library_versions, require
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector, DetectorSpec
from fcos_deploy.report import ReportData, ReportFile, ReportVariant

if TYPE_CHECKING:
    from fcos_deploy.checkpoints.load import LoadedCheckpoint

__all__ = [
    "Comparison",
    "ComparisonRequest",
    "ParityRequest",
    "check_parity",
    "compare_models",
    "comparison_report",
    "find_layer",
]

_TOOLS = (
    *("fcos-deploy", "numpy", "opencv-python-headless", "pillow", "torch", "onnx", "onnxscript", "onnxsim"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-rtx-cu13", "faster-coco-eval"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """``reference`` is what the candidates are compared with. ``timing`` None leaves speed out.

    ``operating_goal``: as in ``EvaluationRequest``.
    """

    reference: DetectorSpec
    candidates: tuple[DetectorSpec, ...]
    images: Path
    annotations: Path | None = None
    gate: Gate = field(default_factory=Gate)
    timing: TimingOptions | None = None
    limit: int | None = None
    resamples: int = 1000
    operating_goal: OperatingGoal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The measurements; in ``benchmark`` the reference is first."""

    request: ComparisonRequest
    evaluations: Evaluations
    benchmark: Benchmark | None

    @property
    def all(self) -> list[Evaluation]:
        """The reference, then the candidates."""
        reference = self.evaluations.reference
        return ([reference] if reference else []) + list(self.evaluations.candidates)


def compare_models(request: ComparisonRequest, *, progress: ProgressFn = no_progress) -> Comparison:
    """Evaluate all on the same images, then time them in turns.

    Raises:
        FcosDeployError: as evaluating and benchmarking do.
    """
    evaluations = evaluate(
        EvaluationRequest(
            candidates=request.candidates,
            images=request.images,
            annotations=request.annotations,
            reference=request.reference,
            gate=request.gate,
            limit=request.limit,
            resamples=request.resamples,
            operating_goal=request.operating_goal,
        ),
        progress=progress,
    )
    benchmark = None
    if request.timing is not None:
        image = evaluations.dataset.images[0].path
        benchmark = run_benchmark(
            BenchmarkRequest(candidates=(request.reference, *request.candidates), image=image, timing=request.timing),
            progress=progress,
        )
    return Comparison(request=request, evaluations=evaluations, benchmark=benchmark)


def comparison_report(comparison: Comparison, *, title: str, command: str = "") -> ReportData:
    """The data of a report on a comparison that ``command`` made."""
    results = comparison.benchmark.results if comparison.benchmark else (None,) * len(comparison.all)
    models = [spec.model for spec in (comparison.request.reference, *comparison.request.candidates)]
    return ReportData(
        title=title,
        dataset=comparison.evaluations.dataset,
        variants=tuple(
            ReportVariant(
                label=label,
                evaluation=evaluation,
                result=result,
                reference=evaluation is comparison.evaluations.reference,
            )
            for label, evaluation, result in zip(_labels(comparison.all), comparison.all, results, strict=True)
        ),
        searches=find_trade_offs(models[1:]),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        files=tuple(map(_report_file, dict.fromkeys(models))),
        machine=comparison.benchmark.machine if comparison.benchmark else None,
        contention=comparison.benchmark.contention if comparison.benchmark else Contention(),
        versions=library_versions(*_TOOLS),
        command=command,
    )


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """Backend and precision, with the model's name where that is not enough."""
    short = [evaluation.run.subject for evaluation in evaluations]
    long = [f"{e.run.subject} {e.run.model}" for e in evaluations]
    labels = [s if short.count(s) == 1 else name for s, name in zip(short, long, strict=True)]
    return [f"{label} ({i})" if labels.index(label) != i else label for i, label in enumerate(labels)]


def _report_file(path: Path) -> ReportFile:
    hashed = path / "manifest.json" if path.is_dir() else path
    kind = "bundle (hash of its manifest)" if path.is_dir() else path.suffix.lstrip(".") or str(kinds_of(path)[0])
    return ReportFile(path=path.name, kind=kind, sha256=sha256_file(hashed), size=model_bytes(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRequest:
    """``strict``: judge by what float32 allows, whatever the candidate's precision.

    ``options``: how the checkpoint is to be read; size and dtype of its input are those of the candidate.
    """

    candidate: DetectorSpec
    checkpoint: Path
    images: Path
    count: int = 4
    strict: bool = False
    options: CheckpointOptions = field(default_factory=CheckpointOptions)

    @property
    def tolerance(self) -> Tolerance | None:
        """None leaves it to the candidate's own precision."""
        return tolerance_for(Precision.FP32, ComputeType.F32) if self.strict else None


def check_parity(request: ParityRequest, *, progress: ProgressFn = no_progress) -> ParityReport:
    """Compare a model with the checkpoint that it was made from.

    Raises:
        FcosDeployError: one of the two cannot be opened or run, or there are no images.
    """
    options = SessionOptions(threads=request.candidate.options.threads)
    with request.candidate.open() as candidate:
        loaded = _load_like(request, candidate.contract)
        with Detector.of_network(loaded.model, loaded.contract, options=options) as reference:
            images = _images(request, reference)
            report = compare_stages(reference, candidate, images, tolerance=request.tolerance, progress=progress)
            return explain(report, reference, candidate, network=loaded.model)


def find_layer(request: ParityRequest, *, progress: ProgressFn = no_progress) -> LayerFinding | None:
    """The first layer of an ONNX graph that diverges from the same export of the checkpoint; None when none does.

    Raises:
        ConfigError: the model is not an ONNX file.
    """
    model = request.candidate.model
    if model.suffix != ".onnx":
        raise ConfigError(
            f"Layers can be compared in ONNX files only, '{model.name}' is not one.",
            hint="give the ONNX file that the engine was built from, with --backend",
        )
    from exporters.torch_onnx import ExportOptions, export_onnx

    with request.candidate.open() as candidate:
        source = _load_like(request, candidate.contract)
        feeds, _ = candidate.prepare([_images(request, candidate)[0].pixels])
        backend = candidate.session.description["backend"]
    options = request.candidate.options
    tolerance = request.tolerance or tolerance_for(candidate.contract.precision, options.compute)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.onnx"
        export_onnx(source, path, options=ExportOptions(tail=candidate.contract.tail), progress=progress)
        return first_diverging_layer(
            OnnxLayers(path, options=SessionOptions(threads=options.threads)),
            OnnxLayers(model, backend=backend, options=options),
            feeds,
            tolerance=tolerance,
            progress=progress,
        )


def _load_like(request: ParityRequest, candidate: ModelContract) -> LoadedCheckpoint:
    """The checkpoint for the candidate's input size and dtype, with the raw tail; all else by its own rules.

    Where the checkpoint has no class names, and none were given, the candidate's are believed.
    """
    spec = candidate.preprocess
    options = replace(
        request.options,
        input_size=spec.canvas,
        shortest=spec.shortest,
        longest=spec.longest,
        input_dtype=spec.input_dtype,
    )
    module = require("fcos_deploy.checkpoints.load", extra="export")
    loaded: LoadedCheckpoint = module.load_checkpoint(request.checkpoint, options=options)
    contract = replace(loaded.contract, tail=Tail.RAW)
    known = any(d.name == "class_names" and d.source != UNKNOWN_CLASS_NAMES for d in contract.decisions)
    if not known and len(contract.class_names) == len(candidate.class_names):
        contract = replace(contract, class_names=candidate.class_names)
    return replace(loaded, contract=contract)


def _images(request: ParityRequest, detector: Detector) -> Sequence[ParityImage]:
    """The first images of the folder, as ``detector`` reads files."""
    images = folder_images(request.images)[: request.count]
    return [ParityImage(image.path.name, detector.read(image.path)) for image in images]
