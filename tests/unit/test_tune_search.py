"""What a search times, leaves out and chooses: its rules, with times and APs that are given."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcos_deploy.accuracy.coco import ApInterval, Contender, Standing
from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.benchmark.measure import LatencyStats
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ComputeType, Precision
from fcos_deploy.core.errors import BackendError, BudgetError
from fcos_deploy.core.gate import Judge, Outcome
from fcos_deploy.core.preprocess import PreprocessSpec, SizeRule
from fcos_deploy.pipeline import tune, tune_models, tune_search
from fcos_deploy.pipeline.tune_models import Configuration, InputSize
from fcos_deploy.pipeline.tune_search import Measured, Search, TuneRequest
from fcos_deploy.report.tuning import PointStatus

SIZES = tuple(InputSize(side, side) for side in (100, 200, 300, 400, 500, 600))
PRECISIONS = (Precision.INT8, Precision.FP32)
FORMATS = (ComputeType.F32, ComputeType.BF16)
IMAGE = Path("image.png")


class Models:
    """Every configuration can be made, and is its own spec; the runtime 'slow' computes in float32 alone."""

    def __init__(self, *, precisions: tuple[Precision, ...], backends: tuple[str, ...]) -> None:
        self.sizes, self.precisions, self.backends = SIZES, precisions, backends
        self.gate_key, self.int8_problem = "gate", ""

    def takes_batches(self, backend: str) -> bool:
        return backend == "fast"

    def computes(self, configuration: Configuration) -> bool:
        return configuration.compute is ComputeType.F32 or configuration.backend != "slow"

    def open_as(self, configuration: Configuration) -> Configuration:
        return configuration

    def reference(self) -> Models:
        return self

    @contextlib.contextmanager
    def open(self) -> Iterator[Models]:
        yield self

    def read(self, _: Path) -> np.ndarray:
        return np.zeros((500, 500, 3), np.uint8)


class Trials:
    """Nothing is known, and nothing is kept."""

    def path(self, _: Configuration, *, throughput: bool) -> Path:
        return Path(f"time-{throughput}.json")

    def load(self, _: Path) -> None:
        return None

    def keep(self, _: Measured, __: Path) -> None:
        return None


def new_search(
    milliseconds: Callable[[Configuration], float],
    monkeypatch: pytest.MonkeyPatch,
    *,
    precisions: tuple[Precision, ...] = (Precision.FP32,),
    backends: tuple[str, ...] = ("fast",),
    p90: float = 1.0,
    **limits: Any,
) -> Search:
    """A search in which a configuration takes this long; its 90th percentile is ``p90`` times as long."""

    def measure(_: Search, opened: Sequence[tuple[Configuration, Any, Path]]) -> list[Measured]:
        times = [milliseconds(configuration) for configuration, _, _ in opened]
        return [
            Measured(
                latency=LatencyStats(mean=ms, p50=ms, p90=ms * p90, p99=None, minimum=ms, maximum=ms * p90, count=20),
                throughput=1000 / ms if limits.get("throughput") else None,
            )
            for ms in times
        ]

    monkeypatch.setattr(Search, "_measure", measure)
    monkeypatch.setattr(tune_search, "usable_cpus", lambda: 4)
    annotations = IMAGE if "min_ap" in limits else None
    asked: dict[str, Any] = {"threads": (1,), "computes": (ComputeType.F32,), **limits}
    request = TuneRequest(model=IMAGE, output=IMAGE, images=IMAGE, annotations=annotations, **asked)
    models: Any = Models(precisions=precisions, backends=backends)
    trials: Any = Trials()
    return Search(request, models, image=IMAGE, trials=trials, progress=lambda *_: None)


def by_size(configuration: Configuration) -> float:
    """A tenth of the side in milliseconds, INT8 half of it; the runtime 'slow' and two threads take longer."""
    ms = configuration.size.height / 10 * (0.5 if configuration.precision is Precision.INT8 else 1.0)
    return ms * (1.3 if configuration.backend == "slow" else 1.0) * (1.2 if configuration.threads == 2 else 1.0)


def sides(search: Search, **fields: Any) -> list[int]:
    """Of the sizes that were timed with these fields."""
    timed = [c for c in search.measured if all(getattr(c, name) == value for name, value in fields.items())]
    return sorted({c.size.height for c in timed})


def test_within_a_budget_a_less_exact_precision_is_tried_above_the_sizes_that_a_more_exact_one_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = new_search(by_size, monkeypatch, precisions=PRECISIONS, backends=("fast", "slow"), max_latency_ms=31.0)
    search.run()
    assert max(side for side in sides(search, precision=Precision.FP32) if side <= 300) == 300
    timed = {
        (backend, precision): sides(search, backend=backend, precision=precision)
        for backend in ("fast", "slow")
        for precision in PRECISIONS
    }
    assert timed == {
        ("fast", Precision.FP32): [100, 200, 300, 400, 500],  # 300, 500 and 400; the smaller ones keep it too
        ("slow", Precision.FP32): [300],
        ("fast", Precision.INT8): [400, 500, 600],
        ("slow", Precision.INT8): [400, 500],  # which detects otherwise than that of the fast one
    }
    reasons = {(c.size.height, c.precision, c.backend): reason for c, reason in search.pruned.items()}
    assert reasons[300, Precision.INT8, "fast"] == "a more exact precision keeps the limit at this size"
    assert reasons[600, Precision.FP32, "fast"] == "50.0 ms at 500x500 already"
    assert reasons[200, Precision.FP32, "slow"] == "fast fp32, 1 thread is faster at 300x300"


def test_threads_that_are_slow_are_not_tried_where_they_gain_less(monkeypatch: pytest.MonkeyPatch) -> None:
    search = new_search(by_size, monkeypatch, threads=(1, 2))
    search.run()
    assert sides(search, threads=1) == [100, 200, 300, 400, 500, 600]
    assert sides(search, threads=2) == [400, 500, 600], "1.2 times as slow, and slower still where there is less to do"
    search = new_search(lambda c: by_size(c) / c.threads**2, monkeypatch, threads=(1, 2))
    search.run()
    assert sides(search, threads=2) == [100, 200, 300, 400, 500, 600]
    assert sides(search, threads=1) == [100, 200, 300, 400]


def test_what_cannot_be_made_or_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(configuration: Configuration) -> float:
        if configuration.size.height == 500 and configuration.threads == 2:
            raise BackendError("the runtime failed")
        return by_size(configuration)

    def made(_: Models, configuration: Configuration) -> Configuration:
        if configuration.size.height == 600:
            raise MemoryError
        return configuration

    monkeypatch.setattr(Models, "open_as", made)
    search = new_search(milliseconds, monkeypatch, threads=(1, 2))
    search.run()
    assert sides(search, threads=1) == [100, 200, 300, 400, 500]
    reasons = {(c.size.height, c.threads): reason for c, reason in search.pruned.items()}
    assert reasons[600, 1] == "cannot be made: there is not enough memory"
    assert reasons[500, 2] == "cannot be run: the runtime failed"


def test_where_the_more_exact_one_is_as_fast_the_less_exact_one_is_not_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def milliseconds(configuration: Configuration) -> float:
        faster = configuration.compute is ComputeType.BF16 and configuration.size.height >= 400
        return by_size(configuration) * (0.9 if faster else 1.0)

    search = new_search(milliseconds, monkeypatch, backends=("fast", "slow"), computes=FORMATS)
    search.run()
    assert sides(search, backend="slow", compute=ComputeType.BF16) == []
    evaluated = list(search.fastest_by_artifact().values())
    assert {c.backend for c in evaluated} == {"fast"}, "the runtime does not change what fp32 detects"
    assert sorted(c.size.height for c in evaluated if c.compute is ComputeType.BF16) == [400, 500, 600]
    assert len(evaluated) == 9

    # INT8 that takes as long as bf16 is as fast and less exact.
    search = new_search(
        lambda c: 10.0 if c.format == "fp32" else 5.0, monkeypatch, computes=FORMATS, precisions=PRECISIONS
    )
    search.run()
    assert {c.format for c in search.fastest_by_artifact().values()} == {"fp32", "fp32 bf16"}


def test_batches_are_tried_on_runtimes_that_take_them_and_the_percentile_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    axes: dict[str, Any] = {"throughput": True, "streams": (1,), "batches": (1, 3), "backends": ("fast", "slow")}
    search = new_search(by_size, monkeypatch, **axes)
    search.run()
    assert {(c.backend, c.batch) for c in search.measured} == {("fast", 1), ("fast", 3), ("slow", 1)}
    for percentile, largest in ((50, 300), (90, 200)):
        search = new_search(by_size, monkeypatch, p90=1.1, max_latency_ms=31.0, percentile=percentile)
        search.run()
        assert max(c.size.height for c in search.measured if search.fits(c)) == largest
        answer = new_answer(search, by_side, monkeypatch)
        points = [answer.point(c) for c in search.measured]
        assert [p.cost_ms for p in points] == [p.p90_ms if percentile == 90 else p.p50_ms for p in points]


def new_answer(
    search: Search, ap_of: Callable[[str], float], monkeypatch: pytest.MonkeyPatch, *, choices: int = 1
) -> tune.Answer:
    """After a race in which every artifact, by its name, had an AP within 0.01 of ``ap_of`` it."""

    def race(contenders: Sequence[Contender], *_: Any, **__: Any) -> list[Standing]:
        found = [(c.name, ap_of(c.name)) for c in contenders]
        return [
            Standing(
                name=name,
                images=100,
                choices=choices,
                interval=ApInterval(
                    value=ap,
                    low=ap - 0.01,
                    high=ap + 0.01,
                    standard_error=0.005,
                    confidence=0.95,
                    resamples=1000,
                    images=100,
                ),
            )
            for name, ap in found
        ]

    monkeypatch.setattr(tune, "race", race)
    monkeypatch.setattr(tune, "own_folder", lambda path: path)
    search.run()
    images = tuple(EvaluationImage(number, Path(f"{number}.png")) for number in range(100))
    cell = GroundTruth(np.ones((1, 4)), np.zeros(1, np.int64), np.ones(1), np.zeros(1, np.bool_))
    dataset = Dataset(images, dict.fromkeys(range(100), cell), ("cell",), "made", annotated=False)
    answer = tune.Answer(search, dataset, folder=IMAGE, progress=lambda *_: None)
    answer.race()
    return answer


def by_side(artifact: str) -> float:
    """The AP of each size."""
    return {100: 0.2, 200: 0.4, 300: 0.5, 400: 0.55, 500: 0.6, 600: 0.45}[int(artifact.partition("x")[0])]


@pytest.mark.parametrize(
    ("limits", "chosen", "next_best"),
    [
        ({"max_latency_ms": 41.0}, 400, [200, 300]),
        ({"min_ap": 0.45}, 300, [400, 500]),
        ({"min_ap": 0.395, "judge": Judge.POINT}, 200, [300, 400]),
        ({"min_ap": 0.395}, 300, [400, 500]),
        ({"max_latency_ms": 41.0, "min_ap": 0.53}, 400, [200, 300]),
    ],
)
def test_the_goal_decides_what_is_best_and_two_are_named_as_the_next(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], chosen: int, next_best: list[int]
) -> None:
    search = new_search(by_size, monkeypatch, **limits)
    answer = new_answer(search, by_side, monkeypatch)
    best = answer.choose()
    assert best is not None
    assert best.size.height == chosen
    status = {c.size.height: answer.point(c).status for c in search.measured}
    assert status[chosen] is PointStatus.CHOSEN
    assert sorted(side for side, value in status.items() if value is PointStatus.NEXT) == next_best


def test_what_was_refused_gives_way_to_the_next_best_and_no_goal_is_reached_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = new_search(by_size, monkeypatch, max_latency_ms=41.0)
    answer = new_answer(search, by_side, monkeypatch)
    best = answer.choose()
    assert best is not None
    search.refused[best.engine] = "it loses too much"
    search.run()
    answer.race()
    following = answer.choose()
    assert following is not None
    assert following.size.height == 300
    assert answer.point(best).reason == "refused when it was deployed: it loses too much"
    search = new_search(by_size, monkeypatch, max_latency_ms=41.0, min_ap=0.7)
    with pytest.raises(BudgetError, match=r"The nearest is 400x400 fast fp32, 1 thread: 40\.0 ms, AP 0\.550"):
        new_answer(search, by_side, monkeypatch).choose()


@pytest.mark.parametrize(("choices", "outcome"), [(1, Outcome.PASSED), (16, Outcome.INCONCLUSIVE)])
def test_the_interval_of_one_that_was_chosen_among_many_is_wider(
    monkeypatch: pytest.MonkeyPatch, choices: int, outcome: Outcome
) -> None:
    search = new_search(by_size, monkeypatch, max_latency_ms=41.0, min_ap=0.538)
    answer = new_answer(search, by_side, monkeypatch, choices=choices)
    answer.choose()
    assert [verdict.outcome for verdict in answer.verdicts] == [outcome]


@pytest.mark.parametrize(
    ("turned", "images", "said"),
    [
        (True, 100, "100 of 100 annotated boxes are wide where those of '100x100 fp32' are high"),
        (False, 100, ""),
        (False, 4, "96 of the 100 images are copies of others"),
    ],
)
def test_an_ap_is_decided_only_where_evaluating_would_decide_it(
    monkeypatch: pytest.MonkeyPatch, turned: bool, images: int, said: str
) -> None:
    def detect(_: tune.Answer, __: Configuration, asked: Sequence[EvaluationImage]) -> dict[int, Detections]:
        return {
            image.image_id: Detections(
                box(image.image_id % images, turned=turned), np.array([0.9], np.float32), np.zeros(1, np.int64)
            )
            for image in asked
        }

    def box(position: int, *, turned: bool) -> np.ndarray:
        half = (4.5, 5.5) if turned else (5.5, 4.5)  # which overlap by two thirds
        return np.array([[position - half[0], 20 - half[1], position + half[0], 20 + half[1]]], np.float32)

    monkeypatch.setattr(tune.Answer, "_detect", detect)
    monkeypatch.setattr(tune, "own_folder", lambda path: path)
    search = new_search(by_size, monkeypatch, max_latency_ms=11.0, min_ap=0.1)
    search.run()
    truths = {
        number: GroundTruth(
            box(number % images, turned=False).astype(np.float64), np.zeros(1, np.int64), np.ones(1), np.zeros(1, bool)
        )
        for number in range(100)
    }
    names = tuple(EvaluationImage(number, Path(f"{number}.png")) for number in range(100))
    answer = tune.Answer(search, Dataset(names, truths, ("cell",), "made"), folder=IMAGE, progress=lambda *_: None)
    answer.race()
    answer.choose()
    (verdict,) = answer.verdicts
    assert verdict.outcome is (Outcome.INCONCLUSIVE if said else Outcome.PASSED)
    assert said in verdict.message


@pytest.mark.parametrize(
    ("rule", "size", "kept"),
    [
        ("mmdetection-fix-scale", "640:1066", "mmdetection-fix-scale"),
        ("stretch", "320x416", "stretch"),
        ("letterbox", "320x416", "letterbox"),
        ("mmdetection-fix-scale", "320x416", None),  # a canvas is filled keeping the ratio
        ("stretch", "640:1066", None),  # of edges the ecosystem's own
    ],
)
def test_another_size_is_reached_by_the_same_rule(rule: str, size: str, kept: str | None) -> None:
    sides: dict[str, Any] = {"height": 640, "width": 800} if rule in ("stretch", "letterbox") else {}
    edges = {"shortest": 800, "longest": 1333}
    spec = PreprocessSpec(mean=(0.0,) * 3, std=(1.0,) * 3, size_rule=SizeRule(rule), **(sides or edges))
    options = tune_models._sized_options(CheckpointOptions(size_rule=spec.size_rule), InputSize.parse(size), spec)
    assert options.size_rule == kept


class Surface:
    """Times, memory and AP of every configuration, drawn as the search takes them to be, and all of them known.

    Times grow with the size, threads pay the more the more there is to compute, and a less exact precision detects at
    most as well at the same size. Which runtimes, precisions and threads pay is open, and so is AP by the size.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        formats = ("fp32", "fp32 bf16", "int8", "int8 bf16")
        work = np.cumsum(rng.uniform(0.2, 4.0, len(SIZES)))
        factor = {(b, f): rng.uniform(0.3, 1.5) for b in ("fast", "slow") for f in formats}
        overhead, serial = rng.uniform(0.0, 1.0), rng.uniform(0.0, 0.5)
        self.memory_of = {c: rng.uniform(0.5, 2.0) for c in factor}
        self.aps: dict[str, float] = {}
        # Of these the bundle cannot be made; of a float32 graph on either runtime, or on both.
        self.broken = {(side, *key) for side in range(100, 700, 100) for key in factor if rng.random() < 0.1}
        for size in SIZES:
            self.aps[f"{size} fp32"] = exact = rng.uniform(0.2, 0.6)
            self.aps[f"{size} fast fp32 bf16"] = exact = exact - rng.uniform(0.0, 0.05)
            for backend in ("fast", "slow"):
                self.aps[f"{size} {backend} int8"] = int8 = exact - rng.uniform(0.0, 0.05)
                self.aps[f"{size} {backend} int8 bf16"] = int8 - rng.uniform(0.0, 0.05)

        def milliseconds(c: Configuration) -> float:
            base = float(work[SIZES.index(c.size)]) * factor[c.backend, c.format]
            return base * (serial + (1 - serial) / c.threads) + overhead * c.threads

        self.milliseconds = milliseconds
        self.limit = float(np.quantile([milliseconds(c) for c in self.all()], rng.uniform(0.05, 0.8)))
        self.max_memory = float(rng.uniform(1.5, 12.0)) if rng.random() < 0.5 else None

    def all(self) -> Iterator[Configuration]:
        for size, backend, precision, threads, compute in itertools.product(
            SIZES, ("fast", "slow"), PRECISIONS, (1, 2, 4), FORMATS
        ):
            if backend == "fast" or compute is ComputeType.F32:
                yield Configuration(size=size, backend=backend, precision=precision, threads=threads, compute=compute)

    def excess(self, c: Configuration) -> str:
        memory = self.memory_of[c.backend, c.format] * (SIZES.index(c.size) + 1) + 0.5 * c.threads
        return "too much memory" if self.max_memory is not None and memory > self.max_memory else ""

    def is_broken(self, c: Configuration) -> bool:
        return (c.size.height, c.backend, c.format) in self.broken


