"""Packages for devices without this Python package, with the proof on the golden images: for C++ and for trtexec."""

from __future__ import annotations

import importlib.resources
import json
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from exporters._tensorrt_options import profile_shapes
from fcos_deploy.accuracy.golden import golden_standard, read_golden_image
from fcos_deploy.bundle.manifest import GoldenDetections
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.contract import ModelContract, contract_to_text
from fcos_deploy.core.detections import image_sizes_row
from fcos_deploy.core.enums import ArtifactKind, ComputeType
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.core.preprocess import preprocess
from fcos_deploy.core.serialize import to_json
from fcos_deploy.serving.package import Packager, ServedModel
from fcos_deploy.targets.plan import trtexec_command
from fcos_deploy.targets.profiles import load_profile

__all__ = ["PACKAGER"]


_FORMAT = "fcos-deploy golden, version 1"
_ADAPTER = "{}_session.hpp"


class _Cpp(Packager):
    name = "cpp"

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.bundle is None:
            raise ConfigError("The golden images are those of a bundle.")
        sources = importlib.resources.files("fcos_deploy.serving").joinpath("cpp_sources")
        files = {item.name: item for item in sources.iterdir() if item.is_file()}
        if _ADAPTER.format(model.backend) not in files:
            runtimes = sorted(
                name.removesuffix(_ADAPTER.format("")) for name in files if name.endswith(_ADAPTER.format(""))
            )
            raise ConfigError(
                f"There is no C++ adapter for the backend '{model.backend}'.",
                hint=f"choose one of {', '.join(runtimes)} with --backend",
            )
        model.copy_to(folder)
        for name, source in files.items():
            (folder / name).write_bytes(source.read_bytes())
        (folder / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (folder / "contract.json").write_text(contract_to_text(model.contract) + "\n", encoding="utf-8")
        content = json.dumps(_golden(model, model.bundle, folder), indent=1) + "\n"
        (folder / "golden.json").write_text(content, encoding="utf-8")


def _golden(model: ServedModel, bundle: Bundle, folder: Path) -> dict[str, object]:
    """What ``verify`` in C++ judges by; writes the golden images, which it can read without a library, as PPM."""
    manifest, artifact = bundle.manifest, model.artifact
    standard = golden_standard(manifest, artifact, backend=model.backend, compute=ComputeType.F32)
    images: list[dict[str, object]] = []
    (folder / "golden").mkdir()
    for index, golden in enumerate(manifest.golden):
        pixels = f"golden/{index:03d}.ppm"
        image = np.ascontiguousarray(read_golden_image(bundle.read(golden.path), golden))
        (folder / pixels).write_bytes(b"P6\n%d %d\n255\n" % (golden.width, golden.height) + image.tobytes())
        certified = None if standard.certified is None else standard.certified[index]
        images.append(
            {
                "path": golden.path,
                "pixels": pixels,
                "height": golden.height,
                "width": golden.width,
                "scale": standard.scales[index],
                "fingerprint": to_json(golden.fingerprint),
                "expected": to_json(golden.detections),
                "certified": None if certified is None else to_json(GoldenDetections.from_detections(certified)),
            }
        )
    return {
        "format": _FORMAT,
        "bundle": manifest.name,
        "manifest_sha256": bundle.manifest_sha256,
        "artifact": artifact.path,
        "artifact_sha256": artifact.sha256,
        "model": f"model{model.path.suffix}",
        "backend": model.backend,
        "precision": str(artifact.precision),
        "gate": {name: getattr(standard.gate, name) for name in ("min_match_rate", "min_iou", "max_score_delta")},
        "has_certified": standard.certified is not None,
        "same_artifact": standard.same_artifact,
        "score_threshold": manifest.contract.decode.score_threshold,
        "max_detections": manifest.contract.decode.max_detections,
        "class_names": manifest.contract.class_names,
        "images": images,
    }


_ONNX, _ENGINE, _SCRIPT = "model.onnx", "model.engine", "run_trtexec.py"


class _Trtexec(Packager):
    name = "trtexec"
    readers: ClassVar[Mapping[ArtifactKind, str]] = {ArtifactKind.ONNX: "tensorrt"}

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.bundle is None:
            raise ConfigError("The golden tensors are those of a bundle.")
        if not model.options.target:
            raise ConfigError(
                "The trtexec lines differ between versions of TensorRT.", hint="name the device with --target"
            )
        device = load_profile(model.options.target).nvidia
        if device is None or not device.tensorrt:
            raise ConfigError(f"'{model.options.target}' has no TensorRT.", hint="name an NVIDIA device with --target")
        _ = model.inputs  # refuses a model without a fixed input size
        inputs = {spec.name: spec.shape for spec in onnx_interface(model.path).inputs}
        options = BuildOptions(workspace_mib=device.workspace_mib)
        shapes = profile_shapes(inputs, options=options, size_divisor=model.contract.preprocess.size_divisor)
        command = trtexec_command(
            onnx=PurePosixPath(_ONNX),
            engine=PurePosixPath(_ENGINE),
            version=device.tensorrt,
            precision=model.contract.precision,
            shapes={name: shape for name, shape in shapes.items() if None in inputs[name]},
            options=options,
        )
        build = shlex.split(command)
        dynamic = ",".join(f"{n}:{'x'.join(map(str, s.opt))}" for n, s in shapes.items() if None in inputs[n])
        golden = _write_golden_tensors(model.bundle, model.contract, folder, inputs=tuple(inputs), shapes=dynamic)
        model.copy_to(folder)
        task = {
            "manifest_sha256": model.bundle.manifest_sha256,
            "onnx": _ONNX,
            "onnx_sha256": model.artifact.sha256,
            "engine": _ENGINE,
            "build": build[1:],
            "golden": golden,
        }
        (folder / "task.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
        lines = [build, *(["trtexec", *item["run"], f"--exportOutput={item['name']}.outputs.json"] for item in golden)]
        commands = "".join(shlex.join(line) + "\n" for line in lines)
        header = f"# For TensorRT {device.tensorrt} ({model.options.target}), in this folder.\n"
        (folder / "commands.sh").write_text(header + commands, encoding="utf-8")
        script = importlib.resources.files("fcos_deploy.serving").joinpath("_trtexec_script.py")
        (folder / _SCRIPT).write_bytes(script.read_bytes())


def _write_golden_tensors(
    bundle: Bundle, contract: ModelContract, folder: Path, *, inputs: tuple[str, ...], shapes: str
) -> list[dict[str, Any]]:  # Any: text, and the words of a command
    """The preprocessed tensors of the golden images, as trtexec loads them; their files, and its arguments."""
    runs = []
    (folder / "golden").mkdir()
    for index, golden in enumerate(bundle.manifest.golden):
        name = f"golden/{index}"
        image = read_golden_image(bundle.read(golden.path), golden)
        tensor, letterbox = preprocess(image, contract.preprocess)
        tensors = {"images": tensor, "image_sizes": np.asarray(image_sizes_row(letterbox), np.float32)}
        for tensor_name in inputs:
            (folder / f"{name}.{tensor_name}.bin").write_bytes(tensors[tensor_name].tobytes())
        loaded = ",".join(f"{tensor_name}:{name}.{tensor_name}.bin" for tensor_name in inputs)
        run = [f"--loadEngine={_ENGINE}", f"--loadInputs={loaded}", *([f"--shapes={shapes}"] if shapes else [])]
        runs.append({"name": name, "images": f"{name}.images.bin", "run": run})
    return runs


PACKAGER = (_Cpp(), _Trtexec())
