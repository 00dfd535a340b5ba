"""Mistakes are planted in an ONNX file, one at a time; ``parity`` on ONNX Runtime must find the stage and name each."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from exporters.torch_onnx import export_onnx  # noqa: E402
from fcos_deploy.accuracy.diagnosis import OnnxLayers, first_diverging_layer  # noqa: E402
from fcos_deploy.accuracy.parity import LayerFinding, ParityReport, tolerance_for  # noqa: E402
from fcos_deploy.checkpoints.load import load_checkpoint  # noqa: E402
from fcos_deploy.cli.app import build_app  # noqa: E402
from fcos_deploy.core.artifact import read_contract  # noqa: E402
from fcos_deploy.core.backend import SessionOptions  # noqa: E402
from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text  # noqa: E402
from fcos_deploy.core.enums import (  # noqa: E402
    ComputeType,
    Precision,
)
from fcos_deploy.core.network import FcosConfig  # noqa: E402
from fcos_deploy.core.preprocess import ChannelOrder, ResizeFilter  # noqa: E402
from fcos_deploy.detector import Detector, DetectorSpec  # noqa: E402
from fcos_deploy.model.fcos import Fcos  # noqa: E402
from fcos_deploy.pipeline.proof import ParityRequest, check_parity  # noqa: E402

pytestmark = pytest.mark.slow  # a network is exported

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "fcos_deploy/demo_data/evaluation"
CONFIG = FcosConfig(
    num_classes=3, blocks=(1, 1, 1, 1), stem_channels=8, width_per_group=8, fpn_channels=32, cls_convs=2, reg_convs=2
)
ONE_THREAD = SessionOptions(threads=1)

Plant = Callable[[Any], None]  # changes an onnx.ModelProto in place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FCOS with bottlenecks and the golden data's deterministic weights, in torchvision's keys."""
    from safetensors.torch import save_file

    spec = importlib.util.spec_from_file_location("_fill_weights", ROOT / "tests/golden/_fill_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = {name: tuple(tensor.shape) for name, tensor in Fcos(CONFIG).state_dict().items()}
    state = {name: torch.from_numpy(np.array(module.fill(name, shape))) for name, shape in shapes.items()}
    metadata = {"ecosystem": "torchvision", "classes": '["red", "white", "platelet"]', "input_size": "256x320"}
    path = tmp_path_factory.mktemp("faults") / "right.safetensors"
    save_file(state, path, metadata={"fcos_deploy": json.dumps({**metadata, "score_threshold": "0.2"})})
    return path


@pytest.fixture(scope="module")
def right(checkpoint: Path) -> Path:
    """The checkpoint as ONNX, as it should be."""
    return export_onnx(load_checkpoint(checkpoint), checkpoint.with_name("right.onnx")).path


@pytest.fixture
def spoilt(right: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the right file with one mistake in its graph, or in its contract."""

    def make(plant: Plant | None = None, **changes: Any) -> Path:
        model = onnx.load(str(right))
        if plant is not None:
            plant(model)
        contract = changed(read_contract(right), **changes)
        properties = {entry.key: entry.value for entry in model.metadata_props}
        onnx.helper.set_model_props(model, {**properties, METADATA_KEY: contract_to_text(contract)})
        path = tmp_path / "spoilt.onnx"
        onnx.save(model, str(path))
        return path

    return make


def changed(contract: ModelContract, **changes: Any) -> ModelContract:
    """Fields of the preprocessing, of the decoding, or of the contract itself."""
    for name, value in changes.items():
        for part in ("preprocess", "decode"):
            spec = getattr(contract, part)
            if hasattr(spec, name):
                contract = replace(contract, **{part: replace(spec, **{name: value})})
                break
        else:
            contract = replace(contract, **{name: value})
    return contract


def parity(checkpoint: Path, candidate: Path, **changes: Any) -> ParityReport:
    candidate = DetectorSpec(model=candidate, backend="onnxruntime", options=ONE_THREAD)
    return check_parity(ParityRequest(candidate=candidate, checkpoint=checkpoint, images=IMAGES, count=2, **changes))


def named(report: ParityReport, *, stage: str, cause: str) -> str:
    """The sentence of the most likely cause, after checking where the fault was found and what it is called."""
    assert report.first is not None
    assert report.first.stage == stage, [(s.stage, s.passed, s.detail) for s in report.stages]
    assert report.causes, report.first
    assert report.causes[0].name == cause, report.causes
    return report.causes[0].sentence


def layer(right: Path, candidate: Path) -> LayerFinding:
    with Detector.open(right, backend="onnxruntime", options=ONE_THREAD) as detector:
        feeds, _ = detector.prepare([next(iter(sorted(IMAGES.glob("*.jpg"))))])
    tolerance = tolerance_for(Precision.FP32, ComputeType.F32)
    sources = [OnnxLayers(path, options=ONE_THREAD) for path in (right, candidate)]
    found = first_diverging_layer(*sources, feeds, tolerance=tolerance)
    assert found is not None
    return found


def using(model: Any, weights: str) -> list[Any]:
    """The nodes that take these weights."""
    found = [node for node in model.graph.node if any(weights in name for name in node.input)]
    assert found, weights
    return found


def constant(model: Any, name: str) -> Any:
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return tensor


def scale(model: Any, name: str, factor: float) -> None:
    tensor = constant(model, name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), name))


def test_nothing_planted_nothing_found(checkpoint: Path, right: Path) -> None:
    report = parity(checkpoint, right)
    assert report.passed, [(s.stage, s.detail) for s in report.stages if not s.passed]
    assert report.causes == ()
    assert report.agreement.reference > 10
    assert [s.stage for s in report.stages[:4]] == ["preprocess", "P3 class", "P3 box", "P3 centerness"]
    assert [s.stage for s in report.stages[-3:]] == ["decode", "nms", "detections"]


# The nine that everybody meets.


def test_rgb_and_bgr_swapped_by_the_host(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    report = parity(checkpoint, spoilt(channel_order=ChannelOrder.BGR))
    assert named(report, stage="preprocess", cause="preprocess.channel_order").endswith("BGR in place of RGB")


def test_rgb_and_bgr_swapped_in_the_graph(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        tensor = constant(model, "backbone.body.conv1.weight")
        flipped = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)[:, ::-1])
        tensor.CopyFrom(onnx.numpy_helper.from_array(flipped, tensor.name))
        for name in ("normalize.mean", "normalize.inverse_std"):
            both = constant(model, name)
            values = np.ascontiguousarray(onnx.numpy_helper.to_array(both)[:, ::-1])
            both.CopyFrom(onnx.numpy_helper.from_array(values, name))

    report = parity(checkpoint, spoilt(plant))
    assert "swaps the colour channels" in named(report, stage="P3 class", cause="channel-order")


def test_wrong_mean_in_the_contract(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    report = parity(checkpoint, spoilt(mean=(0.485, 0.456, 0.5)))
    sentence = named(report, stage="preprocess", cause="preprocess.mean")
    assert sentence == "the mean is (0.485, 0.456, 0.5) in place of (0.485, 0.456, 0.406)"


def test_wrong_mean_in_the_graph(checkpoint: Path, right: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        for name in ("normalize.mean", "normalize.inverse_std"):
            both = constant(model, name)
            values = np.ascontiguousarray(onnx.numpy_helper.to_array(both)[:, ::-1])
            both.CopyFrom(onnx.numpy_helper.from_array(values, name))

    candidate = spoilt(plant)
    sentence = named(parity(checkpoint, candidate), stage="P3 class", cause="normalisation")
    assert sentence == "the graph has mean and std in the opposite order of the channels"
    found = layer(right, candidate)
    assert found.causes[0].sentence.endswith("the constant is 103.5, 116.3, 123.7 in place of 123.7, 116.3, 103.5")


def test_half_pixel_shift(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        """The mean of each pixel and its neighbours above and to the left."""
        kernel = np.full((3, 1, 2, 2), 0.25, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "kernel"))
        (cast,) = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] == "images"]
        for node in model.graph.node:
            node.input[:] = ["moved" if name == cast.output[0] else name for name in node.input]
        margins = onnx.numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 0, 0]), "margins")
        model.graph.initializer.append(margins)
        at = list(model.graph.node).index(cast) + 1
        model.graph.node.insert(at, onnx.helper.make_node("Conv", ["wider", "kernel"], ["moved"], group=3))
        model.graph.node.insert(at, onnx.helper.make_node("Pad", [cast.output[0], "margins"], ["wider"], mode="edge"))

    sentence = named(parity(checkpoint, spoilt(plant)), stage="P3 class", cause="shift")
    assert sentence == "the graph shifts the image by +0.5 pixels to the right and +0.5 down"


def test_stride_moved(checkpoint: Path, right: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        for stage in (2, 3, 4):
            for name, stride in (("conv1", 2), ("conv2", 1)):
                (node,) = using(model, f"layer{stage}.0.{name}.weight")
                (strides,) = [a for a in node.attribute if a.name == "strides"]
                strides.ints[:] = [stride, stride]

    candidate = spoilt(plant)
    sentence = named(parity(checkpoint, candidate), stage="P3 class", cause="stride-placement")
    assert "on the first 1x1 convolution (stride_in_1x1 differs)" in sentence
    found = layer(right, candidate)
    assert "layer2.0.conv1" in found.layer
    assert found.causes[0].sentence.endswith("strides is [2, 2] in place of [1, 1]")


def test_exp_for_relu(checkpoint: Path, right: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        outputs = {node.output[0] for node in using(model, "bbox_reg.weight")}
        for node in model.graph.node:
            if node.op_type == "Relu" and node.input[0] in outputs:
                node.op_type = "Exp"

    candidate = spoilt(plant)
    sentence = named(parity(checkpoint, candidate), stage="P3 box", cause="activation")
    assert sentence == "the box activation is exp in place of relu (times the stride)"
    assert layer(right, candidate).causes[0].sentence.endswith("the operator is Exp in place of Relu")


def test_two_levels_swapped(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        joins = [node for node in model.graph.node if node.op_type == "Concat" and len(node.input) == 5]
        assert len(joins) == 3
        for node in joins:
            node.input[1], node.input[2] = node.input[2], node.input[1]

    sentence = named(parity(checkpoint, spoilt(plant)), stage="P4 class", cause="levels")
    assert sentence == "the levels P5 and P4 are swapped"


def test_another_nms_threshold(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    sentence = named(parity(checkpoint, spoilt(iou_threshold=0.4)), stage="nms", cause="decode.iou_threshold")
    assert sentence == "the IoU threshold is 0.4 in place of 0.6"


def test_one_convolution_changed_by_a_hundredth(checkpoint: Path, right: Path, spoilt: Callable[..., Path]) -> None:
    candidate = spoilt(lambda model: scale(model, "backbone.body.layer3.0.conv2.weight", 1.01))
    report = parity(checkpoint, candidate)
    assert report.first is not None
    assert report.first.stage == "P3 class"
    assert report.causes == ()  # nothing is blamed that is not to blame
    found = layer(right, candidate)
    assert found.layer == "backbone.body.layer3.0.conv2/Conv_output"
    assert found.kind == "Conv"
    assert found.compared > 10
    (cause,) = found.causes
    assert cause.name == "weights"
    assert cause.sentence.endswith("the weights differ from the reference's by 1.00% (RMS)")


def round_floats(model: Any, kind: int) -> None:
    """Round inputs, weights and results as hardware does that computes in a smaller float type and adds up in f32."""
    nodes, known = [], {}

    def rounded(name: str) -> str:
        if name not in known:
            known[name] = f"{name}_rounded"
            nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}_small"], to=kind))
            nodes.append(onnx.helper.make_node("Cast", [f"{name}_small"], [known[name]], to=onnx.TensorProto.FLOAT))
        return known[name]

    results: set[str] = set()
    for node in model.graph.node:
        weighted = node.op_type == "Conv"
        for place, name in enumerate(node.input):
            if name in results or (weighted and place < 2):
                node.input[place] = rounded(name)
        nodes.append(node)
        if node.op_type in ("Conv", "Add", "Mul", "InstanceNormalization", "GroupNormalization"):
            results.add(node.output[0])
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)


@pytest.mark.parametrize(("kind", "name"), [("BFLOAT16", "bf16"), ("FLOAT16", "f16")])
def test_a_smaller_float_in_place_of_f32(
    checkpoint: Path, right: Path, spoilt: Callable[..., Path], kind: str, name: str
) -> None:
    candidate = spoilt(lambda model: round_floats(model, getattr(onnx.TensorProto, kind)))
    sentence = named(parity(checkpoint, candidate), stage="P3 class", cause="compute-type")
    assert sentence.startswith(f"the differences are as large as those of rounding to {name} in place of f32:")
    found = layer(right, candidate)
    assert found.layer == "backbone.body.conv1/Conv_output"
    assert found.causes[0].name == "compute-type"
    assert f"({name}" in found.causes[0].sentence


# And some more.


@pytest.mark.parametrize(
    ("changes", "stage", "cause"),
    [
        ({"std": (0.229, 0.224, 0.25)}, "preprocess", "preprocess.std"),
        ({"resize_filter": ResizeFilter.PIL}, "preprocess", "preprocess.resize_filter"),
        ({"strides": (8, 16, 32, 64, 100)}, "decode", "decode.strides"),
        ({"score_threshold": 0.3}, "decode", "decode.score_threshold"),
        ({"pre_nms_top_k": 20}, "decode", "decode.pre_nms_top_k"),
        ({"class_names": ("red", "platelet", "white")}, "decode", "class_names"),
        ({"max_detections": 5}, "nms", "decode.max_detections"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_contract_says_otherwise(
    checkpoint: Path, spoilt: Callable[..., Path], changes: dict[str, Any], stage: str, cause: str
) -> None:
    sentence = named(parity(checkpoint, spoilt(**changes)), stage=stage, cause=cause)
    assert "in place of" in sentence


def test_class_channels_in_another_order(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        for name in ("cls_logits.weight", "cls_logits.bias"):
            tensor = constant(model, f"head.classification_head.{name}")
            array = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)[[0, 2, 1]])
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    sentence = named(parity(checkpoint, spoilt(plant)), stage="P3 class", cause="classes")
    assert sentence.endswith("the channels give 'platelet' in place of 'white', 'white' in place of 'platelet'")


def test_a_bias_that_got_lost(checkpoint: Path, right: Path, spoilt: Callable[..., Path]) -> None:
    def plant(model: Any) -> None:
        for node in using(model, "bbox_ctrness.weight"):
            del node.input[2]

    candidate = spoilt(plant)
    report = parity(checkpoint, candidate)
    assert report.first is not None
    assert report.first.stage == "P3 centerness"
    assert report.causes == ()
    found = layer(right, candidate)
    assert "bbox_ctrness" in found.layer
    assert found.causes[0].sentence.endswith("the bias of the reference is missing")


def test_what_is_meant_can_be_said(checkpoint: Path, spoilt: Callable[..., Path]) -> None:
    """The command, with the layer; and without a complaint where the checkpoint is to be read in that way."""
    candidate = spoilt(score_threshold=0.3)
    arguments = ["parity", candidate, "--reference", checkpoint, "--images", IMAGES, "--limit", 1, "--threads", 1]
    runner = CliRunner()
    refused = runner.invoke(build_app(), [str(a) for a in [*arguments, "--json"]])
    assert refused.exit_code == 4
    document = json.loads(refused.stdout)
    assert (document["passed"], document["first"]) == (False, "decode")
    assert document["causes"][0]["sentence"] == "the score threshold is 0.3 in place of 0.2"
    accepted = runner.invoke(build_app(), [str(a) for a in [*arguments, "--score-threshold", 0.3]])
    assert accepted.exit_code == 0, accepted.output
