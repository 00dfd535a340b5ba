"""Checkpoints of all five ecosystems, by the names and shapes of their tensors."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fcos_deploy.checkpoints.ecosystems import all_ecosystems
from fcos_deploy.checkpoints.load import (
    CheckpointDescription,
    CheckpointOptions,
    StoredWeights,
    decided_options,
    describe_weights,
)
from fcos_deploy.checkpoints.rules import COCO_80, COCO_91, COCO_IDS
from fcos_deploy.core.enums import CenterMode, Orientation
from fcos_deploy.core.errors import CheckpointError, ConfigError
from fcos_deploy.core.network import BackboneType, BlockType, BoxActivation, DeformableLayer, TowerNorm
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, ResizeFilter, ResizeOrder, SizeRule
from fcos_deploy.model.fcos import build_network

KEYS = Path(__file__).parents[1] / "data" / "state_dict_keys"
ALL = sorted(path.stem for path in KEYS.glob("*.json"))
DCN = [name for name in ALL if "dcn" in name]
MSRA = (103.53, 116.28, 123.675)
CAFFE = (102.9801, 115.9465, 122.7717)


def _tensor(name: str, shape: list[int]) -> Tensor:
    """Statistics of batch norm are read, as those of a converted Caffe backbone; nothing else needs memory."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if name.endswith(("running_mean", "running_var")):
        return torch.full(shape, float(name.endswith("running_var")))
    if name.endswith(".scale"):
        return torch.ones(shape)
    return torch.empty(shape, device="meta")


def _state_dict(name: str) -> dict[str, Tensor]:
    return {key: _tensor(key, shape) for key, shape in json.loads((KEYS / f"{name}.json").read_text()).items()}


def _weights(tensors: dict[str, Tensor], **metadata: object) -> StoredWeights:
    return StoredWeights(tensors, metadata, container="")


def _describe(name: str, *, options: CheckpointOptions | None = None, **metadata: object) -> CheckpointDescription:
    if options is None:
        plain = name.startswith("tianzhi") and "imprv" not in name
        options = CheckpointOptions(variant="original" if plain else "")
    weights = _weights(_state_dict(name), **metadata)
    return describe_weights(weights, file_name=f"{name}.pth", stated={}, options=options)


def _decision(described: CheckpointDescription, name: str) -> tuple[str, str]:
    return next((d.value, d.source) for d in described.contract.decisions if d.name == name)


def test_there_are_key_lists_of_every_ecosystem() -> None:
    assert len(ALL) >= 47
    assert len(DCN) >= 6
    assert {"adelaidet", "detectron2", "mmdetection", "tianzhi", "torchvision"} <= set(all_ecosystems())


@pytest.mark.parametrize("name", ALL)
def test_real_keys_load_without_a_missing_or_an_unexpected_one(name: str) -> None:
    described = _describe(name)
    assert not build_network(described.config, described.tensors).training
    expected = {"mmdet": "mmdetection"}.get(name.split("_", maxsplit=1)[0], name.split("_", maxsplit=1)[0])
    assert described.contract.ecosystem == expected


@pytest.mark.parametrize("name", DCN)
def test_deformable_convolutions_are_those_of_the_stages_and_towers(name: str) -> None:
    """tianzhi's ``conv2.conv`` and ``conv2.offset``, mmcv's ``conv2.conv_offset``; the published ones are all DCNv2."""
    config = _describe(name).config
    head = [layer.name for layer in config.deformable if layer.name.startswith("head.")]
    assert head == ["head.classification_head.conv.9", "head.regression_head.conv.9"]
    stages = config.blocks[2:] if "X_101" in name else config.blocks[1:]
    assert len(config.deformable) == 2 + sum(stages)
    assert {(layer.groups, layer.modulated) for layer in config.deformable} == {(1, True)}


def _with_offsets(name: str, channels: int) -> dict[str, Tensor]:
    """The tensors of ``name`` with ``layerN.0.conv2`` deformable, in detectron2's layout."""
    tensors = _state_dict(name)
    tensors["backbone.bottom_up.res4.0.conv2_offset.weight"] = _empty(channels, 256, 3, 3)
    tensors["backbone.bottom_up.res4.0.conv2_offset.bias"] = _empty(channels)
    return tensors


