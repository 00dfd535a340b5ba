"""Predictions as files that other tools read: a COCO data set, CSV, YOLO labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fcos_deploy.core.detections import label_name
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import write_text
from fcos_deploy.detector.prediction import Prediction

__all__ = ["write_coco", "write_csv", "write_yolo"]

_COLUMNS = ("image", "frame", "width", "height", "label", "name", "score", "x1", "y1", "x2", "y2")


def write_coco(path: Path, predictions: Sequence[Prediction], names: tuple[str, ...]) -> None:
    """A COCO data set whose annotations have a ``score``: ids from 1, boxes x, y, width, height in image pixels.

    A category's id is its label, so that those of the training stay what they are. Frames of a video are images of one
    name with a ``frame``.
    """
    images: list[dict[str, Any]] = []  # Any: JSON values
    annotations: list[dict[str, Any]] = []
    for image_id, prediction in enumerate(predictions, 1):
        frame = {} if prediction.frame is None else {"frame": prediction.frame}
        size = {"width": prediction.width, "height": prediction.height}
        images.append({"id": image_id, "file_name": str(prediction.source), **size, **frame})
        for item in prediction.detections.to_list(names):
            x1, y1, x2, y2 = item["box"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": item["label"],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "score": item["score"],
                }
            )
    labels = {*range(len(names)), *(annotation["category_id"] for annotation in annotations)}
    categories = [{"id": label, "name": label_name(label, names)} for label in sorted(labels)]
    write_text(path, json.dumps({"images": images, "annotations": annotations, "categories": categories}) + "\n")


def write_csv(path: Path, predictions: Sequence[Prediction], names: tuple[str, ...]) -> None:
    """One line for a detection under a line of titles; boxes x1, y1, x2, y2 in image pixels."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for prediction in predictions:
        frame = "" if prediction.frame is None else prediction.frame
        for item in prediction.detections.to_list(names):
            image = (str(prediction.source), frame, prediction.width, prediction.height)
            writer.writerow([*image, item["label"], item["name"], item["score"], *item["box"]])
    write_text(path, text.getvalue())


def write_yolo(folder: Path, predictions: Sequence[Prediction], names: tuple[str, ...]) -> None:
    """``classes.txt``, and for each image ``NAME.txt`` with lines ``label x y width height score``.

    x and y are of the box's centre; all four are shares of the image's size. A frame has its number behind the name.

    Raises:
        ConfigError: two images have one name.
    """
    files: dict[str, Prediction] = {}
    for prediction in predictions:
        name = prediction.source.stem + ("" if prediction.frame is None else f"_{prediction.frame:06d}")
        if name in files or name == "classes":
            raise ConfigError(
                f"'{files[name].source if name in files else 'classes.txt'}' and '{prediction.source}' would be one "
                f"file, '{name}.txt'.",
                hint="predict folder by folder, or write CSV or COCO",
            )
        files[name] = prediction
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names))
    for name, prediction in files.items():
        lines = []
        for item in prediction.detections.to_list(names):
            x1, y1, x2, y2 = item["box"]
            shares = (
                *((x1 + x2) / 2 / prediction.width, (y1 + y2) / 2 / prediction.height),
                *((x2 - x1) / prediction.width, (y2 - y1) / prediction.height),
            )
            lines.append(f"{item['label']} {' '.join(f'{share:.6f}' for share in shares)} {item['score']:.6f}\n")
        write_text(folder / f"{name}.txt", "".join(lines))
