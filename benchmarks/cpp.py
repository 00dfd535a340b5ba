"""How long decoding with NMS, and a whole detection, take in C++ and in Python.

    python benchmarks/cpp.py BUNDLE --backend openvino --backend onnxruntime

Prints the two tables of docs/cpp.md. Decoding is of the synthetic head outputs of ``host_path.py``, in milliseconds of
CPU time of one thread: C++, then Python with compiled loops and with NumPy's. A whole detection is of the bundle's
first golden image, in wall-clock time: both programs run in turns, and the lowest median of the rounds counts. The
programs are built here, by CMake and the system's compiler with -O3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import host_path
import numpy as np
import onnxruntime
import openvino

from fcos_deploy import Detector
from fcos_deploy.bundle import open_bundle
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.decode import PROFILES, DecodeSpec
from fcos_deploy.core.detections import image_sizes_row, postprocess
from fcos_deploy.core.image import read_image
from fcos_deploy.core.preprocess import Letterbox, PreprocessSpec, preprocess
from fcos_deploy.core.serialize import to_json
from fcos_deploy.serving import ServingOptions, package_bundle

ROOT = Path(__file__).parents[1]
DATA, EXAMPLE = ROOT / "tests" / "data" / "cpp", ROOT / "examples" / "cpp"
SOURCES = ROOT / "fcos_deploy" / "serving" / "cpp_sources"
BOX = Letterbox(720, 1280, 360, 640)


def compile_harness(folder: Path) -> Path:
    """The program of the tests, without sanitizers."""
    command = ["g++", "-std=c++17", "-O3", f"-I{SOURCES}", DATA / "harness.cpp", "-o", folder / "harness"]
    subprocess.run([*map(str, command)], check=True)
    return folder / "harness"


def time_decoding(folder: Path, *, repeat: int) -> None:
    """Each profile on each kind of head output, C++ beside Python."""
    harness = compile_harness(folder)
    heads = {
        "scene of 20": host_path.scene_head(20),
        "scene of 20, one class": host_path.scene_head(20, classes=1),
        "crowded": host_path.scene_head(150),
        "adversarial": host_path.adversarial_head(),
    }
    print(f"{' / '.join(('C++', *host_path.LOOPS))}\n\n| profile | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    for profile in PROFILES.values():
        cells = []
        threshold = host_path.THRESHOLDS.get(profile.name, 0.05)
        spec = DecodeSpec(profile=profile, score_threshold=threshold, iou_threshold=0.6)
        for name, head in heads.items():
            contract = ModelContract(
                class_names=tuple(map(str, range(head.cls_logits.shape[1]))),
                preprocess=PreprocessSpec(mean=host_path.MEAN, std=host_path.STD, height=640, width=640),
                decode=spec,
            )
            tensors = {"cls_logits": head.cls_logits, "distances": head.distances, "centerness": head.centerness}
            outputs = {key: np.ascontiguousarray(value[None]) for key, value in tensors.items()}
            for key, value in outputs.items():
                (folder / key).write_bytes(value.tobytes())
            case = {
                "contract": to_json(contract),
                "sizes": [640, 640, BOX.image_height, BOX.image_width, BOX.resized_height, BOX.resized_width],
                "repeat": repeat,
                "tensors": [
                    {"name": key, "dtype": "float32", "shape": value.shape, "file": str(folder / key)}
                    for key, value in outputs.items()
                ],
            }
            (folder / "case.json").write_text(json.dumps(case))
            done = subprocess.run(
                [harness, "postprocess"], input=f"{folder}/case.json\n", capture_output=True, text=True, check=True
            )
            answer = json.loads(done.stdout)
            expected = postprocess(outputs, contract, index=0, input_size=(640, 640), letterbox=BOX)
            if len(answer["detections"]) != len(expected):
                raise SystemExit(f"{profile.name}, {name}: {len(answer['detections'])} and {len(expected)} detections")
            call = partial(postprocess, outputs, contract, index=0, input_size=(640, 640), letterbox=BOX)
            python = [
                host_path.milliseconds(host_path.with_loops(switch, call), rounds=repeat)[0]
                for switch in host_path.LOOPS.values()
            ]
            cells.append(" / ".join(f"{value:.2f}" for value in (answer["milliseconds"], *python)))
        print(f"| {profile.name} | {' | '.join(cells)} |")
    os.environ.pop(host_path.SWITCH, None)


def build_example(package: Path, folder: Path) -> Path:
    """``detect`` with the runtimes of this environment's wheels."""
    library = folder / "libonnxruntime.so.1"
    if not library.exists():
        library.symlink_to(next(iter(sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")))))
    settings = {
        "PACKAGE": package,
        "OpenVINO_DIR": Path(openvino.__file__).parent / "cmake",
        "ONNXRUNTIME_INCLUDE_DIR": DATA / "onnxruntime",
        "ONNXRUNTIME_LIBRARY": library,
    }
    build, defines = (
        package.with_name(f"{package.name}-build"),
        [f"-D{name}={value}" for name, value in settings.items()],
    )
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", build, "--no-warn-unused-cli", *defines],
        ["cmake", "--build", build, "--target", "detect"],
    ):
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return build / "detect"


def python_parts(model: Path, image: np.ndarray, *, backend: str, repeat: int) -> dict[str, float]:
    """Medians of the three parts, as ``detect`` prints them."""
    times: dict[str, list[float]] = {"preprocess_ms": [], "network_ms": [], "postprocess_ms": []}
    with Detector.open(model, backend=backend) as detector:
        contract = detector.contract

        def lap(part: str, call: Callable[[], object]) -> object:
            start = time.perf_counter()
            result = call()
            times[part].append((time.perf_counter() - start) * 1e3)
            return result

        detector.detect(image)
        for _ in range(repeat):
            tensor, box = lap("preprocess_ms", lambda: preprocess(image, contract.preprocess))
            feeds = {"images": tensor[None]}
            if contract.needs_image_sizes:
                feeds["image_sizes"] = image_sizes_row(box)[None]
            outputs = lap("network_ms", lambda f=feeds: detector.session.run(f))
            lap(
                "postprocess_ms",
                lambda o=outputs, b=box, s=tensor.shape[1:]: postprocess(
                    o, contract, index=0, input_size=s, letterbox=b
                ),
            )
    return {part: statistics.median(values) for part, values in times.items()}


def time_detection(bundle: Path, folder: Path, *, backend: str, repeat: int) -> None:
    """One image through the bundle's artifact, C++ and Python in turns."""
    package = folder / backend
    with open_bundle(bundle) as opened:
        model = package_bundle(opened, server="cpp", output=package, options=ServingOptions(backend=backend))
        path = opened.path(model.artifact.path)
        detect = build_example(package, folder)
        picture = package / "golden" / "000.ppm"
        image = read_image(picture)
        rounds: dict[str, list[dict[str, float]]] = {"C++": [], "Python": []}
        for _ in range(3):
            done = subprocess.run([detect, package, picture, str(repeat)], capture_output=True, text=True, check=True)
            rounds["C++"].append(json.loads(done.stderr))
            rounds["Python"].append(python_parts(path, image, backend=backend, repeat=repeat))
    lowest = {language: {part: min(run[part] for run in runs) for part in runs[0]} for language, runs in rounds.items()}
    cells = [f"{value:.3g} / {lowest['Python'][part]:.3g}" for part, value in lowest["C++"].items()]
    print(f"| `{model.artifact.path}`, {backend} | {' | '.join(cells)} |")


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", help="for whole detections; without, decoding only")
    parser.add_argument("--backend", action="append", help="openvino or onnxruntime; repeatable")
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--no-decoding", action="store_true", help="leave the first table out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if not options.no_decoding:
            time_decoding(Path(name), repeat=options.repeat)
        if options.bundle:
            print("\nC++ / Python\n\n| artifact | preprocess | network | decode + NMS |\n|---|---:|---:|---:|")
        for backend in options.backend or ["openvino"] if options.bundle else []:
            time_detection(options.bundle, Path(name), backend=backend, repeat=options.repeat)


if __name__ == "__main__":
    main()
