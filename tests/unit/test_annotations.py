"""Annotation files in any state: read with finite boxes, or refused with the project's errors."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.dataset import SampleOptions, collect_images
from fcos_deploy.accuracy.dataset import load_coco
from fcos_deploy.core.errors import FcosDeployError

FUZZ = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
GOOD: dict[str, Any] = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": 8, "height": 6} for number in (1, 2, 3)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 2, 3.5, 2], "area": 7.0, "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 9, "bbox": [0, 0, 8, 6]},
    ],
    "categories": [{"id": 4, "name": "cell"}, {"id": 9, "name": "platelet"}],
}
# Where something else is put: every key and every place of the document above.
PLACES: list[tuple[Any, ...]] = [
    *((name,) for name in GOOD),
    *((name, index) for name, items in GOOD.items() for index in range(len(items))),
    *((name, index, key) for name, items in GOOD.items() for index, item in enumerate(items) for key in item),
    *(("annotations", 0, "bbox", index) for index in range(4)),
]
NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.sampled_from([0, -1, 1, 2, 3, 4, 9, 10**400, 2**63, -(2**63) - 1, 1e308, -1e308, 0.5, True]),
)
JUNK = st.recursive(
    st.one_of(
        st.none(), NUMBERS, st.text(max_size=8), st.sampled_from(["1", "1.png", "../1.png", "\0", "x" * 300, "/", ""])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in (1, 2, 3):
        Image.linear_gradient("L").resize((8, 6)).rotate(90 * number).convert("RGB").save(folder / f"{number}.png")
    return folder


def _read_both(content: bytes, folder: Path, name: str = "a.json") -> None:
    """By the evaluation and by the calibration; what is accepted can be computed with."""
    path = folder / name
    path.write_bytes(content)
    with _refusing(name):
        ground_truths = load_coco(path, images=folder).ground_truth.values()
        boxes = np.concatenate([ground_truth.boxes for ground_truth in ground_truths])
        assert np.isfinite(boxes).all()
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        assert all(np.isfinite(ground_truth.areas).all() for ground_truth in ground_truths)
    with _refusing(name):
        found = collect_images(folder, annotations=path, options=SampleOptions(minimum=1))
        assert len(found.images) == 3


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """An error is the project's, and names the file."""
    try:
        yield
    except FcosDeployError as error:
        message = str(error)
    else:
        return
    assert name in message


def test_the_file_that_is_damaged_below_is_good(pictures: Path) -> None:
    path = pictures / "good.json"
    path.write_text(json.dumps(GOOD))
    dataset = load_coco(path, images=pictures)
    assert dataset.ground_truth[1].boxes.tolist() == [[1, 2, 4.5, 4]]
    assert collect_images(pictures, annotations=path, options=SampleOptions(minimum=1)).categories[9] == "platelet"


@FUZZ
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), JUNK, st.sampled_from("srd")), min_size=1, max_size=3))
def test_values_that_were_set_removed_or_doubled(changes: list[tuple[Any, ...]], pictures: Path) -> None:
    document: Any = copy.deepcopy(GOOD)
    for place, value, action in changes:
        _change(document, place, value, action)
    _read_both(json.dumps(document).encode(), pictures)


def _change(document: Any, place: tuple[Any, ...], value: Any, action: str) -> None:
    try:
        for part in place[:-1]:
            document = document[part]
        if action == "r":
            del document[place[-1]]
        elif action == "d" and isinstance(document, list):
            document.append(document[place[-1]])
        else:
            document[place[-1]] = value
    except (KeyError, IndexError, TypeError):
        return  # An earlier change took the place away.


@FUZZ
@given(content=st.one_of(st.binary(max_size=60), JUNK.map(lambda value: json.dumps(value).encode())))
def test_any_other_content(content: bytes, pictures: Path) -> None:
    _read_both(content, pictures)


@FUZZ
@given(place=st.integers(0, len(json.dumps(GOOD)) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_byte_changed_or_the_rest_missing(place: int, byte: int, cut: bool, pictures: Path) -> None:
    content = bytearray(json.dumps(GOOD).encode())
    content[place] = byte
    _read_both(bytes(content[:place] if cut else content), pictures)


def _with(place: tuple[Any, ...], text: str) -> bytes:
    """The good document with JSON ``text`` at a place."""
    document = copy.deepcopy(GOOD)
    _change(document, place, "@@", "s")
    return json.dumps(document).replace('"@@"', text).encode()


# What the searches above, or people, found.
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"images":' * 50_000,
        _with(("images",), "[" * 5000 + "]" * 5000),
        _with(("images", 0, "id"), "Infinity"),
        _with(("images", 0, "id"), "NaN"),
        _with(("annotations", 0, "image_id"), "1e400"),
        _with(("annotations", 0, "bbox", 2), "NaN"),
        _with(("annotations", 0, "bbox", 2), "-1"),
        _with(("annotations", 0, "bbox", 0), "Infinity"),
        _with(("annotations", 0, "bbox", 0), "1" + "0" * 400),
        _with(("annotations", 0, "bbox", 0), "1" + "0" * 5000),
        _with(("annotations", 0, "area"), "NaN"),
        _with(("images", 0, "file_name"), '"' + "x" * 5000 + '"'),
        _with(("images", 0, "file_name"), '"a\\u0000b"'),
        _with(("images", 0, "file_name"), '"\\ud800"'),
        _with(("images", 0, "id"), "2"),
        _with(("categories", 0, "id"), "9"),
        _with(("annotations", 0, "bbox"), "[1, 2]"),
        "\ufeff{}".encode("utf-16"),
        b"\xff\xfe\x00",
        b"",
    ],
)
def test_found_before(content: bytes, pictures: Path) -> None:
    _read_both(content, pictures, "b.json")
    with pytest.raises(FcosDeployError):
        load_coco(pictures / "b.json", images=pictures)
