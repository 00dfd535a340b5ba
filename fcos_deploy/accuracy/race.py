"""Which of several detectors is best, on as few images as decide it.

All run on a subset of the images that grows; after each round those that cannot win drop out. It is successive halving
with a proof in place of a share: a detector leaves when a paired bootstrap interval says that another one is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fcos_deploy.accuracy.coco import (
    ApInterval,
    ApSamples,
    ap_interval,
    match_dataset,
    paired_ap_drop,
    sample_ap,
    widened_for_selection,
)
from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Judge

__all__ = ["Contender", "RaceRules", "Standing", "race", "race_rounds"]

_FIRST_ROUND = 24  # images; an interval over fewer decides nothing (docs/accuracy.md)
_GROWTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """``cost`` is a time, or what else should be small.

    ``detect`` gives the detections of images by their ids; labels are positions in the data set's class names.
    """

    name: str
    cost: float
    detect: Callable[[Sequence[EvaluationImage]], Mapping[int, Detections]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceRules:
    """What winning means.

    Without ``min_ap`` it is the highest AP; with ``by_cost`` a detector leaves only for a better one that costs no
    more, so that the front of AP against cost remains. With ``min_ap`` it is the lowest cost at which the AP is
    reached: one leaves when its whole interval is below, or when a cheaper one has reached it on all images.
    """

    min_ap: float | None = None
    by_cost: bool = False
    judge: Judge = Judge.INTERVAL
    resamples: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a contender came: its AP over ``images``, and why it left; '' for those that ran on all.

    ``choices``: among how many the winner was chosen on these images, for which its interval has to be widened.
    """

    name: str
    images: int
    interval: ApInterval | None
    reason: str = ""
    choices: int = 1


def race_rounds(images: int) -> tuple[int, ...]:
    """How many images each round has, all of them in the last."""
    rounds, count = [], _FIRST_ROUND
    while count < images:
        rounds.append(count)
        count *= _GROWTH
    return (*rounds, images)


@dataclass(slots=True)
class _Entrant:
    contender: Contender
    detections: dict[int, Detections] = field(default_factory=dict)
    samples: ApSamples | None = None
    interval: ApInterval | None = None
    images: int = 0
    reason: str = ""

    def run(self, dataset: Dataset, *, resamples: int) -> None:
        """Detect on the images that are new, and score all of ``dataset``."""
        new = [image for image in dataset.images if image.image_id not in self.detections]
        if new:
            self.detections |= self.contender.detect(new)
        matches = match_dataset(dataset, self.detections)
        self.samples = sample_ap(matches, resamples=resamples)
        self.interval, self.images = ap_interval(self.samples), len(dataset.images)


def race(
    contenders: Sequence[Contender],
    dataset: Dataset,
    *,
    rules: RaceRules,
) -> tuple[Standing, ...]:
    """Run it; one standing for each contender, in their order.

    Raises:
        ConfigError: the data has no object.
        FcosDeployError: as the contenders' ``detect``.
    """
    if not contenders:
        return ()
    entrants = [_Entrant(contender) for contender in contenders]
    rounds = race_rounds(len(dataset.images))
    # Every comparison of every round may err, and one that errs drops the best: the intervals of all together hold.
    choices = len(rounds) * max(1, len(entrants) - 1)
    for count in rounds:
        subset = dataset.sample(count) if count < len(dataset.images) else dataset
        if not any((~objects.crowd).any() for objects in subset.ground_truth.values()):
            if count == rounds[-1]:
                raise ConfigError("AP needs at least one annotated object.")
            continue
        last = count == rounds[-1]
        for entrant in sorted((e for e in entrants if not e.reason), key=lambda e: e.contender.cost):
            reached = _cheaper_that_reached(entrant, entrants, rules, choices=choices) if last else None
            if reached is not None:
                entrant.reason = f"'{reached.contender.name}' costs less and reaches the AP"
            else:
                entrant.run(subset, resamples=rules.resamples)
        if not last:
            _drop_out(entrants, rules, choices=choices)
    return tuple(
        Standing(name=e.contender.name, images=e.images, interval=e.interval, reason=e.reason, choices=len(entrants))
        for e in entrants
    )


def _cheaper_that_reached(
    entrant: _Entrant, entrants: Sequence[_Entrant], rules: RaceRules, *, choices: int
) -> _Entrant | None:
    """One that costs less and has reached the AP in the last round, which ``entrant`` has not run in yet."""
    for rival in entrants:
        if rules.min_ap is None or rival.interval is None or rival.reason or rival.images <= entrant.images:
            continue
        interval = widened_for_selection(rival.interval, choices)
        reached = (interval.low if rules.judge is Judge.INTERVAL else interval.value) >= rules.min_ap
        if reached and rival.contender.cost < entrant.contender.cost:
            return rival
    return None


def _drop_out(entrants: Sequence[_Entrant], rules: RaceRules, *, choices: int) -> None:
    """Give those that cannot win the reason why they leave; the best of a round never leaves."""
    running = [entrant for entrant in entrants if not entrant.reason and entrant.interval is not None]
    for entrant in running:
        if rules.min_ap is not None:
            interval = entrant.interval and widened_for_selection(entrant.interval, choices)
            if interval and interval.high < rules.min_ap:
                entrant.reason = f"AP {interval.value:.3f} on {entrant.images} images, at most {interval.high:.3f}"
            continue
        for rival in running:
            dearer = rules.by_cost and rival.contender.cost > entrant.contender.cost
            if rival is entrant or dearer or rival.samples is None or entrant.samples is None:
                continue
            drop = widened_for_selection(paired_ap_drop(rival.samples, entrant.samples), choices)
            if drop.low > 0.0:
                entrant.reason = (
                    f"AP {drop.value:.3f} below '{rival.contender.name}' on {entrant.images} images "
                    f"(at least {drop.low:.3f})"
                )
                break
