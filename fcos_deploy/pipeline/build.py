"""Builds an artifact for a backend from an ONNX file, or from one in a bundle; or says how trtexec would."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from exporters._tensorrt_options import profile_shapes
from fcos_deploy.bundle import (
    Artifact,
    ArtifactDraft,
    Bundle,
    Requirements,
    VersionRule,
    is_bundle,
    open_trusted,
    select_artifact,
)
from fcos_deploy.bundle.device_layer import write_layer
from fcos_deploy.core.artifact import engine_file, read_contract
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult, get_exporter
from fcos_deploy.core.onnx_file import OnnxInterface, onnx_interface
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.trust import Trust
from fcos_deploy.targets.plan import PlanRequest, plan, trtexec_command
from fcos_deploy.targets.profiles import DeviceProfile, load_profile

__all__ = ["ArtifactRequest", "build_artifact", "engine_requirements", "equivalent_trtexec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRequest:
    """``source`` is an ONNX file or a bundle; ``target`` a device profile for what ``options`` leaves open.

    Without ``output`` the artifact of a bundle becomes a layer of this device. ``trust``: what the bundle must be.
    """

    source: Path
    output: Path | None
    backend: str
    target: str = ""
    options: BuildOptions = field(default_factory=BuildOptions)
    trust: Trust = field(default_factory=Trust)


def build_artifact(request: ArtifactRequest, *, progress: ProgressFn = no_progress) -> BuildResult:
    """Build, check, and write the artifact with its contract beside it.

    Raises:
        ConfigError: no such backend or profile, an option that the builder does not have, a plan that cannot work, or
            an output inside a bundle.
        BuildError, StepCheckError: the builder failed, or its result is not the same model.
        MissingDependencyError: the builder is not installed.
    """
    exporter = get_exporter(request.backend)
    if request.output is None:
        return _build_layer(request, progress)
    inside = next((folder for folder in request.output.absolute().parents if is_bundle(folder)), None)
    if inside is not None:
        raise ConfigError(
            f"'{request.output}' lies inside the bundle '{inside}', whose files are certified and stay as they are.",
            hint="leave -o out: what is built then becomes a layer of this device, which every command uses",
        )
    with _resolved(request) as source:
        return exporter.build(
            BuildRequest(source=source.path, output=request.output, options=source.options, progress=progress)
        )


def _build_layer(request: ArtifactRequest, progress: ProgressFn) -> BuildResult:
    """Build from the bundle's own graph into a layer of this device."""
    if not is_bundle(request.source):
        raise ConfigError(
            f"'{request.source}' is not a bundle, so an output is needed.", hint="name the file to write with -o"
        )
    with _resolved(request) as source:
        if source.bundle is None or source.artifact is None:
            raise ConfigError(f"'{request.source}' is not a bundle.", hint="name the file to write with -o")
        exporter, graph, results = get_exporter(request.backend), source.artifact, list[BuildResult]()
        version = get_backend(request.backend).probe().version

        def make(folder: Path) -> ArtifactDraft:
            precision = source.options.precision or graph.precision
            name = engine_file(precision, backend=request.backend, kind=exporter.produces)
            result = exporter.build(
                BuildRequest(source=source.path, output=folder / name, options=source.options, progress=progress)
            )
            results.append(result)
            return ArtifactDraft(
                path=name,
                kind=exporter.produces,
                precision=precision,
                parent=graph.sha256,
                backend=request.backend,
                placement=graph.placement,
                companions=tuple(file.name for file in result.files if file.name != name),
                requires=engine_requirements(request.backend, version=version, record=result.record),
                config=dict(result.record),
                tools={request.backend: version},
            )

        label = str(source.options.precision or graph.precision)
        state = write_layer(source.bundle, backend=request.backend, make=make, label=label)
        source.bundle.require_not_replaced()
        files = tuple(state.folder / file.name for file in results[0].files)
        return BuildResult(files=files, record={**results[0].record, "layer": state.name})


# An IR is read by every later OpenVINO; an engine by the version that built it.
_VERSION_RULES: dict[ArtifactKind, VersionRule] = {
    ArtifactKind.OPENVINO_IR: VersionRule.AT_LEAST,
    ArtifactKind.TENSORRT_ENGINE: VersionRule.EXACT,
    ArtifactKind.TENSORRT_RTX_ENGINE: VersionRule.EXACT,
}


def engine_requirements(backend: str, *, version: str, record: Mapping[str, str]) -> Requirements:
    """What a machine needs to run what the builder of ``backend`` made; ``record`` is the builder's."""
    kind = get_exporter(backend).produces
    if kind not in _VERSION_RULES:
        return Requirements()
    return Requirements(
        backend_version=version,
        version_rule=_VERSION_RULES[kind],
        compute_capabilities=tuple(re.findall(r"\d+\.\d", record.get("compute_capabilities", ""))),
    )


