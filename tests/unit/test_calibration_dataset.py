"""Choosing calibration images: deterministic, stratified, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.dataset import CalibrationImage, SampleOptions, collect_images, examine_set
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CalibrationError, ConfigError


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
    assert any(box.category == 2 for boxes in chosen.annotations.values() for box in boxes)


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
    with pytest.raises(CalibrationError, match="is not there"):
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


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.full((32, 32, 3), 90), "a single colour"),
        (np.random.default_rng(0).integers(0, 256, (64, 64, 3)), "noise"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, pixels: np.ndarray, problem: str) -> None:
    path = save(tmp_path / "odd.png", pixels)
    with pytest.raises(CalibrationError, match=rf"odd\.png' is {problem}"):
        CalibrationImage("odd.png", path, "").read()


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "torn.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    with pytest.raises(CalibrationError, match=r"torn\.jpg"):
        CalibrationImage("torn.jpg", path, "").read()


def test_report_finds_duplicates_and_overlap(tmp_path: Path, bundle_contract: ModelContract) -> None:
    for index in range(8):
        save(tmp_path / "set" / f"{index}.png", picture(index))
    shutil.copy(tmp_path / "set" / "3.png", tmp_path / "set" / "same.png")
    shutil.copytree(tmp_path / "set", tmp_path / "evaluation")
    (tmp_path / "evaluation" / "0.png").unlink()
    report = examine_set(collect_images(tmp_path / "set"), bundle_contract, evaluation_images=tmp_path / "evaluation")
    assert report.duplicates == (("3.png", "same.png"),)
    assert "0.png" not in report.overlap
    assert len(report.overlap) == 8
    assert report.few


def test_report_names_absent_classes_and_levels(coco: Path, bundle_contract: ModelContract) -> None:
    report = examine_set(collect_images(coco), bundle_contract)
    # 12 px of 32 at twice the size are 12 px from the centre: stride 8 reaches to 64.
    assert report.classes_absent == ("blue",)
    assert report.levels_absent == (16, 32, 64, 128)
