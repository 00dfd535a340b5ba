"""Files as other tools write them: each kind with its right value, or with the sentence that refuses it."""

from __future__ import annotations

import codecs
import copy
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import Result
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from calibration.dataset import SampleOptions, collect_images
from fcos_deploy.accuracy.coco import coco_scores
from fcos_deploy.accuracy.dataset import label_index, load_coco
from fcos_deploy.checkpoints.load import describe_checkpoint, load_checkpoint
from fcos_deploy.cli.app import build_app
from fcos_deploy.core import image as image_module
from fcos_deploy.core import jpeg as jpeg_module
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import CalibrationError, ConfigError, FcosDeployError, ImageError
from fcos_deploy.core.image import image_size, list_images, read_image
from fcos_deploy.core.jpeg import with_messages
from fcos_deploy.detector import Detector
from fcos_deploy.detector.prediction import is_video_file, predict, read_frames

Json = dict[str, Any]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


# ---- annotations ----

NAMES = ("a.png", "b.png", "more/c d.png", "more/é.png")
BOXES = ((4, 5, 20, 12), (10, 8, 30, 24), (0, 0, 8, 9), (40, 30, 24, 18))  # x, y, width, height in 64 x 48 pixels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of 64 x 48 pixels, in ``data/images``."""
    folder = tmp_path_factory.mktemp("data") / "images"
    for index, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((64, 48)).rotate(90 * index).convert("RGB").save(folder / name)
    return folder


def annotations() -> Json:
    """One object an image, two of each class."""
    return {
        "images": [{"id": i + 1, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(NAMES)],
        "annotations": [
            {"id": i, "image_id": i + 1, "category_id": 1 + i % 2, "bbox": list(box), "area": box[2] * box[3]}
            for i, box in enumerate(BOXES)
        ],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "white"}],
    }


def change(images: Callable[[Json], Json | None] | None = None, objects: Callable[[Json], Json | None] | None = None):
    """Changes every image or object of a document."""

    def apply(document: Json) -> None:
        for entries, update in (("images", images), ("annotations", objects)):
            if update is not None:
                document[entries] = [update(entry) or entry for entry in document[entries]]

    return apply


def renamed(change_name: Callable[[str], str]) -> Callable[[Json], None]:
    return change(images=lambda image: {**image, "file_name": change_name(image["file_name"])})


def without(entries: str, key: str) -> Callable[[Json], None]:
    return lambda document: [entry.pop(key, None) for entry in document[entries]]


def both_ids(new: Callable[[int], object]) -> Callable[[Json], None]:
    return change(
        images=lambda image: {**image, "id": new(image["id"])},
        objects=lambda item: {**item, "image_id": new(item["image_id"])},
    )


def numbers_as_text(item: Json) -> Json:
    return {key: [str(v) for v in value] if isinstance(value, list) else str(value) for key, value in item.items()}


def add_categories(*categories: Json) -> Callable[[Json], None]:
    return lambda document: document["categories"].extend(categories)


def roboflow(document: Json) -> None:
    """A root named like a class, and class ids from 1 on that are below it."""
    document["categories"] = [
        {"id": 0, "name": "red", "supercategory": "none"},
        *({**category, "supercategory": "red"} for category in document["categories"]),
    ]


