"""``fcos-deploy build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fcos_deploy.cli.options import (
    RUNTIME,
    SHAPES,
    TENSORRT,
    Json,
    PublicKeys,
    RequireSignature,
    Target,
    output,
    trusted_keys,
)
from fcos_deploy.cli.output import note, print_json, progress_bar
from fcos_deploy.core.enums import Precision

__all__ = ["command"]


def command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="ONNX file with a contract, or a bundle.")],
    *,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Backend to build for, such as openvino or tensorrt; 'fcos-deploy doctor' lists them.",
            rich_help_panel=RUNTIME,
        ),
    ],
    output: Annotated[Path, output("Artifact to write; its contract goes beside it.")],
    target: Target = "",
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the bundle's graph to build from; for openvino also fp16 from fp32. "
            "Default: the profile's or the bundle's choice.",
            rich_help_panel=RUNTIME,
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(metavar="N|MIN,OPT,MAX", help="Batch size; a range for a dynamic batch.", rich_help_panel=SHAPES),
    ] = "1",
    heights: Annotated[
        str,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Range of a dynamic input height. Default: the graph's fixed height.",
            rich_help_panel=SHAPES,
            show_default=False,
        ),
    ] = "",
    widths: Annotated[
        str,
        typer.Option(
            metavar="MIN,OPT,MAX",
            help="Range of a dynamic input width. Default: the graph's fixed width.",
            rich_help_panel=SHAPES,
            show_default=False,
        ),
    ] = "",
    workspace_mib: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="MIB",
            help="Workspace memory of the builder. Default: the profile's or TensorRT's.",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=5,
            metavar="0-5",
            help="Builder optimization level; higher searches longer. Default: TensorRT's.",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            help="Compute capability to build for, such as 8.6; repeatable, TensorRT-RTX only. Default: this GPU's.",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="File or folder of the timing cache to read and write. Default: none.",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    builds: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Number of builds, of which the fastest is kept.", rich_help_panel=TENSORRT
        ),
    ] = 1,
    dla_core: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="DLA core to build for. Default: the GPU.", rich_help_panel=TENSORRT),
    ] = None,
    dla_strict: Annotated[
        bool,
        typer.Option(
            "--dla-strict", help="Refusal of layers that would fall back to the GPU.", rich_help_panel=TENSORRT
        ),
    ] = False,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="Permission for TF32 in fp32 convolutions.", rich_help_panel=TENSORRT),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="An engine for newer TensorRT versions too.", rich_help_panel=TENSORRT
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option("--hardware-compatible", help="An engine for newer GPUs too.", rich_help_panel=TENSORRT),
    ] = False,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration cache for INT8 from a float graph, where the builder cannot read Q/DQ. Default: none.",
            rich_help_panel=TENSORRT,
        ),
    ] = None,
    trtexec: Annotated[
        bool,
        typer.Option(
            "--trtexec", help="Equivalent trtexec command on stdout; nothing is built.", rich_help_panel=TENSORRT
        ),
    ] = False,
    require_signature: RequireSignature = False,
    public_key: PublicKeys = None,
    as_json: Json = False,
) -> None:
    """Build an engine, an OpenVINO IR or an optimized model, and check it against its source."""
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
