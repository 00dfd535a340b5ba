"""AP of anything that turns feeds into outputs: what NNCF's accuracy control asks for, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import coco_scores
from fcos_deploy.accuracy.dataset import Dataset, folder_images, label_index, load_coco, truth_from_detections
from fcos_deploy.core.backend import SessionOptions, Tensors
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.image_io import read_image
from fcos_deploy.detector import Detector

__all__ = ["RunScore"]

_Run = Callable[[Tensors], Tensors]
_LEAST_SCORE = 0.3  # of the float model's detections that count as truth where there are no annotations


class RunScore:
    """Scores functions from the feeds to the outputs of ``source``, on images read anew each time.

    Without ``annotations`` the detections of ``source`` are the truth.
    """

    def __init__(
        self,
        source: Path,
        images: Path,
        *,
        annotations: Path | None = None,
        backend: str = "",
        options: SessionOptions | None = None,
    ) -> None:
        self._detector = Detector.open(source, backend=backend, options=options)
        self._dataset = load_coco(annotations, images=images) if annotations else self._own_truth(images)
        self._labels = label_index(self._detector.names, self._dataset)

    def __len__(self) -> int:
        return len(self._dataset.images)

    def __call__(self, run: _Run, positions: Sequence[int]) -> float:
        """AP (0..1) over the images at these positions; 0 where none of them has an object."""
        images = tuple(self._dataset.images[position] for position in positions)
        truth = {image.image_id: self._dataset.truth[image.image_id] for image in images}
        part = Dataset(images, truth, self._dataset.class_names, self._dataset.source)
        found = {image.image_id: self._detect(run, image.path, self._labels) for image in images}
        return coco_scores(part, found).ap or 0.0

    def _detect(self, run: _Run, path: Path, labels: NDArray[np.int64] | None = None) -> Detections:
        feeds, letterboxes = self._detector.prepare([read_image(path)])
        found = self._detector.finish(run(feeds), letterboxes)[0]
        return found if labels is None else Detections(found.boxes, found.scores, labels[found.labels])

    def _own_truth(self, folder: Path) -> Dataset:
        images = folder_images(folder)
        found = {image.image_id: self._detect(self._detector.infer, image.path) for image in images}
        names = self._detector.names
        return truth_from_detections(images, found, class_names=names, min_score=_LEAST_SCORE, source="The float model")

    def __enter__(self) -> RunScore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detector.close()
