"""Choosing calibration images: deterministic, stratified, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.dataset import (
    SampleOptions,
    SetReport,
    collect_images,
    examine_set,
    inspect_images,
    open_images,
)
from fcos_deploy.accuracy.dataset import load_coco
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CalibrationError, ConfigError
from fcos_deploy.core.gate import Finding, Severity


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def picture(seed: int) -> np.ndarray:
    rows, columns = np.mgrid[0:32, 0:40]
    return np.stack([rows * 4, columns * 4, np.full_like(rows, seed % 256)], 2)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Twenty images; category 2 is in two of them only, category 3 in none."""
    images, annotations = [], []
    for index in range(20):
        save(tmp_path / "images" / f"{index:02d}.png", picture(index))
        images.append({"id": index, "file_name": f"images/{index:02d}.png", "width": 40, "height": 32})
        category = 2 if index in {5, 11} else 1
        annotations.append({"image_id": index, "category_id": category, "bbox": [1, 1, 10, 12]})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "white"}, {"id": 3, "name": "blue"}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_folder_gives_sorted_names_and_hashes(smooth_images: Path) -> None:
    chosen = collect_images(smooth_images)
    names = [image.name for image in chosen.images]
    assert names == sorted(names)
    assert len(names) == 12
    assert all(len(image.sha256) == 64 for image in chosen.images)


def test_same_seed_same_images_other_seed_others(smooth_images: Path) -> None:
    def names(seed: int) -> list[str]:
        return [i.name for i in collect_images(smooth_images, options=SampleOptions(count=8, seed=seed)).images]

    assert names(1) == names(1)
    assert len({tuple(names(seed)) for seed in range(6)}) > 1


def test_larger_sample_contains_the_smaller(smooth_images: Path) -> None:
    def names(count: int) -> set[str]:
        options = SampleOptions(count=count, minimum=1)
        return {i.name for i in collect_images(smooth_images, options=options).images}

    assert names(3) < names(6) < names(12)


def test_every_subfolder_is_represented(smooth_images: Path) -> None:
    chosen = collect_images(smooth_images, options=SampleOptions(count=2, minimum=2))
    assert {image.name.partition("/")[0] for image in chosen.images} == {"a", "b"}


def test_rare_class_is_in_a_small_sample(coco: Path) -> None:
    chosen = collect_images(coco, options=SampleOptions(count=4, minimum=2))
    assert any(item.category_id == 2 for items in chosen.annotations.values() for item in items)


def test_list_file(smooth_images: Path) -> None:
    listed = smooth_images.parent / f"{smooth_images.name}.txt"
    names = sorted(p.relative_to(smooth_images.parent).as_posix() for p in smooth_images.rglob("*.png"))[:9]
    listed.write_text("\n".join(names) + "\n")
    assert [image.name for image in collect_images(listed).images] == names


def test_file_missing_from_a_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"gone{i}.png" for i in range(9)))
    with pytest.raises(CalibrationError, match=r"gone0\.png"):
        collect_images(tmp_path / "list.txt")


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no images"):
        collect_images(tmp_path)


def test_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        collect_images(tmp_path / "nothing")


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "one.png", picture(1))
    with pytest.raises(CalibrationError, match="gives 1 calibration images, at least 8"):
        collect_images(tmp_path)


