"""The quantizers by name, behind one interface: ours, which writes Q/DQ nodes, and NNCF for OpenVINO."""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.calibrate import Calibration
from calibration.dataset import CalibrationImage, CalibrationSet, SampleOptions, collect_images
from calibration.execution import Feeder
from calibration.placement import ConvGraph, Placement
from calibration.qdq import quantize_qdq
from fcos_deploy.core.artifact import OnnxGraph, write_sidecar
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.files import atomic_directory
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = [
    "COMPARED_IMAGES",
    "QUANTIZERS",
    "NncfOptions",
    "QuantizeRequest",
    "QuantizeResult",
    "Quantizer",
    "get_quantizer",
    "quantize_nncf",
]


nncf = lazy_import("nncf", extra="nncf")
ov = lazy_import("openvino", extra="openvino")

COMPARED_IMAGES = 4  # of a result with its source: two inferences each


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """One graph to quantize for one consumer.

    ``calibration`` is what the Q/DQ quantizer reads, ``images`` what NNCF measures on; the Q/DQ quantizer compares its
    result with its source on a few of them. ``count`` and ``seed`` choose NNCF's images. ``ignored_layers``: names of
    layers (weights) or nodes that stay in float.
    """

    graph: ConvGraph
    output: Path
    placement: Placement
    calibration: Calibration | None = None
    images: Path | None = None
    count: int | None = None
    seed: int = 0
    ignored_layers: tuple[str, ...] = ()

    @property
    def ranges(self) -> Calibration:
        """The calibration.

        Raises:
            CalibrationError: there is none.
        """
        if self.calibration is None:
            raise CalibrationError(
                "The Q/DQ quantizer needs a calibration.",
                hint=f"fcos-deploy calibrate {self.graph.source.path} --images DIR -o calibration.json",
            )
        return self.calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """Files, the main one first, and what goes into records."""

    files: tuple[Path, ...]
    record: Mapping[str, str]


class Quantizer(ABC):
    """Makes an INT8 artifact from a float ONNX graph."""

    name: str
    suffix: str
    ignores_layers = False  # whether layers can be left in float, which a search for an accuracy goal needs

    @abstractmethod
    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        """Make the artifact.

        Raises:
            MissingDependencyError: a library is not installed.
            CalibrationError: the calibration or the images cannot be used.
            ConfigError: something that this quantizer cannot do.
        """


# OpenVINO reads the result and no other runtime does, as with our own placement for OpenVINO.
_NNCF_PLACEMENT = "openvino"
# OpenVINO's operator types of normalisation, scales, sigmoid and decoding.
_FLOAT_TYPES = frozenset(
    {"MVN", "GroupNormalization", "Multiply", "Subtract", "Sigmoid", "Exp", "Sqrt", "Power", "Divide"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfOptions:
    """The two settings of NNCF that change accuracy most.

    ``overflow_fix``: ``enable`` halves the range of weights, without which processors that lack VNNI saturate;
    ``disable`` uses all of it.
    """

    bias_correction: bool = False
    overflow_fix: str = "enable"


def quantize_nncf(
    source: OnnxGraph,
    images: CalibrationSet,
    output: Path,
    *,
    options: NncfOptions | None = None,
    progress: ProgressFn = no_progress,
) -> QuantizeResult:
    """Quantize a float ONNX graph to an OpenVINO IR (``output`` ends in .xml), for OpenVINO only.

    TensorRT reads NNCF's unsigned scales as signed ones. The settings are not NNCF's defaults, because measurements say
    so (docs/int8.md): ranges are the extremes over all images in place of the mean of each image's extremes, biases are
    not corrected, and nothing is quantized after the last convolutions or around the group norms.

    Raises:
        MissingDependencyError: NNCF or OpenVINO is not installed.
        CalibrationError: an image cannot be read.
        ConfigError: ``output`` has another suffix.
    """
    if output.suffix != ".xml":
        raise ConfigError(f"NNCF writes an OpenVINO IR, '{output}' must end in .xml.")
    options = options or NncfOptions()
    feeder = Feeder(source)
    positions = {image: index for index, image in enumerate(images.images)}

    def feeds(image: CalibrationImage) -> dict[str, Any]:
        progress("calibrating", positions[image] + 1, len(images.images))
        return feeder(image.read(source.contract.preprocess.orientation))

    record = {
        "quantizer": "nncf",
        "nncf": str(nncf.__version__),
        "preset": "mixed",
        "range_estimator": "MINMAX",
        "bias_correction": str(options.bias_correction).lower(),
        "overflow_fix": options.overflow_fix,
        "images": str(len(images.images)),
    }
    model = ov.convert_model(str(source.path))
    with _quiet():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(list(images.images), feeds),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images.images),
            ignored_scope=_ignored_scope(model),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX,
                disable_bias_correction=not options.bias_correction,
                overflow_fix=nncf.OverflowFix(options.overflow_fix),
            ),
        )
    files = _save_ir(quantized, output)
    contract = replace(source.contract, precision=Precision.INT8, placement=_NNCF_PLACEMENT)
    sidecar = write_sidecar(output, contract, record)
    return QuantizeResult(files=(*files, sidecar), record=record)


