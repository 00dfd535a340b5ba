"""The rules that forbid a plan: each returns a sentence when the plan breaks it (sources: docs/hardware.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from fcos_deploy.core.decode import MAX_TOP_K
from fcos_deploy.core.enums import ArtifactKind, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BatchRange, BuildOptions
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.core.model_files import engine_file, graph_file
from fcos_deploy.core.registry import get_backend, get_exporter
from fcos_deploy.targets.profiles import DeviceProfile
from fcos_deploy.targets.trtexec import TrtexecRequest, trtexec_command

__all__ = ["RULES", "Draft", "Plan", "PlanRequest", "PlannedArtifact", "plan", "rule_name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is wanted; None and empty leave the choice to the profile. ``batch`` equal in all three is a fixed one.

    ``input_size`` (height, width) None: sizes follow the image. ``nms_form`` is that of the nms tail, and
    ``image_sizes`` whether its graph has that second input (``ModelContract.needs_image_sizes``; it has for every
    ecosystem whose boxes are clipped or suppressed in image pixels).
    """

    backend: str = ""
    precision: Precision | None = None
    tail: Tail | None = None
    batch: BatchRange | None = None
    input_size: tuple[int, int] | None = (800, 1344)
    nms_form: NmsForm | None = None
    image_sizes: bool = True
    opset: int = 17
    pre_nms_top_k: int = 1000
    dla_core: int | None = None
    calibration_cache: bool = False
    workspace_mib: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request with the profile's choices filled in."""

    profile: DeviceProfile
    request: PlanRequest
    backend: str
    precision: Precision
    tail: Tail
    batch: BatchRange

    @property
    def kind(self) -> ArtifactKind:
        """What the backend opens."""
        return get_exporter(self.backend).produces

    @property
    def builds_engine(self) -> bool:
        """Whether TensorRT or TensorRT-RTX builds it."""
        return self.kind in (ArtifactKind.TENSORRT_ENGINE, ArtifactKind.TENSORRT_RTX_ENGINE)

    @property
    def dynamic(self) -> bool:
        """Whether the batch or the input size may vary."""
        return self.batch.minimum != self.batch.maximum or self.request.input_size is None

    @property
    def tensorrt(self) -> str:
        """The device's TensorRT; empty on other devices and for TensorRT-RTX, which is installed by pip."""
        nvidia = self.profile.nvidia
        return nvidia.tensorrt if nvidia is not None and self.kind is ArtifactKind.TENSORRT_ENGINE else ""

    @property
    def nms_form(self) -> NmsForm:
        """How the nms tail suppresses: as asked for, or as suits the target."""
        if self.request.nms_form is not None:
            return self.request.nms_form
        return NmsForm.ONNX if self._has_nms_operator else NmsForm.STATIC

    @property
    def _has_nms_operator(self) -> bool:
        intel = self.profile.intel
        return self.kind is not ArtifactKind.TENSORRT_RTX_ENGINE and (intel is None or not intel.static_shapes)

    @property
    def nms_problem(self) -> str:
        """Why this target has not the form of NMS; empty where it has."""
        if self.nms_form is not NmsForm.ONNX or self._has_nms_operator:
            return ""
        if self.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
            return "TensorRT-RTX has no NMS operator; take the tail 'candidates', or the nms tail in its static form."
        return "NMS gives outputs of unknown size, which this device cannot compile; take the tail 'raw' or static NMS."

    @property
    def version(self) -> tuple[int, ...]:
        """``tensorrt`` as numbers."""
        return parse_version(self.tensorrt) if self.tensorrt else ()


def _backend_on_device(draft: Draft) -> str:
    if draft.backend in draft.profile.backends:
        return ""
    return f"backend '{draft.backend}' does not run there, it has {', '.join(draft.profile.backends)}."


def _precision_on_device(draft: Draft) -> str:
    if draft.precision in draft.profile.precisions:
        return ""
    return f"it does not compute in {draft.precision}, only in {', '.join(draft.profile.precisions)}."


def _opset_of_parser(draft: Draft) -> str:
    """GroupNormalization of opset 18 cannot be used with torch's scales, 21's needs TensorRT 10.9; up to 8.6: 17."""
    version, opset = draft.version, draft.request.opset
    if not version or opset <= 17:
        return ""
    if version < (8, 7):
        return f"TensorRT {draft.tensorrt} reads ONNX up to opset 17, not {opset}."
    if opset >= 21 and version < (10, 9):
        return f"GroupNormalization of opset {opset} needs TensorRT 10.9 or later; export with opset 17."
    return ""


