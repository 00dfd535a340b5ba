"""NNCF as the second quantizer, for OpenVINO only: TensorRT misreads its unsigned scales (spec 5.1).

Settings follow measurements (spec 3.2): extremes of all images as ranges instead of NNCF's mean of extremes, no bias
correction, nothing quantized after the last convolutions or around the group norms.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.dataset import CalibrationImage, CalibrationSet, read_picture
from calibration.execution import Feeder, Run, compiled_run, int8_convolutions
from calibration.placement import ConvSite, load_graph
from fcos_deploy.core.contract import ModelContract, read_contract, write_sidecar
from fcos_deploy.core.enums import Precision
from fcos_deploy.core.errors import AccuracyGateError, CalibrationError, ConfigError
from fcos_deploy.core.files import atomic_directory
from fcos_deploy.core.libraries import require
from fcos_deploy.core.progress import ProgressFn, no_progress

__all__ = [
    "NNCF_PLACEMENT",
    "NncfGoal",
    "NncfOptions",
    "NncfTrial",
    "PreparedNncf",
    "QuantizedIr",
    "ScoreRun",
    "nncf_table",
    "prepare_nncf",
    "quantize_nncf",
    "quantize_nncf_to_goal",
    "quiet_nncf",
    "write_ir",
]

# OpenVINO reads it and nobody else does, as with our own placement for OpenVINO.
NNCF_PLACEMENT = "openvino"


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfOptions:
    """``preset``: mixed (asymmetric activations) or performance (symmetric).

    ``overflow_fix``: NNCF's half range of weights, without which processors that lack VNNI saturate.
    """

    preset: str = "mixed"
    range_estimator: str = "MINMAX"
    bias_correction: bool = False
    overflow_fix: str = "enable"

    def __post_init__(self) -> None:
        if self.preset not in {"mixed", "performance"}:
            raise ConfigError(f"There is no NNCF preset '{self.preset}'.", hint="mixed or performance")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedIr:
    """What was written: the .xml, its .bin and its contract."""

    files: tuple[Path, ...]
    record: dict[str, str]


def quantize_nncf(
    source: Path,
    images: CalibrationSet,
    output: Path,
    *,
    options: NncfOptions | None = None,
    progress: ProgressFn = no_progress,
) -> QuantizedIr:
    """Quantize a float ONNX graph to an OpenVINO IR (``output`` ends in .xml).

    Raises:
        MissingDependencyError: NNCF or OpenVINO is not installed.
        CalibrationError: the graph is not float, or an image cannot be read.
    """
    prepared = prepare_nncf(source, images, output, options=options or NncfOptions(), progress=progress)
    nncf = require("nncf", extra="nncf")
    with quiet_nncf():
        model = nncf.quantize(prepared.model, advanced_parameters=prepared.advanced, **prepared.arguments)
    return write_ir(prepared, model)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedNncf:
    """A float model and what NNCF's functions are called with; ``convolutions`` names those of the source."""

    output: Path
    contract: ModelContract
    convolutions: tuple[ConvSite, ...]
    model: Any  # openvino.Model; neither library has types that hold without it
    arguments: dict[str, Any]
    advanced: Any
    record: dict[str, str]


