"""The report: complete, self-contained, and safe with whatever names data has."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from calibration.mixed_precision import DetectionEffect, LayerSensitivity, TradeOffs, Trial
from fcos_deploy.accuracy.coco import ApInterval, ClassScores, CocoScores
from fcos_deploy.accuracy.dataset import Dataset, EvaluationImage, GroundTruth
from fcos_deploy.accuracy.evaluate import Evaluation
from fcos_deploy.accuracy.gate import Outcome, Verdict
from fcos_deploy.accuracy.operating_point import OperatingPoint, Share, Thresholds, confusion
from fcos_deploy.accuracy.predictions import DetectionRun, StageSeconds
from fcos_deploy.benchmark.measure import ClockReading, LatencyStats, PowerReading, StageMedians
from fcos_deploy.benchmark.run import BenchmarkResult
from fcos_deploy.core.contract import Decision
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import ScoreDrift, compare_detections, score_drift
from fcos_deploy.core.machine import MachineFacts
from fcos_deploy.report import ReportData, ReportFile, ReportVariant, write_report
from fcos_deploy.report.data import report_verdict

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
Image = pytest.importorskip("PIL.Image")

LABELS = ("pytorch fp32", "openvino int8")
CLASSES = ("cell <b>", "dust")
CELL, DUST = (5.0, 5.0, 30.0, 40.0), (50.0, 5.0, 70.0, 40.0)


def detections(*objects: tuple[tuple[float, ...], float, int]) -> Detections:
    boxes, scores, labels = zip(*objects, strict=True)
    return Detections(np.float32(boxes), np.float32(scores), np.int64(labels))


# A cell and dust on the first image, of which INT8 misses the dust; eleven more with a cell that loses 0.02 of score.
REFERENCE = {0: detections((CELL, 0.9, 0), (DUST, 0.5, 1)), **{n: detections((CELL, 0.51, 0)) for n in range(1, 12)}}
CANDIDATE = {0: detections((CELL, 0.9, 0)), **{n: detections((CELL, 0.49, 0)) for n in range(1, 12)}}


def evaluation(
    backend: str, precision: str, found: dict[int, Detections], *, ap: float, dust_ap: float | None = None
) -> Evaluation:
    curve = (0.9,) * 101
    per_class = (
        ClassScores(name=CLASSES[0], ap=ap, ap50=ap, ar=ap, precision=curve),
        ClassScores(name=CLASSES[1], ap=dust_ap, ap50=dust_ap, ar=dust_ap),
    )
    unknown = {"ap_small": None, "ap_medium": None, "ap_large": None, "ar": None}
    return Evaluation(
        run=DetectionRun(
            model="m.onnx",
            backend=backend,
            precision=precision,
            names=CLASSES,
            description={},
            detections=found,
            seconds=StageSeconds(),
        ),
        scores=CocoScores(ap=ap, ap50=0.9, ap75=0.7, images=12, objects=13, per_class=per_class, **unknown),
    )


def interval(value: float, low: float, high: float) -> ApInterval:
    return ApInterval(value=value, low=low, high=high, standard_error=0.01, confidence=0.95, resamples=1000, images=12)


def timing(p50: float, size: int) -> BenchmarkResult:
    return BenchmarkResult(
        model="m.onnx",
        backend="x",
        precision="x",
        latency=LatencyStats(mean=p50, p50=p50, p90=p50 + 2, p99=p50 + 10, minimum=p50, maximum=p50, count=40),
        stages=StageMedians(preprocess=0.5, infer=7.0, decode=0.5),
        throughput_fps=1000 / p50,
        power=PowerReading(watts=None),
        joules_per_image=None,
        cold_start=None,
        file_bytes=size,
        clock=ClockReading(mhz=None, throttled=None),
        session={},
        samples_ms=tuple(np.random.default_rng(0).uniform(8, 9, 40)),
        rounds_ms=(p50, p50 + 0.1),
    )


def search(placement: str, *, trials: int) -> TradeOffs:
    layers = [f"layer{i}.weight" for i in range(30)]
    tried = [
        Trial(tuple(layers[:i]), 1 - i / 10, 0.55 + i / 50, 5.0 + i if i != 1 else None, (0.04 - i / 50, 0.06 - i / 50))
        for i in range(trials)
    ]
    ranking = [LayerSensitivity(layer, DetectionEffect(0.3 / (i + 1), 0.02, 0.01)) for i, layer in enumerate(layers)]
    return TradeOffs(
        placement=placement,
        backend="openvino",
        quantity="AP",
        max_loss=0.01,
        float_score=0.6,
        float_p50_ms=12.3,
        ignored_layers=tried[-1].ignored_layers,
        trials=tuple(tried),
        ranking=tuple(ranking) if trials > 1 else (),
        drift=ScoreDrift(0.3, 0.3, ()),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    images = tuple(EvaluationImage(number, folder / f"{number}.png") for number in range(12))
    dust = GroundTruth(np.array([DUST]), np.array([1]), np.array([700.0]), np.array([False]))
    return Dataset(images, dict.fromkeys(range(12), dust), CLASSES, "annotations.json")


@pytest.fixture(scope="module")
def report(dataset: Dataset) -> ReportData:
    """Every part that a report can have."""
    reference = replace(evaluation("pytorch", "fp32", REFERENCE, ap=0.6), interval=interval(0.6, 0.55, 0.65))
    passed = Verdict(
        name="max_map_drop",
        subject=LABELS[1],
        outcome=Outcome.PASSED,
        value=0.002,
        limit=0.01,
        message="drop 0.002 <= 0.010",
    )
    candidate = replace(
        evaluation("openvino", "int8", CANDIDATE, ap=0.598),
        drop=interval(0.002, -0.001, 0.004),
        agreement=compare_detections(REFERENCE, CANDIDATE),
        score_drift=score_drift(list(REFERENCE.values()), list(CANDIDATE.values()), class_names=CLASSES),
        verdicts=(passed,),
        confusion=confusion(dataset, CANDIDATE, Thresholds(scores=(0.3, 0.3), origin="best F1")),
        operating_points=(
            OperatingPoint(
                name=CLASSES[0],
                goal="best F1",
                score=0.3,
                precision=Share(value=0.9, low=0.8, high=0.95),
                recall=Share(value=0.7, low=0.6, high=0.75),
                f1=0.8,
            ),
        ),
    )
    return ReportData(
        title="Cells & <script>alert(1)</script>",
        dataset=dataset,
        variants=(
            ReportVariant(label=LABELS[0], evaluation=reference, result=timing(40.0, 10 * 2**20), reference=True),
            ReportVariant(label=LABELS[1], evaluation=candidate, result=timing(8.25, 3 * 2**20), int8_share=0.9),
        ),
        searches=(search("portable", trials=4), search("openvino", trials=1)),
        created="today",
        files=(ReportFile(path="m.onnx", kind="onnx", sha256="ab" * 32, size=100),),
        machine=MachineFacts(machine="x86_64", processor="x", system="Linux", cores=2),
        versions={"numpy": "2"},
        decisions=(Decision("stride_in_1x1", "no", "torchvision's rule"),),
        command="fcos-deploy report m.onnx",
        notes=("A note.",),
    )


class _Checker(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src")]
        self.alts += [v or "" for k, v in attrs if k == "alt"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(report: ReportData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_report(report, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def page(written: tuple[Path, Path]) -> str:
    return written[0].read_text(encoding="utf-8")


def test_page_is_whole_and_needs_nothing_else(page: str) -> None:
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(link.startswith(("data:", "#image-")) for link in checker.links)
    assert "http://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page).replace("http://www.w3.org", "")


def test_verdict_comes_first_and_figures_are_there(page: str) -> None:
    assert page.index(
        "The variant is within 0.004 AP of the reference on 12 images, by the 95 % interval."
    ) < page.index("<table>")
    for text in (
        "0.598",
        "+0.002",
        "-0.001 to +0.004",
        "4.8 times",
        "96.0",  # 24 of the 25 detections have a partner
        "8.2",
        "3.0",
        "90.0",
        "drop 0.002 ≤ 0.010.",
        "A note.",
        "ab" * 32,
    ):
        assert text in page, text


def test_all_charts_are_there_and_are_svg(page: str) -> None:
    charts = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(charts) == 7
    for chart in charts:
        assert ElementTree.fromstring(base64.b64decode(chart)).tag.endswith("svg")


def test_thresholds_and_shifts_are_given(page: str) -> None:
    # 12 of the reference's scores are above 0.5; so are all of INT8's above 0.49. The mean shift is 11 x -0.02 / 12.
    assert "<tr><td>0.50</td><td>0.490</td></tr>" in page
    assert "<tr><td>cell &lt;b&gt;</td><td>-0.018; 0.300</td></tr>" in page


def test_operating_points_confusion_and_the_worst_images_are_shown(page: str, written: tuple[Path, Path]) -> None:
    assert "<td>0.900 (0.800 to 0.950)</td><td>0.700 (0.600 to 0.750)</td>" in page
    # By these annotations each image has dust, which is missed, and a cell on nothing.
    assert "<tr><td>dust</td><td>0</td><td>0</td><td>12</td></tr>" in page
    assert "<tr><td>nothing</td><td>12</td><td>0</td><td></td></tr>" in page
    assert page.count(".png: 1 missed, 1 extra</figcaption>") == 10
    assert len(re.findall('<image id="image-fault-', page)) == 10
    assert "| nothing | 12 | 0 |  |" in written[1].read_text(encoding="utf-8")


def test_search_is_shown_with_its_choice_and_its_ranking(page: str) -> None:
    assert (
        "<td>3</td><td>70.0</td><td>0.6100</td><td>-0.0100</td><td>-0.0200 to 0.0000</td>"
        '<td>8.0</td><td class="text"><b>chosen</b></td>' in page
    )
    assert (
        "<td>0</td><td>100.0</td><td>0.5500</td><td>+0.0500</td><td>+0.0400 to +0.0600</td>"
        '<td>5.0</td><td class="text">misses the goal' in page
    )
    first = '<td>layer0</td><td>30.00</td><td>2.00</td><td>1.00</td><td class="text">float</td>'
    assert page.index(first) < page.index("<td>layer3</td>")
    assert "no layer had to stay in float" in page


def test_names_cannot_break_out(page: str) -> None:
    assert "<script>" not in page
    assert "cell &lt;b&gt; 0.90" in page


def test_difference_shows_what_is_missed(page: str) -> None:
    assert "1 missed, 0 extra" in page


def test_markdown_has_the_table(written: tuple[Path, Path]) -> None:
    lines = written[1].read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| openvino int8")]
    header = next(line for line in lines if line.startswith("| Variant"))
    assert rows[0].count("|") == header.count("|")
    assert "| 0.50 | 0.490 |" in lines
    assert "| 3 | 70.0 | 0.6100 | -0.0100 | -0.0200 to 0.0000 | 8.0 | chosen |" in lines
    assert "| layer29 | 1.00 | 2.00 | 1.00 | INT8 |" in lines
    assert "| 0.598 |" in rows[0]
    assert "| dust | – | – |" in lines  # noqa: RUF001
    separator = lines[lines.index("| Class | pytorch fp32 | openvino int8 |") + 1]
    assert separator == "|---|---:|---:|"


def test_minimal_report(dataset: Dataset, tmp_path: Path) -> None:
    variant = ReportVariant(label="x", evaluation=evaluation("x", "fp32", REFERENCE, ap=0.6))
    html, _ = write_report(ReportData(title="t", dataset=dataset, variants=(variant,)), tmp_path / "deep" / "r.html")
    page = html.read_text(encoding="utf-8")
    assert "Not judged" in page
    assert "there was no reference to compare with" in page


def test_same_data_same_file(report: ReportData, tmp_path: Path, page: str) -> None:
    html, _ = write_report(report, tmp_path / "again.html")
    assert html.read_text(encoding="utf-8") == page


def test_an_interval_that_ends_short_of_its_figure_is_drawn(report: ReportData, tmp_path: Path) -> None:
    """As rounding leaves it where a share is 0 or 1."""
    reference, variant = report.variants
    (point,) = variant.evaluation.operating_points
    assert point.recall is not None
    point = replace(point, recall=replace(point.recall, high=point.recall.value - 1e-9))
    variant = replace(variant, evaluation=replace(variant.evaluation, operating_points=(point,)))
    write_report(replace(report, variants=(reference, variant)), tmp_path / "report.html")


def test_labels_must_differ(report: ReportData) -> None:
    with pytest.raises(ConfigError, match="different labels"):
        replace(report, variants=(report.variants[1], report.variants[1]))


@pytest.mark.parametrize(
    ("drops", "sentence"),
    [
        ((0.0052, 0.0028), "All 2 variants are within 0.006 AP of the reference on 12 images, by the 95 % interval."),
        ((0.0108,), "The variant is within 0.011 AP of the reference on 12 images, by the 95 % interval."),
        ((-0.002, 0.0004), "All 2 variants are as accurate as the reference on 12 images, by the 95 % interval."),
    ],
)
def test_the_bound_is_never_less_than_the_largest_drop(
    report: ReportData, drops: tuple[float, ...], sentence: str
) -> None:
    variants = tuple(
        replace(
            report.variants[1],
            label=f"variant {drop}",
            evaluation=replace(report.variants[1].evaluation, drop=interval(drop, drop, drop)),
        )
        for drop in drops
    )
    assert report_verdict(replace(report, variants=variants)).headline == sentence


def test_what_the_interval_leaves_open_is_not_called_equal(report: ReportData) -> None:
    wide = replace(report.variants[1].evaluation, drop=interval(0.0, -0.004, 0.0091))
    data = replace(report, variants=(replace(report.variants[1], evaluation=wide),))
    assert (
        report_verdict(data).headline
        == "The variant is within 0.010 AP of the reference on 12 images, by the 95 % interval."
    )


@pytest.mark.parametrize(
    ("outcome", "headline"),
    [
        (Outcome.FAILED, "Not the same detector: openvino int8."),
        (Outcome.INCONCLUSIVE, "These images cannot decide whether it is the same detector: openvino int8."),
    ],
)
def test_what_did_not_pass_is_the_headline(report: ReportData, outcome: Outcome, headline: str, tmp_path: Path) -> None:
    candidate = report.variants[1]
    spoilt = replace(candidate.evaluation.verdicts[0], outcome=outcome, message="drop 0.020 > 0.010")
    variant = replace(candidate, evaluation=replace(candidate.evaluation, verdicts=(spoilt,)))
    data = replace(report, variants=(*report.variants, replace(variant, label="another")))
    verdict = report_verdict(data)
    assert (verdict.outcome, verdict.headline) == (outcome, headline)
    assert verdict.details == ("openvino int8: drop 0.020 > 0.010.",)
    html, markdown = write_report(data, tmp_path / "r.html")
    assert f'<div class="word">{outcome}</div>' in html.read_text(encoding="utf-8")
    assert f"**{outcome.capitalize()}.** {headline}" in markdown.read_text(encoding="utf-8")