# What stands for the same annotations: AP of detections that equal the boxes is 1, and the findings are these.
SAME: dict[str, tuple[Callable[[Json], object], set[str]]] = {
    "as they are": (change(), set()),
    "crowd flags as text": (change(objects=lambda item: {**item, "iscrowd": "0"}), set()),
    "crowd flags as booleans": (change(objects=lambda item: {**item, "iscrowd": False}), set()),
    "crowd flags null": (change(objects=lambda item: {**item, "iscrowd": None}), set()),
    "areas null": (change(objects=lambda item: {**item, "area": None}), set()),
    "areas missing": (without("annotations", "area"), set()),
    "annotation ids missing": (without("annotations", "id"), set()),
    "numbers as text": (change(numbers_as_text, numbers_as_text), set()),
    "numbers as floats": (change(objects=lambda item: {**item, "category_id": float(item["category_id"])}), set()),
    "ids of 17 digits": (both_ids(lambda number: 17_268_991_234_567_890 + number), set()),
    "ids of 25 digits": (both_ids(lambda number: 10**25 + number), set()),
    "negative ids": (both_ids(lambda number: -number), set()),
    "ids from 0 on": (both_ids(lambda number: number - 1), set()),
    "ids as names": (both_ids(lambda number: f"img_{number:04d}.jpg"), set()),
    "ids with leading zeros": (both_ids(lambda number: f"{number:05d}"), set()),
    "sizes missing": (without("images", "height"), set()),
    "sizes of 0": (change(images=lambda image: {**image, "height": 0, "width": 0}), set()),
    "outlines": (change(objects=lambda item: {**item, "segmentation": [[1, 1, 2, 2, 3, 1]]}), set()),
    "run lengths": (change(objects=lambda item: {**item, "segmentation": {"counts": "Pb", "size": [48, 64]}}), set()),
    "a Roboflow root named like a class": (roboflow, {"category-left-out"}),
    "a root of its own name": (
        lambda document: document["categories"].extend(
            [{"id": 7, "name": "cells"}, {"id": 8, "name": "__background__", "supercategory": "cells"}]
        ),
        {"category-left-out"},
    ),
    "a category twice": (add_categories({"id": 1, "name": "red"}), {"category-joined"}),
    "a name in two categories": (add_categories({"id": 5, "name": "Red"}), {"category-joined"}),
    "names below the folder's parent": (renamed(lambda name: f"images/{name}"), set()),
    "names below another folder": (renamed(lambda name: f"train/{name}"), {"names"}),
    "absolute names": (renamed(lambda name: f"/home/me/set/{name}"), {"names"}),
    "absolute names of Windows": (renamed(lambda name: "C:\\set\\" + name.replace("/", "\\")), {"names"}),
    "names with ..": (renamed(lambda name: f"../set/{name}"), {"names"}),
    "names with ./": (renamed(lambda name: f"./{name}"), set()),
    "names as URLs": (renamed(lambda name: f"https://host/set/{name}?v=1".replace(" ", "%20")), {"names"}),
    "names as URL paths": (renamed(lambda name: name.replace(" ", "%20").replace("é", "%C3%A9")), {"names"}),
    "names of Label Studio": (renamed(lambda name: f"/data/local-files/?d=set/{name}"), {"names"}),
    "names in other case": (renamed(str.upper), {"names"}),
    "names decomposed": (renamed(lambda name: name.replace("é", "e\u0301")), {"names"}),
    "LVIS, which has URLs alone": (
        change(images=lambda image: {"id": image["id"], "coco_url": f"http://host/{image['file_name']}"}),
        {"names"},
    ),
}


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", SAME)
def test_annotations_that_mean_the_same_give_the_same_ap(kind: str, pictures: Path, tmp_path: Path) -> None:
    update, findings = SAME[kind]
    document = copy.deepcopy(annotations())
    update(document)
    path = write(tmp_path / "annotations.json", document)
    dataset = load_coco(path, images=pictures)
    assert {finding.kind for finding in dataset.findings} == findings
    assert len({image.path for image in dataset.images}) == 4
    index = label_index(("white", "red"), dataset)
    detections = {}
    for image in dataset.images:
        position = NAMES.index(image.path.relative_to(pictures).as_posix())
        x, y, width, height = BOXES[position]
        label = index[1 - position % 2]
        detections[image.image_id] = Detections(
            np.float32([[x, y, x + width, y + height]]), np.float32([0.9]), np.int64([label])
        )
    scores = coco_scores(dataset, detections)
    assert (scores.ap, scores.objects) == (1.0, 4)
    chosen = collect_images(pictures, annotations=path, options=SampleOptions(minimum=1))
    assert sum(map(len, chosen.annotations.values())) == 4  # by the same reader


REFUSED: dict[str, tuple[Callable[[Json], object], str]] = {
    "an image that is not there": (
        lambda document: document["annotations"][2].update(image_id=777777),
        r"annotations\[2\] \(id 2\): 'image_id' is 777777, and there is no such image",
    ),
    "a class that is not there": (
        lambda document: document["annotations"][1].update(category_id="9"),
        r"annotations\[1\] \(id 1\): 'category_id' is 9, and there is no such category",
    ),
    "an empty box": (
        lambda document: document["annotations"][0].update(bbox=[]),
        r"annotations\[0\] \(id 0\): 'bbox' must be four numbers .* got a list of 0",
    ),
    "no box": (without("annotations", "bbox"), r"annotations\[0\].* got None"),
    "a box that is no number": (
        lambda document: document["annotations"][3].update(bbox=[1, 2, "3,5", 4]),
        r"annotations\[3\].*'bbox' must be a number, got '3,5'",
    ),
    "a flag that is none": (
        lambda document: document["annotations"][0].update(iscrowd="maybe"),
        "'iscrowd' must be 0 or 1, got 'maybe'",
    ),
    "a negative area": (lambda document: document["annotations"][0].update(area=-1), "'area' must not be negative"),
    "no name": (without("categories", "name"), r"categories\[0\] \(id 1\): 'name' must be text"),
    "no file name": (without("images", "file_name"), r"images\[0\] \(id 1\): 'file_name' must be text"),
    "an id of two classes": (add_categories({"id": 1, "name": "blue"}), "id 1 has 2 names"),
    "an id of two images": (lambda document: document["images"][1].update(id=1), "2 have the same id 1"),
    "no categories": (lambda document: document.pop("categories"), "it has no 'categories'"),
    "boxes as corners": (
        change(objects=lambda item: {**item, "bbox": [40, 30, 60, 44]}),
        "4 of the 4 boxes lie outside .* They look like x1, y1, x2, y2",
    ),
    "boxes as centres, some outside": (
        change(objects=lambda item: {**item, "bbox": [50, 24, 28, 40]}),
        "They look like centre x, centre y, width, height",
    ),
    "boxes as shares": (change(objects=lambda item: {**item, "bbox": [0.1, 0.1, 0.5, 0.5]}), "look like shares"),
    "images of another size": (
        change(images=lambda image: {**image, "width": 640, "height": 480}),
        "'a.png' of 640x480 pixels .* the file has 64x48",
    ),
    "names that fit nothing": (
        renamed(lambda name: f"x-{Path(name).name}"),
        "4 of the 4 images .* 'x-a.png', 'x-b.png'",
    ),
}
OTHERS: dict[str, tuple[object, str]] = {
    "labelme": ({"shapes": [], "imagePath": "a.png"}, "labelme"),
    "VoTT": ({"assets": {}, "tags": []}, "VoTT"),
    "Datumaro": ({"info": {}, "categories": {}, "items": []}, "Datumaro"),
    "VIA": ({"_via_img_metadata": {}}, "VGG Image Annotator"),
    "Label Studio": ([{"id": 1, "data": {"image": "a.png"}, "annotations": []}], "Label Studio"),
    "CreateML": ([{"image": "a.png", "annotations": []}], "CreateML"),
    "results": ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "a list of detections"),
    "nothing known": ({"hello": 1}, "it has no 'images'"),
}


