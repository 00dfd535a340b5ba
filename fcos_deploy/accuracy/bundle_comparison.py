"""Two bundles side by side: what their manifests say, and what both detect on their golden images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.diagnosis import contract_causes
from fcos_deploy.accuracy.gate import Verdict, judge_agreement, judge_drop
from fcos_deploy.accuracy.intervals import ApInterval
from fcos_deploy.accuracy.matching import DetectionAgreement, MatchOptions, compare_detections
from fcos_deploy.bundle.golden import read_golden_image
from fcos_deploy.bundle.manifest import AccuracyFigure, BenchmarkFigure, Manifest
from fcos_deploy.bundle.selection import select_artifact
from fcos_deploy.bundle.store import Bundle, is_bundle, open_bundle
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import Gate
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.detector import DetectorSpec

__all__ = [
    "FIGURE_COLUMNS",
    "BundleComparison",
    "BundleComparisonRequest",
    "ComparedFigure",
    "bundles_json",
    "compare_bundles",
    "fact_rows",
    "figure_rows",
]

Variant = tuple[str, Precision]  # backend and precision


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleComparisonRequest:
    """The second bundle is held to the first; backend and precision say what runs on the golden images."""

    first: DetectorSpec
    second: DetectorSpec
    gate: Gate = field(default_factory=Gate)
    matching: MatchOptions = field(default_factory=MatchOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedFigure:
    """One figure of both manifests, None where a manifest lacks it. ``unit``: AP (0..1), ms, images/s or MB."""

    backend: str
    precision: Precision
    name: str
    unit: str
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        """Second minus first."""
        return None if self.first is None or self.second is None else self.second - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleComparison:
    """``facts``: name, and what each bundle says. ``contract``: what the second's says differently, in sentences."""

    facts: tuple[tuple[str, str, str], ...]
    contract: tuple[str, ...]
    figures: tuple[ComparedFigure, ...]
    agreement: DetectionAgreement
    subjects: tuple[str, str]
    verdicts: tuple[Verdict, ...]


def compare_bundles(request: BundleComparisonRequest, *, progress: ProgressFn = no_progress) -> BundleComparison:
    """Compare what is recorded, and run both on all golden images of both, one bundle in memory at a time.

    Raises:
        ConfigError: one of the two is no bundle; a limit on AP, and the bundles record none that can be compared.
        FcosDeployError: a bundle or its runtime cannot be opened.
    """
    for spec in (request.first, request.second):
        if not is_bundle(spec.model):
            raise ConfigError(
                f"'{spec.model}' is not a bundle, and only bundles can be compared without images.",
                hint="give --images DIR, and --annotations FILE where there are some",
            )
    with _opened(request.first) as first, _opened(request.second) as second:
        images = _golden_images(first, second)
        chosen = tuple(_variant(b, t) for b, t in ((first, request.first), (second, request.second)))
        manifests = first.manifest, second.manifest
    found = [_detect(spec, images, progress) for spec in (request.first, request.second)]
    agreement = compare_detections(found[0], found[1], options=request.matching)
    subject = _subject(chosen[1])
    verdicts = judge_agreement(request.gate, agreement, subject=subject)
    if request.gate.max_map_drop is not None:
        verdicts += _judge_recorded_drop(request.gate, manifests, chosen, subject=subject)
    return BundleComparison(
        facts=tuple((name, get(manifests[0]), get(manifests[1])) for name, get in _FACTS.items()),
        contract=tuple(_contract_differences(*manifests)),
        figures=tuple(_figures(*manifests)),
        agreement=agreement,
        subjects=(_subject(chosen[0]), subject),
        verdicts=tuple(verdicts),
    )


_FACTS: dict[str, Callable[[Manifest], str]] = {
    "name": lambda m: m.name,
    "made": lambda m: m.provenance.created or "-",
    "checkpoint": lambda m: f"{m.provenance.checkpoint} ({m.provenance.checkpoint_sha256[:12]})",
    "classes": lambda m: str(len(m.contract.class_names)),
    "meant for": lambda m: f"{m.defaults.backend} {m.defaults.precision}",
    "machine": lambda m: next((figure.device for figure in m.benchmark), "-"),
    "accuracy over": lambda m: next((f"{f.images} images, {f.dataset}" for f in m.accuracy), "-"),
    "golden images": lambda m: str(len(m.golden)),
}


def _opened(spec: DetectorSpec) -> Bundle:
    return open_bundle(spec.model, public_keys=spec.options.public_keys)


def _variant(bundle: Bundle, spec: DetectorSpec) -> Variant:
    precisions = (spec.precision,) if spec.precision else ()
    selection = select_artifact(bundle, backend=spec.backend, precisions=precisions)
    return selection.backend, selection.artifact.precision


def _subject(variant: Variant) -> str:
    return f"{variant[0]} {variant[1]}"


def _golden_images(*bundles: Bundle) -> list[NDArray[np.uint8]]:
    """The golden images of all bundles, each picture once."""
    images = {}
    for bundle in bundles:
        files = bundle.manifest.all_files
        for golden in bundle.manifest.golden:
            images[files[golden.path].sha256] = read_golden_image(bundle.path(golden.path), golden)
    if not images:
        raise ConfigError("Neither bundle has golden images.", hint="give --images DIR")
    return list(images.values())


