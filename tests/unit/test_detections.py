"""Detections are checked when they are made; suppression and postprocessing, against references and by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import (
    PROFILES,
    DecodeSpec,
    HeadOutputs,
    PostprocessProfile,
    best_first,
    decode,
    level_sizes,
)
from fcos_deploy.core.detections import Detections, Suppression, image_sizes_row, postprocess, suppress
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import BackendError, ConfigError, MissingDependencyError, TensorMismatchError
from fcos_deploy.core.preprocess import Letterbox, PreprocessSpec

pytestmark = pytest.mark.usefixtures("host_path")

BOXES = np.float32([[0, 1, 2, 3], [4, 5, 6, 7]])
SCORES = np.float32([0.75, 0.25])
LABELS = np.int64([1, 9])


@pytest.mark.parametrize(
    ("boxes", "scores", "labels"),
    [
        (BOXES.astype(np.float64), SCORES, LABELS),
        (BOXES, SCORES.astype(np.float16), LABELS),
        (BOXES, SCORES, LABELS.astype(np.int32)),
        (BOXES[:1], SCORES, LABELS),
        (BOXES[:, :3], SCORES, LABELS),
        (BOXES, SCORES[:, None], LABELS),
        (BOXES, SCORES, LABELS[:1]),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"must be float32\[n, 4\], float32\[n\] and int64\[n\], got"):
        Detections(boxes, scores, labels)


def test_above_includes_the_score_itself() -> None:
    found = Detections(BOXES, SCORES, LABELS)
    assert len(found) == 2
    assert found.above(0.25).labels.tolist() == [1, 9]
    assert found.above(0.2500001).boxes.tolist() == [[0, 1, 2, 3]]
    assert len(found.above(0.9)) == 0


def test_list_for_json_names_what_it_can() -> None:
    found = Detections(BOXES, SCORES, LABELS).to_list(("red", "white"))
    assert json.loads(json.dumps(found)) == [
        {"box": [0.0, 1.0, 2.0, 3.0], "score": 0.75, "label": 1, "name": "white"},
        {"box": [4.0, 5.0, 6.0, 7.0], "score": 0.25, "label": 9, "name": "9"},
    ]


def test_supervision_gets_the_same_boxes_and_names() -> None:
    """Where it is not installed, the way to get it is said."""
    detections = Detections(np.float32([[1, 2, 30, 40]]), np.float32([0.75]), np.int64([1]))
    try:
        import supervision
    except ModuleNotFoundError:
        with pytest.raises(MissingDependencyError) as refused:
            detections.to_supervision(("red", "white"))
        assert refused.value.hint == "pip install supervision"
        return
    result = detections.to_supervision(("red", "white"))
    assert isinstance(result, supervision.Detections)
    assert np.array_equal(result.xyxy, detections.boxes)
    assert (result.confidence.tolist(), result.class_id.tolist()) == ([0.75], [1])
    assert result.data["class_name"].tolist() == ["white"]


# ---- suppression ----


def plain_iou(a: list[float], b: list[float], *, offset: float) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(width, 0.0) * max(height, 0.0)
    area_a, area_b = ((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    union = area_a + area_b - inter
    return inter / union if union > 0 else 0.0


def plain_suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, rule: Suppression) -> list[int]:
    corners = boxes.astype(float).tolist()
    kept: list[int] = []
    for index in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        overlaps = (
            plain_iou(corners[index], corners[k], offset=rule.iou_offset) for k in kept if labels[k] == labels[index]
        )
        if not any(iou > rule.iou_threshold for iou in overlaps):
            kept.append(index)
    if len(kept) > rule.limit:
        last = scores[kept[rule.limit - 1]]
        kept = [k for k in kept if scores[k] >= last] if rule.keep_ties else kept[: rule.limit]
    return kept


def random_boxes(count: int, *, seed: int, spread: float = 200.0, whole: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, spread, (count, 2))
    boxes = np.concatenate((corner, corner + rng.uniform(0, 80, (count, 2))), axis=1)
    return (boxes.round() if whole else boxes).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(0, 420),
    classes=st.sampled_from([1, 2, 5, 80]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([5.0, 60.0, 400.0]),
    whole=st.booleans(),
    levels=st.sampled_from([0, 3, 10]),
    threshold=st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.95, 1.0]),
    offset=st.sampled_from([0.0, 1.0]),
    limit=st.sampled_from([1, 7, 100, 1000]),
    keep_ties=st.booleans(),
)
def test_same_as_plain_greedy_suppression(
    count: int,
    classes: int,
    seed: int,
    spread: float,
    whole: bool,
    levels: int,
    threshold: float,
    offset: float,
    limit: int,
    keep_ties: bool,
) -> None:
    """Few distinct scores and whole coordinates make ties and overlaps of exactly the threshold frequent."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(count, seed=seed, spread=spread, whole=whole)
    scores = rng.random(count).astype(np.float32)
    if levels:
        scores = (scores * levels).round().astype(np.float32) / np.float32(levels)
    labels = rng.integers(0, classes, count)
    rule = Suppression(iou_threshold=threshold, limit=limit, iou_offset=offset, keep_ties=keep_ties)
    found = suppress(boxes, scores, labels=labels, rule=rule)
    assert found.tolist() == plain_suppress(boxes, scores, labels, rule)


