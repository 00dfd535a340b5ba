"""``package --for cpp``: the headers compute what Python computes, and ``verify`` in C++ comes to the same verdict.

One build of everything: ``verify`` and the example with OpenVINO, ONNX Runtime and a stub of TensorRT, and a harness
with the address and undefined-behaviour sanitizers, which reads hostile files. ONNX Runtime's own headers are used
where ``make debian-tools`` brought them, and declarations of the functions that the adapter calls elsewhere.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fcos_deploy.accuracy.golden import check_golden, golden_standard
from fcos_deploy.bundle import GoldenDetections, open_bundle
from fcos_deploy.cli.app import build_app
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.contract import ModelContract, contract_to_text
from fcos_deploy.core.decode import PROFILES, DecodeSpec, HeadOutputs, decode, level_sizes, location_strides
from fcos_deploy.core.detections import Detections, postprocess
from fcos_deploy.core.enums import ComputeType, NmsForm, Tail
from fcos_deploy.core.errors import FcosDeployError
from fcos_deploy.core.preprocess import (
    ChannelOrder,
    InputDtype,
    Letterbox,
    PreprocessSpec,
    ResizeFilter,
    ResizeOrder,
    SizeRule,
    preprocess,
)
from fcos_deploy.core.serialize import from_json, to_json
from fcos_deploy.detector import Detector

TESTS = Path(__file__).parents[1]
SOURCES = TESTS.parent / "fcos_deploy" / "serving" / "cpp_sources"
EXAMPLE = TESTS.parent / "examples" / "cpp"
DATA = TESTS / "data" / "cpp"
FUZZ = int(os.environ.get("FCOS_DEPLOY_FUZZ", "1"))
DEBIAN_TOOLS = os.environ.get("FCOS_DEPLOY_DEBIAN_TOOLS", "")
ONNXRUNTIME_HEADERS = Path(DEBIAN_TOOLS) / "include" / "onnxruntime" if DEBIAN_TOOLS else DATA / "onnxruntime"
# Folders with TensorRT's and CUDA's own headers, as in PATH: nothing that a test can install has those of TensorRT.
TENSORRT_HEADERS = os.environ.get("FCOS_DEPLOY_TENSORRT_INCLUDE", "")
SIZE, CLASSES = (192, 256), 6
BOX = Letterbox(image_height=371, image_width=500, resized_height=190, resized_width=256)

if not (shutil.which("cmake") and shutil.which("g++")):
    pytest.skip("there is no C++ compiler with CMake here", allow_module_level=True)
openvino = pytest.importorskip("openvino")
onnxruntime = pytest.importorskip("onnxruntime")


class Programs:
    """The programs that were built."""

    def __init__(self, folder: Path) -> None:
        self.verify = folder / "package" / "fcos_deploy_verify"
        self.detect = folder / "example" / "detect"
        self._harness = folder / "harness"

    def harness(self, mode: str, lines: list[object]) -> list[dict[str, Any]]:
        """One answer a line."""
        done = subprocess.run(
            [self._harness, mode],
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(answers) == len(lines)
        return answers


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    folder = tmp_path_factory.mktemp("cpp-build")
    libraries = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this wheel of onnxruntime has no shared library of its own")
    runtime = folder / "libonnxruntime.so.1"  # the name that the library gives itself
    runtime.symlink_to(libraries[0])
    settings = {
        "PACKAGE": SOURCES,
        "EXAMPLE": EXAMPLE,
        "CMAKE_BUILD_TYPE": "None",
        "FCOS_DEPLOY_RUNTIMES": "openvino;onnxruntime;tensorrt",
        "OpenVINO_DIR": Path(openvino.__file__).parent / "cmake",
        "ONNXRUNTIME_INCLUDE_DIR": ONNXRUNTIME_HEADERS,
        "ONNXRUNTIME_LIBRARY": runtime,
        "TENSORRT_INCLUDE_DIR": DATA / "tensorrt",
        "CUDA_INCLUDE_DIR": DATA / "tensorrt",
        "TENSORRT_LIBRARY:STRING": "tensorrt_stub",
        "CUDART_LIBRARY:STRING": "tensorrt_stub",
    }
    configure = [
        "cmake",
        "-S",
        DATA,
        "-B",
        folder / "build",
        *(f"-D{name}={value}" for name, value in settings.items()),
    ]
    for command in (configure, ["cmake", "--build", folder / "build"]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Programs(folder / "build")


def _layout_of_onnxruntime(headers: Path, folder: Path) -> list[str]:
    """The place in ``OrtApi`` of each function, and the value of each constant, that the own declarations have."""
    declared = (DATA / "onnxruntime" / "onnxruntime_c_api.h").read_text().partition("struct OrtApiBase")[0]
    functions, values = re.findall(r"\(\*(\w+)\)", declared), re.findall(r"(\w+) = \d+", declared)
    lines = [f'std::printf("{name} %zu\\n", offsetof(OrtApi, {name}));' for name in functions]
    lines += [f'std::printf("{name} %d\\n", int{{{name}}});' for name in values]
    includes = "".join(f"#include <{name}>\n" for name in ("cstddef", "cstdio", "onnxruntime_c_api.h"))
    (folder / "layout.cpp").write_text(f"{includes}int main() {{ {' '.join(lines)} }}")
    command = ["g++", "-std=c++17", f"-I{headers}", folder / "layout.cpp", "-o", folder / "layout"]
    subprocess.run(command, check=True)
    done = subprocess.run([folder / "layout"], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == len(functions) + len(values) == 31
    return done.stdout.splitlines()


@pytest.mark.skipif(not DEBIAN_TOOLS, reason="FCOS_DEPLOY_DEBIAN_TOOLS names no headers: make debian-tools")
def test_the_declarations_of_onnxruntime_have_the_layout_of_its_own_header(tmp_path: Path) -> None:
    own = _layout_of_onnxruntime(DATA / "onnxruntime", tmp_path)
    assert own == _layout_of_onnxruntime(ONNXRUNTIME_HEADERS, tmp_path)


@pytest.mark.skipif(not TENSORRT_HEADERS, reason="FCOS_DEPLOY_TENSORRT_INCLUDE names no headers")
def test_the_adapter_of_tensorrt_compiles_with_its_own_headers(tmp_path: Path) -> None:
    program = tmp_path / "open.cpp"
    program.write_text(
        '#include "tensorrt_session.hpp"\n'
        "int main(int n, char** v) { return fcos_deploy::TensorRtSession(v[n - 1], {}, {}).description().empty(); }"
    )
    headers = [word for folder in TENSORRT_HEADERS.split(os.pathsep) for word in ("-isystem", folder)]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
    command = ["g++", "-std=c++17", "-fsyntax-only", *warnings, f"-I{SOURCES}", *headers, program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


# Decoding and suppression


def _contract(
    decode_spec: DecodeSpec, *, tail: Tail = Tail.RAW, classes: int = CLASSES, **fields: Any
) -> ModelContract:
    spec = PreprocessSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), height=SIZE[0], width=SIZE[1], size_divisor=2)
    names = tuple(f"class {index}" for index in range(100 if decode_spec.label_map else classes))
    return ModelContract(class_names=names, preprocess=spec, decode=decode_spec, tail=tail, **fields)


def _raw(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    count = sum(rows * columns for rows, columns in level_sizes(*SIZE, strides=(8, 16, 32, 64, 128)))
    return {
        "cls_logits": generator.normal(-2.5, 1.5, (2, count, CLASSES)).astype(np.float32),
        "distances": generator.uniform(0, 60, (2, count, 4)).astype(np.float32),
        "centerness": generator.normal(0.5, 1.0, (2, count, 1)).astype(np.float32),
    }


def _candidates(raw: dict[str, np.ndarray], spec: DecodeSpec) -> dict[str, np.ndarray]:
    """As a graph with the candidates tail pads them: gaps with the score -1."""
    head = HeadOutputs(*(raw[name][1] for name in ("cls_logits", "distances", "centerness")))
    chosen = decode(head, spec, input_size=SIZE)
    total = len(chosen.scores) + 30
    places = np.sort(np.random.default_rng(1).permutation(total)[: len(chosen.scores)])
    outputs = {
        "boxes": np.full((2, total, 4), 33, np.float32),
        "scores": np.full((2, total), -1, np.float32),
        "labels": np.zeros((2, total), np.int32),
    }
    for name, values in zip(outputs, (chosen.boxes, chosen.scores, chosen.channels), strict=True):
        outputs[name][1, places] = values
    return outputs


def _finished(raw: dict[str, np.ndarray], contract: ModelContract) -> dict[str, np.ndarray]:
    """As a graph with the nms tail pads them; rows behind the count are not to be read."""
    plain = replace(contract, tail=Tail.RAW, decode=replace(contract.decode, label_map=()))
    detections = postprocess(raw, plain, index=1, input_size=SIZE, letterbox=BOX)
    rows, count = len(detections) + 7, len(detections)
    scale = np.float32([BOX.scale_x, BOX.scale_y, BOX.scale_x, BOX.scale_y])
    outputs = {
        "boxes": np.full((2, rows, 4), np.nan, np.float32),
        "scores": np.zeros((2, rows), np.float32),
        "labels": np.full((2, rows), -1, np.int32),
        "num_detections": np.full((2, 1), count, np.int32),
        "settled": np.ones((2, 1), np.int32),
    }
    outputs["boxes"][1, :count] = detections.boxes * scale
    outputs["scores"][1, :count] = detections.scores
    outputs["labels"][1, :count] = detections.labels
    return outputs


Case = tuple[str, dict[str, np.ndarray], ModelContract, int, tuple[int, int], Letterbox]


def _synthetic_cases() -> Iterator[Case]:
    labels = tuple(range(90, 90 - 3 * CLASSES, -3))
    for seed, (name, profile) in enumerate(PROFILES.items()):
        common = {"profile": profile, "score_threshold": 0.2, "iou_threshold": 0.5}
        specs = {
            "plain": DecodeSpec(**common, max_detections=300),
            "crowded": DecodeSpec(**{**common, "score_threshold": 0.0}, pre_nms_top_k=50, max_detections=20),
            "labels": DecodeSpec(**common, pre_nms_top_k=40, label_map=labels, class_agnostic=True),
        }
        raw = _raw(seed)
        for kind, spec in specs.items():
            contract = _contract(spec)
            candidates = replace(contract, tail=Tail.CANDIDATES)
            yield f"{name} {kind} raw", raw, contract, 0, SIZE, BOX
            yield f"{name} {kind} candidates", _candidates(raw, spec), candidates, 1, SIZE, BOX
            form = NmsForm.STATIC if kind == "labels" else NmsForm.ONNX
            yield (
                f"{name} {kind} nms",
                _finished(raw, contract),
                replace(contract, tail=Tail.NMS, nms_form=form),
                1,
                SIZE,
                BOX,
            )
        halves = {key: array.astype(np.float16) for key, array in raw.items()}
        yield f"{name} halves", halves, _contract(specs["plain"]), 1, SIZE, BOX
    # A map of small values with many equal scores, boxes on the padding, and a size that no stride divides.
    ties = {key: np.round(array) for key, array in _raw(9).items()}
    for name, profile in PROFILES.items():
        spec = DecodeSpec(profile=profile, score_threshold=0.3, iou_threshold=0.6, max_detections=15, pre_nms_top_k=70)
        yield f"{name} ties", ties, _contract(spec), 0, SIZE, Letterbox(100, 40, 190, 76)


def _recorded_cases(golden_dir: Path) -> Iterator[Case]:
    """Head outputs of the original libraries on real networks, with their own rules."""
    three, five = (8, 16, 32), (8, 16, 32, 64, 128)
    references = {
        "adelaidet_R_50_1x": ("adelaidet", 0.05, 0.6, five),
        "adelaidet_FCOS-RT_MS_DLA_34_4x_syncbn_shared_towers_bn_head": ("adelaidet", 0.05, 0.6, three),
        "detectron2_fcos_R_50_FPN_1x": ("detectron2", 0.2, 0.6, five),
        "mmdet_fcos_r50-caffe_fpn_gn-head_1x_coco": ("mmdetection", 0.05, 0.5, five),
    }
    for file, (profile, score, iou, strides) in references.items():
        with np.load(golden_dir / f"{file}.npz") as data:
            cls, reg, centerness = data["cls"], data["reg"], data["ctr"]
        if profile == "detectron2":  # recorded after the sigmoid
            cls, centerness = (np.log(values / (1 - values)) for values in (cls, centerness))
        if profile != "mmdetection":
            reg = np.maximum(reg, 0) * location_strides(256, 320, strides=strides)[:, None]
        outputs = {"cls_logits": cls[None], "distances": reg[None], "centerness": centerness[None]}
        spec = DecodeSpec(profile=PROFILES[profile], score_threshold=score, iou_threshold=iou, strides=strides)
        outputs = {name: array.astype(np.float32) for name, array in outputs.items()}
        yield file, outputs, _contract(spec, classes=cls.shape[-1]), 0, (256, 320), Letterbox(256, 320, 256, 320)


def _write_case(case: Case, folder: Path) -> Path:
    _, outputs, contract, index, size, box = case
    folder.mkdir()
    tensors = []
    for name in contract.outputs:
        array = np.ascontiguousarray(outputs[name])
        (folder / name).write_bytes(array.tobytes())
        tensors.append({"name": name, "dtype": array.dtype.name, "shape": array.shape, "file": str(folder / name)})
    sizes = [*size, box.image_height, box.image_width, box.resized_height, box.resized_width]
    content = {"contract": to_json(contract), "sizes": sizes, "tensors": tensors, "index": index}
    (folder / "case.json").write_text(json.dumps(content))
    return folder / "case.json"


def _assert_same(rows: list[list[float]], expected: Detections, *, what: str) -> None:
    """The product's promise: boxes within 0.01 pixels, scores within 1e-5, the same labels in the same order."""
    assert len(rows) == len(expected), what
    table = np.array(rows, np.float64).reshape(-1, 6)
    np.testing.assert_allclose(table[:, 4], expected.scores, rtol=0, atol=1e-5, err_msg=what)
    np.testing.assert_array_equal(table[:, 5], expected.labels, err_msg=what)
    np.testing.assert_allclose(table[:, :4], expected.boxes, rtol=0, atol=0.01, err_msg=what)


