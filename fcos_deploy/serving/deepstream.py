"""Configuration of DeepStream's nvinfer, and the source of its bounding-box parser, for engines with the nms tail."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, SizeRule
from fcos_deploy.serving.package import Packager, ServedModel

__all__ = ["PACKAGER", "nvinfer_config", "preprocess_config"]

_PARSER = "nvdsinfer_fcos.cpp"
_LIBRARY = "libnvdsinfer_fcos.so"
# nvinfer's numbers.
_NETWORK_MODE = {Precision.FP32: 0, Precision.INT8: 1, Precision.FP16: 2}
_COLOR_FORMAT = {ChannelOrder.RGB: 0, ChannelOrder.BGR: 1, ChannelOrder.GRAY: 2}
_TENSOR_TYPE = {InputDtype.FLOAT32: 0, InputDtype.UINT8: 1}
_MODEL_KEY = {ArtifactKind.ONNX: "onnx-file", ArtifactKind.TENSORRT_ENGINE: "model-engine-file"}
_NO_CLUSTERING = 4
_EVERY_STREAM = -1
_MAKEFILE = f"""DEEPSTREAM ?= /opt/nvidia/deepstream/deepstream
CUDA ?= /usr/local/cuda

{_LIBRARY}: {_PARSER}
\t$(CXX) -O2 -Wall -std=c++17 -fPIC -shared -I$(DEEPSTREAM)/sources/includes -I$(CUDA)/include -o $@ $<
"""


class _DeepStream(Packager):
    name = "deepstream"
    readers: ClassVar[Mapping[ArtifactKind, str]] = dict.fromkeys(_MODEL_KEY, "tensorrt")
    tail = Tail.NMS

    def write(self, model: ServedModel, folder: Path) -> None:
        if model.contract.tail is not Tail.NMS:
            raise ConfigError(
                f"DeepStream needs the nms tail, '{model.artifact.path}' has '{model.contract.tail}'.",
                hint="make the bundle with 'fcos-deploy deploy --tail nms'",
            )
        model.copy_to(folder)
        (folder / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (folder / "config_infer.txt").write_text(nvinfer_config(model), encoding="utf-8")
        (folder / "config_preprocess.txt").write_text(preprocess_config(model), encoding="utf-8")
        (folder / "Makefile").write_text(_MAKEFILE, encoding="utf-8")
        source = importlib.resources.files("fcos_deploy.serving").joinpath(_PARSER)
        (folder / _PARSER).write_bytes(source.read_bytes())


PACKAGER = _DeepStream()


def nvinfer_config(model: ServedModel) -> str:
    """The inference element. Its tensors come prepared from nvdspreprocess (``input-tensor-from-meta``)."""
    contract, options = model.contract, model.options
    images = model.inputs[0]
    suffix = model.path.suffix
    settings: dict[str, object] = {
        "gpu-id": options.gpus[0] if options.gpus else 0,
        "gie-unique-id": 1,
        _MODEL_KEY[model.artifact.kind]: f"model{suffix}",
        "labelfile-path": "labels.txt",
        "batch-size": max(1, options.max_batch),
        "network-mode": _NETWORK_MODE[model.artifact.precision],
        "network-type": 0,
        "num-detected-classes": len(contract.channel_names),
        "infer-dims": ";".join(str(size) for size in images.shape[1:]),
        "input-tensor-from-meta": 1,
        "maintain-aspect-ratio": int(contract.preprocess.size_rule is not SizeRule.STRETCH),
        "symmetric-padding": 0,
        "output-blob-names": ";".join(contract.outputs),
        "cluster-mode": _NO_CLUSTERING,
        "parse-bbox-func-name": "NvDsInferParseFcos",
        "custom-lib-path": _LIBRARY,
    }
    return _sections(
        {"property": settings, "class-attrs-all": {"pre-cluster-threshold": contract.decode.score_threshold}}
    )


def preprocess_config(model: ServedModel) -> str:
    """The preprocessing element, for every stream: resize into the canvas, pad right and below.

    No normalisation for uint8 input.

    Raises:
        ConfigError: a normalisation with a deviation per channel, or a resize to a part of the input, which its library
            does not do.
    """
    contract, batch = model.contract, max(1, model.options.max_batch)
    spec, images = contract.preprocess, model.inputs[0]
    if spec.input_dtype is InputDtype.FLOAT32 and len(set(spec.std)) > 1:
        raise ConfigError(
            f"DeepStream divides all channels by one number, this model by {list(spec.std)}.",
            hint="export with uint8 input, which is normalised inside the graph",
        )
    if spec.content is not None:
        part = f"{spec.content[0]}x{spec.content[1]}"
        raise ConfigError(
            f"DeepStream resizes an image to all of the input, this model to {part} of it.",
            hint="export it with an --input-size of its own",
        )
    _, channels, height, width = images.shape
    settings: dict[str, object] = {
        "enable": 1,
        "unique-id": 5,
        "gpu-id": model.options.gpus[0] if model.options.gpus else 0,
        "target-unique-ids": 1,
        "process-on-frame": 1,
        "network-input-order": 0,
        "maintain-aspect-ratio": int(contract.preprocess.size_rule is not SizeRule.STRETCH),
        "symmetric-padding": 0,
        "processing-width": width,
        "processing-height": height,
        "scaling-filter": 1,
        "scaling-buf-pool-size": 6,
        "tensor-buf-pool-size": 6,
        "network-input-shape": f"{batch};{channels};{height};{width}",
        "network-color-format": _COLOR_FORMAT[spec.channel_order],
        "tensor-data-type": _TENSOR_TYPE[spec.input_dtype],
        "tensor-name": images.name,
        "custom-lib-path": "/opt/nvidia/deepstream/deepstream/lib/gst-plugins/libcustom2d_preprocess.so",
        "custom-tensor-preparation-function": "CustomTensorPreparation",
    }
    # Of nvdspreprocess' parser: the entry of -1 is that of every stream, with whole frames as without a list of them;
    # draw-roi is on by default, and would draw a frame around each image.
    group: dict[str, object] = {
        "src-ids": _EVERY_STREAM,
        "draw-roi": 0,
        "custom-input-transformation-function": "CustomAsyncTransformation",
        "process-on-roi": 0,
    }
    normalisation: dict[str, object] = {"pixel-normalization-factor": 1.0}
    if spec.input_dtype is InputDtype.FLOAT32:
        # (pixel / pixel_scale - mean) / std, as the library computes it: factor * (pixel - offset).
        normalisation = {
            "pixel-normalization-factor": 1.0 / (spec.pixel_scale * spec.std[0]),
            "offsets": ";".join(str(mean * spec.pixel_scale) for mean in spec.mean),
        }
    return _sections({"property": settings, "user-configs": normalisation, "group-0": group})


def _sections(sections: dict[str, dict[str, object]]) -> str:
    """Key files as GLib reads them."""
    blocks = (
        "\n".join((f"[{name}]", *(f"{key}={value}" for key, value in keys.items()))) for name, keys in sections.items()
    )
    return "\n\n".join(blocks) + "\n"
