"""The three losses, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fcos_deploy.model.losses import Targets, fcos_losses, focal_loss, giou_loss


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
