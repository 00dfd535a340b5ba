"""ONNX files of a real small detector: how it is traced, what they hold, and that ONNX Runtime detects the same."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

from exporters import rewrite, step_check, torch_onnx  # noqa: E402
from exporters.step_check import onnx_runner  # noqa: E402
from exporters.torch_onnx import ExportOptions, OnnxExport, export_onnx, trace  # noqa: E402
from fcos_deploy import Detector  # noqa: E402
from fcos_deploy.bundle import Artifact, StepRecord  # noqa: E402
from fcos_deploy.checkpoints.load import CheckpointOptions, LoadedCheckpoint, load_checkpoint  # noqa: E402
from fcos_deploy.core import onnx_file  # noqa: E402
from fcos_deploy.core.artifact import (  # noqa: E402
    OnnxGraph,
    read_contract,
)
from fcos_deploy.core.decode import PROFILES, DecodeSpec  # noqa: E402
from fcos_deploy.core.detections import image_sizes_row, postprocess  # noqa: E402
from fcos_deploy.core.enums import ArtifactKind, NmsForm, Precision, Tail  # noqa: E402
from fcos_deploy.core.errors import ConfigError, ExportError, StepCheckError  # noqa: E402
from fcos_deploy.core.onnx_file import NAMES_KEY, external_locations, onnx_interface, onnx_metadata, opset_of  # noqa: E402  # noqa: E402
from fcos_deploy.core.preprocess import Letterbox, PreprocessSpec, SizeRule  # noqa: E402
from fcos_deploy.model.tails import ExportableFcos  # noqa: E402
from fcos_deploy.model.wrap import wrap_module  # noqa: E402
from fcos_deploy.serving.package import ServedModel, ServingOptions  # noqa: E402
from fcos_deploy.serving.servers import config_text  # noqa: E402
from runtimes.onnxruntime import open_model  # noqa: E402

SIZE = (128, 160)
LETTERBOX = Letterbox(250, 300, 124, 149)


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedCheckpoint:
    """The tiny detector, with affine parameters of the head's GroupNorm that are not one and zero."""
    loaded = load_checkpoint(tiny_checkpoint)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in loaded.model.head.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return loaded


