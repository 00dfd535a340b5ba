"""``fcos-deploy calibrate`` and ``quantize``: INT8."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Annotated

from fcos_deploy.cli import options as cli
from fcos_deploy.cli.output import note, print_json, progress_bar, table
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.serialize import to_json

__all__ = ["calibrate_command", "quantize_command"]


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
        bool, cli.option("Permission for a list file to name images that are not below its folder.", "--allow-outside")
    ] = False,
    method: Annotated[
        str,
        cli.option(
            "Method that turns statistics into ranges: minmax, percentile, entropy, mse or l3. Default: percentile.",
            metavar="NAME",
        ),
    ] = "",
    convergence: Annotated[
        bool, cli.option("Report of how the ranges settle with more images.", "--convergence")
    ] = False,
    tensorrt_cache: Annotated[
        str,
        cli.option(
            "TensorRT version, such as 8.5.2, to also write a calibration cache (.cache) for. Default: none.",
            metavar="VERSION",
        ),
    ] = "",
    engine: Annotated[
        str,
        cli.option(
            "Runtime that measures: onnxruntime, openvino, or auto for the first that is installed.",
            metavar="NAME",
            panel=cli.RUNTIME,
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
        int,
        cli.option("Maximum number of candidates to evaluate; with 1 no layer stays in float.", min=1, panel=cli.GATE),
    ] = 16,
    threads: cli.Threads = None,
    junit: cli.Junit = None,
    as_json: cli.Json = False,
) -> None:
    """Quantize a float ONNX graph to INT8.

    With --max-map-drop, or without annotations --min-match-rate, layers whose harm is shown stay in float until the
    gate holds. Exit code 4: it does not, or the images cannot decide it, and then the INT8 model is kept.
    """
    from calibration.calibrate import load_calibration
    from calibration.mixed_precision import TRADE_OFF_COLUMNS, find_trade_offs, trade_off_rows
    from calibration.placement import open_graph, placement_for
    from calibration.quantizers import QuantizeRequest
    from calibration.ranges import range_method
    from fcos_deploy.accuracy.gate import require_all, verdict_line, write_junit
    from fcos_deploy.core.serialize import to_json
    from fcos_deploy.pipeline.quantize import accuracy_goal, quantize_model

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
        quantized = quantize_model(request, quantizer=quantizer, goal=goal, progress=progress)
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
    if junit is not None:
        write_junit(junit, verdicts, suite="fcos-deploy quantize", allow_inconclusive=allow_inconclusive)
    for verdict in verdicts:
        note(verdict_line(verdict))
    require_all(verdicts, allow_inconclusive=allow_inconclusive)
