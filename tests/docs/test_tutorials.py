"""The tutorials are followed as a reader would: every bash block of a page, in order, in a folder with what it names.

A comment before a block says what a test cannot know: ``<!-- not run here: REASON -->`` or ``<!-- exit: 4 -->``.
A text block shows lines of the output of the bash block before it; numbers in them may differ, words may not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("openvino")

from safetensors.torch import load_file  # noqa: E402  (safetensors.torch needs torch)

from fcos_deploy.pipeline.deploy import DEMO_DATA  # noqa: E402

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
# Images of a tutorial's val/, by their numbers in BCCD: the pages show their figures. Fewer than ten give no interval.
_IMAGES = (0, 14, 28, 30, 37, 55, 72, 89, 104, 111, 125, 140)

_BLOCK = re.compile(r"(?:<!-- (?P<comment>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
# Canonical names to those of mmdetection, the inverse of fcos_deploy/checkpoints/ecosystems/mmdetection.py.
_MMDETECTION_NAMES = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.(.+)", r"neck.lateral_convs.\1.conv.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.(.+)", r"neck.fpn_convs.\1.conv.\2"),
    (r"backbone\.fpn\.extra_blocks\.p6\.(.+)", r"neck.fpn_convs.3.conv.\1"),
    (r"backbone\.fpn\.extra_blocks\.p7\.(.+)", r"neck.fpn_convs.4.conv.\1"),
    (r"head\.classification_head\.cls_logits\.(.+)", r"bbox_head.conv_cls.\1"),
    (r"head\.regression_head\.bbox_reg\.(.+)", r"bbox_head.conv_reg.\1"),
    (r"head\.regression_head\.bbox_ctrness\.(.+)", r"bbox_head.conv_centerness.\1"),
    (
        r"head\.(cla|reg)\w+_head\.conv\.(\d+)\.(.+)",
        lambda m: (
            f"bbox_head.{m[1].replace('cla', 'cls')}_convs.{int(m[2]) // 3}.{('conv', 'gn')[int(m[2]) % 3]}.{m[3]}"
        ),
    ),
)
_MMDETECTION_CONFIG = """
model = dict(
    type='FCOS',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=18, base_channels=32, style='pytorch'),
    bbox_head=dict(type='FCOSHead', num_classes=3, norm_on_bbox=True, centerness_on_reg=True,
                   strides=[8, 16, 32, 64, 128]),
    test_cfg=dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6), max_per_img=100))
"""


@dataclass(frozen=True)
class Block:
    command: str
    exit_code: int
    skipped: bool
    shown: tuple[str, ...]  # lines of output, as the page has them


def blocks(page: str) -> list[Block]:
    """The bash blocks of a page, each with the text block that follows it."""
    result: list[Block] = []
    for match in _BLOCK.finditer((TUTORIALS / page).read_text(encoding="utf-8")):
        comment, language, text = match["comment"] or "", match["language"], match["text"]
        if language == "bash":
            code = re.fullmatch(r"exit: (\d+)", comment)
            skipped = comment.startswith("not run here: ")
            assert not comment or code or skipped, comment
            result.append(Block(text, int(code[1]) if code else 0, skipped, ()))
        elif language == "text":
            last = result.pop()
            result.append(Block(last.command, last.exit_code, last.skipped, tuple(text.splitlines())))
    return result


def words(line: str) -> str:
    """``line`` without what differs from run to run and from terminal to terminal: numbers, frames, spaces."""
    return " ".join(re.sub(r"[-+]?\d[\w.+-]*", "#", re.sub(r"[\u2500-\u257f]", " ", line)).split())


def follow(page: str, folder: Path) -> None:
    """Run the page's blocks in ``folder``; exit codes and shown lines must be those of the page."""
    programs = folder.parent / "programs"  # fcos-deploy, which measures briefly: numbers may differ from the page's
    programs.mkdir(exist_ok=True)
    (programs / "fcos-deploy").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/brief.py" "$@"\n')
    (programs / "fcos-deploy").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
    }
    for block in blocks(page):
        if block.skipped:
            continue
        command = ["bash", "-eu", "-o", "pipefail", "-c", block.command]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == block.exit_code, f"{block.command}\n{done.stdout}"
        output = {words(line) for line in done.stdout.splitlines()}
        missing = [line for line in block.shown if line != "..." and words(line) not in output]
        assert not missing, f"{block.command}\nshows {missing}\nbut printed\n{done.stdout}"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tutorial")
    make_files(folder)
    return folder


