"""TensorRT builds: what they read and work out by themselves, and real builds of TensorRT-RTX on small graphs.

TensorRT-RTX builds without a GPU; the graphs have two convolutions.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters._tensorrt_options import ProfileShapes, check_calibration_cache, profile_shapes
from exporters.tensorrt import BuildMonitor, EngineLayer, convolution_inputs, parse_layer_list, timing_cache_file
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import BackendLoadError, BuildError, ConfigError, FcosDeployError
from fcos_deploy.core.exporter import BuildOptions, BuildRequest, BuildResult, SizeRange, get_exporter
from fcos_deploy.core.preprocess import PreprocessSpec


def test_layer_list_is_read() -> None:
    """From a build of TensorRT-RTX 1.7.1: one convolution in INT8, one kernel that is none."""
    text = (Path(__file__).parents[1] / "data/tensorrt_layers.txt").read_text()
    layers = parse_layer_list(text)
    assert layers == [EngineLayer("correlation", ("Int8",)), EngineLayer("kgen", ("Float",))]
    assert convolution_inputs([*layers, layers[0]]) == {"Int8": 2}


def test_profile_shapes_by_hand() -> None:
    shapes = profile_shapes(
        {"images": (None, 3, 64, None), "image_sizes": (None, 4)},
        options=BuildOptions(batch=SizeRange(1, 4, 8), width_range=(32, 64, 96)),
        size_divisor=32,
    )
    assert shapes["images"] == ProfileShapes((1, 3, 64, 32), (4, 3, 64, 64), (8, 3, 64, 96))
    assert shapes["image_sizes"] == ProfileShapes((1, 4), (4, 4), (8, 4))
    assert str(shapes["image_sizes"]) == "1x4/4x4/8x4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": SizeRange(4, 2, 8)}, "The batch range must be"),
        ({"batch": SizeRange(0, 1, 1)}, "The batch range must be"),
        ({"height_range": (64, 64, 64)}, "The width of input 'images' is dynamic"),
        ({"height_range": (64, 65, 96), "width_range": (64, 64, 64)}, "multiples of 32"),
        ({"height_range": (96, 64, 96), "width_range": (64, 64, 64)}, "The height range must be"),
    ],
)
def test_bad_profiles_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profile_shapes({"images": (None, 3, None, None)}, options=BuildOptions(**options), size_divisor=32)


def test_only_the_outermost_phase_moves_the_bar() -> None:
    seen: list[tuple[str, int, int]] = []
    monitor = BuildMonitor(lambda *step: seen.append(step))
    monitor.phase_start("build", None, 2)
    monitor.phase_start("fuse", "build", 9)
    assert monitor.step_complete("fuse", 0)
    monitor.phase_finish("fuse")
    assert monitor.step_complete("build", 0)
    monitor.stop()
    assert not monitor.step_complete("build", 1)
    assert seen == [("build", 0, 2), ("build", 1, 2), ("build", 2, 2)]


@pytest.mark.parametrize(
    ("content", "version", "message"),
    [
        ("TRT-8602-EntropyCalibration2\nimages: 3caa54fc\n", "10.3.0", "this TensorRT is 100300"),
        ("images: 3caa54fc\n", "10.3.0", "its first line is not"),
        ("", "10.3.0", "its first line is not"),
        ("TRT-100300-EntropyCalibration2\nimages 3caa54fc\n", "10.3.0", "Line 2"),
    ],
)
def test_calibration_caches_that_would_be_ignored_are_refused(
    content: str, version: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.calibrate"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        check_calibration_cache(path, version=version)


@pytest.mark.parametrize(("number", "version"), [("100300", "10.3.0"), ("8602", "8.6.2"), ("101401", "10.14.1.48")])
def test_a_calibration_cache_of_this_version_is_taken(number: str, version: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.calibrate"
    path.write_text(f"TRT-{number}-EntropyCalibration2\nimages: 3caa54fc\n/a/relu: 0\n")
    check_calibration_cache(path, version=version)


def test_timing_caches_are_kept_per_device_and_version() -> None:
    folder = Path("timings")
    orin = timing_cache_file(folder, version="10.3.0", devices=["cuda:0 Orin (sm_87)"])
    assert orin == folder / "cuda-0-Orin-sm-87.tensorrt-10.3.0.timing"
    assert timing_cache_file(folder, version="10.3.0", devices=["cuda:0 Thor (sm_110)"]) != orin
    assert timing_cache_file(folder, version="10.13.3", devices=["cuda:0 Orin (sm_87)"]) != orin
    assert timing_cache_file(Path("my.cache"), version="10.3.0", devices=[]) == Path("my.cache")


CONTRACT = ModelContract(
    class_names=("cell",),
    preprocess=PreprocessSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), height=64, width=64),
    decode=DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.05, iou_threshold=0.6),
)
Axis = int | str


def write_graph(
    path: Path,
    *,
    shape: tuple[Axis, ...] = (1, 3, 64, 64),
    precision: Precision = Precision.FP32,
    nms: bool = False,
    placement: str = "",
) -> Path:
    """uint8 images -> two 3x3 convolutions with 16 channels -> float32, or the NMS operator behind them."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    half = precision is Precision.FP16
    nodes = [helper.make_node("Cast", ["images"], ["x0"], to=types.FLOAT16 if half else types.FLOAT)]
    weights: list[Any] = []
    for index, channels in enumerate((3, 16)):
        nodes += convolution(helper, onnx.numpy_helper, weights, index=index, channels=channels, precision=precision)
    nodes.append(helper.make_node("Cast", ["x2"], ["features"], to=types.FLOAT))
    output = helper.make_tensor_value_info("features", types.FLOAT, [shape[0], 16, *shape[2:]])
    if nms:
        nodes += nms_nodes(helper, onnx.numpy_helper, weights)
        output = helper.make_tensor_value_info("selected", types.INT64, ["n", 3])
    graph = helper.make_graph(
        nodes, "two", [helper.make_tensor_value_info("images", types.UINT8, list(shape))], [output], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, contract_to_text(replace(CONTRACT, precision=precision, placement=placement))
    onnx.save(model, path)
    return path


def convolution(
    helper: Any, arrays: Any, weights: list[Any], *, index: int, channels: int, precision: Precision
) -> Any:
    source, names = f"x{index}", [f"weight{index}"]
    weight = np.random.default_rng(index).normal(0, 0.1, (16, channels, 3, 3)).astype(np.float32)
    nodes = []
    if precision is Precision.INT8:
        constants = {
            "wq": np.clip(np.round(weight / 0.004), -127, 127).astype(np.int8),
            "ws": np.full(16, 0.004, np.float32),
            "wz": np.zeros(16, np.int8),
            "as": np.float32(0.05),
            "az": np.int8(0),
        }
        weights += [arrays.from_array(np.asarray(value), f"{name}{index}") for name, value in constants.items()]
        nodes = [
            helper.make_node("DequantizeLinear", [f"{n}{index}" for n in ("wq", "ws", "wz")], names, axis=0),
            helper.make_node("QuantizeLinear", [source, f"as{index}", f"az{index}"], [f"q{index}"]),
            helper.make_node("DequantizeLinear", [f"q{index}", f"as{index}", f"az{index}"], [f"dq{index}"]),
        ]
        source = f"dq{index}"
    else:
        weights.append(
            arrays.from_array(weight.astype(np.float16 if precision is Precision.FP16 else np.float32), names[0])
        )
    nodes.append(helper.make_node("Conv", [source, *names], [f"c{index}"], pads=[1] * 4, name=f"/conv{index}/Conv"))
    return [*nodes, helper.make_node("Relu", [f"c{index}"], [f"x{index + 1}"])]


def nms_nodes(helper: Any, arrays: Any, weights: list[Any]) -> list[Any]:
    constants = {
        "four": np.array([1, -1, 4], np.int64),
        "one": np.array([1, 1, -1], np.int64),
        "most": np.int64(10),
        "iou": np.float32(0.5),
        "least": np.float32(0.1),
    }
    weights += [arrays.from_array(np.asarray(value), name) for name, value in constants.items()]
    return [
        helper.make_node("Reshape", ["features", "four"], ["boxes"]),
        helper.make_node("ReduceMax", ["boxes"], ["best"], axes=[2], keepdims=0),
        helper.make_node("Reshape", ["best", "one"], ["scores"]),
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "iou", "least"], ["selected"], name="/nms"),
    ]