def test_detections_of_every_profile_and_tail_are_pythons(programs: Programs, golden_dir: Path, tmp_path: Path) -> None:
    cases = [*_synthetic_cases(), *_recorded_cases(golden_dir)]
    files = [_write_case(case, tmp_path / str(number)) for number, case in enumerate(cases)]
    answers = programs.harness("postprocess", list(files))
    total = 0
    for (what, outputs, contract, index, size, box), answer in zip(cases, answers, strict=True):
        expected = postprocess(outputs, contract, index=index, input_size=size, letterbox=box)
        assert "error" not in answer, f"{what}: {answer}"
        _assert_same(answer["detections"], expected, what=what)
        total += len(expected)
    assert total > 3000


def test_outputs_that_do_not_fit_are_refused(programs: Programs, tmp_path: Path) -> None:
    contract = _contract(DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.5))
    raw = _raw(0)
    broken = {name: array.copy() for name, array in raw.items()}
    broken["distances"][0, 3, 1] = np.inf
    short = {name: array[:, :-1] for name, array in raw.items()}
    counted = _finished(raw, contract)
    counted["num_detections"][:] = 10_000
    labelled = _candidates(raw, contract.decode)
    labelled["labels"][:] = 200
    cases = [
        ("is not finite", broken, contract, 0),
        ("locations", short, contract, 0),
        ("contract's shape", {**raw, "distances": raw["centerness"]}, contract, 0),
        ("must be in 0..", counted, replace(contract, tail=Tail.NMS), 1),
        ("a class that the contract", labelled, replace(contract, tail=Tail.CANDIDATES), 1),
        ("contract's shape", raw, contract, 7),
        ("another dtype", {**raw, "centerness": raw["centerness"].astype(np.int32)}, contract, 0),
    ]
    files = [
        _write_case((part, outputs, of, index, SIZE, BOX), tmp_path / str(number))
        for number, (part, outputs, of, index) in enumerate(cases)
    ]
    for (part, *_), answer in zip(cases, programs.harness("postprocess", list(files)), strict=True):
        assert part in answer["error"]