def _ignored_scope(model: Any) -> Any:
    """Everything that decodes or normalises, and the additions directly after it; residual additions are not."""
    names = []
    for op in model.get_ordered_ops():
        before = {value.get_node().get_type_name() for value in op.input_values()}
        if op.get_type_name() in _FLOAT_TYPES or (op.get_type_name() == "Add" and before & _FLOAT_TYPES):
            names.append(op.get_friendly_name())
    return nncf.IgnoredScope(names=names, validate=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws its own bars on the terminal and logs at INFO; ours say the same."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logger.setLevel(level)


def _save_ir(model: Any, output: Path) -> tuple[Path, Path]:
    """The .xml and its .bin, complete or not there: the .xml, which makes the artifact visible, comes last."""
    staging = output.with_name(f".{output.stem}.ir")
    with atomic_directory(staging) as folder:
        ov.save_model(model, str(folder / output.name), compress_to_fp16=False)
    weights, xml = (
        (staging / output.name).with_suffix(suffix).replace(output.with_suffix(suffix)) for suffix in (".bin", ".xml")
    )
    staging.rmdir()
    return xml, weights


class _Qdq(Quantizer):
    name, suffix = "qdq", ".onnx"
    ignores_layers = True

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        progress("quantizing", 0, 1)
        options = SampleOptions(count=COMPARED_IMAGES, seed=request.seed, minimum=1)
        orientation = request.graph.source.contract.preprocess.orientation
        images = (
            collect_images(request.images, options=options, orientation=orientation).images if request.images else ()
        )
        result = quantize_qdq(
            request.graph,
            request.ranges,
            request.output,
            placement=request.placement,
            ignored_layers=request.ignored_layers,
            images=[image.read(orientation) for image in images],
        )
        progress("quantizing", 1, 1)
        return QuantizeResult(files=(result.path,), record=result.record)


class _Nncf(Quantizer):
    name, suffix = "nncf", ".xml"

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        if "openvino" not in request.placement.backends:
            raise ConfigError(
                f"An NNCF model is for OpenVINO, not for the placement '{request.placement.name}'.",
                hint="--for openvino, or --quantizer qdq",
            )
        if request.ignored_layers:
            raise ConfigError("The NNCF quantizer takes no layers to ignore.", hint="--quantizer qdq")
        if request.images is None:
            raise CalibrationError("NNCF measures on images itself.", hint="--images DIR")
        images = collect_images(
            request.images,
            options=SampleOptions(count=request.count, seed=request.seed),
            orientation=request.graph.source.contract.preprocess.orientation,
        )
        return quantize_nncf(request.graph.source, images, request.output, progress=progress)


QUANTIZERS: dict[str, Quantizer] = {q.name: q for q in (_Qdq(), _Nncf())}


def get_quantizer(name: str) -> Quantizer:
    """One quantizer.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, sorted(QUANTIZERS))
    return QUANTIZERS[name]
