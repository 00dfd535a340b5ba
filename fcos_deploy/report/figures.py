"""The figures of a report: charts as SVG documents, and images side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.mixed_precision import TradeOffs, Trial
from fcos_deploy.accuracy.predictions import DetectionRun
from fcos_deploy.core.detections import Detections, label_name
from fcos_deploy.core.errors import ImageError
from fcos_deploy.core.gate import DetectionMatch, MatchOptions, match_detections
from fcos_deploy.core.image import read_image
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.report.data import ReportData, ReportVariant

__all__ = ["CHART_SETTINGS", "Chart", "arms", "fault_panels", "image_panels", "make_charts", "new_figure", "svg_of"]

matplotlib = lazy_import("matplotlib", extra="report")
matplotlib_figure = lazy_import("matplotlib.figure", extra="report")
backend_svg = lazy_import("matplotlib.backends.backend_svg", extra="report")
cv2 = lazy_import("cv2")


_WIDTH = 8.6  # inches, of a chart over the whole width
_MAX_LAYERS = 24  # bars of the sensitivity chart
_MAX_CLASSES = 6  # panels of precision-recall curves

INK, MUTED, _GRID = "#1b2430", "#5b6675", "#e3e7ec"
GREEN, RED = "#1a7f4b", "#b3261e"
_LIGHT_BLUE, BLUE, _SAND = "#8fb8de", "#24507a", "#e0a458"  # parts of a stacked bar: also told apart by lightness
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color), which people with any colour vision can tell apart.
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b")
_DASHED = (0, (4, 3))

CHART_SETTINGS: dict[str, Any] = {  # Any: matplotlib's rcParams have values of several types
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9.5,
    "grid.color": _GRID,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",  # looks the same where the font is missing
    "svg.hashsalt": "fcos-deploy",  # the same identifiers for the same chart
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``svg`` is a document of its own; ``text`` says in words what it shows.

    ``section``: the part of the report where it belongs: speed, accuracy, scores, or the placement of a search.
    """

    section: str
    title: str
    text: str
    svg: str

    @property
    def source(self) -> str:
        """The document in base64."""
        return base64.b64encode(self.svg.encode()).decode("ascii")


def make_charts(data: ReportData) -> list[Chart]:
    """Every chart for which there are measurements.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    with matplotlib.rc_context(CHART_SETTINGS):
        charts = [
            _accuracy_against_latency(data),
            _stages(data),
            _latency_histogram(data),
            _precision_recall(data),
            _score_drift(data),
        ]
        for search in data.searches:
            charts += [_trade_offs(search), _sensitivity(search)]
    return [chart for chart in charts if chart is not None]


def new_figure(height: float, **layout: Any) -> Any:  # Any: matplotlib has no types here
    """A figure of ``height`` inches, and its axes as ``Figure.subplots(**layout)`` arranges them."""
    figure = matplotlib_figure.Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(**layout)


def svg_of(figure: Any) -> str:  # Any: as above
    """The figure as a document, the same for the same data."""
    buffer = io.StringIO()
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # or saving lays the same out twice more
    # Not ``savefig``, which draws everything once more for layouts that follow the drawing.
    backend_svg.FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def arms(value: float, low: float | None, high: float | None) -> list[list[float]]:
    """The two arms of an error bar at ``value``; an end that is not known, or on the wrong side of it, has none."""
    ends = ((value, low), (high, value))
    return [[0.0 if a is None or b is None else max(0.0, a - b)] for a, b in ends]


def _colors(data: ReportData) -> dict[str, str]:
    """A colour for each variant's label; the reference is ink."""
    colors = {variant.label: _LINES[i % len(_LINES)] for i, variant in enumerate(data.candidates)}
    return {variant.label: colors.get(variant.label, INK) for variant in data.variants}