def _nms_operator(draft: Draft) -> str:
    return draft.nms_problem if draft.tail is Tail.NMS else ""


def _top_k_limit(draft: Draft) -> str:
    if not draft.builds_engine or draft.tail is Tail.RAW or draft.request.pre_nms_top_k <= MAX_TOP_K:
        return ""
    return f"TensorRT's TopK takes at most {MAX_TOP_K}, pre_nms_top_k is {draft.request.pre_nms_top_k}."


def _static_shapes(draft: Draft) -> str:
    intel = draft.profile.intel
    if intel is None or not intel.static_shapes or not draft.dynamic:
        return ""
    return "it compiles graphs with fixed shapes only; give one batch size and an input size."


def _size_range(draft: Draft) -> str:
    if not draft.builds_engine or draft.request.input_size is not None:
        return ""
    return "an engine needs bounds for its input; give an input size, or build with height and width ranges there."


def _dla(draft: Draft) -> str:
    if draft.request.dla_core is None:
        return ""
    cores = draft.profile.nvidia.dla_cores if draft.profile.nvidia is not None and draft.tensorrt else 0
    if draft.request.dla_core not in range(cores):
        return f"DLA core {draft.request.dla_core} was asked for, this device and TensorRT have {cores}."
    if draft.dynamic:
        return "a DLA takes fixed shapes only; give one batch size."
    if draft.precision is Precision.FP32:
        return "a DLA computes in fp16 and int8 only."
    if draft.precision is Precision.INT8 and not draft.request.calibration_cache and draft.version < (11, 4):
        return "before TensorRT 11.4 a DLA takes int8 from a calibration cache only, not from Q/DQ nodes."
    return ""


def _calibrators(draft: Draft) -> str:
    if not draft.request.calibration_cache:
        return ""
    if not draft.tensorrt or draft.version >= (11,):
        return "calibration caches are read by TensorRT up to 10 only; INT8 is in the ONNX file."
    return "" if draft.precision is Precision.INT8 else "a calibration cache is for int8."


def _workspace(draft: Draft) -> str:
    wanted = draft.request.workspace_mib or 0
    if wanted < draft.profile.memory_mib:
        return ""
    return f"a workspace of {wanted} MiB does not fit its {draft.profile.memory_mib} MiB of memory."


RULES: tuple[Callable[[Draft], str], ...] = (
    _backend_on_device,
    _precision_on_device,
    _static_shapes,
    _size_range,
    _nms_operator,
    _top_k_limit,
    _opset_of_parser,
    _dla,
    _calibrators,
    _workspace,
)


def rule_name(rule: Callable[[Draft], str]) -> str:
    """What docs/hardware.md calls it."""
    return rule.__name__.removeprefix("_").replace("_", "-")


