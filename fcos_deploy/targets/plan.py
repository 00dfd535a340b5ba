"""What to build for a device, the rules that forbid it (sources: docs/hardware.md), and the ``trtexec`` command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from fcos_deploy.core.artifact import engine_file, graph_file
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.decode import MAX_TOP_K
from fcos_deploy.core.enums import ArtifactKind, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, SizeRange, get_exporter
from fcos_deploy.core.libraries import parse_version
from fcos_deploy.targets.profiles import DLA, NPU, DeviceProfile, fallback_note

__all__ = ["RULES", "Draft", "Plan", "PlanRequest", "PlannedArtifact", "plan", "trtexec_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What the user asks for; None and empty leave the choice to the profile.

    ``input_size`` (height, width) None: sizes follow the image. ``nms_form`` is that of the nms tail, and
    ``image_sizes`` whether its graph has that second input (``ModelContract.needs_image_sizes``; it has for every
    ecosystem whose boxes are clipped or suppressed in image pixels). ``image_channels`` is 1 for gray images.
    ``operators`` are the ONNX operators of the network, as far as they are known.
    """

    backend: str = ""
    precision: Precision | None = None
    tail: Tail | None = None
    batch: SizeRange | None = None
    input_size: tuple[int, int] | None = (800, 1344)
    nms_form: NmsForm | None = None
    image_sizes: bool = True
    image_channels: int = 3
    opset: int = 17
    pre_nms_top_k: int = 1000
    dla_core: int | None = None
    calibration_cache: bool = False
    workspace_mib: int | None = None
    operators: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request with the profile's choices filled in."""

    profile: DeviceProfile
    request: PlanRequest
    backend: str
    precision: Precision
    tail: Tail
    batch: SizeRange

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
        """How the nms tail suppresses: as asked for, or the form that the device runs."""
        if self.request.nms_form is not None:
            return self.request.nms_form
        return NmsForm.ONNX if self.has_nms_operator else NmsForm.STATIC

    @property
    def has_nms_operator(self) -> bool:
        """Whether the backend runs ONNX NonMaxSuppression on the device."""
        intel = self.profile.intel
        return self.kind is not ArtifactKind.TENSORRT_RTX_ENGINE and (intel is None or not intel.static_shapes)

    @property
    def placement(self) -> str:
        """The Q/DQ placement of the INT8 graph; '' for float graphs."""
        return get_backend(self.backend).placements[0] if self.precision is Precision.INT8 else ""

    @property
    def source_file(self) -> str:
        """The ONNX file that the engine is built from, or that is run; with a calibration cache the fp32 one."""
        if self.request.calibration_cache:
            return graph_file(Precision.FP32, tail=self.tail)
        return graph_file(self.precision, tail=self.tail, placement=self.placement)

    @property
    def engine_file(self) -> str:
        """The file that the backend's builder makes."""
        return engine_file(self.precision, backend=self.backend, kind=self.kind)

    @property
    def version(self) -> tuple[int, ...]:
        """``tensorrt`` as numbers."""
        return parse_version(self.tensorrt) if self.tensorrt else ()

    @property
    def fallback(self) -> str:
        """The layers that the device's DLA or NPU does not compute, as a sentence."""
        nvidia, intel = self.profile.nvidia, self.profile.intel
        if nvidia is not None and nvidia.dla_cores and self.tensorrt:
            return fallback_note(DLA, self.request.operators, tail=self.tail)
        if intel is not None and intel.device == "NPU" and self.kind is ArtifactKind.OPENVINO_IR:
            return fallback_note(NPU, self.request.operators)
        return ""


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
    if draft.tail is not Tail.NMS or draft.nms_form is not NmsForm.ONNX or draft.has_nms_operator:
        return ""
    if draft.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
        return "TensorRT-RTX has no NMS operator; take the tail 'candidates', or the nms tail in its static form."
    return "NMS gives outputs of unknown size, which this device cannot compile; take the tail 'raw' or static NMS."


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


