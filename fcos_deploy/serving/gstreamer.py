"""Files for GStreamer elements, which run models with the nms tail: DeepStream's nvinfer, DL Streamer's gvadetect."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.golden import read_golden_image
from fcos_deploy.core.enums import ArtifactKind, Precision, Tail
from fcos_deploy.core.errors import ConfigError, StepCheckError, printable
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.preprocess import ChannelOrder, InputDtype, SizeRule, preprocess
from fcos_deploy.serving.package import Packager, ServedModel

__all__ = ["PACKAGER", "element_text", "model_proc", "nvinfer_config", "preprocess_config"]


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
        model.require_nms_tail("DeepStream")
        model.copy_to(folder)
        (folder / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (folder / "config_infer.txt").write_text(nvinfer_config(model), encoding="utf-8")
        (folder / "config_preprocess.txt").write_text(preprocess_config(model), encoding="utf-8")
        (folder / "Makefile").write_text(_MAKEFILE, encoding="utf-8")
        source = importlib.resources.files("fcos_deploy.serving").joinpath(_PARSER)
        (folder / _PARSER).write_bytes(source.read_bytes())


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


ov = lazy_import("openvino", extra="openvino")
ops = lazy_import("openvino.opset13", extra="openvino")

_COLOR = {ChannelOrder.RGB: "RGB", ChannelOrder.BGR: "BGR", ChannelOrder.GRAY: "GRAYSCALE"}
# Of model-proc 2.2.0: the image is stretched over the input, or fits it with its aspect ratio and black around it.
_RESIZE = {SizeRule.STRETCH: "no-aspect-ratio", SizeRule.LETTERBOX: "aspect-ratio"}
_ABOVE_PADDING = 1e-6  # rows after the last detection have score 0, and gvadetect drops what is below its threshold
_TOLERANCE = 1e-4  # pixels, and of scores


class _DlStreamer(Packager):
    name = "dlstreamer"
    readers: ClassVar[Mapping[ArtifactKind, str]] = {
        ArtifactKind.OPENVINO_IR: "openvino",
        ArtifactKind.ONNX: "openvino",
    }
    tail = Tail.NMS

    def write(self, model: ServedModel, folder: Path) -> None:
        _require_readable(model)
        _, *size = model.inputs[0].shape
        converted = _boxes_and_labels(ov.Core().read_model(model.path), size=tuple(size))
        if model.bundle is not None:
            golden = model.bundle.manifest.golden[0]
            image = read_golden_image(model.bundle.read(golden.path), golden)
            tensor, _ = preprocess(image, model.contract.preprocess)
            _require_same(ov.Core().read_model(model.path), converted, tensor)
        ov.save_model(converted, folder / "model.xml", compress_to_fp16=False)
        (folder / "labels.txt").write_text(model.label_text, encoding="utf-8")
        (folder / "model_proc.json").write_text(json.dumps(model_proc(model), indent=2) + "\n", encoding="utf-8")
        (folder / "gvadetect.txt").write_text(element_text(model) + "\n", encoding="utf-8")


def model_proc(model: ServedModel) -> dict[str, object]:
    """``model-proc``, by the schema of version 2.2.0 (src/gst/bins/model_proc/model_proc_schema.h of DL Streamer)."""
    spec = model.contract.preprocess
    params = {"resize": _RESIZE[spec.size_rule], "color_space": _COLOR[spec.channel_order]}
    return {
        "json_schema_version": "2.2.0",
        "input_preproc": [{"layer_name": "images", "format": "image", "params": params}],
        "output_postproc": [
            {
                "converter": "boxes_labels",
                "labels": [printable(name) for name in model.contract.channel_names],
                # The converter suppresses once more, at 0.4 and across classes, unless no overlap is too much.
                "iou_threshold": 1.0,
            }
        ],
    }


def element_text(model: ServedModel) -> str:
    """The element of a pipeline, for files in the folder that it is started in; labels are in batches of one."""
    threshold = max(model.contract.decode.score_threshold, _ABOVE_PADDING)
    settings = {
        "model": "model.xml",
        "model-proc": "model_proc.json",
        "threshold": f"{threshold:g}",
        "device": "CPU",
        "batch-size": 1,
        "nireq": model.options.instances,
        "pre-process-backend": "opencv",
        "ie-config": "INFERENCE_PRECISION_HINT=f32",  # bfloat16, the default on new CPUs, is not what was certified
    }
    return " ".join(("gvadetect", *(f"{name}={value}" for name, value in settings.items())))


def _require_readable(model: ServedModel) -> None:
    """Refuse what gvadetect cannot do.

    Raises:
        ConfigError: naming it, and the export that it can.
    """
    spec, options = model.contract.preprocess, model.options
    model.require_nms_tail("gvadetect")
    if spec.input_dtype is InputDtype.FLOAT32 or spec.content is not None:
        raise ConfigError(
            "The package is for models of uint8 input, all of which the image is resized to.",
            hint="export with uint8 input, which is normalised inside the graph",
        )
    if options.max_batch > 1 or options.gpus:
        raise ConfigError(
            "The converter reads the labels of one image, so requests are not batched; and it has no CUDA GPUs.",
            hint="leave --max-batch and --gpu out; --instances runs requests side by side",
        )


def _boxes_and_labels(model: Any, *, size: tuple[int | None, ...]) -> Any:  # Any: openvino is imported lazily
    """The model with outputs ``boxes`` (1, K, 5), input pixels and score, and ``labels`` (K,) int32 of at least 0.

    ``size``: channels, height and width. An input ``image_sizes``, which gvadetect does not know, is the canvas.
    """
    model.reshape({name: [1, *(size if name == "images" else (4,))] for name in _input_names(model)})
    for parameter in model.get_parameters():
        if "image_sizes" in parameter.output(0).get_names():
            canvas = ops.constant(_canvas_row(size))
            for reader in parameter.output(0).get_target_inputs():
                reader.replace_source_output(canvas.output(0))
    model.input("images").get_node().set_layout(ov.Layout("NCHW"))
    boxes, scores, labels = (model.output(name).get_node().input_value(0) for name in ("boxes", "scores", "labels"))
    for value in (boxes, scores, labels):
        value.get_tensor().set_names(set())
    zero = ops.constant(0, ov.Type.i32)
    outputs = {
        "boxes": ops.concat([boxes, ops.unsqueeze(scores, ops.constant([2], ov.Type.i64))], 2),
        # -1 in rows that hold nothing; the converter takes labels for unsigned numbers.
        "labels": ops.reshape(
            ops.maximum(ops.convert(labels, "i32"), zero), ops.constant([-1], ov.Type.i64), special_zero=False
        ),
    }
    results = []
    for name, node in outputs.items():
        node.output(0).get_tensor().set_names({name})
        node.set_friendly_name(name)
        results.append(ops.result(node.output(0)))
    images = [item for item in model.get_parameters() if "images" in item.output(0).get_names()]
    return ov.Model(results, images, model.get_friendly_name())


def _canvas_row(shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    """(1, 4) float32: the canvas as resized and as original height and width of an image."""
    return np.array([[*shape[-2:], *shape[-2:]]], np.float32)


def _input_names(model: Any) -> list[str]:  # Any: as above
    return [value.get_any_name() for value in model.inputs]


def _require_same(source: Any, converted: Any, tensor: NDArray[Any]) -> None:  # Any: as above
    """Run both on an image and compare.

    Raises:
        StepCheckError: they differ.
    """
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    core = ov.Core()
    sizes = _canvas_row(tensor.shape)
    feeds = {name: tensor if name == "images" else sizes for name in _input_names(source)}
    expected = core.compile_model(source, "CPU", settings)(feeds)
    present = core.compile_model(converted, "CPU", settings)([tensor])
    boxes, labels = present["boxes"], present["labels"]
    expected_boxes = np.concatenate((expected["boxes"], expected["scores"][..., None]), 2)
    expected_labels = np.maximum(expected["labels"].reshape(-1), 0)
    if not np.allclose(boxes, expected_boxes, rtol=0, atol=_TOLERANCE) or not np.array_equal(labels, expected_labels):
        raise StepCheckError("The outputs for gvadetect are not those of the model.")


PACKAGER = (_DeepStream(), _DlStreamer())
