"""Two bundles side by side: what their manifests say, and what both detect on their golden images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.coco import ApInterval
from fcos_deploy.accuracy.diagnosis import contract_causes
from fcos_deploy.accuracy.gate import Verdict, judge_agreement, judge_drop
from fcos_deploy.accuracy.golden import read_golden_image
from fcos_deploy.bundle.manifest import AccuracyFigure, BenchmarkFigure, Manifest
from fcos_deploy.bundle.selection import select_with_layers
from fcos_deploy.bundle.store import is_bundle, open_trusted
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import DetectionAgreement, Gate, Judge, agreement_json, compare_detections
from fcos_deploy.core.progress import ProgressFn, no_progress
from fcos_deploy.core.serialize import to_json
from fcos_deploy.core.trust import Trust
from fcos_deploy.detector import DetectorSpec

__all__ = [
    "FIGURE_COLUMNS",
    "BundleComparison",
    "BundleTable",
    "RecordedFigure",
    "bundles_json",
    "compare_bundles",
    "figure_rows",
    "tabulate_bundles",
]

FIGURE_COLUMNS = ("backend", "precision", "figure", "first", "second", "difference")

Variant = tuple[str, Precision]  # backend and precision

_FACTS: dict[str, Callable[[Manifest], str]] = {
    "name": lambda m: m.name,
    "created": lambda m: m.provenance.created or "-",
    "checkpoint": lambda m: f"{m.provenance.checkpoint} ({m.provenance.checkpoint_sha256[:12]})",
    "classes": lambda m: str(len(m.contract.class_names)),
    "runs by default": lambda m: str(m.defaults),
    "machine": lambda m: next((figure.device for figure in m.benchmark), "-"),
    "accuracy over": lambda m: next((f"{f.images} images, {f.dataset}" for f in m.accuracy), "-"),
    "golden images": lambda m: str(len(m.golden)),
}
# Metric of the manifest, its name here, and its unit; the size is computed.
_FIGURES = (
    ("ap", "AP", "AP"),
    ("ap50", "AP50", "AP"),
    ("ap75", "AP75", "AP"),
    ("ap_small", "AP small", "AP"),
    ("ap_medium", "AP medium", "AP"),
    ("ap_large", "AP large", "AP"),
    ("operating_precision", "precision at the thresholds", "AP"),
    ("operating_recall", "recall at the thresholds", "AP"),
    ("total_p50_ms", "p50", "ms"),
    ("total_p99_ms", "p99", "ms"),
    ("throughput_fps", "throughput", "images/s"),
    ("size_mib", "size", "MiB"),
)
_DIGITS = {"AP": 4, "ms": 1, "images/s": 1, "MiB": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedFigure:
    """One figure of every bundle, None where a manifest lacks it. ``unit``: AP (0..1), ms, images/s or MiB."""

    backend: str
    precision: Precision
    name: str
    unit: str
    values: tuple[float | None, ...]

    @property
    def difference(self) -> float | None:
        """Second minus first."""
        first, second = self.values[:2]
        return None if first is None or second is None else second - first

    @property
    def row(self) -> tuple[str, ...]:
        """Backend, precision, name and unit, and the values."""
        title = self.name if self.unit == "AP" else f"{self.name}, {self.unit}"
        texts = ("-" if value is None else f"{value:.{_DIGITS[self.unit]}f}" for value in self.values)
        return (self.backend, str(self.precision), title, *texts)

    @property
    def difference_text(self) -> str:
        """The difference; of times and sizes with their ratio."""
        if self.difference is None:
            return "-"
        text, (first, second) = f"{self.difference:+.{_DIGITS[self.unit]}f}", self.values[:2]
        return f"{text} (x {second / first:.2f})" if self.unit != "AP" and first and second is not None else text


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleComparison:
    """``facts``: name, and what each bundle says. ``contract``: what the second's says differently, in sentences.

    ``subjects``: backend and precision of the two that ran on the golden images.
    """

    facts: tuple[tuple[str, str, str], ...]
    contract: tuple[str, ...]
    figures: tuple[RecordedFigure, ...]
    agreement: DetectionAgreement
    subjects: tuple[str, str]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleTable:
    """What several manifests record, side by side, as text; a row of ``facts`` or ``figures`` has a value for each.

    A figure's row begins with backend, precision and the name of the figure. ``differences``: what the contract of
    each bundle says otherwise than that of the first.
    """

    bundles: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]
    figures: tuple[tuple[str, ...], ...]
    differences: tuple[str, ...]


def tabulate_bundles(bundles: Sequence[Path], trust: Trust) -> BundleTable:
    """Put the records of bundles side by side; nothing is run.

    Raises:
        ConfigError: there are fewer than two, or one is no bundle.
        BundleError: one is damaged, or not signed as ``trust`` says.
    """
    strangers = [f"'{path}'" for path in bundles if not is_bundle(path)]
    if strangers or len(set(bundles)) < max(2, len(bundles)):
        problem = f"{', '.join(strangers)} is not a bundle" if strangers else "one is given alone, or twice"
        raise ConfigError(
            f"A report of bundles needs two or more of them; {problem}.", hint="BUNDLE BUNDLE ... --compare"
        )
    manifests = []
    for path in bundles:
        with open_trusted(path, trust) as bundle:
            manifests.append(bundle.manifest)
    differences = [
        f"{path}: {sentence}"
        for path, manifest in zip(bundles[1:], manifests[1:], strict=True)
        for sentence in _contract_differences(manifests[0], manifest)
    ]
    return BundleTable(
        bundles=tuple(map(str, bundles)),
        facts=tuple((name, *map(get, manifests)) for name, get in _FACTS.items()),
        figures=tuple(figure.row for figure in _recorded_figures(manifests)),
        differences=tuple(differences),
    )


def compare_bundles(
    first: DetectorSpec, second: DetectorSpec, *, gate: Gate, progress: ProgressFn = no_progress
) -> BundleComparison:
    """Compare what is recorded, and run both on all golden images of both, one bundle in memory at a time.

    The second is held to the first. Backend and precision of the two say what runs on the golden images.

    Raises:
        ConfigError: one of the two is no bundle; a limit on AP, and the bundles record none that can be compared.
        FcosDeployError: a bundle or its runtime cannot be opened.
    """
    images: dict[str, NDArray[np.uint8]] = {}
    manifests: list[Manifest] = []
    variants: list[Variant] = []
    for spec in (first, second):
        if not is_bundle(spec.model):
            raise ConfigError(
                f"'{spec.model}' is not a bundle, and only bundles can be compared without images.",
                hint="give --images DIR, and --annotations FILE where there are some",
            )
        with open_trusted(spec.model, spec.options.trust) as bundle:
            backend = spec.backend or bundle.manifest.defaults.backend
            selection = select_with_layers(bundle, backend=backend, precision=spec.precision)
            variants.append((selection.backend, selection.artifact.precision))
            manifests.append(bundle.manifest)
            # By the hash of their files, so that an image of both bundles is used once.
            files = bundle.manifest.all_files
            for golden in bundle.manifest.golden:
                images[files[golden.path].sha256] = read_golden_image(bundle.read(golden.path), golden)
    if not images:
        raise ConfigError("Neither bundle has golden images.", hint="give --images DIR")
    detections = [_detect(spec, list(images.values()), progress) for spec in (first, second)]
    agreement = compare_detections(*detections)
    subjects = (" ".join(variants[0]), " ".join(variants[1]))
    verdicts = judge_agreement(gate, agreement, subject=subjects[1])
    if (gate.max_precision_drop, gate.max_recall_drop) != (None, None):
        raise ConfigError(
            "A loss of precision or recall cannot be limited by what bundles record.",
            hint="give --images DIR and --annotations FILE to measure it",
        )
    if gate.max_map_drop is not None:
        verdicts += _judge_recorded_drop(gate, manifests, variants, subject=subjects[1])
    return BundleComparison(
        facts=tuple((name, get(manifests[0]), get(manifests[1])) for name, get in _FACTS.items()),
        contract=tuple(_contract_differences(*manifests)),
        figures=tuple(_recorded_figures(manifests)),
        agreement=agreement,
        subjects=subjects,
        verdicts=tuple(verdicts),
    )


def _detect(spec: DetectorSpec, images: list[NDArray[np.uint8]], progress: ProgressFn) -> dict[int, Detections]:
    detections = {}
    with spec.open() as detector:
        for number, image in enumerate(images):
            detections[number] = detector.detect(image)
            progress(spec.model.name, number + 1, len(images))
    return detections


def _contract_differences(first: Manifest, second: Manifest) -> list[str]:
    contracts = first.contract, second.contract
    differences = ["the class names differ"] if contracts[0].class_names != contracts[1].class_names else []
    for part in ("preprocess", "decode"):
        differences += [cause.sentence for cause in contract_causes(*contracts, part=part)]
    return differences


def _recorded_figures(manifests: Sequence[Manifest]) -> Iterator[RecordedFigure]:
    """Every figure that any manifest has."""
    recorded = [_recorded(manifest) for manifest in manifests]
    for variant in dict.fromkeys(variant for figures in recorded for variant in figures):
        for metric, name, unit in _FIGURES:
            values = tuple(figures.get(variant, {}).get(metric) for figures in recorded)
            if any(value is not None for value in values):
                yield RecordedFigure(backend=variant[0], precision=variant[1], name=name, unit=unit, values=values)


def _recorded(manifest: Manifest) -> dict[Variant, dict[str, float]]:
    """The manifest's metrics of each variant, and the size of its artifact with the files that belong to it."""
    files = manifest.all_files
    companions = {artifact.path: artifact.companions for artifact in manifest.artifacts}
    recorded: dict[Variant, dict[str, float]] = {}
    figures: tuple[AccuracyFigure | BenchmarkFigure, ...] = (*manifest.accuracy, *manifest.benchmark)
    for figure in figures:
        metrics = recorded.setdefault((figure.backend, figure.precision), {})
        if isinstance(figure, AccuracyFigure) and figure.artifact in companions:
            paths = (figure.artifact, *companions[figure.artifact])
            metrics.setdefault("size_mib", sum(files[path].size for path in paths) / 2**20)
        for name, value in figure.metrics.items():
            metrics.setdefault(name, value)
    return recorded


