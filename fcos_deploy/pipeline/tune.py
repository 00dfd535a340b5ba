"""From a budget to a configuration: input size, backend, precision and threads, measured on this machine.

Times first: they are cheap, and grow with the input size, so that one measurement decides for all sizes on one side of
it. Accuracy only for what the times leave, in a race on growing subsets of the images. Every trial is kept by its
content, so that an interrupted search goes on and a widened one measures what is new.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fcos_deploy.accuracy.coco import Contender, RaceRules, Standing, race, widened_for_selection
from fcos_deploy.accuracy.dataset import (
    Dataset,
    EvaluationImage,
    count_copies,
    folder_images,
    ground_truth_from_detections,
    label_index,
)
from fcos_deploy.accuracy.evaluate import Evaluations, baseline_problem, evidence_problem, with_copies
from fcos_deploy.accuracy.gate import Verdict, judge_ap
from fcos_deploy.accuracy.predictions import collect_detections
from fcos_deploy.benchmark.run import BenchmarkResult
from fcos_deploy.bundle.manifest import MANIFEST_NAME
from fcos_deploy.bundle.selection import select_artifact
from fcos_deploy.bundle.store import is_bundle, open_trusted
from fcos_deploy.bundle.writer import lock_folder
from fcos_deploy.core.artifact import is_checkpoint
from fcos_deploy.core.backend import get_backend
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import (
    AccuracyGateError,
    BudgetError,
    ConfigError,
    FcosDeployError,
    InconclusiveError,
)
from fcos_deploy.core.files import replace_folder, restore_folder, write_text
from fcos_deploy.core.gate import Gate, Judge, Outcome, undecided_because
from fcos_deploy.core.machine import read_machine
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import own_folder
from fcos_deploy.pipeline.deploy import Deployment, backends_to_measure, deploy
from fcos_deploy.pipeline.source import source_contract
from fcos_deploy.pipeline.steps import DeployRequest, open_image_sets
from fcos_deploy.pipeline.tune_models import Configuration, TuneModels
from fcos_deploy.pipeline.tune_search import Measured, Search, Trials, TuneRequest
from fcos_deploy.report.tuning import PointStatus, TunedPoint, TuningData, front_of

__all__ = ["Answer", "Tuning", "open_search", "tune"]

_NEXT = 2
_BUNDLE = "bundle"
_TIME_LIMITS = ("max_latency_ms", "min_throughput")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """A finished search: ``data`` is what its page shows; ``deployment`` the bundle of the chosen one, if there is one.

    ``verdicts``: on ``min_ap`` of the chosen one, and on its time in the bundle. ``failure``: why there is no bundle
    although there is a limit. ``earlier_bundle``: what an earlier search left in the folder, if this one made none.
    """

    data: TuningData
    chosen: TunedPoint | None
    deployment: Deployment | None
    verdicts: tuple[Verdict, ...]
    seconds: float
    failure: FcosDeployError | None = None
    earlier_bundle: Path | None = None


def tune(request: TuneRequest, *, progress: ProgressFn = no_progress) -> Tuning:
    """Search, make the bundle of what was chosen, and leave ``tune.json`` with all that was measured.

    That nothing keeps the limits is a ``failure`` of the answer, whose figures are of use all the same.

    Raises:
        ConfigError: an axis without a value that works here.
        FcosDeployError: as deploying.
    """
    started = time.perf_counter()
    with open_search(request, progress=progress) as (search, answer):
        search.run()
        answer.race()
        deployment, verdicts, failure = _deploy_best(search, answer, progress=progress)
    shutil.rmtree(request.output / "trials" / "work", ignore_errors=True)  # What it holds is in the cache of steps.
    data = answer.data()
    if deployment is not None:
        of_bundle = [verdict.message for verdict in verdicts if verdict.name in _TIME_LIMITS]
        ap = deployment.evaluations.candidates[-1].interval
        if ap is not None and request.annotations is not None:
            of_bundle.append(f"AP {ap.value:.3f} ({ap.low:.3f} to {ap.high:.3f}) as deployed")
        of_bundle.append(_load_sentence(deployment))
        data = replace(data, notes=(*data.notes, *(f"Its bundle: {sentence}." for sentence in of_bundle)))
    write_text(request.output / "tune.json", json.dumps(to_json(data), indent=1) + "\n")
    return Tuning(
        data=data,
        chosen=next((point for point in data.points if point.status is PointStatus.CHOSEN), None),
        deployment=deployment,
        verdicts=verdicts,
        seconds=time.perf_counter() - started,
        failure=failure,
        earlier_bundle=bundle if deployment is None and (bundle := request.output / _BUNDLE).exists() else None,
    )


@contextlib.contextmanager
def open_search(request: TuneRequest, *, progress: ProgressFn = no_progress) -> Iterator[tuple[Search, Answer]]:
    """The two halves of a search, over the trials in the folder of the request.

    Raises:
        ConfigError: the folder is another one's, or an axis has no value that works here.
        BundleError: another search writes into the folder.
    """
    output = request.output
    if output.exists() and not (output / "trials").is_dir() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"'{output}' exists and is not the folder of a search.", hint="choose another output")
    bundle = output / _BUNDLE
    if bundle.exists() and not (bundle / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"'{bundle}' exists and is not a bundle, so it is not replaced.", hint="choose another output"
        )
    folder = own_folder(output / "trials")
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock_folder(folder))
        models = stack.enter_context(
            contextlib.closing(_open_models(request, folder=folder, stack=stack, progress=progress))
        )
        dataset = _dataset(request, models, folder=folder, progress=progress)
        image = dataset.images[0].path
        trials = Trials(folder / "times", machine=read_machine(), image=image)
        search = Search(request, models, image=image, trials=trials, progress=progress)
        yield search, Answer(search, dataset, folder=folder / "predictions", progress=progress)


def _measured_alone(deployment: Deployment) -> BenchmarkResult:
    """The result of the bundle's last artifact that has more than a latency."""
    return next(r for r in reversed(deployment.benchmark.results) if r.throughput_fps is not None)


