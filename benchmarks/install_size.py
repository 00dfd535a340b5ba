"""What an installation takes on disk, and how long its import lasts: ``python benchmarks/install_size.py WHEEL``.

Each row is a new virtual environment with the wheel, an extra and the versions of ``constraints.txt``, without pip. MB
are the bytes of all files of its ``lib``; seconds those of ``from fcos_deploy import Detector`` in a new process, the
median of three after one that is not counted. ``make dist`` makes the wheels.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def seconds_of_import(python: Path) -> float:
    """Of one new process."""
    started = time.perf_counter()
    subprocess.run([python, "-c", "from fcos_deploy import Detector"], check=True, cwd=python.parent)
    return time.perf_counter() - started


def row(wheel: Path, extra: str, *, interpreter: str, constraints: Path | None) -> str:
    """Of the table."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        pinned = ["-c", str(constraints)] if constraints else []
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *pinned, f"{wheel}[{extra}]" if extra else str(wheel)], check=True)
        subprocess.run([*pip, "uninstall", "--yes", "pip"], check=True)
        version = subprocess.run([python, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
        seconds_of_import(python)
        seconds = statistics.median(seconds_of_import(python) for _ in range(3))
        size = sum(path.stat().st_size for path in (Path(folder) / "lib").rglob("*") if path.is_file())
    name = f"fcos-deploy[{extra}]" if extra else "fcos-deploy"
    return f"| `{name}` | {version} | {size / 1e6:.0f} | {seconds:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--extra", nargs="*", default=["", "onnxruntime", "openvino"])
    parser.add_argument("--python", nargs="*", default=["python3.11"])
    parser.add_argument("--newest", action="store_true", help="without the versions of constraints.txt")
    options = parser.parse_args()
    print("| installed | Python | MB | import, s |\n|---|---|---|---|")
    for interpreter in options.python:
        for extra in options.extra:
            constraints = None if options.newest else ROOT / "constraints.txt"
            print(row(options.wheel.resolve(), extra, interpreter=interpreter, constraints=constraints), flush=True)


if __name__ == "__main__":
    main()
