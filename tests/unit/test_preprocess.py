"""Preprocessing: each ecosystem's sizes to the pixel, filters, orders, padding, and the way back for boxes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fcos_deploy.core.errors import ConfigError, ImageError, TensorMismatchError
from fcos_deploy.core.preprocess import (
    ChannelOrder,
    InputDtype,
    Letterbox,
    PreprocessSpec,
    ResizeFilter,
    ResizeOrder,
    SizeRule,
    padded_size,
    preprocess,
    resized_size,
)

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CANVAS = PreprocessSpec(mean=MEAN, std=STD, height=64, width=96)
FLOAT_CANVAS = replace(CANVAS, input_dtype=InputDtype.FLOAT32)

# Image size -> torchvision (0.16 and newer), detectron2 and AdelaiDet, mmdetection, tianzhi; edges 800 and 1333.
RULES = (SizeRule.TORCHVISION, SizeRule.DETECTRON2, SizeRule.MMDETECTION, SizeRule.TIANZHI)
SIZES: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {
    (480, 640): ((800, 1066), (800, 1067), (800, 1067), (800, 1066)),
    (427, 640): ((800, 1199), (800, 1199), (800, 1199), (800, 1199)),
    (640, 480): ((1066, 800), (1067, 800), (1067, 800), (1066, 800)),
    (333, 500): ((800, 1201), (800, 1201), (800, 1201), (800, 1201)),
    (375, 500): ((800, 1066), (800, 1067), (800, 1067), (800, 1066)),
    (426, 640): ((800, 1201), (800, 1202), (800, 1202), (800, 1201)),
    (640, 425): ((1204, 800), (1205, 800), (1205, 800), (1204, 800)),
    (640, 428): ((1196, 800), (1196, 800), (1196, 800), (1196, 800)),
    (360, 640): ((749, 1333), (750, 1333), (750, 1333), (750, 1333)),
    (720, 1280): ((749, 1333), (750, 1333), (750, 1333), (750, 1333)),
    (1080, 1920): ((749, 1333), (750, 1333), (750, 1333), (750, 1333)),
    (300, 1000): ((399, 1333), (400, 1333), (400, 1333), (400, 1333)),
    (612, 612): ((800, 800), (800, 800), (800, 800), (800, 800)),
}


def edges(rule: SizeRule, **changes: object) -> PreprocessSpec:
    options = {"shortest": 800, "longest": 1333, "input_dtype": InputDtype.FLOAT32, **changes}
    return PreprocessSpec(mean=MEAN, std=STD, size_rule=rule, **options)  # type: ignore[arg-type]  # the test's own


def noise(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("size", "expected"), SIZES.items())
def test_resized_size_is_the_librarys(size: tuple[int, int], expected: tuple[tuple[int, int], ...]) -> None:
    assert tuple(resized_size(*size, edges(rule)) for rule in RULES) == expected


def test_edges_are_padded_to_the_divisor() -> None:
    assert padded_size(480, 640, edges(SizeRule.MMDETECTION)) == (800, 1088)
    assert padded_size(300, 1000, edges(SizeRule.TORCHVISION)) == (416, 1344)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 96), (64, 96)), ((640, 480), (64, 48)), ((100, 600), (16, 96)), ((1, 10_000), (1, 96)), ((1, 1), (64, 64))],
)
def test_letterbox_keeps_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, CANVAS) == expected
    assert padded_size(*size, CANVAS) == (64, 96)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (5, 9000), (31, 32)])
def test_extreme_shapes_stay_at_least_a_pixel(rule: SizeRule, size: tuple[int, int]) -> None:
    spec = edges(rule, shortest=64, longest=128)
    tensor, box = preprocess(noise(*size), spec)
    assert tensor.shape[1:] == padded_size(*size, spec)
    assert min(box.resized_height, box.resized_width) >= 1
    assert np.isfinite(tensor).all()


@pytest.mark.parametrize(
    ("size", "shortest", "longest"),
    [((97, 130), 150, 300), ((480, 640), 200, 400), ((64, 64), 64, 64), ((3, 50), 9, 99)],
)
def test_torch_filter_is_torchs_interpolation(size: tuple[int, int], shortest: int, longest: int) -> None:
    torch = pytest.importorskip("torch")
    image = noise(*size)
    spec = edges(
        SizeRule.TORCHVISION,
        shortest=shortest,
        longest=longest,
        resize_filter=ResizeFilter.TORCH,
        resize_order=ResizeOrder.NORMALIZE_FIRST,
    )
    tensor, box = preprocess(image, spec)
    normalized = (image.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(normalized.transpose(2, 0, 1).copy())[None],
        size=(box.resized_height, box.resized_width),
        mode="bilinear",
        align_corners=False,
    )[0].numpy()
    content = tensor[:, : box.resized_height, : box.resized_width]
    # White noise is the worst case: torch rounds coordinates to float32. In units of the pixels' range:
    difference = np.abs(content - expected) * np.float32(STD)[:, None, None] / 255
    assert difference.max() < 1e-4
    assert not tensor[:, box.resized_height :].any()
    assert not tensor[:, :, box.resized_width :].any()


def test_order_of_normalizing_and_resizing_matters_only_by_rounding() -> None:
    """Bilinear weights sum to one, so that both orders agree in float32; and cv2's uint8 by half a level."""
    image = noise(90, 120)
    first, after = (
        edges(SizeRule.MMDETECTION, shortest=64, longest=96, resize_filter=ResizeFilter.TORCH, resize_order=order)
        for order in (ResizeOrder.NORMALIZE_FIRST, ResizeOrder.RESIZE_FIRST)
    )
    tensor, _ = preprocess(image, first)
    np.testing.assert_allclose(preprocess(image, after)[0], tensor, atol=1e-5)
    rounded, _ = preprocess(image, replace(after, resize_filter=ResizeFilter.CV2))
    assert 0 < np.abs(rounded - tensor).max() <= 1.0 / min(STD)


