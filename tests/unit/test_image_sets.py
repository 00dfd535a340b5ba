"""The images of a deployment are read before anything is made from them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import CalibrationError
from fcos_deploy.core.gate import undecided_because
from fcos_deploy.pipeline.steps import DeployRequest, ImageSets, open_image_sets


@pytest.fixture
def sets(smooth_images: Path, bundle_contract: ModelContract, tmp_path: Path) -> Any:
    """Eight images to calibrate on in ``calibration``, four others with annotations in ``evaluation``."""
    paths = sorted(smooth_images.rglob("*.png"))
    for folder, chosen in (("calibration", paths[:8]), ("evaluation", paths[8:])):
        (tmp_path / folder).mkdir()
        for path in chosen:
            shutil.copy(path, tmp_path / folder)
    images = [{"id": i, "file_name": path.name, "width": 96, "height": 80} for i, path in enumerate(paths[8:])]
    objects = [{"image_id": i, "category_id": 1, "bbox": [1, 1, 10, 12]} for i in range(4)]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))

    def open_sets(**changes: Any) -> ImageSets:
        known = {"images": tmp_path / "evaluation", "annotations": tmp_path / "evaluation.json"}
        where = {"checkpoint": tmp_path, "output": tmp_path, "calibration_images": tmp_path / "calibration"}
        return open_image_sets(DeployRequest(**{**where, **known, **changes}), bundle_contract)

    return open_sets


def test_separate_sets_can_be_judged_on(sets: Any) -> None:
    opened = sets()
    assert len(opened.evaluation) == 4
    assert undecided_because(opened.findings) == ""


def test_without_evaluation_images_nothing_can_be_passed(sets: Any) -> None:
    opened = sets(images=None, annotations=None)
    assert len(opened.evaluation) == 8
    assert "evaluated on its own calibration images" in undecided_because(opened.findings)


def test_an_overlap_is_refused_unless_it_is_asked_for(sets: Any, tmp_path: Path) -> None:
    shared = sorted((tmp_path / "evaluation").iterdir())[0]
    Image.open(shared).save(tmp_path / "calibration" / "again.bmp")
    with pytest.raises(CalibrationError, match="1 of 4 evaluation images are calibration images too") as error:
        sets()
    assert "--allow-overlap" in error.value.hint
    assert "overlap" in [finding.kind for finding in sets(allow_overlap=True).findings]


@pytest.mark.parametrize("changed", ["annotations", "pixels", "names"])
def test_what_is_corrected_in_place_makes_other_inputs(changed: str, sets: Any, tmp_path: Path) -> None:
    """Same paths, sizes and times: results on the earlier contents must not be taken for results on these."""
    before = sets().evaluation_key
    first, second, *_ = sorted((tmp_path / "evaluation").iterdir())
    path = tmp_path / "evaluation.json" if changed == "annotations" else first
    status = path.stat()
    if changed == "annotations":
        path.write_text(path.read_text().replace("[1, 1, 10, 12]", "[2, 1, 10, 12]"))
    elif changed == "pixels":
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:40] = pixels[:40, ::-1]
        Image.fromarray(pixels).save(path)
    else:
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        second.write_bytes(contents[0])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sets().evaluation_key != before
    assert sets().evaluation_key == sets().evaluation_key
