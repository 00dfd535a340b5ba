"""The tails in PyTorch choose what the host chooses from the raw outputs, for every ecosystem's post-processing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fcos_deploy.core.contract import ModelContract  # noqa: E402
from fcos_deploy.core.decode import PROFILES, DecodeSpec, level_sizes, location_centers  # noqa: E402
from fcos_deploy.core.detections import (  # noqa: E402
    Detections,
    image_sizes_row,
    postprocess,
)
from fcos_deploy.core.enums import (  # noqa: E402
    CenterMode,
    Tail,
)
from fcos_deploy.core.errors import ConfigError  # noqa: E402
from fcos_deploy.core.preprocess import (  # noqa: E402
    InputDtype,
    Letterbox,
    PreprocessSpec,
    ResizeOrder,
    SizeRule,
)
from fcos_deploy.model.fcos import LevelOutput  # noqa: E402
from fcos_deploy.model.tails import (  # noqa: E402
    Candidates,
    ExportableFcos,
    StaticNms,
    Survivors,
    decode_boxes,
    greedy_nms,
)

SIZE = (160, 224)  # P6 is 3x4 and P7 2x2: torchvision's grid steps are not the strides there
STRIDES = (8, 16, 32, 64, 128)
CLASSES = 5
LETTERBOXES = (Letterbox(301, 517, 125, 215), Letterbox(90, 70, 160, 124))


class _Head(torch.nn.Module):
    """In place of a network: outputs of two images, drawn once, with scores on both sides of every threshold."""

    def __init__(self, seed: int, *, confidence: float = -1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.levels = []
        for (rows, columns), stride in zip(level_sizes(*SIZE, strides=STRIDES), STRIDES, strict=True):
            shape = (2, CLASSES, rows, columns)
            cls = torch.randn(shape, generator=generator) * 2 + confidence
            distances = torch.rand((2, 4, rows, columns), generator=generator) * 3 * stride
            centerness = torch.randn((2, 1, rows, columns), generator=generator)
            self.levels.append(LevelOutput(cls, distances, centerness))

    def forward(self, _images: object) -> list[LevelOutput]:
        return self.levels


def _contract(profile: str, tail: Tail, **decode: object) -> ModelContract:
    spec = PreprocessSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), pixel_scale=255.0, height=SIZE[0], width=SIZE[1])
    options = {"score_threshold": 0.2, "iou_threshold": 0.5, "max_detections": 40, "pre_nms_top_k": 150, **decode}
    return ModelContract(
        class_names=tuple("abcde"), preprocess=spec, decode=DecodeSpec(profile=PROFILES[profile], **options), tail=tail
    )


def _outputs(head: torch.nn.Module, contract: ModelContract, **options: object) -> dict[str, np.ndarray]:
    module = ExportableFcos(head, contract, **options).eval()
    feeds = [torch.zeros((2, 3, *SIZE), dtype=torch.uint8)]
    if contract.needs_image_sizes:
        feeds.append(torch.from_numpy(np.stack([image_sizes_row(box) for box in LETTERBOXES])))
    with torch.no_grad():
        return {name: t.numpy() for name, t in zip(module.output_names, module(*feeds), strict=True)}


def _detections(outputs: dict[str, np.ndarray], contract: ModelContract) -> Iterator[Detections]:
    for index, letterbox in enumerate(LETTERBOXES):
        yield postprocess(outputs, contract, index=index, input_size=SIZE, letterbox=letterbox)


def _assert_same(detections: Detections, expected: Detections) -> None:
    assert detections.labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(detections.scores, expected.scores, rtol=0, atol=1e-6)
    np.testing.assert_allclose(detections.boxes, expected.boxes, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize(
    ("tail", "options"),
    [
        (Tail.CANDIDATES, {}),
        (Tail.NMS, {}),
        (Tail.NMS, {"suppression": StaticNms(boxes=3000)}),
    ],
    ids=["candidates", "nms", "static-nms"],
)
def test_tail_selects_what_the_host_selects(profile: str, tail: Tail, options: dict[str, object], seed: int) -> None:
    head = _Head(seed)
    raw, contract = _contract(profile, Tail.RAW), _contract(profile, tail)
    expected = list(_detections(_outputs(head, raw), raw))
    detections = list(_detections(_outputs(head, contract, **options), contract))
    assert all(len(w) >= 20 for w in expected)
    for left, right in zip(detections, expected, strict=True):
        _assert_same(left, right)


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("tail", [Tail.CANDIDATES, Tail.NMS])
def test_tail_of_an_empty_image_is_empty(profile: str, tail: Tail) -> None:
    contract = _contract(profile, tail)
    assert [len(d) for d in _detections(_outputs(_Head(0, confidence=-40.0), contract), contract)] == [0, 0]


def test_padding_of_nms_is_zeros_with_label_minus_one() -> None:
    outputs = _outputs(_Head(0, confidence=-5.0), _contract("torchvision", Tail.NMS, score_threshold=0.5))
    count = int(outputs["num_detections"][0, 0])
    assert 0 < count < 40
    assert (outputs["labels"][0, :count] >= 0).all()
    assert (outputs["labels"][0, count:] == -1).all()
    assert not outputs["scores"][0, count:].any()
    assert not outputs["boxes"][0, count:].any()


def test_candidates_have_fixed_shape_and_are_ranked_within_a_level() -> None:
    outputs = _outputs(_Head(0), _contract("torchvision", Tail.CANDIDATES))
    per_level = [min(150, rows * columns * CLASSES) for rows, columns in level_sizes(*SIZE, strides=STRIDES)]
    assert outputs["boxes"].shape == (2, sum(per_level), 4)
    assert outputs["labels"].dtype == np.int32
    for scores in np.split(outputs["scores"][0], np.cumsum(per_level)[:-1]):
        assert (np.diff(scores) <= 0).all()
        assert ((scores == -1) | (scores > 0.2)).all()


def test_detections_stop_at_the_limit_even_with_fewer_candidates_than_that() -> None:
    few = _contract("torchvision", Tail.NMS, pre_nms_top_k=2, max_detections=60)
    outputs = _outputs(_Head(0), few)
    assert outputs["scores"].shape == (2, 60)
    assert outputs["num_detections"][0, 0] <= 10


@pytest.mark.parametrize("mode", list(CenterMode))
def test_decoded_boxes_lie_on_the_locations_of_the_core(mode: CenterMode) -> None:
    head = _Head(0)
    boxes = torch.cat(
        [decode_boxes(o, SIZE, stride=s, mode=mode) for o, s in zip(head.levels, STRIDES, strict=True)], 1
    )
    distances = torch.cat([o.distances.flatten(2) for o in head.levels], 2).transpose(1, 2).numpy()
    centers = location_centers(*SIZE, strides=STRIDES, mode=mode)
    expected = np.concatenate([centers - distances[0, :, :2], centers + distances[0, :, 2:]], 1)
    assert np.array_equal(boxes[0].numpy(), expected)


def test_pixels_are_normalised_in_the_graph() -> None:
    contract = _contract("torchvision", Tail.RAW)
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    normalised = ExportableFcos(_Head(0), contract).normalize(pixels).flatten()
    expected = (np.array([0, 128, 255]) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-6)


def test_float_input_is_taken_as_it_is() -> None:
    spec = PreprocessSpec(
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        shortest=160,
        longest=224,
        size_rule=SizeRule.TORCHVISION,
        resize_order=ResizeOrder.NORMALIZE_FIRST,
        input_dtype=InputDtype.FLOAT32,
    )
    contract = _contract("torchvision", Tail.RAW).with_preprocess(spec)
    images = torch.randn(1, 3, 4, 4)
    assert torch.equal(ExportableFcos(_Head(0), contract).normalize(images), images)


@pytest.mark.parametrize("top_k", [7, 150, 100_000])
@pytest.mark.parametrize("tail", list(Tail))
@pytest.mark.parametrize("profile", list(PROFILES))
def test_outputs_have_the_shapes_that_the_contract_says(profile: str, tail: Tail, top_k: int) -> None:
    def keep_all(candidates: Candidates, **_: object) -> Survivors:  # which suppression is no matter of shapes
        return Survivors(candidates.scores > 0, candidates.scores[:, :1] < 2)

    contract = _contract(profile, tail, pre_nms_top_k=top_k)
    outputs = _outputs(_Head(0), contract, suppression=keep_all)
    assert tuple(outputs) == contract.outputs
    for spec in contract.output_specs:
        spec.check(outputs[spec.name])


@pytest.mark.parametrize(
    ("profile", "expected"), [("torchvision", True), ("mmdetection2", True), ("detectron2", False)]
)
def test_image_sizes_are_an_input_only_where_the_profile_needs_them(profile: str, expected: bool) -> None:
    assert _contract(profile, Tail.NMS).needs_image_sizes is expected
    assert not _contract(profile, Tail.CANDIDATES).needs_image_sizes


def test_nms_without_the_image_sizes_it_needs_is_refused() -> None:
    module = ExportableFcos(_Head(0), _contract("torchvision", Tail.NMS))
    with pytest.raises(ConfigError, match="image pixels"):
        module(torch.zeros((2, 3, *SIZE), dtype=torch.uint8))


def _random_candidates(seed: int, *, count: int = 300, classes: int = 3) -> Candidates:
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
def test_static_nms_equals_greedy_suppression(seed: int, threshold: float) -> None:
    candidates = _random_candidates(seed)
    expected = greedy_nms(candidates, iou_threshold=threshold, limit=300)
    assert 10 < expected.keep.sum() < (candidates.scores > 0).sum()
    static = StaticNms(boxes=300)(candidates, iou_threshold=threshold, limit=300)
    assert static.settled.all()
    assert torch.equal(static.keep, expected.keep)


@pytest.mark.parametrize("links", [2, 9, 24, 33, 34, 60, 300])
def test_a_chain_that_does_not_settle_says_so(links: int) -> None:
    """A round a link, and one that proves it; blocks of 125 begin anew."""
    candidates = _chain(links)
    expected = greedy_nms(candidates, iou_threshold=0.4, limit=links)
    assert expected.keep[0].tolist() == [i % 2 == 0 for i in range(links)]
    static = StaticNms()(candidates, iou_threshold=0.4, limit=links)
    assert bool(static.settled) is (links <= 33)
    assert torch.equal(static.keep, expected.keep) or not static.settled
    exact = StaticNms(rounds=124)(candidates, iou_threshold=0.4, limit=links)
    assert exact.settled
    assert torch.equal(exact.keep, expected.keep)


def test_two_objects_with_more_candidates_than_the_static_nms_looks_at_say_so() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]).repeat_interleave(750, 0)[None]
    candidates = Candidates(boxes, torch.linspace(0.9, 0.5, 1500)[None], torch.zeros((1, 1500), dtype=torch.int64), 1)
    seen = {size: StaticNms(boxes=size)(candidates, iou_threshold=0.6, limit=100) for size in (500, 1000, 1500)}
    assert {size: (int(s.keep.sum()), bool(s.settled)) for size, s in seen.items()} == {
        500: (1, False),
        1000: (2, False),  # There may have been a third object.
        1500: (2, True),
    }
    assert StaticNms(boxes=500)(candidates, iou_threshold=0.6, limit=1).settled  # The best one is.


@pytest.mark.parametrize(
    ("tail", "decode", "size", "hint"),
    [
        (Tail.CANDIDATES, {"pre_nms_top_k": 3841}, (800, 800), "--pre-nms-top-k 3840"),
        (Tail.NMS, {"pre_nms_top_k": 50_000}, (800, 800), "--tail raw"),
        (Tail.NMS, {"max_detections": 3841}, SIZE, "--max-detections 3840"),
    ],
)
def test_what_a_tail_has_no_room_for_is_refused(
    tail: Tail, decode: dict[str, int], size: tuple[int, int], hint: str
) -> None:
    contract = _contract("torchvision", tail, **decode)
    contract = contract.with_preprocess(replace(contract.preprocess, height=size[0], width=size[1]))
    with pytest.raises(ConfigError, match="at most 3840") as caught:
        ExportableFcos(_Head(0), contract)
    assert hint in caught.value.hint
    ExportableFcos(_Head(0), replace(contract, tail=Tail.RAW))


def test_more_detections_than_the_static_nms_looks_at_are_refused() -> None:
    with pytest.raises(ConfigError, match="looks at the 1000 best candidates, 1200 detections") as caught:
        StaticNms()(_random_candidates(0, count=1500), iou_threshold=0.5, limit=1200)
    assert "--nms-boxes" in caught.value.hint
    assert StaticNms()(_random_candidates(0, count=900), iou_threshold=0.5, limit=1200).settled.all()


def test_only_the_best_boxes_take_part_in_static_nms() -> None:
    candidates = _chain(6)
    kept = StaticNms(boxes=3, rounds=8)(candidates, iou_threshold=0.4, limit=3).keep
    assert kept[0].tolist() == [True, False, True, False, False, False]


def test_candidates_that_failed_the_gate_neither_survive_nor_suppress() -> None:
    candidates = _chain(3)
    candidates.scores[0, 0] = -1.0
    assert StaticNms()(candidates, iou_threshold=0.4, limit=10).keep[0].tolist() == [False, True, False]


def test_empty_boxes_are_kept_like_the_reference_keeps_them() -> None:
    boxes = torch.tensor([[[5.0, 5, 5, 5], [5, 5, 5, 5]]])
    candidates = Candidates(boxes, torch.tensor([[0.9, 0.8]]), torch.zeros((1, 2), dtype=torch.int64), 1)
    expected = greedy_nms(candidates, iou_threshold=0.5, limit=2)
    assert torch.equal(StaticNms()(candidates, iou_threshold=0.5, limit=2).keep, expected.keep)


@pytest.mark.parametrize("options", [{"boxes": 0}, {"boxes": 3841}, {"rounds": 0}])
def test_impossible_bounds_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="Static NMS takes"):
        StaticNms(**options)