def test_long_chain_over_several_blocks() -> None:
    """Each box overlaps the next one only, so that every second stays; which ones, hangs on all before."""
    left = np.arange(1000, dtype=np.float32) * 10
    boxes = np.stack((left, np.zeros(1000), left + 15, np.full(1000, 10.0)), axis=1).astype(np.float32)
    scores = np.linspace(1, 0.1, 1000, dtype=np.float32)
    rule = Suppression(iou_threshold=0.15, limit=1000)  # they overlap by 5 / 25
    kept = suppress(boxes, scores, labels=np.zeros(1000, np.int64), rule=rule)
    assert kept.tolist() == list(range(0, 1000, 2))


def test_overlap_of_exactly_the_threshold_stays() -> None:
    # 3 of 5 pixels in common: 0.6, which float32 rounds up.
    boxes = np.float32([[0, 0, 4, 1], [1, 0, 5, 1]])
    rule = Suppression(iou_threshold=0.6, limit=10)
    assert suppress(boxes, np.float32([0.9, 0.8]), labels=np.int64([0, 0]), rule=rule).tolist() == [0, 1]


def test_offset_counts_pixels_as_tianzhi_does() -> None:
    # Without the offset 8 / 12, with it 9 * 2 / (11 * 2 + 11 * 2 - 9 * 2) = 18 / 26.
    boxes = np.float32([[0, 0, 10, 1], [2, 0, 12, 1]])
    scores, labels = np.float32([0.9, 0.8]), np.int64([0, 0])
    plain, counted = (Suppression(iou_threshold=0.68, limit=10, iou_offset=o) for o in (0.0, 1.0))
    assert suppress(boxes, scores, labels=labels, rule=plain).tolist() == [0, 1]
    assert suppress(boxes, scores, labels=labels, rule=counted).tolist() == [0]


def test_far_apart_coordinates_do_not_cost_precision() -> None:
    """The offset trick adds label * max_coordinate, which moves borderline overlaps; this must not happen here."""
    base = np.float32([[1000, 1000, 1010.001, 1010.001], [1000.002, 1000, 1010.003, 1010.001]])
    boxes = np.concatenate((base, base, np.float32([[0, 0, 60000, 60000]])))
    labels = np.int64([0, 0, 79, 79, 5])
    scores = np.float32([0.9, 0.8, 0.7, 0.6, 0.5])
    rule = Suppression(iou_threshold=0.9998, limit=10)
    assert suppress(boxes, scores, labels=labels, rule=rule).tolist() == plain_suppress(boxes, scores, labels, rule)


def test_boxes_without_area_overlap_nothing() -> None:
    boxes = np.float32([[3, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]])
    rule = Suppression(iou_threshold=0.1, limit=10)
    kept = suppress(boxes, np.float32([0.9, 0.8, 0.7]), labels=np.int64([0, 0, 0]), rule=rule)
    assert kept.tolist() == [0, 1, 2]


def test_ties_with_the_last_one_stay_on_request() -> None:
    boxes = random_boxes(5, seed=1, spread=10_000)
    scores, labels = np.float32([0.9, 0.5, 0.5, 0.5, 0.4]), np.zeros(5, np.int64)
    cut, tied = (Suppression(iou_threshold=0.5, limit=2, keep_ties=k) for k in (False, True))
    assert suppress(boxes, scores, labels=labels, rule=cut).tolist() == [0, 1]
    assert suppress(boxes, scores, labels=labels, rule=tied).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("limit", [None, 1, 10, 499, 500, 900])
def test_best_first_is_stable(limit: int | None) -> None:
    scores = np.random.default_rng(0).integers(0, 20, 500).astype(np.float32) / 7
    expected = np.argsort(-scores, kind="stable")[:limit]
    assert best_first(scores, limit=limit).tolist() == expected.tolist()


