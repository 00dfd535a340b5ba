"""Suppression by plain operators equals greedy suppression within its bound, and says when the bound was too small."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fcos_deploy.core.errors import ConfigError  # noqa: E402
from fcos_deploy.model.tails import (  # noqa: E402
    Candidates,
    StaticNms,
    greedy_keep,
)


def _random(seed: int, *, count: int = 300, classes: int = 3) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand((2, count, 2), generator=generator) * 60
    sides = torch.rand((2, count, 2), generator=generator) * 40 + 5
    scores = torch.rand((2, count), generator=generator) - 0.1
    labels = torch.randint(0, classes, (2, count), generator=generator)
    return Candidates(torch.cat((corner, corner + sides), 2), scores, labels, classes)


def _chain(links: int) -> Candidates:
    """Boxes of one class in a row: each overlaps its neighbours too much, and no other."""
    left = torch.arange(links, dtype=torch.float32) * 4
    zeros = torch.zeros(links)
    boxes = torch.stack(
        (left, zeros, left + 10, zeros + 10), 1
    )  # IoU of neighbours 6 / 14, of the others at most 2 / 18
    return Candidates(boxes[None], torch.linspace(0.9, 0.5, links)[None], torch.zeros((1, links), dtype=torch.int64), 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_equals_greedy_suppression(seed: int, threshold: float) -> None:
    candidates = _random(seed)
    result = StaticNms(boxes=300, rounds=24).run(candidates, iou_threshold=threshold)
    wanted = greedy_keep(candidates.boxes, candidates.scores, candidates.labels, threshold)
    assert result.settled.all()
    assert 10 < wanted.sum() < (candidates.scores > 0).sum()
    assert torch.equal(result.keep, wanted)


@pytest.mark.parametrize("links", [2, 5, 9])
def test_a_chain_needs_a_round_a_link(links: int) -> None:
    candidates = _chain(links)
    wanted = greedy_keep(candidates.boxes, candidates.scores, candidates.labels, 0.4)
    assert wanted[0].tolist() == [i % 2 == 0 for i in range(links)]
    enough = StaticNms(boxes=links, rounds=links - 1).run(candidates, iou_threshold=0.4)
    assert enough.settled.all()
    assert torch.equal(enough.keep, wanted)
    if links > 2:
        assert not StaticNms(boxes=links, rounds=links - 2).run(candidates, iou_threshold=0.4).settled.any()


def test_only_the_best_boxes_take_part() -> None:
    candidates = _chain(6)
    kept = StaticNms(boxes=3, rounds=8)(candidates, iou_threshold=0.4, limit=10)
    assert kept[0].tolist() == [True, False, True, False, False, False]


def test_candidates_that_failed_the_gate_neither_survive_nor_suppress() -> None:
    candidates = _chain(3)
    candidates.scores[0, 0] = -1.0
    assert StaticNms()(candidates, iou_threshold=0.4, limit=10)[0].tolist() == [False, True, False]


def test_empty_boxes_are_kept_like_the_reference_keeps_them() -> None:
    boxes = torch.tensor([[[5.0, 5, 5, 5], [5, 5, 5, 5]]])
    candidates = Candidates(boxes, torch.tensor([[0.9, 0.8]]), torch.zeros((1, 2), dtype=torch.int64), 1)
    wanted = greedy_keep(boxes, candidates.scores, candidates.labels, 0.5)
    assert torch.equal(StaticNms()(candidates, iou_threshold=0.5, limit=2), wanted)


@pytest.mark.parametrize("options", [{"boxes": 0}, {"boxes": 3841}, {"rounds": 0}])
def test_impossible_bounds_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="Static NMS takes"):
        StaticNms(**options)
