"""Comparison of models with a reference: accuracy, agreement and speed, and the report on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from calibration.mixed_precision import find_trade_offs
from fcos_deploy.accuracy.evaluate import Evaluation, EvaluationRequest, Evaluations, evaluate
from fcos_deploy.benchmark.machine import Contention
from fcos_deploy.benchmark.measure import TimingOptions
from fcos_deploy.benchmark.run import Benchmark, BenchmarkRequest, model_bytes, run_benchmark
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.libraries import library_versions
from fcos_deploy.core.model_files import kinds_of
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import DetectorSpec
from fcos_deploy.report import ReportData, ReportFile, ReportVariant

__all__ = ["Comparison", "ComparisonRequest", "compare_models", "comparison_report"]

_TOOLS = (
    *("fcos-deploy", "numpy", "opencv-python-headless", "pillow", "torch", "onnx", "onnxscript", "onnxsim"),
    *("onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "tensorrt", "tensorrt-rtx-cu13", "faster-coco-eval"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """``reference`` is what the candidates are compared with. ``timing`` None leaves speed out."""

    reference: DetectorSpec
    candidates: tuple[DetectorSpec, ...]
    images: Path
    annotations: Path | None = None
    gate: Gate = field(default_factory=Gate)
    timing: TimingOptions | None = None
    limit: int | None = None
    resamples: int = 1000


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