# ---- postprocessing ----

SIZE = (64, 96)
BOX = Letterbox(image_height=120, image_width=180, resized_height=60, resized_width=90)
CLASSES = 5


def contract(profile: PostprocessProfile, *, tail: Tail = Tail.RAW, **decode_options: object) -> ModelContract:
    options = {"score_threshold": 0.2, "iou_threshold": 0.5, "max_detections": 20, **decode_options}
    return ModelContract(
        class_names=tuple("abcde"),
        preprocess=PreprocessSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), height=SIZE[0], width=SIZE[1]),
        decode=DecodeSpec(profile=profile, **options),  # type: ignore[arg-type]  # the test's own
        tail=tail,
    )


def raw_outputs(*, seed: int = 0, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    count = sum(h * w for h, w in level_sizes(*SIZE, strides=(8, 16, 32, 64, 128)))
    return {
        "cls_logits": rng.normal(-1.0, 1.5, (batch, count, CLASSES)).astype(np.float32),
        "distances": rng.uniform(0, 30, (batch, count, 4)).astype(np.float32),
        "centerness": rng.normal(0.5, 1.0, (batch, count, 1)).astype(np.float32),
    }


def candidate_outputs(raw: dict[str, np.ndarray], spec: DecodeSpec, *, index: int) -> dict[str, np.ndarray]:
    """What a graph with the candidates tail gives, made from the raw outputs: fixed size, -1 where nothing passed."""
    head = HeadOutputs(*(raw[name][index] for name in ("cls_logits", "distances", "centerness")))
    found = decode(head, spec, input_size=SIZE)
    total = len(found.scores) + 50
    outputs = {
        "boxes": np.full((index + 1, total, 4), 33, np.float32),
        "scores": np.full((index + 1, total), -1, np.float32),
        "labels": np.zeros((index + 1, total), np.int32),
    }
    # The graph leaves gaps where a level has fewer passing pairs than its share.
    places = np.sort(np.random.default_rng(1).permutation(total)[: len(found.scores)])
    outputs["boxes"][index, places] = found.boxes
    outputs["scores"][index, places] = found.scores
    outputs["labels"][index, places] = found.channels
    return outputs


def nms_outputs(expected: Detections, *, limit: int) -> dict[str, np.ndarray]:
    """What a graph with the nms tail gives: padded, in network-input pixels."""
    scale = np.float32([BOX.scale_x, BOX.scale_y, BOX.scale_x, BOX.scale_y])
    outputs = {
        "boxes": np.zeros((1, limit, 4), np.float32),
        "scores": np.zeros((1, limit), np.float32),
        "labels": np.full((1, limit), -1, np.int32),
        "num_detections": np.full((1, 1), len(expected), np.int32),
    }
    outputs["boxes"][0, : len(expected)] = expected.boxes * scale
    outputs["scores"][0, : len(expected)] = expected.scores
    outputs["labels"][0, : len(expected)] = expected.labels
    return outputs


def run(outputs: dict[str, np.ndarray], of: ModelContract, *, index: int = 0, letterbox: Letterbox = BOX) -> Detections:
    return postprocess(outputs, of, index=index, input_size=SIZE, letterbox=letterbox)


def assert_same(found: Detections, expected: Detections, *, atol: float = 0.0) -> None:
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=atol)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("index", [0, 1])
def test_candidates_tail_gives_what_the_raw_tail_gives(name: str, index: int) -> None:
    raw, of = raw_outputs(), contract(PROFILES[name])
    expected = run(raw, of, index=index)
    found = run(candidate_outputs(raw, of.decode, index=index), replace(of, tail=Tail.CANDIDATES), index=index)
    assert len(expected) >= 15
    assert_same(found, expected)


@pytest.mark.parametrize("name", PROFILES)
def test_nms_tail_gives_what_the_raw_tail_gives(name: str) -> None:
    of = contract(PROFILES[name])
    expected = run(raw_outputs(), of)
    found = run(nms_outputs(expected, limit=20), replace(of, tail=Tail.NMS))
    assert_same(found, expected, atol=1e-4)


def test_half_precision_outputs_give_float32_detections() -> None:
    raw = {name: array.astype(np.float16) for name, array in raw_outputs().items()}
    of = contract(PROFILES["detectron2"])
    widened = {name: array.astype(np.float32) for name, array in raw.items()}
    assert_same(run(raw, of), run(widened, of))