def prepare_nncf(
    source: Path, images: CalibrationSet, output: Path, *, options: NncfOptions, progress: ProgressFn = no_progress
) -> PreparedNncf:
    """Check the request and convert the model; raises as ``quantize_nncf``."""
    if output.suffix != ".xml":
        raise ConfigError(f"NNCF writes an OpenVINO IR, '{output}' must end in .xml.")
    contract = read_contract(source)
    if contract.precision is not Precision.FP32:
        raise CalibrationError(f"'{source}' is {contract.precision}.", hint="quantize the fp32 graph")
    graph = load_graph(source)
    nncf, ov = require("nncf", extra="nncf"), require("openvino", extra="openvino")
    feeder = Feeder(graph.model, contract)
    positions = {image: index for index, image in enumerate(images.images)}

    def feeds(image: CalibrationImage) -> dict[str, Any]:
        progress("calibrating", positions[image] + 1, len(images.images))
        return feeder(read_picture(image))

    model = ov.convert_model(str(source))
    arguments = {
        "calibration_dataset": nncf.Dataset(list(images.images), feeds),
        "preset": nncf.QuantizationPreset(options.preset),
        "subset_size": len(images.images),
        "fast_bias_correction": True,
        "ignored_scope": _ignored(nncf, model),
    }
    record = {
        "quantizer": "nncf",
        "nncf": str(nncf.__version__),
        "preset": options.preset,
        "range_estimator": options.range_estimator,
        "bias_correction": str(options.bias_correction).lower(),
        "overflow_fix": options.overflow_fix,
        "images": str(len(images.images)),
    }
    return PreparedNncf(
        output=output,
        contract=contract,
        convolutions=graph.convs,
        model=model,
        arguments=arguments,
        advanced=_advanced(options),
        record=record,
    )


def write_ir(prepared: PreparedNncf, model: Any) -> QuantizedIr:
    """Save what NNCF made, with its contract."""
    ov, output = require("openvino", extra="openvino"), prepared.output
    made = output.with_name(f".{output.stem}.ir")
    with atomic_directory(made) as folder:
        ov.save_model(model, str(folder / output.name), compress_to_fp16=False)
    files = []
    # The .xml, which makes the artifact visible, comes last.
    for suffix in (".bin", ".xml"):
        files.append((made / output.name).with_suffix(suffix).replace(output.with_suffix(suffix)))
    made.rmdir()
    contract = replace(prepared.contract, precision=Precision.INT8, placement=NNCF_PLACEMENT)
    sidecar = write_sidecar(output, contract, prepared.record)
    return QuantizedIr(files=(files[1], files[0], sidecar), record=prepared.record)


# OpenVINO's operator types of normalisation, scales, sigmoid and decoding.
_FLOAT_TYPES = frozenset(
    {"MVN", "GroupNormalization", "Multiply", "Subtract", "Sigmoid", "Exp", "Sqrt", "Power", "Divide"}
)


def _ignored(nncf: Any, model: Any) -> Any:
    """Everything that decodes or normalises, and the additions directly after it; residual additions are not."""
    names = []
    for op in model.get_ordered_ops():
        before = {value.get_node().get_type_name() for value in op.input_values()}
        if op.get_type_name() in _FLOAT_TYPES or (op.get_type_name() == "Add" and before & _FLOAT_TYPES):
            names.append(op.get_friendly_name())
    return nncf.IgnoredScope(names=names, validate=False)


def _advanced(options: NncfOptions) -> Any:
    parameters = require("nncf.quantization.advanced_parameters", extra="nncf")
    ranges = require("nncf.quantization.range_estimator", extra="nncf")
    estimator = getattr(ranges.RangeEstimatorParametersSet, options.range_estimator)
    return parameters.AdvancedQuantizationParameters(
        activations_range_estimator_params=estimator,
        disable_bias_correction=not options.bias_correction,
        overflow_fix=parameters.OverflowFix(options.overflow_fix),
    )


