"""The network's parts: sizes, sharing, activation."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fcos_deploy.core.decode import level_sizes
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.network import BackboneType, BoxActivation, FcosConfig, TowerNorm, resnet_config
from fcos_deploy.model.backbones import Dla34Backbone, MobileNetV2Backbone
from fcos_deploy.model.fcos import Fcos, flatten_levels

SMALL = resnet_config(18, num_classes=2, stem_channels=8, fpn_channels=32)


def _model(config: FcosConfig) -> Fcos:
    torch.manual_seed(0)
    return Fcos(config).eval()


@pytest.mark.parametrize("size", [(128, 160), (192, 128), (224, 352)])
def test_levels_have_the_sizes_that_locations_assume(size: tuple[int, int]) -> None:
    with torch.inference_mode():
        levels = _model(SMALL)(torch.zeros(1, 3, *size))
    assert [tuple(level.cls_logits.shape[-2:]) for level in levels] == level_sizes(*size, strides=SMALL.strides)


def test_flattened_levels_are_row_by_row_finest_first() -> None:
    with torch.inference_mode():
        levels = _model(SMALL)(torch.rand(2, 3, 128, 160))
        cls_logits, distances, centerness = flatten_levels(levels)
    assert cls_logits.shape == (2, 428, 2)
    assert distances.shape == (2, 428, 4)
    assert centerness.shape == (2, 428, 1)
    assert torch.equal(cls_logits[1, 20 + 3], levels[0].cls_logits[1, :, 1, 3])
    assert torch.equal(distances[0, 320 + 10 + 2], levels[1].distances[0, :, 1, 2])


@pytest.mark.parametrize(("depth", "blocks"), [(18, 8), (34, 16), (50, 16), (101, 33), (152, 50)])
def test_published_depths(depth: int, blocks: int) -> None:
    with torch.device("meta"):
        model = Fcos(resnet_config(depth, num_classes=91))
    backbone = model.backbone.body
    assert sum(len(backbone.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)) == blocks


def test_resnet50_has_torchvisions_number_of_parameters() -> None:
    """Counted with trainable batch norm: 32,322,720 (the docs of torchvision give 32,269,600 for its frozen one)."""
    with torch.device("meta"):
        model = Fcos(resnet_config(50, num_classes=91))
    assert sum(p.numel() for p in model.parameters()) == 32_322_720


def test_unpublished_depths_are_an_error() -> None:
    with pytest.raises(ConfigError, match="ResNet depth must be one of"):
        resnet_config(42, num_classes=1)


def test_class_prior_is_one_percent() -> None:
    bias = _model(SMALL).head.classification_head.cls_logits.bias
    assert torch.sigmoid(bias).tolist() == pytest.approx([0.01, 0.01])


def test_relu_distances_are_in_pixels_and_exp_distances_too() -> None:
    relu = _model(dataclasses.replace(SMALL, has_scales=True))
    exp = _model(dataclasses.replace(SMALL, has_scales=True, box_activation=BoxActivation.EXP))
    raw = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 4, 1, 1)
    with torch.no_grad():
        relu.head.regression_head.scales[2] = 3.0
        exp.head.regression_head.scales[2] = 3.0
        assert relu.head._distances(raw, 2).flatten().tolist() == pytest.approx([0, 0, 3 * 32, 6 * 32])
        expected = torch.exp(3 * raw).flatten().tolist()
        assert exp.head._distances(raw, 2).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("on_reg", "tower"), [(True, "regression_head"), (False, "classification_head")])
def test_centerness_follows_its_tower(on_reg: bool, tower: str) -> None:
    model = _model(dataclasses.replace(SMALL, centerness_on_reg=on_reg))
    images = torch.rand(1, 3, 128, 160)
    with torch.inference_mode():
        before = model(images)[0].centerness
        getattr(model.head, tower).conv[0].weight.mul_(-1)
        assert not torch.allclose(before, model(images)[0].centerness)
        getattr(model.head, tower).conv[0].weight.mul_(-1)
        unused = "classification_head" if on_reg else "regression_head"
        getattr(model.head, unused).conv[0].weight.mul_(-1)
        assert torch.equal(before, model(images)[0].centerness)


def test_every_level_uses_its_own_batch_norm() -> None:
    config = dataclasses.replace(SMALL, tower_norm=TowerNorm.BATCH_PER_LEVEL, strides=(8, 16, 32))
    model = _model(config)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        before = [level.cls_logits for level in model(images)]
        model.head.classification_head.conv[1][1].bias.add_(1.0)
        after = [level.cls_logits for level in model(images)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_shared_tower_feeds_both_heads() -> None:
    config = dataclasses.replace(SMALL, cls_convs=0, reg_convs=0, shared_convs=2, strides=(8, 16, 32))
    model = _model(config)
    names = {n.split(".conv.")[0] for n in model.state_dict() if n.startswith("head.") and ".conv." in n}
    assert names == {"head.shared_tower"}


@pytest.mark.parametrize(
    ("backbone", "channels"), [(Dla34Backbone, (128, 256, 512)), (MobileNetV2Backbone, (32, 96, 320))]
)
def test_backbones_give_strides_8_16_and_32(
    backbone: type[Dla34Backbone] | type[MobileNetV2Backbone], channels: tuple[int, ...]
) -> None:
    kind = BackboneType.DLA34 if backbone is Dla34Backbone else BackboneType.MOBILENET_V2
    model = backbone(dataclasses.replace(SMALL, backbone=kind)).eval()
    assert model.out_channels == channels
    with torch.inference_mode():
        maps = model(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]


def test_stride_position_changes_the_numbers_but_not_the_names() -> None:
    config = dataclasses.replace(resnet_config(50, num_classes=2, stem_channels=8, fpn_channels=32), width_per_group=8)
    usual, caffe = _model(config), Fcos(dataclasses.replace(config, stride_in_1x1=True)).eval()
    caffe.load_state_dict(usual.state_dict())
    images = torch.rand(1, 3, 128, 160)
    with torch.inference_mode():
        assert not torch.allclose(usual(images)[0].cls_logits, caffe(images)[0].cls_logits)
