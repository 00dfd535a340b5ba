"""The steps that make a bundle's artifacts; each one is skipped when its inputs have not changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.bundle import Artifact, ArtifactDraft, BundleWriter, CalibrationRecord, StepOutput, StepResult
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import contract_to_text
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, Exporter
from fcos_deploy.core.progress import ProgressFn
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.registry import exporter_to
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline.request import DeployRequest

if TYPE_CHECKING:
    from fcos_deploy.model.checkpoint import LoadedCheckpoint

__all__ = ["Calibrated", "Variant", "Workshop", "build", "calibrate", "export", "quantize", "suffix_of"]

_SUFFIXES: dict[ArtifactKind, str] = {
    ArtifactKind.ONNX: ".onnx",
    ArtifactKind.OPENVINO_IR: ".xml",
    ArtifactKind.TENSORRT_ENGINE: ".engine",
    ArtifactKind.TENSORRT_RTX_ENGINE: ".engine",
}


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every step works with."""

    request: DeployRequest
    loaded: LoadedCheckpoint
    contract: ModelContract  # the reference's, with the tail that is exported
    writer: BundleWriter
    progress: ProgressFn


@dataclass(frozen=True, slots=True)
class Variant:
    """An artifact on the backend it was made for; ``path`` is where it lies while the bundle is being made."""

    backend: str
    precision: Precision
    artifact: Artifact
    path: Path

    @property
    def options(self) -> SessionOptions:
        """As it is proven: float parts in float32."""
        return SessionOptions()


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The ranges and the record that the manifest keeps of them."""

    path: Path
    record: CalibrationRecord


def suffix_of(kind: ArtifactKind) -> str:
    """File suffix of an artifact's main file."""
    return _SUFFIXES[kind]


def export(shop: Workshop) -> StepResult:
    """The checkpoint as a simplified fp32 ONNX graph, compared with PyTorch."""
    from exporters.torch_onnx import DEFAULT_OPSET, ExportOptions, export_onnx

    opset = shop.request.opset or DEFAULT_OPSET

    def make(folder: Path) -> StepOutput:
        options = ExportOptions(tail=shop.request.tail, opset=opset)
        made = export_onnx(shop.loaded, folder / "model.fp32.onnx", options=options, progress=shop.progress)
        checks = {check.step: str(check) for check in made.checks}
        draft = ArtifactDraft(
            path="model.fp32.onnx",
            kind=ArtifactKind.ONNX,
            precision=Precision.FP32,
            parent=shop.contract.source_sha256,
            config={"opset": str(made.opset), "nodes": str(made.nodes), **checks},
            tools=_versions("torch", "onnx", "onnxscript", "onnxsim"),
        )
        return StepOutput(artifacts=(draft,))

    inputs = {
        "checkpoint": shop.contract.source_sha256,
        "contract": contract_to_text(shop.contract),
        "opset": str(opset),
        **_versions("torch", "onnx", "onnxsim"),
    }
    return shop.writer.step("export", inputs=inputs, make=make)


def calibrate(shop: Workshop, source: StepResult) -> Calibrated:
    """The ranges of the graph's activations over the calibration images."""
    from calibration.calibration_file import load_calibration, save_calibration
    from calibration.data import SampleOptions, collect_images
    from calibration.statistics import collect_ranges

    request = shop.request
    options = SampleOptions(count=request.calibration_count, seed=request.seed)
    images = collect_images(request.calibration_images, options=options)
    hashes = sorted(image.sha256 for image in images.images)
    graph = source.path("model.fp32.onnx")

    def make(folder: Path) -> StepOutput:
        state = request.output.with_name(f".{request.output.name}.calibration.state")
        ranges = collect_ranges(graph, images, state=state, progress=shop.progress)
        save_calibration(ranges, folder / "calibration.json")
        return StepOutput()

    inputs = {"graph": sha256_file(graph), "images": json.dumps(hashes)}
    step = shop.writer.step("calibrate", inputs=inputs, make=make)
    path = step.path("calibration.json")
    method = str(load_calibration(path, graph=graph).method)
    details = {"images": str(len(hashes)), "of": str(images.candidates), "seed": str(images.seed)}
    return Calibrated(
        path, CalibrationRecord(path="calibration.json", method=method, images=tuple(hashes), details=details)
    )


def quantize(shop: Workshop, source: StepResult, *, calibrated: Calibrated, backend: str) -> tuple[Artifact, Path]:
    """The INT8 graph in the placement that ``backend`` executes best; shared by backends of the same placement."""
    from calibration.calibration_file import load_calibration
    from calibration.placement import placement_for
    from calibration.qdq import quantize_qdq

    policy = placement_for(backend)
    graph = source.path("model.fp32.onnx")
    name = f"model.int8.{policy.name}.onnx"

    def make(folder: Path) -> StepOutput:
        made = quantize_qdq(graph, load_calibration(calibrated.path, graph=graph), folder / name, policy=policy)
        draft = ArtifactDraft(
            path=name,
            kind=ArtifactKind.ONNX,
            precision=Precision.INT8,
            parent=sha256_file(graph),
            placement=policy.name,
            config=dict(made.record),
            tools=_versions("onnx"),
        )
        return StepOutput(artifacts=(draft,))

    inputs = {
        "graph": sha256_file(graph),
        "calibration": sha256_file(calibrated.path),
        "placement": json.dumps(to_json(policy), sort_keys=True),
    }
    step = shop.writer.step(f"quantize-{policy.name}", inputs=inputs, make=make)
    return step.artifacts[0], step.path(name)


def build(shop: Workshop, graph: tuple[Artifact, Path], *, backend: str) -> Variant:
    """The engine of one graph for one backend; a backend that runs the ONNX file as it is needs none."""
    source, path = graph
    exporter = exporter_to(backend)
    if exporter.target is source.kind:
        return Variant(backend, source.precision, source, path)
    name = f"model.{source.precision}.{backend}{suffix_of(exporter.target)}"

    def make(folder: Path) -> StepOutput:
        label = f"build {backend} {source.precision}"
        shop.progress(label, 0, 1)
        made = exporter.build(BuildRequest(source=path, output=folder / name, progress=shop.progress))
        shop.progress(label, 1, 1)
        draft = ArtifactDraft(
            path=name,
            kind=exporter.target,
            precision=source.precision,
            parent=source.sha256,
            backend=backend,
            placement=source.placement,
            companions=tuple(file.name for file in made.files if file.name != name),
            config=dict(made.record),
            tools={backend: backend_named(backend).probe().version},
        )
        return StepOutput(artifacts=(draft,))

    step = shop.writer.step(f"build-{backend}-{source.precision}", inputs=_build_inputs(source, exporter), make=make)
    return Variant(backend, source.precision, step.artifacts[0], step.path(name))


def _build_inputs(source: Artifact, exporter: Exporter) -> dict[str, str]:
    options = json.dumps(to_json(BuildOptions()), sort_keys=True, default=str)
    return {
        "graph": source.sha256,
        "exporter": exporter.name,
        "version": backend_named(exporter.name).probe().version,
        "options": options,
    }


def _versions(*distributions: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
