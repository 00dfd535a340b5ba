"""Differences between tensors, tolerances, and which level and pixel they are in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fcos_deploy.accuracy.diagnosis import (
    Layer,
    activation_causes,
    class_causes,
    explained,
    layer_causes,
    level_causes,
    padding_causes,
    pixel_causes,
    shifted,
)
from fcos_deploy.accuracy.parity import level_slices, measure_difference, tolerance_for
from fcos_deploy.core.enums import ComputeType, Precision


def test_difference_of_known_tensors() -> None:
    difference = measure_difference(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]), image="x")
    assert difference.max_abs == 0.5
    assert difference.where == (0, 1)
    assert difference.relative == pytest.approx(0.5 / math.sqrt(12.5))
    assert difference.sqnr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert difference.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


def test_equal_tensors_have_no_noise() -> None:
    difference = measure_difference(np.ones(3), np.ones(3))
    assert difference.sqnr_db is None
    assert difference.bits == math.inf
    assert tolerance_for(Precision.FP32, ComputeType.F32).holds(difference)


def test_what_is_not_finite_diverges() -> None:
    difference = measure_difference(np.array([1.0, np.inf]), np.array([np.nan, np.inf]))
    assert difference.max_abs == math.inf
    assert difference.where == (0,)
    assert not tolerance_for(Precision.INT8, ComputeType.F32).holds(difference)


@pytest.mark.parametrize(("bits", "kind"), [(8, ComputeType.BF16), (11, ComputeType.F16), (24, ComputeType.F32)])
def test_rounding_shows_its_bits_and_is_tolerated_by_its_own_type_only(bits: int, kind: ComputeType) -> None:
    exact = np.random.default_rng(0).standard_normal(10_000)
    mantissa, exponent = np.frexp(exact)
    rounded = np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent)
    difference = measure_difference(exact, rounded)
    assert difference.bits == pytest.approx(bits + 1.2, abs=0.5)
    assert tolerance_for(Precision.FP32, kind).holds(difference)
    assert tolerance_for(Precision.FP32, ComputeType.F32).holds(difference) == (kind is ComputeType.F32)


def test_levels_are_named_after_their_stride() -> None:
    levels = level_slices((256, 320), (8, 16, 32, 64, 128))
    assert list(levels) == ["P3", "P4", "P5", "P6", "P7"]
    assert levels["P4"] == slice(1280, 1280 + 16 * 20)
    assert levels["P7"].stop == 1280 + 320 + 80 + 20 + 6


def smooth_image() -> np.ndarray:
    rng = np.random.default_rng(3)
    coarse = rng.standard_normal((3, 8, 10)).astype(np.float32)
    smooth = np.stack([shifted(np.kron(c, np.ones((8, 8), np.float32))[None], 0.5, 0.5)[0] for c in coarse])
    for _ in range(6):
        smooth = (shifted(smooth, 0.5, 0.5) + shifted(smooth, -0.5, -0.5)) / 2
    return smooth


def test_pixel_causes_are_told_apart() -> None:
    image = smooth_image()
    swapped = pixel_causes(image, np.ascontiguousarray(image[::-1]))
    assert swapped[0].name == "channel-order"
    assert swapped[0].explained > 0.999
    brighter = pixel_causes(image, image + np.float32(0.2))
    assert brighter[0].name == "normalisation"
    moved = pixel_causes(image, shifted(image, 0.5, -0.5))
    assert moved[0].name == "shift"
    assert "+0.5 pixels to the right and -0.5 down" in moved[0].sentence


def test_noise_has_no_cause() -> None:
    image = smooth_image()
    assert pixel_causes(image, image + np.random.default_rng(0).normal(0, 0.1, image.shape).astype(np.float32)) == []


def test_swapped_and_reversed_levels_are_found() -> None:
    levels = level_slices((64, 64), (8, 16, 32))
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((1, levels["P5"].stop, 2))
    for order, sentence in {
        ("P3", "P5", "P4"): "the levels P5 and P4 are swapped",
        ("P5", "P4", "P3"): "the levels come coarsest first",
    }.items():
        moved = np.concatenate([logits[:, levels[name]] for name in order], axis=1)
        (cause,) = level_causes({"cls_logits": logits}, {"cls_logits": moved}, levels)
        assert cause.sentence == sentence
    assert level_causes({"cls_logits": logits}, {"cls_logits": rng.standard_normal(logits.shape)}, levels) == []


def test_an_image_on_another_side_of_its_canvas() -> None:
    canvas = np.zeros((3, 96, 128), np.float32)
    reference, candidate = canvas.copy(), canvas.copy()
    reference[:, :64, :80] = smooth_image()
    candidate[:, 32:, 24:104] = smooth_image()
    (cause,) = padding_causes(reference, candidate, size=(64, 80))
    assert cause.sentence == "the image lies +24 pixels to the right and +32 down: it is padded on another side"
    assert cause.explained > 0.99
    assert padding_causes(reference, reference, size=(64, 80)) == []


def test_classes_in_another_order() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 200, 4))
    names = ["a", "b", "c", "d"]
    (cause,) = class_causes(logits, logits[..., [2, 1, 0, 3]] + 1e-3, names)
    assert cause.sentence.endswith("the channels give 'c' in place of 'a', 'a' in place of 'c'")
    assert class_causes(logits, logits * 1.1, names) == []
    assert class_causes(logits, np.random.default_rng(1).standard_normal((1, 200, 4)), names) == []


@pytest.mark.parametrize(
    ("reference", "candidate", "sentence"),
    [
        (Layer("x", "Relu"), Layer("x", "Exp"), "x: the operator is Exp in place of Relu"),
        (Layer("x", "Conv", {"pads": "1"}), Layer("x", "Conv", {"pads": "0"}), "x: pads is 0 in place of 1"),
        (
            Layer("x", "Mul", {}, {"constant": np.array([8.0])}),
            Layer("x", "Mul", {}, {"constant": np.array([16.0])}),
            "x: the constant is 16 in place of 8",
        ),
        (
            Layer("x", "Conv", {}, {"weights": np.ones(9), "bias": np.ones(8)}),
            Layer("x", "Conv", {}, {"weights": np.ones(9)}),
            "x: the bias of the reference is missing",
        ),
    ],
)
def test_a_layer_says_what_differs(reference: Layer, candidate: Layer, sentence: str) -> None:
    assert layer_causes(reference, candidate, measure_difference(np.ones(3), np.zeros(3)))[0].sentence == sentence


def test_weights_that_the_graph_computes_are_not_missing() -> None:
    mine = Layer("x", "Conv", {}, {"weights": np.ones(9)})
    (cause,) = layer_causes(mine, Layer("x", "Conv", {}, {"weights": None}), measure_difference(np.ones(3), np.ones(3)))
    assert cause.name == "arithmetic"


def test_activation_is_found_from_distances_alone() -> None:
    raw = np.random.default_rng(0).normal(0.5, 1, (1, 50, 4))
    strides = np.full(50, 8, np.float32)
    relu, exp = np.maximum(raw, 0) * 8, np.exp(raw)
    assert activation_causes(relu, exp, strides)[0].sentence == "the box activation is exp in place of relu"
    assert activation_causes(exp, relu, strides)[0].sentence == "the box activation is relu in place of exp"
    assert activation_causes(relu, relu * 1.1, strides) == []


def test_explained_share() -> None:
    zero, two = np.zeros(4), np.full(4, 2.0)
    assert explained(zero, two, two) == 1.0
    assert explained(zero, two, np.ones(4)) == 0.75
    assert explained(zero, two, -two) == -3.0