@pytest.mark.parametrize(
    ("channels", "groups", "modulated"), [(18, 1, False), (27, 1, True), (54, 2, True), (72, 4, False), (108, 4, True)]
)
def test_groups_of_offsets_are_what_divides_the_input_channels(channels: int, groups: int, modulated: bool) -> None:
    described = describe_weights(
        _weights(_with_offsets("adelaidet_R_50_1x", channels)), file_name="x", stated={}, options=CheckpointOptions()
    )
    assert described.config.deformable == (DeformableLayer("backbone.body.layer3.0.conv2", groups, modulated),)
    build_network(described.config, described.tensors)


def test_offsets_with_two_readings_are_asked_about() -> None:
    tensors = _with_offsets("adelaidet_R_50_1x", 54)
    tensors["backbone.bottom_up.res4.0.conv2_offset.weight"] = _empty(54, 192, 3, 3)
    describe = functools.partial(describe_weights, _weights(tensors), file_name="x", stated={})
    with pytest.raises(ConfigError, match="two readings: with a mask and 2 groups or without a mask and 3") as caught:
        describe(options=CheckpointOptions())
    assert caught.value.hint == "--deform-groups 2 or 3"
    described = describe(options=CheckpointOptions(deform_groups=3))
    assert (described.config.deformable[0].groups, described.config.deformable[0].modulated) == (3, False)
    assert decided_options(described).deform_groups == 3
    tensors["backbone.bottom_up.res4.0.conv2_offset.weight"] = _empty(20, 192, 3, 3)
    with pytest.raises(CheckpointError, match="20 channels of offsets, which fit no number of groups"):
        describe(options=CheckpointOptions())
    with pytest.raises(ConfigError, match="The network has no deformable convolution"):
        _describe("adelaidet_R_50_1x", options=CheckpointOptions(deform_groups=1))


def test_depthwise_vovnet_is_refused_by_the_name_of_its_tensor() -> None:
    tensors = _state_dict("adelaidet_MS_V_39_3x")
    tensors["backbone.bottom_up.stage2.OSA2_1.layers.0.OSA2_1_0/dw_conv3x3.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1 unknown tensors: '.*OSA2_1_0/dw_conv3x3\.weight'"):
        describe_weights(_weights(tensors), file_name="x.pth", stated={}, options=CheckpointOptions())


def test_vovnet_keeps_to_multiples_of_32() -> None:
    with pytest.raises(ConfigError, match="rounds sizes down") as caught:
        _describe("adelaidet_MS_V_39_3x", options=CheckpointOptions(size_divisor=16))
    assert caught.value.hint == "--size-divisor 32"


def test_networks_are_what_their_names_say() -> None:
    x101 = _describe("adelaidet_MS_X_101_32x8d_2x").config
    assert (x101.block, x101.blocks, x101.groups, x101.width_per_group) == (BlockType.BOTTLENECK, (3, 4, 23, 3), 32, 8)
    r18 = _describe("mmdet_fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco").config
    assert (r18.block, r18.blocks) == (BlockType.BASIC, (2, 2, 2, 2))
    dla = _describe("adelaidet_MS_DLA_34_4x_syncbn_shared_towers_bn_head").config
    assert (dla.backbone, dla.shared_convs, dla.cls_convs, dla.reg_convs) == (BackboneType.DLA34, 4, 0, 0)
    assert (dla.tower_norm, dla.strides) == (TowerNorm.BATCH_PER_LEVEL, (8, 16, 32))
    vovnet = _describe("adelaidet_MS_V_57_3x").config
    assert (vovnet.backbone, vovnet.stem_widths) == (BackboneType.VOVNET, (64, 64, 128))
    assert [(s.blocks, s.layers, s.channels) for s in vovnet.osa_stages] == [
        (1, 5, 128),
        (1, 5, 160),
        (4, 5, 192),
        (3, 5, 224),
    ]
    mobile = _describe("tianzhi_fcos_syncbn_bs32_c128_MNV2_FPN_1x").config
    assert (mobile.backbone, mobile.fpn_channels, mobile.num_levels) == (BackboneType.MOBILENET_V2, 128, 5)


