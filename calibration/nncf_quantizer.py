"""NNCF as the second quantizer, for OpenVINO only: TensorRT reads its unsigned scales as signed ones.

The settings are not NNCF's defaults, because measurements say so (docs/int8.md): ranges are the extremes over all
images in place of the mean of each image's extremes, biases are not corrected, and nothing is quantized after the last
convolutions or around the group norms.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.dataset import CalibrationImage, CalibrationSet
from calibration.execution import Feeder
from fcos_deploy.core.contract import write_sidecar
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.files import atomic_directory
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.onnx_graph import OnnxGraph
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["NncfOptions", "QuantizedIr", "quantize_nncf"]

nncf = lazy_import("nncf", extra="nncf")
ov = lazy_import("openvino", extra="openvino")

# OpenVINO reads the result and no other runtime does, as with our own placement for OpenVINO.
_PLACEMENT = "openvino"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedIr:
    """What was written: the .xml, its .bin and its contract."""

    files: tuple[Path, ...]
    record: dict[str, str]


def quantize_nncf(
    source: OnnxGraph,
    images: CalibrationSet,
    output: Path,
    *,
    options: NncfOptions | None = None,
    progress: ProgressFn = no_progress,
) -> QuantizedIr:
    """Quantize a float ONNX graph to an OpenVINO IR (``output`` ends in .xml).

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
    contract = replace(source.contract, precision=Precision.INT8, placement=_PLACEMENT)
    sidecar = write_sidecar(output, contract, record)
    return QuantizedIr(files=(*files, sidecar), record=record)


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
