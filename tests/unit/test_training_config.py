"""Configurations and arguments that trainers store beside the weights: used where they decide, or asked about."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fcos_deploy.checkpoints.ecosystems import all_ecosystems
from fcos_deploy.checkpoints.load import CheckpointDescription, StoredWeights, describe_weights
from fcos_deploy.checkpoints.pickle_reader import Inert
from fcos_deploy.checkpoints.rules import parse_yaml
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import BoxActivation
from fcos_deploy.core.preprocess import ChannelOrder

KEYS = Path(__file__).parents[1] / "data" / "state_dict_keys"
FILES = {
    "adelaidet": "adelaidet_R_50_1x",
    "detectron2": "detectron2_fcos_R_50_FPN_1x",
    "tianzhi": "tianzhi_fcos_R_50_FPN_1x",
    "torchvision": "torchvision_bn",
}
# As detectron2's cfg.dump() writes it.
ADELAIDET_YAML = """\
CUDNN_BENCHMARK: false
INPUT:
  FORMAT: RGB
  MAX_SIZE_TEST: 1000
  MIN_SIZE_TEST: 600
  MIN_SIZE_TRAIN:
  - 640
  - 800
MODEL:
  FCOS:
    BOX_QUALITY: ctrness
    FPN_STRIDES:
    - 8
    - 16
    - 32
    - 64
    - 128
    INFERENCE_TH_TEST: 0.1
    NMS_TH: 0.5
    NUM_CLASSES: 80
    POST_NMS_TOPK_TEST: 50
    PRE_NMS_TOPK_TEST: 500
    THRESH_WITH_CTR: false
  FPN:
    FUSE_TYPE: sum
  META_ARCHITECTURE: OneStageDetector
  PIXEL_MEAN: [123.675, 116.28, 103.53]
  PIXEL_STD:
  - 58.395
  - 57.12
  - 57.375
  RESNETS:
    RES5_DILATION: 1
    STRIDE_IN_1X1: false
OUTPUT_DIR: output of a training whose name is so long
  that it goes on in the next line
