"""``fcos-deploy build`` as users type it: from ONNX files and bundles, for device profiles, and as a trtexec line."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from calibration.placement import PLACEMENTS
from calibration.quantizers import quantize_qdq
from fcos_deploy.bundle import DEFAULT_GATES, ArtifactDraft, BundleWriter, Manifest, Provenance, RunDefaults, StepOutput
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.artifact import OnnxGraph, read_contract
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.onnx_file import save_onnx, with_contract

RUN = CliRunner()


def call(*words: object) -> Any:
    return RUN.invoke(build_app(), [str(word) for word in words])


@pytest.fixture(scope="module")
def bundle(mini_onnx: Path, mini_graph: Any, mini_calibration: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32 with the raw and (by its contract) the candidates tail, int8 for TensorRT and for ONNX Runtime's CPU."""

    def make(folder: Path) -> StepOutput:
        shutil.copyfile(mini_onnx, folder / "model.fp32.onnx")
        candidates = replace(read_contract(mini_onnx), tail=Tail.CANDIDATES)
        save_onnx(with_contract(OnnxGraph(mini_onnx).model, candidates), folder / "model.fp32.candidates.onnx")
        drafts = [draft(f"model.fp32{tail}.onnx", Precision.FP32) for tail in ("", ".candidates")]
        for placement in ("onnxruntime-cpu", "portable"):
            name = f"model.int8.{placement}.onnx"
            quantize_qdq(mini_graph, mini_calibration, folder / name, placement=PLACEMENTS[placement])
            drafts.append(draft(name, Precision.INT8, placement=placement))
        return StepOutput(artifacts=tuple(drafts))

    with BundleWriter(tmp_path_factory.mktemp("build") / "bundle") as writer:
        writer.step("export", inputs={}, make=make)
        return writer.finish(
            Manifest(
                name="mini",
                contract=read_contract(mini_onnx),
                provenance=Provenance(checkpoint="mini.pth", checkpoint_sha256="ab" * 32),
                defaults=RunDefaults(backend="onnxruntime", precision=Precision.INT8),
                gates=DEFAULT_GATES,
            )
        )


def draft(path: str, precision: Precision, *, placement: str = "") -> ArtifactDraft:
    return ArtifactDraft(path=path, kind=ArtifactKind.ONNX, precision=precision, parent="ab" * 32, placement=placement)


def trtexec(*words: object) -> list[str]:
    result = call("build", *words, "--trtexec")
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout)


