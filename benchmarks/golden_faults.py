"""Which planted faults ``verify`` finds with 2, 4 and 8 golden images, and how often it blames an honest engine.

The demo's detectors run once over the evaluation images; golden sets are drawn from them at random, and faults are
applied to the detections, where every one of them would show.

    python benchmarks/golden_faults.py BUNDLE   # one made by 'fcos-deploy demo'
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fcos_deploy import Detector, SessionOptions
from fcos_deploy.accuracy.golden import GoldenStandard, check_golden
from fcos_deploy.bundle import DEFAULT_GATES
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.gate import Outcome
from fcos_deploy.core.image import list_images, read_image
from fcos_deploy.pipeline.deploy import DEMO_DATA

Fault = Callable[[list[Detections], ModelContract], list[Detections]]


def _boxes(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(images: list[Detections], _: ModelContract) -> list[Detections]:
        return [Detections(change(d.boxes).astype(np.float32), d.scores, d.labels) for d in images]

    return fault


def _scores(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(images: list[Detections], contract: ModelContract) -> list[Detections]:
        threshold = contract.decode.score_threshold
        return [Detections(d.boxes, change(d.scores).astype(np.float32), d.labels).above(threshold) for d in images]

    return fault


def _resized(width: float, height: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(boxes: np.ndarray) -> np.ndarray:
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * (width, height)
        return np.concatenate([centre - half, centre + half], axis=1)

    return change


def _one_class(images: list[Detections], contract: ModelContract) -> list[Detections]:
    """The rarest class that occurs is taken for another one."""
    labels = np.concatenate([d.labels for d in images])
    rarest = min(set(labels.tolist()), key=lambda k: (labels == k).sum())
    other = (rarest + 1) % len(contract.class_names)
    return [Detections(d.boxes, d.scores, np.where(d.labels == rarest, other, d.labels)) for d in images]


def _one_class_moved(images: list[Detections], _: ModelContract) -> list[Detections]:
    labels = np.concatenate([d.labels for d in images])
    common = max(set(labels.tolist()), key=lambda k: (labels == k).sum())
    return [
        Detections((d.boxes + 2 * (d.labels == common)[:, None]).astype(np.float32), d.scores, d.labels) for d in images
    ]


def _large_moved(images: list[Detections], _: ModelContract) -> list[Detections]:
    """What one level of the pyramid computes: boxes whose longer side has 128 pixels and more."""
    large = [(d.boxes[:, 2:] - d.boxes[:, :2]).max(1, initial=0, keepdims=True) >= 128 for d in images]
    return [
        Detections((d.boxes + 2 * k).astype(np.float32), d.scores, d.labels) for d, k in zip(images, large, strict=True)
    ]


def _cut_off(images: list[Detections], _: ModelContract) -> list[Detections]:
    kept = [(np.arange(len(d)) < 0.8 * len(d)) for d in images]
    return [Detections(d.boxes[k], d.scores[k], d.labels[k]) for d, k in zip(images, kept, strict=True)]


def _empty(images: list[Detections], _: ModelContract) -> list[Detections]:
    fewest = min(range(len(images)), key=lambda i: len(images[i].above(0.3)))
    return [d.above(1.0) if i == fewest else d for i, d in enumerate(images)]


FAULTS: dict[str, Fault] = {
    "scores x 0.9": _scores(lambda s: s * 0.9),
    "scores - 0.05": _scores(lambda s: np.maximum(s - 0.05, 0)),
    "boxes shifted by 2 px": _boxes(lambda b: b + 2),
    "boxes shifted by half a pixel": _boxes(lambda b: b + 0.5),
    "boxes shifted by 0.3 px": _boxes(lambda b: b + 0.3),
    "boxes 15 % narrower": _boxes(_resized(0.85, 1)),
    "boxes 5 % narrower": _boxes(_resized(0.95, 1)),
    "boxes of half size": _boxes(_resized(0.5, 0.5)),
    "all coordinates halved": _boxes(lambda b: b / 2),
    "all coordinates x 1.01": _boxes(lambda b: b * 1.01),
    "x and y swapped": _boxes(lambda b: b[:, [1, 0, 3, 2]]),
    "edges scattered by 3 px": _boxes(lambda b: b + np.random.default_rng(0).normal(0, 3, b.shape)),
    "all classes off by one": lambda images, contract: [
        Detections(d.boxes, d.scores, (d.labels + 1) % len(contract.class_names)) for d in images
    ],
    "the rarest class taken for another": _one_class,
    "one class shifted by 2 px": _one_class_moved,
    "large boxes shifted by 2 px": _large_moved,
    "the last fifth of each list cut off": _cut_off,
    "one image without detections": _empty,
    "none": lambda images, _: images,
}


def _outcome(
    sets: dict[str, list[Detections]],
    names: tuple[str, str, str],
    drawn: Sequence[int],
    fault: Fault,
    contract: ModelContract,
    precision: Precision,
) -> Outcome:
    """Of the engine ``names[1]``, with the baseline ``names[0]``; ``names[2]`` says what the baseline is."""
    baseline, engine, kind = names
    reference = [sets["reference"][i] for i in drawn]
    detected = fault([sets[engine][i] for i in drawn], contract)
    standard = GoldenStandard(
        gate=DEFAULT_GATES[precision],
        contract=contract,
        expected=reference,
        certified=None if kind == "reference" else [sets[baseline][i] for i in drawn],
        same_artifact=kind == "artifact",
        paths=[str(i) for i in drawn],
        scales=[1.0] * len(drawn),
    )
    return check_golden(standard, detected).outcome


def main() -> None:
    """Print the table: how many of the draws are found, and with a question mark how many are inconclusive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    images = [read_image(path) for path in list_images(DEMO_DATA / "evaluation")]
    models = {"reference": (DEMO_DATA / "fcos_bccd.safetensors", "pytorch")}
    models |= {path.name: (path, "onnxruntime") for path in sorted(options.bundle.glob("*.onnx"))}
    models |= {path.name: (path, "openvino") for path in sorted(options.bundle.glob("*.xml"))}
    sets: dict[str, list[Detections]] = {}
    for name, (path, backend) in models.items():
        with Detector.open(path, backend=backend, options=SessionOptions(threads=2)) as detector:
            sets[name] = [detector.detect(image) for image in images]
            contract = replace(detector.contract)
    int8, fp32 = ([n for n in sets if f".{p}." in n] for p in ("int8", "fp32"))
    cases = {
        "fp32, same artifact": [(a, a, "artifact") for a in fp32],
        "int8, same artifact": [(a, a, "artifact") for a in int8],
        "int8, other kernels": [(a, b, "artifact") for a in int8 for b in int8 if a != b],
        "int8, no baseline": [(a, a, "reference") for a in int8],
    }
    generator = np.random.default_rng(0)
    sizes = (2, 4, 8)
    print("| fault | " + " | ".join(f"{case}: {n}" for case in cases for n in sizes) + " |")
    print("|" + "---|" * (1 + len(cases) * len(sizes)))
    drawn = {n: [generator.choice(len(images), n, replace=False) for _ in range(options.draws)] for n in sizes}
    for label, fault in FAULTS.items():
        cells = []
        for case, triples in cases.items():
            precision = Precision.FP32 if case.startswith("fp32") else Precision.INT8
            for size in sizes:
                outcomes = [
                    _outcome(sets, triples[k % len(triples)], chosen, fault, contract, precision)
                    for k, chosen in enumerate(drawn[size])
                ]
                failed = sum(outcome is Outcome.FAILED for outcome in outcomes)
                undecided = sum(outcome is Outcome.INCONCLUSIVE for outcome in outcomes)
                cells.append(f"{failed}" + (f" ({undecided}?)" if undecided else ""))
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