# Preprocessing


def _preprocess_specs() -> Iterator[PreprocessSpec]:
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "pixel_scale": 255.0}
    caffe = {"mean": (102.9801, 115.9465, 122.7717), "std": (1.0, 57.0, 2.0), "channel_order": ChannelOrder.BGR}
    canvas, edges = {"height": 64, "width": 96}, {"shortest": 64, "longest": 100, "size_divisor": 32}
    floats = {"input_dtype": InputDtype.FLOAT32}
    for resize in ResizeFilter:
        yield PreprocessSpec(**imagenet, **canvas, resize_filter=resize)
        yield PreprocessSpec(**caffe, **canvas, **floats, size_rule=SizeRule.STRETCH, resize_filter=resize)
    first = {"resize_order": ResizeOrder.NORMALIZE_FIRST, "resize_filter": ResizeFilter.TORCH, **floats}
    yield PreprocessSpec(**imagenet, **edges, **first, size_rule=SizeRule.TORCHVISION)
    yield PreprocessSpec(**caffe, **edges, size_rule=SizeRule.MMDETECTION)
    yield PreprocessSpec(**imagenet, **edges, **floats, size_rule=SizeRule.MMDETECTION_FIX_SCALE)
    yield PreprocessSpec(**caffe, **edges, size_rule=SizeRule.DETECTRON2, resize_filter=ResizeFilter.PIL)
    yield PreprocessSpec(**caffe, **edges, **floats, size_rule=SizeRule.TIANZHI, resize_filter=ResizeFilter.PIL)
    yield PreprocessSpec(**imagenet, **canvas, content=(60, 70), pad_pixel=(114.0, 0.5, 255.0))
    yield PreprocessSpec(**imagenet, **canvas, **floats, content=(33, 96), pad_pixel=(114.0, 0.5, 255.0))
    gray = {"mean": (0.4,), "std": (0.25,), "pixel_scale": 255.0, "channel_order": ChannelOrder.GRAY}
    yield PreprocessSpec(**gray, **canvas)
    yield PreprocessSpec(**gray, **canvas, **floats, resize_filter=ResizeFilter.TORCH)


