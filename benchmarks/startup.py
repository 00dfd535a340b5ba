"""How long one waits: for an import, for help, and from the start of a process to its first detection.

    python benchmarks/startup.py [BUNDLE ...]

Each command is run several times in a process of its own; medians and minima in seconds. The first run of each fills
caches (bytecode, compiled models) and is not counted. A bundle is opened on both runtimes, in both precisions.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fcos_deploy.benchmark.cold_start import ColdStart, measure_cold_start
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


def cold_start(bundle: Path, backend: str, precision: str, parts: list[ColdStart]) -> Callable[[], float]:
    """Seconds from the start of a process to its first detection."""

    def run() -> float:
        spec = DetectorSpec(model=bundle, backend=backend, precision=Precision(precision))
        parts.append(measure_cold_start(spec, list_images(IMAGES)[0]))
        return parts[-1].first_detection

    return run


def measure(name: str, run: Callable[[], float], *, rounds: int) -> None:
    """Print a row."""
    run()
    times = [run() for _ in range(rounds)]
    print(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} |", flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print("| | median s | fastest s |\n|---|---:|---:|")
    measure("`python -c pass`", process("-c", "pass"), rounds=options.rounds)
    measure("`import fcos_deploy`", process("-c", "import fcos_deploy"), rounds=options.rounds)
    app = "from fcos_deploy.cli.app import main; main()"
    for words in (("--help",), ("deploy", "--help")):
        measure(f"`fcos-deploy {' '.join(words)}`", process("-c", app, *words), rounds=options.rounds)
    for bundle in options.bundles:
        for backend, precision in itertools.product(("onnxruntime", "openvino"), ("fp32", "int8")):
            parts: list[ColdStart] = []
            run = cold_start(bundle, backend, precision, parts)
            try:
                measure(f"first detection, {backend} {precision}", run, rounds=options.rounds)
            except FcosDeployError as error:
                print(f"# {error}", file=sys.stderr)
                continue
            last = min(parts, key=lambda part: part.first_detection)
            print(
                f"#   imported after {last.imported:.2f} s, open after {last.opened:.2f} s,"
                f" {last.peak_memory_mib:.0f} MiB",
                file=sys.stderr,
            )


if __name__ == "__main__":
    main()
