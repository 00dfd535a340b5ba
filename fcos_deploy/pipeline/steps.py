"""The steps that make a bundle's artifacts; each one is skipped when its inputs have not changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.bundle import Artifact, ArtifactDraft, BundleWriter, CalibrationRecord, StepOutput
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.backend import ComputeType, SessionOptions
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import contract_to_text
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.exporter import BuildOptions, BuildRequest
from fcos_deploy.core.progress import ProgressFn
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.registry import exporter_to
from fcos_deploy.core.serialize import to_json
from fcos_deploy.pipeline.quantize_model import accuracy_goal, quantize_model
from fcos_deploy.pipeline.request import DeployRequest

if TYPE_CHECKING:
    from fcos_deploy.model.checkpoint import LoadedCheckpoint

__all__ = ["Calibrated", "Graph", "Variant", "Workshop", "build", "calibrate", "export", "quantize", "suffix_of"]

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

    @property
    def graph(self) -> Path:
        """The fp32 graph, once it is exported."""
        return self.writer.path("model.fp32.onnx")


@dataclass(frozen=True, slots=True)
class Variant:
    """An artifact on the backend it was made for, with the format in which its float parts are computed.

    ``path`` is where it lies while the bundle is being made.
    """

    backend: str
    precision: Precision
    artifact: Artifact
    path: Path
    compute: ComputeType = ComputeType.F32

    @property
    def extra(self) -> bool:
        """Whether this is another way to run an artifact that is among the variants already."""
        return self.compute is not ComputeType.F32

    @property
    def options(self) -> SessionOptions:
        """How a session runs it; the compute format is explicit, never the runtime's own choice."""
        return SessionOptions(compute=self.compute)


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX artifact and where it lies while the bundle is being made."""

    artifact: Artifact
    path: Path
    tail: Tail


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The ranges and the record that the manifest keeps of them."""

    path: Path
    record: CalibrationRecord


def suffix_of(kind: ArtifactKind) -> str:
    """File suffix of an artifact's main file."""
    return _SUFFIXES[kind]


def export(shop: Workshop, *, tail: Tail = Tail.RAW, precision: Precision = Precision.FP32) -> Graph:
    """The checkpoint as a simplified float ONNX graph, compared with PyTorch."""
    from exporters.torch_onnx import DEFAULT_OPSET, ExportOptions, export_onnx

    opset = shop.request.opset or DEFAULT_OPSET
    name = _graph_name(str(precision), tail)

    def make(folder: Path) -> StepOutput:
        options = ExportOptions(tail=tail, opset=opset, precision=precision)
        made = export_onnx(shop.loaded, folder / name, options=options, progress=shop.progress)
        checks = {check.step: str(check) for check in made.checks}
        draft = ArtifactDraft(
            path=name,
            kind=ArtifactKind.ONNX,
            precision=precision,
            parent=shop.contract.source_sha256,
            config={"tail": str(tail), "opset": str(made.opset), "nodes": str(made.nodes), **checks},
            tools=_versions("torch", "onnx", "onnxscript", "onnxsim"),
        )
        return StepOutput(artifacts=(draft,))

    inputs = {
        "checkpoint": shop.contract.source_sha256,
        "contract": contract_to_text(shop.contract),
        "opset": str(opset),
        **_versions("torch", "onnx", "onnxsim"),
    }
    step = shop.writer.step(f"export-{precision}-{tail}", inputs=inputs, make=make)
    return Graph(step.artifacts[0], step.path(name), tail)


def _graph_name(kind: str, tail: Tail) -> str:
    """``model.fp32.onnx`` with the raw tail, ``model.fp32.candidates.onnx`` with another."""
    return f"model.{kind}.onnx" if tail is Tail.RAW else f"model.{kind}.{tail}.onnx"


