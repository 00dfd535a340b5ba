"""Pictures with boxes and labels."""

from __future__ import annotations

import numpy as np
import pytest

from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.detector.draw import DrawOptions, class_color, draw_detections

GRAY = np.full((200, 300, 3), 128, np.uint8)


def detections(*boxes: tuple[float, ...], labels: tuple[int, ...] | None = None) -> Detections:
    count = len(boxes)
    return Detections(
        np.float32(boxes).reshape(-1, 4),
        np.linspace(0.9, 0.5, count, dtype=np.float32),
        np.int64(labels if labels is not None else [0] * count),
    )


def changed(image: np.ndarray) -> np.ndarray:
    return (image != GRAY).any(axis=2)


def colored(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return (image == np.uint8(color)).all(axis=2)


def test_box_is_drawn_in_the_color_of_its_class_on_a_copy() -> None:
    before = GRAY.copy()
    image = draw_detections(GRAY, detections((50, 60, 150, 160), labels=(4,)), options=DrawOptions(show_labels=False))
    np.testing.assert_array_equal(GRAY, before)
    color = class_color(4)
    assert image[60, 100].tolist() == image[160, 100].tolist() == list(color)
    assert image[110, 50].tolist() == image[110, 150].tolist() == list(color)
    assert (image[100:120, 90:110] == 128).all()


@pytest.mark.parametrize(
    "box", [(-50, -50, 30, 30), (290, 190, 400, 300), (0, 0, 299, 199), (-500, 90, -400, 95), (10, 2, 60, 50)]
)
def test_labels_lie_inside_the_image(box: tuple[float, ...]) -> None:
    """As much of the label's background is visible as for a box in the middle."""
    middle = draw_detections(GRAY, detections((100, 100, 140, 130)), ["cell"], options=DrawOptions(line_width=1))
    image = draw_detections(GRAY, detections(box), ["cell"], options=DrawOptions(line_width=1))
    rows = np.flatnonzero(colored(middle, class_color(0)).sum(axis=1) > 45)
    found = np.flatnonzero(colored(image, class_color(0)).sum(axis=1) > 45)
    assert len(found) >= len(rows) - 2


def test_labels_of_boxes_in_one_place_do_not_cover_each_other() -> None:
    box = (100, 80, 200, 140)
    one = draw_detections(GRAY, detections(box, labels=(0,)), ["cell", "cell"])
    two = draw_detections(GRAY, detections(box, box, labels=(0, 1)), ["cell", "cell"])
    label = colored(one, class_color(0))
    label[80 - 3 :] = False  # what lies above the box
    assert label.sum() > 200
    assert colored(two, class_color(0))[label].all()
    alone = draw_detections(GRAY, detections(box, labels=(1,)), ["cell", "cell"])
    outline = draw_detections(GRAY, detections(box, labels=(1,)), options=DrawOptions(show_labels=False))
    wanted, without = (colored(image, class_color(1)).sum() for image in (alone, outline))
    assert colored(two, class_color(1)).sum() >= 0.9 * (wanted - without)


def test_neighbouring_classes_have_far_colors() -> None:
    colors = np.array([class_color(i) for i in range(80)], float)
    assert np.linalg.norm(colors[1:] - colors[:-1], axis=1).min() > 90
    assert len({tuple(c) for c in colors}) == 80


@pytest.mark.parametrize("label", range(0, 40, 3))
def test_text_contrasts_with_its_background(label: int) -> None:
    names = ["x"] * 40
    image = draw_detections(GRAY, detections((100, 100, 200, 150), labels=(label,)), names)
    background = class_color(label)
    ink = {(0, 0, 0), (255, 255, 255)} & {tuple(p) for p in image.reshape(-1, 3).tolist()}

    def luminance(color: tuple[int, ...]) -> float:
        linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    (text,) = ink
    light, dark = sorted((luminance(text), luminance(background)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


def test_line_and_text_grow_with_the_image() -> None:
    def share(size: int) -> float:
        image = np.full((size, size, 3), 128, np.uint8)
        box = detections((size * 0.2, size * 0.3, size * 0.8, size * 0.9))
        return float((draw_detections(image, box, ["cell"]) != image).any(axis=2).mean())

    assert share(3000) == pytest.approx(share(1200), rel=0.3)


def test_low_scores_are_left_out_on_request() -> None:
    found = detections((10, 20, 60, 80), (100, 100, 160, 160))
    image = draw_detections(GRAY, found, options=DrawOptions(score_threshold=0.7, show_labels=False))
    assert changed(image)[:90].any()
    assert not changed(image)[95:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 400), (400, 2)])
def test_tiny_images(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), np.uint8)
    assert draw_detections(image, detections((0, 0, 2, 2)), ["a long name"]).shape == image.shape


def test_a_label_does_not_hide_a_small_picture() -> None:
    small = np.full((48, 64, 3), 128, np.uint8)
    drawn = (draw_detections(small, detections((5, 5, 30, 30)), ["cell"]) != small).any(axis=2)
    assert drawn[5, 5:31].all()
    assert drawn.sum() == 4 * 25


def test_class_without_a_name_and_boxes_that_are_not_finite() -> None:
    found = detections((np.nan, 0, 10, 10), (np.inf, 0, 10, 10), (5, 5, 50, 50), labels=(7, -1, 3))
    assert changed(draw_detections(GRAY, found, ["only one"])).any()


def test_nothing_to_draw() -> None:
    np.testing.assert_array_equal(draw_detections(GRAY, detections()), GRAY)


def test_line_width_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        DrawOptions(line_width=0)