def test_torchvision_rules() -> None:
    described = _describe("torchvision_frozenbn_fpn_v1_keys")
    pre, decode = described.contract.preprocess, described.contract.decode
    assert (pre.shortest, pre.longest, pre.size_rule) == (800, 1333, SizeRule.TORCHVISION)
    assert (pre.resize_filter, pre.resize_order) == (ResizeFilter.TORCH, ResizeOrder.NORMALIZE_FIRST)
    assert (pre.mean, pre.std, pre.pixel_scale) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255.0)
    assert (decode.profile.centers, decode.score_threshold, decode.iou_threshold) == (CenterMode.TORCHVISION, 0.2, 0.6)
    assert described.contract.class_names == COCO_91
    assert not described.config.has_scales


def test_files_are_turned_where_the_ecosystem_turns_them() -> None:
    """PIL, which torchvision's and tianzhi's datasets open files with, does not look at the EXIF orientation."""
    by_ecosystem = {}
    for name in ALL:
        described = _describe(name)
        by_ecosystem[described.contract.ecosystem] = described.contract.preprocess.orientation
        assert _decision(described, "orientation")[0] == described.contract.preprocess.orientation
    stored = {name for name, orientation in by_ecosystem.items() if orientation is Orientation.STORED}
    assert (stored, len(by_ecosystem)) == ({"torchvision", "tianzhi"}, 5)


def test_torchvision_channels_are_category_ids() -> None:
    assert [COCO_91[i] for i in COCO_IDS] == list(COCO_80)
    assert (COCO_91[0], COCO_91[12], COCO_91[90], len(COCO_91)) == ("background", "N/A", "toothbrush", 91)


@pytest.mark.parametrize(
    ("name", "mean", "std", "in_1x1", "sizes"),
    [
        ("adelaidet_R_50_1x", MSRA, (1.0, 1.0, 1.0), True, (800, 1333)),
        ("adelaidet_MS_X_101_32x8d_2x", MSRA, (57.375, 57.12, 58.395), False, (800, 1333)),
        ("adelaidet_MS_X_101_64x4d_2x", MSRA, (1.0, 1.0, 1.0), False, (800, 1333)),
        ("adelaidet_MS_R_50_4x_syncbn", MSRA, (1.0, 1.0, 1.0), True, (512, 736)),
        ("adelaidet_MS_DLA_34_4x_syncbn", MSRA, (1.0, 1.0, 1.0), False, (512, 736)),
        ("detectron2_fcos_R_50_FPN_1x", MSRA, (1.0, 1.0, 1.0), True, (800, 1333)),
        ("tianzhi_fcos_imprv_R_50_FPN_1x", CAFFE, (1.0, 1.0, 1.0), True, (800, 1333)),
        ("tianzhi_fcos_imprv_X_101_32x8d_FPN_2x", CAFFE, (1.0, 1.0, 1.0), False, (800, 1333)),
    ],
)
def test_rules_of_the_caffe_family(
    name: str, mean: tuple[float, ...], std: tuple[float, ...], in_1x1: bool, sizes: tuple[int, int]
) -> None:
    described = _describe(name)
    pre = described.contract.preprocess
    assert (pre.mean, pre.std, pre.pixel_scale, pre.channel_order) == (mean, std, 1.0, ChannelOrder.BGR)
    assert (pre.shortest, pre.longest, pre.resize_filter) == (*sizes, ResizeFilter.PIL)
    assert described.config.stride_in_1x1 is in_1x1


def test_adelaidet_takes_the_pixel_values_stored_in_the_file() -> None:
    pixels = {"pixel_mean": torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), "pixel_std": torch.full((3, 1, 1), 2.0)}
    with pytest.raises(ConfigError, match="RGB or BGR") as caught:
        _describe("adelaidet_R_50_1x", **pixels)
    assert "--channel-order" in caught.value.hint
    options = CheckpointOptions(channel_order=ChannelOrder.BGR)
    described = _describe("adelaidet_R_50_1x", options=options, **pixels)
    assert described.contract.preprocess.mean == (1.0, 2.0, 3.0)
    assert described.contract.preprocess.std == (2.0, 2.0, 2.0)
    assert _decision(described, "mean")[1] == "the file's pixel_mean and pixel_std"