def _load_sentence(deployment: Deployment) -> str:
    """What the bundle takes beside time as it opens by default: memory of a new process, and power where it is told."""
    result = _measured_alone(deployment)
    power, cold = result.power, result.cold_start
    parts = [] if cold is None else [f"{cold.peak_memory_mib:.0f} MiB of memory in a new process"]
    if power.watts is None:
        parts.append(f"power is not known ({power.problem})")
    else:
        parts.append(f"{power.watts:.1f} W at full load ({power.source})")
    return f"as it opens by default {' and '.join(parts)}"


def _memory_verdicts(request: TuneRequest, chosen: Configuration, deployment: Deployment) -> tuple[Verdict, ...]:
    """The limit on memory, if there is one, held to what the bundle takes."""
    limit, cold = request.max_memory_mib, _measured_alone(deployment).cold_start
    if limit is None:
        return ()
    outcome, message = Outcome.INCONCLUSIVE, "memory was not measured: this model is no file that a new process opens"
    if cold is not None:
        outcome = Outcome.PASSED if cold.peak_memory_mib <= limit else Outcome.FAILED
        message = f"{cold.peak_memory_mib:.0f} MiB of memory in a new process, at most {limit:g} asked for"
    value = cold.peak_memory_mib if cold else None
    return (
        Verdict(name="max_memory_mib", subject=str(chosen), outcome=outcome, value=value, limit=limit, message=message),
    )


def _time_verdict(request: TuneRequest, chosen: Configuration, measured: Measured, *, limit: float) -> Verdict:
    """The limit on time, held to what the bundle takes: layers may have gone back to float in it."""
    outcome = Outcome.PASSED
    if measured.ms(request.percentile) > limit:
        outcome = Outcome.INCONCLUSIVE if measured.problem else Outcome.FAILED
    name, value = "max_latency_ms", measured.ms(request.percentile)
    which = "90th percentile" if request.percentile == 90 else "median"
    message = f"{value:.1f} ms an image as deployed ({which}), at most {limit:g} asked for"
    if request.min_throughput and measured.throughput is not None:
        name, value, limit = "min_throughput", measured.throughput, request.min_throughput
        message = f"{value:.1f} images/s as deployed, at least {limit:g} asked for"
    message += f"; {measured.problem}" if outcome is Outcome.INCONCLUSIVE else ""
    return Verdict(name=name, subject=str(chosen), outcome=outcome, value=value, limit=limit, message=message)


