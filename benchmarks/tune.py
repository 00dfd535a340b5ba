"""Whether ``tune`` gives the whole grid's answer, in how much of its time, and whether sizes can share INT8 ranges.

    python benchmarks/tune.py -o WORK --max-latency-ms 40 [--model FILE] [--size 192x256 ...] [--backend NAME ...]

With the demo detector, or another one of its classes, on BCCD. The search first, without making the bundle; then every
configuration of the grid, timed and evaluated on all images; both are asked for the highest AP within the limit. At
last INT8 of each size, with the ranges of the model's own size and with its own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.machine import read_machine
from fcos_deploy.core.progress import INFERENCES
from fcos_deploy.pipeline import tune as tuning
from fcos_deploy.pipeline.deploy import DEMO_DATA
from fcos_deploy.pipeline.tune_models import Configuration, InputSize, TuneModels
from fcos_deploy.pipeline.tune_search import TuneRequest


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, seconds of the processor, and inferences."""

    seconds: float
    processor: float
    inferences: int

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s ({self.processor:.0f} s of processor time), {self.inferences} inferences"


def main() -> None:
    """Search, go through the grid, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the trials of both")
    parser.add_argument("--model", type=Path, default=DEMO_DATA / "fcos_bccd.safetensors")
    parser.add_argument("--max-latency-ms", type=float, required=True)
    parser.add_argument("--size", action="append", type=InputSize.parse, default=[])
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--calibration-count", type=int, default=32)
    parser.add_argument("--images", type=int, help="the first of the evaluation images; default: all")
    asked = parser.parse_args()
    annotations = json.loads((DEMO_DATA / "evaluation.json").read_text())
    count = asked.images or len(annotations["images"])
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "annotations.json").write_text(json.dumps(first_images(annotations, count)))
    request = TuneRequest(
        model=asked.model,
        output=asked.output / "tune",
        images=DEMO_DATA / "evaluation",
        annotations=asked.output / "annotations.json",
        calibration_images=DEMO_DATA / "calibration",
        max_latency_ms=asked.max_latency_ms,
        sizes=tuple(asked.size),
        backends=tuple(asked.backend),
        calibration_count=asked.calibration_count,
    )
    found, cost = measured(request)
    # Without a limit on time nothing is pruned before it is timed.
    whole = replace(request, output=asked.output / "grid", max_latency_ms=None)
    grid, grid_cost = measured(whole, grid_of=count)
    machine = read_machine()
    print(f"{machine.processor}, {machine.cores} cores; at most {asked.max_latency_ms:g} ms\n")
    print(
        "| configuration | ms (grid) | AP (grid) | ms (tune) | AP (tune) | images (tune) |\n|---|---|---|---|---|---|"
    )
    for configuration, (ms, ap, _) in grid.items():
        in_tune = found.get(configuration)
        cells = "- | - | -" if in_tune is None else f"{in_tune[0]:.1f} | {in_tune[1]:.4f} | {in_tune[2]}"
        print(f"| {configuration} | {ms:.1f} | {ap:.4f} | {cells} |")
    print(f"\ntune: {best(found, asked.max_latency_ms)}; {cost}")
    print(f"grid: {best(grid, asked.max_latency_ms)}; {grid_cost}")
    compare_ranges(request, folder=asked.output / "grid")


Figures = dict[Configuration, tuple[float, float, int]]  # ms, AP, images


def best(figures: Figures, limit: float) -> str:
    """The highest AP over the most images within the limit."""
    most = max(images for _, _, images in figures.values())
    fitting = {c: f for c, f in figures.items() if f[0] <= limit and f[2] == most}
    if not fitting:
        return "nothing keeps the limit"
    chosen = max(fitting, key=lambda c: (fitting[c][1], -fitting[c][0]))
    return f"{chosen}, {fitting[chosen][0]:.1f} ms, AP {fitting[chosen][1]:.4f}"


def first_images(annotations: dict[str, Any], count: int) -> dict[str, Any]:
    """COCO annotations of the first ``count`` images."""
    images = annotations["images"][:count]
    kept = {image["id"] for image in images}
    objects = [item for item in annotations["annotations"] if item["image_id"] in kept]
    return {**annotations, "images": images, "annotations": objects}


def measured(request: TuneRequest, *, grid_of: int = 0) -> tuple[Figures, Cost]:
    """What a search, or with ``grid_of`` so many images every configuration of it, comes to."""
    started, processor, inferences = time.perf_counter(), time.process_time(), INFERENCES.count
    with tuning.open_search(request) as (search, answer):
        search.run()
        if grid_of:
            figures: Figures = {}
            for configuration in search.measured:
                ap = exact_ap(request, search.models, configuration)
                figures[configuration] = (search.ms(configuration), ap, grid_of)
        else:
            answer.race()
            figures = {
                configuration: (search.ms(configuration), standing.interval.value, standing.images)
                for configuration, standing in answer.standings.items()
                if standing.interval is not None
            }
    cost = Cost(time.perf_counter() - started, time.process_time() - processor, INFERENCES.count - inferences)
    return figures, cost


@functools.cache
def _known() -> dict[str, float]:
    """Threads change no detection: such configurations are evaluated once, in the grid too."""
    return {}


def exact_ap(request: TuneRequest, models: TuneModels, configuration: Configuration) -> float:
    """Over all images."""
    name = f"{configuration.size} {configuration.backend} {configuration.format}"
    if name not in _known():
        evaluations = evaluate(
            EvaluationRequest(
                candidates=(models.open_as(configuration),),
                images=request.images,
                annotations=request.annotations,
                resamples=0,
            )
        )
        _known()[name] = evaluations.candidates[0].scores.ap or 0.0
    return _known()[name]


def compare_ranges(request: TuneRequest, *, folder: Path) -> None:
    """AP of INT8 with the ranges of the model's own size, and with those of each size."""
    print("\n| INT8 | AP, ranges of the own size of the model | AP, ranges of this size |\n|---|---|---|")
    with contextlib.ExitStack() as stack:
        searches = [
            stack.enter_context(
                tuning.open_search(replace(request, output=folder.with_name("own") if own else folder, own_ranges=own))
            )
            for own in (False, True)
        ]
        shared, _ = searches[0]
        for size in shared.sizes:
            for backend in shared.models.backends:
                configuration = Configuration(size=size, backend=backend, precision=Precision.INT8, threads=2)
                aps = []
                for search, _ in searches:
                    _known().pop(f"{size} {backend} int8", None)
                    aps.append(exact_ap(request, search.models, configuration))
                print(f"| {size} {backend} | {aps[0]:.4f} | {aps[1]:.4f} |")


if __name__ == "__main__":
    main()
