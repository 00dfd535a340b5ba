"""A detector's detections on every image of a data set, kept on disk so that an interrupted run can be resumed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, check_frame, label_index
from fcos_deploy.bundle.device_layer import machine_words
from fcos_deploy.core.artifact import files_of
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import contract_to_text
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import read_file, sha256_file
from fcos_deploy.core.libraries import recorded_versions
from fcos_deploy.core.machine import read_machine
from fcos_deploy.core.preprocess import Letterbox
from fcos_deploy.core.progress import ProgressFn, StageClock, map_ahead, no_progress
from fcos_deploy.core.serialize import parse_json
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = [
    "DetectionRun",
    "DetectionRuns",
    "PredictionStore",
    "StageSeconds",
    "collect_detections",
    "kept_predictions",
    "stable_description",
]

_LOG = logging.getLogger(__name__)

_SYNC_SECONDS = 1.0  # of detections that a power cut may take
_MAX_BYTES = 4 << 30  # of kept detections


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
    """The detections of one detector by image id; labels are the model's own.

    ``orientation`` is how the detector reads files.
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
    orientation: Orientation = Orientation.EXIF

    @property
    def subject(self) -> str:
        """Short name for tables and messages: backend and precision."""
        return f"{self.backend} {self.precision}"

    def relabelled(self, index: NDArray[np.int64]) -> dict[int, Detections]:
        """The detections with ``index[label]`` as labels, (labels,) int64; -1 for labels beyond it."""
        padded = np.append(index, -1)

        def relabel(labels: NDArray[np.int64]) -> NDArray[np.int64]:
            return padded[np.where((labels >= 0) & (labels < len(index)), labels, -1)]

        return {number: replace(d, labels=relabel(d.labels)) for number, d in self.detections.items()}


class DetectionRuns:
    """The runs of one command by what ran: a copy of a model that ran on the same images is not opened again."""

    def __init__(self) -> None:
        self._runs: dict[Hashable, DetectionRun] = {}

    def get(self, spec: DetectorSpec, images: Sequence[EvaluationImage]) -> DetectionRun | None:
        """The run of a model with these files on these images; None where there is none."""
        run = self._runs.get(self._key(spec, images))
        return run and replace(run, model=spec.model.name)

    def collect(
        self, spec: DetectorSpec, images: Sequence[EvaluationImage], *, run: Callable[[], DetectionRun]
    ) -> DetectionRun:
        """The run of these files on these images, which ``run`` makes where there is none."""
        key = self._key(spec, images)  # once: a file may have hundreds of megabytes
        if key not in self._runs:
            self._runs[key] = run()
        return replace(self._runs[key], model=spec.model.name)

    @staticmethod
    def _key(spec: DetectorSpec, images: Sequence[EvaluationImage]) -> Hashable:
        files = tuple(map(sha256_file, _hashed_files(spec)))
        seen = tuple((image.image_id, image.path) for image in images)
        # The precision chooses among a bundle's files; a file has its own.
        return spec.backend, spec.precision if spec.model.is_dir() else None, repr(spec.options), files, seen


def collect_detections(
    spec: DetectorSpec,
    images: Sequence[EvaluationImage],
    *,
    dataset: Dataset | None = None,
    folder: Path | None = None,
    runs: DetectionRuns | None = None,
    opened: Callable[[], object] = lambda: None,
    progress: ProgressFn = no_progress,
) -> DetectionRun:
    """Detect on every image; with ``folder`` each result is kept there at once, and a rerun resumes from it.

    ``dataset``: what the detections are for, whose classes the model must know. What is in ``runs`` does not run again,
    and is added to it. One detector is in memory, and it is closed at the end. ``opened`` is called when it is open,
    and returns when nothing else computes: the time of the first images tells that of the others.

    Raises:
        ImageError, BackendError, ConfigError: as opening the model and detecting do.
    """

    def collect() -> DetectionRun:
        return _collect(spec, images, dataset=dataset, folder=folder, opened=opened, progress=progress)

    run = collect() if runs is None else runs.collect(spec, images, run=collect)
    if dataset is not None:
        label_index(run.names, dataset)
    return run


def _collect(
    spec: DetectorSpec,
    images: Sequence[EvaluationImage],
    *,
    dataset: Dataset | None,
    folder: Path | None,
    opened: Callable[[], object],
    progress: ProgressFn,
) -> DetectionRun:
    started = time.perf_counter()
    with spec.open() as detector:
        opening = time.perf_counter() - started
        check_frame(images, detector.contract.preprocess.orientation)
        if dataset is not None:
            label_index(detector.names, dataset)
        backend = detector.session.description.get("backend", spec.backend)
        precision = str(detector.contract.precision)
        with PredictionStore(folder and kept_predictions(folder, spec, detector=detector, images=images)) as store:
            remaining = [image for image in images if image.image_id not in store.detections]
            label = f"{backend} {precision}"
            opened()
            seconds = _detect_all(detector, remaining, store=store, progress=progress, label=label)
            return DetectionRun(
                model=spec.model.name,
                backend=backend,
                precision=precision,
                names=detector.names,
                description=dict(detector.session.description),
                orientation=detector.contract.preprocess.orientation,
                detections={image.image_id: store.detections[image.image_id] for image in images},
                seconds=replace(seconds, open=opening),
                resumed=len(images) - len(remaining),
            )


