"""``fcos-deploy export``, ``simplify``, ``calibrate``, ``quantize`` and ``build``: the single steps of a deployment."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import conclude, note, print_json, progress_bar, table
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import DeformForm, NmsForm, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import Trust

__all__ = ["build_command", "calibrate_command", "export_command", "quantize_command", "simplify_command"]


@cli.with_all_checkpoint_options
def export_command(
    checkpoint: cli.Checkpoint,
    *,
    output: Annotated[Path, cli.output("ONNX file to write.")],
    tail: Annotated[
        Tail,
        cli.option("End of the graph. raw: head outputs; candidates: decoded boxes before NMS; nms: final detections."),
    ] = Tail.RAW,
    batch: Annotated[str, cli.option("Batch size of the graph.", metavar="N|dynamic")] = "1",
    precision: Annotated[Precision, cli.option("Type of the weights.", metavar="fp32|fp16")] = Precision.FP32,
    opset: cli.Opset = None,
    simplify: Annotated[bool, cli.option("Simplification of the graph.", "--simplify/--no-simplify")] = True,
    nms_form: Annotated[
        NmsForm,
        cli.option("NMS of the nms tail. onnx: the operator NonMaxSuppression; static: plain tensor operators."),
    ] = NmsForm.ONNX,
    nms_boxes: Annotated[
        int, cli.option("Number of best candidates that the static NMS looks at, up to 3840.", metavar="N", min=1)
    ] = 1000,
    deform_form: Annotated[
        DeformForm,
        cli.option(
            "Deformable convolutions. grid-sample: plain operators, for every runtime; operator: DeformConv, which is "
            "faster in ONNX Runtime and which OpenVINO and TensorRT do not have."
        ),
    ] = DeformForm.GRID_SAMPLE,
    as_json: cli.Json = False,
    options: CheckpointOptions,
) -> None:
    """Export a checkpoint to an ONNX graph that carries its contract, and compare the graph with PyTorch."""
    from exporters.torch_onnx import ExportOptions, export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint

    if batch != "dynamic" and not batch.isdecimal():
        raise ConfigError(f"--batch must be a number or 'dynamic', got '{batch}'.")
    export_options = ExportOptions(
        opset=opset,
        tail=tail,
        batch=None if batch == "dynamic" else int(batch),
        simplify=simplify,
        precision=precision,
        nms_form=nms_form,
        nms_boxes=nms_boxes,
        deform_form=deform_form,
    )
    with progress_bar() as progress:
        loaded = load_checkpoint(checkpoint, options=options)
        export = export_onnx(loaded, output, options=export_options, progress=progress)
    note(export.summary())
    if as_json:
        print_json(export.to_json())


def simplify_command(
    model: cli.Graph, *, output: Annotated[Path, cli.output("ONNX file to write.")], as_json: cli.Json = False
) -> None:
    """Simplify an ONNX graph and check that its outputs stay the same; dynamic axes stay dynamic."""
    from exporters.rewrite import simplify_onnx

    with progress_bar() as progress:
        result = simplify_onnx(model, output, progress=progress)
    note(result.summary())
    if as_json:
        print_json(result.to_json())


def calibrate_command(
    model: cli.Graph,
    *,
    images: Annotated[Path, cli.option("Calibration images: a folder, list file or COCO JSON.", metavar="PATH")],
    output: Annotated[Path, cli.output("Calibration file (.json) to write.")],
    annotations: Annotated[
        Path | None,
        cli.option(
            "COCO annotations of the images, to choose images that cover all classes and object sizes. "
            "Default: images are chosen at random.",
            metavar="FILE",
        ),
    ] = None,
    count: Annotated[int | None, cli.option("Number of images to choose. Default: up to 128.", min=1)] = None,
    seed: cli.Seed = 0,
    evaluation_images: Annotated[
        Path | None, cli.option("Images that accuracy will be measured on; an overlap is refused.", metavar="PATH")
    ] = None,
    allow_overlap: cli.AllowOverlap = False,
    allow_outside: Annotated[
        bool, cli.option("Permission for a list file to name images that are not below its folder.")
    ] = False,
    method: Annotated[
        str,
        cli.option(
            "Method that turns statistics into ranges: minmax, percentile, entropy, mse or l3. Default: percentile.",
            metavar="NAME",
        ),
    ] = "",
    convergence: Annotated[bool, cli.option("Report of how the ranges settle with more images.")] = False,
    tensorrt_cache: Annotated[
        str,
        cli.option(
            "TensorRT version, such as 8.5.2, to also write a calibration cache (.cache) for. Default: none.",
            metavar="VERSION",
        ),
    ] = "",
    engine: Annotated[
        str,
        cli.RUNTIME.option(
            "Runtime that measures: onnxruntime, openvino, or auto for the first that is installed.", metavar="NAME"
        ),
    ] = "auto",
    threads: cli.Threads = None,
    as_json: cli.Json = False,
) -> None:
    """Measure the ranges of a graph's activations on images, for 'fcos-deploy quantize'."""
    from calibration.calibrate import CalibrationRequest, StatisticsOptions, calibrate
    from calibration.dataset import SampleOptions
    from calibration.ranges import range_method

    request = CalibrationRequest(
        model=model,
        images=images,
        output=output,
        annotations=annotations,
        sample=SampleOptions(count=count, seed=seed, allow_outside=allow_outside),
        evaluation_images=evaluation_images,
        allow_overlap=allow_overlap,
        statistics=StatisticsOptions(method=range_method(method), engine=engine, threads=threads),
        convergence=convergence,
        tensorrt_version=tensorrt_cache,
    )
    with progress_bar() as progress:
        report = calibrate(request, progress=progress)
    for line in report.lines():
        note(line)
    if as_json:
        print_json(to_json(report))


