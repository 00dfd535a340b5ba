"""Options of a checkpoint: their TOML form, and that all decisions written as options give the same detector."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fcos_deploy.checkpoints.load import CheckpointDescription, StoredWeights, decided_options, describe_weights
from fcos_deploy.core.checkpoint_options import (
    CheckpointOptions,
    format_checkpoint_options,
    option_infos,
    override_options,
    read_checkpoint_options,
)
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype

torch = pytest.importorskip("torch")

EVERYTHING = CheckpointOptions(
    ecosystem="mmdetection",
    variant="tricks",
    weights="ema",
    class_names=('a "quoted" one', "müll\\tonne", "del\x7f", "😀"),
    stride_in_1x1=False,
    centerness_on_reg=True,
    norm_eps=1e-7,
    shortest=800,
    longest=1333,
    input_dtype=InputDtype.FLOAT32,
    channel_order=ChannelOrder.BGR,
    mean=(103.53, 116.28, 1.0),
    std=(1.0, 57.1, 1e-5),
    score_threshold=0.05,
    max_detections=300,
    profile="tianzhi",
)


@pytest.mark.parametrize("options", [CheckpointOptions(), EVERYTHING, CheckpointOptions(input_size=(320, 416))])
def test_the_toml_form_is_read_back_as_it_was(options: CheckpointOptions, tmp_path: Path) -> None:
    path = tmp_path / "o.toml"
    path.write_text(format_checkpoint_options(options, sources={"norm_eps": "two\nlines"}), encoding="utf-8")
    assert read_checkpoint_options(path) == options


def _describe(
    name: str, folder: Path, options: CheckpointOptions, *, file_name: str = "x.pth"
) -> CheckpointDescription:
    def tensor(key: str, shape: list[int]) -> torch.Tensor:
        if key.endswith(("running_mean", "running_var")):
            return torch.full(shape, float(key.endswith("running_var")))
        return torch.ones(shape) if key.endswith(".scale") else torch.empty(shape, device="meta")

    shapes = json.loads((folder / f"{name}.json").read_text())
    stored = StoredWeights({key: tensor(key, shape) for key, shape in shapes.items()}, {}, container="")
    return describe_weights(stored, file_name=file_name, stated={}, options=options)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("torchvision_bn", CheckpointOptions()),
        ("torchvision_bn", CheckpointOptions(input_size=(320, 416), mean=(0.1, 0.2, 0.3))),
        ("adelaidet_R_50_1x", CheckpointOptions(score_threshold=0.3, profile="torchvision")),
        ("mmdet_fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco", CheckpointOptions()),
        ("tianzhi_fcos_R_50_FPN_1x", CheckpointOptions(variant="original")),
        ("tianzhi_fcos_R_50_FPN_1x", CheckpointOptions(variant="imprv", input_size=(640, 640))),
    ],
)
def test_all_decisions_as_options_give_the_same_network_and_contract(
    name: str, given: CheckpointOptions, state_dict_keys_dir: Path, tmp_path: Path
) -> None:
    described = _describe(name, state_dict_keys_dir, given)
    sources = {decision.name: decision.source for decision in described.contract.decisions}
    (tmp_path / "o.toml").write_text(format_checkpoint_options(decided_options(described), sources=sources))
    again = _describe(name, state_dict_keys_dir, read_checkpoint_options(tmp_path / "o.toml"))
    assert again.config == described.config
    assert replace(again.contract, decisions=()) == replace(described.contract, decisions=())


def test_the_command_lines_values_replace_the_files_and_what_contradicts_them() -> None:
    edges = CheckpointOptions(shortest=800, longest=1333, mean=(1.0, 2.0, 3.0))
    assert override_options(edges, {"input_size": (64, 64)}) == CheckpointOptions(
        input_size=(64, 64), mean=(1.0, 2.0, 3.0)
    )
    canvas = CheckpointOptions(input_size=(64, 64))
    assert override_options(canvas, {"shortest": 5, "longest": 6}) == CheckpointOptions(shortest=5, longest=6)
    with pytest.raises(ConfigError, match="together"):
        override_options(canvas, {"shortest": 5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input_sise = [1, 2]", "unknown option 'input_sise'.\n  hint: did you mean 'input_size'?"),
        ("mean = [1, 2]", "--mean must have 3 numbers, or 1 for gray images"),
        ("norm_eps = 'small'", "must be"),
        ("shortest = 800", "together"),
        ("= 1", "is not a TOML file"),
        ("\xff", "it is not text in UTF-8"),
        ("#" * (1 << 20) + "#", "is larger than"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "o.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as refused:
        read_checkpoint_options(tmp_path / "o.toml")
    assert message in str(refused.value)


def test_the_common_options_are_those_that_people_reach_for() -> None:
    common = [name for name, info in option_infos().items() if info.common]
    assert common == ["ecosystem", "variant", "class_names", "input_size", "score_threshold"]
