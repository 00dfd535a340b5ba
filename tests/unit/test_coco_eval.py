"""AP by COCO's protocol, how sure a difference of it is, and the operating point."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcos_deploy.accuracy.coco import (
    ApInterval,
    ApSamples,
    ClassMatches,
    ap_interval,
    coco_scores,
    match_dataset,
    paired_ap_drop,
    sample_ap,
    weighted_ap,
    widened_for_selection,
)
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    GroundTruth,
    folder_images,
    ground_truth_from_detections,
    label_index,
    load_coco,
)
from fcos_deploy.accuracy.evaluate import evidence_problem
from fcos_deploy.accuracy.gate import judge_operating_drop
from fcos_deploy.accuracy.operating_point import (
    OperatingCounts,
    OperatingDrop,
    OperatingGoal,
    OperatingPoint,
    Thresholds,
    carried_thresholds,
    chosen_thresholds,
    equivalent_thresholds,
    operating_counts,
    operating_drops,
    operating_points,
    operating_problem,
    operating_rows,
)
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError, ImageError
from fcos_deploy.core.gate import Gate, Judge


def detections(rows: list[tuple[list[float], float, int]]) -> Detections:
    return Detections(
        np.array([r[0] for r in rows], np.float32).reshape(-1, 4),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows], np.int64),
    )


def ground_truth(rows: list[tuple[list[float], int]], crowd: tuple[bool, ...] = ()) -> GroundTruth:
    boxes = np.array([r[0] for r in rows], np.float64).reshape(-1, 4)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return GroundTruth(
        boxes, np.array([r[1] for r in rows], np.int64), areas, np.array(crowd or [False] * len(rows), np.bool_)
    )


def dataset(ground_truths: list[GroundTruth], names: tuple[str, ...] = ("a", "b")) -> Dataset:
    images = tuple(EvaluationImage(i + 1, Path(f"{i}.png")) for i in range(len(ground_truths)))
    return Dataset(images, {i + 1: t for i, t in enumerate(ground_truths)}, names, "test")


def test_perfect_detections_have_ap_1_and_absent_sizes_have_none() -> None:
    boxes = [([0.0, 0.0, 20.0, 20.0], 0), ([30.0, 30.0, 90.0, 90.0], 1)]
    found = detections([(box, 0.9, label) for box, label in boxes])
    scores = coco_scores(dataset([ground_truth(boxes)]), {1: found})
    assert scores.ap == scores.ap50 == scores.ap75 == scores.ar == 1.0
    assert scores.ap_small == scores.ap_medium == 1.0
    assert scores.ap_large is None
    assert (scores.images, scores.objects) == (1, 2)
    assert [c.name for c in scores.per_class] == ["a", "b"]


def test_ap_of_a_case_worked_out_by_hand() -> None:
    """IoU 0.65 counts at 0.50, 0.55, 0.60 and 0.65 of the ten thresholds; the false detection ranks above it.

    Precision is then 1/2 at every recall, so that AP = 4 / 10 * 1/2.
    """
    wanted = ground_truth([([0.0, 0.0, 100.0, 100.0], 0)])
    found = detections([([500, 500, 600, 600], 0.9, 0), ([0, 0, 65, 100], 0.8, 0)])
    scores = coco_scores(dataset([wanted], ("a",)), {1: found})
    assert scores.ap == pytest.approx(0.2)
    assert scores.ap50 == pytest.approx(0.5)
    assert scores.ap75 == 0.0
    assert scores.ar == pytest.approx(0.4)


def test_nothing_found_is_ap_0() -> None:
    scores = coco_scores(dataset([ground_truth([([0, 0, 50, 50], 0)])]), {1: detections([])})
    assert scores.ap == 0.0
    assert scores.per_class[1].ap is None


def test_labels_that_the_data_lacks_are_left_out() -> None:
    found = detections([([0, 0, 50, 50], 0.9, -1), ([0, 0, 50, 50], 0.8, 0)])
    assert coco_scores(dataset([ground_truth([([0, 0, 50, 50], 0)])]), {1: found}).ap == 1.0


def test_evaluator_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    coco_scores(dataset([ground_truth([([0, 0, 50, 50], 0)])]), {1: detections([])})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def coco_file(folder: Path, **changes: object) -> Path:
    content: dict[str, object] = {
        "images": [{"id": 4, "file_name": "x.png"}, {"id": 2, "file_name": "y.png"}],
        "annotations": [{"image_id": 4, "category_id": 9, "bbox": [1, 2, 3, 4], "iscrowd": 1}],
        "categories": [{"id": 9, "name": "cell"}, {"id": 3, "name": "dust"}],
    }
    content.update(changes)
    for name in ("x.png", "y.png"):
        Image.new("RGB", (10, 10)).save(folder / name)
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_reads_annotations(tmp_path: Path) -> None:
    data = load_coco(coco_file(tmp_path), images=tmp_path)
    assert [i.image_id for i in data.images] == [2, 4]
    assert data.class_names == ("dust", "cell")
    assert data.ground_truth[4].boxes.tolist() == [[1.0, 2.0, 4.0, 6.0]]
    assert data.ground_truth[4].classes.tolist() == [1]
    assert data.ground_truth[4].areas.tolist() == [12.0]
    assert data.ground_truth[4].crowd.tolist() == [True]
    assert not len(data.ground_truth[2].boxes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "has no images|unknown"),
        ({"categories": []}, "at least one"),
        ({"annotations": [{"image_id": 4, "category_id": 9}]}, "bbox"),
        ({"annotations": [{"image_id": 77, "category_id": 9, "bbox": [0, 0, 1, 1]}]}, "77"),
        ({"images": [{"id": 4, "file_name": "gone.png"}], "annotations": []}, "gone.png"),
        ({"images": [{"id": 4, "file_name": "x.png"}] * 2}, "same id"),
    ],
)
def test_bad_annotations_are_explained(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    if changes == {"images": []}:
        changes = {"images": [], "annotations": []}
    path = coco_file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_coco(path, images=tmp_path)


def test_a_text_file_is_not_annotations(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("hello")
    with pytest.raises(ConfigError, match="Cannot read the annotations"):
        load_coco(tmp_path / "a.json", images=tmp_path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        load_coco(tmp_path / "a.json", images=tmp_path)


def test_classes_are_matched_by_name() -> None:
    data = dataset([ground_truth([([0, 0, 5, 5], 1)])], ("wbc", "RBC"))
    assert label_index(("__background__", "rbc", "WBC"), data).tolist() == [-1, 1, 0]


def test_a_class_that_the_model_lacks_is_an_error() -> None:
    data = dataset([ground_truth([([0, 0, 5, 5], 1)])], ("wbc", "rbc"))
    with pytest.raises(ConfigError, match="'rbc', which the model does not know: its classes are 'wbc'"):
        label_index(("wbc",), data)


def test_folder_is_sorted_and_must_have_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.PNG", "sub/c.jpeg", "notes.txt"):
        (tmp_path / name).touch()
    assert [(i.image_id, i.path.name) for i in folder_images(tmp_path)] == [(1, "a.PNG"), (2, "b.jpg"), (3, "c.jpeg")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no images"):
        folder_images(tmp_path / "empty")
    with pytest.raises(ImageError, match="not a folder"):
        folder_images(tmp_path / "gone")


def test_a_reference_agrees_with_itself() -> None:
    found = {1: detections([([0, 0, 50, 50], 0.9, 0), ([9, 9, 70, 60], 0.1, 1)])}
    images = (EvaluationImage(1, Path("1.png")),)
    data = ground_truth_from_detections(images, found, class_names=("a", "b"), min_score=0.3, source="reference")
    assert data.ground_truth[1].classes.tolist() == [0]
    assert coco_scores(data, found).ap == 1.0
    none = ground_truth_from_detections(images, found, class_names=("a", "b"), min_score=0.95, source="reference")
    assert coco_scores(none, found).ap is None
    assert "finds no object" in evidence_problem(none, judge=Judge.POINT)


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


def test_an_interval_of_an_ap_stays_between_0_and_1() -> None:
    for value in (0.02, 0.98):
        drawn = np.random.default_rng(4).normal(value, 0.1, 500)
        interval = ap_interval(ApSamples(np.concatenate([[value], drawn]), np.ones((1, 10), np.int64), 0, np.zeros(1)))
        assert 0 <= interval.low < value < interval.high <= 1


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


def matches(scores: list[float], correct: str, *, ignored: str = "", positives: int = 4) -> ClassMatches:
    """One detection an image, best first; ``correct`` and ``ignored`` have a ``1`` for each that is."""
    count = len(scores)

    def flags(text: str) -> np.ndarray:
        return np.tile(np.array([mark == "1" for mark in text.ljust(count, "0")], np.bool_), (10, 1))

    objects = np.zeros(max(count, positives), np.int64)
    objects[:positives] = 1
    return ClassMatches(np.arange(count), np.float32(scores), flags(correct), flags(ignored), objects)


def point(match: ClassMatches, **goal: float) -> OperatingPoint:
    (found,) = operating_points([match], ["cell"], chosen_thresholds([match], goal=OperatingGoal(**goal)))
    return found


@pytest.mark.parametrize(
    ("goal", "score", "precision", "recall"),
    [
        ({}, 0.45, 3 / 4, 3 / 4),  # F1 of 1, 2, 3 ... detections: 2/5, 4/6, 4/7, 6/8, 6/9
        ({"precision": 1.0}, 0.75, 1.0, 2 / 4),
        ({"precision": 0.7}, 0.45, 3 / 4, 3 / 4),
        ({"recall": 0.25}, 0.85, 1.0, 1 / 4),
        ({"recall": 0.6}, 0.45, 3 / 4, 3 / 4),
    ],
)
def test_threshold_lies_between_the_scores(
    goal: dict[str, float], score: float, precision: float, recall: float
) -> None:
    found = point(matches([0.9, 0.8, 0.7, 0.5, 0.4], "11010"), **goal)
    assert found.score == pytest.approx(score)
    assert found.precision is not None
    assert found.recall is not None
    assert (found.precision.value, found.recall.value) == (precision, recall)
    for share in (found.precision, found.recall):
        assert share.low < share.value <= share.high
        assert share.low < 1.0, "four detections do not prove a precision of 1"


def test_equal_scores_stay_together_and_a_crowd_does_not_count() -> None:
    tied = point(matches([0.9, 0.9, 0.5], "101"), precision=1.0)
    assert tied.score is None, "the first two cannot be told apart"
    crowd = point(matches([0.9, 0.8, 0.5], "101", ignored="010"), precision=1.0)
    assert crowd.precision is not None
    assert (crowd.score, crowd.precision.value) == (pytest.approx(0.25), 1.0)


@pytest.mark.parametrize(
    ("match", "goal"),
    [
        (matches([], ""), {}),
        (matches([0.9], "1", positives=0), {}),
        (matches([0.9, 0.8], "00"), {}),
        (matches([0.9, 0.8], "01"), {"recall": 0.9}),
    ],
)
def test_what_cannot_be_reached_has_no_threshold(match: ClassMatches, goal: dict[str, float]) -> None:
    assert point(match, **goal).score is None


def test_a_goal_is_one_share() -> None:
    with pytest.raises(ConfigError, match="for a precision or for a recall"):
        OperatingGoal(precision=0.9, recall=0.9)
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\], got 95"):
        OperatingGoal(precision=95)


CLASSES = ("cell", "platelet")
# 40 images: in each a cell, and in every fourth a platelet; every detection is right.
SCORES = (np.linspace(0.9, 0.5, 40), np.linspace(0.9, 0.5, 10))
SEEN_IN = (np.arange(40), np.arange(0, 40, 4))


def run(*, shift: float = 0.0, lost: int = 0, wrong: int = 0) -> list[ClassMatches]:
    """Of both classes: scores moved by ``shift``, the last ``lost`` platelets gone, the first ``wrong`` on nothing."""
    classes = []
    for label, (scores, image) in enumerate(zip(SCORES, SEEN_IN, strict=True)):
        kept = len(scores) - lost * label
        correct = np.tile(np.arange(kept) >= wrong * label, (10, 1))
        positives = np.bincount(image, minlength=40)
        classes.append(
            ClassMatches(image[:kept], np.float32(scores[:kept] + shift), correct, np.zeros_like(correct), positives)
        )
    return classes


REFERENCE = operating_counts(run(), Thresholds(scores=(0.45, 0.45), origin="test"))


def drops(candidate: OperatingCounts, **options: bool) -> tuple[OperatingDrop, OperatingDrop]:
    options.setdefault("same_outputs", False)
    precision, recall = operating_drops(REFERENCE, candidate, resamples=400, seed=0, **options)
    assert precision is not None
    assert recall is not None
    return precision, recall


def at_reference_point(**damage: float) -> OperatingCounts:
    matches = run(**damage)  # type: ignore[arg-type]  # counts and a shift by name
    return operating_counts(matches, equivalent_thresholds(REFERENCE, matches))


def test_what_is_lost_is_the_mean_over_the_classes() -> None:
    """Three of ten platelets are lost: 0.15 of the mean, though it is 3 of 50 objects; precision stays."""
    precision, recall = drops(at_reference_point(lost=3))
    assert (recall.reference, recall.drop.value, recall.by_class) == (
        1.0,
        pytest.approx(0.15),
        (0.0, pytest.approx(0.3)),
    )
    assert precision.drop.value == 0.0
    assert -0.05 < recall.drop.low < 0.15 < recall.drop.high < 0.5
    precision, recall = drops(at_reference_point(wrong=2))
    assert (precision.drop.value, recall.drop.value) == (pytest.approx(0.1), pytest.approx(0.1))


def test_no_loss_in_forty_images_does_not_prove_that_there_is_none() -> None:
    """3.69 of the ten platelets may be lost unseen, each 1 / 10 / 2 classes; unless every detection is the same."""
    _, recall = drops(at_reference_point())
    assert (recall.drop.low, recall.drop.high) == (0.0, pytest.approx(3.689 / 20, abs=1e-3))
    _, recall = drops(at_reference_point(), same_outputs=True)
    assert recall.drop.high == 0.0


def test_thresholds_follow_scores_that_drift_and_those_of_a_bundle_do_not() -> None:
    drifted = at_reference_point(shift=-0.2)
    assert drops(drifted)[1].drop.value == 0.0
    carried = carried_thresholds({"CELL": 0.45, "platelet": 0.45}, CLASSES)
    assert drops(operating_counts(run(shift=-0.2), carried))[1].drop.value > 0.3


@pytest.mark.parametrize(
    ("damage", "limit", "outcome"),
    [({"lost": 3}, 0.45, "passed"), ({"lost": 3}, 0.16, "inconclusive"), ({"lost": 9}, 0.1, "failed")],
)
def test_a_limit_on_recall_has_three_verdicts(damage: dict[str, float], limit: float, outcome: str) -> None:
    _, recall = drops(at_reference_point(**damage))
    (verdict,) = judge_operating_drop(Gate(max_recall_drop=limit), "recall", recall, class_names=CLASSES, subject="x")
    assert (verdict.name, verdict.outcome) == ("max_recall_drop", outcome)
    assert "recall at the operating point 1.000 -> " in verdict.message
    assert ("most of 'platelet' (+" in verdict.message) is (outcome != "passed")
    gate = Gate(max_recall_drop=limit, judge=Judge.POINT)
    (by_point,) = judge_operating_drop(gate, "recall", recall, class_names=CLASSES, subject="x")
    assert by_point.outcome == ("failed" if outcome == "failed" else "passed")
    assert judge_operating_drop(Gate(), "recall", recall, class_names=CLASSES, subject="x") == []


def test_without_a_threshold_or_a_detection_nothing_is_decided() -> None:
    matches = run(wrong=5)
    lacking = operating_counts(matches, chosen_thresholds(matches, goal=OperatingGoal(precision=1.0)))
    problem = operating_problem(REFERENCE, lacking, CLASSES)
    assert problem == "there is no score threshold of 'platelet' (precision 1)"
    (_, unreached) = operating_rows(operating_points(matches, CLASSES, lacking.thresholds))
    assert unreached == ("platelet", "precision 1: no score reaches it", "-", "-", "-", "-")
    silent = operating_counts(run(), Thresholds(scores=(1.0, 1.0), origin="test"))
    precision, _ = operating_drops(REFERENCE, silent, resamples=0, seed=0, same_outputs=False)
    for share, loss, reason in (("recall", drops(lacking)[1], problem), ("precision", precision, "")):
        gate = Gate(**{f"max_{share}_drop": 0.5})
        (verdict,) = judge_operating_drop(gate, share, loss, class_names=CLASSES, subject="x", problem=reason)
        assert verdict.outcome == "inconclusive"
        assert verdict.message == (
            reason or "nothing is detected at the operating point, so that there is no precision"
        )
