"""Target assignment and the three losses, with numbers worked out by hand."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from fcos_deploy.core.decode import location_centers, location_strides
from fcos_deploy.core.enums import CenterMode

SCRIPT = Path(__file__).parents[2] / "examples" / "bccd" / "losses.py"
losses = runpy.run_path(str(SCRIPT))
Targets = losses["Targets"]
assign_targets = losses["assign_targets"]
centerness_target = losses["centerness_target"]
fcos_losses = losses["fcos_losses"]
focal_loss = losses["focal_loss"]
giou_loss = losses["giou_loss"]

STRIDES = (8, 16, 32, 64, 128)


def _assign(boxes: list[list[float]], labels: list[int]) -> Any:  # Targets
    centers = torch.from_numpy(location_centers(256, 256, strides=STRIDES, mode=CenterMode.HALF))
    steps = torch.from_numpy(location_strides(256, 256, strides=STRIDES))
    return assign_targets(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels), centers=centers, strides=steps
    )


def _at(x: int, y: int) -> int:
    """Index of a P3 location by column and row: 32 columns for a 256-pixel input."""
    return y * 32 + x


def test_an_image_without_boxes_is_all_background() -> None:
    targets = _assign([], [])
    assert targets.labels.tolist() == [-1] * (32 * 32 + 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2)
    assert not targets.distances.any()


def test_distances_are_to_the_four_sides_in_pixels() -> None:
    targets = _assign([[80, 88, 120, 112]], [2])
    # Column 12, row 12 of P3 lies at (100, 100), the centre of the box.
    assert targets.labels[_at(12, 12)] == 2
    assert targets.distances[_at(12, 12)].tolist() == [20, 12, 20, 12]


def test_only_locations_within_one_and_a_half_strides_of_the_centre_are_positive() -> None:
    labels = _assign([[72, 72, 128, 128]], [0]).labels[: 32 * 32].view(32, 32)
    # Centre (100, 100); |dx| < 12 leaves the columns at 92, 100 and 108.
    positive = {(int(x), int(y)) for y, x in (labels >= 0).nonzero()}
    assert positive == {(x, y) for x in (11, 12, 13) for y in (11, 12, 13)}


@pytest.mark.parametrize(("half", "level"), [(30, 0), (100, 1), (180, 2)])
def test_a_box_belongs_to_the_level_of_its_size(half: int, level: int) -> None:
    labels = _assign([[128 - half, 128 - half, 128 + half, 128 + half]], [1]).labels
    counts = [32 * 32, 16 * 16, 8 * 8, 4 * 4, 2 * 2]
    positive = [int((part >= 0).sum()) for part in labels.split(counts)]
    assert positive[level] == max(positive)
    assert positive[level] > 0


def test_upper_bound_belongs_to_the_finer_level() -> None:
    # From (100, 100) the largest distance is 64 = 8 strides of P3: still P3's.
    labels = _assign([[36, 90, 108, 110]], [0]).labels
    assert labels[_at(9, 12)] == 0  # (76, 100): distances 40, 10, 32, 10
    # One pixel more to the left, and locations with a distance over 64 are P4's.
    far = _assign([[28, 90, 172, 110]], [0]).labels[: 32 * 32].view(32, 32)
    assert far[12, 12] == -1  # (100, 100): right side is 72 away


def test_the_smallest_of_two_boxes_wins() -> None:
    targets = _assign([[72, 72, 128, 128], [90, 90, 110, 110]], [0, 1])
    assert targets.labels[_at(12, 12)] == 1
    assert targets.distances[_at(12, 12)].tolist() == [10, 10, 10, 10]


def test_centerness_by_hand() -> None:
    distances = torch.tensor([[10.0, 10, 10, 10], [2, 3, 8, 12], [0, 5, 10, 5]])
    assert centerness_target(distances).tolist() == pytest.approx([1.0, math.sqrt(2 / 8 * 3 / 12), 0.0])


def test_focal_loss_by_hand() -> None:
    # p = 0.5: positive 0.25 * 0.5^2 * ln 2, negative 0.75 * 0.5^2 * ln 2.
    loss = focal_loss(torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx((0.25 + 0.75) * 0.25 * math.log(2))


def test_focal_loss_of_a_confident_right_answer_vanishes() -> None:
    assert focal_loss(torch.tensor([12.0]), torch.tensor([1.0])).item() < 1e-12
    assert focal_loss(torch.tensor([-100.0]), torch.tensor([1.0])).item() == pytest.approx(25.0)


def test_giou_loss_by_hand() -> None:
    same = torch.tensor([[5.0, 5, 5, 5]])
    assert giou_loss(same, same).tolist() == pytest.approx([0.0])
    # 10 x 10 inside 20 x 20, same centre: IoU 0.25, hull is the larger box.
    assert giou_loss(same, 2 * same).tolist() == pytest.approx([0.75])
    # Crossing 10 x 20 and 20 x 10: intersection 100, union 300, hull 400.
    tall, wide = torch.tensor([[5.0, 10, 5, 10]]), torch.tensor([[10.0, 5, 10, 5]])
    assert giou_loss(tall, wide).tolist() == pytest.approx([1 - 1 / 3 + 100 / 400])


def test_losses_are_per_positive_location() -> None:
    labels = torch.tensor([1, -1, 0, -1])
    distances = torch.tensor([[4.0, 4, 4, 4], [0, 0, 0, 0], [2, 2, 6, 6], [0, 0, 0, 0]])
    logits = torch.zeros(1, 4, 2)
    predicted = torch.where(distances > 0, 2 * distances, 1.0)[None]
    losses = fcos_losses(logits, predicted, torch.zeros(1, 4, 1), targets=[Targets(labels, distances)])
    ln2 = math.log(2)
    assert losses.classification.item() == pytest.approx((2 * 0.25 + 6 * 0.75) * 0.25 * ln2 / 2)
    assert losses.box.item() == pytest.approx(0.75)
    # Targets 1 and 1/3 against a probability of 0.5: ln 2 each, whatever the target.
    assert losses.centerness.item() == pytest.approx(ln2)


def test_an_image_without_objects_has_finite_losses_and_gradients() -> None:
    logits = torch.zeros(1, 3, 2, requires_grad=True)
    boxes = torch.ones(1, 3, 4, requires_grad=True)
    targets = [Targets(torch.full((3,), -1), torch.zeros(3, 4))]
    losses = fcos_losses(logits, boxes, torch.zeros(1, 3, 1, requires_grad=True), targets=targets)
    total = sum(losses, torch.zeros(()))
    total.backward()
    assert losses.box.item() == 0.0
    assert losses.centerness.item() == 0.0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