def test_trtexec_line_for_a_board_takes_the_graph_that_tensorrt_reads(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.engine"
    line = trtexec(bundle, "--backend", "tensorrt", "-o", output, "--target", "jetson-orin-nano")
    assert line == [
        "trtexec",
        f"--onnx={bundle}/model.int8.portable.onnx",
        f"--saveEngine={output}",
        "--skipInference",
        "--stronglyTyped",
        "--noTF32",
        "--memPoolSize=workspace:1024",
    ]
    assert not output.exists()


def test_trtexec_line_has_the_options_given(bundle: Path, tmp_path: Path) -> None:
    options = ("--precision", "fp32", "--optimization-level", 5, "--tf32", "--version-compatible")
    line = trtexec(bundle, "--backend", "tensorrt", "-o", tmp_path / "m", "--target", "jetson-agx-orin", *options)
    assert line[1] == f"--onnx={bundle}/model.fp32.candidates.onnx"  # the tail of the profile
    assert {"--builderOptimizationLevel=5", "--versionCompatible"} <= set(line)
    assert "--noTF32" not in line


def test_a_calibration_cache_goes_with_the_unquantized_graph(bundle: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.cache"
    cache.write_text("TRT-100300-EntropyCalibration2\nimages: 3caa54fc\n")
    target = ("--target", "jetson-orin-nx", "--calibration-cache", cache, "--dla-core", 0)
    line = trtexec(bundle, "--backend", "tensorrt", "-o", tmp_path / "m", *target)
    assert line[1].endswith("model.fp32.candidates.onnx")
    assert {"--fp16", "--int8", f"--calib={cache}", "--useDLACore=0", "--allowGPUFallback"} <= set(line)


def test_open_axes_become_shapes(mini_onnx: Path, tmp_path: Path) -> None:
    model = OnnxGraph(mini_onnx).model
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    save_onnx(model, tmp_path / "open.onnx")
    words = (tmp_path / "open.onnx", "--backend", "tensorrt", "-o", tmp_path / "m", "--batch", "1,2,4")
    shapes = [word for word in trtexec(*words, "--target", "jetson-thor") if "Shapes" in word]
    sizes = "x".join(str(d.dim_value) for d in model.graph.input[0].type.tensor_type.shape.dim[1:])
    assert shapes == [f"--{name}Shapes=images:{n}x{sizes}" for name, n in (("min", 1), ("opt", 2), ("max", 4))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "openvino", "--trtexec"), "trtexec builds TensorRT engines, not those of 'openvino'."),
        (("--backend", "tensorrt", "--precision", "fp16"), "'model.fp32.onnx' is fp32, fp16 was asked for"),
        (("--backend", "tensorrt", "--target", "jetson-nano"), "There is no device profile 'jetson-nano'"),
        (("--backend", "openvino", "--target", "jetson-thor"), "backend 'openvino' does not run there"),
        (("--backend", "tensorrt-rtx", "--target", "jetson-thor"), "backend 'tensorrt-rtx' does not run there"),
        (("--backend", "tensorrt-rtx", "--compute-capability", "8.7"), "cannot build for compute capability '8.7'"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    words: tuple[str, ...], message: str, bundle: Path, tmp_path: Path
) -> None:
    result = call("build", bundle, "-o", tmp_path / "m.engine", *words)
    assert result.exit_code != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_engine_from_a_bundle_for_a_profile(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    output = tmp_path / "m.engine"
    result = call("build", bundle, "--backend", "tensorrt-rtx", "-o", output, "--target", "gpu-ada", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)["record"]
    assert record["compute_capabilities"] == "8.9"
    assert set(json.loads(record["convolution_inputs"])) == {"Int8"}
    assert read_contract(output).placement == "portable"


def nms_tail(mini_onnx: Path, output: Path, *, operator: str = "") -> Path:
    """The graph as an nms tail by its contract, in its static form or with the operator."""
    onnx = pytest.importorskip("onnx")
    model = OnnxGraph(mini_onnx).model
    if operator:
        model.graph.node.append(onnx.helper.make_node(operator, ["images"], ["unused"]))
    output.write_bytes(with_contract(model, replace(read_contract(mini_onnx), tail=Tail.NMS)).SerializeToString())
    return output


def test_static_nms_builds_where_there_is_no_operator(mini_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = nms_tail(mini_onnx, tmp_path / "m.onnx")
    words = ("--backend", "tensorrt-rtx", "-o", tmp_path / "m.engine", "--target", "gpu-ada")
    result = call("build", source, *words)
    assert result.exit_code == 0, result.output
    assert read_contract(tmp_path / "m.engine").tail is Tail.NMS


@pytest.mark.parametrize(
    ("backend", "target", "message"),
    [
        ("tensorrt-rtx", "gpu-ada", "TensorRT-RTX has no NMS operator"),
        ("openvino", "intel-npu", "NMS gives outputs of unknown size"),
    ],
)
def test_form_of_nms_that_the_target_lacks_is_refused(
    backend: str, target: str, message: str, mini_onnx: Path, tmp_path: Path
) -> None:
    source = nms_tail(mini_onnx, tmp_path / "m.onnx", operator="NonMaxSuppression")
    precision = ("--precision", "fp16") if target == "intel-npu" else ()
    result = call("build", source, "--backend", backend, "-o", tmp_path / "m.out", "--target", target, *precision)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "nms-operator" in result.stderr


def test_nms_operator_is_allowed_where_the_library_has_it(mini_onnx: Path, tmp_path: Path) -> None:
    source = nms_tail(mini_onnx, tmp_path / "m.onnx", operator="NonMaxSuppression")
    line = trtexec(source, "--backend", "tensorrt", "-o", tmp_path / "m", "--target", "jetson-orin-nano")
    assert line[1] == f"--onnx={source}"


def test_build_writes_an_ir_that_predicts(tiny_onnx: Path, smooth_images: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    output = tmp_path / "half.xml"
    done = call("build", tiny_onnx, "--backend", "openvino", "-o", output, "--precision", "fp16", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert [Path(file).name for file in document["files"]] == ["half.xml", "half.bin", "half.json"]
    assert document["record"]["weights"] == "fp16"
    assert read_contract(output).precision is Precision.FP16
    assert call("predict", output, smooth_images / "b" / "00.png", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--backend", "coreml", "-o", "m.mlmodel"), 2, "There is no exporter 'coreml'"),
        (("--backend", "openvino", "-o", "m.bin"), 2, "is named '*.xml'"),
        (("--backend", "openvino", "-o", "m.xml", "--dla-core", "0"), 2, "no option 'dla_core'"),
        (("--backend", "onnxruntime", "-o", "m.onnx", "--batch", "4,2,1"), 2, "in order"),
        (("--backend", "onnxruntime", "-o", "m.onnx", "--batch", "many"), 2, "got 'many'"),
        (("--backend", "openvino", "-o", "m.xml", "--precision", "int8"), 2, "does not make it INT8"),
        (("--backend", "openvino", "-o", "m.xml", "--target", "abacus"), 2, "no device profile 'abacus'"),
    ],
)
def test_options_that_cannot_be_meant(
    tiny_onnx: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    placed = [str(tmp_path / one) if one.startswith("m.") else one for one in arguments]
    done = call("build", tiny_onnx, *placed)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