# By the name that docs/hardware.md gives it, each rule's sentence when the draft breaks it, and '' when it does not.
RULES: dict[str, Callable[[Draft], str]] = {
    "backend-on-device": lambda draft: (
        f"backend '{draft.backend}' does not run there, it has {', '.join(draft.profile.backends)}."
        if draft.backend not in draft.profile.backends
        else ""
    ),
    "precision-on-device": lambda draft: (
        f"it does not compute in {draft.precision}, only in {', '.join(draft.profile.precisions)}."
        if draft.precision not in draft.profile.precisions
        else ""
    ),
    "static-shapes": lambda draft: (
        "it compiles graphs with fixed shapes only; give one batch size and an input size."
        if draft.profile.intel is not None and draft.profile.intel.static_shapes and draft.dynamic
        else ""
    ),
    "size-range": lambda draft: (
        "an engine needs bounds for its input; give an input size, or build with height and width ranges there."
        if draft.builds_engine and draft.request.input_size is None
        else ""
    ),
    "nms-operator": _nms_operator,
    "top-k-limit": lambda draft: (
        f"TensorRT's TopK takes at most {MAX_TOP_K}, pre_nms_top_k is {draft.request.pre_nms_top_k}."
        if draft.builds_engine and draft.tail is not Tail.RAW and draft.request.pre_nms_top_k > MAX_TOP_K
        else ""
    ),
    "opset-of-parser": _opset_of_parser,
    "dla": _dla,
    "calibrators": _calibrators,
    "workspace": lambda draft: (
        f"a workspace of {draft.request.workspace_mib} MiB does not fit its {draft.profile.memory_mib} MiB of memory."
        if (draft.request.workspace_mib or 0) >= draft.profile.memory_mib
        else ""
    ),
}


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

    ``fallback``, also among the notes, names the layers that the device's DLA or NPU leaves to something else.
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
    fallback: str = ""


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
        batch=request.batch or SizeRange(*[profile.batch] * 3),
    )
    for name, rule in RULES.items():
        problem = rule(draft)
        if problem:
            raise ConfigError(f"{profile.title}: {problem}", hint=f"the rule is '{name}', see docs/hardware.md")
    artifacts = _artifacts(draft)
    on_device = any(artifact.where != "here" for artifact in artifacts)
    return Plan(
        profile=profile,
        backend=draft.backend,
        precision=draft.precision,
        tail=draft.tail,
        nms_form=draft.nms_form,
        placement=draft.placement,
        artifacts=artifacts,
        options=_options(draft),
        commands=(f"fcos-deploy setup BUNDLE --backend {draft.backend}",) if on_device and profile.runs_python else (),
        trtexec=_trtexec(draft) if draft.tensorrt else "",
        notes=(*profile.notes, *_notes(draft)),
        fallback=draft.fallback,
    )


def _artifacts(draft: Draft) -> tuple[PlannedArtifact, ...]:
    exported, source = graph_file(Precision.FP32, tail=draft.tail), draft.source_file
    form = f" in its {draft.nms_form} form" if draft.tail is Tail.NMS else ""
    artifacts = [
        PlannedArtifact(exported, ArtifactKind.ONNX, Precision.FP32, "here", f"export, tail {draft.tail}{form}")
    ]
    if source != exported:
        how = f"Q/DQ nodes, placement {draft.placement}" if draft.precision is Precision.INT8 else "convert to fp16"
        artifacts.append(PlannedArtifact(source, ArtifactKind.ONNX, draft.precision, "here", how))
    if draft.kind is not ArtifactKind.ONNX:
        where = "on the device" if draft.tensorrt else "here"  # TensorRT builds for the GPU it runs on, and no other.
        artifacts.append(PlannedArtifact(draft.engine_file, draft.kind, draft.precision, where, f"build from {source}"))
    return tuple(artifacts)


def _options(draft: Draft) -> BuildOptions:
    nvidia, request = draft.profile.nvidia, draft.request
    options = BuildOptions(batch=draft.batch, dla_core=request.dla_core)
    if nvidia is None:
        return options
    if draft.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
        return replace(options, compute_capabilities=(nvidia.compute_capability,))
    cache = Path("calibration.calibrate") if request.calibration_cache else None
    return replace(options, workspace_mib=request.workspace_mib or nvidia.workspace_mib, calibration_cache=cache)


def _trtexec(draft: Draft) -> str:
    size, shapes = draft.request.input_size, {}
    if size is not None and draft.dynamic:
        inputs: dict[str, tuple[int, ...]] = {"images": (draft.request.image_channels, *size)}
        if draft.tail is Tail.NMS and draft.request.image_sizes:
            inputs["image_sizes"] = (4,)
        low, opt, high = draft.batch
        shapes = {name: ((low, *shape), (opt, *shape), (high, *shape)) for name, shape in inputs.items()}
    return trtexec_command(
        onnx=PurePosixPath(draft.source_file),
        engine=PurePosixPath(draft.engine_file),
        version=draft.tensorrt,
        precision=draft.precision,
        shapes=shapes,
        options=_options(draft),
    )


