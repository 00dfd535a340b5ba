"""How far an INT8 graph's outputs are from its source's: run side by side, before the result is handed out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.engines import Run, open_engine
from calibration.feeds import Feeder, plain_picture
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import StepCheckError

__all__ = ["Fidelity", "SignalToNoise", "compare_models"]


class SignalToNoise:
    """Signal-to-quantization-noise ratio of one tensor over any number of images."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, reference: NDArray[Any], result: NDArray[Any]) -> None:
        """Compare two arrays of the same shape."""
        wanted = reference.astype(np.float64)
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(result.astype(np.float64) - wanted).sum())

    @property
    def decibel(self) -> float:
        """10 log10 of the ratio of energies; 200 when nothing differs."""
        return 200.0 if not self._noise else float(10 * np.log10(max(self._signal, 1e-300) / self._noise))


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Decibel per output, over ``images`` pictures; no pictures means that a gradient was used."""

    sqnr_db: dict[str, float]
    images: int


def compare_models(
    source: Any,
    result: Any,
    *,
    contract: ModelContract,
    pictures: Sequence[NDArray[np.uint8]] = (),
    engine: str = "onnxruntime",
) -> Fidelity:
    """Run two ONNX models (protos) on the same pictures.

    Raises:
        StepCheckError: the result does not run, or gives values that are not finite.
    """
    feeder = Feeder(source, contract)
    runs = (open_engine(engine, source), _open_result(engine, result))
    ratios = {output.name: SignalToNoise() for output in source.graph.output}
    for picture in pictures or [plain_picture()]:
        feeds = feeder(picture)
        wanted, got = (run(feeds) for run in runs)
        for name, ratio in ratios.items():
            _check_finite(name, got[name])
            ratio.add(wanted[name], got[name])
    return Fidelity({name: round(ratio.decibel, 2) for name, ratio in ratios.items()}, len(pictures))


def _open_result(engine: str, model: Any) -> Run:
    try:
        return open_engine(engine, model)
    except Exception as error:
        raise StepCheckError(f"The quantized graph does not open in {engine}: {error}.") from error


def _check_finite(name: str, values: NDArray[Any]) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise StepCheckError(f"Output '{name}' of the quantized graph is not finite.", hint="calibrate on other images")
