"""Runs one detector over many images: streaming, resumable, with what each stage took."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import EvaluationImage
from fcos_deploy.accuracy.predictions import PredictionStore
from fcos_deploy.core.atomic import sha256_file
from fcos_deploy.core.backend import SessionOptions, Tensors
from fcos_deploy.core.contract_io import contract_to_text
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.image_io import read_image
from fcos_deploy.core.preprocess import Letterbox
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.detector import Detector

__all__ = ["DetectionRun", "StageSeconds", "Target", "collect_detections"]

_AHEAD = 4  # images that wait before and after the network

_In = TypeVar("_In")
_Out = TypeVar("_Out")


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
    """Where the time of a run went, in seconds summed over its images.

    ``open`` is what loading the model took. Reading and preprocessing, the network, and decoding run in three threads,
    so that ``total`` (by the clock, without ``open``) is less than their sum; ``total - infer`` is what is added to the
    network.
    """

    open: float = 0.0
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
    started = time.perf_counter()
    with target.open() as detector:
        opening = time.perf_counter() - started
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
                seconds=replace(seconds, open=opening),
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
    """The network runs here; before it images are read and prepared, and after it outputs are decoded, by threads."""
    clock = _Clock()
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
        feeding = _ahead(before, lambda image: _prepare(detector, image, clock), images)
        running = ((image, letterboxes, _infer(detector, feeds, clock)) for image, feeds, letterboxes in feeding)
        finishing = _ahead(after, lambda one: _finish(detector, *one, clock), running)
        try:
            for done, (image, found) in enumerate(finishing, start=1):
                store.add(image.image_id, found)
                progress(label, done, len(images))
        except BaseException:
            for pool in (before, after):
                pool.shutdown(cancel_futures=True)
            raise
    return StageSeconds(**clock.seconds, total=time.perf_counter() - started)


class _Clock:
    """Seconds by stage; a stage is one thread's."""

    def __init__(self) -> None:
        self.seconds = {"read": 0.0, "preprocess": 0.0, "infer": 0.0, "decode": 0.0}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


def _prepare(
    detector: Detector, image: EvaluationImage, clock: _Clock
) -> tuple[EvaluationImage, Tensors, tuple[Letterbox, ...]]:
    with clock("read"):
        picture = read_image(image.path)
    with clock("preprocess"):
        return image, *detector.prepare([picture])


def _infer(detector: Detector, feeds: Tensors, clock: _Clock) -> Tensors:
    with clock("infer"):
        return detector.infer(feeds)


def _finish(
    detector: Detector, image: EvaluationImage, letterboxes: Sequence[Letterbox], outputs: Tensors, clock: _Clock
) -> tuple[EvaluationImage, Detections]:
    with clock("decode"):
        return image, detector.finish(outputs, letterboxes)[0]


def _ahead(pool: ThreadPoolExecutor, work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """``map`` in another thread, in order and at most a few items ahead of who takes the results."""
    waiting: deque[Future[_Out]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
