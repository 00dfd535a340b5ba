"""Every key of an mmdetection configuration is used, neutral or refused by name; what is used decides."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fcos_deploy.checkpoints.ecosystems.mmdetection import (
    CONFIG_KEYS,
    NEUTRAL,
    NEUTRAL_STEPS,
    UNKNOWN,
    parse_config,
)
from fcos_deploy.checkpoints.load import CheckpointDescription, StoredWeights, decided_options, describe_weights
from fcos_deploy.checkpoints.rules import ConfigKey
from fcos_deploy.core.checkpoint_options import CheckpointOptions, option_flag
from fcos_deploy.core.decode import ALL_CANDIDATES, BoxClip
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import BoxActivation, ExtraSource
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter, SizeRule

DATA = Path(__file__).parents[1] / "data"
REFERENCES = json.loads((DATA / "mmdetection" / "configurations.json").read_text())
OFFICIAL: dict[str, dict[str, Any]] = json.loads((DATA / "mmdetection" / "official_configs.json").read_text())
KEYS_OF_OLDER = {
    "2.28/fcos_r50_caffe_fpn_gn-head_1x_coco": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "2.28/fcos_x101_64x4d_fpn_gn-head_mstrain_640-800_2x_coco": "fcos_x101-64x4d_fpn_gn-head_ms-640-800-2x_coco",
    "2.0/fcos_r50_caffe_fpn_4x4_1x_coco": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "1.0/fcos_r50_caffe_fpn_gn_1x_4gpu": "fcos_r50-caffe_fpn_gn-head_1x_coco",
}
TINY = REFERENCES["networks"][REFERENCES["cases"]["base"]["network"]]
BASE: dict[str, Any] = ast.literal_eval(REFERENCES["base"])
NORMALIZE = {"type": "Normalize", "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0], "to_rgb": False}


def _text(config: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {value!r}" for name, value in config.items())


def _describe(
    config: str, *, options: CheckpointOptions | None = None, shapes: dict[str, list[int]] | None = None
) -> CheckpointDescription:
    def tensor(name: str, shape: list[int]) -> torch.Tensor:
        if name.endswith(("running_mean", "running_var")):
            return torch.full(shape, 0.5)
        return torch.ones(shape) if name.endswith(".scale") else torch.empty(shape, device="meta")

    tensors = {name: tensor(name, shape) for name, shape in (shapes or TINY).items()}
    stored = StoredWeights(tensors, {"meta": {"cfg": config}}, container="state_dict")
    return describe_weights(stored, file_name="x.pth", stated={}, options=options or CheckpointOptions())


def _changed(path: str, value: object) -> str:
    """The base configuration with one key set; ``pipeline.Step.key`` in the step, which is added where it is not."""
    config = copy.deepcopy(BASE)
    if path.startswith("pipeline."):
        _, kind, key = path.split(".")
        steps = config["test_dataloader"]["dataset"]["pipeline"]
        step = next((step for step in steps if step["type"] == kind), None)
        if step is None:
            step = {"type": kind}
            replaces = kind.endswith(("Resize", "ShortestEdge")) or kind.startswith("Load")
            index = 1 if replaces and not kind.startswith("Load") else 0
            steps[index : index + replaces] = [step]
        step[key] = value
        return _text(config)
    section = config
    *parents, last = path.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return _text(config)


def _pipeline(*steps: dict[str, Any], **changes: object) -> str:
    """A version 3 configuration whose test pipeline has these steps."""
    config = copy.deepcopy(BASE)
    config["test_dataloader"]["dataset"]["pipeline"] = [*steps, {"type": "PackDetInputs"}]
    config["model"]["data_preprocessor"].update(changes)
    return _text(config)


def _version_2(*transforms: dict[str, Any], **augment: object) -> str:
    """A version 2 configuration that tests with ``MultiScaleFlipAug``."""
    config = copy.deepcopy(BASE)
    del config["model"]["data_preprocessor"], config["test_dataloader"], config["test_pipeline"]
    steps = {"type": "MultiScaleFlipAug", "flip": False, "img_scale": (640, 480), "transforms": transforms, **augment}
    config["data"] = {"test": {"pipeline": [{"type": "LoadImageFromFile"}, steps]}}
    return _text(config)


ALL_KEYS = [(f"{section}.{name}", key) for section, keys in CONFIG_KEYS.items() for name, key in keys.items()]


@pytest.mark.parametrize(("path", "key"), [item for item in ALL_KEYS if item[1] is not NEUTRAL])
def test_a_value_that_is_not_understood_is_refused_by_name(path: str, key: ConfigKey) -> None:
    if path.endswith(".type") and path.startswith("pipeline."):
        return  # the type chooses the section
    shown = "print('what does this do')"
    config = _changed(path, "@").replace("'@'", shown)
    with pytest.raises(CheckpointError) as refused:
        _describe(config)
    assert f"says {path} = an expression that is not a literal, expected {key.expected}." in refused.value.message
    assert f"--ignore-config {path} " in refused.value.hint


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.type", "ATSS"),
        ("model.backbone.type", "ResNetV1d"),
        ("model.backbone.deep_stem", True),
        ("model.backbone.norm_cfg.type", "GN"),
        ("model.backbone.in_channels", 1),
        ("model.backbone.norm_first", True),
        ("model.neck.act_cfg", {"type": "ReLU"}),
        ("model.neck.norm_cfg.type", "GN"),
        ("model.neck.upsample_cfg.mode", "bicubic"),
        ("model.neck.start_level", 0),
        ("model.neck.num_outs", 6),
        ("model.bbox_head.type", "NASFCOSHead"),
        ("model.bbox_head.loss_cls.use_sigmoid", False),
        ("model.bbox_head.loss_cls", {"type": "FocalLoss"}),
        ("model.bbox_head.num_classes", 4),
        ("model.bbox_head.strides", [4, 8, 16, 32, 64]),
        ("model.test_cfg.nms.type", "soft_nms"),
        ("model.test_cfg.nms.offset", 1),
        ("model.test_cfg.max_per_img", -1),
        ("model.test_cfg.fuse", True),
        ("model.data_preprocessor.mean", [120.0]),
        ("model.data_preprocessor.type", "MyPreprocessor"),
        ("pipeline.LoadImageFromFile.color_type", "grayscale"),
        ("pipeline.Resize.interpolation", "bicubic"),
        ("pipeline.Resize.scale_factor", 0.5),
        ("pipeline.Pad.padding_mode", "reflect"),
        ("pipeline.RandomFlip.prob", 0.5),
    ],
)
def test_another_detector_is_refused_by_the_key_that_says_so(path: str, value: object) -> None:
    with pytest.raises(CheckpointError) as refused:
        _describe(_changed(path, value))
    if path == "model.bbox_head.loss_cls":  # use_sigmoid is absent
        path, value = f"{path}.use_sigmoid", None
    assert f"says {path} = {'a dict' if isinstance(value, dict) else repr(value)}, expected" in refused.value.message
    assert f"--ignore-config {path}" in refused.value.hint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_pipeline({"type": "Albu"}, BASE["test_pipeline"][1]), "pipeline.Albu"),
        (_pipeline({"type": "Resize", "scale": [(640, 480), (800, 600)], "keep_ratio": True}), "pipeline.Resize.scale"),
        (_pipeline({"type": "Resize", "scale_factor": 0.5, "keep_ratio": True}), "pipeline.Resize.scale_factor"),
        (_pipeline(), "pipeline.Resize = None"),
        (_pipeline(BASE["test_pipeline"][1], NORMALIZE), "not a second in the pipeline"),
        (_pipeline(NORMALIZE, BASE["test_pipeline"][1], mean=None, std=None), "one step of each kind"),
        (
            _pipeline({"type": "Resize", "scale": (640, 480), "keep_ratio": True}, {"type": "Pad", "size": (640, 480)}),
            "pipeline.Pad.size",
        ),
        (
            _pipeline(
                {"type": "Resize", "scale": (640, 480), "keep_ratio": True}, {"type": "Pad", "pad_to_square": True}
            ),
            "pipeline.Pad.pad_to_square",
        ),
        (_version_2({"type": "Resize"}, NORMALIZE, img_scale=[(640, 480), (800, 600)]), "MultiScaleFlipAug.img_scale"),
        (_version_2({"type": "Resize"}, NORMALIZE, flip=True), "MultiScaleFlipAug.flip"),
        (_text(BASE) + "\ntest_dataloader = build()", "says test_pipeline = an expression"),
        (_text(BASE) + "\nmodel['neck']['act_cfg'] = dict(type='ReLU')", "says model = an expression"),
        (_text(BASE) + "\nmodel = dict(**model, **more)", "says model.** = an expression"),
        ("_base_ = 'fcos.py'", "says _base_ = 'fcos.py'"),
        ("def (", "cannot be read"),
        ("x" * 3_000_000, "cannot be read"),
    ],
)
def test_a_pipeline_or_a_text_that_is_not_understood_stops(config: str, message: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        _describe(config)
    assert message in str(refused.value)
    assert "--ignore-config" in refused.value.hint


def test_an_option_about_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no batch norm in its pyramid") as refused:
        _describe(_text(BASE), options=CheckpointOptions(fpn_norm_eps=1e-3))
    assert "--fpn-norm-eps" in refused.value.hint
    shapes = REFERENCES["networks"][REFERENCES["cases"]["neck-bn"]["network"]]
    bare = _describe("", shapes=shapes, options=CheckpointOptions(norm_groups=8))
    assert ("fpn_norm_eps", "1e-05") in {(d.name, d.value) for d in bare.contract.decisions}


def test_an_option_or_ignoring_the_key_answers() -> None:
    soft = _changed("model.test_cfg.nms.type", "soft_nms")
    described = _describe(soft, options=CheckpointOptions(ignore_config=("model.test_cfg.nms.type",)))
    (decision,) = (d for d in described.contract.decisions if d.name == "ignore_config")
    assert (decision.value, decision.source) == ("model.test_cfg.nms.type", "option")
    scales = _pipeline({"type": "Resize", "scale_factor": 0.5})
    sized = _describe(scales, options=CheckpointOptions(input_size=(64, 96)))
    assert sized.contract.preprocess.canvas == (64, 96)
    without = _describe("def (", options=CheckpointOptions(ignore_config=("cfg",), norm_groups=8))
    assert without.contract.preprocess.shortest == 800
    for text, key in ((_text(BASE), "model.neck.act_cfg"), ("", "cfg")):
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            _describe(text, options=CheckpointOptions(ignore_config=(key,)))


def test_what_the_configuration_decides_is_printed_and_can_be_overridden() -> None:
    described = _describe(_text(BASE))
    decisions = {decision.name: (decision.value, decision.source) for decision in described.contract.decisions}
    source = "the configuration in the file"
    for name, value in (("norm_groups", "8"), ("extra_source", "output"), ("pre_nms_top_k", "1000")):
        assert decisions[name] == (value, source)
    assert decisions["extra_relu"] == ("yes", source)
    options = CheckpointOptions(
        norm_groups=4,
        tower_norm_eps=1e-3,
        stage_strides=(1, 2, 2, 1),
        stage_dilations=(1, 1, 1, 2),
        extra_source=ExtraSource.LATERAL,
        extra_relu=False,
        size_divisor=64,
        pad_pixel=(0.0, 0.0, 0.0),
        pre_nms_top_k=0,
        class_agnostic=True,
        min_box_size=3.0,
        clip=BoxClip.NONE,
    )
    with pytest.raises(CheckpointError, match="strides"):  # The head's do not fit those of the body any more.
        _describe(_text(BASE), options=options)
    changed = _describe(_changed("model.bbox_head.strides", [8, 16, 16, 32, 64]), options=options)
    config, decode = changed.config, changed.contract.decode
    assert (config.norm_groups, config.tower_norm_eps, config.strides) == (4, 1e-3, (8, 16, 16, 32, 64))
    assert (config.extra_source, config.extra_relu) == (ExtraSource.LATERAL, False)
    assert (decode.pre_nms_top_k, decode.class_agnostic, decode.min_box_size) == (ALL_CANDIDATES, True, 3.0)
    assert decode.profile.clip is BoxClip.NONE
    assert changed.contract.preprocess.size_divisor == 64


@pytest.mark.parametrize("name", REFERENCES["cases"])
def test_all_decisions_as_options_are_the_same_detector_without_the_configuration(name: str) -> None:
    case = REFERENCES["cases"][name]
    config = copy.deepcopy(BASE)
    for path, value in ast.literal_eval(case["changes"]).items():
        *parents, last = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section.pop(last, None)
        if value != "<absent>":
            section[last] = value
    shapes = REFERENCES["networks"][case["network"]]
    described = _describe(_text(config), shapes=shapes)
    again = _describe("", options=decided_options(described), shapes=shapes)
    assert again.config == described.config
    assert (again.contract.preprocess, again.contract.decode) == (
        described.contract.preprocess,
        described.contract.decode,
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (_version_2({"type": "Resize", "keep_ratio": True}, NORMALIZE, {"type": "Pad", "size_divisor": 32}), {}),
        (_version_2({"type": "Resize"}, NORMALIZE), {"size_divisor": 1}),
        (_version_2({"type": "Resize"}, NORMALIZE, img_scale=[(640, 480)]), {"size_divisor": 1}),
        (
            _version_2({"type": "Resize", "keep_ratio": False}, NORMALIZE, {"type": "Pad", "size_divisor": 32}),
            {"canvas": (480, 640), "shortest": None, "longest": None, "size_rule": SizeRule.STRETCH},
        ),
        (
            _version_2({"type": "Resize"}, NORMALIZE, {"type": "Pad", "size": (480, 640), "pad_val": 1}, img_scale=480),
            {
                "canvas": (480, 640),
                "content": (480, 480),
                "shortest": None,
                "longest": None,
                "size_rule": SizeRule.LETTERBOX,
                "size_divisor": 1,
                "pad_pixel": (5.0, 7.0, 9.0),  # 1 after normalising
            },
        ),
    ],
)
def test_version_2_is_read_as_it_runs(config: str, expected: dict[str, object]) -> None:
    spec = _describe(config).contract.preprocess
    values = {"shortest": 480, "longest": 640, "size_rule": SizeRule.MMDETECTION, "size_divisor": 32, **expected}
    assert {name: getattr(spec, name) for name in values} == values
    assert (spec.mean, spec.std, spec.channel_order) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), ChannelOrder.BGR)
    assert spec.resize_filter is ResizeFilter.CV2


def _walk(section: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """(section, key) of every key, sections that ``CONFIG_KEYS`` lists opened."""
    for name, value in section.items():
        yield path, name
        if f"{path}.{name}" in CONFIG_KEYS and value is not None:
            yield from _walk(value, f"{path}.{name}")


def _steps(pipeline: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in pipeline:
        yield step
        yield from _steps(step.get("transforms", []))


@pytest.mark.parametrize("name", OFFICIAL)
def test_no_key_of_the_official_configurations_is_unclassified(name: str) -> None:
    config = OFFICIAL[name]
    keys = set(_walk(config["model"], "model"))
    if "test_cfg" in config:
        keys |= set(_walk(config["test_cfg"], "model.test_cfg"))
    dataset = config.get("test_dataloader", {}).get("dataset") or config["data"]["test"]
    for step in _steps(dataset.get("pipeline", [])):
        if step["type"] not in NEUTRAL_STEPS:
            keys |= {(f"pipeline.{step['type']}", key) for key in step if key != "type"}
    assert {(section, key) for section, key in keys if key not in CONFIG_KEYS[section]} == set()
    shapes = json.loads((DATA / "state_dict_keys" / f"mmdet_{KEYS_OF_OLDER.get(name, name[6:])}.json").read_text())
    if name.startswith("1.0"):
        shapes = {key.replace("bbox_head.conv_", "bbox_head.fcos_"): shape for key, shape in shapes.items()}
    described = _describe(_text(config), shapes=shapes)
    spec, network = described.contract.preprocess, described.config
    assert (spec.shortest, spec.longest, spec.size_divisor, spec.pad_pixel) == (800, 1333, 32, None)
    assert (network.extra_source, network.extra_relu, network.norm_groups) == (ExtraSource.OUTPUT, True, 32)
    tricks = "normbbox" in name
    assert (network.box_activation is BoxActivation.RELU) is network.centerness_on_reg is tricks
    assert described.contract.decode.iou_threshold == (0.6 if tricks else 0.5)


def test_the_table_in_the_documentation_is_the_list() -> None:
    rows = ["| section | key | values | else |", "|---|---|---|---|"]
    for section, keys in CONFIG_KEYS.items():
        neutral = [f"`{name}`" for name, key in keys.items() if key is NEUTRAL]
        for name, key in keys.items():
            if key is not NEUTRAL:
                answers = " or ".join(f"`{option_flag(option)}`" for option in key.options)
                rows.append(f"| `{section}` | `{name}` | {key.expected} | {answers or 'refused'} |")
        if neutral:
            rows.append(f"| `{section}` | {', '.join(neutral)} | neutral | - |")
    rows.append(f"| `pipeline` | {', '.join(f'`{step}`' for step in sorted(NEUTRAL_STEPS))} | neutral | - |")
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    assert "\n".join(rows) in page, "\n".join(rows)


def test_configuration_text_is_never_evaluated() -> None:
    config = parse_config(
        "import os\na = os.system('false')\nb = dict(c=[1, -2.5, (3,)], d=a, e={'f': None}, **a)\ng = b\nh = dict(**g)"
    )
    assert config["a"] is UNKNOWN
    assert config["g"] == {"c": [1, -2.5, [3]], "d": UNKNOWN, "e": {"f": None}, "**": UNKNOWN}
    assert config["h"] == config["g"]


@pytest.mark.parametrize("text", ["def (", "a = " + "(" * 5000, "\0", "x" * 3_000_000, "a = " + "-" * 100_000 + "1"])
def test_configuration_text_that_is_no_python_is_empty(text: str) -> None:
    assert parse_config(text) == {}


def test_the_thresholds_may_stand_in_the_head_and_must_stand_somewhere() -> None:
    config = copy.deepcopy(BASE)
    thresholds = config["model"].pop("test_cfg")
    with pytest.raises(CheckpointError, match=r"model\.test_cfg = None, expected the thresholds of the test") as caught:
        _describe(_text(config))
    assert "--ignore-config model.test_cfg" in caught.value.hint
    config["model"]["bbox_head"]["test_cfg"] = {**thresholds, "score_thr": 0.123}
    assert _describe(_text(config)).contract.decode.score_threshold == 0.123
    config["model"]["bbox_head"]["test_cfg"] = {**thresholds, "nms": {"type": "soft_nms", "iou_threshold": 0.5}}
    with pytest.raises(CheckpointError, match=r"model\.bbox_head\.test_cfg\.nms\.type = 'soft_nms'"):
        _describe(_text(config))
    config["model"]["test_cfg"] = thresholds  # The detector's replaces the head's.
    assert _describe(_text(config)).contract.decode.score_threshold == thresholds["score_thr"]
