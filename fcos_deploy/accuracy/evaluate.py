"""Evaluates models on backends: average precision, its uncertainty, agreement with a reference, and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fcos_deploy.accuracy.bootstrap import ApInterval, ApSamples, ap_interval, match_dataset, paired_ap_drop, sample_ap
from fcos_deploy.accuracy.coco import CocoScores, coco_scores
from fcos_deploy.accuracy.collect import DetectionRun, Target, collect_detections
from fcos_deploy.accuracy.dataset import Dataset, folder_images, label_index, load_coco, truth_from_detections
from fcos_deploy.accuracy.gate import Gate, Verdict, judge_agreement, judge_ap, judge_drop
from fcos_deploy.accuracy.matching import DetectionAgreement, MatchOptions, compare_detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["Evaluation", "EvaluationRequest", "Evaluations", "evaluate", "evaluate_run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """What to evaluate, on what, against what.

    Without ``annotations`` the detections of ``reference`` with at least ``reference_score`` are the truth.
    ``limit``: only the first images. ``resamples``: of the bootstrap; 0 leaves intervals out.
    ``predictions``: folder that makes an interrupted run resumable.
    """

    targets: tuple[Target, ...]
    images: Path
    annotations: Path | None = None
    reference: Target | None = None
    reference_score: float = 0.3
    gate: Gate = field(default_factory=Gate)
    matching: MatchOptions = field(default_factory=MatchOptions)
    resamples: int = 1000
    seed: int = 0
    limit: int | None = None
    predictions: Path | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("There is nothing to evaluate.")
        if self.annotations is None and self.reference is None:
            raise ConfigError(
                "Accuracy needs annotations, or a reference model whose detections are taken for the truth.",
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
    """The reference, if there was one, and every target, in the order asked for."""

    dataset: Dataset
    reference: Evaluation | None
    targets: tuple[Evaluation, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Of all targets."""
        return tuple(verdict for target in self.targets for verdict in target.verdicts)


def evaluate(request: EvaluationRequest, *, progress: ProgressFn = no_progress) -> Evaluations:
    """Evaluate every target on all images, one model in memory at a time; what it found is scored while the next runs.

    Raises:
        ConfigError: images, annotations and models do not fit together.
        FcosDeployError: a model cannot be opened or run, an image cannot be read.
    """
    annotated = None
    if request.annotations is not None:
        annotated = load_coco(request.annotations, images=request.images).first(request.limit)
    images = annotated.images if annotated else folder_images(request.images)[: request.limit]

    def collect(target: Target) -> DetectionRun:
        return collect_detections(target, images, folder=request.predictions, progress=progress)

    reference_run = collect(request.reference) if request.reference else None
    dataset = annotated or _reference_truth(request, reference_run)
    with ThreadPoolExecutor(1) as scoring:  # one thread, so that the reference is scored before its targets
        reference = scoring.submit(evaluate_run, dataset, reference_run, request=request) if reference_run else None

        def score(run: DetectionRun) -> Evaluation:
            return evaluate_run(dataset, run, request=request, reference=reference.result() if reference else None)

        targets = [scoring.submit(score, collect(target)) for target in request.targets]
        return Evaluations(
            dataset=dataset,
            reference=reference.result() if reference else None,
            targets=tuple(target.result() for target in targets),
        )


def _reference_truth(request: EvaluationRequest, run: DetectionRun | None) -> Dataset:
    if run is None:  # Excluded by the request's own check.
        raise ConfigError("Accuracy needs annotations or a reference.")
    images = folder_images(request.images)[: request.limit]
    return truth_from_detections(
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
