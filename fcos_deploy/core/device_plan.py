"""What would be built for a device, and with which flags, without being on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from fcos_deploy.core.artifact_files import engine_file, graph_file
from fcos_deploy.core.device_rules import RULES, Draft, PlanRequest, rule_name
from fcos_deploy.core.devices import DeviceProfile
from fcos_deploy.core.enums import ArtifactKind, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BatchRange, BuildOptions
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.trtexec import TrtexecRequest, trtexec_command

__all__ = ["Plan", "PlanRequest", "PlannedArtifact", "plan"]


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
    return backend_named(draft.backend).placements[0]


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