@pytest.mark.parametrize(("mean", "order"), [(MSRA, ChannelOrder.BGR), (MSRA[::-1], ChannelOrder.RGB)])
def test_a_stored_mean_shows_the_order_of_the_channels(mean: tuple[float, ...], order: ChannelOrder) -> None:
    described = _describe("detectron2_fcos_R_50_FPN_1x", pixel_mean=torch.tensor(mean), pixel_std=torch.ones(3))
    assert described.contract.preprocess.channel_order is order
    assert _decision(described, "channel_order")[1] == "the file's pixel_mean and pixel_std"


@pytest.mark.parametrize(
    ("name", "msra"),
    [
        ("adelaidet_R_50_1x", "103.53,116.28,123.675"),
        ("detectron2_fcos_R_50_FPN_1x", "103.53,116.28,123.675"),
        ("adelaidet_MS_R_50_4x_syncbn", "103.53,116.28,123.675"),
        ("tianzhi_fcos_imprv_R_50_FPN_1x", "102.9801,115.9465,122.7717"),
    ],
)
def test_a_body_with_statistics_of_its_own_may_be_torchvisions_and_is_asked_about(name: str, msra: str) -> None:
    tensors = _state_dict(name)
    next(tensor for key, tensor in tensors.items() if key.endswith("running_mean"))[0] = 0.1

    def describe(options: CheckpointOptions) -> CheckpointDescription:
        return describe_weights(_weights(tensors), file_name=name, stated={}, options=options)

    with pytest.raises(ConfigError, match=r"may be torchvision's .* or MSRA's") as caught:
        describe(CheckpointOptions())
    for option in ("--stride-in-3x3", "--mean A,B,C", "--std A,B,C", "--channel-order"):
        assert option in caught.value.hint
    assert f"MSRA: {msra} and 1,1,1" in caught.value.hint
    answers = {"mean": MSRA[::-1], "std": (58.395, 57.12, 57.375), "channel_order": ChannelOrder.RGB}
    with pytest.raises(ConfigError) as caught:
        describe(CheckpointOptions(**answers))
    assert "--mean" not in caught.value.hint
    described = describe(CheckpointOptions(stride_in_1x1=False, **answers))
    assert (described.config.stride_in_1x1, described.contract.preprocess.mean) == (False, MSRA[::-1])


def test_tianzhi_variant_must_be_said() -> None:
    with pytest.raises(ConfigError, match="which one this is cannot be seen") as caught:
        _describe("tianzhi_fcos_R_50_FPN_1x", options=CheckpointOptions())
    assert "--variant original" in caught.value.hint
    original = _describe("tianzhi_fcos_R_50_FPN_1x", options=CheckpointOptions(variant="original")).config
    assert (original.box_activation, original.centerness_on_reg) == (BoxActivation.EXP, False)
    named = _describe("tianzhi_fcos_imprv_R_50_FPN_1x")
    assert (named.config.box_activation, named.config.centerness_on_reg) == (BoxActivation.RELU, True)
    assert _decision(named, "variant") == ("imprv", "the file's name")


def test_tianzhi_labels_begin_at_one() -> None:
    described = _describe("tianzhi_fcos_imprv_R_50_FPN_1x")
    assert described.contract.decode.label_map == tuple(range(1, 81))
    assert described.contract.class_names == ("background", *COCO_80)


def test_tianzhi_frozen_batch_norm_has_no_epsilon_but_mobilenet_has() -> None:
    assert _describe("tianzhi_fcos_imprv_R_50_FPN_1x").config.norm_eps == 0.0
    assert _describe("tianzhi_fcos_bn_bs16_MNV2_FPN_1x").config.norm_eps == 1e-5


