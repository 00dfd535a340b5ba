"""From pixels to detections: fcos-deploy against what one would use instead, on the same weights, image and machine.

    python benchmarks/end_to_end.py --work runs/end_to_end --build     # once; takes long
    python benchmarks/end_to_end.py --work runs/end_to_end -o end_to_end.md

Runs the demo detector and a ResNet-50 FCOS of random weights at 640x640 with 80 classes and at 800x1344 with 91
(``--only demo`` for one). Artifacts, AP and every finished round are kept in ``--work``: a stopped run goes on,
and building does not disturb timing. All contestants are timed in turns, a few detections of each in every round, in
rotating order; the table has medians, and the ratio to PyTorch eager, which is the median of the ratios of the rounds.
What cannot be built or run is a row with the reason; what takes three times the processor time of PyTorch eager is not
timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contestants import BASE, CONTESTANTS, Detect, Image, Subject, demo_subject, resnet_subject
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import coco_scores
from fcos_deploy.accuracy.dataset import label_index, load_coco
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import FcosDeployError
from fcos_deploy.core.files import write_text
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.core.machine import read_machine

HOPELESS = 3  # times PyTorch eager
HOPELESSLY_SLOW = 60.0  # seconds of processor time; not tried twice
FAILURES = (FcosDeployError, RuntimeError, ValueError, TypeError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Case:
    """A subject and how often it is timed: a round takes seconds where an inference takes one."""

    title: str
    make: Callable[[int], Subject]
    rounds: int
    block: int


CASES = {
    "demo": Case("The demo detector, 320x416, 3 classes", demo_subject, 12, 3),
    "resnet50-640": Case(
        "ResNet-50, 640x640, 80 classes", lambda t: resnet_subject(t, size=(640, 640), classes=80), 9, 1
    ),
    "resnet50-800": Case(
        "ResNet-50, 800x1344, 91 classes", lambda t: resnet_subject(t, size=(800, 1344), classes=91), 6, 1
    ),
}


class State:
    """What is known of a case, in a file that is replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def update(self, name: str, **facts: Any) -> None:
        """Add facts of a contestant and save."""
        self.found.setdefault(name, {}).update(facts)
        write_text(self._path, json.dumps(self.found, indent=1))

    def runs(self) -> list[str]:
        """Who takes part in the rounds."""
        limit = HOPELESS * self.found[BASE]["cpu_s"]
        return [n for n in CONTESTANTS if self.found[n].get("cpu_s", float("inf")) <= limit]


def build_all(subject: Subject, folder: Path, state: State) -> None:
    """Artifacts, the processor time of one detection, and AP where there are annotations."""
    image = read_image(list_images(subject.images)[0])
    for name, build in CONTESTANTS.items():
        if name in state.found:
            continue
        started = time.perf_counter()
        try:
            detect = build(subject, folder)
            cpu = _cpu_seconds(detect, image)
            if cpu < HOPELESSLY_SLOW:  # the first one warms up
                cpu = _cpu_seconds(detect, image)
            state.update(name, cpu_s=cpu, ap=accuracy(subject, detect, cpu_seconds=cpu))
        except FAILURES as error:
            state.update(name, failed=str(error).strip().splitlines()[0][:120])
        print(f"{name}: {state.found[name]} ({time.perf_counter() - started:.0f} s)", flush=True)


def accuracy(subject: Subject, detect: Detect, *, cpu_seconds: float) -> float | None:
    """AP on all images; None without annotations, or where that would take too long."""
    if subject.annotations is None or cpu_seconds > 5:
        return None
    dataset = load_coco(subject.annotations, images=subject.images)
    index = np.append(label_index(subject.contract.class_names, dataset), -1)
    found = {}
    for image in dataset.images:
        one = detect(read_image(image.path))
        found[image.image_id] = Detections(one.boxes, one.scores, index[one.labels])
    return coco_scores(dataset, found).ap


def time_all(subject: Subject, folder: Path, state: State, *, rounds: int, block: int) -> None:
    """Add rounds until every contestant has ``rounds`` of them."""
    names = state.runs()
    done = min(len(state.found[name].get("times", [])) for name in names)
    if done >= rounds:
        return
    image = read_image(list_images(subject.images)[0])
    ready = {name: CONTESTANTS[name](subject, folder) for name in names}
    for name in names:
        ready[name](image)
    for turn in range(done, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            ready[name](image)  # caches and spinning threads are still another contestant's
            row = [_milliseconds(ready[name], image) for _ in range(block)]
            state.update(name, times=[*state.found[name].get("times", [])[:turn], row])
        print(f"round {turn + 1} of {rounds}", flush=True)


def _cpu_seconds(detect: Detect, image: Image) -> float:
    before = time.process_time()
    detect(image)
    return time.process_time() - before


def _milliseconds(detect: Detect, image: Image) -> float:
    started = time.perf_counter()
    detect(image)
    return 1000 * (time.perf_counter() - started)


def table(state: State) -> str:
    """Markdown, a row for every contestant."""
    base = np.array(state.found[BASE]["times"])
    lines = ["| | median ms | fastest ms | times PyTorch fp32 | AP |", "|---|---:|---:|---:|---:|"]
    for name in CONTESTANTS:
        facts = state.found[name]
        ap = "" if facts.get("ap") is None else f"{facts['ap']:.3f}"
        if "failed" in facts:
            lines.append(f"| {name} | fails: {facts['failed']} | | | |")
        elif "times" not in facts:
            lines.append(f"| {name} | {facts['cpu_s']:.0f} s of processor time | | | {ap} |")
        else:
            lines.append(f"| {name} | {_figures(np.array(facts['times']), base)} | {ap} |")
    return "\n".join(lines) + "\n"


def _figures(rows: NDArray[np.float64], base: NDArray[np.float64]) -> str:
    ratio = float(np.median(np.median(base, axis=1) / np.median(rows, axis=1)))
    return f"{np.median(rows):.1f} | {rows.min():.1f} | {ratio:.2f}"


def main() -> None:
    """Build, or time and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where artifacts and finished rounds are kept")
    parser.add_argument("--only", choices=CASES, help="one of the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="instead of each model's own number")
    parser.add_argument("--build", action="store_true", help="build what is missing and stop")
    parser.add_argument("--again", action="store_true", help="forget earlier rounds")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    facts = read_machine()
    text = f"{facts.processor}, {facts.cores} cores, {options.threads} threads, load before {facts.load}.\n"
    for name in [options.only] if options.only else CASES:
        case, folder = CASES[name], options.work / name
        folder.mkdir(parents=True, exist_ok=True)
        subject = case.make(options.threads)
        state = State(folder / f"state.{options.threads}.json")
        build_all(subject, folder, state)
        if options.build:
            continue
        if options.again:
            for facts_of in state.found.values():
                facts_of.pop("times", None)
        rounds = options.rounds or case.rounds
        time_all(subject, folder, state, rounds=rounds, block=case.block)
        text += f"\n{case.title}; {rounds} rounds in turns.\n\n{table(state)}"
    if not options.build:
        print(text)
    if options.output:
        write_text(options.output, text)


if __name__ == "__main__":
    main()