@pytest.mark.parametrize("kind", [*REFUSED, *OTHERS])
def test_annotations_without_one_meaning_are_refused_by_their_place(kind: str, pictures: Path, tmp_path: Path) -> None:
    document: Any = annotations()
    if kind in REFUSED:
        update, message = REFUSED[kind]
        update(document)
    else:
        document, message = OTHERS[kind]
    path = write(tmp_path / "annotations.json", document)
    with pytest.raises(ConfigError, match=message) as refused:
        load_coco(path, images=pictures)
    assert "annotations.json" in refused.value.message
    if "box" not in kind and "images of another" not in kind and "names that" not in kind:
        with pytest.raises(CalibrationError, match=message):
            collect_images(pictures, annotations=path, options=SampleOptions(minimum=1))


def test_the_first_five_problems_are_listed(pictures: Path, tmp_path: Path) -> None:
    document = annotations()
    document["annotations"] = [{**document["annotations"][0], "bbox": []} for _ in range(8)]
    result = run("inspect", write(tmp_path / "a.json", document))
    assert result.exit_code == 2
    assert "cannot be used: 8." in result.stderr
    assert [f"annotations[{index}]" in result.stderr for index in range(8)] == [True] * 5 + [False] * 3
    assert "and 3 more" in result.stderr


