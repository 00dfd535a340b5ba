"""How cost grows: with batch, streams and threads; with the image and the classes; with the model.

    python benchmarks/scaling.py --work runs/scaling --plots docs/images -o scaling.md [--part throughput]

Artifacts and finished points are kept in ``--work``; a stopped run goes on. Latencies are medians of turns, all points
of a curve in each turn. Time and memory of export, simplify and calibrate are those of a process of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from contestants import DEMO, demo_subject, resnet_subject
from scaling_plots import Curves, draw

from calibration.calibrate import CalibrationRequest, StatisticsOptions, calibrate
from calibration.dataset import SampleOptions
from exporters.rewrite import simplify_onnx
from exporters.torch_onnx import ExportOptions, export_onnx
from fcos_deploy.benchmark.measure import peak_memory_mib
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.enums import PerformanceHint
from fcos_deploy.core.files import write_text
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.detector import Detector

BACKENDS = ("onnxruntime", "openvino")
Key = tuple[str, int]
BATCHES = (1, 2, 4, 8)
SIZES = (160, 224, 320, 448, 640)
CLASSES = (1, 20, 80, 320, 1000)
DEPTHS = (18, 34, 50, 101)
STEPS = ("export", "simplify", "calibrate")
WHOLE = "export-and-simplify"  # as the command does it, comparing once less


def image() -> np.ndarray:
    """A real photograph."""
    return read_image(list_images(DEMO / "evaluation")[0])


def turns(actions: dict[Key, Callable[[], object]], *, rounds: int) -> dict[Key, float]:
    """Median milliseconds of each action, one call of each a round after one that is not counted."""
    taken: dict[Key, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            action()
            started = time.perf_counter()
            action()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: float(np.median(times)) for name, times in taken.items()}


def exported(path: Path, *, size: int = 320, classes: int = 80, depth: int = 18, batch: int | None = 1) -> Path:
    """A ResNet FCOS of random weights, exported once."""
    if not path.exists():
        subject = resnet_subject(1, size=(size, size), classes=classes, depth=depth)
        export_onnx(subject.loaded, path, options=ExportOptions(batch=batch))
    return path


def throughput(work: Path, *, rounds: int) -> Curves:
    """Images a second of the demo detector by the batch of a request."""
    path = work / "demo.batch.onnx"
    if not path.exists():
        export_onnx(demo_subject(1).loaded, path, options=ExportOptions(batch=None))
    picture = image()
    actions: dict[tuple[str, int], Callable[[], object]] = {}
    with contextlib.ExitStack() as opened:
        for backend in BACKENDS:
            for threads in (1, 2):
                options = SessionOptions(threads=threads)
                detector = opened.enter_context(Detector.open(path, backend=backend, options=options))
                for batch in BATCHES:
                    feeds, boxes = detector.prepare([picture] * batch)
                    actions[f"{backend}, {threads} threads", batch] = _request(detector, feeds, boxes)
        milliseconds = turns(actions, rounds=rounds)
    series: dict[str, list[tuple[float, float]]] = {}
    for (name, batch), value in milliseconds.items():
        series.setdefault(name, []).append((batch, 1000 * batch / value))
    return Curves("Images of a batch", "images a second", series)


def _request(detector: Detector, feeds: Any, boxes: Any) -> Callable[[], object]:
    return lambda: detector.finish(detector.infer(feeds), boxes)


def streams(work: Path, *, rounds: int) -> Curves:
    """Images a second of the demo detector with the throughput hint, two threads in all."""
    path = work / "demo.onnx"
    if not path.exists():
        export_onnx(demo_subject(1).loaded, path)
    pictures, counts = [image()] * 8, (1, 2)
    with contextlib.ExitStack() as opened:
        actions: dict[tuple[str, int], Callable[[], object]] = {}
        for backend in BACKENDS:
            for count in counts:
                options = SessionOptions(hint=PerformanceHint.THROUGHPUT, threads=2, streams=count)
                detector = opened.enter_context(Detector.open(path, backend=backend, options=options))
                actions[backend, count] = lambda d=detector: d.detect_batch(pictures)
        milliseconds = turns(actions, rounds=rounds)
    series = {b: [(n, len(pictures) * 1000 / milliseconds[b, n]) for n in counts] for b in BACKENDS}
    return Curves("Requests at a time, 2 threads in all", "images a second", series)


def image_size(work: Path, *, rounds: int) -> Curves:
    """Latency of a ResNet-18 FCOS, 80 classes, from pixels to detections."""
    paths = {size: exported(work / f"size{size}.onnx", size=size) for size in SIZES}
    series = _latencies(paths, rounds=rounds)
    megapixels = {size: size * size / 1e6 for size in SIZES}
    return Curves("Megapixels of the input", "ms", {b: [(megapixels[x], y) for x, y in s] for b, s in series.items()})


def class_count(work: Path, *, rounds: int) -> Curves:
    """Latency of a ResNet-18 FCOS at 320x320 by its number of classes."""
    paths = {classes: exported(work / f"classes{classes}.onnx", classes=classes) for classes in CLASSES}
    return Curves("Classes", "ms", _latencies(paths, rounds=rounds))


def _latencies(paths: dict[int, Path], *, rounds: int) -> dict[str, list[tuple[float, float]]]:
    picture = image()
    with contextlib.ExitStack() as opened:
        actions: dict[tuple[str, int], Callable[[], object]] = {}
        for backend in BACKENDS:
            for key, path in paths.items():
                options = SessionOptions(threads=1)
                detector = opened.enter_context(Detector.open(path, backend=backend, options=options))
                actions[backend, key] = lambda d=detector: d.detect(picture)
        milliseconds = turns(actions, rounds=rounds)
    return {b: [(key, milliseconds[b, key]) for key in paths] for b in BACKENDS}


def model_costs(work: Path, *, rounds: int) -> dict[str, list[list[float]]]:
    """For each step and network of growing depth (320x320, 80 classes): seconds, peak MiB, megabytes of the model."""
    del rounds
    return {step: [_step_cost(work, step=step, depth=depth) for depth in DEPTHS] for step in STEPS}


def _step_cost(work: Path, *, step: str, depth: int) -> list[float]:
    command = [sys.executable, __file__, "--work", str(work), "--worker", step, "--depth", str(depth)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(number) for number in result.stdout.splitlines()[-1].split()]


def work_step(work: Path, *, step: str, depth: int, size: int) -> str:
    """Do ``step`` in this process: what it took, imports included."""
    plain, simple = work / f"depth{depth}.plain.onnx", work / f"depth{depth}.onnx"
    started = time.perf_counter()
    if step == "export":
        subject = resnet_subject(2, size=(size, size), classes=80, depth=depth)
        export_onnx(subject.loaded, plain, options=ExportOptions(simplify=False))
    elif step == WHOLE:
        export_onnx(resnet_subject(2, size=(size, size), classes=80, depth=depth).loaded, plain)
    elif step == "simplify":
        simplify_onnx(plain, simple)
    else:
        output = work / f"depth{depth}.json"
        output.unlink(missing_ok=True)
        sample, statistics = SampleOptions(count=16), StatisticsOptions(threads=2)
        images = DEMO / "calibration"
        calibrate(CalibrationRequest(model=simple, images=images, output=output, sample=sample, statistics=statistics))
    return f"{time.perf_counter() - started} {peak_memory_mib()} {plain.stat().st_size / 1e6}"


PARTS: dict[str, Callable[..., Any]] = {
    "throughput": throughput,
    "streams": streams,
    "image_size": image_size,
    "class_count": class_count,
    "model_costs": model_costs,
}


def curves(found: dict[str, Any]) -> dict[str, Curves]:
    """What is drawn and tabled."""
    drawn = {name: Curves(**facts) for name, facts in found.items() if name != "model_costs"}
    costs = found.get("model_costs", {})
    for name, unit, column in (("model_time", "seconds", 0), ("model_memory", "peak memory, MiB", 1)):
        if costs:
            series = {step: [(row[2], row[column]) for row in rows] for step, rows in costs.items()}
            drawn[name] = Curves("Model, MB", unit, series)
    return drawn


def main() -> None:
    """Measure what is missing, write the table and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated")
    parser.add_argument("--again", action="store_true", help="measure finished parts again")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--plots", type=Path, help="folder for one SVG")
    parser.add_argument("-o", "--output", type=Path, help="the tables as Markdown")
    parser.add_argument("--worker", choices=(*STEPS, WHOLE), help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, default=50, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=320, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.worker:
        print(work_step(options.work, step=options.worker, depth=options.depth, size=options.size))
        return
    state = options.work / "state.json"
    found: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    for name in options.part or PARTS:
        if name not in found or options.again:
            result = PARTS[name](options.work, rounds=options.rounds)
            found[name] = asdict(result) if isinstance(result, Curves) else result
            write_text(state, json.dumps(found, indent=1))
            print(f"{name} measured", flush=True)
    drawn = curves(found)
    text = "\n".join(f"### {name}\n\n{one.table()}" for name, one in drawn.items())
    print(text)
    if options.output:
        write_text(options.output, text)
    if options.plots:
        draw(drawn, options.plots / "scaling.svg")


if __name__ == "__main__":
    main()
