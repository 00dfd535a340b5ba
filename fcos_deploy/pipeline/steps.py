"""The steps of a deployment: each makes one kind of artifact, and is skipped where it was made from the same inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, folder_images, load_coco
from fcos_deploy.accuracy.evaluate import Evaluations
from fcos_deploy.accuracy.operating_point import OperatingGoal
from fcos_deploy.accuracy.predictions import DetectionRuns
from fcos_deploy.bundle import (
    Artifact,
    ArtifactDraft,
    BundleWriter,
    CalibrationRecord,
    StepCache,
    StepOutput,
    StepResult,
)
from fcos_deploy.core.artifact import engine_file, files_of, graph_file
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.contract import ModelContract, contract_to_text
from fcos_deploy.core.enums import ArtifactKind, ComputeType, DeformForm, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult, get_exporter
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Finding, Gate, Judge, Severity
from fcos_deploy.core.libraries import library_versions, recorded_versions
from fcos_deploy.core.progress import ProgressFn, StageClock
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import DetectorSpec
from fcos_deploy.pipeline.build import engine_requirements
from fcos_deploy.pipeline.quantize import Scoring, accuracy_goal, quantize_model
from fcos_deploy.pipeline.source import DeploySource, GraphForm
from fcos_deploy.targets.plan import Plan, PlanRequest
from fcos_deploy.targets.plan import plan as make_plan
from fcos_deploy.targets.profiles import load_profile

if TYPE_CHECKING:
    from calibration.dataset import CalibrationSet
    from calibration.placement import ConvGraph, Placement
    from calibration.quantizers import QuantizeResult
    from fcos_deploy.model.wrap import WrappedModule

__all__ = [
    "Calibrated",
    "DeployContext",
    "DeployRequest",
    "Graph",
    "ImageSets",
    "Variant",
    "build",
    "calibrate",
    "export",
    "int8_draft",
    "int8_inputs",
    "make_for_device",
    "open_image_sets",
    "plan_targets",
    "quantize",
]


@dataclass(frozen=True, slots=True)
class ImageSets:
    """``evaluation`` is in a fixed order; ``findings`` is what is to be said of both sets.

    ``evaluation_key``: hash of the evaluation images' names and contents and of their annotations, so that what was
    measured on others is never taken for a result on these. ``annotated``: what the annotations say of them.
    """

    calibration: CalibrationSet
    evaluation: tuple[EvaluationImage, ...]
    findings: tuple[Finding, ...]
    evaluation_key: str
    annotated: Dataset | None = None


def open_image_sets(request: DeployRequest, contract: ModelContract) -> ImageSets:
    """Read every image once, before anything is made from them. Without ``images`` the calibration images are both.

    Raises:
        CalibrationError: images that cannot be read, all listed; too few different ones; or an overlap of the two sets
            that is not allowed.
        ConfigError: no ``images``, and calibration images that are not a folder.
    """
    from calibration.dataset import SampleOptions, collect_images, examine_set, inspect_images

    folder, annotations = request.images or request.calibration_images, request.annotations
    if request.images is None and not folder.is_dir():
        raise ConfigError(
            f"The calibration images '{folder}' are not a folder: accuracy cannot be measured on them too."
            if folder.exists()
            else f"The calibration images '{folder}' are not there.",
            hint="give --calibration-images DIR, or the images to measure on with --images DIR",
        )
    orientation = contract.preprocess.orientation
    sample = SampleOptions(count=request.calibration_count, seed=request.seed)
    calibration = collect_images(request.calibration_images, options=sample, orientation=orientation)
    dataset = load_coco(annotations, images=folder) if annotations else None
    evaluation = dataset.images if dataset else folder_images(folder)
    names = {os.path.relpath(image.path, folder): image.path for image in evaluation}
    inspected = inspect_images(names, orientation=orientation)
    others = inspected if request.images else ()
    report = examine_set(calibration, contract, evaluation=others, allow_overlap=request.allow_overlap)
    report.require_usable()
    findings = report.findings + (dataset.findings if dataset else ())
    if request.images is None:
        message = "INT8 was evaluated on its own calibration images, on which it looks better than it is (no --images)"
        findings += (Finding(kind="no-evaluation-images", severity=Severity.INCONCLUSIVE, message=message),)
    facts = [sha256_file(annotations) if annotations else "", [(image.name, image.sha256) for image in inspected]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return ImageSets(calibration, evaluation, findings, key, dataset)


_MAX_MAP_DROP = 0.01
# The demo detector, whose INT8 loses no AP, keeps 99.8 % of the float model's own detections (docs/int8.md).
_MIN_MATCH_RATE = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployRequest:
    """From ``checkpoint`` to the bundle ``output``; it may also be an ONNX file with a contract, or a wrapped module.

    ``backends`` to build for; empty takes every one that this machine can run. ``precisions`` and ``tail`` of what is
    built for them; plans have their own. ``images`` (and ``annotations``) prove the accuracy; without them the
    calibration images and the reference's own detections do. ``allow_overlap``: images may be in both sets, which is
    reported. ``plans`` are devices that get artifacts of their own. ``max_map_drop`` is the most AP (0..1) that INT8
    may lose (0.01 by default). Without ``annotations`` ``min_match_rate`` takes its place, the share of the detections
    of both models that agree (0.97 by default). ``judge``: whether the interval or the point estimate must keep it.
    ``max_precision_drop`` and ``max_recall_drop``: what may be lost at the score thresholds (no limit by default).
    ``cache``: folder of finished steps of earlier deployments, to which this one adds. ``sample``: on how many images
    accuracy is measured, chosen with classes and object sizes as in all of them; None takes all.
    ``operating_goal``: what the score threshold of each class is chosen for; None is the reference's best F1.
    ``session``: how artifacts are measured, and how the bundle is opened by default.
    ``batch``: 1, or None for graphs that take any number of images. ``computes``: the formats of floats in which every
    artifact is measured, as far as its backend and the processor have them.
    """

    checkpoint: Path | WrappedModule
    output: Path
    calibration_images: Path
    backends: tuple[str, ...] = ()
    plans: tuple[Plan, ...] = ()
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.INT8)
    tail: Tail = Tail.RAW
    options: CheckpointOptions = field(default_factory=CheckpointOptions)
    images: Path | None = None
    annotations: Path | None = None
    max_map_drop: float | None = None
    max_precision_drop: float | None = None
    max_recall_drop: float | None = None
    min_match_rate: float | None = None
    judge: Judge = Judge.INTERVAL
    allow_overlap: bool = False
    calibration_count: int | None = None
    seed: int = 0
    opset: int | None = None
    cache: Path | None = None
    sample: int | None = None
    operating_goal: OperatingGoal | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    batch: int | None = 1
    computes: tuple[ComputeType, ...] = (ComputeType.F32, ComputeType.BF16)
    command: str = ""

    def __post_init__(self) -> None:
        if self.annotations is not None and self.images is None:
            raise ConfigError("Annotations need the images they belong to.", hint="give --images DIR as well")
        object.__setattr__(self, "tail", Tail.of(self.tail, option="tail"))
        precisions = tuple(Precision.of(word, option="precision") for word in self.precisions)
        object.__setattr__(self, "precisions", tuple(dict.fromkeys(precisions)))
        if not self.precisions:
            raise ConfigError("There is no precision to build.", hint="give --precision fp32, fp16 or int8")
        forms = {plan.nms_form for plan in self.plans if plan.tail is Tail.NMS}
        if len(forms) > 1:
            raise ConfigError(
                "The targets need the nms tail in two forms, and a bundle has one file for it.",
                hint="make a bundle for each --target",
            )
        needs_annotations = (self.max_map_drop, self.max_precision_drop, self.max_recall_drop)
        if self.annotations is None and any(limit is not None for limit in needs_annotations):
            raise ConfigError(
                "A loss of AP, precision or recall cannot be limited without annotations.",
                hint="give --annotations FILE, or --min-match-rate in place of these limits",
            )
        OperatingGoal.require_annotations(self.operating_goal, self.annotations)
        _ = self.gate  # which refuses limits that are no share of 1

    @property
    def gate(self) -> Gate:
        """What INT8 has to keep."""
        if self.annotations is None:
            rate = _MIN_MATCH_RATE if self.min_match_rate is None else self.min_match_rate
            return Gate(min_match_rate=rate, judge=self.judge)
        drop = _MAX_MAP_DROP if self.max_map_drop is None else self.max_map_drop
        return Gate(
            max_map_drop=drop,
            max_precision_drop=self.max_precision_drop,
            max_recall_drop=self.max_recall_drop,
            min_match_rate=self.min_match_rate,
            judge=self.judge,
        )


def plan_targets(
    names: tuple[str, ...],
    *,
    backends: tuple[str, ...] = (),
    precisions: tuple[Precision, ...] = (),
    tail: Tail | None = None,
    input_size: tuple[int, int] | None = None,
    operators: frozenset[str] = frozenset(),
) -> tuple[Plan, ...]:
    """What each device profile gets: a plan for every backend and precision.

    Empty, None: the profile's choice. ``input_size`` is (height, width). ``operators``: ``source_operators``.

    Raises:
        ConfigError: an unknown profile, a plan that cannot work there, with the rule that forbids it, or a profile that
            wants another batch than the graphs of a bundle have.
    """
    size = input_size or PlanRequest().input_size
    requests = [
        PlanRequest(backend=backend, precision=precision, tail=tail, input_size=size, operators=operators)
        for backend in backends or ("",)
        for precision in precisions or (None,)
    ]
    profiles = [load_profile(name) for name in names]
    for profile in profiles:
        if profile.batch != 1:
            raise ConfigError(
                f"Profile '{profile.name}' needs batches of {profile.batch}; the graphs of a bundle take one image.",
                hint=f"set its batch to 1, or: fcos-deploy export --batch {profile.batch}, then build --target",
            )
    return tuple(make_plan(profile, request) for profile in profiles for request in requests)


@dataclass(frozen=True, slots=True)
class DeployContext:
    """What every step works with. ``contract`` is the one that artifacts carry, with the tail that they have.

    ``runs``: what detected on the evaluation images so far, and ``evaluations`` what searches for an accuracy goal made
    of it. ``engines``: what they built for it, by backend and hash of the graph.
    """

    request: DeployRequest
    source: DeploySource
    contract: ModelContract
    images: ImageSets
    writer: BundleWriter
    progress: ProgressFn
    cache: StepCache | None = None
    stages: StageClock = field(default_factory=StageClock)
    runs: DetectionRuns = field(default_factory=DetectionRuns)
    evaluations: dict[tuple[str, str], Evaluations] = field(default_factory=dict)
    engines: dict[tuple[str, str], BuildResult] = field(default_factory=dict)
    _graphs: dict[str, ConvGraph] = field(default_factory=dict)

    @property
    def predictions(self) -> Path:
        """Folder of the detections that every artifact of this bundle gave, by content."""
        return self.cache.predictions if self.cache else self.writer.scratch / "predictions"

    def step(
        self, name: str, *, stage: str, inputs: Mapping[str, str], make: Callable[[Path], StepOutput]
    ) -> StepResult:
        """A step of the bundle, in the time of a stage."""
        with self.stages.stage(stage):
            return self.writer.step(name, inputs=inputs, make=make)

    def model_step(
        self, name: str, *, stage: str, inputs: Mapping[str, str], make: Callable[[Path], StepOutput]
    ) -> StepResult:
        """A step that makes a model, or what goes into one: another bundle that made the same may lend it."""
        with self.stages.stage(stage):
            return self.writer.step(name, inputs=inputs, make=make, cache=self.cache)

    def engine(self, graph: Path, *, backend: str) -> Path:
        """What ``backend`` runs of a graph: an engine where it has a builder for one, which is built once."""
        exporter, sha256 = get_exporter(backend), sha256_file(graph)
        if exporter.produces is ArtifactKind.ONNX:
            return graph
        if (backend, sha256) not in self.engines:
            folder = self.writer.scratch / "engines" / sha256[:16]
            folder.mkdir(parents=True, exist_ok=True)
            output = folder / engine_file(Precision.INT8, backend=backend, kind=exporter.produces)
            self.engines[backend, sha256] = exporter.build(BuildRequest(source=graph, output=output))
        return self.engines[backend, sha256].files[0]

    def conv_graph(self, graph: Artifact) -> ConvGraph:
        """A float graph as calibration and quantizers read it, opened once."""
        from calibration.placement import open_graph

        if graph.sha256 not in self._graphs:
            self._graphs[graph.sha256] = open_graph(self.writer.path(graph.path))
        return self._graphs[graph.sha256]


@dataclass(frozen=True, slots=True)
class Graph:
    """An ONNX artifact, and where it lies while the bundle is being made."""

    artifact: Artifact
    path: Path
    tail: Tail
    deform_form: DeformForm = DeformForm.GRID_SAMPLE


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Activation ranges, and the record that the manifest keeps of them."""

    path: Path
    record: CalibrationRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant(DetectorSpec):
    """An artifact on the backend it was made for; ``model`` is where it lies while the bundle is being made.

    The format in which its float parts are computed is always asked for, never the runtime's own choice.
    """

    artifact: Artifact

    @property
    def compute(self) -> ComputeType:
        """The format of the parts that are not INT8."""
        return self.options.compute_type

    @property
    def label(self) -> str:
        """``openvino int8``; with the format where that is not float32: ``openvino int8 bf16``."""
        compute = "" if self.compute is ComputeType.F32 else f" {self.compute}"
        return f"{self.backend} {self.artifact.precision}{compute}"


