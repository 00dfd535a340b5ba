"""Deformable convolutions: the layer, its two exported forms, and what stays in float32 around it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibration.calibrate import collect_ranges
from calibration.dataset import SampleOptions, collect_images
from calibration.execution import executed_share
from calibration.placement import open_graph, placement_for
from calibration.quantizers import quantize_qdq
from exporters.openvino_ir import EXPORTER
from exporters.torch_onnx import ExportOptions, export_onnx
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.core.enums import DeformForm, Precision
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.exporter import BuildRequest
from fcos_deploy.core.network import DeformableLayer
from fcos_deploy.core.onnx_file import sampling_nodes
from fcos_deploy.pipeline.deploy import DEMO_DATA

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

from fcos_deploy.model.fcos import DeformConv2d, make_deformable  # noqa: E402  # imports torch

pytestmark = pytest.mark.slow


def _layer(conv: Any, *, groups: int, modulated: bool, spread: float) -> Any:
    layer = DeformConv2d(conv, deform_groups=groups, modulated=modulated)
    torch.nn.init.normal_(layer.offset.weight, std=spread)
    torch.nn.init.normal_(layer.offset.bias, std=spread)
    return layer


@pytest.mark.parametrize(
    ("conv", "groups", "modulated", "size"),
    [
        ((16, 24, 3, 1, 1), 1, True, (20, 26)),
        ((16, 32, 3, 2, 1, 1, 4), 2, True, (21, 27)),  # stride 2, grouped, two offset groups
        ((8, 8, 3, 1, 2, 2), 4, False, (9, 7)),  # dilated, version 1
        ((8, 8, (1, 3), 1, (0, 1), 1, 2), 1, True, (5, 6)),
        ((16, 16, 3, 1, 1), 1, True, (1, 2)),  # smaller than the kernel: P7 of a small image
    ],
)
def test_a_layer_computes_what_onnx_deform_conv_does(
    conv: tuple[Any, ...], groups: int, modulated: bool, size: tuple[int, int]
) -> None:
    """ONNX Runtime's kernel is an implementation of its own."""
    torch.manual_seed(0)
    layer = _layer(torch.nn.Conv2d(*conv), groups=groups, modulated=modulated, spread=0.4)
    images = torch.randn(2, conv[0], *size)
    with torch.no_grad():
        learned = layer.offset(images)
        count = 2 * layer.kernel_size[0] * layer.kernel_size[1] * groups
        feeds = {"x": images, "w": layer.weight, "o": learned[:, :count], "b": layer.bias}
        feeds |= {"m": learned[:, count:].sigmoid()} if modulated else {}
        ours = layer(images)
        layer.as_operator = True
        assert torch.equal(layer(images), ours)
    node = onnx.helper.make_node(
        "DeformConv",
        list(feeds),
        ["y"],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=layer.padding * 2,
        dilations=layer.dilation,
        group=layer.groups,
        offset_group=groups,
    )
    arrays = {name: tensor.detach().numpy() for name, tensor in feeds.items()}
    inputs = [onnx.helper.make_tensor_value_info(name, 1, array.shape) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("y", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    session = pytest.importorskip("onnxruntime").InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(ours.numpy(), session.run(None, arrays)[0], atol=1e-5)


@pytest.mark.parametrize("modulated", [True, False])
def test_gradients_are_those_of_finite_differences(modulated: bool) -> None:
    torch.manual_seed(0)
    layer = _layer(torch.nn.Conv2d(4, 4, 3, 2, 1, 1, 2), groups=2, modulated=modulated, spread=0.3).double()
    images = torch.randn(1, 4, 5, 6, dtype=torch.double, requires_grad=True)
    weights = tuple(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (images, *weights))


def test_a_layer_that_is_no_convolution_is_named() -> None:
    network = torch.nn.Sequential(torch.nn.ReLU())
    for name in ("0", "head.conv"):
        with pytest.raises(ConfigError, match=f"no convolution '{name}'"):
            make_deformable(network, DeformableLayer(name, 1, modulated=True))


@pytest.fixture(scope="module")
def exported(deformable_loaded: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the small deformable detector with the given options, each form once."""
    made: dict[ExportOptions, Path] = {}

    def export(**options: Any) -> Path:
        chosen = ExportOptions(**options)
        if chosen not in made:
            made[chosen] = export_onnx(
                deformable_loaded, tmp_path_factory.mktemp("deformable") / "model.onnx", options=chosen
            ).path
        return made[chosen]

    return export


def _operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("opset", [None, 21])
def test_each_form_has_its_operators_and_nothing_left_to_merge(
    exported: Callable[..., Path], opset: int | None
) -> None:
    plain = exported(opset=opset)
    operator = exported(opset=opset, deform_form=DeformForm.OPERATOR)
    assert "GridSample" in _operators(plain)
    assert "DeformConv" not in _operators(plain)
    assert "DeformConv" in _operators(operator)
    assert not {"GridSample", "BatchNormalization"} & _operators(operator)
    assert [onnx.load(path).opset_import[0].version for path in (plain, operator)] == [opset or 17, opset or 19]


def test_an_opset_without_the_operator_is_refused(deformable_loaded: SimpleNamespace, tmp_path: Path) -> None:
    options = ExportOptions(opset=17, deform_form=DeformForm.OPERATOR)
    with pytest.raises(ConfigError, match="from opset 19 on, not in 17") as caught:
        export_onnx(deformable_loaded, tmp_path / "no.onnx", options=options)
    assert "--deform-form grid-sample" in caught.value.hint


def test_runtimes_without_the_operator_say_how_to_export(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = exported(deform_form=DeformForm.OPERATOR)
    with get_backend("onnxruntime").open(path, SessionOptions()):
        pass
    with pytest.raises(BackendLoadError, match="unknown to 'openvino'") as caught:
        get_backend("openvino").open(path, SessionOptions())
    assert "--deform-form grid-sample" in caught.value.hint
    with pytest.raises(BackendLoadError, match="unknown to 'openvino'"):
        EXPORTER.build(BuildRequest(source=path, output=tmp_path / "model.xml"))


@pytest.mark.parametrize("form", list(DeformForm))
def test_fp16_leaves_offsets_and_sampling_in_float(exported: Callable[..., Path], form: DeformForm) -> None:
    model = onnx.load(exported(deform_form=form, precision=Precision.FP16))
    sampling = sampling_nodes(model)
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    types = {node.input[1].removesuffix(".fp16"): weights[node.input[1]] for node in convs}
    offsets = {name for name in types if ".offset." in name}
    assert offsets
    assert {types[name] for name in offsets} == {onnx.TensorProto.FLOAT}
    assert {types[name] for name in set(types) - offsets} == {onnx.TensorProto.FLOAT16}
    casts = [node for node in model.graph.node if node.output[0] in sampling and node.op_type == "Cast"]
    assert not casts


@pytest.mark.parametrize(
    ("form", "consumer", "backend"),
    [
        (DeformForm.GRID_SAMPLE, "openvino", "openvino"),
        (DeformForm.GRID_SAMPLE, "portable", "openvino"),
        (DeformForm.OPERATOR, "onnxruntime", "onnxruntime"),
    ],
)
def test_int8_leaves_offsets_and_sampling_in_float(
    exported: Callable[..., Path], tmp_path: Path, form: DeformForm, consumer: str, backend: str
) -> None:
    """The convolution over the samples runs in INT8 where it is a plain one."""
    graph = open_graph(exported(deform_form=form))
    images = collect_images(DEMO_DATA / "calibration", options=SampleOptions(count=8))
    quantized = quantize_qdq(
        graph, collect_ranges(graph, images), tmp_path / "int8.onnx", placement=placement_for(consumer)
    )
    in_float = {name for name in quantized.float_convolutions if "cls_logits" not in name and "bbox" not in name}
    kinds = {"offset"} if form is DeformForm.GRID_SAMPLE else {"offset", "DeformConv"}
    assert {kind for name in in_float for kind in kinds if kind in name} == kinds
    assert all(any(kind in name for kind in kinds) for name in in_float)
    # Four fifths of the multiplications, and the offsets are an eighth.
    assert executed_share(graph, quantized.path, backend).share > (0.85 if form is DeformForm.GRID_SAMPLE else 0.7)