def test_pil_filter_is_antialiased_when_shrinking() -> None:
    """A checkerboard of single pixels, halved off the grid: averaged by Pillow, aliased by the others."""
    board = np.repeat((np.indices((96, 96)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    spec = PreprocessSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), height=32, width=32)
    plain, _ = preprocess(board, spec)
    smooth, _ = preprocess(board, replace(spec, resize_filter=ResizeFilter.PIL))
    assert np.ptp(plain) == 255
    assert np.ptp(smooth[:, 2:-2, 2:-2]) < 64


def test_normalizing_needs_pixels() -> None:
    with pytest.raises(ConfigError, match="'pil' works on uint8"):
        edges(SizeRule.DETECTRON2, resize_filter=ResizeFilter.PIL, resize_order=ResizeOrder.NORMALIZE_FIRST)


@pytest.mark.parametrize("order", [ChannelOrder.RGB, ChannelOrder.BGR])
def test_mean_and_std_are_in_channel_order(order: ChannelOrder) -> None:
    image = np.full((64, 96, 3), (200, 100, 50), np.uint8)
    tensor, _ = preprocess(image, replace(FLOAT_CANVAS, channel_order=order))
    pixel = np.float32([200, 100, 50] if order is ChannelOrder.RGB else [50, 100, 200])
    np.testing.assert_allclose(tensor[:, 7, 7], (pixel - np.float32(MEAN)) / np.float32(STD), rtol=1e-6)
    raw, _ = preprocess(image, replace(CANVAS, channel_order=order))
    assert raw[:, 7, 7].tolist() == pixel.tolist()


@pytest.mark.parametrize("resize_filter", ResizeFilter)
def test_gray_is_made_before_resizing_and_is_the_level_of_a_gray_image(resize_filter: ResizeFilter) -> None:
    gray = {"channel_order": ChannelOrder.GRAY, "mean": (110.0,), "std": (50.0,), "resize_filter": resize_filter}
    colours = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    levels = np.asarray(Image.fromarray(colours).convert("L"))
    repeated = np.repeat(levels[:, :, None], 3, 2)
    raw, letterbox = preprocess(colours, replace(CANVAS, **gray))
    assert raw.shape == (1, *CANVAS.canvas)
    assert np.abs(raw.astype(int) - preprocess(repeated, replace(CANVAS, **gray))[0]).max() <= 1  # a rounding of gray
    expected, _ = preprocess(repeated, replace(CANVAS, resize_filter=resize_filter))
    size = letterbox.resized_height, letterbox.resized_width
    np.testing.assert_array_equal(
        preprocess(repeated, replace(CANVAS, **gray))[0][0, : size[0], : size[1]], expected[0, : size[0], : size[1]]
    )
    assert raw[0, -1, -1] == 110
    normalized, _ = preprocess(colours, replace(FLOAT_CANVAS, **gray, pad_pixel=(60.0,)))
    np.testing.assert_allclose(
        normalized[0, : size[0], : size[1]], (raw[0, : size[0], : size[1]] - 110.0) / 50, atol=0.02
    )
    assert normalized[0, -1, -1] == np.float32(-1)
    with pytest.raises(ConfigError, match="mean must have 1 numbers for gray images, got 3"):
        replace(CANVAS, channel_order=ChannelOrder.GRAY)


def test_uint8_padding_is_the_mean_and_float_padding_zero() -> None:
    image = noise(64, 20)
    raw, box = preprocess(image, replace(CANVAS, channel_order=ChannelOrder.BGR))
    assert (box.resized_height, box.resized_width) == (64, 20)
    assert raw[:, 0, 20:].T.tolist() == [[124, 116, 104]] * 76
    normal, _ = preprocess(image, FLOAT_CANVAS)
    assert not normal[:, :, 20:].any()
    # What a uint8 graph makes of its padding is at most half a level from the float graph's zero.
    assert np.abs((raw[:, 0, 20] - np.float32(MEAN)) / np.float32(STD)).max() <= 0.5 / min(STD)


def test_pixel_scale_divides_before_the_mean() -> None:
    spec = PreprocessSpec(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), pixel_scale=255.0, height=32, width=32)
    assert spec.pad_value == (128, 128, 128)
    tensor, _ = preprocess(np.full((32, 32, 3), 255, np.uint8), replace(spec, input_dtype=InputDtype.FLOAT32))
    assert np.unique(tensor).tolist() == [2.0]


