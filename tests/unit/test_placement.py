"""Where pairs go, on a graph whose every name is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibration.placement import PLACEMENTS, ConvGraph, WeightRange, open_graph, placement_for, plan_pairs
from fcos_deploy.core.backend import all_backends
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.files import sha256_file

onnx = pytest.importorskip("onnx")

PORTABLE, CPU, OPENVINO = PLACEMENTS["portable"], PLACEMENTS["onnxruntime-cpu"], PLACEMENTS["openvino"]


@pytest.fixture
def graph(mini_graph: ConvGraph) -> ConvGraph:
    return mini_graph


def test_an_opened_graph_is_read_once(graph: ConvGraph) -> None:
    assert graph.source.model is graph.source.model
    assert graph.source.contract is graph.source.contract
    assert graph.source.sha256 == sha256_file(graph.source.path)


def test_convolutions_are_found_with_their_shared_layers(graph: ConvGraph) -> None:
    assert len(graph.convs) == 17
    assert len(graph.layers) == 13
    assert [c.name for c in graph.convs if c.layer == "tower.weight"] == ["n_tower0", "n_tower1"]


def test_only_the_last_convolutions_are_predictions(graph: ConvGraph) -> None:
    assert {c.layer for c in graph.convs if c.is_prediction} == {"cls.weight", "reg.weight", "ctr.weight"}


def test_residual_additions_and_their_skip_inputs(graph: ConvGraph) -> None:
    assert [(a.name, a.branch, a.skip, a.result) for a in graph.adds] == [
        ("n_sum", "b", "pool", "block"),
        ("n_merged", "inner3", "up", "merged"),
    ]


def test_portable_pairs_convolution_inputs_and_skips_only(graph: ConvGraph) -> None:
    plan = plan_pairs(graph, PORTABLE)
    assert set(plan.readers) == {
        "normal", "pool", "a_relu", "block", "c3", "c4", "merged", "inner4", "p3", "p4", "tower_relu0", "tower_relu1",
        "up",
    }  # fmt: skip
    assert plan.readers["pool"] == {"n_a", "n_sum"}
    assert plan.readers["inner4"] == {"n_p4"}


def test_cpu_pairs_results_and_keeps_predictions_float(graph: ConvGraph) -> None:
    plan = plan_pairs(graph, CPU)
    assert {c.layer for c in plan.convs}.isdisjoint({"cls.weight", "reg.weight", "ctr.weight"})
    assert {"b", "block", "merged", "up", "pool", "tower0", "tower1"} <= set(plan.readers)
    assert {"cls0", "reg_relu0", "ctr0", "norm0"}.isdisjoint(plan.readers)
    assert set(plan.readers.values()) == {None}


def test_openvino_pairs_chains_and_predictions_but_not_what_norms_read(graph: ConvGraph) -> None:
    plan = plan_pairs(graph, OPENVINO)
    assert len(plan.convs) == len(graph.convs)
    assert {"stem_relu", "pool", "b", "block", "inner4", "inner3", "up", "merged"} <= set(plan.readers)
    everywhere = plan_pairs(graph, replace(CPU, ignore_predictions=False))
    assert set(plan.readers) == set(everywhere.readers) - {"tower0", "tower1"}
    assert set(plan.readers.values()) == {None}


@pytest.mark.parametrize(
    ("activation", "fused"),
    [("Relu", True), ("Clip", True), ("LeakyRelu", False), ("HardSwish", False), ("Swish", False)],
)
def test_nothing_is_quantized_between_a_convolution_and_the_activation_that_its_kernel_computes(
    activation: str, fused: bool, mini_onnx: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's integer convolution has no activation but a range; the others need a pair before them there."""
    graph = open_graph(_with_activation(mini_onnx, activation, tmp_path / "graph.onnx"))
    (conv,) = (conv for conv in graph.convs if conv.output == "stem")
    assert (conv.activation, conv.result) == (activation, "stem_relu")
    assert ("stem" not in plan_pairs(graph, CPU).readers) == fused
    assert "stem" not in plan_pairs(graph, OPENVINO).readers
    assert "stem_relu" in plan_pairs(graph, CPU).readers
    assert {"stem", "stem_relu"} - set(graph.activations) == ({"stem"} if fused else set())


def _with_activation(source: Path, activation: str, output: Path) -> Path:
    """The graph with another activation after its first convolution."""
    model = onnx.load(str(source))
    position, relu = next((i, node) for i, node in enumerate(model.graph.node) if node.output[0] == "stem_relu")
    model.graph.node.remove(relu)
    make = onnx.helper.make_node
    nodes = [make(activation, ["stem"], ["stem_relu"], name="n_activation")]
    if activation == "Clip":
        for name, value in (("zero", 0.0), ("six", 6.0)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
        nodes[0].input.extend(["zero", "six"])
    elif activation == "Swish":
        gate = make("Sigmoid", ["stem"], ["gate"], name="n_gate")
        nodes = [gate, make("Mul", ["stem", "gate"], ["stem_relu"], name="n_activation")]
    for node in reversed(nodes):
        model.graph.node.insert(position, node)
    onnx.save(model, str(output))
    return output


def test_copies_take_their_sources_scale(graph: ConvGraph) -> None:
    assert plan_pairs(graph, CPU).scale_of == {"pool": "stem_relu", "up": "inner4"}


def test_ignored_layer_is_float_on_every_level(graph: ConvGraph) -> None:
    plan = plan_pairs(graph, PORTABLE, ignored_layers={"tower.weight", "n_a"})
    assert {"n_tower0", "n_tower1", "n_a"}.isdisjoint({c.name for c in plan.convs})
    assert {"p3", "p4"}.isdisjoint(plan.readers)


def test_unknown_layer_is_an_error(graph: ConvGraph) -> None:
    with pytest.raises(ConfigError, match="no layer \\['ghost'\\]"):
        plan_pairs(graph, PORTABLE, ignored_layers={"ghost"})


def test_placements_by_backend_and_by_name() -> None:
    assert placement_for("tensorrt") is PORTABLE
    assert placement_for("onnxruntime") is placement_for("onnxruntime-cpu") is CPU
    with pytest.raises(ConfigError, match="no INT8 placement for 'toaster'"):
        placement_for("toaster")


def test_weight_ranges_by_name() -> None:
    assert placement_for("tensorrt", weights="full") == replace(PORTABLE, weights=WeightRange.FULL)
    with pytest.raises(ConfigError, match="no range of weights 'half'"):
        placement_for("tensorrt", weights="half")


def test_whole_additions_need_both_inputs(graph: ConvGraph) -> None:
    plan = plan_pairs(graph, replace(CPU, ignore_predictions=False), ignored_layers={"block.b.weight"})
    # The branch of the block's addition is float, so the addition is, but its result feeds a quantized convolution.
    assert "b" not in plan.readers
    assert "block" in plan.readers


def test_text_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello, this is not a graph")
    with pytest.raises(BackendLoadError, match=r"text\.onnx' is not a complete ONNX model"):
        open_graph(tmp_path / "text.onnx")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BackendLoadError, match="does not exist"):
        open_graph(tmp_path / "none.onnx")


@pytest.mark.parametrize("name", sorted(all_backends()))
def test_placements_that_runtimes_read_are_ones_that_there_are(name: str) -> None:
    assert set(all_backends()[name].placements) <= set(PLACEMENTS)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"])
def test_the_first_that_a_runtime_reads_is_the_one_made_for_it(name: str) -> None:
    assert placement_for(name).name == all_backends()[name].placements[0]