def test_mmdetection_without_a_configuration() -> None:
    plain = _describe("mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco")
    assert (plain.config.box_activation, plain.config.centerness_on_reg) == (BoxActivation.EXP, False)
    assert (plain.contract.decode.iou_threshold, plain.contract.preprocess.mean) == (0.5, CAFFE)
    assert plain.config.stride_in_1x1
    tricks = _describe("mmdet_fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco")
    assert (tricks.config.box_activation, tricks.config.centerness_on_reg) == (BoxActivation.RELU, True)
    assert (tricks.contract.decode.iou_threshold, tricks.contract.preprocess.mean) == (0.6, MSRA)
    assert _decision(tricks, "variant") == ("tricks", "tower convolutions with bias")
    x101 = _describe("mmdet_fcos_x101-64x4d_fpn_gn-head_ms-640-800-2x_coco")
    assert x101.contract.preprocess.channel_order is ChannelOrder.RGB
    assert not x101.config.stride_in_1x1


def test_mmdetection_1_names_of_predictors() -> None:
    tensors = {
        name.replace("bbox_head.conv_", "bbox_head.fcos_"): tensor
        for name, tensor in _state_dict("mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco").items()
    }
    described = describe_weights(_weights(tensors), file_name="x.pth", stated={}, options=CheckpointOptions())
    assert "head.regression_head.bbox_ctrness.weight" in described.tensors


def test_every_decision_can_be_overridden_and_says_so() -> None:
    options = CheckpointOptions(
        input_size=(320, 416),
        input_dtype=InputDtype.FLOAT32,
        score_threshold=0.3,
        iou_threshold=0.7,
        max_detections=7,
        pre_nms_top_k=9,
        stride_in_1x1=True,
        box_activation=BoxActivation.EXP,
        centerness_on_reg=False,
        norm_eps=1e-3,
        channel_order=ChannelOrder.BGR,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        resize_filter=ResizeFilter.PIL,
        profile="mmdetection",
        class_names=tuple("abc"[i % 3] for i in range(91)),
    )
    described = _describe("torchvision_bn", options=options)
    pre, decode, config = described.contract.preprocess, described.contract.decode, described.config
    assert (pre.canvas, pre.input_dtype, pre.size_rule) == ((320, 416), InputDtype.FLOAT32, SizeRule.LETTERBOX)
    assert (pre.mean, pre.std, pre.channel_order, pre.resize_filter) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        ChannelOrder.BGR,
        ResizeFilter.PIL,
    )
    assert (decode.score_threshold, decode.iou_threshold, decode.max_detections, decode.pre_nms_top_k) == (
        0.3,
        0.7,
        7,
        9,
    )
    assert (decode.profile.name, decode.profile.centers) == ("mmdetection", CenterMode.HALF)
    assert (config.stride_in_1x1, config.box_activation, config.centerness_on_reg) == (True, BoxActivation.EXP, False)
    assert config.norm_eps == 1e-3
    for name in ("score_threshold", "stride_in_1x1", "mean", "profile", "class_names", "input_size"):
        assert _decision(described, name)[1] == "option"


def test_uint8_canvas_is_resized_before_it_is_normalised() -> None:
    pre = _describe("torchvision_bn", options=CheckpointOptions(input_size=(320, 416))).contract.preprocess
    assert (pre.input_dtype, pre.resize_order, pre.resize_filter) == (
        InputDtype.UINT8,
        ResizeOrder.RESIZE_FIRST,
        ResizeFilter.CV2,
    )