@cli.with_gate_options("max_map_drop", "min_match_rate")
def quantize_command(
    model: cli.Graph,
    *,
    output: Annotated[Path, cli.output("INT8 model to write: .onnx, or .xml with --quantizer nncf.")],
    calibration: Annotated[
        Path | None, cli.option("Ranges of this graph, from 'fcos-deploy calibrate'; needed by qdq.", metavar="FILE")
    ] = None,
    consumer: Annotated[
        str, cli.option("Backend that will run the model, or a Q/DQ placement.", "--for", metavar="NAME")
    ] = "portable",
    quantizer: Annotated[str, cli.option("Quantizer: qdq, or nncf for an OpenVINO IR.", metavar="NAME")] = "qdq",
    method: Annotated[
        str,
        cli.option(
            "Method that turns statistics into ranges: minmax, percentile, entropy, mse or l3. Default: the "
            "calibration's.",
            metavar="NAME",
        ),
    ] = "",
    weights: Annotated[
        str, cli.option("Range of the weights: pairwise, reduced or full. Default: the placement's.", metavar="RANGE")
    ] = "",
    ignore_layer: Annotated[
        list[str] | None, cli.option("Layer to keep in float, repeatable. Default: none.", metavar="NAME")
    ] = None,
    images: Annotated[
        Path | None,
        cli.option(
            "Images to measure the accuracy or quantization noise on; with --quantizer nncf to calibrate on.",
            metavar="DIR",
        ),
    ] = None,
    annotations: cli.Annotations = None,
    gate: Gate,
    allow_inconclusive: cli.AllowInconclusive = False,
    evaluations: Annotated[
        int, cli.GATE.option("Maximum number of candidates to evaluate; with 1 no layer stays in float.", min=1)
    ] = 16,
    threads: cli.Threads = None,
    junit: cli.Junit = None,
    as_json: cli.Json = False,
) -> None:
    """Quantize a float ONNX graph to INT8.

    With --max-map-drop, or without annotations --min-match-rate, layers with a measurable loss stay in float until
    the gate holds. Exit code 4: it does not hold, or the images cannot decide it; the INT8 model is then kept.
    """
    from calibration.calibrate import load_calibration
    from calibration.mixed_precision import TRADE_OFF_COLUMNS, find_trade_offs, trade_off_rows
    from calibration.placement import open_graph, placement_for
    from calibration.quantizers import QuantizeRequest
    from calibration.ranges import range_method
    from fcos_deploy.pipeline.quantize import Scoring, accuracy_goal, quantize_model

    ranges = load_calibration(calibration) if calibration else None
    request = QuantizeRequest(
        graph=open_graph(model),
        output=output,
        placement=placement_for(consumer, weights=weights),
        calibration=ranges.with_method(range_method(method)) if ranges and method else ranges,
        images=images,
        ignored_layers=tuple(ignore_layer or ()),
    )
    goal = accuracy_goal(
        gate,
        images=images,
        annotations=annotations,
        placement=request.placement,
        threads=threads,
        evaluations=evaluations,
    )
    with progress_bar() as progress:
        seen = frozenset(image.pixels_sha256 for image in ranges.images) if ranges else frozenset[str]()
        scoring = None if goal is None else Scoring(goal=goal, calibrated_on=seen, progress=progress)
        quantized = quantize_model(request, quantizer=quantizer, scoring=scoring, progress=progress)
    result, verdicts = quantized.result, quantized.verdicts
    rows = [(key.replace("_", " "), shorten(value, 90, placeholder=" ...")) for key, value in result.record.items()]
    table(result.files[0].name, ("what", "value"), [row for row in rows if row[1]])
    for trade_offs in find_trade_offs(result.files[:1]):
        table("Trade-offs, most INT8 first", TRADE_OFF_COLUMNS, trade_off_rows(trade_offs))
    note(f"wrote {', '.join(str(file) for file in result.files)}")
    note(
        f"meant for {' and '.join(request.placement.backends)}; another runtime may run it slower than the float graph"
    )
    if as_json:
        files = [str(file) for file in result.files]
        print_json({"files": files, "record": dict(result.record), "verdicts": to_json(verdicts)})
    conclude(verdicts, allow_inconclusive=allow_inconclusive, junit=junit, command="quantize")