def _accuracy_against_latency(data: ReportData) -> Chart | None:
    points = [
        (variant, variant.evaluation.scores.ap, variant.result.latency.p50)
        for variant in data.variants
        if variant.evaluation.scores.ap is not None and variant.result is not None
    ]
    if len(points) < 2:
        return None
    figure, axes = new_figure(3.2)
    colors = _colors(data)
    reference_ap = next((ap for variant, ap, _ in points if variant.reference), None)
    if reference_ap is not None:
        axes.axhline(reference_ap, color=MUTED, linewidth=0.9, linestyle=_DASHED)
    for variant, ap, p50 in points:
        low, high = _ap_range(variant, ap, reference_ap)
        style = {"fmt": "o", "ms": 7, "capsize": 3, "color": colors[variant.label]}
        axes.errorbar([p50], [ap], yerr=arms(ap, low, high), label=variant.label, **style)
    axes.set(xlabel="median latency of one image (ms)", ylabel="AP (IoU 0.50 to 0.95)")
    axes.set_xlim(left=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    text = (
        "Up and to the left is better. Bars: where 95 % of the resampled differences from the reference lie; "
        "the dashed line is the reference."
    )
    return Chart(section="speed", title="Accuracy against latency", text=text, svg=svg_of(figure))


def _ap_range(variant: ReportVariant, ap: float, reference_ap: float | None) -> tuple[float, float]:
    # The paired interval leaves out what all variants share: how hard the images are.
    drop, interval = variant.evaluation.drop, variant.evaluation.interval
    if reference_ap is None:
        return (interval.low, interval.high) if interval else (ap, ap)
    return (reference_ap - drop.high, reference_ap - drop.low) if drop and drop.resamples else (ap, ap)


def _stages(data: ReportData) -> Chart | None:
    timed = [(variant.label, variant.result.stages) for variant in data.variants if variant.result is not None]
    if not timed:
        return None
    figure, axes = new_figure(0.9 + 0.38 * len(timed))
    parts = {
        "preprocess": [stages.preprocess for _, stages in timed],
        "network": [stages.infer for _, stages in timed],
        "decode": [stages.decode for _, stages in timed],
    }
    colors = (_LIGHT_BLUE, BLUE, _SAND)
    for index, total in enumerate(_stacked_bars(axes, [label for label, _ in timed], parts, colors=colors)):
        axes.text(total, index, f"  {total:.1f}", va="center", color=INK)
    axes.set(xlabel="median time of one image (ms)")
    axes.margins(x=0.12)
    axes.legend(loc="lower right", ncols=3, bbox_to_anchor=(1.0, 1.0))
    text = "Medians of each stage, one image after another."
    return Chart(section="speed", title="Where the time goes", text=text, svg=svg_of(figure))


def _stacked_bars(
    axes: Any,  # Any: matplotlib has no types here
    rows: Sequence[str],
    parts: dict[str, list[float]],
    *,
    colors: Sequence[str],
) -> NDArray[np.float64]:
    """Draw a bar for each row, the first on top, of ``parts`` one behind the other; returns the bars' lengths."""
    ends = np.zeros(len(rows))
    for (name, values), color in zip(parts.items(), colors, strict=True):
        axes.barh(range(len(rows)), values, left=ends, color=color, label=name, height=0.66)
        ends += values
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return ends


def _latency_histogram(data: ReportData) -> Chart | None:
    timed = [(v.label, v.result.samples_ms) for v in data.variants if v.result and len(v.result.samples_ms) > 1]
    if not timed:
        return None
    figure, panels = new_figure(0.7 + 0.62 * len(timed), nrows=len(timed), squeeze=False, sharex=True)
    colors = _colors(data)
    # The last hundredth of the times would squeeze the rest into a corner; it is in the table as p99.
    limit = float(np.percentile(np.concatenate([samples for _, samples in timed]), 99))
    for axes, (label, samples) in zip(panels[:, 0], timed, strict=True):
        axes.hist(samples, bins=np.linspace(0, limit, 80), histtype="stepfilled", color=colors[label])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    panels[-1, 0].set_xlim(left=0)
    panels[-1, 0].set_xlabel("latency of one image (ms)")
    text = (
        "How often each latency occurred (height: share of the samples of that row), up to the 99th percentile of all."
    )
    return Chart(section="speed", title="Latency distribution", text=text, svg=svg_of(figure))


def _precision_recall(data: ReportData) -> Chart | None:
    # Classes without an object in the data have no curve.
    per_class = zip(*(variant.evaluation.scores.per_class for variant in data.variants), strict=True)
    curves = [scores for scores in per_class if any(score.precision for score in scores)]
    if not curves:
        return None
    shown = curves[:_MAX_CLASSES]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = new_figure(0.5 + 2.5 * rows, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True)
    colors = _colors(data)
    for axes, scores in zip(panels.flat, shown, strict=False):
        for variant, score in zip(data.variants, scores, strict=True):
            if score.precision:
                recall = np.linspace(0, 1, len(score.precision))
                axes.plot(recall, score.precision, color=colors[variant.label], label=variant.label)
            _draw_operating_point(axes, variant, score.name, color=colors[variant.label])
        axes.set(title=scores[0].name, xlim=(0, 1), ylim=(0, 1.03))
    _hide_unused(panels, len(shown))
    figure.supxlabel("recall", fontsize=10)
    figure.supylabel("precision", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)))
    text = (
        "Precision: share of the detections that are right. Recall: share of the objects that are found. At IoU 0.5, "
        "COCO's interpolation. Points: at the score threshold of the class, with 95 % intervals."
    )
    if len(curves) > len(shown):
        text += f" The first {len(shown)} of {len(curves)} classes."
    return Chart(section="accuracy", title="Precision and recall", text=text, svg=svg_of(figure))


