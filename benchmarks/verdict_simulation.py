"""How often a verdict is wrong, and what AP intervals cover: ``python benchmarks/verdict_simulation.py``.

A population of made-up images stands for the world. Its detections imitate a detector: some images are hard, a tenth
has no object, a twentieth no detection, one class is rare. A candidate is the same detector with damage of one kind,
drawn anew in each of eight copies of the population. The true AP and drop are those of the whole population; a trial
draws n of its images, and judges as ``fcos-deploy evaluate`` does.

False pass: the upper end of the drop's interval lies below the true drop, so that a limit just below the truth passes.
Undecided: the share of trials that are inconclusive when the true drop is a given distance within the limit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.accuracy.intervals import (
    ApInterval,
    ClassMatches,
    ap_interval,
    match_dataset,
    paired_ap_drop,
    sample_ap,
    weighted_ap,
)
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.gate import Outcome, interval_outcome

IMAGES, COPIES = 300, 8
CLASSES, CLASS_SHARES = ("common", "usual", "rare"), (0.7, 0.2, 0.1)
MARGINS = (0.005, 0.01, 0.02)

Random = np.random.Generator


def found_objects(random: Random) -> tuple[GroundTruth, Detections]:
    """One image: its objects, and what the reference detects."""
    count = 0 if random.random() < 0.1 else int(random.integers(1, 12))
    classes = random.choice(3, count, p=CLASS_SHARES).astype(np.int64)
    size, corner = random.uniform(20, 120, (count, 2)), random.uniform(0, 500, (count, 2))
    boxes = np.concatenate([corner, corner + size], 1)
    truth = GroundTruth(boxes, classes, size.prod(1), np.zeros(count, np.bool_))
    if random.random() < 0.05:
        return truth, detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    hard = random.beta(2, 5)
    found = random.random(count) > 0.6 * hard
    quality = random.beta(3, 1.2, count) * (1 - 0.5 * hard)
    moved = boxes + random.normal(0, 1, (count, 4)) * (0.02 + 0.16 * (1 - quality))[:, None] * np.tile(size, 2)
    scores = np.clip(0.15 + 0.8 * quality + random.normal(0, 0.07, count), 0.05, 0.99)
    extra = int(random.poisson(2.5 * hard + 0.3))
    wrong_size, wrong_corner = random.uniform(20, 120, (extra, 2)), random.uniform(0, 500, (extra, 2))
    return truth, detections(
        np.concatenate([moved[found], np.concatenate([wrong_corner, wrong_corner + wrong_size], 1)]),
        np.concatenate([scores[found], random.beta(1.5, 4, extra)]),
        np.concatenate([classes[found], random.choice(3, extra)]),
    )


def detections(boxes: NDArray[np.floating], scores: NDArray[np.floating], labels: NDArray[np.integer]) -> Detections:
    """Sorted, best score first."""
    order = np.argsort(-scores, kind="stable")
    return Detections(boxes[order].astype(np.float32), scores[order].astype(np.float32), labels[order].astype(np.int64))


def noise(whole: Detections, random: Random) -> Detections:
    """INT8 rounding: every score moves by 0.04, every edge by 0.8 % of the box."""
    size = np.tile(whole.boxes[:, 2:] - whole.boxes[:, :2], 2)
    boxes = whole.boxes + random.normal(0, 0.008, whole.boxes.shape) * size
    scores = np.clip(whole.scores + random.normal(0, 0.04, len(whole)), 0.01, 0.99)
    return detections(boxes, scores, whole.labels)


def lost(whole: Detections, random: Random) -> Detections:
    """One detection in fifty is gone."""
    keep = random.random(len(whole)) > 0.02
    return detections(whole.boxes[keep], whole.scores[keep], whole.labels[keep])


def lost_rare(whole: Detections, random: Random) -> Detections:
    """One detection in ten of the rare class is gone."""
    keep = (whole.labels != 2) | (random.random(len(whole)) > 0.1)
    return detections(whole.boxes[keep], whole.scores[keep], whole.labels[keep])


def bad_images(whole: Detections, random: Random) -> Detections:
    """One image in ten loses 40 % of its detections."""
    keep = (random.random(len(whole)) > 0.4) | (random.random() > 0.1)
    return detections(whole.boxes[keep], whole.scores[keep], whole.labels[keep])


DAMAGES: tuple[Callable[[Detections, Random], Detections], ...] = (noise, lost, lost_rare, bad_images)


def population(damage: Callable[[Detections, Random], Detections]) -> tuple[list[ClassMatches], list[ClassMatches]]:
    """The reference and the candidate, matched with the objects of all images."""
    truth, reference, candidate = {}, {}, {}
    for copy in range(COPIES):
        random, damaging = np.random.default_rng(0), np.random.default_rng(100 + copy)
        for number in range(copy * IMAGES, (copy + 1) * IMAGES):
            truth[number], reference[number] = found_objects(random)
            candidate[number] = damage(reference[number], damaging)
    images = tuple(EvaluationImage(number, Path(f"{number}.jpg")) for number in truth)
    dataset = Dataset(images, truth, CLASSES, "simulation")
    return match_dataset(dataset, reference), match_dataset(dataset, candidate)


def drawn(matches: list[ClassMatches], chosen: NDArray[np.int64]) -> list[ClassMatches]:
    """The matches of these images, (n,) positions in ascending order; one that is drawn twice counts as two."""
    images = len(matches[0].positives)
    counts, first = np.bincount(chosen, minlength=images), np.searchsorted(chosen, np.arange(images))
    result = []
    for match in matches:
        repeats = counts[match.image]
        source = np.repeat(np.arange(len(match.image)), repeats)
        nth = np.arange(len(source)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        result.append(
            ClassMatches(
                first[match.image[source]] + nth,
                match.scores[source],
                match.correct[:, source],
                match.ignored[:, source],
                match.positives[chosen],
            )
        )
    return result


def true_ap(matches: list[ClassMatches]) -> float:
    """Of the whole population."""
    return float(weighted_ap(matches, np.ones((1, len(matches[0].positives)), np.float32))[0])


def trials(
    reference: list[ClassMatches], candidate: list[ClassMatches], *, images: int, count: int, resamples: int
) -> tuple[list[ApInterval], list[ApInterval]]:
    """Intervals of the reference's AP and of the drop, one of each for every trial."""
    random = np.random.default_rng(images)
    aps, drops = [], []
    for number in range(count):
        chosen = np.sort(random.integers(0, len(reference[0].positives), images))
        before, after = (
            sample_ap(drawn(matches, chosen), resamples=resamples, seed=number) for matches in (reference, candidate)
        )
        aps.append(ap_interval(before))
        drops.append(paired_ap_drop(before, after))
    return aps, drops


