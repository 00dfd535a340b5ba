"""Our quantizer beside onnxruntime's ``quantize_static`` and NNCF's defaults: same model, images and machine.

    python benchmarks/int8_quantizers.py MODEL.onnx --train DIR --images DIR --annotations FILE --work DIR -o OUT.md

Every quantizer runs in a process of its own, so that wall time and peak memory are its own. A killed run continues.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calibration.data import CalibrationSet, SampleOptions, collect_images, read_picture
from calibration.feeds import Feeder
from calibration.graph import load_graph
from fcos_deploy.accuracy.collect import Target
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract_io import read_contract, write_sidecar
from fcos_deploy.core.registry import backend


def ours(model: Path, images: CalibrationSet, output: Path, *, consumer: str, threads: int) -> None:
    """Statistics, ranges and Q/DQ placement of this project."""
    from calibration.placement import placement_for
    from calibration.qdq import quantize_qdq
    from calibration.statistics import StatisticsOptions, collect_ranges

    calibration = collect_ranges(model, images, options=StatisticsOptions(threads=threads))
    quantize_qdq(model, calibration, output, policy=placement_for(consumer))


def quantize_static(model: Path, images: CalibrationSet, output: Path, *, method: str, threads: int) -> None:
    """Onnxruntime's own, as its documentation advises for x86 without VNNI: U8/S8, per channel, reduced range."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as run

    del threads  # It has no such option.
    feeder = Feeder(load_graph(model).model, read_contract(model))

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            self._feeds: Iterator[Any] = (feeder(read_picture(image)) for image in images.images)

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
    contract = read_contract(model)
    feeder = Feeder(load_graph(model).model, contract)
    dataset = nncf.Dataset(list(images.images), lambda image: feeder(read_picture(image)))
    quantized = nncf.quantize(ov.convert_model(str(model)), dataset, subset_size=len(images.images))
    ov.save_model(quantized, str(output), compress_to_fp16=False)
    write_sidecar(output, contract)


Quantize = Callable[..., None]
QUANTIZERS: dict[str, tuple[Quantize, dict[str, str], str, tuple[str, ...]]] = {
    "fcos-deploy onnxruntime-cpu": (ours, {"consumer": "onnxruntime"}, ".onnx", ("onnxruntime",)),
    "fcos-deploy openvino": (ours, {"consumer": "openvino"}, ".onnx", ("openvino",)),
    "quantize_static MinMax": (quantize_static, {"method": "MinMax"}, ".onnx", ("onnxruntime", "openvino")),
    "quantize_static Percentile": (quantize_static, {"method": "Percentile"}, ".onnx", ("onnxruntime",)),
    "quantize_static Entropy": (quantize_static, {"method": "Entropy"}, ".onnx", ("onnxruntime",)),
    "nncf default": (nncf_default, {}, ".xml", ("openvino",)),
}


def main() -> None:
    """Run the missing combinations, then write the table."""
    options = _arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options)
        return
    file = options.work / "quantizers.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for count in options.counts:
        for name in options.only or QUANTIZERS:
            key = f"{name} {count}"
            if key not in results:
                results[key] = one(name, count, options)
                file.write_text(json.dumps(results, indent=1))
                print(key, results[key], flush=True)
    lines = ["| quantizer | images | wall, s | peak memory, MiB | AP | ms |", "|---|---|---|---|---|---|"]
    for key, found in results.items():
        name, _, count = key.rpartition(" ")
        aps, times = (
            ", ".join(f"{runtime} {value}" for runtime, value in found[what].items()) for what in ("ap", "ms")
        )
        lines.append(f"| {name} | {count} | {found['seconds']:.1f} | {found['mebibytes']} | {aps} | {times} |")
    options.output.write_text("\n".join(lines) + "\n")
    print(options.output.read_text())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    for name in ("--train", "--images", "--annotations", "--work"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 128, 205])
    parser.add_argument("--only", nargs="+", choices=list(QUANTIZERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """In the process of its own: quantize, print seconds and the largest resident set."""
    quantize, settings, _, _ = QUANTIZERS[options.worker]
    images = collect_images(options.train, options=SampleOptions(count=options.counts[0]))
    start = time.perf_counter()
    quantize(options.model, images, options.result, threads=options.threads, **settings)
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime}
    print(json.dumps({**found, "mebibytes": used.ru_maxrss // 1024}))


def one(name: str, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process, then AP and latency on the runtimes that the result is for."""
    _, _, suffix, runtimes = QUANTIZERS[name]
    result = options.work / f"{name.replace(' ', '-')}-{count}{suffix}"
    words = [sys.executable, __file__, str(options.model), "--worker", name, "--counts", str(count)]
    for option in ("train", "images", "annotations", "work", "output", "threads"):
        words += [f"--{option}", str(getattr(options, option))]
    done = subprocess.run([*words, "--result", str(result)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    session = SessionOptions(threads=options.threads, contract=read_contract(options.model))
    found["ap"] = {r: round(100 * _ap(result, r, session, options), 2) for r in runtimes}
    found["ms"] = {r: _latency(result, r, session, options) for r in runtimes}
    return found


def _ap(model: Path, runtime: str, session: SessionOptions, options: argparse.Namespace) -> float:
    target = Target(model=model, backend=runtime, options=session)
    request = EvaluationRequest(targets=(target,), images=options.images, annotations=options.annotations, resamples=0)
    return evaluate(request).targets[0].scores.ap or 0.0


def _latency(model: Path, runtime: str, session: SessionOptions, options: argparse.Namespace) -> float:
    picture = read_picture(collect_images(options.images, options=SampleOptions(count=1, minimum=1)).images[0])
    feeds = Feeder(load_graph(options.model).model, read_contract(options.model))(picture)
    times = []
    with backend(runtime).open(model, session) as opened:
        for _ in range(22):
            start = time.perf_counter()
            opened.run(feeds)
            times.append((time.perf_counter() - start) * 1e3)
    return round(float(np.median(times[2:])), 1)


if __name__ == "__main__":
    main()
