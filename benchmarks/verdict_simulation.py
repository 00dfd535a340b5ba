"""How often a verdict is wrong, and what AP intervals cover: ``python benchmarks/verdict_simulation.py``.

A population of made-up images stands for the world. Its detections imitate a detector: some images are hard, a tenth
has no object, a twentieth no detection, one class is rare. A candidate is the same detector with damage of one kind.
The true AP and drop are those of the whole population; a trial draws n of its images, and judges as ``fcos-deploy
evaluate`` does.

False pass: the upper end of the drop's interval lies below the true drop, so that a limit just below the truth passes.
Undecided: the share of trials that are inconclusive when the true drop is a given distance within the limit.

``--recall`` does the same for the drop of recall, at thresholds that are given: best F1 of the reference in the whole
population, and those that let as many detections of the candidate pass.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import (
    ApInterval,
    ApSamples,
    ClassMatches,
    ap_interval,
    match_dataset,
    paired_ap_drop,
    sample_ap,
    weighted_ap,
)
from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.accuracy.operating_point import (
    OperatingCounts,
    OperatingGoal,
    chosen_thresholds,
    equivalent_thresholds,
    operating_counts,
    operating_drops,
)
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.gate import Outcome, interval_outcome

CLASSES, CLASS_SHARES, RARE = ("common", "usual", "rare"), (0.7, 0.2, 0.1), 2
MARGINS = (0.005, 0.01, 0.02)
# Images from which on resamples are first those of the linearised AP: exact ones of every trial would take hours. An
# interval with an end so near the truth that exact resamples may move it across is computed again with those.
LINEAR_FROM = 5000
NEAR = 0.15  # of the interval's reach to that side; exact reaches are 0.95 times linear ones or more (``linear_error``)

Random = np.random.Generator
Damage = Callable[[Detections, Random], Detections]


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


def lost_rare(share: float) -> Damage:
    """A share of the detections of the rare class is gone."""

    def damage(whole: Detections, random: Random) -> Detections:
        keep = (whole.labels != RARE) | (random.random(len(whole)) > share)
        return detections(whole.boxes[keep], whole.scores[keep], whole.labels[keep])

    return damage


def bad_images(whole: Detections, random: Random) -> Detections:
    """One image in ten loses 40 % of its detections."""
    keep = (random.random(len(whole)) > 0.4) | (random.random() > 0.1)
    return detections(whole.boxes[keep], whole.scores[keep], whole.labels[keep])


def damages(images: int) -> dict[str, Damage]:
    """By name; the last is so small that in one data set of 55 (e ** -4) there is nothing of it to see."""
    found_rare = 0.41 * images  # by ``found_objects``
    return {
        "noise": noise,
        "one in 50 lost": lost,
        "one in 10 of the rare class lost": lost_rare(0.1),
        "one image in 10 loses 40 %": bad_images,
        "4 of the rare class lost": lost_rare(4 / found_rare),
    }


@dataclass(frozen=True)
class World:
    """The population, and what the reference detects in it."""

    dataset: Dataset
    detected: Mapping[int, Detections]

    @staticmethod
    def of(images: int) -> World:
        """So many images."""
        random = np.random.default_rng(0)
        made = {number: found_objects(random) for number in range(images)}
        names = tuple(EvaluationImage(number, Path(f"{number}.jpg")) for number in made)
        truth = {number: objects for number, (objects, _) in made.items()}
        return World(Dataset(names, truth, CLASSES, "simulation"), {n: detected for n, (_, detected) in made.items()})

    def matches(self, damage: Damage | None = None) -> list[ClassMatches]:
        """Of the reference, or of the candidate with this damage."""
        random = np.random.default_rng(1)
        found = {n: damage(whole, random) for n, whole in self.detected.items()} if damage else self.detected
        return match_dataset(self.dataset, found)


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


def ap_slopes(matches: Sequence[ClassMatches]) -> NDArray[np.float64]:
    """(images,) by how much AP grows when an image counts a little more.

    AP of a class is the sum of P * (R - R') over the steps of the precision envelope, with precision P = H / S, recall
    R = H / N, H right ones of S detections up to the step, N objects. The slopes are this sum's derivatives; where the
    steps lie does not change to first order, since each is a maximum.
    """
    slopes = np.zeros(len(matches[0].positives))
    for match in matches:
        for right in match.correct:
            objects, position = match.positives.sum(), np.flatnonzero(right)
            hits, seen = np.arange(1, len(position) + 1), position + 1
            envelope = np.maximum.accumulate((hits / seen)[::-1])[::-1]
            step = np.flatnonzero(np.append(envelope[1:] < envelope[:-1], True)) if len(position) else position
            height, reached = (hits / seen)[step], hits[step]
            ap = float((height * np.diff(reached, prepend=0)).sum()) / objects
            # By H and S of each step, then summed over the steps that a detection lies in or before.
            by_right = np.diff(reached, prepend=0) / seen[step] + height - np.append(height[1:], 0.0)
            by_seen = -np.diff(reached, prepend=0) * height / seen[step]
            place = np.searchsorted(position[step], np.arange(len(right)))
            after = [np.append(np.cumsum(part[::-1])[::-1], 0.0)[place] for part in (by_right, by_seen)]
            slopes += np.bincount(match.image, right * after[0] + after[1], len(slopes)) / objects
            slopes -= ap * match.positives / objects
    slopes /= len(matches) * len(matches[0].correct)
    return slopes


@functools.lru_cache(maxsize=1)
def resampled_counts(images: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples, images): how much more often than once each image is drawn, as ``sample_ap`` draws."""
    counts = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    more: NDArray[np.float64] = counts.astype(np.float64) - 1.0
    return more


def linear_samples(matches: list[ClassMatches], *, resamples: int, seed: int) -> ApSamples:
    """As ``sample_ap``, with the AP of the resamples from the slopes of AP."""
    samples, images = sample_ap(matches, resamples=1, seed=seed), len(matches[0].positives)
    values = samples.values[0] + resampled_counts(images, resamples, seed) @ ap_slopes(matches)
    return replace(samples, values=np.concatenate([samples.values[:1], values]))


def true_ap(matches: list[ClassMatches]) -> float:
    """Of the whole population."""
    return float(weighted_ap(matches, np.ones((1, len(matches[0].positives)), np.float32))[0])


@dataclass(frozen=True)
class Trials:
    """Intervals of the reference's AP, and of the drop of each candidate, one for every trial."""

    aps: list[ApInterval]
    drops: list[list[ApInterval]]


def run_trials(runs: list[list[ClassMatches]], *, images: int, count: int, resamples: int) -> Trials:
    """runs: the matches of the reference and of the candidates."""
    random = np.random.default_rng(images)
    truth = [true_ap(matches) for matches in runs]
    trials = Trials([], [[] for _ in runs[1:]])
    for seed in range(count):
        chosen = np.sort(random.integers(0, len(runs[0][0].positives), images))
        matches = [drawn(of_run, chosen) for of_run in runs]
        exact = functools.cache(lambda run, m=matches, s=seed: sample_ap(m[run], resamples=resamples, seed=s))
        sample: Callable[[int], ApSamples] = exact
        if images >= LINEAR_FROM:
            sample = functools.cache(lambda run, m=matches, s=seed: linear_samples(m[run], resamples=resamples, seed=s))
        interval = ap_interval(sample(0))
        trials.aps.append(ap_interval(exact(0)) if is_near(interval, truth[0]) else interval)
        for run, drops in enumerate(trials.drops, 1):
            drop = paired_ap_drop(sample(0), sample(run))
            near = is_near(drop, truth[0] - truth[run])
            drops.append(paired_ap_drop(exact(0), exact(run)) if near else drop)
    return trials


def is_near(interval: ApInterval, truth: float) -> bool:
    """Whether exact resamples may decide otherwise: an end is beyond the truth, or within NEAR of its reach before."""
    low, high = interval.value - interval.low, interval.high - interval.value
    return interval.low > truth - NEAR * low or interval.high < truth + NEAR * high


def binomial_bounds(successes: int, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's exact 95 % interval of a share: which shares make so many, or so few, 2.5 % likely."""

    def at_most(count: int, share: float) -> float:
        ranks = np.arange(1, trials + 1)
        ways = np.concatenate([[0.0], np.cumsum(np.log((trials - ranks + 1) / ranks))])[: count + 1]
        counts = np.arange(count + 1)
        return float(np.exp(ways + counts * np.log(share) + (trials - counts) * np.log1p(-share)).sum())

    def solve(too_small: Callable[[float], bool]) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if too_small(middle) else (low, middle)
        return (low + high) / 2

    low = solve(lambda share: 1 - at_most(successes - 1, share) < 0.025) if successes else 0.0
    high = solve(lambda share: at_most(successes, share) > 0.025) if successes < trials else 1.0
    return low, high


def bounded(cases: Sequence[bool]) -> str:
    """A share with its exact interval."""
    low, high = binomial_bounds(sum(cases), len(cases))
    return f"{np.mean(cases):.1%} ({low:.1%} to {high:.1%})"


def undecided(drops: Sequence[ApInterval], *, limit: float) -> float:
    """Share of inconclusive verdicts."""
    outcomes = [interval_outcome(drop.low, drop.high, at_most=limit) for drop in drops]
    return sum(outcome is Outcome.INCONCLUSIVE for outcome in outcomes) / len(outcomes)


def linear_error(runs: list[list[ClassMatches]], *, images: int, resamples: int) -> tuple[float, float]:
    """By how much linearised resamples change the width of the intervals of one trial: smallest and largest ratio."""
    chosen = np.sort(np.random.default_rng(0).integers(0, len(runs[0][0].positives), images))
    widths = []
    for sample in (sample_ap, linear_samples):
        before, *after = (sample(drawn(matches, chosen), resamples=resamples, seed=0) for matches in runs)
        intervals = [ap_interval(before), *(paired_ap_drop(before, samples) for samples in after)]
        widths.append(np.array([interval.high - interval.low for interval in intervals]))
    ratios = widths[1] / widths[0]
    return float(ratios.min()), float(ratios.max())


def recall_trials(
    runs: list[OperatingCounts], *, images: int, count: int, resamples: int
) -> tuple[list[float], list[list[ApInterval]]]:
    """The true drop of recall of each candidate, and its intervals in the trials; runs: the reference, candidates."""

    def drop(reference: OperatingCounts, candidate: OperatingCounts, *, resamples: int, seed: int = 0) -> ApInterval:
        recall = operating_drops(reference, candidate, resamples=resamples, seed=seed, same_outputs=False)[1]
        assert recall is not None  # every class has objects
        return recall.drop

    random, (reference, *candidates) = np.random.default_rng(images), runs
    truth = [drop(reference, candidate, resamples=0).value for candidate in candidates]
    drops: list[list[ApInterval]] = [[] for _ in candidates]
    for seed in range(count):
        chosen = np.sort(random.integers(0, reference.objects.shape[1], images))
        before, *after = (
            replace(run, right=run.right[:, chosen], kept=run.kept[:, chosen], objects=run.objects[:, chosen])
            for run in runs
        )
        for intervals, candidate in zip(drops, after, strict=True):
            intervals.append(drop(before, candidate, resamples=resamples, seed=seed))
    return truth, drops


def recall_table(world: World, *, images: Sequence[int], trials: Sequence[int], resamples: int) -> None:
    """Print the rows about recall."""
    matches = world.matches()
    reference = operating_counts(matches, chosen_thresholds(matches, goal=OperatingGoal()))
    for size, count in zip(images, trials, strict=True):
        runs = [reference]
        for damage in damages(size).values():
            candidate = world.matches(damage)
            runs.append(operating_counts(candidate, equivalent_thresholds(reference, candidate)))
        truth, drops = recall_trials(runs, images=size, count=count, resamples=resamples)
        for name, drop, intervals in zip(damages(size), truth, drops, strict=True):
            print_verdicts(f"| {size} | {count} | {name}", drop, intervals)


def print_verdicts(start: str, drop: float, intervals: Sequence[ApInterval]) -> None:
    """Print a row: the true drop, how often a verdict is wrong, and how often there is none."""
    wrong = [bounded([i.high < drop for i in intervals]), bounded([i.low > drop for i in intervals])]
    shares = [f"{undecided(intervals, limit=drop + margin):.0%}" for margin in MARGINS]
    print(f"{start} | {drop:.4f} | " + " | ".join([*wrong, *shares]) + " |", flush=True)


def main() -> None:
    """Print a line for each number of images and kind of damage, as rows of two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[40, 100, 500, 5000])
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 1000, 1000, 2000], help="for each of --images")
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--recall", action="store_true", help="the drop of recall at score thresholds in place of AP's")
    parser.add_argument("--population", type=int, default=5000)
    options = parser.parse_args()
    world = World.of(options.population)
    reference = world.matches()
    known: dict[str, list[ClassMatches]] = {}
    margins = " | ".join(f"undecided, {margin} within" for margin in MARGINS)
    print(f"| images | trials | damage | true drop | false pass | false fail | {margins} |")
    print("|---" * (6 + len(MARGINS)) + "|")
    if options.recall:
        recall_table(world, images=options.images, trials=options.trials, resamples=options.resamples)
        return
    coverage = []
    for images, count in zip(options.images, options.trials, strict=True):
        cases = damages(images)
        known |= {name: world.matches(damage) for name, damage in cases.items() if name not in known or "4 of" in name}
        candidates = [known[name] for name in cases]
        trials = run_trials([reference, *candidates], images=images, count=count, resamples=options.resamples)
        ap = true_ap(reference)
        for name, candidate, drops in zip(cases, candidates, trials.drops, strict=True):
            drop = ap - true_ap(candidate)
            print_verdicts(f"| {images} | {count} | {name}", drop, drops)
        inside = bounded([interval.low <= ap <= interval.high for interval in trials.aps])
        above, below = (
            np.mean([interval.low > ap for interval in trials.aps]),
            np.mean([interval.high < ap for interval in trials.aps]),
        )
        method = "exact"
        if images >= LINEAR_FROM:
            low, high = linear_error([reference, *candidates], images=images, resamples=options.resamples)
            method = f"linearised where far from the truth, {low:.2f} to {high:.2f} times as wide"
        coverage.append(f"| {images} | {count} | {inside} | {above:.1%} | {below:.1%} | {method} |")
    print("\n| images | trials | AP covered | interval too high | too low | resamples |")
    print("|---|---|---|---|---|---|")
    print("\n".join(coverage))


if __name__ == "__main__":
    main()