def export(
    context: DeployContext,
    *,
    tail: Tail = Tail.RAW,
    precision: Precision = Precision.FP32,
    nms_form: NmsForm = NmsForm.ONNX,
    backend: str = "",
) -> Graph:
    """The checkpoint as a simplified float ONNX graph, compared with PyTorch.

    Deformable convolutions have the form that ``backend`` runs fastest; without one, the form that every runtime has.
    """
    deform_form = DeformForm.GRID_SAMPLE
    if backend and context.source.has_deformable:
        deform_form = get_backend(backend).deform_form
    own = backend if deform_form is DeformForm.OPERATOR else ""
    name = graph_file(precision, tail=tail, deform_form=deform_form)
    form = GraphForm(
        tail=tail,
        precision=precision,
        nms_form=nms_form,
        deform_form=deform_form,
        opset=context.request.opset,
        batch=context.request.batch,
    )

    def make(folder: Path) -> StepOutput:
        written = context.source.write_graph(folder / name, form, progress=context.progress)
        draft = ArtifactDraft(
            path=name,
            kind=ArtifactKind.ONNX,
            precision=precision,
            parent=context.source.sha256,
            backend=own,
            companions=tuple(file.name for file in files_of(folder / name)[1:]),
            config={"tail": str(tail), **written.config},
            tools=written.tools,
        )
        return StepOutput(artifacts=(draft,))

    inputs = {
        "checkpoint": context.source.sha256,
        "contract": contract_to_text(context.contract),
        "opset": str(context.request.opset or "default"),
        "nms_form": str(nms_form),
        "batch": str(context.request.batch or "open"),
        # ONNX Runtime runs the comparison with PyTorch.
        **library_versions("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime"),
    }
    label = "-".join(filter(None, ("export", precision, tail, own)))
    step = context.model_step(label, stage="export", inputs=inputs, make=make)
    return Graph(step.artifacts[0], context.writer.path(name), tail, deform_form)


