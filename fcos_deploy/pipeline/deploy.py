"""From a checkpoint to a bundle that is proven to be the same detector."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from fcos_deploy.accuracy.evaluate import Evaluation, Evaluations
from fcos_deploy.benchmark.run import Benchmark
from fcos_deploy.bundle import DEFAULT_GATES, BundleWriter, GoldenImage, Manifest, Provenance, StepOutput, Target
from fcos_deploy.core.atomic import write_text
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import AccuracyGateError, ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.registry import backends, exporters
from fcos_deploy.model.checkpoint import load_checkpoint
from fcos_deploy.pipeline.proof import accuracy_figures, max_drop, measure_accuracy, write_golden
from fcos_deploy.pipeline.request import DeployRequest
from fcos_deploy.pipeline.speed import benchmark_figures, measure_speed
from fcos_deploy.pipeline.steps import Calibrated, Variant, Workshop, build, calibrate, export, quantize

__all__ = ["Deployment", "deploy", "runnable_backends"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A finished bundle and the figures behind it; the reference is first in ``benchmark.results``."""

    bundle: Path
    variants: tuple[Variant, ...]
    evaluations: Evaluations
    benchmark: Benchmark
    seconds: float

    @property
    def rows(self) -> list[tuple[str, Precision, Evaluation]]:
        """(backend, precision, evaluation), the reference first."""
        reference = self.evaluations.reference
        rows = [] if reference is None else [(reference.run.backend, Precision.FP32, reference)]
        targets = zip(self.variants, self.evaluations.targets, strict=True)
        return rows + [(v.backend, v.precision, e) for v, e in targets]


def deploy(request: DeployRequest, *, progress: ProgressFn = no_progress) -> Deployment:
    """Make the bundle; a killed run goes on where it was when it is started again.

    Raises:
        AccuracyGateError: a variant lost more AP than allowed; the bundle then holds the float artifacts only.
        FcosDeployError: a step failed; what was finished is kept for the next run.
    """
    started = time.perf_counter()
    names = request.backends or runnable_backends()
    for name in names:
        _check_buildable(name)
    loaded = load_checkpoint(request.checkpoint, options=request.options)
    contract = replace(loaded.contract, tail=request.tail)
    with BundleWriter(request.output) as writer:
        shop = Workshop(request, loaded, contract, writer, progress)
        variants, calibrated = _make_variants(shop, names)
        golden = write_golden(shop)
        predictions = request.output.with_name(f".{request.output.name}.predictions")
        evaluations = measure_accuracy(shop, variants, predictions=predictions)
        failed = _failures(shop, variants, evaluations)
        if failed:
            raise AccuracyGateError("; ".join(failed) + ".", hint=_WAY_OUT)
        speed = measure_speed(shop, variants)
        manifest = _manifest(shop, variants, calibrated=calibrated, golden=golden)
        manifest = replace(
            manifest,
            accuracy=accuracy_figures(shop, variants, evaluations),
            benchmark=benchmark_figures(shop, variants, speed),
        )
        _write_report(shop, manifest, variants=variants, evaluations=evaluations, speed=speed)
        bundle = writer.finish(manifest)
    shutil.rmtree(predictions, ignore_errors=True)
    moved = tuple(replace(v, path=bundle / v.artifact.path) for v in variants)
    seconds = time.perf_counter() - started
    return Deployment(bundle=bundle, variants=moved, evaluations=evaluations, benchmark=speed, seconds=seconds)


_WAY_OUT = (
    "the float artifacts are kept beside the output; calibrate with more images, keep more layers in float "
    "('fcos-deploy quantize --max-map-drop'), or allow a larger --max-map-drop"
)


def runnable_backends() -> tuple[str, ...]:
    """Backends that this machine can both build for and run."""
    return tuple(name for name in sorted(exporters()) if name in backends() and _runs_here(name))


def _runs_here(name: str) -> bool:
    probe = backend_named(name).probe()
    return probe.available and bool(probe.devices)


def _check_buildable(name: str) -> None:
    if name not in exporters():
        raise ConfigError(
            f"Nothing can be built for backend '{name}'.", hint=f"choose from: {', '.join(sorted(exporters()))}"
        )
    probe = backend_named(name).probe()
    if not probe.available:
        raise ConfigError(f"Backend '{name}' cannot run here: {probe.problem}", hint=probe.remedy)


def _make_variants(shop: Workshop, names: tuple[str, ...]) -> tuple[list[Variant], Calibrated]:
    source = export(shop)
    fp32 = source.artifacts[0], source.path("model.fp32.onnx")
    calibrated = calibrate(shop, source)
    variants = []
    for name in names:
        int8 = quantize(shop, source, calibrated=calibrated, backend=name)
        variants += [build(shop, fp32, backend=name), build(shop, int8, backend=name)]
    # The graph that engines are built from on other devices travels in every bundle.
    quantize(shop, source, calibrated=calibrated, backend="portable")
    return variants, calibrated


def _failures(shop: Workshop, variants: list[Variant], found: Evaluations) -> list[str]:
    reference = found.reference.scores.ap if found.reference else None
    failed = []
    for variant, evaluation in zip(variants, found.targets, strict=True):
        limit = max_drop(shop, variant.precision)
        drop = evaluation.drop.value if evaluation.drop else None
        if drop is None or drop > limit:
            failed.append(
                f"{variant.backend} {variant.precision}: mAP {_three(reference)} -> {_three(evaluation.scores.ap)} "
                f"(drop {_three(drop)} > {limit:.4f}) on {evaluation.scores.images} images"
            )
    return failed


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _manifest(
    shop: Workshop, variants: list[Variant], *, calibrated: Calibrated, golden: tuple[GoldenImage, ...]
) -> Manifest:
    request = shop.request
    preferred = next((v for v in reversed(variants) if v.precision is Precision.INT8), variants[-1])
    gates = tuple(
        replace(gate, max_map_drop=request.max_map_drop) if gate.precision is Precision.INT8 else gate
        for gate in DEFAULT_GATES
    )
    return Manifest(
        name=request.output.stem,
        contract=shop.contract,
        provenance=Provenance(
            checkpoint=request.checkpoint.name,
            checkpoint_sha256=shop.contract.source_sha256,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=request.command,
            platform=platform.platform(),
            tools={"python": platform.python_version()},
            decisions=shop.contract.decisions,
        ),
        target=Target(backend=preferred.backend, precision=preferred.precision),
        gates=gates,
        golden=golden,
        calibration=(calibrated.record,),
    )


def _write_report(
    shop: Workshop, manifest: Manifest, *, variants: list[Variant], evaluations: Evaluations, speed: Benchmark
) -> None:
    def make(folder: Path) -> StepOutput:
        write_text(folder / "report.md", "")
        return StepOutput()

    shop.writer.step("report", inputs={"now": manifest.provenance.created}, make=make)