def _notes(draft: Draft) -> list[str]:
    notes = [draft.fallback] if draft.fallback else []
    if not draft.profile.runs_python:
        notes.append(
            f"The device has Python {draft.profile.python}, this package needs 3.10: build and prove the engine "
            f"there with trtexec: fcos-deploy package BUNDLE --for trtexec --target {draft.profile.name} -o DIR"
        )
    if draft.precision is Precision.INT8 and draft.kind is ArtifactKind.TENSORRT_RTX_ENGINE:
        notes.append("TensorRT-RTX computes int8 convolutions without fusing what follows them: compare with fp16.")
    if not draft.profile.verified:
        notes.append("This profile has never been run on hardware by the project (docs/hardware.md).")
    return notes


# Options that not every trtexec has: the first version with it and the first without it again. From the parser of each
# release (samples/common/sampleOptions.cpp in NVIDIA/TensorRT, branches release/8.4 to release/11.1).
_VERSIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "--buildOnly": ((8, 0), (10,)),
    "--skipInference": ((8, 6), (99,)),
    "--builderOptimizationLevel": ((8, 6), (99,)),
    "--versionCompatible": ((8, 6), (99,)),
    "--hardwareCompatibilityLevel": ((8, 6), (99,)),
    "--stronglyTyped": ((9,), (99,)),
    "--memPoolSize": ((8, 4), (99,)),
    "--fp16": ((5,), (11,)),
    "--int8": ((5,), (11,)),
    "--calib": ((5,), (11,)),
}


def trtexec_command(
    *,
    onnx: PurePosixPath,
    engine: PurePosixPath,
    version: str,
    precision: Precision,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]],
    options: BuildOptions,
) -> str:
    """One shell line.

    ``shapes``: min, opt and max shape of each dynamic input; empty for a static graph. ``precision`` is the ONNX
    file's; with a calibration cache that is fp32 and the engine INT8.

    Raises:
        ConfigError: an option that this version's trtexec does not have, or a calibration cache for TensorRT 11, which
            has no calibrators.
    """
    release = parse_version(version)
    flags = {
        "--noTF32": not options.tf32,
        f"--memPoolSize=workspace:{options.workspace_mib}": options.workspace_mib is not None,
        f"--builderOptimizationLevel={options.optimization_level}": options.optimization_level is not None,
        f"--timingCacheFile={options.timing_cache}": options.timing_cache is not None,
        f"--useDLACore={options.dla_core}": options.dla_core is not None,
        "--allowGPUFallback": options.dla_core is not None and not options.dla_strict,
        "--versionCompatible": options.version_compatible,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
    }
    limits = {
        label: ",".join(f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in shapes.items())
        for index, label in enumerate(("min", "opt", "max"))
    }
    arguments = [
        "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        "--buildOnly" if release < (8, 6) else "--skipInference",
        *_types(release, precision, options),
        *(f"--{label}Shapes={text}" for label, text in limits.items() if text),
        *(flag for flag, given in flags.items() if given),
    ]
    for argument in arguments:
        name = argument.partition("=")[0]
        first, end = _VERSIONS.get(name, ((0,), (99,)))
        if not first <= release < end:
            raise ConfigError(
                f"trtexec of TensorRT {version} has no option '{name}'.",
                hint="leave the option out, or build for another device with --target",
            )
    return shlex.join(arguments)


def _types(version: tuple[int, ...], precision: Precision, options: BuildOptions) -> list[str]:
    """Strong typing where the version has it (11 knows nothing else), else a flag for each type in the graph."""
    cache, dla = options.calibration_cache, options.dla_core is not None
    if version >= (11,):
        if cache is not None:
            raise ConfigError("TensorRT 11 has no calibrators.", hint="build the INT8 ONNX file, without a cache")
        return []
    if version >= (10,) and cache is None and not dla:
        return ["--stronglyTyped"]
    flags = ["--fp16"] if precision is Precision.FP16 or dla else []
    if precision is Precision.INT8 or cache is not None:
        flags.append("--int8")
    return [*flags, f"--calib={cache}"] if cache is not None else flags
