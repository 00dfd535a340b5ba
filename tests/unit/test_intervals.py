"""The bootstrap interval, against the evaluator itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.accuracy.coco import (
    ApInterval,
    ApSamples,
    ap_interval,
    coco_scores,
    match_dataset,
    paired_ap_drop,
    sample_ap,
    weighted_ap,
    widened_for_selection,
)
from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError


def random_data(seed: int, *, images: int, noise: float, decimals: int = 2) -> tuple[Dataset, dict[int, Detections]]:
    """Objects of three classes, some in crowds, and noisy detections of them with false ones between."""
    rng = np.random.default_rng(seed)
    ground_truths, found = {}, {}
    for number in range(1, images + 1):
        count = int(rng.integers(0, 12))
        corner, size = rng.uniform(0, 400, (count, 2)), rng.uniform(8, 150, (count, 2))
        boxes = np.concatenate([corner, corner + size], 1)
        classes = rng.integers(0, 3, count)
        ground_truths[number] = GroundTruth(boxes, classes, size.prod(1), rng.uniform(size=count) < 0.1)
        found[number] = noisy(
            ground_truths[number], np.random.default_rng([seed, number, int(1000 * noise)]), noise, decimals
        )
    names = tuple(EvaluationImage(n, Path(f"{n}.png")) for n in ground_truths)
    return Dataset(names, ground_truths, ("a", "b", "c"), "test"), found


def noisy(ground_truth: GroundTruth, rng: np.random.Generator, noise: float, decimals: int) -> Detections:
    count = len(ground_truth.boxes)
    near = ground_truth.boxes + rng.normal(0, noise, (count, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 12)
    false = rng.uniform(0, 400, (5, 2))
    boxes = np.concatenate([near, near + rng.normal(0, 3, near.shape), np.concatenate([false, false + 40], 1)])
    labels = np.concatenate([ground_truth.classes, ground_truth.classes, rng.integers(0, 3, 5)])
    # With two decimals equal scores occur, within an image and between images.
    scores = np.round(rng.uniform(0.05, 1, len(boxes)), decimals)
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), labels.astype(np.int64))


@pytest.mark.parametrize("seed", range(5))
def test_unweighted_ap_is_the_evaluators(seed: int) -> None:
    data, found = random_data(seed, images=25, noise=4.0)
    ap = weighted_ap(match_dataset(data, found), np.ones((1, 25), np.float32))[0]
    assert ap == pytest.approx(coco_scores(data, found).ap, abs=1e-9)


def resampled(data: Dataset, found: dict[int, Detections], counts: np.ndarray) -> float:
    """AP of a data set in which image i really occurs counts[i] times."""
    images, ground_truths, copies = [], {}, {}
    for image, count in zip(data.images, counts, strict=True):
        for _ in range(int(count)):
            number = len(images) + 1
            images.append(EvaluationImage(number, image.path))
            ground_truths[number], copies[number] = data.ground_truth[image.image_id], found[image.image_id]
    ap = coco_scores(Dataset(tuple(images), ground_truths, data.class_names, "resampled"), copies).ap
    assert ap is not None
    return ap


def test_a_resample_equals_evaluating_the_resampled_images() -> None:
    data, found = random_data(11, images=20, noise=4.0, decimals=7)
    counts = np.random.default_rng(0).multinomial(20, np.full(20, 0.05), size=12)
    quick = weighted_ap(match_dataset(data, found), counts.astype(np.float32))
    direct = [resampled(data, found, row) for row in counts]
    np.testing.assert_allclose(quick, direct, atol=1e-6)


def test_the_same_run_drops_by_exactly_nothing() -> None:
    data, found = random_data(3, images=20, noise=4.0)
    samples = sample_ap(match_dataset(data, found), resamples=50)
    drop = paired_ap_drop(samples, samples, same_outputs=True)
    assert (drop.value, drop.low, drop.high) == (0.0, 0.0, 0.0)


def test_objects_that_chance_may_have_spared_are_allowed_for() -> None:
    """A perfect detector of two classes, with 8 and 2 objects: one object carries 1/16 and 1/4 of its AP of 1."""
    one = np.array([[0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 60.0, 60.0]])
    classes = [np.array([0, 0]), np.array([0, 1])]
    images = tuple(EvaluationImage(number, Path(f"{number}.png")) for number in range(6))
    chosen = [classes[0]] * 3 + [classes[1]] * 2 + [np.zeros(0, np.int64)]
    truth = {
        n: GroundTruth(one[: len(c)], c, np.full(len(c), 400.0), np.zeros(len(c), np.bool_))
        for n, c in enumerate(chosen)
    }
    found = {
        n: Detections(t.boxes.astype(np.float32), np.full(len(t.classes), 0.9, np.float32), t.classes.astype(np.int64))
        for n, t in truth.items()
    }
    samples = sample_ap(match_dataset(Dataset(images, truth, ("a", "b"), "test"), found), resamples=50)
    assert samples.object_share.tolist() == [1 / 16, 1 / 4]
    drop = paired_ap_drop(samples, samples)
    assert (drop.low, drop.value) == (0.0, 0.0)
    assert drop.high == pytest.approx(np.log(40) / 4), "nothing is seen of 3.69 lost objects once in 40 times"


@pytest.mark.parametrize(("choices", "low", "high"), [(1, 1.0, 1.0), (2, 1.144, 1.188), (16, 1.507, 1.752)])
def test_a_choice_among_candidates_widens_the_interval(choices: int, low: float, high: float) -> None:
    """Normal quantiles at 0.025 / choices to the low side, the logarithm for what is not seen to the high side."""
    interval = ApInterval(value=1.0, low=0.0, high=2.0, standard_error=0.5, confidence=0.95, resamples=1000, images=100)
    widened = widened_for_selection(interval, choices)
    assert (1 - widened.low, widened.high - 1) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_few_images_widen_the_interval_as_students_t_does() -> None:
    """Ten means of normal numbers, resampled: t with 9 degrees is 2.262 standard errors, the percentiles' 1.96."""
    sample = np.random.default_rng(3).normal(0.5, 0.1, 10)
    drawn = np.random.default_rng(4).choice(sample, (20000, 10)).mean(1)
    values = np.concatenate([[sample.mean()], drawn])
    interval = ap_interval(ApSamples(values, np.ones((1, 10), np.int64), 0, np.zeros(1)))
    error = sample.std(ddof=1) / np.sqrt(10)
    for reach in (interval.value - interval.low, interval.high - interval.value):
        assert 2.1 * error < reach < 2.6 * error