def calibrate(context: DeployContext, source: Graph) -> Calibrated:
    """The ranges of the graph's activations over the calibration images."""
    from calibration.calibrate import collect_ranges, load_calibration, save_calibration

    images = context.images.calibration
    hashes = sorted(image.sha256 for image in images.images)
    named = sorted((image.name, image.sha256) for image in images.images)
    parts = ("" if source.tail is Tail.RAW else str(source.tail), source.artifact.backend)
    name = ".".join(filter(None, ("calibration", *parts, "json")))

    def make(folder: Path) -> StepOutput:
        state = context.writer.scratch / f"{name}.state"
        ranges = collect_ranges(context.conv_graph(source.artifact), images, state=state, progress=context.progress)
        save_calibration(ranges, folder / name)
        return StepOutput()

    inputs = {
        "graph": source.artifact.sha256,
        "images": json.dumps(named),
        "seed": str(images.seed),  # which the file tells, with the names
        **recorded_versions(),
    }
    label = "-".join(filter(None, ("calibrate", source.tail, source.artifact.backend)))
    context.model_step(label, stage="calibrate", inputs=inputs, make=make)
    path = context.writer.path(name)
    ranges = load_calibration(path)
    details = {"images": str(len(hashes)), "of": str(images.candidates), "seed": str(images.seed)}
    findings = context.images.findings
    if ranges.zero_tensors:
        message = (
            f"zero for every calibration image, so that their layers stay in float: {', '.join(ranges.zero_tensors)}"
        )
        findings += (Finding(kind="zero-tensors", severity=Severity.WARNING, message=message),)
    record = CalibrationRecord(
        path=name,
        method=str(ranges.method),
        images=tuple(hashes),
        pixels=tuple(sorted(image.pixels_sha256 for image in images.images)),
        details=details,
        findings=findings,
    )
    return Calibrated(path, record)


