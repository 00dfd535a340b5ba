"""The quantizers by name, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibration.cache import Calibration
from calibration.dataset import SampleOptions, collect_images
from calibration.nncf_quantizer import quantize_nncf
from calibration.placement import ConvGraph, Placement
from calibration.qdq import quantize_qdq
from fcos_deploy.core.errors import CalibrationError, ConfigError, unknown_name
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["QUANTIZERS", "QuantizeRequest", "QuantizeResult", "Quantizer", "get_quantizer"]

_COMPARED = 4  # images: two inferences each


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


class _Qdq(Quantizer):
    name, suffix = "qdq", ".onnx"
    ignores_layers = True

    def quantize(self, request: QuantizeRequest, *, progress: ProgressFn = no_progress) -> QuantizeResult:
        progress("quantizing", 0, 1)
        options = SampleOptions(count=_COMPARED, seed=request.seed, minimum=1)
        images = collect_images(request.images, options=options).images if request.images else ()
        result = quantize_qdq(
            request.graph,
            request.ranges,
            request.output,
            placement=request.placement,
            ignored_layers=request.ignored_layers,
            images=[image.read(request.graph.source.contract.preprocess.orientation) for image in images],
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
        images = collect_images(request.images, options=SampleOptions(count=request.count, seed=request.seed))
        result = quantize_nncf(request.graph.source, images, request.output, progress=progress)
        return QuantizeResult(files=result.files, record=result.record)


QUANTIZERS: dict[str, Quantizer] = {q.name: q for q in (_Qdq(), _Nncf())}


def get_quantizer(name: str) -> Quantizer:
    """One quantizer.

    Raises:
        ConfigError: naming the ones that exist.
    """
    if name not in QUANTIZERS:
        raise unknown_name("quantizer", name, sorted(QUANTIZERS))
    return QUANTIZERS[name]
