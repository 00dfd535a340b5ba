"""From files to networks: formats, containers, precision, errors."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fcos_deploy.checkpoints.load import (
    CheckpointOptions,
    decided_options,
    describe_checkpoint,
    find_weights,
    load_checkpoint,
    to_tensors,
)
from fcos_deploy.checkpoints.reader import open_checkpoint
from fcos_deploy.core.errors import CheckpointError, ConfigError, InputSizeError
from fcos_deploy.core.network import resnet_config
from fcos_deploy.model.fcos import Fcos

CANVAS = CheckpointOptions(input_size=(128, 160))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of a small real FCOS, torchvision's names."""
    torch.manual_seed(0)
    return Fcos(resnet_config(18, num_classes=3, stem_channels=8, fpn_channels=32)).eval().state_dict()


@pytest.fixture(scope="module")
def expected(weights: dict[str, Tensor]) -> Tensor:
    model = Fcos(resnet_config(18, num_classes=3, stem_channels=8, fpn_channels=32)).eval()
    model.load_state_dict(weights)
    return _class_logits(model)


def _class_logits(model: Fcos) -> Tensor:
    with torch.inference_mode():
        return model(torch.linspace(-2, 2, 3 * 128 * 160).view(1, 3, 128, 160))[0].cls_logits


def _save_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights, path)


def _save_bare(weights: dict[str, Tensor], path: Path) -> None:
    torch.save(weights, path)


def _save_legacy(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)


def _save_training(weights: dict[str, Tensor], path: Path) -> None:
    """As torchvision's reference scripts do: with the arguments, which ``weights_only`` refuses."""
    arguments = argparse.Namespace(data=Path("/data"), lr=0.01, weights=None, opt=["a", {"b": 1}])
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}
    content = {"model": weights, "optimizer": optimizer, "args": arguments, "epoch": 3, "lr": np.float64(0.5)}
    torch.save({**content, "log": np.arange(6.0).reshape(2, 3), "count": collections.Counter("abc")}, path)


