"""The report: complete, self-contained, and safe with whatever names data has."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.score_drift import ClassDrift
from fcos_deploy.core.score_drift import ScoreDrift as MovedScores
from fcos_deploy.report import (
    ChainLink,
    ClassRow,
    ImagePanel,
    KeyFigure,
    LatencyRow,
    LayerRow,
    MixedPrecisionPart,
    PanelBox,
    PrecisionCurve,
    Provenance,
    ReportData,
    ReportVerdict,
    ScoreDrift,
    TrialPoint,
    VariantRow,
    write_report,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAMES = ("pytorch fp32", "openvino int8")


def search(placement: str, *, trials: int) -> MixedPrecisionPart:
    return MixedPrecisionPart(
        placement=placement,
        backend="openvino",
        max_drop=0.01,
        float_ap=0.6,
        float_p50_ms=12.3,
        trials=tuple(
            TrialPoint(
                float_layers=i,
                int8_share=1 - i / 10,
                ap=0.55 + i / 50,
                p50_ms=5.0 + i if i != 1 else None,
                chosen=i == trials - 1,
            )
            for i in range(trials)
        ),
        layers=tuple(
            LayerRow(layer=f"layer{i}", classes=0.3 / (i + 1), boxes=0.02, centerness=0.01, ignored=i < 3)
            for i in range(30 if trials > 1 else 0)
        ),
    )


def full_report() -> ReportData:
    rng = np.random.default_rng(0)
    box = PanelBox(box=(5, 5, 30, 40), score=0.9, name="cell <b>")
    alone = PanelBox(box=(50, 5, 70, 40), score=0.5, name="dust", partner=False)
    return ReportData(
        title="Cells & <script>alert(1)</script>",
        verdict=ReportVerdict(passed=True, headline="All variants hold.", details=("drop 0.001 <= 0.010",)),
        data="40 images.",
        figures=(KeyFigure("4.8 times", "as fast as pytorch"),),
        variants=(
            VariantRow(
                label=NAMES[0],
                backend="pytorch",
                precision="fp32",
                reference=True,
                ap=0.6,
                ap_interval=(0.55, 0.65),
                p50_ms=40.0,
                p90_ms=42.0,
                p99_ms=50.0,
            ),
            VariantRow(
                label=NAMES[1],
                backend="openvino",
                precision="int8",
                passed=True,
                ap=0.598,
                drop=0.002,
                drop_interval=(-0.001, 0.004),
                match_rate=0.987,
                p50_ms=8.25,
                file_bytes=3 * 2**20,
                int8_share=0.9,
            ),
        ),
        classes=(ClassRow(name="cell", ap=(0.6, None)),),
        curves=tuple(PrecisionCurve(variant=n, class_name="cell", precision=(0.9,) * 101) for n in NAMES),
        drifts=(
            ScoreDrift(
                variant=NAMES[1],
                pairs=tuple((v, v - 0.01) for v in rng.uniform(0.1, 1, 50)),
                moved=MovedScores(0.3, 0.291, (ClassDrift("cell", 40, -0.0123, 0.05, 0.288),), ((0.5, 0.487),)),
            ),
        ),
        latencies=tuple(
            LatencyRow(variant=n, samples_ms=tuple(rng.uniform(8, 9, 40)), preprocess_ms=0.5, infer_ms=7, decode_ms=0.5)
            for n in NAMES
        ),
        mixed=(search("portable", trials=4), search("openvino", trials=1)),
        images=(
            ImagePanel(
                name="a.jpg",
                variant=NAMES[1],
                pixels=rng.integers(0, 255, (60, 80, 3), np.uint8),
                reference=(box, alone),
                candidate=(box,),
            ),
        ),
        provenance=Provenance(
            created="today",
            chain=(ChainLink(path="m.onnx", kind="onnx", sha256="ab" * 32, size=100),),
            versions=(("numpy", "2"),),
            machine=(("processor", "x"),),
            commands=("fcos-deploy report m.onnx",),
            decisions=(("stride_in_1x1", "no", "torchvision's rule"),),
        ),
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
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    html, _ = write_report(full_report(), tmp_path_factory.mktemp("report") / "report.html")
    return html.read_text(encoding="utf-8")


def test_page_is_whole_and_needs_nothing_else(page: str) -> None:
    checker = _Checker()
    checker.feed(page)
    assert checker.open == []
    assert "script" not in checker.tags
    assert all(link.startswith(("data:", "#image-")) for link in checker.links)
    assert "http://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page).replace("http://www.w3.org", "")


def test_verdict_comes_first_and_figures_are_there(page: str) -> None:
    assert page.index("All variants hold.") < page.index("<table>")
    for text in (
        "0.598",
        "+0.002",
        "-0.001 to +0.004",
        "4.8 times",
        "98.7",
        "8.2",
        "3.0",
        "90.0",
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
    assert "<tr><td>0.50</td><td>0.487</td></tr>" in page
    assert "<tr><td>cell</td><td>-0.012; 0.288</td></tr>" in page


def test_search_is_shown_with_its_choice_and_its_ranking(page: str) -> None:
    assert (
        '<td>3</td><td>70.0</td><td>0.6100</td><td>-0.0100</td><td>8.0</td><td class="text"><b>chosen</b></td>' in page
    )
    assert '<td>0</td><td>100.0</td><td>0.5500</td><td>+0.0500</td><td>5.0</td><td class="text">misses the goal' in page
    first = '<td>layer0</td><td>30.00</td><td>2.00</td><td>1.00</td><td class="text">float</td>'
    assert page.index(first) < page.index("<td>layer3</td>")
    assert "no layer had to stay in float" in page


def test_names_cannot_break_out(page: str) -> None:
    assert "<script>" not in page
    assert "cell &lt;b&gt; 0.90" in page


def test_difference_shows_what_is_missed(page: str) -> None:
    assert "1 missed, 0 of its own" in page


def test_markdown_has_the_table(tmp_path: Path) -> None:
    _, markdown = write_report(full_report(), tmp_path / "r.html")
    lines = markdown.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| openvino int8")]
    header = next(line for line in lines if line.startswith("| Variant"))
    assert rows[0].count("|") == header.count("|")
    assert "| 0.50 | 0.487 |" in lines
    assert "| 3 | 70.0 | 0.6100 | -0.0100 | 8.0 | chosen |" in lines
    assert "| layer29 | 1.00 | 2.00 | 1.00 | INT8 |" in lines
    assert "| 0.598 |" in rows[0]
    assert "| cell | 0.600 | – |" in lines  # noqa: RUF001
    separator = lines[lines.index("| Class | pytorch fp32 | openvino int8 |") + 1]
    assert separator == "|---|---:|---:|"


def test_the_least_report(tmp_path: Path) -> None:
    data = ReportData(
        title="t",
        verdict=ReportVerdict(passed=None, headline="h"),
        data="d",
        variants=(VariantRow(label="x", backend="x", precision="fp32"),),
    )
    html, _ = write_report(data, tmp_path / "deep" / "report.html")
    assert "Not judged" in html.read_text(encoding="utf-8")


def test_same_data_same_file(tmp_path: Path, page: str) -> None:
    html, _ = write_report(full_report(), tmp_path / "again.html")
    assert html.read_text(encoding="utf-8") == page


def test_labels_must_differ_and_classes_must_fit() -> None:
    row = VariantRow(label="x", backend="x", precision="fp32")
    verdict = ReportVerdict(passed=None, headline="h")
    with pytest.raises(ConfigError, match="different labels"):
        ReportData(title="t", verdict=verdict, data="d", variants=(row, row))
    with pytest.raises(ConfigError, match="needs 1 figures"):
        ReportData(title="t", verdict=verdict, data="d", variants=(row,), classes=(ClassRow(name="c", ap=()),))