def _write_ppm(path: Path, image: np.ndarray) -> Path:
    path.write_bytes(b"P6\n%d %d\n255\n" % (image.shape[1], image.shape[0]) + image.tobytes())
    return path


def test_tensors_of_every_resize_rule_are_pythons(programs: Programs, tmp_path: Path) -> None:
    """uint8 tensors to the last bit, float32 ones within 2e-4."""
    generator = np.random.default_rng(3)
    sizes = [(128, 192), (97, 131), (64, 96), (37, 300), (5, 3), (1, 1), (200, 40)]
    images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    decode_spec = DecodeSpec(profile=PROFILES["torchvision"], score_threshold=0.2, iou_threshold=0.5)
    cases = [(spec, image, number) for spec in _preprocess_specs() for number, image in enumerate(images)]
    lines: list[object] = []
    for index, (spec, image, number) in enumerate(cases):
        contract = ModelContract(class_names=("a",), preprocess=spec, decode=decode_spec)
        (tmp_path / f"{index}.json").write_text(contract_to_text(contract))
        picture = _write_ppm(tmp_path / f"{number}.ppm", image)
        lines.append(f"{picture} {('rgb', 'bgr')[index % 2]} {tmp_path / f'{index}.json'}")
    for index, answer in enumerate(programs.harness("preprocess", lines)):
        spec, image, _ = cases[index]
        expected, letterbox = preprocess(image, spec)
        what = f"{spec} {image.shape}"
        assert answer == {
            "size": list(expected.shape[1:]),
            "resized": [letterbox.resized_height, letterbox.resized_width],
        }, what
        tensor = np.fromfile(tmp_path / f"{index}.json.tensor", expected.dtype).reshape(expected.shape)
        limit = 0.0 if expected.dtype == np.uint8 else 2e-4 * max(1.0, 255 / spec.pixel_scale)
        assert np.abs(tensor.astype(np.float64) - expected).max() <= limit, what


