"""Which settings of ONNX Runtime a model runs fastest with, in turns.

    python benchmarks/onnxruntime_settings.py MODEL.onnx --threads 2

Prints medians and minima of ``run``, and the processor time that is spent in 10 runs with pauses of 50 ms between them:
threads that spin after a run show there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

SPINNING, STOP = "session.intra_op.allow_spinning", "session.force_spinning_stop"
LEVELS = onnxruntime.GraphOptimizationLevel
# Entries of the session's configuration, and attributes of its options.
SETTINGS: dict[str, dict[str, object]] = {
    "defaults": {},
    "no spinning": {SPINNING: "0"},
    "spinning that ends with the run (ours)": {STOP: "1"},
    "no blocked layouts (level extended)": {STOP: "1", "graph_optimization_level": LEVELS.ORT_ENABLE_EXTENDED},
    "no memory arena": {STOP: "1", "enable_cpu_mem_arena": False},
    "no memory pattern": {STOP: "1", "enable_mem_pattern": False},
    "work divided on the way (dynamic_block_base 4)": {STOP: "1", "session.dynamic_block_base": "4"},
}


def opened(path: Path, settings: dict[str, object], *, threads: int) -> Callable[[], object]:
    """A run of ``path`` on random pixels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in settings.items():
        if name.startswith("session."):
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    feeds = {images.name: np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)}
    return lambda: session.run(None, feeds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="uint8 input, raw tail")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    runs = {name: opened(options.model, settings, threads=options.threads) for name, settings in SETTINGS.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.rounds):
        for name in list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]:
            runs[name]()  # threads and caches are still another session's
            for _ in range(3):
                started = time.perf_counter()
                runs[name]()
                taken[name].append(1000 * (time.perf_counter() - started))
    print("| | median ms | fastest ms | CPU seconds of 10 runs with pauses |\n|---|---:|---:|---:|")
    for name, run in runs.items():
        row = f"{statistics.median(taken[name]):.1f} | {min(taken[name]):.1f} | {_with_pauses(run):.2f}"
        print(f"| {name} | {row} |", flush=True)


def _with_pauses(run: Callable[[], object]) -> float:
    started = time.process_time()
    for _ in range(10):
        run()
        time.sleep(0.05)
    return time.process_time() - started


if __name__ == "__main__":
    main()
