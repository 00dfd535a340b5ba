"""``fcos-deploy build``: from ONNX to what a runtime runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import PublicKeys, RequireSignature, trusted_keys
from fcos_deploy.core.enums import Precision

__all__ = ["command"]


def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="ONNX file with a contract, or a bundle.")],
    backend: Annotated[str, typer.Option(help="Whose artifact is built: onnxruntime, openvino, tensorrt, ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact to write; its contract goes beside it.")],
    target: Annotated[str, typer.Option(help="Device profile whose build settings are taken.")] = "",
    precision: Annotated[
        Precision | None, typer.Option(help="Of a bundle which ONNX file; for openvino also fp16 from fp32.")
    ] = None,
    batch: Annotated[str, typer.Option(help="N, or SMALLEST,USUAL,LARGEST of a dynamic one.")] = "1",
    heights: Annotated[str, typer.Option(help="SMALLEST,USUAL,LARGEST input height of a dynamic one.")] = "",
    widths: Annotated[str, typer.Option(help="SMALLEST,USUAL,LARGEST input width of a dynamic one.")] = "",
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="Scratch memory of the builder.")] = None,
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="How long the builder searches.")] = None,
    compute_capability: Annotated[list[str] | None, typer.Option(help="Such as 8.6; may be repeated.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="File or folder of measured kernels.")] = None,
    builds: Annotated[int, typer.Option(min=1, help="Builds to choose the best of.")] = 1,
    dla_core: Annotated[int | None, typer.Option(min=0, help="DLA core to build for.")] = None,
    dla_strict: Annotated[bool, typer.Option("--dla-strict", help="Refuse layers that fall back.")] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="Let fp32 convolutions round their inputs.")] = False,
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="For newer runtimes too.")] = False,
    hardware_compatible: Annotated[bool, typer.Option("--hardware-compatible", help="For newer GPUs too.")] = False,
    calibration_cache: Annotated[Path | None, typer.Option(help="Ranges for builders without Q/DQ.")] = None,
    trtexec: Annotated[bool, typer.Option("--trtexec", help="Print the trtexec line instead, build nothing.")] = False,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the build's record as JSON on stdout.")] = False,
) -> None:
    """Build an engine, an IR or an optimised model, and check it against its source."""
    from fcos_deploy.cli.output import note, print_json, progress_bar
    from fcos_deploy.core.exporter import BatchRange, BuildOptions, optional_range, size_range
    from fcos_deploy.pipeline.build import ArtifactRequest, build_artifact, equivalent_trtexec

    keys = trusted_keys(public_key, required=require_signature)
    options = BuildOptions(
        batch=BatchRange(*size_range(batch)),
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        compute_capabilities=tuple(compute_capability or ()),
        timing_cache=timing_cache,
        builds=builds,
        dla_core=dla_core,
        dla_strict=dla_strict,
        tf32=tf32,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        calibration_cache=calibration_cache,
        height_range=optional_range(heights),
        width_range=optional_range(widths),
        precision=precision,
    )
    request = ArtifactRequest(
        source=source, output=output, backend=backend, target=target, options=options, public_keys=keys
    )
    if trtexec:
        typer.echo(equivalent_trtexec(request))
        return
    with progress_bar() as progress:
        result = build_artifact(request, progress=progress)
    if as_json:
        print_json({"files": [str(file) for file in result.files], "record": dict(result.record)})
    note(f"built {', '.join(str(file) for file in result.files)}")
