"""Model repositories for NVIDIA Triton and OpenVINO Model Server, the description of a served model, an OCI layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from fcos_deploy.bundle.archive import write_layout
from fcos_deploy.core.contract import TensorSpec, contract_to_text
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.serving.package import Packager, ServedModel, ServingOptions
from runtimes.kserve import RemoteModel, write_remote_model

__all__ = ["PACKAGER", "config_text", "server_config"]


# Triton's backend and the file name that it looks for.
_BACKENDS: dict[ArtifactKind, tuple[str, str]] = {
    ArtifactKind.ONNX: ("onnxruntime", ".onnx"),
    ArtifactKind.OPENVINO_IR: ("openvino", ".xml"),
    ArtifactKind.TENSORRT_ENGINE: ("tensorrt", ".plan"),
}
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int32": "TYPE_INT32"}
_LABELLED = frozenset({"cls_logits", "labels"})


class _Triton(Packager):
    name = "triton"
    # Triton's backends have the names of the runtimes that they are.
    readers: ClassVar[Mapping[ArtifactKind, str]] = {kind: backend for kind, (backend, _) in _BACKENDS.items()}

    def write(self, model: ServedModel, folder: Path) -> None:
        home = folder / model.name
        model.copy_to(home / str(model.options.version), suffix=_BACKENDS[model.artifact.kind][1])
        (home / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (home / "config.pbtxt").write_text(config_text(model), encoding="utf-8")


def config_text(model: ServedModel) -> str:
    """``config.pbtxt``. Requests are joined to batches only where the model takes them.

    Raises:
        ConfigError: ``max_batch`` is more than the model takes.
    """
    options, (backend, suffix) = model.options, _BACKENDS[model.artifact.kind]
    limit = model.max_batch
    if options.max_batch > limit or (options.max_batch and limit == 1):
        raise ConfigError(
            f"'{model.artifact.path}' takes batches of at most {limit}, {options.max_batch} was asked for.",
            hint="leave --max-batch out, or make the artifact with a dynamic batch",
        )
    lines = [
        f"name: {_quoted(model.name)}",
        f"backend: {_quoted(backend)}",
        f'default_model_filename: "model{suffix}"',
        f"max_batch_size: {options.max_batch}",
        *_tensors("input", model.inputs, options),
        *_tensors("output", model.contract.output_specs, options),
    ]
    if options.max_batch > 1:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {options.queue_delay_us} }}")
    # On the GPUs that were named. Triton refuses an engine on KIND_CPU: it is on every GPU by default.
    on_gpu = options.gpus or model.artifact.kind is ArtifactKind.TENSORRT_ENGINE
    gpus = f", gpus: [{', '.join(map(str, options.gpus))}]" if options.gpus else ""
    place = f"kind: KIND_GPU{gpus}" if on_gpu else "kind: KIND_CPU"
    lines.append(f"instance_group {{ count: {options.instances}, {place} }}")
    # One request before the model counts as ready: kernels are chosen and memory is taken then, not on a frame.
    lines.append(f'model_warmup {{ name: "first", batch_size: {1 if options.max_batch else 0}')
    for spec in model.inputs:
        data = "random_data: true" if spec.name == "images" else "zero_data: true"
        value = f"data_type: {_TYPES[spec.dtype]}, dims: {_dims(spec, options)}, {data}"
        lines.append(f"  inputs {{ key: {_quoted(spec.name)}, value {{ {value} }} }}")
    contract = _quoted(contract_to_text(model.contract))
    lines += [
        "}",
        "version_policy { latest { num_versions: 1 } }",
        "parameters {",
        '  key: "fcos_deploy.contract"',
        f"  value {{ string_value: {contract} }}",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string of protobuf's text format; what JSON escapes, it reads the same, except non-ASCII."""
    return json.dumps(text, ensure_ascii=False)


def _dims(spec: TensorSpec, options: ServingOptions) -> str:
    """Without the batch where Triton adds it, with a batch of 1 where it does not."""
    sizes = spec.shape[1:] if options.max_batch else (1, *spec.shape[1:])
    return f"[{', '.join(str(size) for size in sizes)}]"


def _tensors(kind: str, specs: Iterable[TensorSpec], options: ServingOptions) -> Iterable[str]:
    for spec in specs:
        label = ', label_filename: "labels.txt"' if kind == "output" and spec.name in _LABELLED else ""
        dims = _dims(spec, options)
        yield f"{kind} {{ name: {_quoted(spec.name)}, data_type: {_TYPES[spec.dtype]}, dims: {dims}{label} }}"


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
                "OpenVINO Model Server neither batches requests nor uses CUDA GPUs.",
                hint="leave --max-batch and --gpu out; its requests run side by side, see --instances",
            )
        _ = model.inputs  # refuses a model without a fixed input size
        home = folder / model.name
        model.copy_to(home / str(model.options.version))
        (home / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (home / "contract.json").write_text(contract_to_text(model.contract) + "\n", encoding="utf-8")
        text = json.dumps(server_config(model.name, model.options), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


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


class _KServe(Packager):
    """Only the artifact's contract is used: the server may serve any file that keeps it."""

    name = "kserve"

    def write(self, model: ServedModel, folder: Path) -> None:
        if not model.options.url:
            raise ConfigError("A remote model needs its address.", hint="--server http://HOST:8000/v2/models/NAME")
        write_remote_model(folder / f"{model.name}.kserve", RemoteModel(url=model.options.url, contract=model.contract))


class _Oci(Packager):
    """All files of the bundle, so that the proof and the signature travel along; the tag is the version."""

    name = "oci"

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.bundle is None:
            raise ConfigError("An OCI layout is made of a bundle.")
        write_layout(model.bundle, folder, tag=str(model.options.version))


PACKAGER = (_Triton(), _Ovms(), _KServe(), _Oci())
