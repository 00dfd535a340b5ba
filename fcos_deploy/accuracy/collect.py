"""Runs one detector over many images: streaming, resumable, with what each stage took."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import EvaluationImage
from fcos_deploy.accuracy.predictions import PredictionStore
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.backend import SessionOptions
from fcos_deploy.core.contract_io import contract_to_text
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.image_io import read_image
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

__all__ = ["DetectionRun", "StageSeconds", "Target", "collect_detections"]

_AHEAD = 4  # images that are read while the network runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model on a backend at a precision; empty and None mean the detector's own choice."""

    model: Path
    backend: str = ""
    precision: Precision | None = None
    options: SessionOptions = field(default_factory=SessionOptions)

    def open(self) -> Detector:
        """Load it; the caller closes."""
        return Detector.open(self.model, backend=self.backend, precision=self.precision, options=self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Where the time of a run went, in seconds summed over its images; ``read`` is the wait for image files."""

    read: float = 0.0
    preprocess: float = 0.0
    infer: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRun:
    """What one detector found on each image, by the image's number; labels are the model's own.

    ``resumed`` images came from an earlier, interrupted run and are not in ``seconds``.
    """

    model: str
    backend: str
    precision: str
    names: tuple[str, ...]
    description: Mapping[str, str]
    detections: Mapping[int, Detections]
    seconds: StageSeconds
    resumed: int = 0

    @property
    def subject(self) -> str:
        """Short name for tables and messages: backend and precision."""
        return f"{self.backend} {self.precision}"

    def relabelled(self, index: NDArray[np.int64]) -> dict[int, Detections]:
        """The detections with ``index[label]`` as labels, (labels,) int64; -1 for labels beyond it."""
        padded = np.append(index, -1)
        return {
            number: Detections(
                found.boxes,
                found.scores,
                padded[np.where((found.labels >= 0) & (found.labels < len(index)), found.labels, -1)],
            )
            for number, found in self.detections.items()
        }


def collect_detections(
    target: Target, images: Sequence[EvaluationImage], *, folder: Path | None = None, progress: ProgressFn = no_progress
) -> DetectionRun:
    """Detect on every image; with ``folder`` each result is kept there at once, and a rerun goes on from it.

    One detector is in memory, and it is closed at the end.

    Raises:
        ImageError, BackendError, ConfigError: as opening the model and detecting do.
    """
    with target.open() as detector:
        backend = detector.session.description.get("backend", target.backend)
        precision = str(detector.contract.precision)
        store = PredictionStore.open(folder, key=_key(target, detector, images)) if folder else PredictionStore()
        with store:
            rest = [image for image in images if image.image_id not in store.found]
            resumed = len(images) - len(rest)
            seconds = _detect_all(detector, rest, store=store, progress=progress, label=f"{backend} {precision}")
            return DetectionRun(
                model=target.model.name,
                backend=backend,
                precision=precision,
                names=detector.names,
                description=dict(detector.session.description),
                detections={image.image_id: store.found[image.image_id] for image in images},
                seconds=seconds,
                resumed=resumed,
            )


def _detect_all(
    detector: Detector,
    images: Sequence[EvaluationImage],
    *,
    store: PredictionStore,
    progress: ProgressFn,
    label: str,
) -> StageSeconds:
    spent = np.zeros(4)
    started = time.perf_counter()
    with _read_ahead(images) as pictures:
        for done, image in enumerate(images, start=1):
            marks = [time.perf_counter()]
            picture = next(pictures)
            marks.append(time.perf_counter())
            feeds, letterboxes = detector.prepare([picture])
            marks.append(time.perf_counter())
            outputs = detector.infer(feeds)
            marks.append(time.perf_counter())
            (found,) = detector.finish(outputs, letterboxes)
            marks.append(time.perf_counter())
            store.add(image.image_id, found)
            spent += np.diff(marks)
            progress(label, done, len(images))
    read, prepare, infer, decode = (float(v) for v in spent)
    total = time.perf_counter() - started
    return StageSeconds(read=read, preprocess=prepare, infer=infer, decode=decode, total=total)


class _read_ahead:  # noqa: N801  (used as a context manager function)
    """Iterator over pictures that are read by another thread, a few in advance."""

    def __init__(self, images: Sequence[EvaluationImage]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._paths = iter([image.path for image in images])
        self._waiting: deque[Future[NDArray[np.uint8]]] = deque()

    def __enter__(self) -> Iterator[NDArray[np.uint8]]:
        for _ in range(_AHEAD):
            self._request()
        return self._pictures()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _request(self) -> None:
        path = next(self._paths, None)
        if path is not None:
            self._waiting.append(self._pool.submit(read_image, path))

    def _pictures(self) -> Iterator[NDArray[np.uint8]]:
        while self._waiting:
            picture = self._waiting.popleft().result()
            self._request()
            yield picture


def _key(target: Target, detector: Detector, images: Sequence[EvaluationImage]) -> str:
    """Hash of everything that the detections depend on: model, contract, runtime and the image files."""
    facts: dict[str, Any] = {
        "files": [sha256_file(path) for path in _model_files(target.model)],
        "contract": contract_to_text(detector.contract),
        "session": sorted(detector.session.description.items()),
        "images": [_image_facts(image) for image in images],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _model_files(model: Path) -> list[Path]:
    if model.is_dir():
        return [model / "manifest.json"]  # which has the hash of every other file
    companions = (model.with_suffix(".bin"), model.with_suffix(".json"), model.with_name(model.name + ".data"))
    return [model, *(path for path in companions if path.is_file() and path != model)]


def _image_facts(image: EvaluationImage) -> tuple[int, str, int, int]:
    status = image.path.stat()
    return image.image_id, image.path.name, status.st_size, status.st_mtime_ns
