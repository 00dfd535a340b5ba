"""``fcos-deploy build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.trust import Trust

__all__ = ["build_command"]


@cli.with_signature_options
def build_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="ONNX file with a contract, or a bundle.")],
    *,
    backend: Annotated[
        str,
        cli.option(
            "Backend to build for, such as openvino or tensorrt; 'fcos-deploy doctor' lists them.",
            metavar="NAME",
            panel=cli.RUNTIME,
            autocompletion=cli.complete_backend,
        ),
    ],
    output: Annotated[
        Path | None,
        cli.output(
            "Artifact to write; its contract goes beside it. Default: a layer of this device, which every command "
            "on the bundle uses."
        ),
    ] = None,
    target: cli.Target = "",
    precision: Annotated[
        Precision | None,
        cli.option(
            "Precision of the bundle's graph to build from; for openvino also fp16 from fp32. Default: the "
            "profile's or the bundle's choice.",
            panel=cli.RUNTIME,
        ),
    ] = None,
    batch: Annotated[
        str, cli.option("Batch size; a range for a dynamic batch.", metavar="N|MIN,OPT,MAX", panel=cli.SHAPES)
    ] = "1",
    heights: Annotated[
        str,
        cli.option(
            "Range of a dynamic input height. Default: the graph's fixed height.",
            metavar="MIN,OPT,MAX",
            panel=cli.SHAPES,
        ),
    ] = "",
    widths: Annotated[
        str,
        cli.option(
            "Range of a dynamic input width. Default: the graph's fixed width.", metavar="MIN,OPT,MAX", panel=cli.SHAPES
        ),
    ] = "",
    workspace_mib: Annotated[
        int | None,
        cli.option(
            "Workspace memory of the builder. Default: the profile's or TensorRT's.",
            min=1,
            metavar="MIB",
            panel=cli.TENSORRT,
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        cli.option(
            "Builder optimization level; higher searches longer. Default: TensorRT's.",
            min=0,
            max=5,
            metavar="0-5",
            panel=cli.TENSORRT,
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        cli.option(
            "Compute capability to build for, such as 8.6; repeatable, TensorRT-RTX only. Default: this GPU's.",
            metavar="X.Y",
            panel=cli.TENSORRT,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        cli.option(
            "File or folder of the timing cache to read and write. Default: none.", metavar="PATH", panel=cli.TENSORRT
        ),
    ] = None,
    builds: Annotated[
        int, cli.option("Number of builds, of which the fastest is kept.", min=1, panel=cli.TENSORRT)
    ] = 1,
    dla_core: Annotated[
        int | None, cli.option("DLA core to build for. Default: the GPU.", min=0, panel=cli.TENSORRT)
    ] = None,
    dla_strict: Annotated[
        bool, cli.option("Refusal of layers that would fall back to the GPU.", "--dla-strict", panel=cli.TENSORRT)
    ] = False,
    tf32: Annotated[
        bool, cli.option("Permission for TF32 in fp32 convolutions.", "--tf32", panel=cli.TENSORRT)
    ] = False,
    version_compatible: Annotated[
        bool, cli.option("Engine that newer TensorRT versions also load.", "--version-compatible", panel=cli.TENSORRT)
    ] = False,
    hardware_compatible: Annotated[
        bool, cli.option("Engine that also runs on newer GPUs.", "--hardware-compatible", panel=cli.TENSORRT)
    ] = False,
    calibration_cache: Annotated[
        Path | None,
        cli.option(
            "Calibration cache for INT8 from a float graph, where the builder cannot read Q/DQ. Default: none.",
            metavar="FILE",
            panel=cli.TENSORRT,
        ),
    ] = None,
    trtexec: Annotated[
        bool, cli.option("Equivalent trtexec command on stdout; nothing is built.", "--trtexec", panel=cli.TENSORRT)
    ] = False,
    trust: Trust,
    as_json: cli.Json = False,
) -> None:
    """Build an engine, an OpenVINO IR or an optimized model, and check it against its source."""
    from fcos_deploy.core.exporter import BuildOptions, SizeRange
    from fcos_deploy.pipeline.build import ArtifactRequest, build_artifact, equivalent_trtexec

    options = BuildOptions(
        batch=SizeRange.parse(batch),
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
        height_range=SizeRange.parse(heights) if heights else None,
        width_range=SizeRange.parse(widths) if widths else None,
        precision=precision,
    )
    request = ArtifactRequest(
        source=source, output=output, backend=backend, target=target, options=options, trust=trust
    )
    if trtexec:
        typer.echo(equivalent_trtexec(request))
        return
    with progress_bar() as progress:
        result = build_artifact(request, progress=progress)
    if as_json:
        print_json({"files": [str(file) for file in result.files], "record": dict(result.record)})
    note(f"built {', '.join(str(file) for file in result.files)}")
