"""Every quantizer makes a complete INT8 artifact, or refuses with a reason and leaves nothing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibration.calibrate import StatisticsOptions, collect_ranges
from calibration.dataset import SampleOptions, collect_images
from calibration.execution import Feeder, open_engine
from calibration.placement import PLACEMENTS, open_graph, placement_for, plan_pairs
from calibration.quantizers import QUANTIZERS, QuantizeRequest, get_quantizer, quantized_model
from fcos_deploy.core.artifact import OnnxGraph, read_contract
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError
from fcos_deploy.core.network import BackboneType, BlockType, FcosConfig, OsaStage
from fcos_deploy.core.onnx_file import with_outputs
from fcos_deploy.core.preprocess import PreprocessSpec
from fcos_deploy.pipeline.deploy import DEMO_DATA

pytest.importorskip("onnx")
NAMES = sorted(QUANTIZERS)
NEEDS = {"qdq": "openvino", "nncf": "nncf"}


@pytest.fixture
def request_for(mini_graph: Any, mini_calibration: Any, smooth_images: Path, tmp_path: Path) -> Any:
    """A request that every quantizer can honour."""

    def make(name: str, **changes: Any) -> QuantizeRequest:
        pytest.importorskip(NEEDS[name])
        output = tmp_path / "out" / f"model{QUANTIZERS[name].suffix}"
        values = {"graph": mini_graph, "output": output, "placement": placement_for("openvino")}
        return QuantizeRequest(**{**values, "calibration": mini_calibration, "images": smooth_images, **changes})

    return make


@pytest.mark.parametrize("name", NAMES)
def test_contract_is_the_sources_in_int8(name: str, request_for: Any, mini_fcos: ModuleType) -> None:
    made = get_quantizer(name).quantize(request_for(name))
    contract = read_contract(made.files[0])
    assert contract.precision is Precision.INT8
    assert contract.placement == "openvino"
    assert contract.class_names == mini_fcos.CONTRACT.class_names
    assert made.record["quantizer"] == name
    assert all(file.is_file() for file in made.files)
    assert sorted(p.name for p in made.files[0].parent.iterdir()) == sorted(file.name for file in made.files)


@pytest.mark.parametrize("name", NAMES)
def test_openvino_runs_it_close_to_the_float_graph(
    name: str, request_for: Any, mini_onnx: Path, smooth_images: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    made = get_quantizer(name).quantize(request_for(name))
    feeds = Feeder(OnnxGraph(mini_onnx))(collect_images(smooth_images).images[0].read())
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    wanted, got = (
        openvino.Core().compile_model(str(path), "CPU", config)(feeds) for path in (mini_onnx, made.files[0])
    )
    for output in ("cls_logits", "distances", "centerness"):
        noise = float(np.square(got[output] - wanted[output]).sum())
        assert 10 * np.log10(float(np.square(wanted[output]).sum()) / noise) > 15.0, output


@pytest.mark.parametrize(("name", "missing"), [("qdq", "calibration"), ("nncf", "images")])
def test_what_it_measures_with_is_demanded(name: str, missing: str, request_for: Any) -> None:
    with pytest.raises(CalibrationError):
        get_quantizer(name).quantize(request_for(name, **{missing: None}))


def test_nncf_is_for_openvino_only(request_for: Any) -> None:
    with pytest.raises(ConfigError, match="NNCF model is for OpenVINO, not for the placement 'portable'"):
        get_quantizer("nncf").quantize(request_for("nncf", placement=placement_for("tensorrt")))


def test_nncf_writes_an_ir(request_for: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.xml"):
        get_quantizer("nncf").quantize(request_for("nncf", output=tmp_path / "model.onnx"))


def test_unknown_quantizer() -> None:
    with pytest.raises(ConfigError, match="no quantizer 'magic'"):
        get_quantizer("magic")


_HEAD = {"num_classes": 3, "fpn_channels": 32, "cls_convs": 1, "reg_convs": 1}
_BACKBONES = {
    "resnet": FcosConfig(**_HEAD, block=BlockType.BASIC, blocks=(1, 1, 1, 1), stem_channels=16),
    "resnext": FcosConfig(**_HEAD, blocks=(1, 1, 1, 1), stem_channels=16, groups=4, width_per_group=8),
    "dla": FcosConfig(**_HEAD, backbone=BackboneType.DLA34),
    "mobilenet": FcosConfig(**_HEAD, backbone=BackboneType.MOBILENET_V2),
    "vovnet": FcosConfig(
        **_HEAD,
        backbone=BackboneType.VOVNET,
        stem_widths=(16, 16, 32),
        osa_stages=tuple(
            OsaStage(blocks, 3, width, 2 * width) for blocks, width in ((1, 16), (1, 20), (2, 24), (2, 28))
        ),
    ),
}


@pytest.mark.parametrize("backbone", sorted(_BACKBONES))
def test_no_placement_is_much_noisier_than_the_others_on_any_backbone(backbone: str, tmp_path: Path) -> None:
    """What the pyramid reads of the backbone: a pair before each ReLU6 would cost a MobileNetV2 many decibels."""
    torch = pytest.importorskip("torch")
    from exporters.torch_onnx import export_onnx
    from fcos_deploy.model.fcos import Fcos

    torch.manual_seed(0)
    contract = ModelContract(
        class_names=("red", "white", "platelet"),
        preprocess=PreprocessSpec(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), pixel_scale=255.0, height=128, width=160
        ),
        decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.6),
    )
    network = SimpleNamespace(model=Fcos(_BACKBONES[backbone]).eval(), contract=contract)
    graph = open_graph(export_onnx(network, tmp_path / "model.onnx").path)
    images = collect_images(DEMO_DATA / "calibration", options=SampleOptions(count=8))
    ranges = collect_ranges(graph, images, options=StatisticsOptions(engine="onnxruntime", threads=1))
    feeds = [Feeder(graph.source)(image.read()) for image in images.images[:2]]
    taps = [conv.input for conv in graph.convs if "inner_blocks" in conv.layer]
    with open_engine("onnxruntime", with_outputs(graph.source.model, taps)) as session:
        exact = [session.run(feed) for feed in feeds]
    lowest = {}
    assert len(plan_pairs(graph, PLACEMENTS["openvino"]).convs) == len(graph.convs)
    for name, placement in PLACEMENTS.items():
        plan = plan_pairs(graph, placement)
        fused = [conv.output for conv in graph.convs if conv.activation in placement.fuses]
        assert not set(fused) & set(plan.readers)
        with open_engine("onnxruntime", with_outputs(quantized_model(plan, ranges), taps)) as session:
            measured = [session.run(feed) for feed in feeds]
        ratios = [
            sum(float(np.square(e[tap]).sum()) for e in exact)
            / sum(float(np.square(m[tap] - e[tap]).sum()) for e, m in zip(exact, measured, strict=True))
            for tap in taps
        ]
        lowest[name] = 10 * np.log10(min(ratios))
    assert len(taps) == 3
    assert min(lowest.values()) > 15.0, lowest
    assert min(lowest.values()) > lowest["portable"] - 1.0, lowest