def calibrate(shop: Workshop, source: Graph) -> Calibrated:
    """The ranges of the graph's activations over the calibration images."""
    from calibration.calibration_file import load_calibration, save_calibration
    from calibration.data import SampleOptions, collect_images
    from calibration.statistics import collect_ranges

    request = shop.request
    options = SampleOptions(count=request.calibration_count, seed=request.seed)
    images = collect_images(request.calibration_images, options=options)
    hashes = sorted(image.sha256 for image in images.images)
    name = "calibration.json" if source.tail is Tail.RAW else f"calibration.{source.tail}.json"

    def make(folder: Path) -> StepOutput:
        state = request.output.with_name(f".{request.output.name}.{name}.state")
        ranges = collect_ranges(source.path, images, state=state, progress=shop.progress)
        save_calibration(ranges, folder / name)
        return StepOutput()

    inputs = {"graph": source.artifact.sha256, "images": json.dumps(hashes)}
    step = shop.writer.step(f"calibrate-{source.tail}", inputs=inputs, make=make)
    path = step.path(name)
    method = str(load_calibration(path, graph=source.path).method)
    details = {"images": str(len(hashes)), "of": str(images.candidates), "seed": str(images.seed)}
    return Calibrated(path, CalibrationRecord(path=name, method=method, images=tuple(hashes), details=details))


def quantize(shop: Workshop, source: Graph, *, calibrated: Calibrated, consumer: str) -> Graph:
    """The INT8 graph in the placement of ``consumer``, a backend or a placement; shared by backends of one placement.

    Layers return to float until the accuracy goal holds, which is measured on the placement's own backend.

    Raises:
        AccuracyGateError: the goal cannot be reached.
    """
    from calibration.placement import placement_for
    from calibration.quantizers import QuantizeRequest

    policy, request = placement_for(consumer), shop.request
    name = _graph_name(f"int8.{policy.name}", source.tail)
    goal = accuracy_goal(
        request.max_map_drop,
        images=request.images or request.calibration_images,
        annotations=request.annotations,
        placement=policy,
    )

    def make(folder: Path) -> StepOutput:
        wanted = QuantizeRequest(
            source=source.path,
            output=folder / name,
            consumer=policy.name,
            calibration=calibrated.path,
            seed=request.seed,
        )
        made = quantize_model(wanted, goal=goal, progress=shop.progress)
        draft = ArtifactDraft(
            path=name,
            kind=ArtifactKind.ONNX,
            precision=Precision.INT8,
            parent=source.artifact.sha256,
            placement=policy.name,
            config=dict(made.record),
            tools=_versions("onnx"),
        )
        return StepOutput(artifacts=(draft,))

    inputs = {
        "graph": source.artifact.sha256,
        "calibration": sha256_file(calibrated.path),
        "placement": json.dumps(to_json(policy), sort_keys=True),
        "goal": f"{request.max_map_drop} {request.images} {request.annotations}",
    }
    step = shop.writer.step(f"quantize-{policy.name}-{source.tail}", inputs=inputs, make=make)
    return Graph(step.artifacts[0], step.path(name), source.tail)


def build(shop: Workshop, graph: Graph, *, backend: str, options: BuildOptions | None = None) -> Variant:
    """The engine of one graph for one backend; a backend that runs the ONNX file as it is needs none."""
    source, options = graph.artifact, options or BuildOptions()
    exporter = exporter_to(backend)
    if exporter.target is source.kind:
        return Variant(backend, source.precision, source, graph.path)
    name = f"model.{source.precision}.{backend}{suffix_of(exporter.target)}"

    def make(folder: Path) -> StepOutput:
        label = f"build {backend} {source.precision}"
        shop.progress(label, 0, 1)
        made = exporter.build(
            BuildRequest(source=graph.path, output=folder / name, options=options, progress=shop.progress)
        )
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

    inputs = {
        "graph": source.sha256,
        "exporter": exporter.name,
        "version": backend_named(backend).probe().version,
        "options": json.dumps(to_json(options), sort_keys=True, default=str),
    }
    step = shop.writer.step(f"build-{backend}-{source.precision}", inputs=inputs, make=make)
    return Variant(backend, source.precision, step.artifacts[0], step.path(name))


def _versions(*distributions: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
