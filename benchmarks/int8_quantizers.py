"""Our quantizer beside onnxruntime's ``quantize_static`` and NNCF's defaults: same model, images and machine.

    python benchmarks/int8_quantizers.py MODEL.onnx --train DIR --images DIR --annotations FILE --work DIR -o OUT.md

Every quantizer runs in a process of its own, so that wall time and peak memory are its own; one that needs more than
``--memory-limit`` is said to. Latencies are of interleaved runs. A killed run continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.dataset import CalibrationSet, SampleOptions, collect_images
from calibration.execution import Feeder
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.core.artifact import OnnxGraph, write_sidecar
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.detector import DetectorSpec


def ours(model: Path, images: CalibrationSet, output: Path, *, consumer: str, threads: int) -> None:
    """Statistics, ranges and Q/DQ placement of this project."""
    from calibration.calibrate import StatisticsOptions, collect_ranges
    from calibration.placement import open_graph, placement_for
    from calibration.quantizers import quantize_qdq

    graph = open_graph(model)
    calibration = collect_ranges(graph, images, options=StatisticsOptions(threads=threads))
    quantize_qdq(graph, calibration, output, placement=placement_for(consumer))


def quantize_static(model: Path, images: CalibrationSet, output: Path, *, method: str, threads: int) -> None:
    """Onnxruntime's own, as its documentation advises for x86 without VNNI: U8/S8, per channel, reduced range."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as run

    del threads  # It has no such option.
    feeder = Feeder(OnnxGraph(model))

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            self._feeds: Iterator[Any] = (feeder(image.read()) for image in images.images)

        def get_next(self) -> Any:
            return next(self._feeds, None)

    run(
        str(model),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )


def nncf_default(model: Path, images: CalibrationSet, output: Path, *, threads: int) -> None:
    """``nncf.quantize`` with nothing set, on the model that OpenVINO converts."""
    import nncf
    import openvino as ov

    del threads
    source = OnnxGraph(model)
    feeder = Feeder(source)
    dataset = nncf.Dataset(list(images.images), lambda image: feeder(image.read()))
    quantized = nncf.quantize(ov.convert_model(str(model)), dataset, subset_size=len(images.images))
    ov.save_model(quantized, str(output), compress_to_fp16=False)
    write_sidecar(output, source.contract)


@dataclass(frozen=True)
class Entry:
    """A quantizer, its settings, the suffix of what it writes and the runtimes that it is measured on."""

    quantize: Callable[..., None]
    settings: dict[str, str]
    suffix: str
    runtimes: tuple[str, ...]


QUANTIZERS = {
    "fcos-deploy onnxruntime-cpu": Entry(ours, {"consumer": "onnxruntime"}, ".onnx", ("onnxruntime",)),
    "fcos-deploy openvino": Entry(ours, {"consumer": "openvino"}, ".onnx", ("openvino",)),
    "quantize_static MinMax": Entry(quantize_static, {"method": "MinMax"}, ".onnx", ("onnxruntime", "openvino")),
    "quantize_static Percentile": Entry(quantize_static, {"method": "Percentile"}, ".onnx", ("onnxruntime",)),
    "quantize_static Entropy": Entry(quantize_static, {"method": "Entropy"}, ".onnx", ("onnxruntime",)),
    "nncf default": Entry(nncf_default, {}, ".xml", ("openvino",)),
}
FLOAT = "fp32"


def main() -> None:
    """Run the missing combinations, then time the results, and write the table after every step."""
    options = _arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options)
        return
    file = options.work / "quantizers.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, found: Any) -> None:
        results[key] = found
        file.write_text(json.dumps(results, indent=1))
        options.output.write_text(markdown(results))
        print(key, found, flush=True)

    for runtime in RUNTIMES:
        if f"{FLOAT} {runtime}" not in results:
            keep(f"{FLOAT} {runtime}", {"ap": _ap(options.model, runtime, _session(options), options)})
    for count in options.counts:
        for name in options.only or QUANTIZERS:
            if f"{name} {count}" not in results:
                keep(f"{name} {count}", one(name, count, options))
    for runtime in RUNTIMES:
        if f"ms {runtime}" not in results:
            keep(f"ms {runtime}", latencies(runtime, results, options))
    print(options.output.read_text())


RUNTIMES = ("onnxruntime", "openvino")


