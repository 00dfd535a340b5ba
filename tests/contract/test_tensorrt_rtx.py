"""The demo FCOS and a ResNet-50 as TensorRT-RTX engines, built without a GPU for three generations of GPUs.

Each tail, precision and generation is in one of the tests. All combinations: ``benchmarks/tensorrt_matrix.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("torch")
pytest.importorskip("onnx")

from calibration.calibrate import collect_ranges
from calibration.dataset import SampleOptions, collect_images
from calibration.placement import open_graph, placement_for
from calibration.quantizers import quantize_qdq
from exporters.rewrite import convert_to_fp16
from exporters.tensorrt import TensorrtRtxExporter
from exporters.torch_onnx import ExportOptions, export_onnx
from fcos_deploy.checkpoints.load import LoadedCheckpoint, load_checkpoint
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.checkpoint_options import CheckpointOptions
from fcos_deploy.core.enums import DeformForm, NmsForm, Precision, Tail
from fcos_deploy.core.errors import BackendLoadError, BuildError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult, SizeRange
from fcos_deploy.core.network import resnet_config
from fcos_deploy.model.fcos import Fcos

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "fcos_deploy/demo_data"
CAPABILITIES = ("8.6", "8.9", "12.0")  # Ampere, Ada, Blackwell
SIZE = (64, 96)
EXPORTS = {
    "raw": ExportOptions(),
    "raw-dynamic": ExportOptions(batch=None),
    "raw-fp16": ExportOptions(precision=Precision.FP16),
    "candidates": ExportOptions(tail=Tail.CANDIDATES),
    "candidates-dynamic": ExportOptions(tail=Tail.CANDIDATES, batch=None),
    "nms-static-form": ExportOptions(tail=Tail.NMS, nms_form=NmsForm.STATIC, nms_boxes=400),
    "nms-operator": ExportOptions(tail=Tail.NMS, nms_form=NmsForm.ONNX),
}


@pytest.fixture(scope="module")
def checkpoint() -> LoadedCheckpoint:
    return load_checkpoint(DEMO / "fcos_bccd.safetensors", options=CheckpointOptions(input_size=SIZE))


@pytest.fixture(scope="module")
def onnx_file(checkpoint: LoadedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports on first use, once for all tests of this module."""
    folder = tmp_path_factory.mktemp("onnx")

    def get(name: str) -> Path:
        path = folder / f"{name}.onnx"
        if not path.is_file():
            export_onnx(checkpoint, path, options=EXPORTS[name])
        return path

    return get


def quantized(source: Path, output: Path) -> Path:
    images = collect_images(DEMO / "calibration", options=SampleOptions(count=8))
    graph, placement = open_graph(source), placement_for("tensorrt-rtx")
    return quantize_qdq(graph, collect_ranges(graph, images), output, placement=placement).path