def _save_data_parallel(weights: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": {f"module.model.{n}": t for n, t in weights.items()}}, path)


def _save_lightning(weights: dict[str, Tensor], path: Path) -> None:
    content = {"state_dict": {f"model.{n}": t for n, t in weights.items()}, "pytorch-lightning_version": "2.4.0"}
    loops = {"fit_loop": {"epoch_progress": {"total": {"ready": 1}}}}
    torch.save({**content, "epoch": 1, "loops": loops, "hyper_parameters": {"lr": 0.1}, "optimizer_states": []}, path)


def _save_numpy_pickle(weights: dict[str, Tensor], path: Path) -> None:
    """As detectron2's model zoo."""
    content = {"model": {n: t.numpy() for n, t in weights.items()}, "__author__": "x", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


def _save_old_numpy_pickle(weights: dict[str, Tensor], path: Path) -> None:
    """As Python 2 compatible files: bytes as latin-1 text."""
    path.write_bytes(pickle.dumps({"model": {n: t.numpy() for n, t in weights.items()}}, protocol=2))


@pytest.mark.parametrize(
    ("save", "name", "reader"),
    [
        (_save_safetensors, "m.safetensors", "safetensors"),
        (_save_bare, "m.pth", "torch"),
        (_save_legacy, "m.pth", "torch before 1.6"),
        (_save_training, "m.pth", "torch"),
        (_save_data_parallel, "m.ckpt", "torch"),
        (_save_lightning, "m.ckpt", "torch"),
        (_save_numpy_pickle, "m.pkl", "pickle"),
        (_save_old_numpy_pickle, "m.pkl", "pickle"),
    ],
)
def test_every_format_gives_the_same_network(
    save: Any, name: str, reader: str, weights: dict[str, Tensor], expected: Tensor, tmp_path: Path
) -> None:
    save(weights, tmp_path / name)
    assert describe_checkpoint(tmp_path / name, options=CANVAS).reader == reader
    loaded = load_checkpoint(tmp_path / name, options=CANVAS)
    assert not loaded.model.training
    assert len(loaded.contract.source_sha256) == 64
    assert torch.equal(_class_logits(loaded.model), expected)


def test_half_precision_weights_become_float32(weights: dict[str, Tensor], tmp_path: Path) -> None:
    half = {n: t.half() for n, t in weights.items() if t.is_floating_point()}
    save_file(half, tmp_path / "half.safetensors")
    model = load_checkpoint(tmp_path / "half.safetensors", options=CANVAS).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.backbone.body.conv1.weight, half["backbone.body.conv1.weight"].float())


def test_averaged_weights_are_taken_unless_the_others_are_asked_for(weights: dict[str, Tensor], tmp_path: Path) -> None:
    averaged = {f"module.{n}": t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    path = tmp_path / "m.pth"
    torch.save({"model": weights, "model_ema": {**averaged, "n_averaged": torch.tensor(5)}}, path)
    name = "head.regression_head.bbox_reg.bias"
    ema, plain = (
        describe_checkpoint(path, options=CheckpointOptions(weights=which, input_size=(128, 160)))
        for which in ("", "model")
    )
    assert torch.equal(to_tensors(ema.tensors)[name], weights[name] + 1)
    assert torch.equal(to_tensors(plain.tensors)[name], weights[name])
    decision = next(d for d in ema.contract.decisions if d.name == "weights")
    assert (decision.value, decision.source) == (
        "model_ema",
        "rule: averaged weights are what is evaluated; 'model' has the others",
    )


@pytest.mark.parametrize(
    "container",
    [
        "state_dict_ema",
        "ema_state_dict",
        "ema.module",
        "ema.state_dict",
        "ema_state",
        "swa_model_state_dict",
        "state_dict.ema",
    ],
)
def test_averaged_weights_are_found_in_every_container(
    container: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    averaged: Any = {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    if container == "state_dict.ema":  # in one mapping, by their prefixes, as Lightning's callbacks store them
        both = {f"{p}.{n}": t for p, ts in (("net", weights), ("ema", averaged)) for n, t in ts.items()}
        content = {"state_dict": both}
    else:
        *outer, key = container.split(".")
        content = {"model": weights, **({outer[0]: {key: averaged}} if outer else {key: averaged})}
    optimizer = {"state": {0: {"exp_avg": torch.ones(4)}}}
    torch.save({**content, "optimizer": optimizer}, tmp_path / "m.pth")
    described = describe_checkpoint(tmp_path / "m.pth", options=CANVAS)
    name = "head.regression_head.bbox_reg.bias"
    assert torch.equal(to_tensors(described.tensors)[name], weights[name] + 1)
    decision = next(d for d in described.contract.decisions if d.name == "weights")
    assert decision.value == container
    assert "averaged" in decision.source
    assert "has the others" in decision.source
    again = describe_checkpoint(tmp_path / "m.pth", options=decided_options(described))
    assert again.contract.preprocess == described.contract.preprocess
    assert torch.equal(to_tensors(again.tensors)[name], weights[name] + 1)


def test_mmengine_stores_the_averaged_weights_in_state_dict(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """Its EMA hook swaps them before it saves (mmengine/hooks/ema_hook.py)."""
    raw = {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    content = {"state_dict": weights, "ema_state_dict": raw, "meta": {"mmengine_version": "0.10.7"}, "message_hub": {}}
    torch.save(content, tmp_path / "m.pth")
    described = describe_checkpoint(tmp_path / "m.pth", options=CANVAS)
    decision = next(d for d in described.contract.decisions if d.name == "weights")
    assert (decision.value, "mmengine" in decision.source) == ("state_dict", True)


def test_weights_of_an_unknown_container_are_asked_for(weights: dict[str, Tensor], tmp_path: Path) -> None:
    best = {n: t + 1 if t.is_floating_point() else t for n, t in weights.items()}
    torch.save({"model_state_dict": weights, "best_model_state_dict": best}, tmp_path / "m.pth")
    with pytest.raises(ConfigError, match="2 sets of weights: 'model_state_dict', 'best_model_state_dict'") as caught:
        describe_checkpoint(tmp_path / "m.pth", options=CANVAS)
    assert "--weights NAME" in caught.value.hint
    options = CheckpointOptions(weights="best_model_state_dict", input_size=(128, 160))
    name = "head.regression_head.bbox_reg.bias"
    described = describe_checkpoint(tmp_path / "m.pth", options=options)
    assert torch.equal(to_tensors(described.tensors)[name], weights[name] + 1)
    with pytest.raises(ConfigError, match="holds no weights 'last', only 'model_state_dict'"):
        describe_checkpoint(tmp_path / "m.pth", options=CheckpointOptions(weights="last"))


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"net.{n}",
        lambda n: f"fcos.{n}",
        lambda n: f"_model.{n}",
        lambda n: f"_orig_mod.{n.replace('backbone.', 'backbone._orig_mod.')}",
        lambda n: f"_fsdp_wrapped_module.{n.replace('body.layer2.', 'body.layer2._fsdp_wrapped_module.')}",
        lambda n: f"model.{n.replace('layer3.0.', 'layer3.0._checkpoint_wrapped_module.')}",
        lambda n: f"module.detector.model.{n}",
    ],
    ids=["net", "fcos", "_model", "compile", "fsdp", "checkpoint", "nested"],
)
def test_prefixes_of_wrappers_and_buffers_of_the_training_are_left_out(
    rename: Any, weights: dict[str, Tensor], expected: Tensor, tmp_path: Path
) -> None:
    stray = {rename(n): torch.zeros(1) for n in ("total_ops", "backbone.body.conv1.total_params", "criterion.weight")}
    stored = {**{rename(n): t for n, t in weights.items()}, **stray, "loss_fn.pos_weight": torch.ones(3)}
    torch.save({"state_dict": stored}, tmp_path / "m.pth")
    loaded = load_checkpoint(tmp_path / "m.pth", options=CANVAS)
    assert torch.equal(_class_logits(loaded.model), expected)
    left_out = next(d.value for d in loaded.contract.decisions if d.name == "left_out")
    assert left_out.split(", ") == [
        "total_ops",
        "backbone.body.conv1.total_params",
        "criterion.weight",
        "loss_fn.pos_weight",
    ]


def test_missing_averaged_weights_are_an_error(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": weights}, tmp_path / "m.pth")
    with pytest.raises(ConfigError, match="no averaged"):
        find_weights(open_checkpoint(tmp_path / "m.pth").content, prefer="ema")


def test_what_a_safetensors_file_says_of_itself(tiny_checkpoint: Path) -> None:
    contract = load_checkpoint(tiny_checkpoint).contract
    assert contract.class_names == ("red", "white", "platelet")
    assert contract.preprocess.canvas == (128, 160)
    assert contract.decode.score_threshold == 0.2
    sources = {d.name: d.source for d in contract.decisions}
    assert sources["class_names"] == sources["score_threshold"] == sources["ecosystem"] == "the file's metadata"


def test_a_size_that_a_file_states_wrongly_is_told_as_the_files_and_can_be_overridden(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    save_file(weights, path, metadata={"fcos_deploy": json.dumps({"input_size": "160x208"})})
    with pytest.raises(InputSizeError, match="160x208 is not a multiple of 32") as stated:
        describe_checkpoint(path)
    assert "The size comes from the file's metadata." in stated.value.message
    assert "160x192; --input-size HxW overrides it" in stated.value.hint
    described = describe_checkpoint(path, options=CheckpointOptions(input_size=(160, 192)))
    assert described.contract.preprocess.canvas == (160, 192)
    with pytest.raises(InputSizeError) as asked:
        describe_checkpoint(path, options=CheckpointOptions(input_size=(100, 192)))
    assert "comes from" not in asked.value.message


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"classes": "x"}', '{"input_size": "axb"}', '{"score_threshold": "much"}', '"text"']
)
def test_damaged_metadata_is_an_error(text: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "m.safetensors", metadata={"fcos_deploy": text})
    with pytest.raises(CheckpointError, match="metadata is damaged"):
        describe_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float, weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = "backbone.fpn.layer_blocks.1.0.weight"
    damaged = weights[name].clone()
    damaged[3, 2, 1, 0] = value
    torch.save({**weights, name: damaged}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=rf"Tensor '{name}' holds NaN or infinite values"):
        load_checkpoint(tmp_path / "m.pth")


def test_a_missing_tensor_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = "backbone.body.layer3.1.conv2.weight"
    torch.save({n: t for n, t in weights.items() if n != name}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors: '{name}'"):
        load_checkpoint(tmp_path / "m.pth")


def test_a_wrong_shape_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = "head.regression_head.bbox_reg.weight"
    torch.save({**weights, name: torch.zeros(5, 32, 3, 3)}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=rf"'{name}' must have shape \[4, 32, 3, 3\], got \[5, 32, 3, 3\]"):
        load_checkpoint(tmp_path / "m.pth")


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="together"):
        CheckpointOptions(shortest=800)
    with pytest.raises(ConfigError, match="not both"):
        CheckpointOptions(shortest=800, longest=1333, input_size=(64, 64))
    with pytest.raises(ConfigError, match="larger than"):
        CheckpointOptions(shortest=800, longest=100)
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        CheckpointOptions(input_size=(0, 64))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_stays_under_twice_the_tensors(tmp_path: Path) -> None:
    """Measured in a process of its own: what loading adds to what importing takes."""
    import subprocess

    model = Fcos(resnet_config(50, num_classes=3))
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    code = """
import sys
from pathlib import Path
from fcos_deploy.checkpoints.load import CheckpointOptions, load_checkpoint
def status(key):
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
load_checkpoint(Path(sys.argv[1]), options=CheckpointOptions(input_size=(64, 64)))
Path('/proc/self/clear_refs').write_text('5')
before = status('VmRSS')
load_checkpoint(Path(sys.argv[2]), options=CheckpointOptions(input_size=(64, 64)))
print(status('VmHWM') - before)
"""
    torch.manual_seed(0)
    small = Fcos(resnet_config(18, num_classes=3, stem_channels=8, fpn_channels=32)).state_dict()
    momentum = {"state": {i: torch.ones(1000, 1000) for i in range(20)}}  # 80 MB that nobody needs
    files = (
        (_save_legacy, "legacy.pth"),
        (_save_numpy_pickle, "n.pkl"),
        (_save_old_numpy_pickle, "n2.pkl"),
        (None, "zip.pth"),
    )
    for save, name in files:
        big = tmp_path / name
        if save is None:
            torch.save({"model": model.state_dict(), "optimizer": momentum}, big)
            torch.save(small, tmp_path / "small")
        else:
            save(model.state_dict(), big)
            save(small, tmp_path / "small")
        run = subprocess.run([sys.executable, "-c", code, tmp_path / "small", big], capture_output=True, check=True)
        assert int(run.stdout) < 2 * size, name


def test_json_of_every_decision_is_plain_text(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "m.pth")
    decisions = describe_checkpoint(tmp_path / "m.pth").contract.decisions
    assert all(isinstance(d.value, str) and d.source for d in decisions)
    assert json.dumps([d.value for d in decisions])
