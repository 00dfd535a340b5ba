"""The first detection of a new process: what a user waits for, and what memory it takes.

Run as a program, this module is that process; it reads from stdin which model opens and what it detects on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos_deploy.core.errors import BackendError, FcosDeployError
from fcos_deploy.core.serialize import from_json, to_json

if TYPE_CHECKING:
    from fcos_deploy.detector import DetectorSpec

__all__ = ["ColdStart", "measure_cold_start", "module_command", "peak_memory_mib"]


_TIMEOUT = 600.0  # seconds; opening a large model may compile it
_REPEATS = 5  # detections before the peak memory is read: allocators reach their final size in the first few


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """Seconds from the start of the process: until our code runs, the model is open, the first image is detected.

    ``peak_memory_mib`` is the largest resident memory of the process, runtime and Python included, in 1024 ** 2 bytes.
    """

    imported: float
    opened: float
    first_detection: float
    peak_memory_mib: float


def measure_cold_start(spec: DetectorSpec, image: Path) -> ColdStart:
    """Start a process that opens the model of ``spec`` and detects on an image file.

    Raises:
        BackendError: the process failed; the message has the last line of what it printed.
    """
    command = module_command("fcos_deploy.benchmark.cold_start")
    # By stdin: class names may be longer than an argument can be. Of a loaded network the file is opened anew.
    parts = {name: to_json(getattr(spec, name)) for name in ("model", "backend", "precision", "options")}
    asked = json.dumps({"spec": parts, "image": str(image)})
    started = time.monotonic_ns()  # One clock for all processes of the machine.
    try:
        # S603: the command is this interpreter and this module; the task is data.
        result = subprocess.run(  # noqa: S603
            command, input=asked, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"The first detection of '{spec.model}' took more than {_TIMEOUT:.0f} s.") from error
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BackendError(f"The process for the cold start of '{spec.model}' failed: {last}")
    marks = json.loads(result.stdout.splitlines()[-1])
    seconds = {name: (marks[name] - started) / 1e9 for name in ("imported", "opened", "first_detection")}
    return ColdStart(**seconds, peak_memory_mib=marks["peak_memory_mib"])


# Python 3.10 has no ``-P``. ``-c`` puts '' (the working directory) first, and this takes it away before it imports.
_WITHOUT_CURRENT_FOLDER = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; module = sys.argv.pop(1); "
    "import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def module_command(module: str, *, version: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """The command that runs ``module`` with this interpreter, as ``python -m`` would.

    ``python -m`` alone imports from the working directory first, so that a ``numpy.py`` in a folder of downloaded
    models would be run. ``PYTHONPATH`` is honoured.
    """
    if version >= (3, 11):
        return [sys.executable, "-P", "-m", module]
    return [sys.executable, "-c", _WITHOUT_CURRENT_FOLDER, module]


def _run(asked: dict[str, Any]) -> dict[str, float]:  # Any: JSON values
    from fcos_deploy.detector import DetectorSpec

    marks: dict[str, float] = {"imported": time.monotonic_ns()}
    with from_json(DetectorSpec, asked["spec"]).open() as detector:
        marks["opened"] = time.monotonic_ns()
        image = detector.read(Path(asked["image"]))
        detector.detect(image)
        marks["first_detection"] = time.monotonic_ns()
        for _ in range(_REPEATS):
            detector.detect(image)
    marks["peak_memory_mib"] = peak_memory_mib()
    return marks


def peak_memory_mib() -> float:
    """Largest resident memory of this process, in 1024 ** 2 bytes.

    Not ``ru_maxrss`` where it can be avoided: Linux keeps that one across exec, so that a child of a large process
    would report its parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    resource = importlib.import_module("resource")
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(_run(json.load(sys.stdin))) + "\n")
    except FcosDeployError as error:
        sys.exit(f"{error.message} {error.hint}")
