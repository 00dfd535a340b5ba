"""Builds an artifact for a backend from an ONNX file, or from one in a bundle; or says how trtexec would."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from exporters._tensorrt_options import profile_shapes
from fcos_deploy.bundle import open_bundle, select_artifact
from fcos_deploy.core.contract import ModelContract, read_contract
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult
from fcos_deploy.core.onnx_file import OnnxInterface, onnx_interface
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import get_backend, get_exporter
from fcos_deploy.targets.plan import PlanRequest, plan
from fcos_deploy.targets.profiles import DeviceProfile, load_profile
from fcos_deploy.targets.trtexec import TrtexecRequest, trtexec_command

__all__ = ["ArtifactRequest", "build_artifact", "equivalent_trtexec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRequest:
    """``source`` is an ONNX file or a bundle; ``target`` a device profile for what ``options`` leaves open.

    With ``public_keys`` it is a bundle that the owner of one of them signed.
    """

    source: Path
    output: Path
    backend: str
    target: str = ""
    options: BuildOptions = field(default_factory=BuildOptions)
    public_keys: tuple[Path | str, ...] = ()


def build_artifact(request: ArtifactRequest, *, progress: ProgressFn = no_progress) -> BuildResult:
    """Build, check, and write the artifact with its contract beside it.

    Raises:
        ConfigError: no such backend or profile, an option that the builder does not have, or a plan that cannot work.
        BuildError, StepCheckError: the builder failed, or its result is not the same model.
        MissingDependencyError: the builder is not installed.
    """
    exporter = get_exporter(request.backend)
    source = _resolve(request)
    return exporter.build(
        BuildRequest(source=source.path, output=request.output, options=source.options, progress=progress)
    )


def equivalent_trtexec(request: ArtifactRequest) -> str:
    """The ``trtexec`` line that builds the engine that ``build_artifact`` would; nothing is built.

    It is for the TensorRT of the device profile or, without one, for that of this machine.

    Raises:
        ConfigError: not an engine of TensorRT, or the version of TensorRT is not known.
    """
    if get_exporter(request.backend).produces is not ArtifactKind.TENSORRT_ENGINE:
        raise ConfigError(f"trtexec builds TensorRT engines, not those of '{request.backend}'.")
    source = _resolve(request)
    device = source.profile.nvidia if source.profile else None
    version = device.tensorrt if device else get_backend(request.backend).probe().version
    if not version:
        raise ConfigError(
            "The trtexec line differs between versions of TensorRT, and none is installed here.",
            hint="name the device with --target",
        )
    inputs = {spec.name: spec.shape for spec in source.graph.inputs}
    shapes = profile_shapes(inputs, options=source.options, size_divisor=source.contract.preprocess.size_divisor)
    return trtexec_command(
        TrtexecRequest(
            onnx=PurePosixPath(source.path),
            engine=PurePosixPath(request.output),
            version=version,
            precision=source.contract.precision,
            shapes={n: (s.minimum, s.opt, s.maximum) for n, s in shapes.items() if None in inputs[n]},
            options=source.options,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The ONNX file to build from, and the options with the profile's choices."""

    path: Path
    contract: ModelContract
    graph: OnnxInterface
    profile: DeviceProfile | None
    options: BuildOptions


def _resolve(request: ArtifactRequest) -> _Source:
    profile = load_profile(request.target) if request.target else None
    in_bundle = request.public_keys or request.source.is_dir() or request.source.suffix == ".tar"
    path = _onnx_in_bundle(request, profile) if in_bundle else request.source
    contract, graph = read_contract(path), onnx_interface(path)
    options = request.options
    if profile is not None:
        options = _with_profile(profile, request, contract, graph)
    if options.precision is contract.precision:
        options = replace(options, precision=None)  # Nothing to convert.
    return _Source(path=path, contract=contract, graph=graph, profile=profile, options=options)


def _onnx_in_bundle(request: ArtifactRequest, profile: DeviceProfile | None) -> Path:
    """The bundle's ONNX file of the precision to build from and, for a device profile, with the profile's tail."""
    bundle = open_bundle(request.source, public_keys=request.public_keys)
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
    return bundle.path(selection.artifact.path)


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
            pre_nms_top_k=contract.decode.pre_nms_top_k,
            dla_core=given.dla_core,
            calibration_cache=given.calibration_cache is not None,
            workspace_mib=given.workspace_mib,
        ),
    )
    return replace(planned.options, **overrides)