@pytest.mark.parametrize("goal", ["highest AP", "fastest"])
def test_the_answer_is_that_of_the_exhaustive_search(monkeypatch: pytest.MonkeyPatch, goal: str) -> None:
    timed = []
    for seed in range(80):
        surface = Surface(seed)
        limits: dict[str, Any] = {"max_latency_ms": surface.limit}
        if goal == "fastest":
            limits = {"min_ap": float(np.quantile([*surface.aps.values()], 0.6)), "judge": Judge.POINT}
        limits["max_memory_mib"] = surface.max_memory
        monkeypatch.setattr(Search, "_measured_excess", lambda _, c, surface=surface: surface.excess(c))
        axes: dict[str, Any] = {"precisions": PRECISIONS, "backends": ("fast", "slow"), "threads": (1, 2, 4)}
        search = new_search(surface.milliseconds, monkeypatch, computes=FORMATS, **axes, **limits)
        answer = new_answer(search, surface.aps.__getitem__, monkeypatch)
        chosen: Configuration | None = None
        with contextlib.suppress(BudgetError):
            while (chosen := answer.choose()) is not None and surface.is_broken(chosen):
                search.refused[chosen.engine] = "its bundle is not the same detector"
                chosen = None
                search.run()
                answer.race()
        allowed = [c for c in surface.all() if not surface.excess(c) and not surface.is_broken(c)]
        if goal == "fastest":
            expected = min(
                (surface.milliseconds(c) for c in allowed if surface.aps[c.artifact] >= limits["min_ap"]), default=None
            )
            assert (chosen and surface.milliseconds(chosen)) == expected, seed
        else:
            within = [c for c in allowed if surface.milliseconds(c) <= surface.limit]
            expected = max((surface.aps[c.artifact] for c in within), default=None)
            assert (chosen and surface.aps[chosen.artifact]) == expected, seed
            timed.append(len(search.measured) / len([*surface.all()]))
    assert goal == "fastest" or np.mean(timed) < 0.4, "in a fraction of the measurements"
