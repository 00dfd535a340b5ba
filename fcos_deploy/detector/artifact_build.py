"""Builds an artifact for a backend from an ONNX file, or from the one in a bundle that fits."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.device_plan import PlanRequest, plan
from fcos_deploy.core.devices import load_profile
from fcos_deploy.core.enums import ArtifactKind, Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult
from fcos_deploy.core.onnx_interface import onnx_interface
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.registry import backend as backend_named
from fcos_deploy.core.registry import exporter_to

__all__ = ["ArtifactRequest", "build_artifact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRequest:
    """``source`` is an ONNX file or a bundle; ``target`` a device profile for what ``options`` leaves open."""

    source: Path
    output: Path
    backend: str
    target: str = ""
    options: BuildOptions = field(default_factory=BuildOptions)


def build_artifact(request: ArtifactRequest, *, progress: ProgressFn = no_progress) -> BuildResult:
    """Build, check, and write the artifact with its contract beside it.

    Raises:
        ConfigError: no such backend or profile, an option that the builder does not have, or a plan that cannot work.
        BuildError, StepCheckError: the builder failed, or its result is not the same model.
        MissingDependencyError: the builder is not installed.
    """
    exporter = exporter_to(request.backend)
    source = _onnx_of(request) if request.source.is_dir() or request.source.suffix == ".tar" else request.source
    contract = read_contract(source)
    options = _with_profile(request, contract, source) if request.target else request.options
    if options.precision is contract.precision:
        options = replace(options, precision=None)  # Nothing to convert.
    return exporter.build(BuildRequest(source=source, output=request.output, options=options, progress=progress))


def _onnx_of(request: ArtifactRequest) -> Path:
    """The bundle's ONNX file that this backend reads as meant, of the precision asked for or the bundle's own."""
    from fcos_deploy.bundle import open_bundle

    bundle = open_bundle(request.source)
    placements = {"", *backend_named(request.backend).placements}
    fitting = [a for a in bundle.manifest.artifacts if a.kind is ArtifactKind.ONNX and a.placement in placements]
    by_precision = {artifact.precision: bundle.path(artifact.path) for artifact in fitting}
    asked = request.options.precision
    wanted = (asked, Precision.FP32) if asked is Precision.FP16 else (asked or bundle.manifest.target.precision,)
    for precision in wanted:
        if precision in by_precision:
            return by_precision[precision]
    raise ConfigError(
        f"The bundle '{request.source}' has no {wanted[0]} ONNX file that '{request.backend}' reads.",
        hint=f"it has {', '.join(map(str, by_precision)) or 'none'}; choose with --precision",
    )


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
            precision=contract.precision,
            tail=contract.tail,
            nms_form=onnx_interface(source).nms_form,
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
