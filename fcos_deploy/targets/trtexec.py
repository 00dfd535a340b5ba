"""The ``trtexec`` command that builds the engine of ``fcos-deploy build``: for JetPack 5, and for scripts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions
from fcos_deploy.core.libraries import parse_version

__all__ = ["TrtexecRequest", "trtexec_command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtexecRequest:
    """``shapes``: min, opt and max shape of each dynamic input; empty for a static graph.

    ``precision`` is the ONNX file's; with a calibration cache that is fp32 and the engine INT8.
    """

    onnx: PurePosixPath
    engine: PurePosixPath
    version: str
    precision: Precision
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    options: BuildOptions = field(default_factory=BuildOptions)


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


def trtexec_command(request: TrtexecRequest) -> str:
    """One shell line.

    Raises:
        ConfigError: an option that this version's trtexec does not have, or a calibration cache for TensorRT 11, which
            has no calibrators.
    """
    version, options = parse_version(request.version), request.options
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
    shapes = {
        label: ",".join(f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in request.shapes.items())
        for index, label in enumerate(("min", "opt", "max"))
    }
    arguments = [
        "trtexec",
        f"--onnx={request.onnx}",
        f"--saveEngine={request.engine}",
        "--buildOnly" if version < (8, 6) else "--skipInference",
        *_types(request, version),
        *(f"--{label}Shapes={text}" for label, text in shapes.items() if text),
        *(flag for flag, given in flags.items() if given),
    ]
    for argument in arguments:
        name = argument.partition("=")[0]
        first, end = _VERSIONS.get(name, ((0,), (99,)))
        if not first <= version < end:
            raise ConfigError(
                f"trtexec of TensorRT {request.version} has no option '{name}'.",
                hint="leave the option out, or build for another device with --target",
            )
    return shlex.join(arguments)


def _types(request: TrtexecRequest, version: tuple[int, ...]) -> list[str]:
    """Strong typing where the version has it (11 knows nothing else), else a flag for each type in the graph."""
    cache, dla = request.options.calibration_cache, request.options.dla_core is not None
    if version >= (11,):
        if cache is not None:
            raise ConfigError("TensorRT 11 has no calibrators.", hint="build the INT8 ONNX file, without a cache")
        return []
    if version >= (10,) and cache is None and not dla:
        return ["--stronglyTyped"]
    flags = ["--fp16"] if request.precision is Precision.FP16 or dla else []
    if request.precision is Precision.INT8 or cache is not None:
        flags.append("--int8")
    return [*flags, f"--calib={cache}"] if cache is not None else flags
