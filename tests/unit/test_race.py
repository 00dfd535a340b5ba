"""The race for the best AP: on part of the images for those that cannot win, with the answer of the whole grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.accuracy.coco import Contender, RaceRules, Standing, match_dataset, race, race_rounds, weighted_ap
from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.core.detections import Detections

IMAGES, OBJECTS = 96, 4


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    corners = np.float64([[10 * i, 10 * i, 10 * i + 8, 10 * i + 8] for i in range(OBJECTS)])
    truth = GroundTruth(corners, np.zeros(OBJECTS, np.int64), np.full(OBJECTS, 64.0), np.zeros(OBJECTS, np.bool_))
    images = tuple(EvaluationImage(number, Path(f"{number}.png")) for number in range(IMAGES))
    return Dataset(images, {image.image_id: truth for image in images}, ("disc",), "made up")


class Detector:
    """Finds each object with a probability; counts the images that it is asked for."""

    def __init__(self, dataset: Dataset, recall: float) -> None:
        generator = np.random.default_rng(int(1000 * recall))
        self.images = 0
        self.detections: dict[int, Detections] = {}
        for image_id, truth in dataset.ground_truth.items():
            kept = generator.random(OBJECTS) < recall
            scores = generator.random(int(kept.sum())).astype(np.float32)
            labels = np.zeros(len(scores), np.int64)
            self.detections[image_id] = Detections(truth.boxes[kept].astype(np.float32), scores, labels)

    def __call__(self, images: Sequence[EvaluationImage]) -> Mapping[int, Detections]:
        self.images += len(images)
        return {image.image_id: self.detections[image.image_id] for image in images}


def run(dataset: Dataset, recalls: Sequence[float], rules: RaceRules) -> tuple[dict[float, Standing], list[Detector]]:
    """Dearer as they are better."""
    detectors = [Detector(dataset, recall) for recall in recalls]
    contenders = [Contender(name=str(r), cost=r, detect=d) for r, d in zip(recalls, detectors, strict=True)]
    return dict(zip(recalls, race(contenders, dataset, rules=rules), strict=True)), detectors


def test_rounds_double_and_end_with_all_images() -> None:
    assert race_rounds(96) == (24, 48, 96)
    assert race_rounds(100) == (24, 48, 96, 100)
    assert race_rounds(7) == (7,)


def test_the_highest_ap_of_all_images_wins_and_the_hopeless_leave_early(dataset: Dataset) -> None:
    recalls = (0.3, 0.6, 0.9, 0.95)
    standings, detectors = run(dataset, recalls, RaceRules())
    exhaustive = [
        float(weighted_ap(match_dataset(dataset, d.detections), np.ones((1, IMAGES), np.float32))[0]) for d in detectors
    ]
    complete = {r: s.interval.value for r, s in standings.items() if not s.reason and s.interval is not None}
    assert max(complete, key=lambda r: complete[r]) == recalls[int(np.argmax(exhaustive))]
    assert complete[0.95] == pytest.approx(exhaustive[3], abs=1e-9)
    assert standings[0.3].images == detectors[0].images == 24
    assert "below" in standings[0.3].reason
    assert detectors[3].images == IMAGES, "each image is detected on once"


def test_with_costs_the_front_remains(dataset: Dataset) -> None:
    standings, _ = run(dataset, (0.3, 0.6, 0.9), RaceRules(by_cost=True))
    assert [s.reason for s in standings.values()] == ["", "", ""], "each dearer one is better"
    detectors = {2.0: Detector(dataset, 0.3), 1.0: Detector(dataset, 0.9)}
    contenders = [Contender(name=str(cost), cost=cost, detect=d) for cost, d in detectors.items()]
    dear, cheap = race(contenders, dataset, rules=RaceRules(by_cost=True))
    assert dear.reason
    assert not cheap.reason


def test_for_a_lowest_ap_the_dearer_are_not_run_to_the_end(dataset: Dataset) -> None:
    standings, detectors = run(dataset, (0.3, 0.8, 0.99), RaceRules(min_ap=0.6))
    assert "at most" in standings[0.3].reason
    assert (standings[0.8].reason, standings[0.8].images) == ("", IMAGES)
    assert "costs less and reaches" in standings[0.99].reason
    assert detectors[2].images < IMAGES


def test_nobody_is_dropped_by_what_chance_explains(dataset: Dataset) -> None:
    standings, _ = run(dataset, (0.900, 0.901), RaceRules())
    assert [s.images for s in standings.values()] == [IMAGES, IMAGES]
