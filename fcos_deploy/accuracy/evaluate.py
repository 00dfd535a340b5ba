"""Evaluation of detectors: COCO AP, how sure it is, how far they agree with a reference, and whether gates hold."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fcos_deploy.accuracy.coco import (
    ApInterval,
    ApSamples,
    ClassMatches,
    CocoScores,
    ap_interval,
    coco_scores,
    match_dataset,
    paired_ap_drop,
    sample_ap,
    selection_factor,
    widened_for_selection,
)
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    count_copies,
    folder_images,
    ground_truth_from_detections,
    label_index,
    load_coco,
)
from fcos_deploy.accuracy.gate import Verdict, judge_agreement, judge_ap, judge_drop, judge_operating_drop
from fcos_deploy.accuracy.operating_point import (
    Confusion,
    OperatingCounts,
    OperatingDrop,
    OperatingGoal,
    OperatingPoint,
    Thresholds,
    carried_thresholds,
    chosen_thresholds,
    confusion,
    confusion_json,
    equivalent_thresholds,
    operating_counts,
    operating_drops,
    operating_points,
    operating_problem,
)
from fcos_deploy.accuracy.predictions import DetectionRun, DetectionRuns, collect_detections
from fcos_deploy.bundle.manifest import AccuracyFigure, Manifest, carried_scores
from fcos_deploy.bundle.store import is_bundle, open_trusted
from fcos_deploy.core.detections import Detections, pairwise_iou
from fcos_deploy.core.enums import Orientation, Precision
from fcos_deploy.core.errors import ConfigError, some_names
from fcos_deploy.core.gate import (
    DetectionAgreement,
    Finding,
    Gate,
    Judge,
    MatchOptions,
    ScoreDrift,
    Severity,
    agreement_json,
    compare_detections,
    score_drift,
    undecided_because,
)
from fcos_deploy.core.image import pixels_sha256, read_image
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import DetectorSpec

__all__ = [
    "CURVE_COLUMNS",
    "OPERATING_SCORE",
    "TABLE_COLUMNS",
    "Evaluation",
    "EvaluationRequest",
    "Evaluations",
    "baseline_problem",
    "compared_with",
    "curve_rows",
    "evaluate",
    "evaluation_json",
    "evaluation_row",
    "evidence_problem",
    "judge_evaluation",
    "judge_operating_point",
    "shared_with_calibration",
    "size_cell",
    "widened_evaluation",
    "with_copies",
]


TABLE_COLUMNS = (
    *("backend", "precision", "AP", "AP50", "AP75", "small/medium/large"),
    *("95% interval", "drop", "agree", "images", "ms/image"),
)
_CURVE_RECALLS = (10, 30, 50, 70, 80, 90, 95)  # percent
CURVE_COLUMNS = ("class", *(f"{recall} %" for recall in _CURVE_RECALLS))

# Detections with less are seldom shown to anybody, and in every model there are many of them.
OPERATING_SCORE = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """The detectors to evaluate, the images, and what they are judged by.

    Without ``annotations`` the detections of ``reference`` with at least ``reference_score`` are the ground truth; what
    can be limited is then the share of these detections that agree, not a loss of AP.
    ``limit``: only the first images. ``sample``: that many images, with classes and object sizes as in all of them.
    ``resamples``: number of bootstrap resamples; 0 leaves intervals out. ``predictions``: folder that makes an
    interrupted run resumable. ``operating_goal``: what the score threshold of each class is chosen for; None: the
    thresholds that a bundle carries, elsewhere the best F1 of the reference. ``runs``: those that exist already.
    ``dataset``: what ``annotations`` and ``images`` hold, where they have been read. ``earlier``: what was evaluated
    with it before; one of ``runs`` that was scored there is not scored again.
    """

    candidates: tuple[DetectorSpec, ...]
    images: Path
    annotations: Path | None = None
    reference: DetectorSpec | None = None
    reference_score: float = OPERATING_SCORE
    gate: Gate = field(default_factory=Gate)
    resamples: int = 1000
    seed: int = 0
    limit: int | None = None
    sample: int | None = None
    predictions: Path | None = None
    operating_goal: OperatingGoal | None = None
    runs: DetectionRuns | None = None
    dataset: Dataset | None = None
    earlier: tuple[Evaluations, ...] = ()

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("There is nothing to evaluate.")
        if self.annotations is None and self.reference is None:
            raise ConfigError(
                "Accuracy needs annotations, or a reference model whose detections are taken for the ground truth.",
                hint="give --annotations FILE, or --reference CHECKPOINT",
            )
        OperatingGoal.require_annotations(self.operating_goal, self.annotations)
        gate = self.gate
        needs_annotations = (gate.max_map_drop, gate.max_precision_drop, gate.max_recall_drop)
        needs_reference = (*needs_annotations, gate.min_match_rate, gate.max_score_delta, gate.max_box_delta_px)
        if self.reference is None and any(limit is not None for limit in needs_reference):
            raise ConfigError(
                "A limit on a drop or on agreement needs the model to compare with.", hint="give --reference CHECKPOINT"
            )
        if self.annotations is None and any(limit is not None for limit in (*needs_annotations, gate.min_ap)):
            raise ConfigError(
                "AP, precision, recall and their loss cannot be limited without annotations: a reference's detections "
                "are no ground truth.",
                hint="give --annotations FILE, or limit what has to agree with --min-match-rate",
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"The number of images must be at least 1, got {self.limit}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model on one backend: its scores and, where there is a reference, how it compares.

    ``samples``: its AP in each resample, for further intervals. ``contradiction``: why its figures do not fit the
    annotations, so that nothing can be compared with it; empty when they do.
    ``operating_points``: each class at its score threshold; ``operating`` and ``confusion`` what these thresholds keep;
    none without annotations. ``precision_drop``, ``recall_drop``: what is lost there against the reference.
    ``score_drift``: how far the scores are from the reference's; None where their classes differ.
    """

    run: DetectionRun
    scores: CocoScores
    interval: ApInterval | None = None
    drop: ApInterval | None = None
    agreement: DetectionAgreement | None = None
    verdicts: tuple[Verdict, ...] = ()
    samples: ApSamples | None = None
    contradiction: str = ""
    operating_points: tuple[OperatingPoint, ...] = ()
    operating: OperatingCounts | None = None
    precision_drop: OperatingDrop | None = None
    recall_drop: OperatingDrop | None = None
    confusion: Confusion | None = None
    score_drift: ScoreDrift | None = None


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
    """Evaluate every candidate on all images, one model in memory at a time; it is scored while the next one opens.

    Raises:
        ConfigError: images, annotations and models do not fit together.
        FcosDeployError: a model cannot be opened or run, an image cannot be read.
    """
    dataset = _annotated_images(request)
    images = dataset.images if dataset else _spread(folder_images(request.images)[: request.limit], request.sample)

    scores: list[Future[Evaluation]] = []

    def collect(spec: DetectorSpec) -> DetectionRun:
        return collect_detections(
            spec,
            images,
            dataset=dataset,
            folder=request.predictions,
            runs=request.runs,
            opened=lambda: wait(scores),  # so that scoring slows no detection down
            progress=progress,
        )

    reference_run = collect(request.reference) if request.reference else None
    if dataset is None and reference_run is not None:
        dataset = ground_truth_from_detections(
            images,
            reference_run.detections,
            class_names=reference_run.names,
            min_score=request.reference_score,
            source=f"The reference '{reference_run.model}'",
        )
    if dataset is None:  # Excluded by the request's own check.
        raise ConfigError("Accuracy needs annotations or a reference.")
    manifests = _manifests(request)
    shared = _shared_images(request, manifests, images)
    dataset = replace(dataset, copies=count_copies(images), findings=(*dataset.findings, *shared.values()))
    carried = {}
    if dataset.annotated and request.operating_goal is None:
        carried = {model: manifest.accuracy for model, manifest in manifests.items()}
    with ThreadPoolExecutor(1) as scoring:  # one thread, so that the reference is scored before its candidates
        reference = None
        if reference_run is not None and request.reference is not None:
            figures = carried.get(request.reference.model)
            if figures is None:  # The thresholds of the reference that the candidates' bundle was made with.
                figures = next(iter(carried.values()), ())[:1]
            thresholds = _carried(figures, reference_run, dataset)
            reference = scoring.submit(_score, request, dataset, reference_run, None, thresholds)
            scores.append(reference)

        def score(run: DetectionRun, thresholds: Thresholds | None, problem: str) -> Evaluation:
            expected = reference.result() if reference else None
            return _score(request, dataset, run, expected, thresholds, problem=problem)

        for spec in request.candidates:
            run = collect(spec)
            thresholds = _carried(carried.get(spec.model, ()), run, dataset)
            overlap = shared.get(spec.model) if run.precision == Precision.INT8 else None
            scores.append(scoring.submit(score, run, thresholds, overlap.message if overlap else ""))
        evaluations = tuple(future.result() for future in scores)
    first = len(evaluations) - len(request.candidates)
    return Evaluations(dataset=dataset, reference=evaluations[0] if first else None, candidates=evaluations[first:])


