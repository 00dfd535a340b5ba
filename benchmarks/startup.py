"""How long one waits: for an import, for help, and from the start of a process to its first detection.

    python benchmarks/startup.py [MODEL ...]

A model is a bundle, which is opened in both precisions, or an ONNX file. Beside the first detection of a file is the
first inference of a bare script that imports the runtime, opens the file with its defaults, and gives it zeros; both in
turns. OpenVINO keeps compiled models for both.

Each command is run several times in a process of its own; medians and minima in seconds. The first run of each fills
caches (bytecode, compiled models) and is not counted. A model is opened on both runtimes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fcos_deploy.benchmark.measure import ColdStart, measure_cold_start
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import FcosDeployError
from fcos_deploy.core.image import list_images
from fcos_deploy.detector import DetectorSpec

IMAGES = Path(__file__).parents[1] / "fcos_deploy" / "demo_data" / "evaluation"


def process(*arguments: str) -> Callable[[], float]:
    """Seconds that Python takes with these arguments."""

    def run() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    return run


# What one writes without us; the sizes of the input are the file's own.
BARE = {
    "onnxruntime": (
        "import sys, numpy, onnxruntime; session = onnxruntime.InferenceSession(sys.argv[1]);"
        "ports = session.get_inputs(); shape = [size if isinstance(size, int) else 1 for size in ports[0].shape];"
        "session.run(None, {ports[0].name: numpy.zeros(shape, numpy.uint8)})"
    ),
    "openvino": (
        "import sys, numpy, openvino; core = openvino.Core(); core.set_property({'CACHE_DIR': sys.argv[2]});"
        "model = core.compile_model(sys.argv[1], 'CPU'); port = model.inputs[0].partial_shape;"
        "shape = [size.get_length() if size.is_static else 1 for size in port];"
        "model.create_infer_request().infer([numpy.zeros(shape, numpy.uint8)])"
    ),
}


def cold_start(model: Path, backend: str, precision: Precision | None, parts: list[ColdStart]) -> Callable[[], float]:
    """Seconds from the start of a process to its first detection."""

    def run() -> float:
        spec = DetectorSpec(model=model, backend=backend, precision=precision)
        parts.append(measure_cold_start(spec, list_images(IMAGES)[0]))
        return parts[-1].first_detection

    return run


def measure(rows: dict[str, Callable[[], float]], *, rounds: int) -> None:
    """Print rows that are measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, run in rows.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    for name, of_row in times.items():
        print(f"| {name} | {statistics.median(of_row):.3f} | {min(of_row):.3f} |", flush=True)


def measure_model(model: Path, *, rounds: int) -> None:
    """A model's rows; what cannot be opened is said on stderr."""
    precisions = [None] if model.is_file() else [Precision.FP32, Precision.INT8]
    for backend, precision in itertools.product(BARE, precisions):
        parts: list[ColdStart] = []
        rows = {f"first detection, {backend} {precision or model.name}": cold_start(model, backend, precision, parts)}
        with tempfile.TemporaryDirectory() as cache:
            if precision is None:
                bare = process("-c", BARE[backend], str(model), cache)
                rows[f"first inference of a bare script, {backend} {model.name}"] = bare
            try:
                measure(rows, rounds=rounds)
            except FcosDeployError as error:
                print(f"# {error}", file=sys.stderr)
                continue
        last = min(parts, key=lambda part: part.first_detection)
        print(
            f"#   imported after {last.imported:.2f} s, open after {last.opened:.2f} s, {last.peak_memory_mib:.0f} MiB",
            file=sys.stderr,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles all modules anew
    print("| | median s | fastest s |\n|---|---:|---:|")
    app = "from fcos_deploy.cli.app import main; main()"
    commands = {
        "`python -c pass`": process("-c", "pass"),
        "`import fcos_deploy`": process("-c", "import fcos_deploy"),
        **{f"`fcos-deploy {words}`": process("-c", app, *words.split()) for words in ("--help", "deploy --help")},
    }
    for name, run in commands.items():
        measure({name: run}, rounds=options.rounds)
    for model in options.models:
        measure_model(model, rounds=options.rounds)


if __name__ == "__main__":
    main()