def markdown(results: dict[str, Any]) -> str:
    """What quantizing cost and gave, then the latencies."""
    lines = [
        "| quantizer | images | wall, s | processor, s | peak memory, MiB | AP |",
        "|---|---|---|---|---|---|",
    ]
    for runtime in RUNTIMES:
        found = results.get(f"{FLOAT} {runtime}")
        lines += [f"| {FLOAT} | | | | | {runtime} {100 * found['ap']:.2f} |"] if found else []
    for key, found in results.items():
        name, _, count = key.rpartition(" ")
        if name not in QUANTIZERS:
            continue
        if "failed" in found:
            lines.append(f"| {name} | {count} | | | | {found['failed']} |")
            continue
        aps = ", ".join(f"{runtime} {value}" for runtime, value in found["ap"].items())
        seconds = f"{found['seconds']:.1f} | {found['cpu_seconds']:.1f}"
        lines.append(f"| {name} | {count} | {seconds} | {found['mebibytes']} | {aps} |")
    for runtime in RUNTIMES:
        times = results.get(f"ms {runtime}", {})
        if times:
            lines += ["", f"| on {runtime} | median, ms | minimum, ms |", "|---|---|---|"]
            lines += [f"| {name} | {median:.1f} | {least:.1f} |" for name, (median, least) in times.items()]
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name in ("--train", "--images", "--annotations", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 128, 205])
    parser.add_argument("--only", nargs="+", choices=list(QUANTIZERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40, help="of the interleaved timing")
    parser.add_argument("--memory-limit", type=int, default=5000, help="MiB that a quantizer may take")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """In the process of its own: quantize, print seconds and the largest resident set."""
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_limit << 20,) * 2)
    entry = QUANTIZERS[options.worker]
    images = collect_images(options.train, options=SampleOptions(count=options.counts[0]))
    start = time.perf_counter()
    entry.quantize(options.model, images, options.result, threads=options.threads, **entry.settings)
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
    print(json.dumps({**found, "mebibytes": used.ru_maxrss // 1024}))


def one(name: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process, then AP on the runtimes that the result is for."""
    result = result_path(name, count, options)
    words = [sys.executable, __file__, str(options.model), "--worker", name, "--counts", str(count)]
    for option in ("train", "images", "annotations", "work", "output", "threads", "memory-limit"):
        words += [f"--{option}", str(getattr(options, option.replace("-", "_")))]
    done = subprocess.run([*words, "--result", str(result)], capture_output=True, text=True, check=False)
    if done.returncode:
        if "MemoryError" in done.stderr or "bad_alloc" in done.stderr or "llocate" in done.stderr:
            return {"failed": f"needs more than {options.memory_limit} MiB"}
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    session = _session(options)
    found["ap"] = {r: round(100 * _ap(result, r, session, options), 2) for r in QUANTIZERS[name].runtimes}
    return found


def result_path(name: str, count: int, options: argparse.Namespace) -> Path:
    """Where one quantizer's result lies."""
    return Path(options.work) / f"{name.replace(' ', '-')}-{count}{QUANTIZERS[name].suffix}"


def _session(options: argparse.Namespace) -> SessionOptions:
    return SessionOptions(threads=options.threads, contract=OnnxGraph(options.model).contract)


def _ap(model: Path, runtime: str, session: SessionOptions, options: argparse.Namespace) -> float:
    candidate = DetectorSpec(model=model, backend=runtime, options=session)
    request = EvaluationRequest(
        candidates=(candidate,), images=options.images, annotations=options.annotations, resamples=0
    )
    return evaluate(request).candidates[0].scores.ap or 0.0


def latencies(runtime: str, results: dict[str, Any], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median and least milliseconds of one inference, of all models in turn; the number of images changes no speed."""
    paths = {FLOAT: options.model}
    for name, entry in QUANTIZERS.items():
        count = next((c for c in options.counts if "ap" in results.get(f"{name} {c}", {})), None)
        if count is not None and runtime in entry.runtimes:
            paths[name] = result_path(name, count, options)
    picture = collect_images(options.images, options=SampleOptions(count=1, minimum=1)).images[0].read()
    feeds = Feeder(OnnxGraph(options.model))(picture)
    times: dict[str, list[float]] = {name: [] for name in paths}
    with contextlib.ExitStack() as stack:
        sessions = {
            name: stack.enter_context(get_backend(runtime).open(path, _session(options)))
            for name, path in paths.items()
        }
        for round_number in range(options.rounds + 2):
            for name, session in sessions.items():
                start = time.perf_counter()
                session.run(feeds)
                if round_number >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (float(np.median(values)), min(values)) for name, values in times.items()}


if __name__ == "__main__":
    main()