def quantize(
    context: DeployContext,
    source: Graph,
    *,
    calibrated: Calibrated,
    consumer: str,
    float_variant: Variant | None = None,
) -> Graph:
    """The INT8 graph in the placement of ``consumer``, a backend or a placement; shared by backends of one placement.

    Layers return to float until the accuracy goal holds, which is measured on the placement's own backend, against
    ``float_variant``, what runs of the float graph: on whichever backend, it is held to be the same detector.

    Raises:
        AccuracyGateError: the goal cannot be reached.
    """
    from calibration.calibrate import load_calibration
    from calibration.placement import placement_for
    from calibration.quantizers import QuantizeRequest

    policy, request = placement_for(consumer), context.request
    name = graph_file(Precision.INT8, tail=source.tail, placement=policy.name)
    goal = accuracy_goal(
        replace(request.gate, min_match_rate=None) if request.annotations else request.gate,
        images=request.images or request.calibration_images,
        annotations=request.annotations,
        placement=policy,
        threads=request.session.threads,
        sample=request.sample,
    )
    runs_engine = goal is not None and consumer == goal.backend
    scoring = (
        None
        if goal is None
        else Scoring(
            goal=goal,
            operating_goal=request.operating_goal,
            float_model=float_variant,
            runnable=lambda graph: context.engine(graph, backend=consumer) if runs_engine else graph,
            predictions=context.predictions,
            runs=context.runs,
            evaluations=context.evaluations,
            annotated=context.images.annotated,
            progress=context.progress,
        )
    )

    def make(folder: Path) -> StepOutput:
        quantization = QuantizeRequest(
            graph=context.conv_graph(source.artifact),
            output=folder / name,
            placement=policy,
            calibration=load_calibration(calibrated.path),
            seed=request.seed,
        )
        state = context.writer.scratch / f"{name}.search"
        quantized = quantize_model(quantization, scoring=scoring, state=state, progress=context.progress).result
        return StepOutput(artifacts=(int8_draft(name, source, policy, quantized),))

    inputs = {
        **int8_inputs(source, calibrated.path, policy),
        "goal": f"{request.gate} {request.operating_goal} {context.images.evaluation_key}",
        "measured": json.dumps(goal.fingerprint() if goal else []),
    }
    step = context.model_step(
        f"quantize-{policy.name}-{source.tail}", stage=f"quantize {policy.name}", inputs=inputs, make=make
    )
    return Graph(step.artifacts[0], context.writer.path(name), source.tail)