@contextlib.contextmanager
def quiet_nncf() -> Iterator[None]:
    """NNCF draws its own bars on the terminal and logs at INFO; ours say the same."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logger.setLevel(level)


# Score (0..1, higher is better) of a function from feeds to outputs, on the evaluation images with these positions.
ScoreRun = Callable[[Run, Sequence[int]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NncfGoal:
    """``max_drop``: how far the score (0..1) may fall. ``images``: how many ``score`` knows.

    ``ranking_images``: of these, how many rank the groups: each costs one inference a group. ``iterations``: groups
    that may be reverted, each costs an evaluation on all images.
    """

    max_drop: float
    images: int
    score: ScoreRun
    ranking_images: int = 8
    iterations: int = 16

    def __post_init__(self) -> None:
        if self.max_drop < 0:
            raise ConfigError(f"The allowed drop must not be negative, got {self.max_drop}.")
        if min(self.images, self.ranking_images, self.iterations) < 1:
            raise ConfigError("images, ranking_images and iterations must be at least 1.")


@dataclass(frozen=True, slots=True)
class NncfTrial:
    """A candidate that was evaluated on all images; the first is the float model."""

    int8_convolutions: int
    score: float


def nncf_table(trials: Sequence[NncfTrial]) -> str:
    """The trials in their order, for people."""
    return "\n".join([" INT8  score", *(f"{t.int8_convolutions:5d}  {t.score:.4f}" for t in trials)])


def quantize_nncf_to_goal(
    source: Path,
    images: CalibrationSet,
    output: Path,
    *,
    goal: NncfGoal,
    options: NncfOptions | None = None,
    progress: ProgressFn = no_progress,
) -> tuple[QuantizedIr, tuple[NncfTrial, ...]]:
    """``quantize_nncf`` with as many groups of quantizers reverted as the goal needs, and all that was tried.

    Raises:
        AccuracyGateError: NNCF did not reach the goal; the message holds its trials, nothing was written.
        CalibrationError, MissingDependencyError: as ``quantize_nncf``.
    """
    prepared = prepare_nncf(source, images, output, options=options or NncfOptions(), progress=progress)
    nncf = require("nncf", extra="nncf")
    watch = _Watch(goal, prepared.convolutions, progress=progress)
    restorer = nncf.AdvancedAccuracyRestorerParameters(
        max_num_iterations=goal.iterations,
        ranking_subset_size=min(goal.ranking_images, goal.images),
        num_ranking_workers=1,  # Each worker would hold a compiled model and use all threads.
    )
    with watch.errors(), quiet_nncf():
        model = nncf.quantize_with_accuracy_control(
            prepared.model,
            validation_dataset=nncf.Dataset(list(range(goal.images))),
            validation_fn=watch,
            max_drop=goal.max_drop,
            drop_type=nncf.DropType.ABSOLUTE,
            advanced_quantization_parameters=prepared.advanced,
            advanced_accuracy_restorer_parameters=restorer,
            **prepared.arguments,
        )
    watch.check(source)
    return write_ir(prepared, model), tuple(watch.trials)


class _Watch:
    """NNCF's validation function: scores compiled models and remembers those that saw all images."""

    def __init__(self, goal: NncfGoal, convolutions: Sequence[ConvSite], *, progress: ProgressFn) -> None:
        self._goal, self._convolutions, self._progress = goal, convolutions, progress
        self._error: Exception | None = None
        self.trials: list[NncfTrial] = []

    def __call__(self, compiled: Any, positions: Iterable[int]) -> tuple[float, None]:
        chosen = list(positions)
        try:
            score = self._goal.score(compiled_run(compiled), chosen)
        except Exception as error:  # NNCF takes an exception for another kind of validation function and goes on.
            self._error = self._error or error
            raise
        if len(chosen) == self._goal.images:
            self.trials.append(NncfTrial(len(int8_convolutions(compiled, self._convolutions)), score))
            self._progress("evaluating candidates", len(self.trials), self._goal.iterations + 2)
        return score, None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """What the scoring raised leaves NNCF as what it was."""
        try:
            yield
        except Exception as error:
            if self._error is not None and self._error is not error:
                raise self._error from error
            raise

    def check(self, source: Path) -> None:
        """Raise AccuracyGateError unless the last candidate, which NNCF returned, holds the goal."""
        if self._error is not None:
            raise self._error
        before, last = self.trials[0].score, self.trials[-1]
        # NNCF also reverts everything, and calls that success.
        if before - last.score <= self._goal.max_drop + 1e-6 and last.int8_convolutions:
            return
        raise AccuracyGateError(
            f"NNCF misses the goal: float {before:.4f}, allowed drop {self._goal.max_drop:.4f}, of "
            f"{len(self._convolutions)} convolutions in INT8:\n{nncf_table(self.trials)}",
            hint=f"--quantizer qdq, a larger drop, or the float model '{source}'",
        )