def equivalent_trtexec(request: ArtifactRequest) -> str:
    """The ``trtexec`` line that builds the engine that ``build_artifact`` would; nothing is built.

    It is for the TensorRT of the device profile or, without one, for that of this machine.

    Raises:
        ConfigError: not an engine of TensorRT, or the version of TensorRT is not known.
    """
    if get_exporter(request.backend).produces is not ArtifactKind.TENSORRT_ENGINE:
        raise ConfigError(f"trtexec builds TensorRT engines, not those of '{request.backend}'.")
    with _resolved(request) as source:
        return _trtexec_of(source, request)


def _trtexec_of(source: _Source, request: ArtifactRequest) -> str:
    device = source.profile.nvidia if source.profile else None
    version = device.tensorrt if device else get_backend(request.backend).probe().version
    if not version:
        raise ConfigError(
            "The trtexec line differs between versions of TensorRT, and none is installed here.",
            hint="name the device with --target",
        )
    inputs = {spec.name: spec.shape for spec in source.graph.inputs}
    shapes = profile_shapes(inputs, options=source.options, size_divisor=source.contract.preprocess.size_divisor)
    graph = source.path
    if source.bundle is not None and source.artifact is not None:
        graph = source.bundle.root / source.artifact.path  # not the copy, which does not outlast this process
    return trtexec_command(
        onnx=PurePosixPath(graph),
        engine=PurePosixPath(request.output or "model.engine"),
        version=version,
        precision=source.contract.precision,
        shapes={name: shape for name, shape in shapes.items() if None in inputs[name]},
        options=source.options,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The ONNX file to build from, the bundle and artifact it is of, and the options with the profile's choices."""

    path: Path
    bundle: Bundle | None
    artifact: Artifact | None
    contract: ModelContract
    graph: OnnxInterface
    profile: DeviceProfile | None
    options: BuildOptions


@contextlib.contextmanager
def _resolved(request: ArtifactRequest) -> Iterator[_Source]:
    """What to build from; a bundle is open, and an archive unpacked, within the block."""
    profile = load_profile(request.target) if request.target else None
    if request.trust == Trust() and not request.source.is_dir() and request.source.suffix != ".tar":
        yield _resolve(request, profile, request.source)
        return
    with open_trusted(request.source, request.trust) as bundle:
        artifact = _onnx_in_bundle(bundle, request, profile)
        source = _resolve(request, profile, bundle.path(artifact.path))
        yield replace(source, bundle=bundle, artifact=artifact)


def _resolve(request: ArtifactRequest, profile: DeviceProfile | None, path: Path) -> _Source:
    contract, graph = read_contract(path), onnx_interface(path)
    options = request.options
    if profile is not None:
        options = _with_profile(profile, request, contract, graph)
    if options.precision is contract.precision:
        options = replace(options, precision=None)  # Nothing to convert.
    return _Source(
        path=path, bundle=None, artifact=None, contract=contract, graph=graph, profile=profile, options=options
    )


def _onnx_in_bundle(bundle: Bundle, request: ArtifactRequest, profile: DeviceProfile | None) -> Artifact:
    """The bundle's ONNX file of the precision to build from and, for a device profile, with the profile's tail."""
    precision = request.options.precision
    precisions: tuple[Precision, ...] = (precision or bundle.manifest.defaults.precision,)
    if request.options.calibration_cache is not None:
        precisions = (Precision.FP32,)  # A builder with a cache quantizes a float graph itself.
    elif precision is Precision.FP16:
        precisions = (Precision.FP16, Precision.FP32)  # An IR is converted to fp16 while it is built.
    selection = select_artifact(
        bundle,
        backend=request.backend,
        precisions=precisions,
        tail=profile.tail if profile else None,
        readers={ArtifactKind.ONNX: request.backend},
        purpose=f"a build for '{request.backend}'",
    )
    return selection.artifact


def _with_profile(
    profile: DeviceProfile, request: ArtifactRequest, contract: ModelContract, graph: OnnxInterface
) -> BuildOptions:
    """The profile's build options, overruled by those that were given."""
    given, default = request.options, BuildOptions()
    overrides: dict[str, Any] = {  # Any: the fields' own types
        option.name: getattr(given, option.name)
        for option in fields(given)
        if getattr(given, option.name) != getattr(default, option.name)
    }
    precision = contract.precision
    if given.calibration_cache is not None:
        precision = Precision.INT8  # The builder quantizes with the cache's ranges.
    elif precision is Precision.FP32 and given.precision is not None:
        precision = given.precision  # An IR is converted while it is built.
    planned = plan(
        profile,
        PlanRequest(
            backend=request.backend,
            precision=precision,
            tail=contract.tail,
            nms_form=graph.nms_form,
            image_sizes=contract.needs_image_sizes,
            opset=graph.opset,
            batch=overrides.get("batch"),
            input_size=contract.preprocess.canvas,
            image_channels=contract.preprocess.channels,
            pre_nms_top_k=contract.decode.pre_nms_top_k,
            dla_core=given.dla_core,
            calibration_cache=given.calibration_cache is not None,
            workspace_mib=given.workspace_mib,
        ),
    )
    return replace(planned.options, **overrides)
