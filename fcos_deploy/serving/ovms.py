"""A model repository and configuration for OpenVINO Model Server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fcos_deploy.core.contract import contract_to_text
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.serving.package import Packager, ServedModel, ServingOptions

__all__ = ["PACKAGER", "server_config"]

_MOUNT = "/models"  # where its container expects the repository


class _Ovms(Packager):
    name = "ovms"
    readers: ClassVar[Mapping[ArtifactKind, str]] = {
        ArtifactKind.OPENVINO_IR: "openvino",
        ArtifactKind.ONNX: "openvino",
    }

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.options.max_batch or model.options.gpus:
            raise ConfigError(
                "OpenVINO Model Server joins no requests to batches and knows no CUDA GPUs.",
                hint="leave --max-batch and --gpu out; its requests run side by side, see --instances",
            )
        _ = model.inputs  # refuses a model without a fixed input size
        home = folder / model.name
        model.copy_to(home / str(model.options.version))
        (home / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (home / "contract.json").write_text(contract_to_text(model.contract) + "\n", encoding="utf-8")
        text = json.dumps(server_config(model.name, model.options), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


PACKAGER = _Ovms()


def server_config(name: str, options: ServingOptions) -> dict[str, object]:
    """What ``ovms --config_path`` reads. ``f32``: bfloat16, the default on new CPUs, is not what was certified."""
    config = {
        "name": name,
        "base_path": f"{_MOUNT}/{name}",
        "target_device": "CPU",
        "nireq": options.instances,
        "plugin_config": {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": str(options.instances)},
    }
    return {"model_config_list": [{"config": config}]}
