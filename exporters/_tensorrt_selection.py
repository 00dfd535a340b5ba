"""Builds several engines of one graph, measures them, and keeps the fastest: tactic selection is a lottery."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters._tensorrt_build import EngineTarget, build_engine, require_writable
from fcos_deploy.core.backend import Backend, Session, SessionOptions
from fcos_deploy.core.errors import ConfigError, DeviceError
from fcos_deploy.core.exporter import BuildRequest, BuildResult
from fcos_deploy.core.registry import backends_for

__all__ = ["build_best"]

_WARM_UP, _REPEATS = 10, 50


def build_best(request: BuildRequest, *, target: EngineTarget) -> BuildResult:
    """One build, or the fastest of ``options.builds``.

    Raises:
        ConfigError: fewer than one build, or several with a timing cache, which makes them all the same.
        DeviceError: several builds, and no GPU to measure them on.
    """
    count = request.options.builds
    if count == 1:
        return build_engine(request, target=target)
    if count < 1:
        raise ConfigError(f"The number of builds must be at least 1, got {count}.")
    if request.options.timing_cache is not None:
        raise ConfigError("Several builds from one timing cache are all the same.", hint="leave one of the two out")
    backend = _measuring_backend(target)
    require_writable(request.output)
    with tempfile.TemporaryDirectory(prefix=".builds-", dir=request.output.parent) as folder:
        return _fastest(request, target=target, backend=backend, folder=Path(folder))


@dataclass(frozen=True, slots=True)
class _Candidate:
    result: BuildResult
    milliseconds: float


def _fastest(request: BuildRequest, *, target: EngineTarget, backend: Backend, folder: Path) -> BuildResult:
    candidates = []
    for index in range(request.options.builds):
        output = folder / f"{index}{request.output.suffix}"
        single = replace(request, output=output, options=replace(request.options, builds=1))
        result = build_engine(single, target=target)
        with backend.open(output, SessionOptions()) as session:
            candidates.append(_Candidate(result, _median_milliseconds(session, usual=usual_shapes(result.record))))
    best = min(candidates, key=lambda candidate: candidate.milliseconds)
    times = [round(candidate.milliseconds, 4) for candidate in candidates]
    return _move(best.result, request=request, times=times)


def _move(result: BuildResult, *, request: BuildRequest, times: list[float]) -> BuildResult:
    engine, sidecar = result.files
    record = {**result.record, "build_milliseconds": json.dumps(times)}
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    content["record"] = record
    sidecar.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    target_sidecar = request.output.with_suffix(".json")
    engine.replace(request.output)
    sidecar.replace(target_sidecar)
    return BuildResult(files=(request.output, target_sidecar), record=record)


def _measuring_backend(target: EngineTarget) -> Backend:
    for backend in backends_for(target.kind):
        probe = backend.probe()
        if probe.available:
            return backend
        raise DeviceError(f"Several builds are compared by measuring them: {probe.problem}", hint="build once")
    raise DeviceError("No runtime is installed that could measure several builds.", hint="build once")


def usual_shapes(record: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The middle shape of each input's profile, from a build's record."""
    shapes: dict[str, str] = json.loads(record["shapes"])
    return {name: tuple(int(n) for n in text.split("/")[1].split("x")) for name, text in shapes.items()}


def _median_milliseconds(session: Session, *, usual: Mapping[str, tuple[int, ...]]) -> float:
    feeds = {spec.name: np.zeros(usual[spec.name], dtype=spec.dtype) for spec in session.inputs}
    for _ in range(_WARM_UP):
        session.run(feeds)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        session.run(feeds)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