def test_pairing_makes_the_interval_narrower() -> None:
    data, good = random_data(3, images=40, noise=2.0)
    _, worse = random_data(3, images=40, noise=2.4)
    a, b = (sample_ap(match_dataset(data, found), resamples=300) for found in (good, worse))
    drop = paired_ap_drop(a, b)
    alone = ap_interval(a).standard_error, ap_interval(b).standard_error
    assert drop.low < drop.value < drop.high
    assert drop.standard_error < np.hypot(*alone)
    assert drop.value == pytest.approx(coco_scores(data, good).ap - coco_scores(data, worse).ap, abs=1e-9)


def test_interval_is_repeatable_and_named() -> None:
    data, found = random_data(3, images=10, noise=2.0)
    matches = match_dataset(data, found)
    first, second = (ap_interval(sample_ap(matches, resamples=40, seed=7)) for _ in range(2))
    assert first == second
    assert (first.resamples, first.confidence, first.images) == (40, 0.95, 10)


def test_other_annotations_cannot_be_paired() -> None:
    data, found = random_data(3, images=10, noise=2.0)
    other, other_found = random_data(4, images=10, noise=2.0)
    first = sample_ap(match_dataset(data, found), resamples=5)
    with pytest.raises(ConfigError, match="same images"):
        paired_ap_drop(first, sample_ap(match_dataset(other, other_found), resamples=5))
    with pytest.raises(ConfigError, match="resampled alike"):
        paired_ap_drop(first, sample_ap(match_dataset(data, found), resamples=5, seed=1))


def test_no_objects_have_no_ap() -> None:
    data, found = random_data(3, images=2, noise=2.0)
    empty = GroundTruth(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.bool_))
    blank = Dataset(data.images, {1: empty, 2: empty}, data.class_names, "blank")
    with pytest.raises(ConfigError, match="at least one annotated object"):
        ap_interval(sample_ap(match_dataset(blank, found), resamples=5))
