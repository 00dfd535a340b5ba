"""Detections on disk, one line an image, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import CocoScores, coco_scores
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    folder_images,
    ground_truth_from_detections,
    label_index,
    load_coco,
)
from fcos_deploy.accuracy.gate import Verdict, judge_agreement, judge_ap, judge_drop
from fcos_deploy.accuracy.intervals import ApInterval, ApSamples, ap_interval, match_dataset, paired_ap_drop, sample_ap
from fcos_deploy.accuracy.matching import DetectionAgreement, MatchOptions, compare_detections
from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.contract import contract_to_text
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.image import read_image
from fcos_deploy.core.preprocess import Letterbox
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.score_drift import ScoreDrift, score_drift
from fcos_deploy.detector import Detector, DetectorSpec

__all__ = [
    "DetectionRun",
    "Evaluation",
    "EvaluationRequest",
    "Evaluations",
    "PredictionStore",
    "StageSeconds",
    "collect_detections",
    "evaluate",
    "evaluate_run",
    "evaluation_drift",
]


class PredictionStore:
    """What was found so far, by image number; kept in memory, and in a file where one was opened."""

    def __init__(self) -> None:
        self.found: dict[int, Detections] = {}
        self._stream: IO[str] | None = None

    @staticmethod
    def open(folder: Path, *, key: str) -> PredictionStore:
        """The store ``KEY.jsonl`` in ``folder``, with what an earlier run left in it.

        A last line that a killed run left incomplete is dropped.

        Raises:
            ConfigError: the folder cannot be written.
        """
        store = PredictionStore()
        path = folder / f"{key[:32]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = store._load(path)
            store._stream = path.open("a", encoding="utf-8")
            store._stream.truncate(kept)
        except OSError as error:
            raise ConfigError(f"Cannot keep predictions in '{folder}': {error.strerror}.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"'{path}' is damaged: {error!r}.", hint="delete it, and the images run again") from error
        return store

    def add(self, image_id: int, found: Detections) -> None:
        """Remember an image's detections, on disk before this returns.

        Raises:
            ConfigError: the disk is full or was removed; what was kept before stays.
        """
        self.found[image_id] = found
        if self._stream is None:
            return
        try:
            self._stream.write(_line(image_id, found))
            self._stream.flush()
        except OSError as error:
            stream, self._stream = self._stream, None
            with contextlib.suppress(OSError):
                stream.close()  # which tries to write once more
            raise ConfigError(
                f"Cannot keep predictions in '{stream.name}': {error.strerror}.",
                hint="make room and run the command again: it goes on where it was",
            ) from error

    def __enter__(self) -> PredictionStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def _load(self, path: Path) -> int:
        """Read the complete lines; returns how many bytes they are."""
        kept = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                self.found[int(record["image_id"])] = _detections(record)
                kept += len(line)
        return kept


def _line(image_id: int, found: Detections) -> str:
    record = {
        "image_id": image_id,
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
    }
    return json.dumps(record) + "\n"


def _detections(record: dict[str, Any]) -> Detections:
    return Detections(
        np.array(record["boxes"], np.float32).reshape(-1, 4),
        np.array(record["scores"], np.float32),
        np.array(record["labels"], np.int64),
    )


_AHEAD = 4  # images that wait before and after the network

_In = TypeVar("_In")
_Out = TypeVar("_Out")


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
    spec: DetectorSpec,
    images: Sequence[EvaluationImage],
    *,
    folder: Path | None = None,
    progress: ProgressFn = no_progress,
) -> DetectionRun:
    """Detect on every image; with ``folder`` each result is kept there at once, and a rerun goes on from it.

    One detector is in memory, and it is closed at the end.

    Raises:
        ImageError, BackendError, ConfigError: as opening the model and detecting do.
    """
    started = time.perf_counter()
    with spec.open() as detector:
        opening = time.perf_counter() - started
        backend = detector.session.description.get("backend", spec.backend)
        precision = str(detector.contract.precision)
        store = PredictionStore.open(folder, key=_key(spec, detector, images)) if folder else PredictionStore()
        with store:
            rest = [image for image in images if image.image_id not in store.found]
            resumed = len(images) - len(rest)
            seconds = _detect_all(detector, rest, store=store, progress=progress, label=f"{backend} {precision}")
            return DetectionRun(
                model=spec.model.name,
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


def _key(spec: DetectorSpec, detector: Detector, images: Sequence[EvaluationImage]) -> str:
    """Hash of everything that the detections depend on: model, contract, runtime and the image files."""
    facts: dict[str, Any] = {
        "files": [sha256_file(path) for path in _model_files(spec.model)],
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate, on what, against what.

    Without ``annotations`` the detections of ``reference`` with at least ``reference_score`` are the ground truth.
    ``limit``: only the first images. ``resamples``: of the bootstrap; 0 leaves intervals out.
    ``predictions``: folder that makes an interrupted run resumable.
    """

    candidates: tuple[DetectorSpec, ...]
    images: Path
    annotations: Path | None = None
    reference: DetectorSpec | None = None
    reference_score: float = 0.3
    gate: Gate = field(default_factory=Gate)
    matching: MatchOptions = field(default_factory=MatchOptions)
    resamples: int = 1000
    seed: int = 0
    limit: int | None = None
    predictions: Path | None = None

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("There is nothing to evaluate.")
        if self.annotations is None and self.reference is None:
            raise ConfigError(
                "Accuracy needs annotations, or a reference model whose detections are taken for the ground truth.",
                hint="give --annotations FILE, or --reference CHECKPOINT",
            )
        needs_reference = (self.gate.max_map_drop, self.gate.min_match_rate, self.gate.max_score_delta)
        if self.reference is None and any(limit is not None for limit in needs_reference):
            raise ConfigError(
                "A limit on a drop or on agreement needs the model to compare with.", hint="give --reference CHECKPOINT"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"The number of images must be at least 1, got {self.limit}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model on one backend: its scores and, where there is a reference, how it compares.

    ``samples``: its AP in each resample, for further intervals.
    """

    run: DetectionRun
    scores: CocoScores
    interval: ApInterval | None = None
    drop: ApInterval | None = None
    agreement: DetectionAgreement | None = None
    verdicts: tuple[Verdict, ...] = ()
    samples: ApSamples | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluations:
    """The reference, if there was one, and every candidate, in the order asked for."""

    dataset: Dataset
    reference: Evaluation | None
    candidates: tuple[Evaluation, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Those of all candidates."""
        return tuple(verdict for candidate in self.candidates for verdict in candidate.verdicts)


def evaluate(request: EvaluationRequest, *, progress: ProgressFn = no_progress) -> Evaluations:
    """Evaluate every candidate on all images, one model in memory at a time; it is scored while the next one runs.

    Raises:
        ConfigError: images, annotations and models do not fit together.
        FcosDeployError: a model cannot be opened or run, an image cannot be read.
    """
    annotated = None
    if request.annotations is not None:
        annotated = load_coco(request.annotations, images=request.images).first(request.limit)
    images = annotated.images if annotated else folder_images(request.images)[: request.limit]

    def collect(spec: DetectorSpec) -> DetectionRun:
        return collect_detections(spec, images, folder=request.predictions, progress=progress)

    reference_run = collect(request.reference) if request.reference else None
    dataset = annotated or _reference_ground_truth(request, reference_run)
    with ThreadPoolExecutor(1) as scoring:  # one thread, so that the reference is scored before its candidates
        reference = scoring.submit(evaluate_run, dataset, reference_run, request=request) if reference_run else None

        def score(run: DetectionRun) -> Evaluation:
            return evaluate_run(dataset, run, request=request, reference=reference.result() if reference else None)

        candidates = [scoring.submit(score, collect(spec)) for spec in request.candidates]
        return Evaluations(
            dataset=dataset,
            reference=reference.result() if reference else None,
            candidates=tuple(candidate.result() for candidate in candidates),
        )


def _reference_ground_truth(request: EvaluationRequest, run: DetectionRun | None) -> Dataset:
    if run is None:  # Excluded by the request's own check.
        raise ConfigError("Accuracy needs annotations or a reference.")
    images = folder_images(request.images)[: request.limit]
    return ground_truth_from_detections(
        images,
        run.detections,
        class_names=run.names,
        min_score=request.reference_score,
        source=f"The reference '{run.model}'",
    )


def evaluate_run(
    dataset: Dataset, run: DetectionRun, *, request: EvaluationRequest, reference: Evaluation | None = None
) -> Evaluation:
    """Score detections that were collected already."""
    found = run.relabelled(label_index(run.names, dataset))
    scores = coco_scores(dataset, found)
    samples = None
    if request.resamples and scores.ap is not None:
        samples = sample_ap(match_dataset(dataset, found), resamples=request.resamples, seed=request.seed)
    drop = agreement = None
    if reference is not None:
        theirs = reference.run.relabelled(label_index(reference.run.names, dataset))
        agreement = compare_detections(theirs, found, options=request.matching)
        drop = _drop(reference, scores, samples)
    verdicts = _judge(request.gate, run, scores, drop=drop, agreement=agreement, reference=reference)
    return Evaluation(
        run=run,
        scores=scores,
        interval=ap_interval(samples) if samples else None,
        drop=drop,
        agreement=agreement,
        verdicts=tuple(verdicts),
        samples=samples,
    )


def _drop(reference: Evaluation, candidate: CocoScores, samples: ApSamples | None) -> ApInterval | None:
    if reference.samples is not None and samples is not None:
        return paired_ap_drop(reference.samples, samples)
    if reference.scores.ap is None or candidate.ap is None:
        return None
    value = reference.scores.ap - candidate.ap
    return ApInterval(
        value=value, low=value, high=value, standard_error=0.0, confidence=0.0, resamples=0, images=candidate.images
    )


def _judge(
    gate: Gate,
    run: DetectionRun,
    scores: CocoScores,
    *,
    drop: ApInterval | None,
    agreement: DetectionAgreement | None,
    reference: Evaluation | None,
) -> Sequence[Verdict]:
    verdicts: list[Verdict] = []
    if scores.ap is not None:
        verdicts += judge_ap(gate, scores.ap, subject=run.subject, images=scores.images)
    if drop is not None and reference is not None and reference.scores.ap is not None:
        verdicts += judge_drop(gate, drop, reference_ap=reference.scores.ap, subject=run.subject)
    if agreement is not None:
        verdicts += judge_agreement(gate, agreement, subject=run.subject)
    return verdicts


def evaluation_drift(reference: Evaluation, candidate: Evaluation) -> ScoreDrift | None:
    """How far the scores of ``candidate`` are from the reference's on the same images; None: their classes differ."""
    if reference.run.names != candidate.run.names:
        return None
    image_ids = sorted(reference.run.detections)
    return score_drift(
        [reference.run.detections[image_id] for image_id in image_ids],
        [candidate.run.detections[image_id] for image_id in image_ids],
        class_names=reference.run.names,
    )