def _judge_recorded_drop(
    gate: Gate, manifests: list[Manifest], variants: list[Variant], *, subject: str
) -> list[Verdict]:
    reference, candidate = (
        next((f for f in manifest.accuracy if (f.backend, f.precision) == variant and "ap" in f.metrics), None)
        for manifest, variant in zip(manifests, variants, strict=True)
    )
    if (
        reference is None
        or candidate is None
        or (reference.images, reference.dataset) != (candidate.images, candidate.dataset)
    ):
        raise ConfigError(
            "The bundles record no AP of these backends and precisions over the same data.",
            hint="give --images DIR and --annotations FILE to measure it",
        )
    value = reference.metrics["ap"] - candidate.metrics["ap"]
    drop = ApInterval.point(value, images=reference.images)
    problem = ""
    if gate.judge is Judge.INTERVAL:
        problem = (
            f"the bundles record APs (drop {value:+.3f} on {reference.images} images), but not how the drop varies "
            "between images; measure it with --images and --annotations, or judge the figure alone with --judge point"
        )
    return judge_drop(gate, drop, reference_ap=reference.metrics["ap"], subject=subject, problem=problem)


def figure_rows(comparison: BundleComparison) -> list[tuple[str, ...]]:
    """As ``FIGURE_COLUMNS`` names them."""
    return [(*figure.row, figure.difference_text) for figure in comparison.figures]


def bundles_json(comparison: BundleComparison) -> dict[str, Any]:
    """Everything, with the differences."""
    agreement = agreement_json(comparison.agreement)
    return {
        "facts": {name: {"first": first, "second": second} for name, first, second in comparison.facts},
        "contract": list(comparison.contract),
        "figures": [
            {
                "backend": figure.backend,
                "precision": figure.precision,
                "name": figure.name,
                "unit": figure.unit,
                **dict(zip(("first", "second"), figure.values, strict=True)),
                "difference": figure.difference,
            }
            for figure in comparison.figures
        ],
        "golden": {"first": comparison.subjects[0], "second": comparison.subjects[1], **agreement},
        "verdicts": [to_json(verdict) for verdict in comparison.verdicts],
    }
