"""Packages for serving engines: Triton, OpenVINO Model Server, DeepStream, DL Streamer.

DeepStream itself is not here. Its parser is compiled and called through ctypes: against NVIDIA's headers where
``FCOS_DEPLOY_DEEPSTREAM_INCLUDE`` names their folders, as in PATH, and elsewhere against the few declarations that it
uses, written down below by their public documentation.
"""

from __future__ import annotations

import configparser
import ctypes
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fcos_deploy import Detector
from fcos_deploy.bundle import Artifact, StepRecord, open_bundle
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.detections import pairwise_iou
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype
from fcos_deploy.serving import ServingOptions, package_bundle
from fcos_deploy.serving.gstreamer import PACKAGER
from fcos_deploy.serving.package import ServedModel
from fcos_deploy.serving.servers import config_text

DEEPSTREAM, DLSTREAMER = PACKAGER


def _config(bundle: Path, output: Path, options: ServingOptions | None = None) -> str:
    with open_bundle(bundle) as opened:
        package_bundle(opened, server="triton", output=output, options=options)
    return (output / "tiny" / "config.pbtxt").read_text()


def test_the_repository_has_the_layout_that_triton_loads(tiny_bundle: Path, tmp_path: Path) -> None:
    _config(tiny_bundle, tmp_path / "models", ServingOptions(version=3))
    files = sorted(p.relative_to(tmp_path / "models").as_posix() for p in (tmp_path / "models").rglob("*"))
    assert files == ["tiny", "tiny/3", "tiny/3/model.onnx", "tiny/config.pbtxt", "tiny/labels.txt"]
    assert (tmp_path / "models/tiny/3/model.onnx").read_bytes() == (tiny_bundle / "model.fp32.onnx").read_bytes()
    assert (tmp_path / "models/tiny/labels.txt").read_text() == "red\nwhite\nplatelet\n"


def test_a_fixed_batch_is_written_into_the_dimensions(tiny_bundle: Path, tmp_path: Path) -> None:
    config = _config(tiny_bundle, tmp_path / "m", ServingOptions(instances=2))
    assert "max_batch_size: 0\n" in config
    assert 'input { name: "images", data_type: TYPE_UINT8, dims: [1, 3, 128, 160] }' in config
    # 128x160 has 16*20 + 8*10 + 4*5 + 2*3 + 1*2 locations.
    assert 'output { name: "distances", data_type: TYPE_FP32, dims: [1, 428, 4] }' in config
    assert "dims: [1, 428, 3], label_filename" in config
    assert "instance_group { count: 2, kind: KIND_CPU }" in config
    assert "dynamic_batching" not in config
    assert "model_warmup" in config


