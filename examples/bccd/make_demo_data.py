"""Choose the images that are bundled with the package, evenly spaced over the sorted splits.

    python examples/bccd/make_demo_data.py

Calibration images come from ``train`` (without annotations), evaluation images from ``val``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CALIBRATION_IMAGES = 40
SOURCE = Path(__file__).parent / "data"
TARGET = Path(__file__).parents[2] / "fcos_deploy" / "demo_data"


def choose(split: str, count: int | None) -> dict[str, list[dict[str, object]]]:
    """The COCO json of ``count`` images of a split, evenly spaced; None takes all."""
    coco = json.loads((SOURCE / f"instances_{split}.json").read_text())
    images = sorted(coco["images"], key=lambda i: i["file_name"])
    count = count or len(images)
    chosen = [images[i * len(images) // count] for i in range(count)]
    ids = {image["id"] for image in chosen}
    annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
    return {"info": coco["info"], "images": chosen, "annotations": annotations, "categories": coco["categories"]}


def copy_images(split: str, folder: str, *, count: int | None) -> dict[str, list[dict[str, object]]]:
    """Copy the chosen images of ``split`` into ``folder`` of the demo data."""
    shutil.rmtree(TARGET / folder, ignore_errors=True)
    (TARGET / folder).mkdir(parents=True)
    coco = choose(split, count)
    for image in coco["images"]:
        shutil.copy(SOURCE / split / str(image["file_name"]), TARGET / folder)
    return coco


def main() -> None:
    """Write ``calibration/``, ``evaluation/`` and ``evaluation.json``."""
    copy_images("train", "calibration", count=CALIBRATION_IMAGES)
    coco = copy_images("val", "evaluation", count=None)
    (TARGET / "evaluation.json").write_text(json.dumps(coco, separators=(",", ":")))
    shutil.copy(SOURCE / "LICENSE", TARGET / "LICENSE")


if __name__ == "__main__":
    main()
