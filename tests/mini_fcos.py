"""A hand-made FCOS graph of ten thousand weights: residual block, two pyramid levels, a head that they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.preprocess import PreprocessSpec

CONTRACT = ModelContract(
    class_names=("red", "white"),
    preprocess=PreprocessSpec(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), pixel_scale=255.0, height=64, width=64),
    decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.05, iou_threshold=0.6, strides=(8, 16)),
)
CHANNELS = 16


class _Graph:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"n_{output}", **attributes))
        return output

    def conv(self, source: str, output: str, *, layer: str, shape: tuple[int, int, int], stride: int = 1) -> str:
        out, into, kernel = shape
        if f"{layer}.weight" not in self.constants:
            spread = (2.0 / (into * kernel * kernel)) ** 0.5
            weight = self.rng.normal(0, spread, (out, into, kernel, kernel)).astype(np.float32)
            self.constant(f"{layer}.weight", weight)
            self.constant(f"{layer}.bias", self.rng.normal(0, 0.1, out).astype(np.float32))
        names = [source, f"{layer}.weight", f"{layer}.bias"]
        return self.op("Conv", names, output, strides=[stride] * 2, pads=[kernel // 2] * 4)


def _backbone(g: _Graph) -> tuple[str, str]:
    x = g.op("Cast", ["images"], "pixels", to=1)
    x = g.op("Sub", [x, g.constant("mean", np.float32(127.5))], "centred")
    x = g.op("Mul", [x, g.constant("inverse_std", np.float32(1 / 63.75))], "normal")
    x = g.op("Relu", [g.conv(x, "stem", layer="stem", shape=(CHANNELS, 3, 3), stride=2)], "stem_relu")
    x = g.op("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = g.op("Relu", [g.conv(x, "a", layer="block.a", shape=(CHANNELS, CHANNELS, 3))], "a_relu")
    y = g.conv(y, "b", layer="block.b", shape=(CHANNELS, CHANNELS, 3))
    x = g.op("Relu", [g.op("Add", [y, x], "sum")], "block")
    c3 = g.op("Relu", [g.conv(x, "c3_conv", layer="c3", shape=(CHANNELS, CHANNELS, 3), stride=2)], "c3")
    c4 = g.op("Relu", [g.conv(c3, "c4_conv", layer="c4", shape=(CHANNELS, CHANNELS, 3), stride=2)], "c4")
    return c3, c4


def _pyramid(g: _Graph, c3: str, c4: str) -> tuple[str, str]:
    inner4 = g.conv(c4, "inner4", layer="inner4", shape=(CHANNELS, CHANNELS, 1))
    inner3 = g.conv(c3, "inner3", layer="inner3", shape=(CHANNELS, CHANNELS, 1))
    scales = g.constant("scales", np.float32([1, 1, 2, 2]))
    up = g.op("Resize", [inner4, "", scales], "up", mode="nearest", coordinate_transformation_mode="asymmetric")
    merged = g.op("Add", [inner3, up], "merged")
    p3 = g.conv(merged, "p3", layer="outer3", shape=(CHANNELS, CHANNELS, 3))
    p4 = g.conv(inner4, "p4", layer="outer4", shape=(CHANNELS, CHANNELS, 3))
    return p3, p4


def _head(g: _Graph, feature: str, level: int) -> dict[str, str]:
    tower = g.conv(feature, f"tower{level}", layer="tower", shape=(CHANNELS, CHANNELS, 3))
    affine = [
        g.constant("gamma", np.full(CHANNELS, 0.8, np.float32)),
        g.constant("beta", np.zeros(CHANNELS, np.float32)),
    ]
    tower = g.op("InstanceNormalization", [tower, *affine], f"norm{level}", epsilon=1e-5)
    tower = g.op("Relu", [tower], f"tower_relu{level}")
    logits = g.conv(tower, f"cls{level}", layer="cls", shape=(2, CHANNELS, 3))
    raw = g.op("Relu", [g.conv(tower, f"reg{level}", layer="reg", shape=(4, CHANNELS, 3))], f"reg_relu{level}")
    scaled = g.op("Mul", [raw, g.constant(f"stride{level}", np.float32(8 * 2**level))], f"scaled{level}")
    centre = g.conv(tower, f"ctr{level}", layer="ctr", shape=(1, CHANNELS, 3))
    return {"cls_logits": logits, "distances": scaled, "centerness": centre}


def write(path: Path, *, seed: int = 0, spoil: float = 1.0) -> Path:
    """Write the graph; ``spoil`` scales one channel of a layer up and the next layer's reading of it down.

    The float function stays the same, but one activation channel then takes the whole range of its tensor.
    """
    g = _Graph(seed)
    levels = [_head(g, feature, level) for level, feature in enumerate(_pyramid(g, *_backbone(g)))]
    outputs = []
    for name, channels in (("cls_logits", 2), ("distances", 4), ("centerness", 1)):
        shape = g.constant(f"shape_{name}", np.int64([0, channels, -1]))
        flat = [g.op("Reshape", [heads[name], shape], f"{name}_{i}") for i, heads in enumerate(levels)]
        g.op("Transpose", [g.op("Concat", flat, f"{name}_all", axis=2)], name, perm=[0, 2, 1])
        outputs.append(helper.make_tensor_value_info(name, 1, [1, 80, channels]))
    if spoil != 1.0:
        _spoil(g, spoil)
    images = helper.make_tensor_value_info("images", 2, [1, 3, 64, 64])
    graph = helper.make_graph(g.nodes, "mini", [images], outputs, list(g.constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract_to_text(CONTRACT)
    onnx.save(model, str(path))
    return path


def _spoil(g: _Graph, factor: float) -> None:
    weight = numpy_helper.to_array(g.constants["block.a.weight"]).copy()
    bias = numpy_helper.to_array(g.constants["block.a.bias"]).copy()
    after = numpy_helper.to_array(g.constants["block.b.weight"]).copy()
    weight[0] *= factor
    bias[0] *= factor
    after[:, 0] /= factor
    for name, value in (("block.a.weight", weight), ("block.a.bias", bias), ("block.b.weight", after)):
        g.constants[name] = numpy_helper.from_array(value, name)