def _detect(spec: DetectorSpec, images: list[NDArray[np.uint8]], progress: ProgressFn) -> dict[int, Detections]:
    found = {}
    with spec.open() as detector:
        for number, image in enumerate(images):
            found[number] = detector.detect(image)
            progress(spec.model.name, number + 1, len(images))
    return found


def _contract_differences(first: Manifest, second: Manifest) -> Iterator[str]:
    if first.contract.class_names != second.contract.class_names:
        yield "the class names differ"
    for part in ("preprocess", "decode"):
        for cause in contract_causes(first.contract, second.contract, part=part):
            yield cause.sentence


_METRICS: tuple[tuple[str, str, str], ...] = (("ap", "AP", "AP"), ("ap50", "AP50", "AP"), ("ap75", "AP75", "AP"))
_TIMES: tuple[tuple[str, str, str], ...] = (
    ("total_p50_ms", "p50", "ms"),
    ("total_p99_ms", "p99", "ms"),
    ("throughput_fps", "throughput", "images/s"),
)


def _figures(first: Manifest, second: Manifest) -> Iterator[ComparedFigure]:
    """Of every backend and precision that either has, in the order of the manifests."""
    recorded: list[Variant] = []
    for manifest in (first, second):
        recorded += [(figure.backend, figure.precision) for figure in manifest.accuracy]
        recorded += [(figure.backend, figure.precision) for figure in manifest.benchmark]
    for backend, precision in dict.fromkeys(recorded):
        for part, metrics in (("accuracy", _METRICS), ("benchmark", _TIMES)):
            for key, name, unit in metrics:
                values = [_metric(getattr(m, part), (backend, precision), key) for m in (first, second)]
                if any(value is not None for value in values):
                    yield ComparedFigure(
                        backend=backend, precision=precision, name=name, unit=unit, first=values[0], second=values[1]
                    )
        sizes = [_megabytes(m, (backend, precision)) for m in (first, second)]
        if any(size is not None for size in sizes):
            yield ComparedFigure(
                backend=backend, precision=precision, name="size", unit="MB", first=sizes[0], second=sizes[1]
            )


def _metric(figures: Sequence[AccuracyFigure | BenchmarkFigure], variant: Variant, key: str) -> float | None:
    return next((f.metrics.get(key) for f in figures if (f.backend, f.precision) == variant), None)


def _megabytes(manifest: Manifest, variant: Variant) -> float | None:
    """Of the artifact whose accuracy was measured, with the files that belong to it."""
    name = next((f.artifact for f in manifest.accuracy if (f.backend, f.precision) == variant), "")
    for artifact in manifest.artifacts:
        if artifact.path == name:
            files = manifest.all_files
            return (artifact.size + sum(files[path].size for path in artifact.companions)) / 1e6
    return None


def _judge_recorded_drop(
    gate: Gate, manifests: tuple[Manifest, Manifest], chosen: tuple[Variant, ...], *, subject: str
) -> list[Verdict]:
    figures = [
        next((f for f in manifest.accuracy if (f.backend, f.precision) == variant and "ap" in f.metrics), None)
        for manifest, variant in zip(manifests, chosen, strict=True)
    ]
    mine, theirs = figures
    if mine is None or theirs is None or (mine.images, mine.dataset) != (theirs.images, theirs.dataset):
        raise ConfigError(
            "The bundles record no AP of these backends and precisions over the same data.",
            hint="give --images DIR and --annotations FILE to measure it",
        )
    value = mine.metrics["ap"] - theirs.metrics["ap"]
    drop = ApInterval(
        value=value, low=value, high=value, standard_error=0.0, confidence=0.0, resamples=0, images=mine.images
    )
    return judge_drop(gate, drop, reference_ap=mine.metrics["ap"], subject=subject)


FIGURE_COLUMNS = ("backend", "precision", "figure", "first", "second", "difference")

_DIGITS = {"AP": 4, "ms": 1, "images/s": 1, "MB": 1}


def fact_rows(found: BundleComparison) -> list[tuple[str, str, str]]:
    """Name, first, second."""
    return list(found.facts)


def figure_rows(found: BundleComparison) -> list[tuple[str, ...]]:
    """As ``FIGURE_COLUMNS`` names them; times and sizes with their ratio."""
    return [
        (
            figure.backend,
            str(figure.precision),
            figure.name if figure.unit == "AP" else f"{figure.name}, {figure.unit}",
            _number(figure.first, figure.unit),
            _number(figure.second, figure.unit),
            _difference(figure),
        )
        for figure in found.figures
    ]


def _number(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.{_DIGITS[unit]}f}"


def _difference(figure: ComparedFigure) -> str:
    if figure.difference is None or figure.first is None or figure.second is None:
        return "-"
    text = f"{figure.difference:+.{_DIGITS[figure.unit]}f}"
    return text if figure.unit == "AP" or not figure.first else f"{text} (x {figure.second / figure.first:.2f})"


def bundles_json(found: BundleComparison) -> dict[str, Any]:
    """Everything, with the differences."""
    agreement = to_json(found.agreement)
    del agreement["score_pairs"]  # many numbers, for plots only
    return {
        "facts": {name: {"first": first, "second": second} for name, first, second in found.facts},
        "contract": list(found.contract),
        "figures": [{**to_json(figure), "difference": figure.difference} for figure in found.figures],
        "golden": {"first": found.subjects[0], "second": found.subjects[1], **agreement},
        "verdicts": [to_json(verdict) for verdict in found.verdicts],
    }
