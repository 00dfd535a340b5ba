"""A module of one's own under the contract."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from exporters.torch_onnx import export_onnx
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.enums import Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.model.wrap import BoxOutput, Grouping, OutputConvention, WrappedModule, wrap_module
from fcos_deploy.pipeline.deploy import deploy
from fcos_deploy.pipeline.source import run_user_code
from fcos_deploy.pipeline.steps import DeployRequest

PREPROCESS = PreprocessSpec(height=64, width=96, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
DECODE = DecodeSpec(
    profile=PROFILES["adelaidet"], strides=(8, 16, 32), score_threshold=0.05, iou_threshold=0.6, label_map=(1, 2)
)
NAMES = ("background", "cat", "dog")


class _Constant(nn.Module):
    """Maps full of one number a kind, boxes -0.5 and 2 alternating by side."""

    def __init__(self, *, by_kind: bool = False, order: str = "cbt", **shapes: Any) -> None:
        super().__init__()
        self.by_kind, self.order, self.shapes = by_kind, order, shapes

    def forward(self, images: Tensor) -> Any:
        levels = []
        for stride in self.shapes.get("strides", (8, 16, 32)):
            height, width = images.shape[2] // stride, images.shape[3] // stride
            box = torch.tensor([-0.5, 2.0, -0.5, 2.0]).view(1, 4, 1, 1).expand(1, 4, height, width)
            maps = {
                "c": torch.full((1, self.shapes.get("classes", 2), height, width), 0.25),
                "b": box,
                "t": torch.full((1, 1, height, width), self.shapes.get("centerness", 0.5)),
            }
            levels.append([maps[k] for k in self.order])
        return [list(kind) for kind in zip(*levels, strict=True)] if self.by_kind else levels


def _wrap(module: nn.Module, convention: OutputConvention | None = None) -> WrappedModule:
    return wrap_module(module, preprocess=PREPROCESS, decode=DECODE, class_names=NAMES, convention=convention)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (BoxOutput.PIXELS, [-0.5, 2.0]),
        (BoxOutput.STRIDES, [-8.0, 32.0]),
        (BoxOutput.RELU_STRIDES, [0.0, 32.0]),
        (BoxOutput.EXP_PIXELS, np.exp([-0.5, 2.0]).tolist()),
    ],
)
def test_boxes_become_pixels(form: BoxOutput, expected: list[float]) -> None:
    levels = _wrap(_Constant(), OutputConvention(boxes=form)).model(torch.zeros(1, 3, 64, 96))
    assert levels[1].distances[0, :2, 0, 0].tolist() == pytest.approx(expected)
    assert levels[1].cls_logits[0, 0, 0, 0].item() == 0.25
    assert levels[1].centerness[0, 0, 0, 0].item() == 0.5


def test_outputs_by_kind_in_another_order() -> None:
    convention = OutputConvention(grouping=Grouping.BY_KIND, order=("boxes", "centerness", "classes"))
    wrapped = _wrap(_Constant(by_kind=True, order="btc"), convention)
    levels = wrapped.model(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.cls_logits.shape) for level in levels] == [(1, 2, 8, 12), (1, 2, 4, 6), (1, 2, 2, 3)]
    assert {d.name: d.value for d in wrapped.contract.decisions}["grouping"] == "by-kind"
    assert not wrapped.model.training


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_Constant(classes=3), r"Level 0: cls_logits must have shape \(1, 2, 8, 12\).*got \(1, 3, 8, 12\)"),
        (_Constant(strides=(8, 16)), "not what the convention says"),
        (_Constant(strides=(8, 16, 64)), "Level 2: cls_logits must have shape"),
        (_Constant(order="bct"), "Level 0: cls_logits"),
        (_Constant(by_kind=True), "Level 0|not what the convention says"),
        (_Constant(centerness=float("nan")), "Level 0: centerness holds NaN"),
        (nn.Conv2d(3, 4, 1), "Level 0|not what the convention says"),
        (nn.Linear(3, 4), "not what the convention says"),
        (nn.Identity(), "not what the convention says|Level 0"),
    ],
)
def test_a_convention_that_does_not_fit_is_an_error(module: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _wrap(module)


class _Real(nn.Module):
    """Outputs as a detector has them: logits of rare objects, distances of some pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        levels = []
        for stride in (8, 16, 32):
            level = nn.functional.avg_pool2d(images, stride).mean(1, keepdim=True)
            logits, distances = level.expand(-1, self.classes, -1, -1) - 4.0, (level * 0.1).exp().expand(-1, 4, -1, -1)
            levels.append((logits, distances, level))
        return levels