def _deploy_best(
    search: Search, answer: Answer, *, progress: ProgressFn
) -> tuple[Deployment | None, tuple[Verdict, ...], FcosDeployError | None]:
    """The bundle of the best that can be deployed, with verdicts on its accuracy and time; or why there is none.

    After one that cannot be deployed, or is too slow as it was, the search goes on: what was pruned for it may be the
    best now. An earlier answer's bundle stays until there is another one.
    """
    output = search.request.output
    place = output / "trials" / "work" / _BUNDLE
    while True:
        try:
            chosen = answer.choose()
        except BudgetError as error:
            return None, (), error
        if chosen is None:
            return None, (), None
        try:
            deployment = deploy(search.models.deploy_request(chosen, place), progress=progress)
        except InconclusiveError as error:
            return None, answer.verdicts, error
        except AccuracyGateError as error:
            search.refused[chosen.engine] = error.message
        else:
            evaluation = deployment.evaluations.candidates[-1]  # behind the same in float32, if it is in bf16
            limits, limit = answer.judge_bundle(chosen, deployment.evaluations), search.request.max_ms
            limits += _memory_verdicts(search.request, chosen, deployment)
            if failed := [verdict.message for verdict in limits if verdict.outcome is Outcome.FAILED]:
                search.refused[chosen.engine] = "; ".join(failed)
            elif limit is not None:
                measured = search.time_bundle(chosen, deployment.bundle)
                limits = (*limits, _time_verdict(search.request, chosen, measured, limit=limit))
            if all(verdict.outcome is not Outcome.FAILED for verdict in limits):
                verdicts = (*limits, *evaluation.verdicts)
                restore_folder(output / _BUNDLE)
                replace_folder(deployment.bundle, output / _BUNDLE)
                return replace(deployment, bundle=output / _BUNDLE), verdicts, None
        search.run()
        answer.race()


def _open_models(
    request: TuneRequest, *, folder: Path, stack: contextlib.ExitStack, progress: ProgressFn
) -> TuneModels:
    model = request.model
    if isinstance(model, Path) and is_bundle(model):
        # Its float graph takes the place of the checkpoint, which a device does not have, and neither PyTorch.
        bundle = stack.enter_context(open_trusted(model, request.trust))
        readers = {ArtifactKind.ONNX: "onnxruntime"}
        selection = select_artifact(bundle, precisions=(Precision.FP32,), readers=readers, purpose="tuning")
        model = bundle.path(selection.artifact.path)
    precisions = request.precisions or (
        (Precision.FP32, Precision.INT8) if request.calibration_images else (Precision.FP32,)
    )
    contract = source_contract(model, options=request.options)
    is_graph = isinstance(model, Path) and not is_checkpoint(model)
    deployment = DeployRequest(
        checkpoint=model,
        output=folder / "work" / "own",
        calibration_images=request.calibration_images or request.images,
        backends=request.backends,
        precisions=precisions,
        tail=request.tail or (contract.tail if is_graph else Tail.RAW),
        options=request.options,
        images=request.images,
        annotations=request.annotations,
        max_map_drop=request.max_map_drop,
        max_precision_drop=request.max_precision_drop,
        max_recall_drop=request.max_recall_drop,
        min_match_rate=request.min_match_rate,
        operating_goal=request.operating_goal,
        judge=request.judge,
        # Without INT8 nothing is calibrated, on whatever images.
        allow_overlap=request.allow_overlap or request.calibration_images is None,
        calibration_count=request.calibration_count,
        seed=request.seed,
        opset=request.opset,
        command=request.command,
    )
    backends = backends_to_measure(deployment)
    images = open_image_sets(deployment, contract)
    return TuneModels(
        deployment,
        images,
        folder=folder,
        sizes=request.sizes,
        backends=backends,
        own_ranges=request.own_ranges,
        progress=progress,
    )