def test_batches_are_refused_where_the_model_takes_none(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1, 8 was asked for"):
        _config(tiny_bundle, tmp_path / "m", ServingOptions(max_batch=8))
    assert not (tmp_path / "m").exists()


def test_gpus_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    config = _config(tiny_bundle, tmp_path / "m", ServingOptions(gpus=(0, 2)))
    assert "kind: KIND_GPU, gpus: [0, 2]" in config


def test_a_tensorrt_engine_is_served_on_gpus_without_a_number(tiny_bundle: Path, tmp_path: Path) -> None:
    """Triton refuses a model of its tensorrt backend on KIND_CPU."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "engine"))
    with open_bundle(path) as opened:
        (artifact,) = opened.manifest.artifacts
        model = ServedModel(
            name="tiny",
            path=opened.path(artifact.path),
            companions=(),
            artifact=replace(artifact, kind=ArtifactKind.TENSORRT_ENGINE, backend="tensorrt"),
            contract=opened.manifest.contract,
            options=ServingOptions(),
        )
    assert "instance_group { count: 1, kind: KIND_GPU }" in config_text(model)


def test_tritons_own_definition_accepts_the_text(tiny_bundle: Path, tmp_path: Path) -> None:
    """With NVIDIA's client installed, its protobuf of the model configuration parses what was written."""
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse(_config(tiny_bundle, tmp_path / "m"), model_config_pb2.ModelConfig())
    assert (message.name, message.backend) == ("tiny", "onnxruntime")
    assert list(message.input[0].dims) == [1, 3, 128, 160]
    assert message.model_warmup[0].inputs["images"].random_data
    assert "class_names" in message.parameters["fcos_deploy.contract"].string_value


def test_a_folder_in_use_and_an_unknown_server_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        _config(tiny_bundle, tmp_path / "m")
    with open_bundle(tiny_bundle) as opened, pytest.raises(ConfigError, match="no packager 'torchserve'"):
        package_bundle(opened, server="torchserve", output=tmp_path / "n")


@pytest.mark.parametrize("name", ["../up", "a/b", " ", ".hidden"])
def test_a_name_that_is_a_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        ServingOptions(name=name)


def test_repository_and_configuration_belong_together(tiny_bundle: Path, tmp_path: Path) -> None:
    with open_bundle(tiny_bundle) as bundle:
        package_bundle(bundle, server="ovms", output=tmp_path / "m", options=ServingOptions(name="cells", instances=4))
    (entry,) = json.loads((tmp_path / "m" / "config.json").read_text())["model_config_list"]
    assert entry["config"]["base_path"] == "/models/cells"
    assert entry["config"]["nireq"] == 4
    assert entry["config"]["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert (tmp_path / "m" / "cells" / "1" / "model.onnx").is_file()
    contract = json.loads((tmp_path / "m" / "cells" / "contract.json").read_text())
    assert contract["class_names"] == ["red", "white", "platelet"]


@pytest.mark.parametrize("options", [ServingOptions(max_batch=4), ServingOptions(gpus=(0,))])
def test_what_the_server_cannot_do_is_refused(tiny_bundle: Path, tmp_path: Path, options: ServingOptions) -> None:
    with open_bundle(tiny_bundle) as bundle, pytest.raises(ConfigError, match="OpenVINO Model Server"):
        package_bundle(bundle, server="ovms", output=tmp_path / "m", options=options)


HEADER = """
#pragma once
#include <string>
#include <vector>
struct NvDsInferDims { unsigned numDims; unsigned d[8]; unsigned numElements; };
struct NvDsInferLayerInfo {
    int dataType; NvDsInferDims inferDims; int bindingIndex; const char* layerName; void* buffer; int isInput;
};
struct NvDsInferNetworkInfo { unsigned width, height, channels; };
struct NvDsInferParseDetectionParams {
    unsigned numClassesConfigured;
    std::vector<float> perClassPreclusterThreshold, perClassPostclusterThreshold;
};
struct NvDsInferObjectDetectionInfo {
    unsigned classId; float left, top, width, height, detectionConfidence, rotation_angle;
};
#define CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(name) static_assert(true, "")
"""
CALLER = """
extern "C" int call(float* boxes, float* scores, int* labels, int* count, int limit, float* out) {
    auto layer = [&](const char* name, void* data) {
        NvDsInferLayerInfo info{};
        info.layerName = name; info.buffer = data; info.inferDims.numElements = static_cast<unsigned>(limit);
        return info;
    };
    std::vector<NvDsInferObjectDetectionInfo> found;
    NvDsInferParseDetectionParams params{3, {0.3F, 0.3F, 0.6F}, {}};
    if (!NvDsInferParseFcos({layer("num_detections", count), layer("labels", labels), layer("boxes", boxes),
                             layer("scores", scores)}, {160, 128, 3}, params, found)) return -1;
    for (size_t i = 0; i < found.size(); ++i) {
        const auto& o = found[i];
        const float row[6] = {o.left, o.top, o.width, o.height, o.detectionConfidence, static_cast<float>(o.classId)};
        for (int k = 0; k < 6; ++k) out[6 * i + k] = row[k];
    }
    return static_cast<int>(found.size());
}
extern "C" bool sizes(float* rows, unsigned batch) {
    NvDsInferLayerInfo info{};
    info.layerName = "image_sizes"; info.buffer = rows;
    return NvDsInferInitializeInputLayers({info}, {160, 128, 3}, batch);
}
"""


def _served(contract: ModelContract, path: Path, options: ServingOptions | None = None) -> ServedModel:
    artifact = Artifact(
        path=path.name,
        kind=ArtifactKind.ONNX,
        precision=Precision.FP16,
        sha256="0" * 64,
        size=1,
        step=StepRecord(name="export"),
    )
    return ServedModel(
        name="m", path=path, companions=(), artifact=artifact, contract=contract, options=options or ServingOptions()
    )


def _write(contract: ModelContract, folder: Path, options: ServingOptions | None = None) -> Path:
    (folder / "src.onnx").write_bytes(b"x")
    (folder / "out").mkdir()
    DEEPSTREAM.write(_served(contract, folder / "src.onnx", options), folder / "out")
    return folder / "out"


def _read(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read_string(path.read_text())
    return parser


@pytest.fixture
def nms_contract(bundle_contract: ModelContract) -> ModelContract:
    return dataclasses.replace(bundle_contract, tail=Tail.NMS)


def test_the_configuration_follows_from_the_contract(nms_contract: ModelContract, tmp_path: Path) -> None:
    folder = _write(nms_contract, tmp_path)
    infer, prepare = _read(folder / "config_infer.txt"), _read(folder / "config_preprocess.txt")
    assert infer["property"]["onnx-file"] == "model.onnx"
    assert infer["property"]["network-mode"] == "2"
    assert infer["property"]["cluster-mode"] == "4"
    assert infer["property"]["infer-dims"] == "3;64;96"
    assert infer["property"]["output-blob-names"] == "boxes;scores;labels;num_detections"
    assert infer["class-attrs-all"]["pre-cluster-threshold"] == "0.2"
    assert prepare["property"]["network-input-shape"] == "1;3;64;96"
    assert prepare["property"]["tensor-data-type"] == "1"
    assert prepare["property"]["symmetric-padding"] == "0"
    assert prepare["user-configs"]["pixel-normalization-factor"] == "1.0"
    assert (folder / "labels.txt").read_text() == "cell\nplatelet\n"


def test_labels_are_named_by_class_channel_without_a_background(nms_contract: ModelContract, tmp_path: Path) -> None:
    """The engine's ``labels`` are channels: a background that no channel maps to is not in the file."""
    decode = dataclasses.replace(nms_contract.decode, label_map=(1, 2))
    names = ("background", "cell", "platelet")
    folder = _write(dataclasses.replace(nms_contract, class_names=names, decode=decode), tmp_path)
    assert (folder / "labels.txt").read_text() == "cell\nplatelet\n"
    assert _read(folder / "config_infer.txt")["property"]["num-detected-classes"] == "2"


def test_every_stream_is_detected_on_in_one_batch(nms_contract: ModelContract, tmp_path: Path) -> None:
    """One group takes all sources as whole frames, and what it joins is the batch that nvinfer expects."""
    folder = _write(nms_contract, tmp_path, ServingOptions(max_batch=4))
    infer, prepare = _read(folder / "config_infer.txt"), _read(folder / "config_preprocess.txt")
    assert [name for name in prepare.sections() if name.startswith("group-")] == ["group-0"]
    group = prepare["group-0"]
    assert next(iter(group)) == "src-ids"
    assert (group["src-ids"], group["process-on-roi"], group["draw-roi"]) == ("-1", "0", "0")
    assert not any(key.startswith("roi-params-src") for key in group)
    assert prepare["property"]["process-on-frame"] == "1"
    assert prepare["property"]["network-input-shape"] == "4;3;64;96"
    assert infer["property"]["batch-size"] == "4"
    assert prepare["property"]["target-unique-ids"] == infer["property"]["gie-unique-id"]
    assert infer["property"]["input-tensor-from-meta"] == "1"


def test_float_input_is_normalised_by_one_factor(nms_contract: ModelContract, tmp_path: Path) -> None:
    spec = dataclasses.replace(
        nms_contract.preprocess,
        input_dtype=InputDtype.FLOAT32,
        channel_order=ChannelOrder.BGR,
        pixel_scale=1.0,
        mean=(102.9801, 115.9465, 122.7717),
        std=(2.0, 2.0, 2.0),
    )
    prepare = _read(_write(nms_contract.with_preprocess(spec), tmp_path) / "config_preprocess.txt")
    assert prepare["user-configs"]["pixel-normalization-factor"] == "0.5"
    assert prepare["user-configs"]["offsets"] == "102.9801;115.9465;122.7717"
    assert prepare["property"]["network-color-format"] == "1"


def test_a_deviation_per_channel_is_refused_for_float_input(nms_contract: ModelContract, tmp_path: Path) -> None:
    spec = dataclasses.replace(nms_contract.preprocess, input_dtype=InputDtype.FLOAT32)
    with pytest.raises(ConfigError, match="divides all channels by one number"):
        _write(nms_contract.with_preprocess(spec), tmp_path)


def test_another_tail_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with open_bundle(tiny_bundle) as bundle, pytest.raises(ConfigError, match="needs the nms tail"):
        package_bundle(bundle, server="deepstream", output=tmp_path / "m")


@pytest.fixture
def parser(nms_contract: ModelContract, tmp_path: Path) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = _write(nms_contract, tmp_path)
    headers = os.environ.get("FCOS_DEPLOY_DEEPSTREAM_INCLUDE", str(tmp_path)).split(os.pathsep)
    (tmp_path / "nvdsinfer_custom_impl.h").write_text(HEADER)
    source = folder / "nvdsinfer_fcos.cpp"
    source.write_text(source.read_text() + CALLER)
    library = tmp_path / "parser.so"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC", "-shared"]
    includes = [word for header in headers for word in ("-isystem", header)]
    subprocess.run([*command, *includes, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def _parse(parser: ctypes.CDLL, rows: list[tuple[float, float, float, float, float, int]], *, count: int) -> np.ndarray:
    table = np.zeros((5, 6), np.float32)
    table[: len(rows)] = rows
    boxes, scores = np.ascontiguousarray(table[:, :4]), np.ascontiguousarray(table[:, 4])
    labels, number, out = table[:, 5].astype(np.int32), np.array([count], np.int32), np.zeros((5, 6), np.float32)
    arrays = [array.ctypes.data_as(ctypes.c_void_p) for array in (boxes, scores, labels, number)]
    found = parser.call(*arrays, 5, out.ctypes.data_as(ctypes.c_void_p))
    assert found >= 0
    return out[:found]


def test_boxes_become_objects_clipped_to_the_network_input(parser: ctypes.CDLL) -> None:
    rows = [(10, 20, 30, 60, 0.9, 1), (-5, -5, 200, 140, 0.7, 2)]
    found = _parse(parser, rows, count=2)
    np.testing.assert_allclose(found, [[10, 20, 20, 40, 0.9, 1], [0, 0, 160, 128, 0.7, 2]], atol=1e-5)


def test_padding_thresholds_and_unknown_classes_are_left_out(parser: ctypes.CDLL) -> None:
    rows = [
        (0, 0, 9, 9, 0.5, 2),
        (0, 0, 9, 9, 0.2, 0),
        (0, 0, 9, 9, 0.9, 7),
        (0, 0, 9, 9, 0.9, -1),
        (5, 5, 5, 9, 0.9, 0),
    ]
    assert len(_parse(parser, rows, count=5)) == 0
    assert len(_parse(parser, [(0, 0, 9, 9, 0.9, 0)] * 5, count=2)) == 2


def test_a_count_beyond_the_tensor_is_not_believed(parser: ctypes.CDLL) -> None:
    assert len(_parse(parser, [(0, 0, 9, 9, 0.9, 0)] * 5, count=1_000_000)) == 5
    assert len(_parse(parser, [(0, 0, 9, 9, 0.9, 0)] * 5, count=-3)) == 0


def test_the_second_input_is_filled_with_the_canvas(parser: ctypes.CDLL) -> None:
    rows = np.zeros((2, 4), np.float32)
    parser.sizes.restype = ctypes.c_bool
    assert parser.sizes(rows.ctypes.data_as(ctypes.c_void_p), 2)
    np.testing.assert_array_equal(rows, [[128, 160, 128, 160]] * 2)


# What DL Streamer requires of model-proc 2.2.0 (src/gst/bins/model_proc/model_proc_schema.h), restated.
_MODEL_PROC = {
    "type": "object",
    "required": ["json_schema_version", "input_preproc", "output_postproc"],
    "properties": {
        "json_schema_version": {"type": "string", "pattern": r"^\d{1,10}\.\d{1,10}\.\d{1,10}$"},
        "input_preproc": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "layer_name": {"type": "string"},
                    "format": {"type": "string"},
                    "params": {"type": "object"},
                },
            },
        },
        "output_postproc": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "layer_name": {"type": "string"},
                    "attribute_name": {"type": "string"},
                    "labels": {"type": ["array", "string"], "items": {"type": ["string", "object"]}},
                },
            },
        },
    },
}