def stable_description(detector: Detector) -> dict[str, str]:
    """What really runs, as far as detections depend on it: not whether a compiled model was at hand.

    Each processor has its own INT8 and bf16 kernels, which round otherwise.
    """
    description = {name: text for name, text in detector.session.description.items() if name != "model_cache"}
    machine = read_machine()
    return description | machine_words(machine) | {"instructions": " ".join(machine.cpu_features)}


def kept_predictions(
    folder: Path, spec: DetectorSpec, *, detector: Detector, images: Sequence[EvaluationImage]
) -> Path:
    """The file in ``folder`` that a run resumes from.

    Its name is a hash of everything that the detections depend on: model, contract, runtime, libraries, processor and
    what the image files hold. ``detector``: what ``spec`` opened.
    """
    facts: dict[str, Any] = {
        "files": [sha256_file(path) for path in _hashed_files(spec)],
        "contract": contract_to_text(detector.contract),
        "session": sorted(stable_description(detector).items()),
        "libraries": recorded_versions(),
        "images": [(image.image_id, sha256_file(image.path)) for image in images],
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{name}.jsonl"


def _hashed_files(spec: DetectorSpec) -> Sequence[Path]:
    """Those that stand for the model: the manifest of a bundle has the hash of every other file."""
    return [spec.model / "manifest.json"] if spec.model.is_dir() else files_of(spec.model)


def _detect_all(
    detector: Detector, images: Sequence[EvaluationImage], *, store: PredictionStore, progress: ProgressFn, label: str
) -> StageSeconds:
    """The network runs here; one thread reads and prepares images ahead of it, another decodes behind it."""
    clock = StageClock()  # A stage is one thread's, so that no two write to its entry.

    def prepare(image: EvaluationImage) -> tuple[EvaluationImage, Tensors, tuple[Letterbox, ...]]:
        with clock.stage("read"):
            pixels = detector.read(image.path)
        with clock.stage("preprocess"):
            return image, *detector.prepare([pixels])

    def infer(feeds: Tensors) -> Tensors:
        with clock.stage("infer"):
            return detector.infer(feeds)

    def finish(work: tuple[EvaluationImage, Sequence[Letterbox], Tensors]) -> tuple[EvaluationImage, Detections]:
        image, letterboxes, outputs = work
        with clock.stage("decode"):
            return image, detector.finish(outputs, letterboxes)[0]

    started = time.perf_counter()
    progress(label, 0, len(images))
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
        prepared = map_ahead(before, prepare, images)
        inferred = ((image, letterboxes, infer(feeds)) for image, feeds, letterboxes in prepared)
        try:
            # One image is decoded while the next one runs; more would tell late how many are done.
            for done, (image, detections) in enumerate(map_ahead(after, finish, inferred, ahead=2), start=1):
                store.add(image.image_id, detections)
                progress(label, done, len(images))
        except BaseException:
            for pool in (before, after):
                pool.shutdown(cancel_futures=True)
            raise
    return StageSeconds(**{r.name: r.seconds for r in clock.records}, total=time.perf_counter() - started)


class PredictionStore:
    """Detections by image id, in memory and, with ``path``, one JSON line an image in a file that a rerun goes on with.

    What a killed run or a power cut left of the last lines, cut off or zeroed, is dropped: these images run again.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.detections: dict[int, Detections] = {}
        self._stream: IO[str] | None = None
        self._synced = time.monotonic()
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            complete = self._load(path)
            self._stream = path.open("a", encoding="utf-8")
            self._stream.truncate(complete)
        except OSError as error:
            raise ConfigError(f"Cannot keep predictions in '{path.parent}': {error.strerror}.") from error

    def __enter__(self) -> PredictionStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._sync()
            self._stream.close()

    def _load(self, path: Path) -> int:
        """Read the sound lines up to the first that is not; returns how many bytes they are."""
        complete = 0
        content = read_file(path, limit=_MAX_BYTES) if path.exists() else b""
        for line in content.split(b"\n")[:-1]:
            try:
                record = parse_json(line)
                number = int(record["image_id"])
                boxes = np.array(record["boxes"], np.float32).reshape(-1, 4)
                scores, labels = np.array(record["scores"], np.float32), np.array(record["labels"], np.int64)
                detections = Detections(boxes, scores, labels)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                _LOG.warning(
                    "'%s' is damaged after %d images, which is where it goes on: %r", path, len(self.detections), error
                )
                break
            self.detections[number] = detections
            complete += len(line) + 1
        return complete

    def _sync(self) -> None:
        """Wait until the lines are on the disk."""
        if self._stream is not None:
            with contextlib.suppress(OSError):  # Writing fails as well, and says so.
                os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def add(self, image_id: int, detections: Detections) -> None:
        """Keep an image's detections: at once for a process that is killed, within a second for a power cut.

        Raises:
            ConfigError: the disk is full or was removed; what was kept before stays.
        """
        self.detections[image_id] = detections
        if self._stream is None:
            return
        columns = {name: getattr(detections, name).tolist() for name in ("boxes", "scores", "labels")}
        try:
            self._stream.write(json.dumps({"image_id": image_id, **columns}) + "\n")
            self._stream.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            stream, self._stream = self._stream, None
            with contextlib.suppress(OSError):
                stream.close()  # which tries to write once more
            raise ConfigError(
                f"Cannot keep predictions in '{stream.name}': {error.strerror}.",
                hint="make room and run the command again: it resumes where it stopped",
            ) from error