def test_text_that_is_no_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{not json")
    with pytest.raises(CalibrationError, match=r"broken\.json"):
        collect_images(tmp_path / "broken.json")


def test_count_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        SampleOptions(count=0)


def kinds(report: SetReport) -> dict[str, Finding]:
    return {finding.kind: finding for finding in report.findings}


def test_frames_of_a_dark_and_noisy_night_are_images_and_are_named(
    tmp_path: Path, bundle_contract: ModelContract
) -> None:
    for index in range(8):
        save(tmp_path / f"{index}.png", picture(index))
    save(tmp_path / "night.png", np.random.default_rng(0).poisson(3, (64, 64, 3)).clip(0, 255))
    save(tmp_path / "lid.png", np.zeros((32, 32, 3)))
    chosen = collect_images(tmp_path)
    assert len(chosen.images) == 10
    findings = kinds(examine_set(chosen, bundle_contract))
    assert {"noise", "colour"} <= set(findings)
    assert {finding.severity for finding in findings.values()} == {Severity.WARNING}
    assert "night.png" in findings["noise"].message


def test_everything_that_cannot_be_read_is_listed_at_once(tmp_path: Path) -> None:
    for index in range(8):
        save(tmp_path / f"{index}.jpg", picture(index))
    whole = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 4 // 5] + b"\xff\xd9")
    with pytest.raises(CalibrationError, match="2 of 10 images cannot be used") as error:
        collect_images(tmp_path)
    assert all(name in error.value.message for name in ("torn.jpg", "cut.jpg"))


def test_one_image_many_times_is_one_image(tmp_path: Path) -> None:
    for index in range(12):
        save(tmp_path / f"{index}.png", picture(1))
    with pytest.raises(CalibrationError, match="gives 12 calibration images, 1 of them different photographs"):
        collect_images(tmp_path)


def test_images_are_compared_by_what_they_show(tmp_path: Path, bundle_contract: ModelContract) -> None:
    """A copy in another format is a copy, on either side, and in both sets it is an overlap."""
    for index in range(10):
        save(tmp_path / "set" / f"{index}.jpg", picture(20 * index))
    save(tmp_path / "set" / "same.png", np.asarray(Image.open(tmp_path / "set" / "3.jpg")))
    save(tmp_path / "evaluation" / "other.png", picture(250))
    save(tmp_path / "evaluation" / "a.png", np.asarray(Image.open(tmp_path / "set" / "5.jpg")))
    shutil.copy(tmp_path / "evaluation" / "a.png", tmp_path / "evaluation" / "b.png")
    evaluation = inspect_images(open_images(tmp_path / "evaluation").paths)
    chosen = collect_images(tmp_path / "set")
    report = examine_set(chosen, bundle_contract, evaluation=evaluation)
    findings = kinds(report)
    assert (
        "1 of 11 calibration images are copies of others ('same.png' is '3.jpg')" in findings["calibration-copies"].line
    )
    assert "2 of 3 evaluation images are calibration images too (a.png, b.png)" in findings["overlap"].line
    assert findings["overlap"].severity is Severity.REFUSED
    assert findings["evaluation-copies"].severity is Severity.INCONCLUSIVE
    assert "few" in findings
    with pytest.raises(CalibrationError, match="evaluation images are calibration images too") as error:
        report.require_usable()
    assert "'same.png' is '3.jpg'" in error.value.message, "all findings at once"
    allowed = examine_set(chosen, bundle_contract, evaluation=evaluation, allow_overlap=True)
    allowed.require_usable()
    assert kinds(allowed)["overlap"].severity is Severity.WARNING


def test_report_names_absent_classes_and_levels(coco: Path, bundle_contract: ModelContract) -> None:
    findings = kinds(examine_set(collect_images(coco), bundle_contract))
    # 12 px of 32 at twice the size are 12 px from the centre: stride 8 reaches to 64.
    assert findings["classes-absent"].message.endswith("shows: blue")
    assert findings["levels-absent"].message.endswith("stride 16, 32, 64, 128")


def test_annotations_of_other_images_are_refused_as_such(coco: Path, tmp_path: Path) -> None:
    for index in range(8):
        save(tmp_path / "others" / f"x{index}.png", picture(index))
    with pytest.raises(
        CalibrationError, match=r"None of the 8 images of '.*others' is in '.*coco\.json': it names"
    ) as error:
        collect_images(tmp_path / "others", annotations=coco)
    assert "'images/00.png'" in error.value.message
    assert "'x0.png'" in error.value.message


@pytest.mark.parametrize("source", ["images/val2017", "images", ".", "annotations/instances_val2017.json"])
@pytest.mark.parametrize("folder", ["images/val2017", "val2017"])
def test_cocos_own_folders(source: str, folder: str, tmp_path: Path) -> None:
    """``file_name`` is the bare name there, and the images lie beside the folder of the annotations."""
    if not (tmp_path / folder).is_relative_to(tmp_path / source) and not source.endswith(".json"):
        pytest.skip("another layout")
    names = [f"{index:012d}.png" for index in range(8)]
    for index, name in enumerate(names):
        save(tmp_path / folder / name, picture(index))
    images = [{"id": i, "file_name": name, "width": 40, "height": 32} for i, name in enumerate(names)]
    objects = [{"image_id": i, "category_id": 1, "bbox": [1, 1, 10, 12]} for i in range(8)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "red"}]}
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    chosen = collect_images(tmp_path / source, annotations=None if source.endswith(".json") else path)
    assert sum(len(boxes) for boxes in chosen.annotations.values()) == 8
    if not source.endswith(".json"):
        dataset = load_coco(path, images=tmp_path / source)
        assert all(image.path.is_file() for image in dataset.images)
