"""Known mistakes, made in the reference on purpose, and what it then gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.accuracy.causes import shifted
from fcos_deploy.accuracy.stages import network_input
from fcos_deploy.core.backend import ComputeType, SessionOptions, Tensors
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.network import BoxActivation
from fcos_deploy.core.preprocess import Letterbox, preprocess
from fcos_deploy.core.preprocess_spec import InputDtype, PreprocessSpec, ResizeFilter, ResizeOrder
from fcos_deploy.detector import Detector

if TYPE_CHECKING:
    from fcos_deploy.model.fcos import Fcos

__all__ = ["Evidence", "rounded_networks", "tried_mistakes", "tried_resizing"]

# (pixel scale, mean, std) as people use them, beside those of the model itself.
_NORMALISATIONS: dict[str, tuple[float, tuple[float, float, float], tuple[float, float, float]]] = {
    "does not normalise": (1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "only scales to 0..1": (255.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "scales to -1..1": (255.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "normalises with torchvision's mean and std": (255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "normalises with Caffe's mean": (1.0, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "normalises with detectron2's mean": (1.0, (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)),
    "normalises with mmdetection's mean and std": (1.0, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """One image as both detectors saw it, and the reference itself, to try mistakes on.

    ``pixels``: the picture, (h, w, 3) uint8 RGB. ``network``: the reference's PyTorch network, where there is one;
    with it mistakes inside the network can be tried.
    """

    reference: Detector
    candidate: Detector
    pixels: NDArray[np.uint8]
    reference_feeds: Tensors
    candidate_feeds: Tensors
    reference_outputs: Tensors
    candidate_outputs: Tensors
    letterbox: Letterbox
    candidate_found: Detections
    network: Fcos | None = None

    @property
    def input_size(self) -> tuple[int, int]:
        """Padded (H, W)."""
        height, width = self.reference_feeds["images"].shape[2:]
        return int(height), int(width)


def tried_resizing(evidence: Evidence) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Other interpolations of the same picture: name, sentence, and the input tensor (3, H, W)."""
    spec = evidence.reference.contract.preprocess
    for other in (ResizeFilter.CV2, ResizeFilter.PIL):
        if other is not spec.resize_filter and _can_resize(spec, other):
            tensor, _ = preprocess(evidence.pixels, replace(spec, resize_filter=other))
            yield "resize-filter", f"the picture is resized as by '{other}' in place of '{spec.resize_filter}'", tensor


def _can_resize(spec: PreprocessSpec, other: ResizeFilter) -> bool:
    return spec.resize_order is ResizeOrder.RESIZE_FIRST or other is not ResizeFilter.PIL


def tried_mistakes(evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Mistakes behind the input tensor: name, sentence, and the head's outputs."""
    images = evidence.reference_feeds["images"]
    run = evidence.reference.infer
    swapped = np.ascontiguousarray(images[:, ::-1])
    yield "channel-order", "the graph swaps the colour channels (RGB/BGR)", run({"images": swapped})
    for dx, dy in ((0.5, 0.5), (-0.5, -0.5)):
        moved = _moved(images, dx, dy)
        text = f"the graph shifts the image by {dx:+.1f} pixels to the right and {dy:+.1f} down"
        yield "shift", text, run({"images": moved})
    if evidence.network is not None:
        yield from _normalisations(evidence.network, evidence)
        yield from _variants(evidence.network, evidence)


def _moved(images: NDArray[np.generic], dx: float, dy: float) -> NDArray[np.generic]:
    moved = np.stack([shifted(image.astype(np.float32), dx, dy) for image in images])
    return moved.round().astype(images.dtype) if images.dtype == np.dtype(InputDtype.UINT8.value) else moved


def _normalisations(network: Fcos, evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """Other constants in the graph that normalises; for float input the host does it, and the input shows it."""
    contract = evidence.reference.contract
    if contract.preprocess.input_dtype is not InputDtype.UINT8:
        return
    mine = contract.preprocess
    reversed_order = (mine.pixel_scale, mine.mean[::-1], mine.std[::-1])
    options = {**_NORMALISATIONS, "has mean and std in the opposite order of the channels": reversed_order}
    as_float = contract.with_preprocess(replace(mine, input_dtype=InputDtype.FLOAT32))
    with Detector.of_network(network, as_float, options=_options(evidence)) as detector:
        for text, (scale, mean, std) in options.items():
            other = replace(mine, pixel_scale=scale, mean=mean, std=std)
            if other != mine:
                images = network_input(evidence.reference_feeds["images"], other)
                yield "normalisation", f"the graph {text}", detector.infer({"images": images})


def _variants(network: Fcos, evidence: Evidence) -> Iterator[tuple[str, str, Tensors]]:
    """The reference's weights in networks that load them as well, and are silently wrong."""
    from fcos_deploy.model.fcos import Fcos

    config = network.config
    other = BoxActivation.EXP if config.box_activation is BoxActivation.RELU else BoxActivation.RELU
    places = {True: "first 1x1", False: "3x3"}
    variants = (
        (
            "stride-placement",
            f"the bottlenecks' stride is on the {places[not config.stride_in_1x1]} convolution (stride_in_1x1 differs)",
            replace(config, stride_in_1x1=not config.stride_in_1x1),
        ),
        (
            "activation",
            f"the box activation is {other} in place of {config.box_activation}",
            replace(config, box_activation=other),
        ),
        (
            "centerness-branch",
            "the centerness comes from the other tower",
            replace(config, centerness_on_reg=not config.centerness_on_reg),
        ),
    )
    for name, text, changed in variants:
        variant = Fcos(changed)
        variant.load_state_dict(network.state_dict())
        with Detector.of_network(variant.eval(), evidence.reference.contract, options=_options(evidence)) as detector:
            yield name, text, detector.infer(evidence.reference_feeds)


def rounded_networks(evidence: Evidence) -> Iterator[tuple[ComputeType, Tensors]]:
    """The head's outputs when the reference computes in a smaller float type."""
    if evidence.network is None:
        return
    for compute in (ComputeType.BF16, ComputeType.F16):
        options = replace(_options(evidence), compute=compute)
        with Detector.of_network(evidence.network, evidence.reference.contract, options=options) as detector:
            yield compute, detector.infer(evidence.reference_feeds)


def _options(evidence: Evidence) -> SessionOptions:
    threads = evidence.reference.session.description.get("threads", "")
    return SessionOptions(threads=int(threads) if threads.isdigit() else None)