def _annotated_images(request: EvaluationRequest) -> Dataset | None:
    """Those that are asked for; None without annotations."""
    dataset = request.dataset
    if dataset is None and request.annotations is not None:
        dataset = load_coco(request.annotations, images=request.images)
    return dataset and dataset.first(request.limit).sample(request.sample)


def _spread(images: tuple[EvaluationImage, ...], count: int | None) -> tuple[EvaluationImage, ...]:
    """``count`` images, evenly spaced; None keeps all."""
    if count is None or count >= len(images):
        return images
    return tuple(images[index * len(images) // count] for index in range(count))


def _manifests(request: EvaluationRequest) -> dict[Path, Manifest]:
    """Those of the bundles among the models."""
    manifests = {}
    for spec in (*request.candidates, *([request.reference] if request.reference else [])):
        if spec.model not in manifests and is_bundle(spec.model):
            with open_trusted(spec.model, spec.options.trust) as bundle:
                manifests[spec.model] = bundle.manifest
    return manifests


def _shared_images(
    request: EvaluationRequest, manifests: Mapping[Path, Manifest], images: Sequence[EvaluationImage]
) -> dict[Path, Finding]:
    """Which candidates were calibrated on some of the ``images``, and what is to be said of it."""
    calibrated = {
        spec.model: {sha256 for record in manifests[spec.model].calibration for sha256 in record.pixels}
        for spec in request.candidates
        if spec.model in manifests
    }
    findings = {}
    for model, seen in calibrated.items():
        orientation = manifests[model].contract.preprocess.orientation
        if message := shared_with_calibration(images, seen, orientation=orientation, of=f"'{model.name}'"):
            findings[model] = Finding(kind="overlap", severity=Severity.WARNING, message=message)
    return findings


def shared_with_calibration(
    images: Sequence[EvaluationImage], seen: Container[str], *, orientation: Orientation, of: str
) -> str:
    """Why INT8 cannot be judged on ``images``, as half a sentence; empty when ``seen``, hashes of pixels, has none.

    ``orientation``: the way up that the calibration images were read.
    """

    def is_seen(image: EvaluationImage) -> bool:
        return pixels_sha256(read_image(image.path, orientation=orientation)) in seen

    with ThreadPoolExecutor(usable_cpus(), "images") as pool:
        count = sum(pool.map(is_seen, images)) if seen else 0
    where = f"{count} of the {len(images)} images are calibration images of {of}"
    return f"{where}, on which its INT8 looks better than it is" if count else ""


def _carried(figures: Sequence[AccuracyFigure], run: DetectionRun, dataset: Dataset) -> Thresholds | None:
    """The thresholds that a bundle carries for the run, if it does."""
    compute = run.description.get("compute", "")
    scores = carried_scores(figures, backend=run.backend, precision=run.precision, compute=compute)
    return carried_thresholds(scores, dataset.class_names) if scores else None


def _score(
    request: EvaluationRequest,
    dataset: Dataset,
    run: DetectionRun,
    reference: Evaluation | None,
    thresholds: Thresholds | None,
    *,
    problem: str = "",
) -> Evaluation:
    """Score a run's detections, compare them with the reference's, and judge both.

    ``thresholds``: those that a bundle carries for it. ``problem``: as in ``judge_evaluation``.
    """
    gate, detections = request.gate, run.relabelled(label_index(run.names, dataset))
    before = _scored_before(request, dataset, run)
    if before is not None and before.operating is not None:
        scores, matches, samples = before.scores, list(before.operating.matches), before.samples
    else:
        scores, matches, samples = coco_scores(dataset, detections), match_dataset(dataset, detections), None
        if request.resamples and scores.ap is not None:
            samples = sample_ap(matches, resamples=request.resamples, seed=request.seed)
    goal = request.operating_goal
    thresholds = thresholds or chosen_thresholds(matches, goal=goal or OperatingGoal())
    evaluation = Evaluation(
        run=run,
        scores=scores,
        interval=ap_interval(samples) if samples else None,
        samples=samples,
        contradiction=baseline_problem(dataset, matches, detections=detections, ap=scores.ap),
        operating=operating_counts(matches, thresholds) if dataset.annotated else None,
    )
    if reference is not None:
        min_score = MatchOptions().min_score if request.annotations else request.reference_score
        options = MatchOptions(min_score=min_score, iou_threshold=0.5 if gate.min_iou is None else gate.min_iou)
        evaluation = compared_with(
            reference,
            evaluation,
            dataset=dataset,
            options=options,
            goal=goal,
            resamples=request.resamples,
            seed=request.seed,
        )
    if evaluation.operating is not None:
        thresholds = evaluation.operating.thresholds
        points = operating_points(matches, dataset.class_names, thresholds)
        confused = confusion(dataset, detections, thresholds)
        evaluation = replace(evaluation, operating_points=points, confusion=confused)
    dataset = with_copies(dataset, run.detections)
    verdicts = judge_evaluation(gate, evaluation, dataset=dataset, reference=reference, problem=problem)
    return replace(evaluation, verdicts=verdicts)


def _scored_before(request: EvaluationRequest, dataset: Dataset, run: DetectionRun) -> Evaluation | None:
    """The evaluation of these very detections against the same annotations, resampled alike; None without one."""
    for evaluations in request.earlier:
        known = evaluations.dataset
        if (known.class_names, known.ground_truth) != (dataset.class_names, dataset.ground_truth):
            continue
        for evaluation in evaluations.candidates:
            samples = evaluation.samples
            alike = samples is not None and (len(samples.values) - 1, samples.seed) == (request.resamples, request.seed)
            if evaluation.run.detections is run.detections and alike:
                return evaluation
    return None


def with_copies(dataset: Dataset, detections: Mapping[int, Detections]) -> Dataset:
    """``dataset`` that counts as copies, in whatever file, the images in which the very same is detected."""
    contents = [(d.boxes.tobytes(), d.scores.tobytes(), d.labels.tobytes()) for d in detections.values() if len(d)]
    return replace(dataset, copies=max(dataset.copies, len(contents) - len(set(contents))))


def compared_with(
    reference: Evaluation,
    evaluation: Evaluation,
    *,
    dataset: Dataset,
    options: MatchOptions,
    goal: OperatingGoal | None,
    resamples: int,
    seed: int = 0,
) -> Evaluation:
    """``evaluation`` with what it lost against the reference: detections, scores, AP, and precision and recall.

    Precision and recall are those at the score thresholds. With a goal each model has the thresholds that reach it, and
    a bundle's model has those that the bundle carries. Otherwise the reference's are chosen, and the model gets those
    that keep its operating point.
    """
    expected, detections = (e.run.relabelled(label_index(e.run.names, dataset)) for e in (reference, evaluation))
    agreement, drop = compare_detections(expected, detections, options=options), None
    if reference.samples is not None and evaluation.samples is not None:
        drop = paired_ap_drop(reference.samples, evaluation.samples, same_outputs=agreement.same_outputs)
    elif reference.scores.ap is not None and evaluation.scores.ap is not None:
        drop = ApInterval.point(reference.scores.ap - evaluation.scores.ap, images=evaluation.scores.images)
    shift = None
    if reference.run.names == evaluation.run.names:
        own, others = reference.run.detections, evaluation.run.detections
        ids = sorted(own)
        shift = score_drift([own[i] for i in ids], [others[i] for i in ids], class_names=reference.run.names)
    evaluation = replace(evaluation, agreement=agreement, drop=drop, score_drift=shift)
    before, after = reference.operating, evaluation.operating
    if before is None or after is None:
        return evaluation
    if goal is None and not after.thresholds.carried:
        after = operating_counts(after.matches, equivalent_thresholds(before, after.matches))
    precision, recall = operating_drops(
        before, after, resamples=resamples, seed=seed, same_outputs=agreement.same_outputs
    )
    return replace(evaluation, operating=after, precision_drop=precision, recall_drop=recall)


def judge_evaluation(
    gate: Gate,
    evaluation: Evaluation,
    *,
    dataset: Dataset,
    reference: Evaluation | None,
    subject: str = "",
    problem: str = "",
) -> tuple[Verdict, ...]:
    """A verdict on every limit of ``gate``: inconclusive where the data cannot decide it, with the reason.

    ``subject``: what the verdicts call the model; its backend and precision by default. ``problem``: why these images
    cannot decide anything, if that is known before.
    """
    subject = subject or evaluation.run.subject
    scores, known = evaluation.scores, problem
    problem = problem or undecided_because(dataset.findings) or evidence_problem(dataset, judge=gate.judge)
    verdicts = judge_ap(
        gate, scores.ap, subject=subject, images=scores.images, interval=evaluation.interval, problem=problem
    )
    if reference is not None and evaluation.agreement is not None:
        verdicts += judge_drop(
            gate,
            evaluation.drop,
            reference_ap=reference.scores.ap,
            subject=subject,
            problem=problem or reference.contradiction,
        )
        verdicts += judge_operating_point(
            gate, evaluation, reference, dataset, subject=subject, problem=problem or reference.contradiction
        )
        if gate.judge is Judge.INTERVAL:
            known = known or sample_problem(dataset)
        verdicts += judge_agreement(gate, evaluation.agreement, subject=subject, problem=known)
    return tuple(verdicts)


def judge_operating_point(
    gate: Gate, evaluation: Evaluation, reference: Evaluation, dataset: Dataset, *, subject: str = "", problem: str = ""
) -> list[Verdict]:
    """Judge what is lost of precision and recall at the score thresholds; the parameters are ``judge_evaluation``'s."""
    names = dataset.class_names
    if evaluation.operating is not None and reference.operating is not None:
        problem = problem or operating_problem(reference.operating, evaluation.operating, names)
    verdicts = []
    for share, loss in (("precision", evaluation.precision_drop), ("recall", evaluation.recall_drop)):
        verdicts += judge_operating_drop(gate, share, loss, class_names=names, subject=subject, problem=problem)
    return verdicts


def widened_evaluation(evaluation: Evaluation, choices: int) -> Evaluation:
    """The figures of a model that was chosen among ``choices`` on these very images, on which it looks too good."""
    drop, agreement = evaluation.drop, evaluation.agreement
    if choices < 2 or agreement is None:
        return evaluation

    def widened(loss: OperatingDrop | None) -> OperatingDrop | None:
        return loss and replace(loss, drop=widened_for_selection(loss.drop, choices))

    rate, (low, high), factor = agreement.match_rate, agreement.match_interval, selection_factor(choices)
    interval = max(0.0, rate - factor * (rate - low)), min(1.0, rate + factor * (high - rate))
    return replace(
        evaluation,
        drop=drop and widened_for_selection(drop, choices),
        precision_drop=widened(evaluation.precision_drop),
        recall_drop=widened(evaluation.recall_drop),
        agreement=replace(agreement, match_interval=interval),
    )


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """The scores under COCO's names (in 0..1, null where the data has no such object), and how they came about."""
    run = evaluation.run
    return {
        **to_json(evaluation.scores),
        "backend": run.backend,
        "precision": run.precision,
        "model": run.model,
        **{name: to_json(getattr(evaluation, name)) for name in ("interval", "drop", "precision_drop", "recall_drop")},
        "agreement": evaluation.agreement and agreement_json(evaluation.agreement),
        "verdicts": to_json(evaluation.verdicts),
        "operating_points": to_json(evaluation.operating_points),
        **(confusion_json(evaluation.confusion) if evaluation.confusion else {}),
        "seconds": to_json(run.seconds),
        "resumed_images": run.resumed,
        "session": dict(run.description),
    }


def size_cell(sizes: Iterable[float | None]) -> str:
    """AP of small, medium and large objects in one cell of a table, ``-`` where the data has none."""
    return "/".join("-" if ap is None else f"{ap:.3f}" for ap in sizes)


def curve_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Precision of each class at some recalls, at IoU 0.5, as ``CURVE_COLUMNS`` names them."""
    return [
        (score.name, *(f"{score.precision[recall]:.3f}" for recall in _CURVE_RECALLS))
        for score in evaluation.scores.per_class
        if score.precision
    ]


def evaluation_row(evaluation: Evaluation) -> tuple[str, ...]:
    """One line of the table, as ``TABLE_COLUMNS`` names it."""
    run, scores, drop = evaluation.run, evaluation.scores, evaluation.drop
    interval, agreement = evaluation.interval, evaluation.agreement
    timed = scores.images - run.resumed
    return (
        run.backend,
        run.precision,
        *("-" if ap is None else f"{ap:.3f}" for ap in (scores.ap, scores.ap50, scores.ap75)),
        size_cell((scores.ap_small, scores.ap_medium, scores.ap_large)),
        f"{interval.low:.3f}-{interval.high:.3f}" if interval else "",
        f"{drop.value:+.3f} ({drop.low:+.3f} to {drop.high:+.3f})" if drop else "",
        f"{agreement.match_rate:.1%}" if agreement and not agreement.empty else "",
        str(scores.images),
        f"{1000 * run.seconds.total / timed:.1f}" if timed else "",
    )


# Fewer do not show how much images differ: of few images a bootstrap interval is too narrow, of one it has no width.
_MIN_IMAGES = 10
# Reference AP below which no relative limit means anything: a drop of 0.01 would be a fifth of it.
_MIN_REFERENCE_AP = 0.05
# A class is suspect when the reference is at least this sure of this many detections of it, on average ...
_SURE_SCORE, _SURE_DETECTIONS = 0.3, 10
# ... and not even this fraction of what their scores promise is right at IoU 0.5.
_KEPT_PROMISE = 0.25
# The same of single images: with this share of them, or fewer, a loss is hardly diluted.
_FEW_IMAGES, _RARE = 0.1, 0.001
_OBLONG = 0.1  # logarithm of width over height: 10 % more than a square


def evidence_problem(dataset: Dataset, *, judge: Judge) -> str:
    """Why no figure over this data can be judged, as half a sentence; empty when it can."""
    truths = [dataset.ground_truth[image.image_id] for image in dataset.images]
    counts = np.zeros(len(dataset.class_names), np.int64)
    for boxes in truths:
        counts += np.bincount(boxes.classes[~boxes.crowd], minlength=len(counts))
    if not counts.any():
        what = "the annotations hold" if dataset.annotated else "the reference finds"
        return f"{what} no object in these {len(dataset.images)} images"
    if judge is Judge.INTERVAL and (problem := sample_problem(dataset)):
        return problem
    unseen = [name for name, count in zip(dataset.class_names, counts, strict=True) if not count]
    if judge is Judge.INTERVAL and dataset.annotated and unseen:
        return f"no image shows an object of {some_names(unseen)}, so that nothing is known about them"
    return ""


def sample_problem(dataset: Dataset) -> str:
    """Why no interval over these images can be trusted, as half a sentence; empty when it can."""
    if len(dataset.images) < _MIN_IMAGES:
        return (
            f"{len(dataset.images)} images are too few for a confidence interval (at least {_MIN_IMAGES} are needed); "
            "--judge point judges the measured figure alone"
        )
    if dataset.copies:
        return (
            f"{dataset.copies} of the {len(dataset.images)} images are copies of others, which make intervals too "
            "narrow; --judge point judges the measured figure alone"
        )
    return ""


def baseline_problem(
    dataset: Dataset,
    matches: Sequence[ClassMatches],
    *,
    ap: float | None,
    detections: Mapping[int, Detections] | None = None,
    subject: str = "the reference",
) -> str:
    """Why the figures of ``subject`` contradict the annotations, as half a sentence; empty when they fit.

    matches: its detections of each class. ``detections``: the same by image; without them boxes that lie across the
    annotated ones are not told. Annotations in another unit, of other images or with swapped names give every model an
    AP near 0, and a loss near 0 with it.
    """
    if ap is None or not dataset.annotated:
        return ""
    advice = "check the boxes' format, the class names and that the file belongs to these images"
    for name, match in zip(dataset.class_names, matches, strict=True):
        judged = (match.scores >= _SURE_SCORE) & ~match.ignored[0]
        promised, kept = float(match.scores[judged].sum()), int(match.correct[0][judged].sum())
        if judged.sum() >= _SURE_DETECTIONS and kept < _KEPT_PROMISE * promised:
            return (
                f"{subject} does not fit the annotations: of its {judged.sum()} detections of '{name}' with a "
                f"score of at least {_SURE_SCORE} (mean {promised / judged.sum():.2f}) {kept} lie on an annotated one; "
                f"{advice}"
            )
    if ap < _MIN_REFERENCE_AP:
        return f"the AP of {subject} is {ap:.3f}, too low to compare with; {advice}"
    unlike = _images_unlike_others(matches, count=len(dataset.images))
    if len(unlike) > _FEW_IMAGES * len(dataset.images):
        return (
            f"{subject} does not fit the annotations of {len(unlike)} of the {len(dataset.images)} images, such as "
            f"'{dataset.images[unlike[0]].path.name}', where next to none of its sure detections lies on an annotated "
            f"one, unlike in the others; {advice}"
        )
    turned, pairs = _turned_boxes(dataset, detections) if detections else (0, 0)
    if pairs >= _SURE_DETECTIONS and turned > pairs / 2:
        return (
            f"{turned} of {pairs} annotated boxes are wide where those of {subject} are high, or the reverse; {advice}"
        )
    return ""


def _images_unlike_others(matches: Sequence[ClassMatches], *, count: int) -> list[int]:
    """Positions of the images on whose annotations far fewer sure detections lie than elsewhere."""
    promised, kept = np.zeros(count), np.zeros(count)
    for match in matches:
        judged = (match.scores >= _SURE_SCORE) & ~match.ignored[0]
        promised += np.bincount(match.image[judged], match.scores[judged], minlength=count)
        kept += np.bincount(match.image[judged], match.correct[0][judged], minlength=count)
    shown = promised > 0
    # The third quartile is that of the images that fit where up to three quarters do not.
    expected = promised * (np.percentile(kept[shown] / promised[shown], 75) if shown.any() else 0.0)
    few = np.flatnonzero(kept < _KEPT_PROMISE * expected)
    return [i for i in few.tolist() if _poisson(int(kept[i]), float(expected[i])) < _RARE]


def _poisson(count: int, expected: float) -> float:
    """The chance of at most ``count`` events where ``expected`` are."""
    return sum(math.exp(k * math.log(expected) - expected - math.lgamma(k + 1)) for k in range(count + 1))


def _turned_boxes(dataset: Dataset, detections: Mapping[int, Detections]) -> tuple[int, int]:
    """How many clearly oblong boxes lie across the sure detection that they overlap by half, and how many in all."""
    turned = pairs = 0
    for image in dataset.images:
        boxes, sure = dataset.ground_truth[image.image_id], detections[image.image_id].above(_SURE_SCORE)
        overlaps = pairwise_iou(boxes.boxes, sure.boxes.astype(np.float64))
        overlaps[boxes.classes[:, None] != sure.labels] = 0.0
        rows, columns = np.nonzero(overlaps >= 0.5)
        slant = [
            np.diff(np.log(np.maximum(b[:, 2:] - b[:, :2], 1e-3)), axis=1)[:, 0] for b in (boxes.boxes, sure.boxes)
        ]
        annotated, detected = slant[0][rows], slant[1][columns]
        oblong = np.minimum(abs(annotated), abs(detected)) > _OBLONG
        turned += int((oblong & (annotated * detected < 0)).sum())
        pairs += int(oblong.sum())
    return turned, pairs
