"""The images of a deployment: those that INT8 is calibrated on, and those that every variant is judged on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.accuracy.dataset import EvaluationImage, folder_images, load_coco
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Finding, Severity

if TYPE_CHECKING:
    from calibration.dataset import CalibrationSet, SampleOptions

__all__ = ["ImageSets", "open_image_sets"]


@dataclass(frozen=True, slots=True)
class ImageSets:
    """``evaluation`` is in a fixed order; ``findings`` is what is to be said of both sets.

    ``evaluation_key``: hash of the evaluation images' names and contents and of their annotations, so that what was
    measured on others is never taken for a result on these.
    """

    calibration: CalibrationSet
    evaluation: tuple[EvaluationImage, ...]
    findings: tuple[Finding, ...]
    evaluation_key: str


def open_image_sets(
    calibration_images: Path,
    contract: ModelContract,
    *,
    images: Path | None,
    annotations: Path | None,
    sample: SampleOptions,
    allow_overlap: bool,
) -> ImageSets:
    """Read every image once, before anything is made from them. Without ``images`` the calibration images are both.

    Raises:
        CalibrationError: images that cannot be read, all listed; too few different ones; or an overlap of the two sets
            that is not allowed.
        ConfigError: no ``images``, and calibration images that are not a folder.
    """
    from calibration.dataset import SetReport, collect_images, examine_set, inspect_images

    if images is None and not calibration_images.is_dir():
        raise ConfigError(
            f"'{calibration_images}' is not a folder, so that the accuracy cannot be measured on it.",
            hint="give other images with --images DIR",
        )
    calibration = collect_images(calibration_images, options=sample)
    if images is None:
        evaluation = folder_images(calibration_images)
    else:
        evaluation = load_coco(annotations, images=images).images if annotations else folder_images(images)
    names = {os.path.relpath(image.path, images or calibration_images): image.path for image in evaluation}
    inspected = inspect_images(names)
    report: SetReport = examine_set(
        calibration, contract, evaluation=inspected if images else (), allow_overlap=allow_overlap
    )
    report.require_usable()
    findings = report.findings
    if images is None:
        message = "INT8 was evaluated on its own calibration images, on which it looks better than it is (no --images)"
        findings += (Finding(kind="no-evaluation-images", severity=Severity.INCONCLUSIVE, message=message),)
    facts = [sha256_file(annotations) if annotations else "", [(image.name, image.sha256) for image in inspected]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return ImageSets(calibration, evaluation, findings, key)
