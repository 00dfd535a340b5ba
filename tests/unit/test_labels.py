"""One name for one class channel, from every ecosystem's checkpoint to every server's labels."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("torch")

from fcos_deploy.accuracy.diagnosis import class_causes  # noqa: E402
from fcos_deploy.bundle import open_bundle  # noqa: E402
from fcos_deploy.checkpoints.rules import COCO_80, COCO_91  # noqa: E402
from fcos_deploy.core.artifact import read_contract  # noqa: E402
from fcos_deploy.core.contract import ModelContract  # noqa: E402
from fcos_deploy.core.decode import PROFILES  # noqa: E402
from fcos_deploy.core.onnx_file import (  # noqa: E402
    NAMES_KEY,
    onnx_metadata,
    with_contract,
)
from fcos_deploy.serving import package_bundle  # noqa: E402

# Class names by label and the label of each of three channels, as each ecosystem's rules decide them.
ECOSYSTEMS = {
    "torchvision": (COCO_91[:3], (), ("background", "person", "bicycle")),
    "mmdetection": (COCO_80[:3], (), ("person", "bicycle", "car")),
    "detectron2": (COCO_80[:3], (), ("person", "bicycle", "car")),
    "adelaidet": (COCO_80[:3], (), ("person", "bicycle", "car")),
    "tianzhi": (("background", *COCO_80[:3]), (1, 2, 3), ("person", "bicycle", "car")),
}


@pytest.fixture(params=ECOSYSTEMS)
def labelled(request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A copy of the tiny bundle whose graph has an ecosystem's labels, and what its channels are called."""
    names, label_map, channels = ECOSYSTEMS[request.param]
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    path, manifest = bundle / "model.fp32.onnx", json.loads((bundle / "manifest.json").read_text())
    contract = read_contract(path)
    decode = replace(contract.decode, label_map=label_map, profile=PROFILES[request.param])
    onnx.save(with_contract(onnx.load(str(path)), replace(contract, class_names=names, decode=decode)), str(path))
    record = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    manifest["artifacts"][0].update(record)
    text = json.dumps(manifest)
    (bundle / "manifest.json").write_text(text)
    (bundle / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    return bundle, channels


def test_servers_and_the_graphs_own_metadata_name_channels(
    labelled: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    """The tensors of a served graph count channels: label 0 of tianzhi, the background, has none."""
    bundle, channels = labelled
    with open_bundle(bundle) as opened:
        package_bundle(opened, server="triton", output=tmp_path / "triton")
    (served,) = (tmp_path / "triton").iterdir()
    assert (served / "labels.txt").read_text() == "".join(f"{name}\n" for name in channels)
    assert f"dims: [1, 428, {len(channels)}], label_filename" in (served / "config.pbtxt").read_text()
    assert json.loads(onnx_metadata(bundle / "model.fp32.onnx")[NAMES_KEY]) == list(channels)


def test_a_diagnosis_names_channels(labelled: tuple[Path, tuple[str, ...]]) -> None:
    contract: ModelContract = read_contract(labelled[0] / "model.fp32.onnx")
    logits = np.random.default_rng(0).normal(size=(1, 50, 3)).astype(np.float32)
    (cause,) = class_causes(logits, logits[..., [1, 2, 0]], contract.channel_names)
    first, second = labelled[1][:2]
    assert f"'{second}' in place of '{first}'" in cause.sentence