def test_class_names_without_the_background_get_it_where_it_has_a_channel() -> None:
    names = tuple(str(i) for i in range(90))
    assert _describe("torchvision_bn", options=CheckpointOptions(class_names=names)).contract.class_names == (
        "background",
        *names,
    )
    with pytest.raises(ConfigError, match="91 class channels, but 3 class names"):
        _describe("torchvision_bn", options=CheckpointOptions(class_names=("a", "b", "c")))
    with pytest.raises(ConfigError, match="80 class channels, but 79 class names"):
        _describe("adelaidet_R_50_1x", options=CheckpointOptions(class_names=names[:79]))


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("torchvision_bn", {"classes": ["a", "b", "c"]}, "91 class channels, but 3 class names come from"),
        ("adelaidet_R_50_1x", {"args": {"class_names": ["a", "b", "c"]}}, "80 class channels, but 3 class names"),
        ("adelaidet_R_50_1x", {"names": {0: "a", 1: "b"}}, "80 class channels, but 2 class names"),
        ("mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco", {"meta": {"CLASSES": ("a", "b", "c")}}, "but 3 class names"),
    ],
)
def test_names_in_the_file_that_do_not_fit_are_asked_about(
    name: str, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _describe(name, **metadata)
    assert "--classes FILE" in caught.value.hint
    count = 91 if name.startswith("torchvision") else 80
    names = tuple(f"thing {i}" for i in range(count))
    options = CheckpointOptions(class_names=names)
    assert _describe(name, options=options, **metadata).contract.class_names == names


def test_text_in_the_arguments_is_no_class_name() -> None:
    described = _describe("torchvision_bn", meta={"epoch": 3}, args={"classes": "coco.names"})
    assert described.contract.class_names == COCO_91


def test_three_channels_with_two_names_get_no_background_without_a_word() -> None:
    tensors = _state_dict("torchvision_bn")
    for part in ("weight", "bias"):
        full = tensors[f"head.classification_head.cls_logits.{part}"]
        tensors[f"head.classification_head.cls_logits.{part}"] = torch.empty((3, *full.shape[1:]), device="meta")
    weights = _weights(tensors)
    with pytest.raises(ConfigError, match="3 class channels, but 2 class names were given") as caught:
        describe_weights(weights, file_name="x.pth", stated={}, options=CheckpointOptions(class_names=("cat", "dog")))
    assert "the background first" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("torchvision_bn", {"mean": (123.675, 116.28, 103.53)}, "--mean 0.485,0.456,0.406"),
        ("torchvision_bn", {"std": (58.395, 57.12, 57.375)}, "--std 0.229,0.224,0.225"),
        ("adelaidet_R_50_1x", {"mean": (0.485, 0.456, 0.406)}, "--mean 123.675,116.28,103.53"),
        ("adelaidet_R_50_1x", {"std": (0.229, 0.224, 0.225)}, "--std 58.395,57.12,57.375"),
        ("torchvision_bn", {"mean": (float("nan"), 0.1, 0.1)}, "--mean A,B,C"),
        ("torchvision_bn", {"std": (0.0, 0.1, 0.1)}, "--std"),
        ("adelaidet_R_50_1x", {"std": (float("inf"), 1.0, 1.0)}, "--std A,B,C"),
    ],
)
def test_a_mean_of_another_unit_is_refused_with_the_value_in_this_one(
    name: str, options: dict[str, tuple[float, float, float]], hint: str
) -> None:
    with pytest.raises(ConfigError, match=r"mean|std") as caught:
        _describe(name, options=CheckpointOptions(**options))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CheckpointOptions(ecosystem="yolo"), "no ecosystem 'yolo'"),
        (CheckpointOptions(variant="imprv"), "must be left out"),
        (CheckpointOptions(profile="nms"), "no profile 'nms'"),
        (CheckpointOptions(input_size=(300, 400)), "not a multiple of 32"),
    ],
)
def test_options_that_cannot_be_meant(options: CheckpointOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _describe("torchvision_bn", options=options)


def test_an_ecosystem_that_does_not_fit_names_what_is_missing() -> None:
    with pytest.raises(CheckpointError, match=r"no tensor's name has 'head\.classification_head\.' in it"):
        _describe("adelaidet_R_50_1x", options=CheckpointOptions(ecosystem="torchvision"))
    with pytest.raises(CheckpointError, match=r"not a checkpoint of mmdetection: no tensor's name has 'bbox_head\.'"):
        _describe("torchvision_bn", options=CheckpointOptions(ecosystem="mmdetection"))


def test_mmdetection_towers_without_norm_say_nothing_of_the_variant() -> None:
    name = "mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco"
    tensors = {key: tensor for key, tensor in _state_dict(name).items() if ".gn." not in key}
    for key in [key for key in tensors if "_convs." in key and "bbox_head" in key]:
        tensors[key.replace("weight", "bias")] = torch.empty(256, device="meta")
    describe = functools.partial(describe_weights, _weights(tensors), file_name="x.pth", stated={})
    with pytest.raises(ConfigError, match="have no norm") as asked:
        describe(options=CheckpointOptions())
    assert "--variant plain" in asked.value.hint
    plain = describe(options=CheckpointOptions(variant="plain"))
    assert (plain.config.tower_norm, plain.config.box_activation) == (TowerNorm.NONE, BoxActivation.EXP)
    build_network(plain.config, plain.tensors)


def test_retinanet_is_told_from_fcos() -> None:
    tensors = {n: t for n, t in _state_dict("torchvision_bn").items() if "ctrness" not in n}
    with pytest.raises(CheckpointError, match="bbox_ctrness") as caught:
        describe_weights(_weights(tensors), file_name="x.pth", stated={}, options=CheckpointOptions())
    assert "RetinaNet" in caught.value.hint


def test_tensors_of_other_tasks_are_named() -> None:
    tensors = {**_state_dict("adelaidet_R_50_1x"), "basis_module.refine.0.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"has 1 unknown tensors: 'basis_module\.refine\.0\.weight'"):
        describe_weights(_weights(tensors), file_name="x.pth", stated={}, options=CheckpointOptions())


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("torchvision_bn", {"backbone.body.conv1.weight": _empty(64, 4, 7, 7)}, "takes images of 4 channels"),
        ("torchvision_bn", {"backbone.fpn.inner_blocks.4.0.weight": _empty(256, 64, 1, 1)}, "lateral convolutions [0"),
        (
            "mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco",
            {"neck.fpn_convs.5.conv.weight": _empty(256, 256, 3, 3)},
            "1 unknown tensors: 'backbone.fpn.extra_blocks.p8.weight'",
        ),
        # FeaturePyramidNetwork(norm_layer=BatchNorm2d) of torchvision
        (
            "torchvision_bn",
            {f"backbone.fpn.inner_blocks.0.1.{part}": _empty(256) for part in ("weight", "running_mean")},
            "2 unknown tensors: 'backbone.fpn.inner_blocks.0.1.running_mean'",
        ),
        (
            "torchvision_bn",
            {"backbone.fpn.layer_blocks.0.offset.weight": _empty(18, 256, 3, 3)},
            "1 unknown tensors: 'backbone.fpn.layer_blocks.0.offset.weight'",
        ),
    ],
    ids=["thermal", "p1", "six-levels", "pyramid-norm", "pyramid-offsets"],
)
def test_other_networks_are_refused_by_name_before_they_are_built(
    name: str, changed: dict[str, Tensor], message: str
) -> None:
    weights = _weights({**_state_dict(name), **changed})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        describe_weights(weights, file_name="x.pth", stated={}, options=CheckpointOptions())