def make_files(folder: Path) -> None:
    """What the first section of each tutorial names: checkpoints of the demo detector, images, annotations."""
    weights = {name: tensor.float() for name, tensor in load_file(DEMO_DATA / "fcos_bccd.safetensors").items()}

    # torchvision's reference scripts: channel 0 is the background, which is never predicted.
    predictor = "head.classification_head.cls_logits"
    weight, bias = weights[f"{predictor}.weight"], weights[f"{predictor}.bias"]
    model = {
        **weights,
        f"{predictor}.weight": torch.cat([torch.zeros_like(weight[:1]), weight]),
        f"{predictor}.bias": torch.cat([torch.full_like(bias[:1], -20.0), bias]),
    }
    torch.save({"model": model, "epoch": 25, "args": argparse.Namespace(lr=0.01)}, folder / "model_25.pth")
    (folder / "classes.txt").write_text("background\nRBC\nWBC\nPlatelets\n")

    # mmdetection's locations lie half a stride further right and down, so the sides are that much further or nearer.
    state = {name: tensor for source, tensor in weights.items() for name in [mmdetection_name(source)]}
    state["bbox_head.conv_reg.bias"] = state["bbox_head.conv_reg.bias"] + torch.tensor([0.5, 0.5, -0.5, -0.5])
    state |= {f"bbox_head.scales.{level}.scale": torch.tensor(1.0) for level in range(5)}
    meta = {"cfg": _MMDETECTION_CONFIG, "dataset_meta": {"classes": ("RBC", "WBC", "Platelets")}}
    torch.save({"meta": meta, "state_dict": state}, folder / "epoch_24.pth")

    shutil.copytree(DEMO_DATA / "calibration", folder / "train")
    annotations = json.loads((DEMO_DATA / "evaluation.json").read_text())
    names = {f"BloodImage_{number:05d}.jpg" for number in _IMAGES}
    annotations["images"] = [image for image in annotations["images"] if image["file_name"] in names]
    numbers = {image["id"] for image in annotations["images"]}
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in numbers]
    (folder / "val.json").write_text(json.dumps(annotations))
    (folder / "val").mkdir()
    for image in annotations["images"]:
        shutil.copy(DEMO_DATA / "evaluation" / image["file_name"], folder / "val")


def mmdetection_name(name: str) -> str:
    """A canonical name as mmdetection has it."""
    for pattern, target in _MMDETECTION_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(target) if isinstance(target, str) else target(match)
    raise AssertionError(name)


@pytest.fixture(scope="session")
def intel_folder(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the torchvision tutorial was followed; the sign-off starts from its bundle."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("intel") / "work"))
    follow("torchvision-to-intel.md", folder)
    return folder


def test_torchvision_to_intel(intel_folder: Path) -> None:
    assert (intel_folder / "cells" / "report.html").is_file()


def test_sign_off_int8(intel_folder: Path) -> None:
    follow("sign-off-int8.md", intel_folder)


def test_mmdetection_to_jetson(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    follow("mmdetection-to-jetson.md", Path(shutil.copytree(prepared, tmp_path / "work")))


@pytest.mark.parametrize("page", sorted(path.name for path in TUTORIALS.glob("*.md")))
def test_every_tutorial_is_followed_and_mostly_run(page: str) -> None:
    assert f'"{page}"' in Path(__file__).read_text(), "write a test that follows it"
    run = [block for block in blocks(page) if not block.skipped]
    assert len(run) >= 5