def undecided(drops: list[ApInterval], *, limit: float) -> float:
    """Share of inconclusive verdicts."""
    outcomes = [interval_outcome(drop.low, drop.high, at_most=limit) for drop in drops]
    return sum(outcome is Outcome.INCONCLUSIVE for outcome in outcomes) / len(outcomes)


def main() -> None:
    """Print a line for each kind of damage and number of images, as rows of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[40, 100, 500, 5000])
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--damage", nargs="+", default=[damage.__name__ for damage in DAMAGES])
    options = parser.parse_args()
    margins = " | ".join(f"undecided, {margin} within" for margin in MARGINS)
    print(f"| damage | true drop | images | trials | false pass | false fail | {margins} | AP covered | AP too high |")
    print("|---" * (9 + len(MARGINS)) + "|")
    for damage in (damage for damage in DAMAGES if damage.__name__ in options.damage):
        reference, candidate = population(damage)
        ap = true_ap(reference)
        drop = ap - true_ap(candidate)
        for images in options.images:
            aps, drops = trials(reference, candidate, images=images, count=options.trials, resamples=options.resamples)
            figures = (
                np.mean([interval.high < drop for interval in drops]),
                np.mean([interval.low > drop for interval in drops]),
                *(undecided(drops, limit=drop + margin) for margin in MARGINS),
                np.mean([interval.low <= ap <= interval.high for interval in aps]),
                np.mean([interval.low > ap for interval in aps]),
            )
            cells = " | ".join(f"{figure:.1%}" for figure in figures)
            print(f"| {damage.__name__} | {drop:.4f} | {images} | {options.trials} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
