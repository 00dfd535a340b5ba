"""How long engines take to build, how large they get, and in which type their convolutions compute.

    python benchmarks/tensorrt_build.py model.fp32.onnx model.int8.onnx --capability 8.6 --capability 12.0

With ``--backend tensorrt`` (on a GPU) each engine is built without a timing cache, with an empty one, and with the one
that the build before filled. TensorRT-RTX has no timing cache. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, SizeRange, get_exporter


def measure(source: Path, *, backend: str, options: BuildOptions, repeats: int) -> dict[str, Any]:
    """Median seconds of ``repeats`` builds, and what came of the last one."""
    seconds, cpu_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            request = BuildRequest(source=source, output=Path(folder) / "model.engine", options=options)
            started = time.process_time()
            record = get_exporter(backend).build(request).record
            cpu_seconds.append(round(time.process_time() - started, 2))  # tells a busy machine from a slow build
            seconds.append(float(record["seconds"]))
    return {
        "onnx": source.name,
        "compute_capabilities": record["compute_capabilities"],
        "built_on": record["built_on"],
        "version": record["version"],
        "timing_cache": record.get("timing_cache", "none"),
        "seconds": [round(s, 2) for s in seconds],
        "cpu_seconds": cpu_seconds,
        "median_seconds": round(statistics.median(seconds), 2),
        "engine_bytes": int(record["engine_bytes"]),
        "layers": int(record["layers"]),
        "convolution_inputs": json.loads(record["convolution_inputs"]),
    }


def variants(arguments: argparse.Namespace, folder: Path) -> list[BuildOptions]:
    """One build per capability; on TensorRT one without and two with a timing cache, of which the first fills it."""
    batch = SizeRange(*arguments.batch)
    if get_exporter(arguments.backend).produces is ArtifactKind.TENSORRT_RTX_ENGINE:
        return [BuildOptions(batch=batch, compute_capabilities=(c,)) for c in arguments.capability or ["8.6"]]
    cached = BuildOptions(batch=batch, timing_cache=folder / "timing.cache")
    return [BuildOptions(batch=batch), cached, cached]


def main() -> None:
    """Build what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="ONNX")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--capability", action="append", help="such as 8.6; may be repeated")
    parser.add_argument("--batch", nargs=3, type=int, default=(1, 1, 1), metavar=("MIN", "OPT", "MAX"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(source, backend=arguments.backend, options=options, repeats=arguments.repeats)
            for source in arguments.sources
            for options in variants(arguments, Path(folder))
        ]
    print(json.dumps({"machine": platform.processor() or platform.machine(), "builds": results}, indent=2))


if __name__ == "__main__":
    main()