@cli.with_signature_options
def build_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="ONNX file with a contract, or a bundle.")],
    *,
    backend: Annotated[
        str,
        cli.RUNTIME.option(
            "Backend to build for, such as openvino or tensorrt; 'fcos-deploy doctor' lists them.",
            metavar="NAME",
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
        cli.RUNTIME.option(
            "Precision of the bundle's graph to build from; for openvino also fp16 from fp32. Default: the "
            "profile's or the bundle's choice."
        ),
    ] = None,
    batch: Annotated[str, cli.SHAPES.option("Batch size; a range for a dynamic batch.", metavar="N|MIN,OPT,MAX")] = "1",
    heights: Annotated[
        str,
        cli.SHAPES.option("Range of a dynamic input height. Default: the graph's fixed height.", metavar="MIN,OPT,MAX"),
    ] = "",
    widths: Annotated[
        str,
        cli.SHAPES.option("Range of a dynamic input width. Default: the graph's fixed width.", metavar="MIN,OPT,MAX"),
    ] = "",
    workspace_mib: Annotated[
        int | None,
        cli.TENSORRT.option(
            "Workspace memory of the builder. Default: the profile's or TensorRT's.", min=1, metavar="MIB"
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        cli.TENSORRT.option(
            "Builder optimization level; higher searches longer. Default: TensorRT's.", min=0, max=5, metavar="0-5"
        ),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        cli.TENSORRT.option(
            "Compute capability to build for, such as 8.6; repeatable, TensorRT-RTX only. Default: this GPU's.",
            metavar="X.Y",
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        cli.TENSORRT.option("File or folder of the timing cache to read and write. Default: none.", metavar="PATH"),
    ] = None,
    dla_core: Annotated[int | None, cli.TENSORRT.option("DLA core to build for. Default: the GPU.", min=0)] = None,
    dla_strict: Annotated[bool, cli.TENSORRT.option("Error for layers that would fall back to the GPU.")] = False,
    tf32: Annotated[bool, cli.TENSORRT.option("Permission for TF32 in fp32 convolutions.")] = False,
    version_compatible: Annotated[bool, cli.TENSORRT.option("Engine that newer TensorRT versions also load.")] = False,
    hardware_compatible: Annotated[bool, cli.TENSORRT.option("Engine that also runs on newer GPUs.")] = False,
    calibration_cache: Annotated[
        Path | None,
        cli.TENSORRT.option(
            "Calibration cache for INT8 from a float graph, where the builder cannot read Q/DQ. Default: none.",
            metavar="FILE",
        ),
    ] = None,
    trtexec: Annotated[bool, cli.TENSORRT.option("Equivalent trtexec command on stdout; nothing is built.")] = False,
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