@pytest.fixture(scope="module")
def int8_file(onnx_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(onnx_file("raw"), tmp_path_factory.mktemp("int8") / "model.int8.onnx")


@pytest.fixture(scope="module")
def resnet50_file(checkpoint: LoadedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.manual_seed(0)

    class Loaded:
        model, contract = Fcos(resnet_config(50, num_classes=3)).eval(), checkpoint.contract

    path = tmp_path_factory.mktemp("r50") / "r50.onnx"
    return export_onnx(Loaded(), path, options=ExportOptions(tail=Tail.CANDIDATES)).path


def build(source: Path, folder: Path, *, capability: str, batch: SizeRange | None = None) -> BuildResult:
    options = BuildOptions(compute_capabilities=(capability,), batch=batch or SizeRange())
    return TensorrtRtxExporter().build(BuildRequest(source=source, output=folder / "model.engine", options=options))


def convolution_inputs(result: BuildResult) -> dict[str, int]:
    """How many convolutions of the engine take which type, as the builder's own layer list says."""
    counts: dict[str, int] = json.loads(result.record["convolution_inputs"])
    return counts


@pytest.mark.parametrize(
    ("name", "capability"), list(zip(("candidates", "nms-static-form", "raw"), CAPABILITIES, strict=True))
)
def test_every_tail_builds(name: str, capability: str, onnx_file: Callable[[str], Path], tmp_path: Path) -> None:
    result = build(onnx_file(name), tmp_path, capability=capability)
    assert result.record["compute_capabilities"] == capability
    assert set(convolution_inputs(result)) == {"Float"}
    assert read_contract(result.files[0]) == read_contract(onnx_file(name))


def test_candidates_of_an_open_batch_build(onnx_file: Callable[[str], Path], tmp_path: Path) -> None:
    result = build(onnx_file("candidates-dynamic"), tmp_path, capability="8.9", batch=SizeRange(1, 2, 4))
    assert json.loads(result.record["shapes"]) == {"images": "1x3x64x96/2x3x64x96/4x3x64x96"}


def test_convolutions_of_an_fp16_engine_take_half(onnx_file: Callable[[str], Path], tmp_path: Path) -> None:
    inputs = convolution_inputs(build(onnx_file("raw-fp16"), tmp_path, capability="8.6"))
    assert inputs.get("Half", 0) > 0.9 * sum(inputs.values())


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_convolutions_of_an_int8_engine_take_int8(capability: str, int8_file: Path, tmp_path: Path) -> None:
    """As many as the graph has: the builder merges the two predictions of a level in float, and not in int8."""
    onnx = pytest.importorskip("onnx")
    nodes = [node.op_type for node in onnx.load(int8_file).graph.node]
    assert convolution_inputs(build(int8_file, tmp_path, capability=capability)) == {"Int8": nodes.count("Conv")}
    assert read_contract(int8_file).precision is Precision.INT8


def test_the_nms_operator_is_refused_with_the_way_out(onnx_file: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no runners that implement it") as caught:
        build(onnx_file("nms-operator"), tmp_path, capability="8.6")
    assert "--tail candidates" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "capability", "batch"),
    [
        ("candidates", "8.9", SizeRange()),
        ("nms-static-form", "12.0", SizeRange()),
        ("raw-dynamic", "8.6", SizeRange(1, 2, 4)),
    ],
)
def test_convolutions_take_the_graphs_type_in_every_tail(
    name: str, capability: str, batch: SizeRange, onnx_file: Callable[[str], Path], tmp_path: Path
) -> None:
    int8 = quantized(onnx_file(name), tmp_path / "int8.onnx")
    half = convert_to_fp16(onnx_file(name), tmp_path / "fp16.onnx").path
    assert set(convolution_inputs(build(int8, tmp_path, capability=capability, batch=batch))) == {"Int8"}
    assert convolution_inputs(build(half, tmp_path, capability=capability, batch=batch))["Half"] > 50


def test_a_resnet_50_builds(resnet50_file: Path, tmp_path: Path) -> None:
    inputs = convolution_inputs(build(resnet50_file, tmp_path, capability="12.0"))
    assert set(inputs) == {"Float"}
    assert inputs["Float"] >= 100


def test_a_resnet_50_in_int8(resnet50_file: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    source = quantized(resnet50_file, tmp_path / "int8.onnx")
    nodes = [node.op_type for node in onnx.load(source).graph.node]
    assert convolution_inputs(build(source, tmp_path, capability="8.9")) == {"Int8": nodes.count("Conv")}


@pytest.fixture(scope="module")
def deformable_files(deformable_loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small deformable detector in every precision, its deformable layers in plain operators."""
    folder = tmp_path_factory.mktemp("deformable")
    fp32 = export_onnx(deformable_loaded, folder / "fp32.onnx").path
    convert_to_fp16(fp32, folder / "fp16.onnx")
    return {"fp32": fp32, "fp16": folder / "fp16.onnx", "int8": quantized(fp32, folder / "int8.onnx")}


@pytest.mark.parametrize(("precision", "capability"), list(zip(("fp32", "fp16", "int8"), CAPABILITIES, strict=True)))
def test_deformable_convolutions_build(
    precision: str, capability: str, deformable_files: dict[str, Path], tmp_path: Path
) -> None:
    counts = convolution_inputs(build(deformable_files[precision], tmp_path, capability=capability))
    # Twelve convolutions give offsets, which stay in float.
    types = {"fp32": {"Float"}, "fp16": {"Float", "Half"}, "int8": {"Float", "Int8"}}
    assert set(counts) == types[precision]
    if precision != "fp32":
        assert counts["Float"] == 12


def test_the_operator_deform_conv_is_refused_before_the_build(deformable_loaded: Any, tmp_path: Path) -> None:
    """TensorRT-RTX's parser looks for a plug-in of that name, and there is none."""
    options = ExportOptions(deform_form=DeformForm.OPERATOR)
    source = export_onnx(deformable_loaded, tmp_path / "operator.onnx", options=options).path
    with pytest.raises(BackendLoadError, match="unknown to 'tensorrt-rtx'") as caught:
        build(source, tmp_path, capability="8.6")
    assert "--deform-form grid-sample" in caught.value.hint
