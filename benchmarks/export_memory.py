"""How much memory ``export`` takes, for checkpoints of several sizes: what is fixed, what each byte of weights costs.

    python benchmarks/export_memory.py --work runs/export_memory -o export_memory.md

The networks have the same layers and other widths, so that a straight line through the peaks separates the libraries
from the weights. ``resident`` is the largest resident set of the process, which counts the pages of mapped files that
the kernel may drop at any time; ``anonymous`` is what it must keep.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fcos_deploy.core.network import FcosConfig, resnet_config
from fcos_deploy.model.fcos import Fcos

_SIZE = "128x128"  # network input; small, so that activations cost nothing beside the weights
_MB = 1e6


@dataclass(frozen=True)
class _Peak:
    """Bytes of one export: of the weights, resident and anonymous at most, and of the files that were written."""

    weights: int
    resident: int
    anonymous: int
    written: int
    seconds: float


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--widths", default="64,96,128", help="channels of the ResNet-50's stem, a quarter of the pyramid's"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments, export_options = parser.parse_known_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    peaks = []
    for width in map(int, arguments.widths.split(",")):
        checkpoint = arguments.work / f"width{width}.pt"
        if not checkpoint.exists():
            config = resnet_config(50, num_classes=80, stem_channels=width, fpn_channels=4 * width)
            _write(checkpoint, replace(config, width_per_group=width))
        peaks.append(_export(checkpoint, arguments.work / f"width{width}.onnx", export_options))
        print(peaks[-1], file=sys.stderr, flush=True)
    table = _table(peaks)
    print(table)
    if arguments.output:
        arguments.output.write_text(table, encoding="utf-8")


def _write(path: Path, config: FcosConfig) -> None:
    """A checkpoint of random weights that keep activations in range."""
    torch.manual_seed(0)
    model = Fcos(config)
    for name, tensor in model.state_dict().items():
        if name.endswith(".running_var"):
            tensor.fill_(4.0)  # Keeps the sums of the residual branches small.
    torch.save(model.state_dict(), path)


def _export(checkpoint: Path, output: Path, options: list[str]) -> _Peak:
    """The peaks of ``fcos-deploy export`` in a process of its own, looked at every five milliseconds."""
    main_function = "from fcos_deploy.cli.app import main; main()"
    command = [sys.executable, "-c", main_function, "export", str(checkpoint), "-o", str(output)]
    started = time.perf_counter()
    with subprocess.Popen([*command, "--input-size", _SIZE, *options], stderr=subprocess.PIPE) as process:
        anonymous, status = 0, Path(f"/proc/{process.pid}/status")
        while True:
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            anonymous = max(anonymous, int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(code)
        if process.returncode:
            raise SystemExit(process.stderr.read().decode() if process.stderr else "export failed")
    files = output.parent.glob(f"{output.name}*")
    return _Peak(
        weights=sum(t.numel() * t.element_size() for t in torch.load(checkpoint, mmap=True).values()),
        resident=usage.ru_maxrss * 1024,
        anonymous=anonymous,
        written=sum(file.stat().st_size for file in files),
        seconds=time.perf_counter() - started,
    )


def _table(peaks: list[_Peak]) -> str:
    """Markdown: one row an export, and the line through them."""
    rows = ["| weights | resident | anonymous | written | seconds |", "|---|---|---|---|---|"]
    for peak in peaks:
        sizes = (peak.weights, peak.resident, peak.anonymous, peak.written)
        rows.append(f"| {' | '.join(f'{size / _MB:.0f} MB' for size in sizes)} | {peak.seconds:.0f} |")
    weights = [peak.weights for peak in peaks]
    fits = [np.polyfit(weights, [getattr(p, kind) for p in peaks], 1) for kind in ("resident", "anonymous")]
    slopes = " | ".join(f"{fixed / _MB:.0f} MB + {slope:.2f} x weights" for slope, fixed in fits)
    return "\n".join([*rows, f"| line | {slopes} | | |", ""])


if __name__ == "__main__":
    main()