@pytest.mark.parametrize("classes", [1, 4])
def test_where_shapes_cannot_tell_the_kinds_apart_the_order_is_asked_for_and_checked(classes: int) -> None:
    names = tuple("abcd"[:classes])
    decode = DecodeSpec(profile=PROFILES["adelaidet"], strides=(8, 16, 32), score_threshold=0.05, iou_threshold=0.6)

    def wrap(convention: OutputConvention | None) -> WrappedModule:
        module = _Real(classes)
        return wrap_module(module, preprocess=PREPROCESS, decode=decode, class_names=names, convention=convention)

    with pytest.raises(ConfigError, match=r"as many channels as the (centerness|boxes)") as caught:
        wrap(None)
    assert "OutputConvention(order=" in caught.value.hint
    assert wrap(OutputConvention()).contract.class_names == names
    if classes == 4:
        for form in BoxOutput:
            with pytest.raises(ConfigError, match=r"not negative|nowhere below 0"):
                wrap(OutputConvention(order=("boxes", "classes", "centerness"), boxes=form))


def test_an_order_must_name_each_kind_once() -> None:
    with pytest.raises(ConfigError, match="once each"):
        OutputConvention(order=("boxes", "boxes", "classes"))


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of docs/your-own-fcos.md as a reader saves them, and images in ``photos``."""
    folder = tmp_path_factory.mktemp("own")
    write_page_files(folder)
    return folder


def write_page_files(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "your-own-fcos.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (folder / name).write_text(code)
    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        blocks = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "photos" / f"{index}.png"), cv2.resize(blocks, (160, 120), interpolation=0))


def test_the_pages_example_runs_to_verify(page_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(page_folder)
    monkeypatch.syspath_prepend(str(page_folder))
    exec(compile((page_folder / "deploy_mine.py").read_text(), "deploy_mine.py", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip()
    manifest = json.loads((page_folder / "mine" / "manifest.json").read_text())
    assert manifest["provenance"]["checkpoint"] == "MyFcos"
    assert {figure["backend"] for figure in manifest["accuracy"]} == {"pytorch", "onnxruntime"}


def test_a_function_runs_only_where_running_code_is_allowed(page_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page_folder)
    with pytest.raises(ConfigError, match="runs code of yours") as caught:
        run_user_code("my_fcos:detector", allowed=False)
    assert "--run-code" in caught.value.hint
    wrapped = run_user_code("my_fcos:detector", allowed=True)
    assert wrapped is not None
    assert wrapped.contract.class_names == ("cat", "dog")
    assert run_user_code("model.pth", allowed=False) is None
    for text in ("my_fcos:nothing", "no_such_package:detector"):
        with pytest.raises(ConfigError, match="cannot be called"):
            run_user_code(text, allowed=True)
    with pytest.raises(ConfigError, match="returned a MyFcos"):
        run_user_code("my_fcos:MyFcos", allowed=True)
    result = CliRunner().invoke(
        build_app(), ["deploy", "my_fcos:detector", "-o", "no", "--calibration-images", "photos"]
    )
    assert result.exit_code == 2
    assert "--run-code" in result.stderr


def test_an_onnx_file_is_deployed_without_torch_and_says_what_the_reference_is(page_folder: Path) -> None:
    """In a process of its own, where torch cannot be imported."""
    export_onnx(run_detector(page_folder), page_folder / "mine.onnx")
    command = ["deploy", "mine.onnx", "-o", "from-onnx", "--calibration-images", "photos", "--images", "photos"]
    command += ["--allow-overlap", "--backend", "onnxruntime", "--precision", "fp32"]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fcos_deploy.cli.app import build_app\n"
        f"build_app()({command!r}, standalone_mode=False)\n"
        "build_app()(['verify', 'from-onnx'], standalone_mode=False)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, cwd=page_folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = "the reference is the fp32 graph 'mine.onnx' on ONNX Runtime"
    assert said in " ".join(run.stderr.split())
    manifest = json.loads((page_folder / "from-onnx" / "manifest.json").read_text())
    assert any(said in decision["source"] for decision in manifest["provenance"]["decisions"])
    assert said in " ".join(verdict for figure in manifest["accuracy"] for verdict in figure["verdicts"])
    assert "&#39;mine.onnx&#39; on ONNX Runtime" in (page_folder / "from-onnx" / "report.html").read_text()
    with pytest.raises(ConfigError, match="ends in the tail 'raw', and 'nms' was asked for"):
        deploy(
            DeployRequest(
                checkpoint=page_folder / "mine.onnx",
                output=page_folder / "no",
                calibration_images=page_folder / "photos",
                backends=("onnxruntime",),
                tail=Tail.NMS,
            )
        )


def run_detector(folder: Path) -> Any:
    """What ``detector`` of the page returns."""
    namespace: dict[str, Any] = {"__name__": "my_fcos"}
    exec(compile((folder / "my_fcos.py").read_text(), "my_fcos.py", "exec"), namespace)
    return namespace["detector"]()