@pytest.fixture(scope="module")
def decomposed() -> Iterator[list[object]]:
    """Programs that were traced a second time since the tests of this module began."""
    programs: list[object] = []
    original = torch.export.ExportedProgram.run_decompositions

    def run(program: Any, *args: Any, **options: Any) -> Any:
        programs.append(program)
        return original(program, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", run)
        yield programs


@pytest.fixture(scope="module")
def collector_enabled() -> set[bool]:
    """Whether Python looked for garbage, at each step of the exports of this module."""
    return set()


@pytest.fixture(scope="module")
def export(
    loaded: LoadedCheckpoint,
    decomposed: list[object],  # counts from the first export on
    collector_enabled: set[bool],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., OnnxExport]:
    """Exports once for each set of options."""
    folder = tmp_path_factory.mktemp("onnx")
    exports: dict[ExportOptions, OnnxExport] = {}

    def progress(_label: str, _done: int, _total: int) -> None:
        collector_enabled.add(gc.isenabled())

    def run(**options: object) -> OnnxExport:
        chosen = ExportOptions(**options)
        if chosen not in exports:
            path = folder / f"{len(exports)}.onnx"
            exports[chosen] = export_onnx(loaded, path, options=chosen, progress=progress)
        return exports[chosen]

    return run


def _feeds(model: object, *, batch: int) -> dict[str, np.ndarray]:
    images = np.random.default_rng(5).integers(0, 256, (batch, 3, *SIZE), np.uint8)
    names = {i.name for i in model.graph.input}
    sizes = {"image_sizes": np.stack([image_sizes_row(LETTERBOX)] * batch)} if "image_sizes" in names else {}
    return {"images": images, **sizes}


def _detections(made: OnnxExport, *, batch: int, image: int) -> object:
    model = OnnxGraph(made.path).model
    outputs = open_model(model.SerializeToString()).run(_feeds(model, batch=batch))
    return postprocess(outputs, made.contract, index=image, input_size=SIZE, letterbox=LETTERBOX)


def test_operands_are_promoted_as_in_a_graph_that_is_computed_once_more(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch looks for operands whose types differ, it takes what was traced, and computes what it changes."""
    pytest.importorskip("torch.onnx._internal.fx.passes.type_promotion")
    computed: list[Any] = []
    call = torch.fx.Interpreter.call_function

    def counted(interpreter: Any, target: Any, *arguments: Any) -> Any:
        computed.append(target)
        return call(interpreter, target, *arguments)

    monkeypatch.setattr(torch.fx.Interpreter, "call_function", counted)
    options = ExportOptions(tail=Tail.CANDIDATES, batch=None)
    once, again = tmp_path / "once.onnx", tmp_path / "again.onnx"
    export_onnx(load_checkpoint(tiny_checkpoint), once, options=options)
    changed = len(computed)
    monkeypatch.setattr(torch_onnx, "_promoted_as_traced", contextlib.nullcontext)
    export_onnx(load_checkpoint(tiny_checkpoint), again, options=options)
    assert once.read_bytes() == again.read_bytes()
    assert changed < (len(computed) - changed) / 2


def test_file_is_a_checked_onnx_model_with_the_contract(export: Callable[..., OnnxExport]) -> None:
    made = export()
    onnx.checker.check_model(onnx.load(made.path), full_check=True)
    assert read_contract(made.path) == made.contract
    assert onnx_metadata(made.path)[NAMES_KEY] == '["red", "white", "platelet"]'
    assert opset_of(OnnxGraph(made.path).model) == made.opset == 17


def test_weights_shared_by_five_levels_are_stored_once(export: Callable[..., OnnxExport]) -> None:
    made = export()
    towers = [i for i in OnnxGraph(made.path).model.graph.initializer if "head.classification_head.conv" in i.name]
    weights = [(i.name, tuple(i.dims)) for i in towers if i.name.endswith(".weight")]
    assert weights.count(("head.classification_head.conv.0.weight", (32, 32, 3, 3))) == 1
    assert len(weights) == 4
    # Names of 350 nodes and the contract are about 90 kB beside 1.1 MB of weights.
    assert made.parameter_bytes * 0.98 < made.file_bytes < made.parameter_bytes + 120_000


def test_batch_norm_is_folded_and_nodes_are_named_after_modules(export: Callable[..., OnnxExport]) -> None:
    graph = OnnxGraph(export().path).model.graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    names = [node.name for node in graph.node if node.op_type == "Conv"]
    assert names[0] == "backbone.body.conv1/Conv"
    assert [n for n in names if "bbox_reg" in n] == [
        "head.regression_head.bbox_reg/Conv" + suffix for suffix in ("", "_1", "_2", "_3", "_4")
    ]


def test_nothing_of_the_exporting_machine_is_in_the_file(export: Callable[..., OnnxExport]) -> None:
    content = export().path.read_bytes()
    assert os.fsencode(Path(torch_onnx.__file__).parents[1]) not in content
    assert b"stack_trace" not in content


def test_checks_of_every_step_are_recorded(export: Callable[..., OnnxExport]) -> None:
    made = export()
    assert [check.step for check in made.checks] == ["export", "simplify"]
    assert "largest difference" in onnx_metadata(made.path)["fcos_deploy.checks"]
    assert all(check.largest < 1 for check in made.checks)


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ({"tail": Tail.CANDIDATES, "batch": 2}, 2),
        ({"tail": Tail.NMS, "batch": None}, 1),
        ({"tail": Tail.NMS, "batch": None}, 3),
        ({"tail": Tail.NMS, "nms_form": NmsForm.STATIC}, 1),
    ],
    ids=["candidates-batch-2", "nms-dynamic-1", "nms-dynamic-3", "static-nms"],
)
def test_tails_give_the_detections_of_the_raw_tail(
    export: Callable[..., OnnxExport], options: dict[str, object], batch: int
) -> None:
    made = export(**options)
    raw = export(tail=Tail.RAW, batch=1)
    for exported in (made, raw):
        shapes = {spec.name: spec.shape[1:] for spec in onnx_interface(exported.path).outputs}
        assert shapes == {spec.name: spec.shape[1:] for spec in exported.contract.output_specs}
    images = _feeds(OnnxGraph(raw.path).model, batch=batch)["images"]
    run = onnx_runner(OnnxGraph(raw.path).model)
    for image in range(batch):
        outputs = run({"images": images[image : image + 1]})
        wanted = postprocess(outputs, raw.contract, index=0, input_size=SIZE, letterbox=LETTERBOX)
        found = _detections(made, batch=batch, image=image)
        assert len(wanted) > 10
        assert found.labels.tolist() == wanted.labels.tolist()
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-2)


def test_only_asked_for_outputs_remain(export: Callable[..., OnnxExport]) -> None:
    model = OnnxGraph(export(tail=Tail.NMS, batch=None).path).model
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "labels", "num_detections"]
    assert _axes(model.graph.input[0]) == ["batch", 3, *SIZE]
    assert _axes(model.graph.output[0]) == ["batch", 100, 4]


class _Small(torch.nn.Module):
    """Three levels of a few weights, five classes; what makes a candidate is decided behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 10, 8, 8)
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(10, 10, 2, 2) for _ in range(2))

    def forward(self, images: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        maps = [self.stem(images).tanh() * 4]
        for layer in self.down:
            maps.append(layer(maps[-1]).tanh() * 4)
        return [(m[:, :5], m[:, 5:9].exp(), m[:, 9:]) for m in maps]


class _Modern(_Small):
    """With what opset 18 writes in another way than 17: parts of a tensor, equal and not, margins, and mish."""

    def forward(self, images: Any) -> Any:
        first, second = torch.nn.functional.pad(images, (3, 5, 1, 7))[..., 1:-7, 3:-5].chunk(2, dim=3)
        images = torch.cat([second, torch.nn.functional.mish(first)], dim=3)
        *parts, rest = torch.nn.functional.pad(images, (2, 2, 0, 0), mode="reflect")[..., 2:-2].split(100, dim=3)
        return super().forward(torch.cat([rest, *parts], dim=3))


@pytest.mark.parametrize("opset", [16, 18])
def test_operators_without_a_way_down_from_opset_18_are_written_as_before(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = wrap_module(
        _Modern(),
        preprocess=PreprocessSpec(mean=(128, 128, 128), std=(64, 64, 64), height=64, width=224),
        decode=DecodeSpec(profile=PROFILES["mmdetection"], score_threshold=0.5, iou_threshold=0.5, strides=(8, 16, 32)),
        class_names=tuple("abcde"),
    )
    exported = export_onnx(wrapped, tmp_path / "m.onnx", options=ExportOptions(opset=opset, simplify=False))
    model = onnx.load(str(exported.path))
    onnx.checker.check_model(model)
    assert opset_of(model) == opset
    assert {node.domain for node in model.graph.node} == {""}
    operators = {node.op_type for node in model.graph.node}
    assert {"Split", "Pad"} <= operators
    assert ("Mish" in operators) == (opset == 18)


@pytest.mark.parametrize("form", [None, *NmsForm], ids=["candidates", "nms", "static-nms"])
@pytest.mark.parametrize("profile", ["mmdetection", "mmdetection2"])  # pairs are ranked, or locations
def test_graph_contract_and_triton_have_the_same_shapes(profile: str, form: NmsForm | None, tmp_path: Path) -> None:
    """1280, 320 and 80 locations: more pairs than TensorRT's TopK takes, so that the tails have to stay below it."""
    torch.manual_seed(0)
    wrapped = wrap_module(
        _Small(),
        preprocess=PreprocessSpec(mean=(0, 0, 0), std=(255, 255, 255), height=256, width=320),
        decode=DecodeSpec(
            profile=PROFILES[profile], score_threshold=0.5, iou_threshold=0.5, strides=(8, 16, 32), pre_nms_top_k=3840
        ),
        class_names=tuple("abcde"),
    )
    tail = Tail.NMS if form else Tail.CANDIDATES
    options = ExportOptions(tail=tail, nms_form=form or NmsForm.ONNX, nms_boxes=100, simplify=False)
    exported = export_onnx(wrapped, tmp_path / "m.onnx", options=options)
    contract = read_contract(exported.path)
    graph = {spec.name: spec.shape[1:] for spec in onnx_interface(exported.path).outputs}
    assert graph == {spec.name: spec.shape[1:] for spec in contract.output_specs}
    if tail is Tail.CANDIDATES:
        assert graph["scores"] == (3840 + 1600 + 400,)
    artifact = Artifact(
        path="m.onnx",
        kind=ArtifactKind.ONNX,
        precision=Precision.FP32,
        sha256="0" * 64,
        size=1,
        step=StepRecord(name="x"),
    )
    served = ServedModel(
        name="m", artifact=artifact, contract=contract, path=exported.path, companions=(), options=ServingOptions()
    )
    for name, shape in graph.items():
        assert f'name: "{name}"' in config_text(served)
        assert f"dims: {[1, *shape]}" in next(line for line in config_text(served).splitlines() if f'"{name}"' in line)


def test_weights_that_do_not_fit_one_file_lie_beside_it(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_LARGEST_FILE", 100_000)
    exported = export_onnx(load_checkpoint(tiny_checkpoint), tmp_path / "large.onnx")
    assert external_locations(exported.path) == {"large.onnx.data"}
    assert exported.path.stat().st_size < 200_000 < (tmp_path / "large.onnx.data").stat().st_size
    assert read_contract(exported.path) == read_contract(tiny_onnx)
    feed = _feeds(OnnxGraph(exported.path).model, batch=1)  # checked with its weights
    for expected, actual in zip(
        *(open_model(path).run(feed).values() for path in (tiny_onnx, exported.path)), strict=True
    ):
        np.testing.assert_array_equal(expected, actual)


def test_weights_stay_in_a_file_while_steps_work_on_the_graph(
    export: Callable[..., OnnxExport], loaded: LoadedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy of the graph would be a copy of gigabytes of weights otherwise (benchmarks/export_memory.py)."""
    options = ExportOptions(precision=Precision.FP16)
    whole = export(precision=Precision.FP16)  # 36 KB a weight: smaller than what is put aside
    monkeypatch.setattr(rewrite, "LARGE", 1024)
    sizes: list[int] = []

    def open_and_measure(model: Path, **options: Any) -> object:
        sizes.append(onnx.load(model, load_external_data=False).ByteSize())
        return open_model(model, **options)

    monkeypatch.setattr(step_check, "open_model", open_and_measure)
    aside = export_onnx(loaded, tmp_path / "aside.onnx", options=options)
    assert len(sizes) >= 2
    assert max(sizes) < 0.35 * aside.parameter_bytes, "names and the nodes of the tail take the rest"
    assert [path.name for path in tmp_path.iterdir()] == ["aside.onnx"]
    assert external_locations(aside.path) == set()
    graphs = [OnnxGraph(made.path).model.graph for made in (whole, aside)]
    assert graphs[0].node == graphs[1].node
    weights = [sorted(graph.initializer, key=lambda tensor: tensor.name) for graph in graphs]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("opset", "ir_version"), [(16, 8), (17, 8), (21, 10)])
def test_the_oldest_format_of_an_opset_is_written(
    opset: int, ir_version: int, export: Callable[..., OnnxExport]
) -> None:
    model = onnx.load(export(opset=opset).path)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, opset_of(model)) == (ir_version, opset)


def test_a_graph_that_another_tool_quantized_is_not_called_fp32(tiny_onnx: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(tiny_onnx, tmp_path / "q.onnx", extra_options={"EnableSubgraph": False})
    assert onnx_metadata(tmp_path / "q.onnx")["fcos_deploy.contract"]
    assert read_contract(tmp_path / "q.onnx").precision is Precision.INT8
    with pytest.raises(ConfigError, match="is int8, fp32 was asked for"):
        Detector.open(tmp_path / "q.onnx", precision=Precision.FP32)


def _axes(value: object) -> list[object]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_static_nms_needs_no_nms_operator(export: Callable[..., OnnxExport]) -> None:
    graph = OnnxGraph(export(tail=Tail.NMS, nms_form=NmsForm.STATIC).path).model.graph
    operators = {node.op_type for node in graph.node}
    assert not operators & {"NonMaxSuppression", "NonZero", "Loop", "If"}


def test_group_norm_is_one_operator_where_the_opset_has_it(export: Callable[..., OnnxExport]) -> None:
    made = export(opset=21)
    operators = [node.op_type for node in OnnxGraph(made.path).model.graph.node]
    assert operators.count("GroupNormalization") == 40
    assert "InstanceNormalization" not in operators


@pytest.mark.slow
def test_open_sizes_stay_open(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A shortest/longest contract; P6 and P7 of the second size have torchvision's uneven grid."""
    options = CheckpointOptions(shortest=160, longest=256)
    loaded = load_checkpoint(tiny_checkpoint, options=options)
    raw = export_onnx(loaded, tmp_path / "raw.onnx", options=ExportOptions(batch=None))
    made = export_onnx(loaded, tmp_path / "nms.onnx", options=ExportOptions(tail=Tail.NMS, batch=None))
    runs = [open_model(path).run for path in (raw.path, made.path)]
    for height, width in ((160, 224), (128, 128), (224, 352)):
        images = np.random.default_rng(1).standard_normal((2, 3, height, width), np.float32)
        letterbox = Letterbox(2 * height, width, height - 7, width - 9)
        sizes = np.stack([image_sizes_row(letterbox)] * 2)
        raw_outputs, outputs = runs[0]({"images": images}), runs[1]({"images": images, "image_sizes": sizes})
        for image in range(2):
            same = {"index": image, "input_size": (height, width), "letterbox": letterbox}
            wanted, found = postprocess(raw_outputs, raw.contract, **same), postprocess(outputs, made.contract, **same)
            assert len(wanted) > 5
            assert found.labels.tolist() == wanted.labels.tolist()
            np.testing.assert_allclose(found.boxes, wanted.boxes, atol=2e-2)


def test_a_static_nms_of_open_size_takes_images_with_fewer_candidates_than_it_looks_at(tmp_path: Path) -> None:
    """Where the number of candidates is not known before a run, some that failed the gate are appended."""
    torch.manual_seed(0)
    wrapped = wrap_module(
        _Small(),
        preprocess=PreprocessSpec(
            mean=(128, 128, 128), std=(64, 64, 64), shortest=64, longest=256, size_rule=SizeRule.TORCHVISION
        ),
        decode=DecodeSpec(profile=PROFILES["mmdetection"], score_threshold=0.4, iou_threshold=0.5, strides=(8, 16, 32)),
        class_names=tuple("abcde"),
    )
    options = ExportOptions(tail=Tail.NMS, nms_form=NmsForm.STATIC, nms_boxes=250, simplify=False)
    static = export_onnx(wrapped, tmp_path / "static.onnx", options=options)
    run, reference = open_model(static.path).run, ExportableFcos(wrapped.model, wrapped.contract)
    for height, width in ((32, 32), (64, 96), (128, 128)):  # 105, 630 and 1680 pairs of a location and a class
        images = np.random.default_rng(1).integers(0, 256, (1, 3, height, width), np.uint8)
        letterbox = Letterbox(height, width, height, width)
        outputs = run({"images": images, "image_sizes": image_sizes_row(letterbox)[None]})
        with torch.inference_mode():
            tensors = [tensor.numpy() for tensor in reference(torch.from_numpy(images))]
        raw = dict(zip(reference.output_names, tensors, strict=True))
        detections, expected = (
            postprocess(tensors, contract, index=0, input_size=(height, width), letterbox=letterbox)
            for tensors, contract in ((outputs, static.contract), (raw, wrapped.contract))
        )
        assert outputs["settled"].all()
        assert 5 < len(detections) < 100 or height > 32
        assert detections.labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(detections.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(detections.boxes, expected.boxes, atol=1e-2)


def test_export_in_half_precision(export: Callable[..., OnnxExport]) -> None:
    made = export(precision=Precision.FP16)
    assert read_contract(made.path).precision is Precision.FP16
    assert made.file_bytes < 0.62 * export().file_bytes
    assert [check.step for check in made.checks] == ["export", "simplify", "convert to fp16"]


def test_a_graph_that_computes_something_else_is_refused(
    loaded: LoadedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch_onnx.trace

    def slightly_wrong(*args: object, **options: object) -> object:
        model = original(*args, **options)
        bias = next(i for i in model.graph.initializer if i.name.endswith("cls_logits.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.05), bias.name))
        return model

    monkeypatch.setattr(torch_onnx, "trace", slightly_wrong)
    with pytest.raises(StepCheckError, match=r"'export' differs from its source .*cls_logits\["):
        export_onnx(loaded, tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(
    loaded: LoadedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(torch_onnx, "compare", pytest.fail)
    with pytest.raises(ConfigError, match="Cannot write"):
        export_onnx(loaded, tmp_path / "file" / "model.onnx")


@pytest.mark.parametrize("opset", [13, 15, 24])
def test_an_unsupported_opset_is_refused(opset: int) -> None:
    with pytest.raises(ConfigError, match=f"Opset {opset} is not supported"):
        ExportOptions(opset=opset)


def test_a_size_that_is_no_multiple_of_32_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"130x160 is not a multiple of 32"):
        load_checkpoint(tiny_checkpoint, options=CheckpointOptions(input_size=(130, 160)))


def test_a_model_that_torch_cannot_trace_is_an_export_error(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    class Branching(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> object:
            return [] if images.sum() > 0 else None

    with pytest.raises(ExportError, match="torch cannot export this model"):
        export_onnx(_Stand(Branching(), loaded.contract), tmp_path / "m.onnx")


class _Stand:
    def __init__(self, model: object, contract: object) -> None:
        self.model, self.contract = model, replace(contract)


torch = pytest.importorskip("torch")
pytest.importorskip("onnx")


class Small(torch.nn.Module):
    input_names = ("images",)
    output_names = ("result",)

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    "function",
    [lambda x: ((x > 1) | (x < -1)).to(torch.float32), lambda x: (x * 2).relu_() + 1],
    ids=["an operator without translation", "a change in place"],
)
def test_what_has_no_translation_is_decomposed(decomposed: list[object], function: Callable[[Any], Any]) -> None:
    images = torch.linspace(-3, 3, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    before = len(decomposed)
    model = trace(Small(function).eval(), (images,), opset=17, dynamic_batch=False)
    assert len(decomposed) == before + 1
    decomposed.pop()
    np.testing.assert_array_equal(onnx_runner(model)({"images": images.numpy()})["result"], function(images).numpy())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"opset": 21},
        {"tail": Tail.CANDIDATES, "batch": 2},
        {"tail": Tail.NMS, "batch": None},
        {"tail": Tail.NMS, "nms_form": NmsForm.STATIC},
    ],
    ids=["raw", "opset-21", "candidates", "nms", "static-nms"],
)
def test_an_fcos_is_traced_once(
    export: Callable[..., OnnxExport], decomposed: list[object], options: dict[str, object]
) -> None:
    export(**options)
    assert decomposed == []


def test_the_collector_pauses_for_an_export_and_goes_on_after_it(
    export: Callable[..., OnnxExport], collector_enabled: set[bool]
) -> None:
    export()
    assert collector_enabled == {False}
    assert gc.isenabled()