@pytest.mark.parametrize("dtype", InputDtype)
def test_every_pixel_of_a_used_slice_is_written(dtype: InputDtype) -> None:
    spec = replace(CANVAS, input_dtype=dtype)
    batch = np.full((2, 3, 64, 96), 77, dtype.value)
    for image in (noise(64, 96), noise(30, 90), noise(90, 30)):
        tensor, _ = preprocess(image, spec, out=batch[1])
        assert tensor.base is batch
        np.testing.assert_array_equal(tensor, preprocess(image, spec)[0])
    assert (batch[0] == 77).all()


def test_a_larger_slice_is_padded() -> None:
    """Images of different sizes in one batch: padded to the largest, as the libraries do."""
    spec = edges(SizeRule.MMDETECTION, shortest=64, longest=128)
    out = np.full((3, 128, 160), 9, np.float32)
    tensor, box = preprocess(noise(64, 100), spec, out=out)
    alone, same_box = preprocess(noise(64, 100), spec)
    assert box == same_box
    np.testing.assert_array_equal(tensor[:, :64, :128], alone)
    assert not tensor[:, 64:].any()
    assert not tensor[:, :, 100:].any()


def test_views_of_any_memory_order_are_read() -> None:
    image = noise(50, 70)
    flipped = image[:, ::-1]
    for spec in (CANVAS, FLOAT_CANVAS, replace(CANVAS, resize_filter=ResizeFilter.PIL)):
        expected, _ = preprocess(np.ascontiguousarray(flipped), spec)
        np.testing.assert_array_equal(preprocess(flipped, spec)[0], expected)
        planes = np.asfortranarray(flipped)
        np.testing.assert_array_equal(preprocess(planes, spec)[0], expected)


def test_image_of_the_right_size_is_not_changed() -> None:
    image = noise(64, 96)
    before = image.copy()
    tensor, _ = preprocess(image, CANVAS)
    np.testing.assert_array_equal(tensor.transpose(1, 2, 0), before)
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(tensor, image)


def test_threads_do_not_share_buffers() -> None:
    images = [noise(40 + 7 * i, 60 + 5 * i, seed=i) for i in range(8)]
    expected = [preprocess(image, CANVAS)[0] for image in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(lambda image: preprocess(image, CANVAS)[0], images)
            for tensor, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(tensor, wanted)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=["gray", "rgba", "float", "empty"],
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"must be uint8\[h, w, 3\]"):
        preprocess(image, CANVAS)


@pytest.mark.parametrize("out", [np.zeros((3, 32, 96), np.uint8), np.zeros((3, 64, 96), np.float32)])
def test_slice_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(TensorMismatchError, match="must be uint8"):
        preprocess(noise(64, 96), CANVAS, out=out)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    rule=st.sampled_from(SizeRule),
    seed=st.integers(0, 2**32 - 1),
)
def test_letterbox_inverts_the_resize(height: int, width: int, rule: SizeRule, seed: int) -> None:
    """Corners of boxes go to the resized image by its two ratios, and back to within float32."""
    fixed = replace(CANVAS, size_rule=rule) if rule in {SizeRule.LETTERBOX, SizeRule.STRETCH} else None
    spec = fixed or edges(rule)
    new_height, new_width = resized_size(height, width, spec)
    box = Letterbox(height, width, new_height, new_width)
    corners = np.random.default_rng(seed).random((20, 4)) * (width, height, width, height)
    resized = corners * (box.scale_x, box.scale_y, box.scale_x, box.scale_y)
    back = box.to_image(resized.astype(np.float32))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, corners, rtol=1e-5, atol=1e-4)
    whole = box.to_image(np.float32([[0, 0, new_width, new_height]]))
    np.testing.assert_allclose(whole, [[0, 0, width, height]], rtol=1e-6)
