"""From a request to a calibration.json and a report: what the command line and the pipeline call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibration.calibration_file import DEFAULT_METHOD, Calibration, save_calibration
from calibration.convergence import ConvergencePoint, ConvergenceRecorder
from calibration.data import SampleOptions, collect_images
from calibration.ranges import RangeMethod
from calibration.set_report import SetReport, examine_set
from calibration.statistics import StatisticsOptions, collect_ranges
from calibration.trt_cache import write_trt_cache
from fcos_deploy.core.contract_io import read_contract
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = ["CalibrationReport", "CalibrationRequest", "calibrate", "range_method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """One calibration; ``method`` empty means the default."""

    model: Path
    images: Path
    output: Path
    annotations: Path | None = None
    method: str = ""
    count: int | None = None
    seed: int = 0
    evaluation_images: Path | None = None
    engine: str = "auto"
    threads: int | None = None
    convergence: bool = False
    minimum: int = 8
    tensorrt_version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """What was made, and what is to be said of the images."""

    output: str
    method: RangeMethod
    tensors: int
    images: SetReport
    convergence: tuple[ConvergencePoint, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        found = [*self.images.lines(), f"{self.tensors} tensors, method {self.method}: {self.output}"]
        found += [
            f"{p.images:5d} images: ranges differ from the final ones by {p.median_change:.2%} in the median, "
            f"{p.largest_change:.1%} at most"
            for p in self.convergence
        ]
        return found


def range_method(name: str) -> RangeMethod:
    """A method by name, the default for an empty one.

    Raises:
        ConfigError: naming the ones that exist.
    """
    known = [str(method) for method in RangeMethod]
    if name and name not in known:
        raise ConfigError(f"There is no range method '{name}'.", hint=f"methods: {', '.join(known)}")
    return RangeMethod(name) if name else DEFAULT_METHOD


def calibrate(request: CalibrationRequest, *, progress: ProgressFn = no_progress) -> CalibrationReport:
    """Choose images, measure, write. An interrupted run resumes from a hidden file beside the output.

    Raises:
        CalibrationError: images or statistics that cannot be used.
        ConfigError: an unknown method or engine, or an output that cannot be written.
    """
    method = range_method(request.method)
    contract = read_contract(request.model)
    sample = SampleOptions(count=request.count, seed=request.seed, minimum=request.minimum)
    images = collect_images(request.images, annotations=request.annotations, options=sample)
    report = examine_set(images, contract, evaluation_images=request.evaluation_images)
    recorder = ConvergenceRecorder(len(images.images), method=method) if request.convergence else None
    calibration: Calibration = collect_ranges(
        request.model,
        images,
        options=StatisticsOptions(method=method, engine=request.engine, threads=request.threads),
        state=request.output.with_name(f".{request.output.stem}.state.npz"),
        progress=progress,
        observer=recorder,
    )
    save_calibration(calibration, request.output)
    if request.tensorrt_version:
        cache = request.output.with_suffix(".cache")
        write_trt_cache(calibration, request.model, cache, version=request.tensorrt_version)
    return CalibrationReport(
        output=str(request.output),
        method=method,
        tensors=len(calibration.tensors),
        images=report,
        convergence=recorder.curve() if recorder else (),
    )