def _gvadetect(boxes: np.ndarray, labels: np.ndarray, *, threshold: float, iou_threshold: float) -> list[tuple]:
    """The converter 'boxes_labels', by its source: filter by the threshold, then suppress over all classes."""
    rows = [(row[:4], row[4], labels.view(np.uint32)[i]) for i, row in enumerate(boxes[0]) if row[4] >= threshold]
    rows.sort(key=lambda row: -row[1])
    kept: list[tuple] = []
    for box, score, label in rows:
        if all(float(pairwise_iou(box[None], other[0][None])[0, 0]) <= iou_threshold for other in kept):
            kept.append((box, score, label))
    return kept


def test_gvadetect_gets_the_detections_of_the_model(
    tiny_export: Callable[..., Path], smooth_images: Path, tmp_path: Path
) -> None:
    """The model as it is converted, run by OpenVINO and read by the converter's rules, gives what the host decodes."""
    ov = pytest.importorskip("openvino")
    jsonschema = pytest.importorskip("jsonschema")
    path = tiny_export(tail=Tail.NMS)
    contract = read_contract(path)
    DLSTREAMER.write(_served(contract, path), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("gvadetect.txt", "labels.txt", "model.bin", "model.xml", "model_proc.json")
    ]
    settings = json.loads((tmp_path / "model_proc.json").read_text())
    jsonschema.validate(settings, _MODEL_PROC)
    (post,) = settings["output_postproc"]
    assert (post["converter"], post["labels"]) == ("boxes_labels", list(contract.channel_names))
    element = dict(part.split("=", 1) for part in (tmp_path / "gvadetect.txt").read_text().split()[1:])
    assert float(element["threshold"]) == contract.decode.score_threshold
    compiled = ov.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert {name for output in compiled.outputs for name in output.names} == {"boxes", "labels"}
    assert compiled.output("boxes").shape == ov.Shape([1, contract.decode.max_detections, 5])
    assert compiled.output("labels").shape == ov.Shape([contract.decode.max_detections])
    found = 0
    with Detector.open(path, backend="openvino") as detector:
        for path in sorted(smooth_images.rglob("*.png"))[:4]:
            image = detector.read(path)[:64, :80]  # of the input's aspect ratio, so that nothing is padded
            feeds, letterboxes = detector.prepare([image])
            outputs = compiled([feeds["images"]])
            assert outputs["labels"].min() >= 0
            objects = _gvadetect(
                outputs["boxes"],
                outputs["labels"],
                threshold=float(element["threshold"]),
                iou_threshold=post["iou_threshold"],
            )
            expected = detector.detect(image)
            assert len(objects) == len(expected)
            boxes = letterboxes[0].to_image(np.float32([box for box, *_ in objects]).reshape(-1, 4))
            np.testing.assert_allclose(boxes, expected.boxes, atol=0.01)
            assert [int(label) for *_, label in objects] == expected.labels.tolist()
            found += len(objects)
    assert found > 20


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"tail": Tail.RAW}, "it needs the nms tail"),
        ({"max_batch": 4}, {}, "the labels of one image"),
        ({"gpus": (0,)}, {}, "no CUDA GPUs"),
        ({}, {"input_dtype": InputDtype.FLOAT32}, "of uint8 input"),
    ],
)
def test_what_gvadetect_cannot_do_is_refused(
    nms_contract: ModelContract,
    options: dict[str, object],
    changes: dict[str, object],
    message: str,
    tmp_path: Path,
) -> None:
    preprocess = {name: value for name, value in changes.items() if name != "tail"}
    contract = replace(nms_contract, preprocess=replace(nms_contract.preprocess, **preprocess))
    if "tail" in changes:
        contract = replace(contract, tail=changes["tail"])
    with pytest.raises(ConfigError, match=message):
        DLSTREAMER.write(_served(contract, tmp_path / "model.onnx", ServingOptions(**options)), tmp_path)