SOLVER: {}
"""


def _tensor(name: str, shape: list[int], *, mean: float) -> Tensor:
    if name.endswith(("running_mean", "running_var")):
        return torch.full(shape, 1.0 if name.endswith("running_var") else mean)
    return torch.ones(shape) if name.endswith(".scale") else torch.empty(shape, device="meta")


def _describe(
    ecosystem: str, metadata: dict[str, Any], *, own_statistics: bool = False, **options: Any
) -> CheckpointDescription:
    shapes = json.loads((KEYS / f"{FILES[ecosystem]}.json").read_text())
    tensors = {name: _tensor(name, shape, mean=0.1 if own_statistics else 0.0) for name, shape in shapes.items()}
    weights = StoredWeights(tensors, metadata, container="model")
    return describe_weights(weights, file_name="x.pth", stated={}, options=CheckpointOptions(**options))


def _nested(path: str, value: object) -> dict[str, Any]:
    return functools.reduce(lambda inner, name: {name: inner}, reversed(path.split(".")), value)  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["blocks", "mapping", "braces", "json", "tuples", "aliases"])
def test_a_configuration_of_detectron2_answers_what_the_backbone_leaves_open(form: str) -> None:
    content = parse_yaml(ADELAIDET_YAML)
    assert content is not None
    model = content["MODEL"]
    cfg = {
        "blocks": lambda: ADELAIDET_YAML,
        "mapping": lambda: content,
        "braces": lambda: yaml.safe_dump(content, default_flow_style=None),  # as PyYAML wrote it before 5.1
        "json": lambda: json.dumps(content),
        "tuples": lambda: yaml.dump({**content, "MODEL": {**model, "PIXEL_STD": tuple(model["PIXEL_STD"])}}),
        "aliases": lambda: yaml.dump({"COPY": model, **content}, sort_keys=False),
    }[form]()
    assert ("!!python" in cfg, "&id" in cfg) == (form == "tuples", form == "aliases")
    described = _describe("adelaidet", {"cfg": cfg}, own_statistics=True)
    pre, decode = described.contract.preprocess, described.contract.decode
    assert described.config.stride_in_1x1 is False
    assert (pre.channel_order, pre.mean, pre.std) == (
        ChannelOrder.RGB,
        (123.675, 116.28, 103.53),
        (58.395, 57.12, 57.375),
    )
    assert (pre.shortest, pre.longest) == (600, 1000)
    assert (decode.score_threshold, decode.iou_threshold) == (0.1, 0.5)
    assert (decode.pre_nms_top_k, decode.max_detections) == (500, 50)
    sources = {decision.name: decision.source for decision in described.contract.decisions}
    assert sources["stride_in_1x1"] == sources["mean"] == sources["shortest"] == "the configuration in the file"
    said = _describe("adelaidet", {"cfg": cfg}, own_statistics=True, iou_threshold=0.7, input_size=(512, 512))
    assert (said.contract.decode.iou_threshold, said.contract.preprocess.canvas) == (0.7, (512, 512))


def test_tianzhis_configuration_tells_the_variant_and_lightnings_hyper_parameters_the_transform() -> None:
    tricks = {"NORM_REG_TARGETS": True, "CENTERNESS_ON_REG": True, "PRE_NMS_TOP_N": 200, "INFERENCE_TH": 0.05}
    config = _describe("tianzhi", {"cfg": {"MODEL": {"FCOS": tricks}}}).config
    assert (config.box_activation, config.centerness_on_reg) == (BoxActivation.RELU, True)
    plain = {"NORM_REG_TARGETS": False, "CENTERNESS_ON_REG": False}
    assert _describe("tianzhi", {"cfg": {"MODEL": {"FCOS": plain}}}).config.box_activation is BoxActivation.EXP
    arguments = Inert()
    arguments.state = {"min_size": (640, 672, 704), "max_size": 900, "image_mean": [0.1, 0.2, 0.3], "lr": 0.01}
    for container, stored in (("args", arguments), ("hyper_parameters", arguments.state)):
        described = _describe("torchvision", {container: stored, "epoch": 3})
        pre = described.contract.preprocess
        assert (pre.shortest, pre.longest, pre.mean) == (704, 900, (0.1, 0.2, 0.3))


_REFUSED = [
    ("adelaidet", "MODEL.FCOS.THRESH_WITH_CTR", True, ""),
    ("adelaidet", "MODEL.FCOS.BOX_QUALITY", "iou", ""),
    ("adelaidet", "MODEL.FCOS.FPN_STRIDES", [8, 16, 32], ""),
    ("adelaidet", "MODEL.FCOS.NUM_CLASSES", 20, ""),
    ("adelaidet", "MODEL.FPN.FUSE_TYPE", "avg", ""),
    ("adelaidet", "MODEL.RESNETS.RES5_DILATION", 2, "--stage-dilations"),
    ("adelaidet", "MODEL.META_ARCHITECTURE", "CondInst", ""),
    ("adelaidet", "INPUT.MIN_SIZE_TEST", 0, "--shortest or --input-size"),
    ("adelaidet", "INPUT.FORMAT", "YUV-BT.601", "--channel-order"),
    ("detectron2", "model.pixel_mean", "${mean}", "--mean"),
    ("tianzhi", "INPUT.TO_BGR255", False, ""),
    ("tianzhi", "TEST.BBOX_AUG.ENABLED", True, ""),
    ("torchvision", "fixed_size", (512, 512), "--input-size"),
    ("torchvision", "score_thresh", "high", "--score-threshold"),
]


@pytest.mark.parametrize(("ecosystem", "path", "value", "option"), _REFUSED, ids=[path for _, path, _, _ in _REFUSED])
def test_what_is_not_understood_stops_the_command(ecosystem: str, path: str, value: object, option: str) -> None:
    stored, said = {"cfg": _nested(path, value)}, {"variant": "original"} if ecosystem == "tianzhi" else {}
    with pytest.raises(CheckpointError) as caught:
        _describe(ecosystem, stored, **said)
    assert f"'cfg' in the file says {path} = " in caught.value.message
    assert f"--ignore-config {path} leaves the key out" in caught.value.hint
    assert (f"{option} answers instead" in caught.value.hint) is bool(option)
    _describe(ecosystem, stored, ignore_config=(path,), **said)
    _describe(ecosystem, stored, ignore_config=("cfg",), **said)


def test_a_configuration_that_unfolds_stops_the_command() -> None:
    shared: dict[str, Any] = {}
    for _ in range(7):
        shared = {str(number): shared for number in range(60)}
    with pytest.raises(CheckpointError, match="more than 100000 values"):
        _describe("adelaidet", {"cfg": {"MODEL": shared}})
    merges = "".join(f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(9))
    with pytest.raises(CheckpointError, match="cannot be read"):
        _describe("adelaidet", {"cfg": f"MODEL: {{}}\na0: &a0 {{x: 1}}\n{merges}"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        _describe("adelaidet", {"cfg": "MODEL: " + "[" * 100_000})


def test_keys_to_ignore_and_texts_must_be_there_and_readable() -> None:
    with pytest.raises(ConfigError, match=r"no 'MODEL\.X' to ignore"):
        _describe("adelaidet", {"cfg": {"MODEL": {}}}, ignore_config=("MODEL.X",))
    with pytest.raises(CheckpointError, match="'config' in the file cannot be read") as caught:
        _describe("adelaidet", {"config": "MODEL:\n  A: 1\n& b\n"})
    assert "--ignore-config config" in caught.value.hint
    assert _describe("adelaidet", {"config": "the second training", "cfg": None}).contract.decode.iou_threshold == 0.6


def test_every_ecosystem_reads_stored_configurations() -> None:
    assert all(ecosystem.reads_config for ecosystem in all_ecosystems().values())