def test_anchor_sizes_are_a_printed_decision_with_an_option() -> None:
    described = _describe("torchvision_bn")
    value, source = _decision(described, "anchor_sizes")
    assert (value, "not in the file" in source) == ("8, 16, 32, 64, 128", True)
    doubled = _describe("torchvision_bn", options=CheckpointOptions(anchor_sizes=(16, 32, 64, 128, 256)))
    assert doubled.config.anchor_sizes == (16, 32, 64, 128, 256)
    assert doubled.contract.decode.strides == (8, 16, 32, 64, 128)
    assert _decision(doubled, "anchor_sizes")[1] == "option"
    with pytest.raises(ConfigError, match="5 levels need as many anchor sizes"):
        _describe("torchvision_bn", options=CheckpointOptions(anchor_sizes=(8, 16)))
    with pytest.raises(ConfigError, match="have no anchors"):
        _describe("adelaidet_R_50_1x", options=CheckpointOptions(anchor_sizes=(8, 16, 32, 64, 128)))


def _without(name: str, part: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in _state_dict(name).items() if part not in key}


def test_a_level_without_weights_is_pooled_as_the_library_does_or_asked_about() -> None:
    """resnet_fpn_backbone(returned_layers=[2, 3, 4]) without extra blocks: LastLevelMaxPool has no weights."""
    describe = functools.partial(describe_weights, file_name="x.pth", stated={})
    weights = _weights(_without("torchvision_bn", "extra_blocks"))
    with pytest.raises(ConfigError, match="4 levels, for which torchvision has no default sizes") as asked:
        describe(weights, options=CheckpointOptions())
    assert "--anchor-sizes" in asked.value.hint
    pooled = describe(weights, options=CheckpointOptions(anchor_sizes=(8, 16, 32, 64)))
    assert (pooled.config.pooled_levels, pooled.contract.decode.strides) == (1, (8, 16, 32, 64))
    assert _decision(pooled, "pooled_levels") == ("1", "rule of torchvision: LastLevelMaxPool, where there is no P6")
    build_network(pooled.config, pooled.tensors)
    options = CheckpointOptions(pooled_levels=2)  # with torchvision's five sizes
    assert describe(weights, options=options).contract.decode.strides == (8, 16, 32, 64, 128)
    weights = _weights(_without("detectron2_fcos_R_50_FPN_1x", "top_block"))
    with pytest.raises(ConfigError, match="no P6") as asked:
        describe(weights, options=CheckpointOptions())
    assert asked.value.hint == "--pooled-levels 1, or --pooled-levels 0"
    said = CheckpointOptions(pooled_levels=0)
    assert describe(weights, options=said).contract.decode.strides == (8, 16, 32)