def test_names_that_fit_several_files_are_named(pictures: Path, tmp_path: Path) -> None:
    document = annotations()
    for image in document["images"]:
        image["file_name"] = f"set/{Path(image['file_name']).parent}/same.png"
    for name in ("x/same.png", "y/same.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / name)
    path = write(tmp_path / "a.json", document)
    with pytest.raises(ConfigError, match=r"'set/\./same.png' may be '.*x/same.png', '.*y/same.png'"):
        load_coco(path, images=tmp_path / "images")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_every_text_may_begin_with_a_byte_order_mark(encoding: str, pictures: Path, tmp_path: Path) -> None:
    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes((codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b"") + text.encode(encoding))
        return path

    from fcos_deploy.core.checkpoint_options import option_infos, read_checkpoint_options

    path = write_text("annotations.json", json.dumps(annotations(), ensure_ascii=False))
    assert len(load_coco(path, images=pictures).images) == 4
    assert run("inspect", path, "--images", pictures).exit_code == 0
    assert len(collect_images(pictures, annotations=path, options=SampleOptions(minimum=1)).annotations) == 4
    listed = write_text("list.txt", "".join(f"{pictures / name}\r\n" for name in NAMES))
    assert len(collect_images(listed, options=SampleOptions(minimum=1, allow_outside=True)).images) == 4
    parse = option_infos()["class_names"].parse
    assert parse is not None
    assert parse(write_text("classes.txt", "rot\r\nweiß\r\n")) == ("rot", "weiß")
    assert read_checkpoint_options(write_text("options.toml", "max_detections = 7\n")).max_detections == 7


def spread(size: tuple[int, int], *, count: int = 60) -> list[tuple[int, int, int, int]]:
    """Boxes that lie evenly in an image of ``size`` (width, height)."""
    rng = np.random.default_rng(0)
    sides = rng.integers(8, 24, (count, 2))
    places = (rng.random((count, 2)) * (np.array(size) - sides)).astype(int)
    return [(int(x), int(y), int(w), int(h)) for (x, y), (w, h) in zip(places, sides, strict=True)]


WRONG: dict[str, tuple[Callable[[Json], Json], str, str]] = {
    "areas above the boxes'": (lambda item: {**item, "area": 9 * item["area"]}, "areas", "warning"),
    "areas of 0": (lambda item: {**item, "area": 0}, "areas", "warning"),
    "boxes of no width": (lambda item: {**item, "bbox": [*item["bbox"][:2], 0, 10]}, "empty", "inconclusive"),
    "boxes below a pixel": (lambda item: {**item, "bbox": [*item["bbox"][:2], 0.5, 10]}, "narrow", "warning"),
    "crowds alone": (lambda item: {**item, "iscrowd": 1}, "crowds", "inconclusive"),
    "centres": (
        lambda item: {
            **item,
            "bbox": [
                item["bbox"][0] + item["bbox"][2] / 2,
                item["bbox"][1] + item["bbox"][3] / 2,
                *item["bbox"][2:],
            ],
        },
        "centres",
        "inconclusive",
    ),
    "nothing": (lambda item: item, "", ""),
}


@pytest.mark.parametrize("kind", [*WRONG, "every box twice", "an image twice"])
def test_data_that_is_plainly_wrong_gets_a_word(kind: str, pictures: Path, tmp_path: Path) -> None:
    boxes = spread((64, 48))
    if kind == "centres":  # where they are all inside even so
        boxes = [box for box in boxes if box[0] + 1.5 * box[2] <= 64 and box[1] + 1.5 * box[3] <= 48]
    document = annotations()
    objects = [
        {"id": i, "image_id": 1 + i % 4, "category_id": 1 + i % 2, "bbox": list(box), "area": box[2] * box[3]}
        for i, box in enumerate(boxes)
    ]
    update, expected, severity = WRONG.get(kind, (lambda item: item, "copies", "inconclusive"))
    document["annotations"] = [update(item) for item in objects]
    if kind == "every box twice":
        document["annotations"] *= 2
    elif kind == "an image twice":
        document["images"].append({**document["images"][0], "id": 99})
        expected = "images-twice"
    path = write(tmp_path / "annotations.json", document)
    result = run("inspect", path, "--images", pictures, "--json")
    assert result.exit_code == 0, result.stderr
    findings = {finding["kind"]: finding["severity"] for finding in json.loads(result.stdout)["findings"]}
    assert findings == ({expected: severity} if expected else {})
    assert {finding.kind for finding in load_coco(path, images=pictures).findings} == set(findings)


def test_inspect_shows_annotations(pictures: Path, tmp_path: Path) -> None:
    document = annotations()
    document["images"].append({"id": 9, "file_name": "gone.png", "width": 64, "height": 48})
    document["categories"].append({"id": 3, "name": "[/bold] blue"})
    path = write(tmp_path / "labels.json", document)
    (pictures / "extra.png").write_bytes((pictures / "a.png").read_bytes())
    result = run("inspect", path, "--images", pictures, "--json")
    (pictures / "extra.png").unlink()
    assert result.exit_code == 0, result.stderr
    shown = json.loads(result.stdout)
    assert (shown["kind"], shown["images"]) == ("COCO annotations", "5, 1 of them without an object")
    assert (shown["images_found"], shown["files_without_annotations"]) == ("4 of 5", "1")
    assert shown["by_class"][0] == {"name": "red", "objects": 2, "images": 2, "median_box": "14x10"}
    assert {finding["kind"] for finding in shown["findings"]} == {"missing", "classes-absent"}
    plain = run("inspect", path)
    assert plain.exit_code == 0
    assert "[/bold] blue" in plain.stderr
    assert run("inspect", path, "--images", tmp_path / "nowhere").exit_code == 1


# ---- images ----


def jpeg(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photograph(golden_dir: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(golden_dir / "images" / "BloodImage_00000.jpg"))[:240, :320]


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


# What is no damage: a decoder gives the same pixels, whatever it prints.
WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "stray bytes before a marker": lambda c: c[:20] + b"stray\0" + c[20:],
    "stray bytes before the scan": lambda c: c.replace(b"\xff\xda", b"\x11\x22\xff\xda", 1),
    "fill bytes": lambda c: c.replace(b"\xff\xda", b"\xff\xff\xff\xda", 1),
    "no end": lambda c: c[:-2],
    "zeros before its end": lambda c: c[:-2] + bytes(40) + c[-2:],
    "a video behind it": lambda c: c + b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 4,
    "another revision of JFIF": lambda c: c.replace(b"JFIF\0\1\1", b"JFIF\0\2\1", 1),
    "a preview": lambda c: c[:2] + segment(0xE2, c[:400] + b"\xff\xd9") + c[2:],
    "a comment with markers": lambda c: c[:2] + segment(0xFE, b"\xff\xd9\xff\xda") + c[2:],
}
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "a bad byte": lambda c: c[: len(c) // 2] + b"\xff\x3f" + c[len(c) // 2 + 2 :],
    "noise": lambda c: c[: len(c) // 2] + np.random.default_rng(1).bytes(60) + c[len(c) // 2 + 60 :],
    "cut off": lambda c: c[: len(c) * 2 // 3],
    "cut off and ended": lambda c: c[: len(c) * 2 // 3] + b"\xff\xd9",
    "a part gone": lambda c: c[: len(c) // 2] + c[len(c) // 2 + 700 :],
    "zeros inside": lambda c: c[: len(c) // 2] + bytes(600) + c[len(c) // 2 + 600 :],
    "stray bytes, and a part gone": lambda c: c[:20] + b"stray\0" + c[20 : len(c) // 2] + c[len(c) // 2 + 700 :],
    "another revision, and a part gone": lambda c: (
        c.replace(b"JFIF\0\1\1", b"JFIF\0\2\1", 1)[: len(c) // 2] + c[len(c) // 2 + 700 :]
    ),
}


@pytest.fixture(params=["stream", "descriptor"])
def _capture_of_stderr(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc's stream, and what stands in for it with another C library."""
    if request.param == "descriptor":
        descriptor = jpeg_module._Descriptor()
        monkeypatch.setattr(jpeg_module, "_capture", lambda: descriptor)


@pytest.mark.usefixtures("_capture_of_stderr")
@pytest.mark.parametrize("form", ["plain", "progressive", "optimize"])
@pytest.mark.parametrize("kind", [*WHOLE, *DAMAGED])
def test_the_decoders_own_warnings_decide_on_a_jpeg(
    kind: str, form: str, photograph: NDArray[np.uint8], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = jpeg(photograph, **({} if form == "plain" else {form: True}))
    (tmp_path / "a.jpg").write_bytes((WHOLE | DAMAGED)[kind](content))
    if kind in DAMAGED:
        with pytest.raises(ImageError, match=r"a\.jpg' is damaged: "):
            read_image(tmp_path / "a.jpg")
    else:
        (tmp_path / "whole.jpg").write_bytes(content)
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "whole.jpg"))
    assert capfd.readouterr().err == ""  # libjpeg's line is in the error


@pytest.mark.usefixtures("_capture_of_stderr")
def test_threads_that_decode_do_not_hear_each_others_warnings(photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    content = jpeg(photograph)
    (tmp_path / "whole.jpg").write_bytes(content)
    (tmp_path / "noise.jpg").write_bytes(DAMAGED["a part gone"](content))

    def is_read(name: str) -> bool:
        try:
            return read_image(tmp_path / name).shape == photograph.shape
        except ImageError:
            return False

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(is_read, ["whole.jpg", "noise.jpg", "whole.jpg"] * 20))
    assert results == [True, False, True] * 20


def print_a_warning() -> None:
    """As C code does."""
    libc = ctypes.CDLL(None)
    libc.fputs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    text = b"of another library\nPremature end of JPEG file\n"
    libc.fputs(text, ctypes.c_void_p.in_dll(libc, "stderr").value)


@pytest.mark.usefixtures("_capture_of_stderr")
def test_what_is_not_of_libjpeg_goes_on_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert with_messages(print_a_warning) == (None, "Premature end of JPEG file\n")
    assert set(capfd.readouterr().err.splitlines()) == {"of another library"}


@pytest.mark.usefixtures("_capture_of_stderr")
def test_a_process_that_forks_in_the_middle_of_decoding_has_its_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    terminal = os.fstat(2).st_ino

    def forks() -> int:
        if child := os.fork():
            return os.waitpid(child, 0)[1]
        signal.alarm(20)  # rather than wait for a lock that nobody holds
        ok = os.fstat(2).st_ino == terminal and with_messages(print_a_warning)[1] == "Premature end of JPEG file\n"
        os.write(2, b"of the child\n" if ok else b"")
        with_messages(lambda: (print_a_warning(), os._exit(not ok)))  # which its parent must not hear
        return 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which other tests leave
        assert with_messages(forks) == (0, "")
    assert set(capfd.readouterr().err.splitlines()) == {"of another library", "of the child"}


def test_a_closed_stderr_keeps_no_image_from_being_read(photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    (tmp_path / "noise.jpg").write_bytes(DAMAGED["a part gone"](jpeg(photograph)))
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom fcos_deploy.core import image, jpeg\n"
        "captures = jpeg._capture(), jpeg._Descriptor()\nos.close(2)\nfor capture in captures:\n"
        "    jpeg._capture = lambda: capture\n"
        "    try:\n        image.read_image(Path(sys.argv[1]))\n"
        "    except image.ImageError as error:\n        print(error.message)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "noise.jpg"], check=True, stdout=subprocess.PIPE, text=True
    )
    assert result.stdout.count("is damaged: the decoder says") == 2


FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    ".mpo": "MPO",
    ".png": "PNG",
    ".apng": "PNG",
    ".bmp": "BMP",
    ".dib": "BMP",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".pnm": "PPM",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
    "": "PNG",
}
PASSED = {".dds": "DDS", ".icns": "ICNS", ".heic": "", ".txt": "", ".psd": ""}


def test_a_folder_says_what_it_passes_over(photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for suffix, name in (FORMATS | PASSED).items():
        if name:
            Image.fromarray(photograph[:128, :128]).save(folder / f"image{suffix}", name)
        else:
            (folder / f"image{suffix}").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (folder / ".hidden.heic").touch()
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(image_module, "_warn_once", said.append)
        paths = list_images(folder)
    assert {path.suffix for path in paths} == set(FORMATS)
    assert said == [
        f"passed over in '{folder}', which has {len(FORMATS)} images: 1 .dds, 1 .heic, 1 .icns, 1 .psd, 1 .txt"
    ]
    for path in paths:
        assert image_size(path) == (128, 128)
        with Image.open(path) as opened:
            expected = np.asarray(opened.convert("RGB")).astype(int)
        assert np.abs(read_image(path) - expected).max() <= 2, path
    for suffix, kind in ((".dds", "a DDS texture"), (".icns", "an ICNS icon"), (".heic", "a HEIC image")):
        with pytest.raises(ImageError, match=f"image{suffix}' is not an image in a supported format: it is {kind}"):
            read_image(folder / f"image{suffix}")
    (tmp_path / "only").mkdir()
    shutil.copyfile(folder / "image.heic", tmp_path / "only" / "a.heic")
    with pytest.raises(ImageError, match=r"holds no images, only 1 \.heic"):
        list_images(tmp_path / "only")


def test_a_preview_of_a_raw_file_is_no_image(photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(photograph).save(tmp_path / "a.dng", "TIFF", tiffinfo={254: 1})
    with pytest.raises(ImageError, match="is a preview of 320x240 pixels"):
        read_image(tmp_path / "a.dng")


@pytest.fixture(scope="module")
def detector(tiny_onnx: Path) -> Iterator[Detector]:
    pytest.importorskip("onnxruntime")
    with Detector.open(tiny_onnx) as opened:
        yield opened


def test_images_of_pillow_are_detected_on(detector: Detector, photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    image = Image.fromarray(photograph)
    image.save(tmp_path / "a.png")
    expected = detector.detect(photograph)
    with Image.open(tmp_path / "a.png") as lazy:
        opened = lazy.copy()
    for given in (image, image.convert("RGBA"), opened, tmp_path / "a.png"):
        for found in (detector.detect(given), detector.detect_batch([given])[0]):
            np.testing.assert_array_equal(found.boxes, expected.boxes)


@pytest.mark.parametrize("given", [None, 5, [1, 2], {}, object()], ids=lambda given: type(given).__name__)
def test_what_is_no_image_is_said_to_be_none(detector: Detector, given: object) -> None:
    for detect in (detector.detect, lambda image: detector.detect_batch([image])):
        with pytest.raises(
            ImageError, match=r"must be uint8\[h, w, 3\] in RGB order, a path, a file's bytes or an image of Pillow"
        ):
            detect(given)


# ---- outputs and videos ----


def test_copies_never_overwrite_each_other(detector: Detector, photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    folder, drawn = tmp_path / "in", tmp_path / "drawn"
    names = ("a.png", "a.jpg", "a.bmp", "A.PNG", "b.png", "sub/a.png", "a.png.jpg", "sub/b.tif", "sub/B.gif")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph).save(folder / name)
    write_video(folder / "a.avi", frames=3)
    write_video(folder / "a.mkv", frames=3)
    sources = [folder, folder / "a.avi", folder / "a.mkv", folder / "b.png"]
    predictions = list(predict(detector, sources, draw=drawn))
    assert len({prediction.source for prediction in predictions}) == len(names) + 2
    copies = sorted(path.relative_to(drawn).as_posix() for path in drawn.rglob("*") if path.is_file())
    assert len(copies) == len({copy.casefold() for copy in copies}) == len(names) + 2
    assert {"b.jpg", "sub/a.jpg", "a.jpg.jpg", "a.bmp.jpg", "a.avi.mp4", "a.mkv.mp4"} <= set(copies)
    (folder / "new.jpg").write_bytes((folder / "a.jpg").read_bytes())
    (folder / "new.png").write_bytes((folder / "a.png").read_bytes())
    with pytest.raises(ConfigError, match="would overwrite"):
        list(predict(detector, [folder / "new.png"], draw=folder))


def write_video(path: Path, *, frames: int, code: str = "MJPG") -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 10.0, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(frames):
        coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
        writer.write(np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1))
    writer.release()
    return path


VIDEOS = {".avi": "MJPG", ".mp4": "mp4v", ".3gp": "mp4v", ".mov": "MJPG", ".mkv": "MJPG", ".webm": "VP80"}
VIDEOS |= {".ts": "mp4v", ".mts": "mp4v", ".m2ts": "mp4v", ".flv": "FLV1", ".wmv": "WMV2", ".mpg": "MPG2"}


@pytest.mark.parametrize("suffix", VIDEOS)
def test_a_video_is_known_by_its_content(suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_video(tmp_path / f"clip{suffix}", frames=30, code=VIDEOS[suffix])
    content = source.read_bytes()
    for name in ("clip.bin", "clip", "clip.jpg", f"clip{suffix}"):
        path = tmp_path / name
        path.write_bytes(content)
        assert is_video_file(path)
    assert len(list(read_frames(path))) == 30
    (tmp_path / f"cut{suffix}").write_bytes(content[: len(content) // 2])
    if suffix not in (".ts", ".mts", ".m2ts", ".mpg", ".wmv"):  # whose headers, when they are cut, announce nothing
        with pytest.raises(ImageError, match=r"is damaged: |Cannot read video"):
            list(read_frames(tmp_path / f"cut{suffix}"))
    capfd.readouterr()  # FFmpeg's lines


def test_images_and_texts_are_no_videos(photograph: NDArray[np.uint8], tmp_path: Path) -> None:
    for name in ("a.mp4", "b.avi"):
        (tmp_path / name).write_bytes(jpeg(photograph))
        assert not is_video_file(tmp_path / name)
    (tmp_path / "list.mp4").write_text("#EXTM3U\nhttp://127.0.0.1:9/a.ts\n")  # FFmpeg would open what it names
    assert not is_video_file(tmp_path / "list.mp4")


def test_a_damaged_video_does_not_stop_the_others(
    tiny_onnx: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = write_video(tmp_path / "whole.avi", frames=6)
    for name, share in (("cut.avi", 0.6), ("gone.mp4", 0.0)):
        (tmp_path / name).write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    (tmp_path / "gone.mp4").write_text("not a video")
    names = ("cut.avi", "gone.mp4", "whole.avi")
    result = run("predict", tiny_onnx, *(tmp_path / name for name in names), "--json", "--draw", tmp_path / "drawn")
    assert result.exit_code == 1
    documents = json.loads(result.stdout)
    counts = Counter(Path(document["image"]).name for document in documents)
    assert counts["whole.avi"] == 6
    assert 0 < counts["cut.avi"] < 6
    assert {document["frames_announced"] for document in documents} == {6}
    assert f"{counts['cut.avi']} frames decoded of 6 announced" in result.stderr
    assert "cut.avi' is damaged" in result.stderr
    assert "gone.mp4'" in result.stderr
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"cut.mp4", "whole.mp4"}
    capfd.readouterr()


# ---- checkpoints ----

Tensors = dict[str, torch.Tensor]
ONE = torch.ones(1)


def prefixed(prefix: str) -> Callable[[Tensors], object]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def after(part: str, wrapper: str) -> Callable[[Tensors], object]:
    return lambda tensors: {name.replace(part, part + wrapper): tensor for name, tensor in tensors.items()}


def between(wrapper: str) -> Callable[[Tensors], object]:
    """After every part of every name, as wrappers of each module leave it."""
    return lambda tensors: {
        "".join(f"{part}.{wrapper}." for part in name.split(".")[:-1]) + name.rpartition(".")[2]: tensor
        for name, tensor in tensors.items()
    }


def in_lightning(prefix: str, **more: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: {
        "state_dict": {prefix + name: tensor for name, tensor in tensors.items()} | more,
        "pytorch-lightning_version": "2.4.0",
        "optimizer_states": [{"state": {0: {"exp_avg": ONE}}}],
    }


def profiled(tensors: Tensors) -> object:
    counters = {f"{name.rpartition('.')[0]}.total_{what}": ONE for name in tensors for what in ("ops", "params")}
    return {**tensors, **counters, "total_ops": ONE, "total_params": ONE}


WRAPPED: dict[str, Callable[[Tensors], object]] = {
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "torch.compile of DataParallel": prefixed("_orig_mod.module."),
    "torch.compile of the backbone": after("backbone.", "_orig_mod."),
    "DataParallel of the head": after("head.", "module."),
    "FSDP": between("_fsdp_wrapped_module"),
    "FSDP of torch 1": between("_fpw_module"),
    "activation checkpoints": after("layer2.0.", "_checkpoint_wrapped_module."),
    "a strategy of Lightning": in_lightning("_forward_module.model."),
    "Lightning, net": in_lightning("net.", **{"criterion.weight": ONE}),
    "Lightning, fcos": in_lightning("fcos.", **{"val_map.total": ONE, "train_metrics.seen": ONE}),
    "Lightning, two deep": in_lightning("detector.model.", **{"detector.loss_fn.weight": ONE}),
    "a profiler's counters": profiled,
    "a loss of its own": lambda tensors: {**tensors, "criterion.weight": ONE},
}
UNKNOWN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "another head": (lambda tensors: {**tensors, "mask_head.conv.weight": ONE}, "1 unknown tensors: 'mask_head.conv"),
    "an adapter": (
        lambda tensors: {**tensors, "backbone.body.conv1.lora_A": ONE},
        "1 unknown tensors: 'backbone.body.conv1.lora_A'",
    ),
    "other names": (
        lambda tensors: {name.replace("backbone.", "trunk."): tensor for name, tensor in tensors.items()},
        "its tensors begin with 'trunk', 'head'",
    ),
    "a teacher and a student": (
        lambda tensors: {f"{who}.{name}": tensor for who in ("teacher", "student") for name, tensor in tensors.items()},
        "2 sets of weights: '(?:teacher|student)', '(?:teacher|student)'",
    ),
}


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint: Path) -> Tensors:
    return load_file(tiny_checkpoint)


@pytest.mark.parametrize("kind", [*WRAPPED, *UNKNOWN])
def test_wrappers_are_no_part_of_a_name(kind: str, tensors: Tensors, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """``inspect`` and loading say the same, of a file with any suffix."""
    torch.save((WRAPPED | {kind: update for kind, (update, _) in UNKNOWN.items()})[kind](tensors), tmp_path / "m.ckpt")
    options = CheckpointOptions(input_size=(128, 160))
    if kind in UNKNOWN:
        for read in (describe_checkpoint, load_checkpoint):
            with pytest.raises(FcosDeployError, match=UNKNOWN[kind][1]):
                read(tmp_path / "m.ckpt", options=options)
        return
    described = describe_checkpoint(tmp_path / "m.ckpt", options=options)
    loaded = load_checkpoint(tmp_path / "m.ckpt", options=options)
    assert described.contract.decisions == loaded.contract.decisions
    for name, tensor in load_checkpoint(tiny_checkpoint).model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    if kind in ("a profiler's counters", "Lightning, net", "Lightning, fcos"):
        assert "left_out" in {decision.name for decision in described.contract.decisions}


# ---- surroundings ----

_WITHOUT_HOME = """
import os, pwd, sys
for name in ("HOME", "USER", "LOGNAME"):
    os.environ.pop(name, None)
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from fcos_deploy.cli.app import main
main()
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_container_without_home_and_user_is_enough(backend: str, tiny_onnx: Path, pictures: Path) -> None:
    pytest.importorskip(backend)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FCOS_DEPLOY_", "XDG_"))}
    command = [sys.executable, "-c", _WITHOUT_HOME, "predict", str(tiny_onnx), str(pictures / "a.png")]
    environment = {**kept, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--backend", backend, "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["backend"] == backend


def test_names_are_text(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    """In tables and errors: no markup, and nothing swallowed."""
    (tmp_path / "names.txt").write_text("[/bold]\n[red]\n:smile:\n")
    image = shutil.copyfile(pictures / "a.png", tmp_path / "photo [copy].png")
    options = ("--classes", tmp_path / "names.txt", "--score-threshold", "0.05")
    shown = run("inspect", tiny_checkpoint, "--classes", tmp_path / "names.txt")
    assert "[/bold], [red], :smile:" in shown.stderr
    predicted = run("predict", tiny_checkpoint, image, *options, "--draw", tmp_path / "drawn")
    assert predicted.exit_code == 0, predicted.stderr
    assert "photo [copy].png" in predicted.stderr
    assert (tmp_path / "drawn" / "photo [copy].jpg").is_file()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, ""),
        ({"checkpoint": "misnamed.onnx"}, ""),
        ({"checkpoint": "annotations.json"}, "is not a checkpoint"),
        ({"--calibration-images": "nowhere"}, "does not exist"),
        ({"--calibration-images": "few"}, "at least 8 are needed"),
        ({"--annotations": "nowhere.json"}, "Cannot read the annotations"),
        ({"--annotations": "classes.json"}, "which the model does not know"),
        ({"--images": "few"}, "are not in"),
    ],
)
def test_what_a_dry_run_accepts_is_read_as_for_the_build(
    changed: dict[str, str], message: str, tiny_checkpoint: Path, smooth_images: Path, pictures: Path, tmp_path: Path
) -> None:
    document = annotations()
    write(tmp_path / "annotations.json", document)
    write(tmp_path / "classes.json", {**document, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]})
    (tmp_path / "few").mkdir()
    shutil.copyfile(pictures / "a.png", tmp_path / "few" / "x.png")
    for name in ("model_best.pth.tar", "misnamed.onnx"):
        shutil.copyfile(tiny_checkpoint, tmp_path / name)
    given = {
        "checkpoint": "model_best.pth.tar",
        "--calibration-images": str(smooth_images),
        "--images": str(pictures),
        "--annotations": "annotations.json",
        "-o": "bundle",
    }
    given |= changed
    words = [word for name, value in given.items() if name != "checkpoint" for word in (name, tmp_path / value)]
    done = run("deploy", tmp_path / given["checkpoint"], *words, "--target", "jetson-orin-nano", "--dry-run")
    assert (done.exit_code != 0) == bool(message), done.stderr
    assert message in " ".join(done.stderr.split())
