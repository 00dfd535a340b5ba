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
from fcos_deploy.report import (
    ChainLink,
    ClassRow,
    LatencyRow,
    ParetoPoint,
    Picture,
    PictureBox,
    PrecisionCurve,
    Provenance,
    ReportData,
    ReportVerdict,
    ScoreDrift,
    SensitivityRow,
    VariantRow,
    write_report,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

NAMES = ("pytorch fp32", "openvino int8")


def full_report() -> ReportData:
    rng = np.random.default_rng(0)
    box = PictureBox(box=(5, 5, 30, 40), score=0.9, name="cell <b>")
    alone = PictureBox(box=(50, 5, 70, 40), score=0.5, name="dust", partner=False)
    return ReportData(
        title="Cells & <script>alert(1)</script>",
        verdict=ReportVerdict(passed=True, headline="All variants hold.", details=("drop 0.001 <= 0.010",)),
        data="40 images.",
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
        drifts=(ScoreDrift(variant=NAMES[1], pairs=tuple((v, v - 0.01) for v in rng.uniform(0.1, 1, 50))),),
        latencies=tuple(
            LatencyRow(variant=n, samples_ms=tuple(rng.uniform(8, 9, 40)), preprocess_ms=0.5, infer_ms=7, decode_ms=0.5)
            for n in NAMES
        ),
        sensitivity=tuple(SensitivityRow(layer=f"layer{i}", sqnr_db=20.0 + i, kept_float=i < 2) for i in range(30)),
        pareto=tuple(ParetoPoint(label=f"{i}", ap=0.5 + i / 100, p50_ms=5 + i, chosen=i == 2) for i in range(4)),
        pictures=(
            Picture(
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
    assert all(link.startswith(("data:", "#picture-")) for link in checker.links)
    assert "http://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page).replace("http://www.w3.org", "")


def test_verdict_comes_first_and_figures_are_there(page: str) -> None:
    assert page.index("All variants hold.") < page.index("<table>")
    for text in ("0.598", "+0.002", "-0.001 to +0.004", "98.7", "8.2", "3.0", "90.0", "A note.", "ab" * 32):
        assert text in page, text


def test_all_charts_are_there_and_are_svg(page: str) -> None:
    charts = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(charts) == 7
    for chart in charts:
        assert ElementTree.fromstring(base64.b64decode(chart)).tag.endswith("svg")


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