# Contracts and their JSON


def _mutations(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A field missing, unknown, of every other type, or beyond its bounds, at every depth."""
    values = [None, True, -1, 0, 1, 2**40, 1e308, 0.5, "", "x", [], [1], [1.5, 2.5, 3.5], {}, [{}], "ü" * 3000]
    places = [(), ("preprocess",), ("decode",), ("decode", "profile")]
    for place in places:
        inner: dict[str, Any] = content
        for key in place:
            inner = inner[key]
        for key in [*inner, "unknown"]:
            for value in [*values, "missing"]:
                changed = json.loads(json.dumps(content))
                part = changed
                for step in place:
                    part = part[step]
                if value == "missing":
                    part.pop(key, None)
                else:
                    part[key] = value
                yield changed


def test_a_changed_contract_is_refused_wherever_python_refuses_it(programs: Programs, tmp_path: Path) -> None:
    contract = _contract(DecodeSpec(profile=PROFILES["mmdetection"], score_threshold=0.2, iou_threshold=0.5))
    changed = list(_mutations(to_json(contract)))
    for index, content in enumerate(changed):
        (tmp_path / f"{index}.json").write_text(json.dumps(content))
    answers = programs.harness("contract", [tmp_path / f"{index}.json" for index in range(len(changed))])
    refused = 0
    for content, answer in zip(changed, answers, strict=True):
        try:
            from_json(ModelContract, content, where="contract")
        except (FcosDeployError, OverflowError, TypeError):
            assert "error" in answer, content
            refused += 1
    assert refused > 500
    assert sum("error" in answer for answer in answers) < refused + 80  # stricter for some: strides of 0, for example


def test_damaged_files_end_in_an_error_and_never_in_a_crash(
    programs: Programs, tiny_onnx: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Random bytes changed, cut and repeated, in JSON and in an ONNX file; the harness has the sanitizers."""
    generator = random.Random(5)
    contract = read_contract(tiny_onnx)
    seeds = {
        ".json": [contract_to_text(contract).encode(), (tiny_bundle / "manifest.json").read_bytes()],
        ".onnx": [tiny_onnx.read_bytes()[-6000:]],
    }
    plain = [
        "",
        "[",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '"\\ud800"',
        '"\x01"',
        "1e999",
        "nul",
        "-",
        "01",
        '"\\x"',
        "{}x",
    ]
    files = []
    for text in [*plain, b'"\xff\xfe"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}", b"\0"]:
        files.append(tmp_path / f"plain{len(files)}.json")
        files[-1].write_bytes(text if isinstance(text, bytes) else text.encode())
    refused = len(files)
    examples = 60 * FUZZ
    for suffix, contents in seeds.items():
        for content in contents:
            for _ in range(examples):
                changed = bytearray(content)
                for _ in range(generator.randrange(1, 6)):
                    at = generator.randrange(len(changed))
                    match generator.randrange(4):
                        case 0:
                            changed[at] = generator.randrange(256)
                        case 1:
                            del changed[at : at + generator.randrange(1, 40)]
                        case 2:
                            changed[at:at] = changed[at : at + generator.randrange(1, 200)]
                        case _:
                            changed[at:at] = generator.choice(
                                [b"[", b"{", b'"', b"9" * 30, b"\\u12", b"1e", b",", b"\xff"]
                            )
                    if not changed:
                        changed = bytearray(b" ")
                files.append(tmp_path / f"{len(files)}{suffix}")
                files[-1].write_bytes(changed)
    answers = programs.harness("contract", [*files, tmp_path / "missing.json", tmp_path])
    assert all("error" in answer for answer in [*answers[:refused], *answers[-2:]])
    good = programs.harness("contract", [tiny_onnx, tiny_bundle / "manifest.json"])
    assert good == [{"classes": 3, "first": "red"}] * 2


# The package, its programs, and the verdict


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def packages(tiny_bundle: Path, tiny_ir_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A package for each runtime."""
    folder = tmp_path_factory.mktemp("cpp-packages")
    for backend, bundle in (("onnxruntime", tiny_bundle), ("openvino", tiny_ir_bundle)):
        done = _run("package", bundle, "--for", "cpp", "--precision", "fp32", "-o", folder / backend)
        assert done.exit_code == 0, done.stderr
    return {"onnxruntime": folder / "onnxruntime", "openvino": folder / "openvino"}


def _verify(programs: Programs, package: Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run([programs.verify, "--json", package], capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_verdict_is_that_of_verify(
    backend: str,
    programs: Programs,
    packages: dict[str, Path],
    tiny_bundle: Path,
    tiny_ir_bundle: Path,
    tmp_path: Path,
) -> None:
    bundle = {"onnxruntime": tiny_bundle, "openvino": tiny_ir_bundle}[backend]
    code, verdict, text = _verify(programs, packages[backend])
    python = _run("verify", bundle, "--backend", backend, "--precision", "fp32", "--log", tmp_path / "log", "--json")
    record = json.loads(python.stdout)
    assert (code, verdict["outcome"]) == (python.exit_code, record["outcome"]) == (0, "passed"), text + python.stderr
    assert verdict["matched"] == record["matched"]
    assert verdict["preprocessing"]["exact"] == record["preprocessing"]["exact"] == 4
    assert verdict["values"]["evidence"] == record["values"]["evidence"]
    for image, result in zip(verdict["images"], record["images"], strict=True):
        assert {key: image[key] for key in ("path", "expected", "detected", "missed", "extra")} == {
            key: result[key] for key in ("path", "expected", "detected", "missed", "extra")
        }
        assert abs(image["largest_score_difference"] - result["largest_score_difference"]) < 1e-5
    # "verified: ARTIFACT on BACKEND in SECONDS s; SUMMARY"
    assert text.strip().partition(" s; ")[2] == python.stderr.strip().partition(" s; ")[2] != ""
    assert text.startswith(f"verified: {record['artifact']} on {backend} ")


_FAULTS = {
    "threshold": lambda c: replace(c, decode=replace(c.decode, score_threshold=0.45)),
    "classes": lambda c: replace(c, decode=replace(c.decode, label_map=(0, 2, 1))),
    "few": lambda c: replace(c, decode=replace(c.decode, max_detections=3)),
    "centres": lambda c: replace(c, decode=replace(c.decode, profile=PROFILES["detectron2"])),
    "suppression": lambda c: replace(c, decode=replace(c.decode, iou_threshold=0.05)),
    "scores": lambda c: replace(
        c, decode=replace(c.decode, profile=replace(c.decode.profile, score=PROFILES["mmdetection"].score))
    ),
    "nothing": lambda c: replace(c, decode=replace(c.decode, score_threshold=0.999)),
    "none": lambda c: c,
}


@pytest.mark.parametrize("certified", [False, True])
def test_a_faulty_detector_is_judged_as_python_judges_it(
    certified: bool,
    programs: Programs,
    packages: dict[str, Path],
    tiny_bundle: Path,
    blobs: list[np.ndarray],
    tmp_path: Path,
) -> None:
    contract = read_contract(tiny_bundle / "model.fp32.onnx")
    with (
        open_bundle(tiny_bundle) as bundle,
        Detector.open(tiny_bundle / "model.fp32.onnx", backend="onnxruntime") as good,
    ):
        manifest = bundle.manifest
        standard = golden_standard(manifest, manifest.artifacts[0], backend="onnxruntime", compute=ComputeType.F32)
        baseline = [good.detect(image) for image in blobs] if certified else None
        outcomes = set()
        for fault, change in _FAULTS.items():
            package = Path(shutil.copytree(packages["onnxruntime"], tmp_path / fault))
            (package / "contract.json").write_text(contract_to_text(change(contract)))
            golden = json.loads((package / "golden.json").read_text())
            golden.update(has_certified=certified, same_artifact=certified)
            for image, detections in zip(golden["images"], baseline or [], strict=bool(baseline)):
                image["certified"] = to_json(GoldenDetections.from_detections(detections))
            (package / "golden.json").write_text(json.dumps(golden, indent=1))
            code, verdict, text = _verify(programs, package)
            detector = Detector(good.session, change(contract))
            judged_by = replace(standard, certified=baseline, same_artifact=certified)
            expected = check_golden(judged_by, [detector.detect(image) for image in blobs])
            assert verdict["values"]["problems"] == list(expected.problems), fault
            assert verdict["values"]["outcome"] == expected.outcome, fault
            assert verdict["values"]["evidence"] == expected.evidence, fault
            assert code == (0 if fault == "none" else 4), text
            outcomes.add(verdict["outcome"])
    assert {"passed", "failed"} <= outcomes


def test_faults_of_the_package_are_named(programs: Programs, packages: dict[str, Path], tmp_path: Path) -> None:
    package = Path(shutil.copytree(packages["onnxruntime"], tmp_path / "package"))
    contract = json.loads((package / "contract.json").read_text())
    swapped = {**contract, "preprocess": {**contract["preprocess"], "channel_order": "bgr"}}
    (package / "contract.json").write_text(json.dumps(swapped))
    code, verdict, text = _verify(programs, package)
    assert (code, verdict["outcome"]) == (4, "failed")
    assert "the colour channels are swapped: they are bgr, they must be rgb" in text
    (package / "contract.json").write_text("{}")
    assert "lacks 'class_names'" in _verify(programs, package)[2]
    (package / "contract.json").write_text(json.dumps(contract))
    with (package / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    code, _, text = _verify(programs, package)
    assert code == 1
    assert "was changed: copy the package again" in text
    assert "Cannot read" in _verify(programs, tmp_path / "nothing")[2]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_example_detects_what_python_detects(
    backend: str, programs: Programs, packages: dict[str, Path], blobs: list[np.ndarray], tmp_path: Path
) -> None:
    package = packages[backend]
    picture = _write_ppm(tmp_path / "image.ppm", blobs[0])
    done = subprocess.run([programs.detect, package, picture, "2"], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    model = next(package / name for name in ("model.onnx", "model.xml") if (package / name).is_file())
    with Detector.open(model, backend=backend) as detector:
        expected = detector.detect(blobs[0])
        assert [row["name"] for row in rows] == [
            entry["name"] for entry in expected.to_list(detector.contract.class_names)
        ]
    _assert_same([[*row["box"], row["score"], row["label"]] for row in rows], expected, what=backend)
    assert len(rows) > 5
    assert json.loads(done.stderr)["network_ms"] > 0


@pytest.mark.slow
def test_onnx_runtime_in_cpp_detects_what_python_detects_for_every_profile(
    programs: Programs, packages: dict[str, Path], tiny_checkpoint: Path, blobs: list[np.ndarray], tmp_path: Path
) -> None:
    """Whole detections; with ``FCOS_DEPLOY_FUZZ=2`` both tails with a graph of their own for each profile, else one."""
    from exporters.torch_onnx import ExportOptions, export_onnx
    from fcos_deploy.checkpoints.load import load_checkpoint

    loaded = load_checkpoint(tiny_checkpoint)
    picture, total = _write_ppm(tmp_path / "image.ppm", blobs[0]), 0
    for number, (name, profile) in enumerate(PROFILES.items()):
        contract = replace(loaded.contract, decode=replace(loaded.contract.decode, profile=profile))
        own = (Tail.CANDIDATES, Tail.NMS)
        for tail in (Tail.RAW, *(own if FUZZ > 1 else own[number % 2 :][:1])):
            package = Path(shutil.copytree(packages["onnxruntime"], tmp_path / f"{name}-{tail}"))
            model, tailed = package / "model.onnx", replace(contract, tail=tail)
            if tail is not Tail.RAW:  # whose graph is the same for all profiles
                model.unlink()
                export_onnx(replace(loaded, contract=contract), model, options=ExportOptions(tail=tail, simplify=False))
            (package / "contract.json").write_text(contract_to_text(tailed))
            done = subprocess.run([programs.detect, package, picture], capture_output=True, text=True, check=True)
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            with Detector.open(model, backend="onnxruntime") as opened:
                expected = Detector(opened.session, tailed).detect(blobs[0])
            _assert_same([[*row["box"], row["score"], row["label"]] for row in rows], expected, what=f"{name} {tail}")
            total += len(expected)
    assert total > 50


def test_the_adapter_of_tensorrt_moves_tensors_up_and_down(
    programs: Programs, packages: dict[str, Path], tiny_bundle: Path, blobs: list[np.ndarray], tmp_path: Path
) -> None:
    """With a stub of its headers: the tensor that arrives is Python's, and recorded outputs give the same verdict."""
    package = Path(shutil.copytree(packages["onnxruntime"], tmp_path / "package"))
    lines = [f"input images 5 {tmp_path}/images\n"]
    with Detector.open(tiny_bundle / "model.fp32.onnx", backend="onnxruntime") as detector:
        tensors = [preprocess(image, detector.contract.preprocess)[0] for image in blobs]
        for index, tensor in enumerate(tensors):
            for name, array in detector.session.run({"images": tensor[None]}).items():
                (tmp_path / f"{name}.{index}").write_bytes(array.tobytes())
                if index == 0:
                    lines.append(f"output {name} 0 {tmp_path}/{name} {array.ndim} {' '.join(map(str, array.shape))}\n")
    (package / "model.engine").write_text("".join(lines))
    golden = json.loads((package / "golden.json").read_text())
    expected = _verify(programs, package)[1]
    digest = subprocess.run(["sha256sum", package / "model.engine"], capture_output=True, text=True, check=True).stdout
    golden.update(backend="tensorrt", model="model.engine", artifact_sha256=digest.split()[0])
    (package / "golden.json").write_text(json.dumps(golden, indent=1))
    code, verdict, text = _verify(programs, package)
    assert code == 0, text
    assert verdict == expected
    assert [(tmp_path / f"images.{index}").read_bytes() for index in range(4)] == [t.tobytes() for t in tensors]
    (package / "model.engine").write_text("nothing")
    golden["artifact_sha256"] = "3d1f57c984978ef98a18378c8166c1cb8ede02c03eeb6aee7e2f121dfeee3e56"
    assert "was changed" in _verify(programs, package)[2]


def test_a_backend_without_an_adapter_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    refused = _run("package", tiny_bundle, "--for", "cpp", "--backend", "pytorch", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()
