"""The quantizers by name, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.cache import Calibration, load_calibration
from calibration.calibrate import range_method
from calibration.dataset import SampleOptions, collect_images
from calibration.nncf_quantizer import quantize_nncf
from calibration.placement import Placement, WeightRange, placement_for
from calibration.qdq import quantize_qdq
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["QUANTIZERS", "QuantizeRequest", "QuantizeResult", "Quantizer", "quantizer"]

_COMPARED = 4  # images: two inferences each


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """One graph to quantize for one consumer.

    ``calibration`` is what the Q/DQ quantizer reads, ``images`` what NNCF measures on; the Q/DQ quantizer compares its
    result with its source on a few of them. ``method`` and ``weights`` replace the calibration's method and the
    placement's range of weights when given.
    """

    source: Path
    output: Path
    consumer: str = "portable"
    calibration: Path | None = None
    images: Path | None = None
    count: int | None = None
    seed: int = 0
    method: str = ""
    weights: WeightRange | None = None
    ignored_layers: tuple[str, ...] = ()

    def load_calibration(self) -> Calibration:
        """The ranges, under the method that was asked for.

        Raises:
            CalibrationError: missing, damaged or of another graph.
        """
        if self.calibration is None:
            raise CalibrationError(
                "The Q/DQ quantizer needs a calibration.",
                hint=f"fcos-deploy calibrate {self.source} --images DIR -o calibration.json",
            )
        calibration = load_calibration(self.calibration, graph=self.source)
        return calibration.with_method(range_method(self.method)) if self.method else calibration

    @property
    def placement(self) -> Placement:
        """The consumer's placement."""
        policy = placement_for(self.consumer)
        return replace(policy, weights=self.weights) if self.weights else policy


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """Files, the main one first, and what goes into records."""

    files: tuple[Path, ...]
    record: Mapping[str, str]


class Quantizer(ABC):
    """Makes an INT8 artifact from a float ONNX graph."""

    name: str
    suffix: str
    extra: str
    ignores_layers = False  # whether layers can be left in float, which a search for an accuracy goal needs

    @abstractmethod
    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        """Make the artifact.

        Raises:
            MissingDependencyError: a library is not installed.
            CalibrationError: the calibration or the images cannot be used.
            ConfigError: something that this quantizer cannot do.
        """


class _Qdq(Quantizer):
    name, suffix, extra = "qdq", ".onnx", "export"
    ignores_layers = True

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        progress("quantizing", 0, 1)
        made = quantize_qdq(
            request.source,
            request.load_calibration(),
            request.output,
            policy=request.placement,
            ignored_layers=request.ignored_layers,
            pictures=_pictures(request),
        )
        progress("quantizing", 1, 1)
        return QuantizeResult(files=(made.path,), record=made.record)


def _pictures(request: QuantizeRequest) -> list[NDArray[np.uint8]]:
    if request.images is None:
        return []
    options = SampleOptions(count=_COMPARED, seed=request.seed, minimum=1)
    return [image.read() for image in collect_images(request.images, options=options).images]


class _Nncf(Quantizer):
    name, suffix, extra = "nncf", ".xml", "nncf"

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        if "openvino" not in request.placement.backends:
            raise ConfigError(
                f"An NNCF model is for OpenVINO, not for '{request.consumer}'.",
                hint="--for openvino, or --quantizer qdq",
            )
        if request.ignored_layers:
            raise ConfigError("NNCF cannot be told layers to keep in float here.", hint="--quantizer qdq")
        if request.images is None:
            raise CalibrationError("NNCF measures on images itself.", hint="--images DIR")
        images = collect_images(request.images, options=SampleOptions(count=request.count, seed=request.seed))
        result = quantize_nncf(request.source, images, request.output, progress=progress)
        return QuantizeResult(files=result.files, record=result.record)


QUANTIZERS: dict[str, Quantizer] = {q.name: q for q in (_Qdq(), _Nncf())}


def quantizer(name: str) -> Quantizer:
    """One quantizer.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, sorted(QUANTIZERS))
    return QUANTIZERS[name]