def int8_draft(name: str, source: Graph, policy: Placement, quantized: QuantizeResult) -> ArtifactDraft:
    """What a manifest says of the INT8 graph of ``source``."""
    return ArtifactDraft(
        path=name,
        kind=ArtifactKind.ONNX,
        precision=Precision.INT8,
        parent=source.artifact.sha256,
        placement=policy.name,
        config=dict(quantized.record),
        tools=library_versions("onnx"),
    )


def int8_inputs(source: Graph, calibration: Path, policy: Placement) -> dict[str, str]:
    """What an INT8 graph depends on, apart from an accuracy goal."""
    return {
        "graph": source.artifact.sha256,
        "calibration": sha256_file(calibration),
        "placement": json.dumps(to_json(policy), sort_keys=True),
    }


def build(context: DeployContext, graph: Graph, *, backend: str, options: BuildOptions | None = None) -> Variant:
    """The engine of one graph for one backend; a backend that runs the ONNX file as it is needs none."""
    source, options = graph.artifact, options or BuildOptions()
    exporter, probe = get_exporter(backend), get_backend(backend).probe()
    version = probe.version
    session = replace(context.request.session, compute=ComputeType.F32)
    if exporter.produces is source.kind:
        return Variant(model=graph.path, backend=backend, precision=source.precision, artifact=source, options=session)
    name = engine_file(source.precision, backend=backend, kind=exporter.produces)

    def make(folder: Path) -> StepOutput:
        label = f"build {backend} {source.precision}"
        context.progress(label, 0, 1)
        engine = context.engines.get((backend, source.sha256)) if options == BuildOptions() else None
        if engine is None:
            engine = exporter.build(
                BuildRequest(source=graph.path, output=folder / name, options=options, progress=context.progress)
            )
        else:  # The search for the accuracy goal has evaluated this very file.
            files = tuple(Path(shutil.copy(file, folder)) for file in engine.files)
            engine = replace(engine, files=files)
        context.progress(label, 1, 1)
        draft = ArtifactDraft(
            path=name,
            kind=exporter.produces,
            precision=source.precision,
            parent=source.sha256,
            backend=backend,
            placement=source.placement,
            companions=tuple(file.name for file in engine.files if file.name != name),
            requires=engine_requirements(backend, version=version, record=engine.record),
            config=dict(engine.record),
            tools={backend: version},
        )
        return StepOutput(artifacts=(draft,))

    inputs = {
        "graph": source.sha256,
        "exporter": exporter.name,
        "version": version,
        "devices": " ".join(probe.devices),
        "options": json.dumps(to_json(options), sort_keys=True, default=str),
    }
    step = context.model_step(f"build-{backend}-{source.precision}", stage="build", inputs=inputs, make=make)
    return Variant(
        model=context.writer.path(name),
        backend=backend,
        precision=source.precision,
        artifact=step.artifacts[0],
        options=session,
    )


def make_for_device(context: DeployContext, plan: Plan) -> None:
    """The graph with the plan's tail and precision and, where the builder does not need the device, the engine.

    Raises:
        AccuracyGateError: INT8 cannot hold the accuracy goal.
    """
    float_precision = Precision.FP32 if plan.precision is Precision.INT8 else plan.precision
    graph = export(context, tail=plan.tail, precision=float_precision, nms_form=plan.nms_form, backend=plan.backend)
    if plan.precision is Precision.INT8:
        graph = quantize(context, graph, calibrated=calibrate(context, graph), consumer=plan.placement)
    if any(a.where == "here" and a.kind is not ArtifactKind.ONNX for a in plan.artifacts):
        build(context, graph, backend=plan.backend, options=plan.options)
