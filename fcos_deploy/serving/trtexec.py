"""Package for a device that has trtexec and no Python of ours: graph, command lines, golden tensors and a script."""

from __future__ import annotations

import importlib.resources
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from exporters._tensorrt_options import profile_shapes
from fcos_deploy.bundle.golden import read_golden_image
from fcos_deploy.bundle.store import Bundle
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.exporter import BuildOptions
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.core.postprocess import image_sizes_row
from fcos_deploy.core.preprocess import preprocess
from fcos_deploy.core.serialize import to_json
from fcos_deploy.serving.package import Packager, ServedModel
from fcos_deploy.targets.plan import TrtexecRequest, trtexec_command
from fcos_deploy.targets.profiles import load_profile

__all__ = ["PACKAGER"]

_ONNX, _ENGINE, _SCRIPT = "model.onnx", "model.engine", "run_trtexec.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class _GoldenRun:
    """A golden image: its name, the file of its tensor, and trtexec's arguments."""

    name: str
    images: str
    run: tuple[str, ...]


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
        request = TrtexecRequest(
            onnx=PurePosixPath(_ONNX),
            engine=PurePosixPath(_ENGINE),
            version=device.tensorrt,
            precision=model.contract.precision,
            shapes={n: (s.minimum, s.opt, s.maximum) for n, s in shapes.items() if None in inputs[n]},
            options=options,
        )
        build = shlex.split(trtexec_command(request))
        dynamic = ",".join(f"{n}:{'x'.join(map(str, s.opt))}" for n, s in shapes.items() if None in inputs[n])
        golden = self._write_golden(model.bundle, model.contract, folder, inputs=tuple(inputs), shapes=dynamic)
        model.copy_to(folder)
        task = {
            "manifest_sha256": model.bundle.manifest_sha256,
            "onnx": _ONNX,
            "onnx_sha256": model.artifact.sha256,
            "engine": _ENGINE,
            "build": build[1:],
            "golden": to_json(golden),
        }
        (folder / "task.json").write_text(json.dumps(task, indent=1) + "\n", encoding="utf-8")
        lines = [build, *(["trtexec", *item.run, f"--exportOutput={item.name}.outputs.json"] for item in golden)]
        commands = "".join(shlex.join(line) + "\n" for line in lines)
        header = f"# For TensorRT {device.tensorrt} ({model.options.target}), in this folder.\n"
        (folder / "commands.sh").write_text(header + commands, encoding="utf-8")
        script = importlib.resources.files("fcos_deploy.serving").joinpath("_trtexec_script.py")
        (folder / _SCRIPT).write_bytes(script.read_bytes())

    def _write_golden(
        self, bundle: Bundle, contract: ModelContract, folder: Path, *, inputs: tuple[str, ...], shapes: str
    ) -> list[_GoldenRun]:
        """The preprocessed tensor of each golden image as trtexec loads it, and the arguments that run it."""
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
            runs.append(_GoldenRun(name=name, images=f"{name}.images.bin", run=tuple(run)))
        return runs


PACKAGER = _Trtexec()
