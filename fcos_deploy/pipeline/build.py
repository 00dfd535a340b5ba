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
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import get_backend, get_exporter
from fcos_deploy.targets.plan import PlanRequest, plan
from fcos_deploy.targets.profiles import load_profile
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
    source, _, options = _resolved(request)
    return exporter.build(BuildRequest(source=source, output=request.output, options=options, progress=progress))


def equivalent_trtexec(request: ArtifactRequest) -> str:
    """The ``trtexec`` line that builds the engine that ``build_artifact`` would; nothing is built.

    For the TensorRT of the device profile or, without one, of this machine.

    Raises:
        ConfigError: not an engine of TensorRT, or it is not known of which version.
    """
    if get_exporter(request.backend).produces is not ArtifactKind.TENSORRT_ENGINE:
        raise ConfigError(f"trtexec builds TensorRT engines, not those of '{request.backend}'.")
    source, contract, options = _resolved(request)
    inputs = {spec.name: spec.shape for spec in onnx_interface(source).inputs}
    shapes = profile_shapes(inputs, options=options, size_divisor=contract.preprocess.size_divisor)
    return trtexec_command(
        TrtexecRequest(
            onnx=PurePosixPath(source),
            engine=PurePosixPath(request.output),
            version=_tensorrt_version(request),
            precision=contract.precision,
            shapes={n: (s.minimum, s.optimal, s.maximum) for n, s in shapes.items() if None in inputs[n]},
            options=options,
        )
    )


def _tensorrt_version(request: ArtifactRequest) -> str:
    facts = load_profile(request.target).nvidia if request.target else None
    version = facts.tensorrt if facts else get_backend(request.backend).probe().version
    if not version:
        raise ConfigError(
            "The trtexec line differs between versions of TensorRT, and none is installed here.",
            hint="name the device with --target",
        )
    return version


def _resolved(request: ArtifactRequest) -> tuple[Path, ModelContract, BuildOptions]:
    """The ONNX file, its contract, and the options with the profile's choices."""
    in_bundle = request.public_keys or request.source.is_dir() or request.source.suffix == ".tar"
    source = _onnx_of(request) if in_bundle else request.source
    contract = read_contract(source)
    options = _with_profile(request, contract, source) if request.target else request.options
    if options.precision is contract.precision:
        options = replace(options, precision=None)  # Nothing to convert.
    return source, contract, options


def _onnx_of(request: ArtifactRequest) -> Path:
    """The bundle's ONNX file of the precision to build from and, for a device profile, with the profile's tail."""
    bundle = open_bundle(request.source, public_keys=request.public_keys)
    precision = request.options.precision
    precisions: tuple[Precision, ...] = (precision or bundle.manifest.defaults.precision,)
    if request.options.calibration_cache is not None:
        precisions = (Precision.FP32,)  # a builder with a cache quantizes a float graph itself
    elif precision is Precision.FP16:
        precisions = (Precision.FP16, Precision.FP32)  # an IR is converted to fp16 while it is built
    selection = select_artifact(
        bundle,
        backend=request.backend,
        precisions=precisions,
        tail=load_profile(request.target).tail if request.target else None,
        readers={ArtifactKind.ONNX: request.backend},
        purpose=f"a build for '{request.backend}'",
    )
    return bundle.path(selection.artifact.path)


def _precision_built(options: BuildOptions, contract: ModelContract) -> Precision:
    """What comes out: a cache makes an fp32 graph int8, and an IR may be asked for in fp16."""
    if options.calibration_cache is not None:
        return Precision.INT8
    return contract.precision if contract.precision is not Precision.FP32 else options.precision or Precision.FP32


def _with_profile(request: ArtifactRequest, contract: ModelContract, source: Path) -> BuildOptions:
    """The profile's build options, overruled by those that were given."""
    own, default = request.options, BuildOptions()
    given: dict[str, Any] = {  # Any: the fields' own types
        option.name: getattr(own, option.name)
        for option in fields(own)
        if getattr(own, option.name) != getattr(default, option.name)
    }
    planned = plan(
        load_profile(request.target),
        PlanRequest(
            backend=request.backend,
            precision=_precision_built(own, contract),
            tail=contract.tail,
            nms_form=onnx_interface(source).nms_form,
            image_sizes=contract.needs_image_sizes,
            opset=onnx_interface(source).opset,
            batch=given.get("batch"),
            input_size=contract.preprocess.canvas,
            pre_nms_top_k=contract.decode.pre_nms_top_k,
            dla_core=own.dla_core,
            calibration_cache=own.calibration_cache is not None,
            workspace_mib=own.workspace_mib,
        ),
    )
    return replace(planned.options, **given)