def build(source: Path, output: Path, **options: Any) -> BuildResult:
    pytest.importorskip("tensorrt_rtx")
    request = BuildRequest(source=source, output=output, options=BuildOptions(**options))
    return get_exporter("tensorrt-rtx").build(request)


@pytest.mark.parametrize(
    ("precision", "placement", "taken"),
    [(Precision.FP32, "", "Float"), (Precision.FP16, "", "Half"), (Precision.INT8, "portable", "Int8")],
)
@pytest.mark.parametrize("capability", ["8.6", "8.9", "12.0"])
def test_convolutions_take_the_precision_of_the_graph(
    precision: Precision, placement: str, taken: str, capability: str, tmp_path: Path
) -> None:
    source = write_graph(tmp_path / "m.onnx", precision=precision, placement=placement)
    result = build(source, tmp_path / "m.engine", compute_capabilities=(capability,))
    assert json.loads(result.record["convolution_inputs"]) == {taken: 2}


def test_engine_is_plain_and_its_contract_and_record_lie_beside_it(tmp_path: Path) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    result = build(write_graph(tmp_path / "m.onnx"), tmp_path / "new/m.engine", compute_capabilities=("8.6", "12.0"))
    assert result.files == (tmp_path / "new/m.engine", tmp_path / "new/m.json")
    assert read_contract(result.files[0]) == CONTRACT
    record = json.loads(result.files[1].read_text())["record"]
    assert record == result.record
    assert record["version"] == library.__version__
    assert record["compute_capabilities"] == "8.6,12.0"
    assert record["typing"] == "strong"
    assert not list(tmp_path.glob("**/*.partial*"))