@pytest.mark.parametrize("tail", Tail)
def test_detections_do_not_share_memory_with_outputs(tail: Tail) -> None:
    """Runtimes overwrite their output buffers with the next image."""
    of = contract(PROFILES["mmdetection"])
    raw = raw_outputs()
    same_size = Letterbox(*SIZE, *SIZE)
    outputs = {
        Tail.RAW: raw,
        Tail.CANDIDATES: candidate_outputs(raw, of.decode, index=0),
        Tail.NMS: nms_outputs(run(raw, of), limit=20),
    }[tail]
    found = run(outputs, replace(of, tail=tail), letterbox=same_size)
    for array in (found.boxes, found.scores, found.labels):
        assert not any(np.shares_memory(array, output) for output in outputs.values())


def test_labels_are_mapped() -> None:
    of = contract(PROFILES["torchvision"])
    plain = run(raw_outputs(), of)
    mapped = run(raw_outputs(), contract(PROFILES["torchvision"], label_map=(1, 3, 5, 7, 90)))
    assert mapped.labels.tolist() == [(1, 3, 5, 7, 90)[label] for label in plain.labels]


def one_box(profile: str, *, distances: tuple[float, ...], letterbox: Letterbox = BOX, **options: object) -> Detections:
    """One candidate, at the first location, whose centre is (4, 4), or (0, 0) for torchvision."""
    raw = raw_outputs(batch=1)
    raw["cls_logits"][:] = -20
    raw["cls_logits"][0, 0, 3] = 4
    raw["distances"][0, 0] = distances
    return run(raw, contract(PROFILES[profile], **options), letterbox=letterbox)


def test_clips_of_each_profile() -> None:
    """A box of 8 px around everything; the image is 120x180 and was halved to 60x90."""
    around = (12.0, 12.0, 95.0, 70.0)  # beyond the resized image on all sides
    assert one_box("torchvision", distances=around).boxes.tolist() == [[0, 0, 180, 120]]
    assert one_box("mmdetection", distances=around).boxes.tolist() == [[0, 0, 180, 120]]
    assert one_box("tianzhi", distances=around).boxes.tolist() == [[0, 0, 178, 118]]
    assert one_box("detectron2", distances=around).boxes.tolist() == [[0, 0, 180, 120]]


def test_torchvision_does_not_clip_after_rescaling() -> None:
    """A factor that is not exact in float32 may leave the image by its rounding, as in the library."""
    found = one_box("torchvision", distances=(0, 0, 95, 70), letterbox=Letterbox(457, 700, 60, 90))
    factor = np.float32(700) / np.float32(90)
    assert found.boxes[0, 2] == np.float32(90) * factor


@pytest.mark.parametrize(("profile", "stays"), [("torchvision", True), ("mmdetection", False), ("detectron2", False)])
def test_box_that_lies_on_padding(profile: str, stays: bool) -> None:
    """torchvision keeps boxes without area; mmdetection drops them before, detectron2 after suppression."""
    raw = raw_outputs(batch=1)
    raw["cls_logits"][:] = -20
    raw["cls_logits"][0, 11, 3] = 4  # centre at x = 88 or 92
    raw["distances"][0, 11] = (0, 3, 3, 3)
    found = run(raw, contract(PROFILES[profile]), letterbox=Letterbox(64, 80, 64, 80))
    assert len(found) == int(stays)
    if stays:
        assert found.boxes[0, 0] == found.boxes[0, 2] == 80


def test_overlaps_in_image_pixels_differ_from_those_in_input_pixels_after_clipping_only() -> None:
    """Anisotropic scaling leaves IoU unchanged; the box filter before suppression sees the image's pixels."""
    raw = raw_outputs(batch=1)
    uneven = Letterbox(600, 96, 60, 96)
    mmdet = run(raw, contract(PROFILES["mmdetection"]), letterbox=uneven)
    as_input = replace(PROFILES["mmdetection"], nms_space=PROFILES["torchvision"].nms_space)
    assert_same(mmdet, run(raw, contract(as_input), letterbox=uneven), atol=1e-3)


def test_survivors_of_tianzhi_keep_their_level_order() -> None:
    raw = raw_outputs(batch=1)
    found = run(raw, contract(PROFILES["tianzhi"]))
    sorted_profile = replace(PROFILES["tianzhi"], sort_by_score=True)
    by_score = run(raw, contract(sorted_profile))
    assert not (np.diff(found.scores) <= 0).all()
    assert (np.diff(by_score.scores) <= 0).all()
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(map(tuple, by_score.boxes.tolist()))