@dataclass(frozen=True, slots=True)
class PlannedArtifact:
    """A file of the bundle: ``where`` is 'here' or 'on the device'."""

    path: str
    kind: ArtifactKind
    precision: Precision
    where: str
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan that no rule forbids. ``trtexec`` is empty for other backends; ``notes`` are for people.

    ``nms_form`` is how the nms tail suppresses, and says nothing about the other tails.
    """

    profile: DeviceProfile
    backend: str
    precision: Precision
    tail: Tail
    nms_form: NmsForm
    placement: str
    artifacts: tuple[PlannedArtifact, ...]
    options: BuildOptions
    commands: tuple[str, ...]
    trtexec: str = ""
    notes: tuple[str, ...] = field(default=())


def plan(profile: DeviceProfile, request: PlanRequest | None = None) -> Plan:
    """Decide what is made for this device.

    Raises:
        ConfigError: naming the rule that the request breaks.
    """
    request = request or PlanRequest()
    draft = Draft(
        profile=profile,
        request=request,
        backend=request.backend or profile.backends[0],
        precision=request.precision or profile.precision,
        tail=request.tail or profile.tail,
        batch=request.batch or BatchRange(profile.batch, profile.batch, profile.batch),
    )
    for rule in RULES:
        problem = rule(draft)
        if problem:
            raise ConfigError(
                f"{profile.title}: {problem}", hint=f"the rule is '{rule_name(rule)}', see docs/hardware.md"
            )
    return _planned(draft)


def _planned(draft: Draft) -> Plan:
    artifacts, options = _artifacts(draft), _options(draft)
    device_side = [a for a in artifacts if a.where != "here"]
    return Plan(
        profile=draft.profile,
        backend=draft.backend,
        precision=draft.precision,
        tail=draft.tail,
        nms_form=draft.nms_form,
        placement=_placement(draft) if draft.precision is Precision.INT8 else "",
        artifacts=artifacts,
        options=options,
        commands=tuple(f"fcos-deploy build BUNDLE --backend {draft.backend}" for _ in device_side)
        if draft.profile.runs_python
        else (),
        trtexec=_trtexec(draft) if draft.tensorrt else "",
        notes=(*draft.profile.notes, *_notes(draft)),
    )


def _placement(draft: Draft) -> str:
    return get_backend(draft.backend).placements[0]


def _source_onnx(draft: Draft) -> str:
    precision = Precision.FP32 if draft.request.calibration_cache else draft.precision
    placement = _placement(draft) if precision is Precision.INT8 else ""
    return graph_file(precision, tail=draft.tail, placement=placement)


def _engine(draft: Draft) -> str:
    return engine_file(draft.precision, backend=draft.backend, kind=draft.kind)


def _artifacts(draft: Draft) -> tuple[PlannedArtifact, ...]:
    first = graph_file(Precision.FP32, tail=draft.tail)
    made = [PlannedArtifact(first, ArtifactKind.ONNX, Precision.FP32, "here", f"export, {_tail_in_words(draft)}")]
    if _source_onnx(draft) != first:
        how = f"Q/DQ nodes, placement {_placement(draft)}" if draft.precision is Precision.INT8 else "convert to fp16"
        made.append(PlannedArtifact(_source_onnx(draft), ArtifactKind.ONNX, draft.precision, "here", how))
    if draft.kind is not ArtifactKind.ONNX:
        where = "on the device" if draft.tensorrt else "here"  # TensorRT builds for the GPU it runs on, and no other.
        made.append(
            PlannedArtifact(_engine(draft), draft.kind, draft.precision, where, f"build from {_source_onnx(draft)}")
        )
    return tuple(made)


def _tail_in_words(draft: Draft) -> str:
    form = f" in its {draft.nms_form} form" if draft.tail is Tail.NMS else ""
    return f"tail {draft.tail}{form}"


def _options(draft: Draft) -> BuildOptions:
    nvidia, request = draft.profile.nvidia, draft.request
    options = BuildOptions(batch=draft.batch, dla_core=request.dla_core)
    if nvidia is None:
        return options
    if draft.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
        return replace(options, compute_capabilities=(nvidia.compute_capability,))
    cache = Path("calibration.cache") if request.calibration_cache else None
    return replace(options, workspace_mib=request.workspace_mib or nvidia.workspace_mib, calibration_cache=cache)


def _trtexec(draft: Draft) -> str:
    return trtexec_command(
        TrtexecRequest(
            onnx=PurePosixPath(_source_onnx(draft)),
            engine=PurePosixPath(_engine(draft)),
            version=draft.tensorrt,
            precision=draft.precision,
            shapes=_profile_shapes(draft),
            options=_options(draft),
        )
    )


def _profile_shapes(draft: Draft) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    size, batch = draft.request.input_size, draft.batch
    if size is None or not draft.dynamic:
        return {}
    inputs: dict[str, tuple[int, ...]] = {"images": (3, *size)}
    if draft.tail is Tail.NMS and draft.request.image_sizes:
        inputs["image_sizes"] = (4,)
    smallest, usual, largest = batch.minimum, batch.optimal, batch.maximum
    return {name: ((smallest, *shape), (usual, *shape), (largest, *shape)) for name, shape in inputs.items()}


def _notes(draft: Draft) -> list[str]:
    notes = []
    if not draft.profile.runs_python:
        notes.append(
            f"The device has Python {draft.profile.python}, this package needs 3.10: build and run the engine with "
            "trtexec or your own C++; 'fcos-deploy verify' cannot run there."
        )
    if draft.precision is Precision.INT8 and draft.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
        notes.append("TensorRT-RTX computes int8 convolutions without fusing what follows them: compare with fp16.")
    if not draft.profile.verified:
        notes.append("This profile has never been run on hardware by the project (docs/hardware.md).")
    return notes