@pytest.mark.parametrize(
    ("name", "tower", "norm"),
    [
        ("adelaidet_R_50_1x", "fcos_head.cls_tower", None),
        ("adelaidet_R_50_1x", "fcos_head.cls_tower", "running_mean"),
        ("detectron2_fcos_R_50_FPN_1x", "head.cls_subnet", None),
        ("tianzhi_fcos_imprv_R_50_FPN_1x", "rpn.head.cls_tower", None),
        ("tianzhi_fcos_imprv_R_50_FPN_1x", "rpn.head.cls_tower", "running_mean"),
    ],
)
def test_towers_without_norm_or_with_batch_norm_are_counted_by_their_convolutions(
    name: str, tower: str, norm: str | None
) -> None:
    """Libraries leave the norm's place out where there is none: convolutions are layers 0, 2, 4 and 6."""
    tensors: dict[str, Tensor] = {}
    towers = (tower, tower.replace("cls_", "bbox_"))
    for key, tensor in _state_dict(name).items():
        match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, towers))}))\.(\d+)\.(\w+)", key)
        if match is None or (tensor.ndim == 1 and norm is not None):
            tensors[key] = tensor
        elif int(match[2]) % 3 == 0:
            tensors[f"{match[1]}.{2 * int(match[2]) // 3 if norm is None else match[2]}.{match[3]}"] = tensor
        if match is not None and norm is not None and int(match[2]) % 3 == 1:
            tensors |= {f"{match[1]}.{match[2]}.running_{part}": torch.zeros(256) for part in ("mean", "var")}
    described = describe_weights(_weights(tensors), file_name=name, stated={}, options=CheckpointOptions())
    expected = TowerNorm.NONE if norm is None else TowerNorm.BATCH
    assert (described.config.tower_norm, described.config.cls_convs) == (expected, 4)
    build_network(described.config, described.tensors)


def test_detectron2_numbers_its_levels_after_the_stages() -> None:
    tensors = _state_dict("detectron2_fcos_R_50_FPN_1x")
    tensors |= {"backbone.fpn_lateral2.weight": _empty(256, 256, 1, 1), "backbone.fpn_lateral2.bias": _empty(256)}
    tensors |= {"backbone.fpn_output2.weight": _empty(256, 256, 3, 3), "backbone.fpn_output2.bias": _empty(256)}
    described = describe_weights(_weights(tensors), file_name="x.pth", stated={}, options=CheckpointOptions())
    assert described.contract.decode.strides == (4, 8, 16, 32, 64, 128)
    build_network(described.config, described.tensors)


def test_unknown_names_are_shown() -> None:
    weights = _weights({"encoder.layer.0.weight": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=r"not a known FCOS checkpoint. Its 1 tensors have names such as 'encoder"
    ):
        describe_weights(weights, file_name="x.pth", stated={}, options=CheckpointOptions())