def test_survivors_of_tianzhi_come_by_location_and_then_class() -> None:
    """As its ``nonzero`` lists them, whatever their scores."""
    cls_logits = np.full((48, 2), -9.0, np.float32)
    cls_logits[[5, 5, 20], [1, 0, 0]] = [2.0, 1.0, 3.0]
    distances = np.full((48, 4), 3.0, np.float32)
    raw = {"cls_logits": cls_logits[None], "distances": distances[None], "centerness": np.ones((1, 48, 1), np.float32)}
    decode = DecodeSpec(profile=PROFILES["tianzhi"], strides=(8,), score_threshold=0.05, iou_threshold=0.6)
    tianzhi = replace(contract(PROFILES["tianzhi"]), decode=decode)
    found = postprocess(raw, tianzhi, index=0, input_size=(48, 64), letterbox=Letterbox(48, 64, 48, 64))
    assert found.labels.tolist() == [0, 1, 0]
    assert found.boxes[:, 0].tolist() == [41.0, 41.0, 33.0]


def test_limit_is_of_the_best_even_in_level_order() -> None:
    raw = raw_outputs(batch=1)
    many = run(raw, contract(PROFILES["tianzhi"], max_detections=1000))
    few = run(raw, contract(PROFILES["tianzhi"], max_detections=5))
    assert sorted(few.scores.tolist(), reverse=True) == sorted(many.scores.tolist(), reverse=True)[:5]


def test_offset_of_the_profile_reaches_suppression() -> None:
    raw = raw_outputs(batch=1, seed=3)
    of = contract(PROFILES["tianzhi"], max_detections=1000)
    head = HeadOutputs(*(raw[name][0] for name in ("cls_logits", "distances", "centerness")))
    found = decode(head, of.decode, input_size=SIZE)
    clipped = found.boxes.clip(0, np.float32([89, 59, 89, 59]))
    rule = Suppression(iou_threshold=0.5, limit=1000, iou_offset=1.0, keep_ties=True)
    kept = np.sort(suppress(clipped, found.scores, labels=found.channels, rule=rule))
    np.testing.assert_array_equal(run(raw, of).boxes, BOX.to_image(clipped[kept]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["cls_logits", "distances", "centerness"])
def test_an_output_that_is_not_finite_is_refused_by_name_and_place(
    name: str, value: float, dtype: type[np.floating[Any]]
) -> None:
    """A NaN passes no threshold, so that a broken engine would look like an empty image."""
    raw = {key: array.astype(dtype) for key, array in raw_outputs(batch=1).items()}
    of = contract(PROFILES["torchvision"])
    run(raw, of)
    raw[name][0, 5, 0] = value
    with pytest.raises(BackendError, match=rf"'{name}' of image 0 is not finite: 1 of .* is {value} at \[5, 0\]"):
        run(raw, of)


def test_nothing_found() -> None:
    raw = raw_outputs(batch=1)
    raw["cls_logits"][:] = -30
    for name in PROFILES:
        found = run(raw, contract(PROFILES[name]))
        assert found.boxes.shape == (0, 4)
        assert found.labels.dtype == np.int64


def test_missing_output_is_named() -> None:
    raw = raw_outputs()
    del raw["centerness"]
    with pytest.raises(TensorMismatchError, match="'centerness'"):
        run(raw, contract(PROFILES["torchvision"]))


def test_outputs_that_do_not_belong_together_are_refused() -> None:
    of = contract(PROFILES["torchvision"], tail=Tail.CANDIDATES)
    outputs = {"boxes": np.zeros((1, 5, 4)), "scores": np.zeros((1, 6)), "labels": np.zeros((1, 5), np.int32)}
    with pytest.raises(TensorMismatchError, match="boxes"):
        run(outputs, of)


@pytest.mark.parametrize("count", [-1, 21])
def test_impossible_count_is_refused(count: int) -> None:
    outputs = nms_outputs(run(raw_outputs(), contract(PROFILES["torchvision"])), limit=20)
    outputs["num_detections"][:] = count
    with pytest.raises(TensorMismatchError, match=r"must be in 0\.\.20"):
        run(outputs, contract(PROFILES["torchvision"], tail=Tail.NMS))


def test_row_of_image_sizes() -> None:
    row = image_sizes_row(BOX)
    assert row.dtype == np.float32
    assert row.tolist() == [60, 90, 120, 180]