def test_open_batch_and_size_get_a_profile(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "m.onnx", shape=("n", 3, "h", "w"))
    ranges = {"height_range": (64, 96, 128), "width_range": (64, 64, 64)}
    result = build(source, tmp_path / "m.engine", batch=SizeRange(1, 2, 4), **ranges)
    assert json.loads(result.record["shapes"]) == {"images": "1x3x64x64/2x3x96x64/4x3x128x64"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": SizeRange(2, 2, 2)}, "is fixed to 1 in the ONNX file, the build asks for 2/2/2"),
        ({"height_range": (64, 128, 128)}, "The height of input 'images' is fixed to 64"),
        ({"compute_capabilities": ("8.7",)}, "cannot build for compute capability '8.7'"),
        ({"compute_capabilities": ("86",)}, "cannot build for compute capability '86'"),
        ({"dla_core": 0}, "does not have a DLA"),
        ({"dla_strict": True}, "without a DLA core"),
        ({"version_compatible": True}, "does not have version-compatible engines"),
        ({"hardware_compatible": True}, "name several compute capabilities"),
        ({"timing_cache": Path("timing")}, "does not have a timing cache"),
        ({"calibration_cache": Path("cache")}, "has no calibrators"),
        ({"optimization_level": 6}, "must be 0 to 5, got 6"),
        ({"workspace_mib": 0}, "at least 1 MiB"),
        ({"precision": Precision.FP16}, "'m.onnx' is fp32, fp16 was asked for"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_graph(tmp_path / "m.onnx")
    with pytest.raises(ConfigError) as caught:
        build(source, tmp_path / "m.engine", **options)
    assert message in caught.value.message
    assert not (tmp_path / "m.engine").exists()


def test_wrong_capability_names_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot build for compute capability") as caught:
        build(write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine", compute_capabilities=("8.7",))
    assert "8.6, 8.9" in caught.value.hint
    assert "Jetson" in caught.value.hint


def test_operator_that_the_library_lacks_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"nms.* has no runners") as caught:
        build(write_graph(tmp_path / "m.onnx", nms=True), tmp_path / "m.engine")
    assert "--tail candidates" in caught.value.hint


def test_placement_for_another_runtime_is_refused(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "m.onnx", precision=Precision.INT8, placement="openvino")
    with pytest.raises(BackendLoadError, match="quantized for 'openvino'"):
        build(source, tmp_path / "m.engine")


def test_truncated_onnx_is_refused(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "m.onnx")
    source.write_bytes(source.read_bytes()[:-300])
    with pytest.raises(FcosDeployError, match="ONNX"):
        build(source, tmp_path / "m.engine")


def test_onnx_whose_payload_is_damaged_fails_with_the_parsers_words(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "m.onnx")
    content = source.read_bytes()
    source.write_bytes(content.replace(b"\x04Conv", b"\x04Xonv"))
    with pytest.raises(BuildError, match="Xonv"):
        build(source, tmp_path / "m.engine")


@pytest.mark.parametrize("output", ["/proc/no/such/m.engine", "folder"])
def test_unwritable_output_is_found_before_the_build(output: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    source = write_graph(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="Cannot write"):
        build(source, tmp_path / output if output == "folder" else Path(output))


OUT_OF_DISK = """
import resource, sys
from pathlib import Path
from fcos_deploy.core.exporter import BuildRequest
from fcos_deploy.core.exporter import get_exporter
from fcos_deploy.core.errors import ConfigError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    get_exporter("tensorrt-rtx").build(BuildRequest(source=Path(sys.argv[1]), output=Path(sys.argv[2])))
except ConfigError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The kernel's limit on the size of a file stands in for a full disk: writing fails half way, as there."""
    pytest.importorskip("tensorrt_rtx")
    source = write_graph(tmp_path / "m.onnx")
    command = [sys.executable, "-c", OUT_OF_DISK, str(source), str(tmp_path / "m.engine")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"Cannot write '{tmp_path / 'm.engine'}': File too large." in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    seen: list[tuple[str, int, int]] = []
    request = BuildRequest(
        source=write_graph(tmp_path / "m.onnx"),
        output=tmp_path / "m.engine",
        progress=lambda label, done, total: seen.append((label, done, total)),
    )
    get_exporter("tensorrt-rtx").build(request)
    assert len({label for label, _, _ in seen}) == 1
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] > 1


def test_a_progress_function_that_raises_stops_the_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")

    def progress(label: str, done: int, total: int) -> None:
        if done == 1:
            raise ValueError(f"{label} {done}/{total}")

    source, output = write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"
    with pytest.raises(ValueError, match="1/"):
        get_exporter("tensorrt-rtx").build(BuildRequest(source=source, output=output, progress=progress))
    assert not output.exists()


def test_ctrl_c_stops_the_build(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source, output = write_graph(tmp_path / "m.onnx"), tmp_path / "m.engine"

    def interrupt(label: str, done: int, total: int) -> None:
        if done == 1:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.5)  # longer than the main thread sleeps between two looks

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist's workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            get_exporter("tensorrt-rtx").build(BuildRequest(source=source, output=output, progress=interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not output.exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensorrt-build")]


def test_the_full_library_is_asked_for_where_only_stubs_are(tmp_path: Path) -> None:
    library = pytest.importorskip("tensorrt")
    if hasattr(library, "Runtime"):
        pytest.skip("TensorRT is installed")
    request = BuildRequest(source=write_graph(tmp_path / "m.onnx"), output=tmp_path / "m.engine")
    with pytest.raises(FcosDeployError, match="Only the type stubs"):
        get_exporter("tensorrt").build(request)