def _draw_operating_point(axes: Any, variant: ReportVariant, name: str, *, color: str) -> None:
    """Any: matplotlib has no types here."""
    point = next((point for point in variant.evaluation.operating_points if point.name == name), None)
    if point is None or point.precision is None or point.recall is None:
        return
    recall, precision = point.recall, point.precision
    reach = {
        "xerr": arms(recall.value, recall.low, recall.high),
        "yerr": arms(precision.value, precision.low, precision.high),
    }
    style = {"fmt": "o", "ms": 4, "elinewidth": 0.8, "zorder": 4, "color": color}
    axes.errorbar([recall.value], [precision.value], **reach, **style)


def _score_drift(data: ReportData) -> Chart | None:
    agreements = [(v.label, v.evaluation.agreement) for v in data.variants if v.evaluation.agreement is not None]
    scatters = [(label, np.array(agreement.score_pairs)) for label, agreement in agreements if agreement.score_pairs]
    if not scatters:
        return None
    columns = min(4, len(scatters))
    rows = -(-len(scatters) // columns)
    height = 0.5 + (8.2 / columns if columns > 2 else 3.2) * rows
    figure, panels = new_figure(height, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True)
    colors = _colors(data)
    for axes, (label, scores) in zip(panels.flat, scatters, strict=False):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8)
        axes.scatter(*scores.T, s=9, alpha=0.4, linewidths=0, zorder=3, color=colors[label])
        shift = round(float(np.mean(scores[:, 1] - scores[:, 0])), 4) + 0.0  # + 0.0 turns -0.0 into 0.0
        axes.set(title=label, xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.text(0.04, 0.93, f"mean shift {shift:+.4f}", va="top", fontsize=8.5)
    _hide_unused(panels, len(scatters))
    figure.supxlabel("score by the reference", fontsize=10)
    figure.supylabel("score by the variant", fontsize=10)
    text = (
        "One point for each detection that both have. Points off the diagonal mean that a threshold tuned on the "
        "reference no longer fits."
    )
    return Chart(section="scores", title="Score drift", text=text, svg=svg_of(figure))


def _hide_unused(panels: Any, used: int) -> None:  # Any: matplotlib has no types here
    for axes in panels.flat[used:]:
        axes.set_visible(False)


def _trade_offs(search: TradeOffs) -> Chart | None:
    if len(search.trials) < 2:
        return None
    figure, (left, right) = new_figure(3.5, ncols=2, sharey=True)
    by_share = [(100 * trial.int8_share, trial) for trial in search.trials]
    by_latency = [(trial.p50_ms, trial) for trial in search.trials if trial.p50_ms is not None]
    _draw_trials(left, search, by_share, float_at=0.0)
    _draw_trials(right, search, by_latency, float_at=search.float_p50_ms)
    on_front = [trial for trial in search.trials if trial.p50_ms is not None]
    front = sorted([(0.0, search.float_score), *((100 * trial.int8_share, trial.score) for trial in on_front)])
    left.plot(*np.array(front).T, color="#9fb6cc", linewidth=1.2, zorder=1)
    left.set(xlabel="multiply-accumulates in INT8 (%)", ylabel="AP (IoU 0.50 to 0.95)", xlim=(-4, 104))
    right.set(xlabel="median latency of one image (ms)")
    right.margins(x=0.08)
    right.set_xlim(left=0)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    text = (
        f"Every mixture of INT8 and float layers that the search for {search.placement} measured on {search.backend}; "
        "the line joins those that no other beats in share and AP, and only these were timed."
    )
    return Chart(section=search.placement, title="AP against INT8 share and latency", text=text, svg=svg_of(figure))


def _draw_trials(
    axes: Any,  # Any: matplotlib has no types here
    search: TradeOffs,
    trials: Sequence[tuple[float, Trial]],
    *,
    float_at: float | None,
) -> None:
    """Draw each trial at its place on the x axis, the float model at ``float_at``, and the gate."""
    axes.axhline(search.float_score - search.max_loss, color=RED, linewidth=1.1, linestyle=_DASHED, label="gate")
    if float_at is not None:
        axes.plot([float_at], [search.float_score], "D", color=MUTED, ms=6, label="all in float", zorder=4)
    axes.plot([x for x, _ in trials], [trial.score for _, trial in trials], "o", color=BLUE, ms=5, label="candidate")
    chosen = [(x, trial.score) for x, trial in trials if trial.ignored_layers == search.ignored_layers]
    axes.plot(*np.array(chosen).reshape(-1, 2).T, "o", ms=12, mfc="none", mec=GREEN, mew=2, label="chosen")


def _sensitivity(search: TradeOffs) -> Chart | None:
    if not search.ranking:
        return None
    layers = search.ranking[:_MAX_LAYERS]
    figure, axes = new_figure(0.9 + 0.21 * len(layers))
    parts = {
        "classes": [100 * layer.effect.classes for layer in layers],
        "boxes": [100 * layer.effect.boxes for layer in layers],
        "centerness": [100 * layer.effect.centerness for layer in layers],
    }
    names = [layer.layer.removesuffix(".weight") for layer in layers]
    shown = [name if len(name) <= 48 else "…" + name[-47:] for name in names]
    _stacked_bars(axes, shown, parts, colors=(BLUE, _LIGHT_BLUE, _SAND))
    axes.set(xlabel="error with this layer alone in INT8 (% of probability, % of box size)")
    axes.tick_params(axis="y", labelsize=8)
    for label, layer in zip(axes.get_yticklabels(), layers, strict=True):
        if layer.layer in search.ignored_layers:
            label.set(color=GREEN, fontweight="bold")
    axes.legend(loc="lower right")
    text = (
        f"The {len(layers)} most sensitive of {len(search.ranking)} layers, worst first; "
        "names in bold green are those that stay in float."
    )
    return Chart(section=search.placement, title="Sensitivity to quantization", text=text, svg=svg_of(figure))


_MATCHING = MatchOptions(min_score=0.4)  # also what is drawn: boxes of lower scores would cover the image
_MAX_SIDE = 520  # pixels of an embedded image: sharp in a third of the page, small in the file
_MAX_SIDE_SMALL = 260  # of one in a fifth of the page
_JPEG_QUALITY = 82
_MAX_LABELS = 10  # boxes whose names still leave the image to be seen
_MOVED = 0.03  # change of a score from which it is shown
_BOX_BLUE, _ORANGE, _VIOLET, _WHITE = "#0b5fbd", "#b26a00", "#6d28d9", "#ffffff"  # of boxes, beside GREEN and RED


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelBox:
    """A rectangle in the embedded image's pixels; the label lies above it, or inside where there is no room."""

    x: float
    y: float
    width: float
    height: float
    color: str
    label: str = ""
    label_y: float
    dash: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedImage:
    """A JPEG (base64), ``scale`` times as large as its file's image."""

    identifier: str
    jpeg: str
    width: int
    height: int
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePanel:
    """An image with layers of boxes, by their titles.

    ``missed``: the number of objects, or of the reference's detections, that the variant lacks; ``extra``: of those it
    has alone.
    """

    image: EmbeddedImage
    name: str
    variant: str
    note: str = ""
    layers: tuple[tuple[str, tuple[PanelBox, ...]], ...]
    missed: int
    extra: int


def image_panels(data: ReportData, *, count: int = 4) -> list[ImagePanel]:
    """The ``count`` images on which a variant disagrees most with the reference, worst first.

    An image is shown once, with the variant that disagrees most. Nothing is shown without a reference.

    Raises:
        ImageError: an image can no longer be read.
    """
    if data.reference is None or not data.candidates:
        return []
    run = data.reference.evaluation.run
    worst = []
    for image in data.dataset.images:
        reference = run.detections[image.image_id]
        comparisons = [
            _compare(variant.label, reference, variant.evaluation.run.detections[image.image_id])
            for variant in data.candidates
        ]
        worst.append((image, max(comparisons, key=lambda comparison: comparison.disagreement)))
    worst.sort(key=lambda entry: -entry[1].disagreement)
    return [
        _draw(comparison, image.path, run=run, identifier=f"image-{index}")
        for index, (image, comparison) in enumerate(worst[:count])
    ]


def fault_panels(data: ReportData) -> dict[str, list[ImagePanel]]:
    """Of each variant that was evaluated with annotations, the images with most faults, worst first.

    An image of several variants is embedded once.

    Raises:
        ImageError: an image can no longer be read.
    """
    paths = {image.image_id: image.path for image in data.dataset.images}
    embedded: dict[int, EmbeddedImage] = {}
    panels: dict[str, list[ImagePanel]] = {}
    for variant in data.variants:
        confused = variant.evaluation.confusion
        for fault in confused.worst if confused else ():
            if fault.image_id not in embedded:
                pixels = read_image(paths[fault.image_id], orientation=variant.evaluation.run.orientation)
                identifier = f"image-fault-{len(embedded)}"
                embedded[fault.image_id] = _embed(pixels, identifier=identifier, max_side=_MAX_SIDE_SMALL)
            image = embedded[fault.image_id]
            kinds = ((fault.correct, _WHITE, "2 3"), (fault.missed, RED, ""), (fault.extra, _ORANGE, ""))
            boxes = [
                _box(box, scale=image.scale, color=color, dash=dash)
                for detections, color, dash in kinds
                for box in detections.boxes
            ]
            panel = ImagePanel(
                image=image,
                name=paths[fault.image_id].name,
                variant=variant.label,
                layers=(("faults", tuple(boxes)),),
                missed=len(fault.missed.boxes),
                extra=len(fault.extra),
            )
            panels.setdefault(variant.label, []).append(panel)
    return panels


@dataclass(frozen=True, slots=True, eq=False)
class _Comparison:
    """A variant's detections on one image beside the reference's.

    changes: (pairs,) float32, score of the candidate minus that of the reference.
    """

    variant: str
    reference: Detections
    candidate: Detections
    match: DetectionMatch
    changes: NDArray[np.float32]
    disagreement: float


def _compare(variant: str, reference: Detections, candidate: Detections) -> _Comparison:
    match = match_detections(reference, candidate, options=_MATCHING)
    changes = candidate.scores[match.candidate] - reference.scores[match.reference]
    alone = np.concatenate([reference.scores[match.missed], candidate.scores[match.extra]])
    # A pair counts a tenth of its change of score and of the overlap that it lacks; a box without a partner, its score.
    disagreement = float(alone.sum() + 0.1 * np.abs(changes).sum() + 0.1 * (1 - match.iou).sum())
    return _Comparison(variant, reference, candidate, match, changes, disagreement)


def _draw(comparison: _Comparison, path: Path, *, run: DetectionRun, identifier: str) -> ImagePanel:
    pixels = read_image(path, orientation=run.orientation)
    image = _embed(pixels, identifier=identifier, max_side=_MAX_SIDE)
    largest = float(np.abs(comparison.changes).max(initial=0.0))
    return ImagePanel(
        image=image,
        name=path.name,
        variant=comparison.variant,
        note=f"Scores of pairs differ by up to {largest:.3f}. Shown: scores of at least {_MATCHING.min_score}.",
        layers=_layers(comparison, names=run.names, scale=image.scale),
        missed=len(comparison.match.missed),
        extra=len(comparison.match.extra),
    )


def _embed(pixels: NDArray[np.uint8], *, identifier: str, max_side: int) -> EmbeddedImage:
    """pixels: (h, w, 3) uint8 RGB."""
    scale = min(1.0, max_side / max(pixels.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    shrunk = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    encoded, jpeg = cv2.imencode(".jpg", shrunk[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not encoded:
        raise ImageError("An image of the report cannot be encoded as JPEG.")
    text = base64.b64encode(jpeg.tobytes()).decode("ascii")
    return EmbeddedImage(identifier=identifier, jpeg=text, width=width, height=height, scale=scale)


def _layers(
    comparison: _Comparison, *, names: tuple[str, ...], scale: float
) -> tuple[tuple[str, tuple[PanelBox, ...]], ...]:
    """The boxes of the reference, those of the variant, and their difference."""
    reference, candidate, match = comparison.reference, comparison.candidate, comparison.match

    def named(detections: Detections, i: int, color: str) -> PanelBox:
        name = label_name(int(detections.labels[i]), names)
        return _box(detections.boxes[i], scale=scale, color=color, label=f"{name} {detections.scores[i]:.2f}")

    def all_boxes(detections: Detections, color: str) -> tuple[PanelBox, ...]:
        shown = np.flatnonzero(detections.scores >= _MATCHING.min_score).tolist()
        return tuple(
            named(detections, i, color) if few else _box(detections.boxes[i], scale=scale, color=color) for i in shown
        )

    few = max(int((d.scores >= _MATCHING.min_score).sum()) for d in (reference, candidate)) <= _MAX_LABELS
    unchanged, moved = [], []
    for i, change in sorted(zip(match.candidate.tolist(), comparison.changes.tolist(), strict=True)):
        if candidate.scores[i] < _MATCHING.min_score:
            continue
        if abs(change) < _MOVED:
            unchanged.append(_box(candidate.boxes[i], scale=scale, color=_WHITE, dash="2 3"))
        else:
            moved.append(_box(candidate.boxes[i], scale=scale, color=_VIOLET, label=f"{change:+.2f}"))
    missed = [named(reference, i, RED) for i in match.missed]
    extra = [named(candidate, i, _ORANGE) for i in match.extra]
    return (
        ("reference", all_boxes(reference, _BOX_BLUE)),
        (comparison.variant, all_boxes(candidate, GREEN)),
        ("difference", (*unchanged, *moved, *missed, *extra)),
    )


def _box(box: NDArray[Any], *, scale: float, color: str, label: str = "", dash: str = "") -> PanelBox:
    """box: (4,) xyxy, pixels of the file's image."""
    x1, y1, x2, y2 = (float(v) * scale for v in box)
    return PanelBox(
        x=round(x1, 1),
        y=round(y1, 1),
        width=round(max(0.0, x2 - x1), 1),
        height=round(max(0.0, y2 - y1), 1),
        color=color,
        label=label,
        label_y=round(y1 - 4 if y1 > 20 else y1 + 16, 1),
        dash=dash,
    )