def _dataset(request: TuneRequest, models: TuneModels, *, folder: Path, progress: ProgressFn) -> Dataset:
    """The annotated images; without annotations what the model detects in them at its own size."""
    dataset = models.annotated
    if dataset is not None:
        label_index(models.contract.class_names, dataset)  # which refuses names that the model does not know
        return _with_objects(dataset)
    images = folder_images(request.images)
    run = collect_detections(models.reference(), images, folder=own_folder(folder / "predictions"), progress=progress)
    dataset = ground_truth_from_detections(
        images, run.detections, class_names=run.names, min_score=0.3, source=f"The model '{run.model}'"
    )
    return _with_objects(dataset)


def _with_objects(dataset: Dataset) -> Dataset:
    """What an AP can be had of, with its copies counted; ConfigError where there is no object."""
    problem = evidence_problem(dataset, judge=Judge.POINT)
    if problem:
        raise ConfigError(f"There is nothing to tune on: {problem}.", hint="give other --images, or --annotations")
    return replace(dataset, copies=count_copies(dataset.images))


class Answer:
    """What the race leaves, and the choice among it."""

    def __init__(self, search: Search, dataset: Dataset, *, folder: Path, progress: ProgressFn) -> None:
        self._search, self._dataset, self._folder, self._progress = search, dataset, folder, progress
        self._request = search.request
        self.standings: dict[Configuration, Standing] = {}
        self._racing: list[Configuration] = []
        self._contradiction = ""
        self._chosen: Configuration | None = None
        self._nearest: Configuration | None = None
        self.verdicts: tuple[Verdict, ...] = ()

    def race(self) -> None:
        """Evaluate what the times leave, or, where they leave nothing, the nearest."""
        candidates = list(self._search.fastest_by_artifact().values())
        self._nearest = None
        if not candidates and not self._search.refused:
            self._nearest = min(self._search.measured, key=self._search.ms)
            candidates = [self._nearest]
        contenders = [
            Contender(name=c.artifact, cost=self._search.ms(c), detect=functools.partial(self._detect, c))
            for c in candidates
        ]
        rules = RaceRules(
            min_ap=self._request.min_ap if self._request.wants_fastest else None,
            by_cost=not self._request.has_goal,
            judge=self._request.judge,
        )
        standings = race(contenders, self._dataset, rules=rules)
        self.standings |= zip(candidates, standings, strict=True)
        self._racing = candidates
        self._contradiction = self._annotation_problem()

    def _detect(self, configuration: Configuration, images: Sequence[EvaluationImage]) -> Mapping[int, Detections]:
        """What it detects; kept by content, so that what an earlier search has run is not run again."""
        spec = self._search.models.open_as(configuration)
        run = collect_detections(spec, images, folder=own_folder(self._folder), progress=self._progress)
        return run.relabelled(label_index(run.names, self._dataset))

    def _ap(self, configuration: Configuration) -> float:
        interval = self.standings[configuration].interval
        return interval.value if interval else 0.0

    @property
    def _finished(self) -> list[Configuration]:
        """Those that ran on all images."""
        return [c for c in self._racing if not self.standings[c].reason]

    def _annotation_problem(self) -> str:
        """Why the annotations contradict what detects best on all images, if they do; a bad INT8 alone says nothing."""
        best = max(self._finished, key=self._ap, default=None)
        if best is None:
            return ""
        standing = self.standings[best]
        return baseline_problem(
            self._dataset,
            standing.matches,
            detections=standing.detections,
            ap=self._ap(best),
            subject=f"'{best.artifact}'",
        )

    @property
    def _ranked(self) -> list[Configuration]:
        """Those that ran on all images, the best for the goal first."""
        finished = self._finished
        if self._request.wants_fastest:
            order = (Outcome.PASSED, Outcome.INCONCLUSIVE, Outcome.FAILED)
            return sorted(
                finished,
                key=lambda c: (
                    order.index(self._verdicts(c)[0].outcome),
                    self._search.ms(c) if self._verdicts(c)[0].passed else -self._ap(c),
                ),
            )
        return sorted(finished, key=lambda c: (-self._ap(c), self._search.ms(c)))

    def judge_bundle(self, chosen: Configuration, deployed: Evaluations) -> tuple[Verdict, ...]:
        """The limits, held to what the bundle detects: layers may have gone back to float in it."""
        self.verdicts = self._verdicts(chosen, deployed=deployed)
        return self.verdicts

    def _verdicts(self, configuration: Configuration, *, deployed: Evaluations | None = None) -> tuple[Verdict, ...]:
        """On the AP that was asked for, widened because the configuration was chosen among others on these images.

        ``deployed``: what its bundle and the reference detect, in place of what the search detected.
        """
        standing, gate = self.standings[configuration], Gate(min_ap=self._request.min_ap, judge=self._request.judge)
        measured, detections, contradiction = standing.interval, standing.detections, self._contradiction
        if deployed is not None:
            candidate = deployed.candidates[-1]
            measured, detections = candidate.interval or measured, candidate.run.detections
            contradiction = deployed.reference.contradiction if deployed.reference else contradiction
        interval = measured and widened_for_selection(measured, standing.choices)
        dataset = with_copies(self._dataset, detections)
        undecided = undecided_because(dataset.findings) or evidence_problem(dataset, judge=gate.judge)
        if configuration.precision is Precision.INT8:
            undecided = undecided or self._search.models.int8_problem
        verdicts = judge_ap(
            gate,
            interval.value if interval else None,
            subject=str(configuration),
            images=standing.images,
            interval=interval,
            problem=undecided or contradiction,
        )
        limit, problem = self._request.max_watts, self._search.power_problem
        if limit is not None and problem:
            verdicts.append(
                Verdict(
                    name="max_watts",
                    subject=str(configuration),
                    outcome=Outcome.INCONCLUSIVE,
                    value=None,
                    limit=limit,
                    message=problem,
                )
            )
        return tuple(verdicts)

    def choose(self) -> Configuration | None:
        """The best that is not refused; None without a limit.

        Raises:
            BudgetError: there is none.
        """
        self._chosen, request = None, self._request
        if not request.has_goal:
            return None
        ranked = self._ranked
        if self._nearest is not None or not ranked:
            raise BudgetError(
                f"No configuration keeps the limits. {self._nearest_sentence()}",
                hint="allow more time, or try smaller inputs with --size",
            )
        best = ranked[0]
        verdicts = self._verdicts(best)
        if any(verdict.outcome is Outcome.FAILED for verdict in verdicts):
            self._nearest = best
            more = "try larger inputs with --size" if request.max_ms is None else "allow more time"
            raise BudgetError(
                f"No configuration keeps the limits. {self._nearest_sentence()}", hint=f"lower --min-ap, or {more}"
            )
        self._chosen, self.verdicts = best, verdicts
        return best

    def _nearest_sentence(self) -> str:
        nearest = self._nearest
        if nearest is None:
            left = [f"{engine}: {reason}" for engine, reason in self._search.refused.items()]
            return "; ".join(left) or "Nothing could be measured."
        standing = self.standings.get(nearest)
        ap = f", AP {standing.interval.value:.3f}" if standing and standing.interval else ""
        beyond = "as deployed" if self._search.measured[nearest].deployed else self._search.pruned.get(nearest, "")
        return f"The nearest is {nearest}: {self._search.cost(nearest)}{ap}{beyond and f', {beyond}'}."

    def data(self) -> TuningData:
        """Everything that the page shows."""
        request, search = self._request, self._search
        everything = sorted(
            {**search.measured, **search.pruned},
            key=lambda c: (search.sizes.index(c.size), c.fidelity, c.backend, -c.threads, -c.streams, c.batch),
        )
        points = tuple(map(self.point, everything))
        front = {p.label for p in front_of(points)}
        points = tuple(
            replace(p, status=PointStatus.FRONT)
            if p.label in front and p.status is PointStatus.MEASURED and not request.has_goal
            else p
            for p in points
        )
        machine = read_machine()
        problem = next((m.problem for m in search.measured.values() if m.problem), "")
        notes = [n for n in (search.models.note, problem and f"Times are doubtful: {problem}.") if n]
        if self._contradiction:
            notes.append(f"AP cannot be trusted: {self._contradiction}.")
        if not self._dataset.annotated:
            notes.append("No annotations: AP is agreement with the model's own detections at its own size.")
        if request.calibration_images is None:
            notes.append("INT8 was not tried: it needs --calibration-images.")
        return TuningData(
            title=request.model.name if isinstance(request.model, Path) else type(request.model.model).__name__,
            goal=request.goal,
            answer=self._sentence(),
            points=points,
            max_ms=request.max_ms,
            min_ap=request.min_ap,
            facts={
                "processor": f"{machine.processor}, {machine.cores} cores",
                "system": machine.system,
                "images": f"{len(self._dataset.images)}, ground truth: {Path(self._dataset.source).name}",
                "image that was timed": self._dataset.images[0].path.name,
                **{name: get_backend(name).probe().version for name in search.models.backends},
            },
            notes=tuple(notes),
            command=request.command,
        )

    def _sentence(self) -> str:
        if self._chosen is None:
            return self._nearest_sentence() if self._request.has_goal else "No limit was given, so nothing was chosen."
        interval = self.standings[self._chosen].interval
        if interval is None:  # Excluded: what is chosen was evaluated.
            return str(self._chosen)
        return (
            f"{self._chosen}: {self._search.cost(self._chosen)}, AP {interval.value:.3f} "
            f"({interval.low:.3f} to {interval.high:.3f})."
        )

    def point(self, configuration: Configuration) -> TunedPoint:
        """A row of the table."""
        measured = self._search.measured.get(configuration)
        standing = self.standings.get(configuration)
        interval = standing.interval if standing else None
        status, reason = self._status(configuration)
        figures: dict[str, Any] = {}  # Any: figures of several types
        if measured is not None:
            figures = {
                "p50_ms": measured.latency.p50,
                "p90_ms": measured.latency.p90,
                "cost_ms": self._search.ms(configuration),
                "images_per_second": measured.throughput,
            }
        if interval is not None and standing is not None:
            figures |= {"ap": interval.value, "ap_low": interval.low, "ap_high": interval.high}
            figures["images"] = standing.images
        return TunedPoint(
            size=str(configuration.size),
            runtime=configuration.how,
            backend=configuration.backend,
            precision=configuration.precision,
            compute=configuration.compute,
            threads=configuration.threads,
            streams=configuration.streams,
            batch=configuration.batch,
            status=status,
            reason=reason,
            **figures,
        )

    def _status(self, configuration: Configuration) -> tuple[PointStatus, str]:
        search, measured = self._search, self._search.measured.get(configuration)
        standing = self.standings.get(configuration)
        if configuration == self._chosen:
            return PointStatus.CHOSEN, ""
        if configuration.engine in search.refused:
            return PointStatus.PRUNED, f"refused when it was deployed: {search.refused[configuration.engine]}"
        if measured is not None and measured.deployed and not search.fits(configuration):
            return PointStatus.PRUNED, f"{search.cost(configuration)} in its bundle, beyond the limit"
        if standing is not None and standing.reason:
            return PointStatus.PRUNED, standing.reason
        if configuration in self._racing:
            following = [c for c in self._ranked if c != self._chosen][:_NEXT]
            is_next = self._chosen is not None and configuration in following
            status = PointStatus.NEXT if is_next else PointStatus.MEASURED
            return status, search.pruned.get(configuration, "")
        if configuration in search.pruned:
            return PointStatus.PRUNED, search.pruned[configuration]
        if not search.fits(configuration):
            return PointStatus.PRUNED, f"{search.cost(configuration)}, beyond the limit"
        return PointStatus.PRUNED, "another one is faster with the same detections"
