"""What a search runs: the sizes, backends, precisions and threads of a model, each made when it is first asked for."""

from __future__ import annotations

import contextlib
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from fcos_deploy.accuracy.dataset import Dataset
from fcos_deploy.bundle import BundleWriter, StepCache, StepOutput
from fcos_deploy.core.artifact import graph_file, is_checkpoint
from fcos_deploy.core.backend import SessionOptions, get_backend
from fcos_deploy.core.checkpoint_options import CheckpointOptions, override_options
from fcos_deploy.core.enums import ArtifactKind, ComputeType, PerformanceHint, Precision
from fcos_deploy.core.errors import ConfigError
from fcos_deploy.core.gate import undecided_because
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.onnx_file import onnx_interface
from fcos_deploy.core.preprocess import PreprocessSpec, SizeRule
from fcos_deploy.core.progress import ProgressFn
from fcos_deploy.detector import DetectorSpec
from fcos_deploy.pipeline.proof import in_bf16
from fcos_deploy.pipeline.quantize import quantize_model
from fcos_deploy.pipeline.source import open_source, source_contract
from fcos_deploy.pipeline.steps import (
    DeployContext,
    DeployRequest,
    Graph,
    ImageSets,
    Variant,
    build,
    calibrate,
    export,
    int8_draft,
    int8_inputs,
)

__all__ = ["Configuration", "InputSize", "TuneModels", "size_of", "sizes_around"]

_SCALES = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25)  # of the model's own size


@dataclass(frozen=True, slots=True, order=True)
class InputSize:
    """A fixed canvas (``height``, ``width``), or with ``follows_image`` the shortest and the longest edge."""

    height: int
    width: int
    follows_image: bool = False

    def __str__(self) -> str:
        return f"{self.height}{':' if self.follows_image else 'x'}{self.width}"

    @staticmethod
    def parse(text: str) -> InputSize:
        """``320x416`` is a canvas, ``800:1333`` the shortest and the longest edge.

        Raises:
            ConfigError: it is neither.
        """
        match = re.fullmatch(r"(\d{1,5})([xX:])(\d{1,5})", text.strip())
        if match is None:
            raise ConfigError(
                f"--size must be height x width such as 320x416, or shortest:longest such as 800:1333, got '{text}'."
            )
        return InputSize(int(match[1]), int(match[3]), match[2] == ":")

    def pixels(self, height: int, width: int) -> float:
        """About as many as the network's input has, without its padding, for an image of this height and width."""
        if not self.follows_image:
            return float(self.height * self.width)
        scale = min(self.height / min(height, width), self.width / max(height, width))
        return scale * scale * height * width

    def of(self, spec: PreprocessSpec) -> PreprocessSpec:
        """``spec`` with this size in place of its own.

        Raises:
            ConfigError: a canvas has no rule for edges.
        """
        if self.follows_image and spec.canvas is not None:
            raise ConfigError(f"The size {self} does not go with the rule '{spec.size_rule}' of this model.")
        if self.follows_image:
            return replace(spec, shortest=self.height, longest=self.width)
        rule = SizeRule.LETTERBOX if spec.canvas is None else spec.size_rule
        return replace(
            spec,
            height=self.height,
            width=self.width,
            shortest=None,
            longest=None,
            size_rule=rule,
            content=None,
        )


def size_of(spec: PreprocessSpec) -> InputSize:
    """The size of a preprocessing."""
    if spec.canvas is not None:
        return InputSize(*spec.canvas)
    return InputSize(spec.shortest or 0, spec.longest or 0, follows_image=True)


def sizes_around(spec: PreprocessSpec) -> tuple[InputSize, ...]:
    """Half to five quarters of a model's own size, as multiples of what its input must be a multiple of."""
    own = size_of(spec)
    sizes = []
    for scale in _SCALES:
        sides = [
            max(1, round(side * scale / spec.size_divisor)) * spec.size_divisor for side in (own.height, own.width)
        ]
        # The longest edge is only a limit: it keeps the ratio.
        if own.follows_image:
            sides[1] = round(own.width * sides[0] / own.height)
        sizes.append(own if scale == 1.0 else InputSize(sides[0], sides[1], own.follows_image))
    return tuple(dict.fromkeys(sizes))


# What computes a network, the most exact one first: the others approximate what fp32 computes.
_FIDELITY = (
    (Precision.FP32, ComputeType.F32),
    (Precision.FP16, ComputeType.F32),
    (Precision.FP32, ComputeType.BF16),
    (Precision.FP16, ComputeType.BF16),
    (Precision.INT8, ComputeType.F32),
    (Precision.INT8, ComputeType.BF16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What is tried: a size, a backend, a precision, and how the runtime is opened.

    ``compute``: the format of what the precision leaves in float. ``batch``: images of a request, ``streams`` requests
    at a time.
    """

    size: InputSize
    backend: str
    precision: Precision
    threads: int
    compute: ComputeType = ComputeType.F32
    streams: int = 1
    batch: int = 1
    hint: PerformanceHint = PerformanceHint.LATENCY

    @property
    def fidelity(self) -> int:
        """The smaller, the more exactly it computes what fp32 computes."""
        return _FIDELITY.index((self.precision, self.compute))

    def approximates(self, exact: Configuration) -> bool:
        """Whether it can detect better than ``exact`` at the same size only by chance.

        INT8 of two runtimes is quantized at different places, so that neither stands for the other.
        """
        comparable = exact.precision is not Precision.INT8 or exact.backend == self.backend
        return comparable and exact.size == self.size and exact.fidelity < self.fidelity

    @property
    def format(self) -> str:
        """The precision, and the format of its floats where that is not float32."""
        return str(self.precision) if self.compute is ComputeType.F32 else f"{self.precision} {self.compute}"

    @property
    def artifact(self) -> str:
        """What is evaluated: threads, streams and batch change no detection, nor does the runtime of a float graph."""
        runtime = "" if self.fidelity == 0 else f"{self.backend} "
        return f"{self.size} {runtime}{self.format}"

    @property
    def engine(self) -> str:
        """What is deployed; the rest is how it is opened."""
        return f"{self.size} {self.backend} {self.format}"

    @property
    def line(self) -> Configuration:
        """The same at no particular size: along such a line the time grows with the size."""
        return replace(self, size=InputSize(0, 0))

    @property
    def how(self) -> str:
        """Everything but the size."""
        load = "" if self.hint is PerformanceHint.LATENCY else f", {self.streams} at a time"
        load += "" if self.batch == 1 else f" in batches of {self.batch}"
        return f"{self.backend} {self.format}, {self.threads} thread{'' if self.threads == 1 else 's'}{load}"

    def __str__(self) -> str:
        return f"{self.size} {self.how}"

    @property
    def session(self) -> SessionOptions:
        """How the runtime is opened."""
        if self.hint is PerformanceHint.LATENCY:
            return SessionOptions(threads=self.threads, compute=self.compute)
        return SessionOptions(
            threads=self.threads, streams=self.streams, hint=self.hint, batch=self.batch, compute=self.compute
        )

    @property
    def bundle_session(self) -> SessionOptions:
        """How its bundle opens by default. All cores are what runtimes take by themselves, of another device too."""
        return replace(self.session, threads=None) if self.threads >= usable_cpus() else self.session


class TuneModels:
    """The artifacts of a search, exported, quantized and built by the steps of a deployment.

    A deployment takes from ``cache`` what was made here. ``contract`` is the model's own, ``note`` what has to be said
    of it.

    INT8 ranges are those of the model's own size, which serve all sizes (docs/tune.md says how well), or with
    ``own_ranges`` those of each.
    """

    def __init__(
        self,
        request: DeployRequest,
        images: ImageSets,
        *,
        folder: Path,
        sizes: tuple[InputSize, ...],
        backends: tuple[str, ...],
        own_ranges: bool,
        progress: ProgressFn,
    ) -> None:
        self._own_ranges = own_ranges
        self._request, self._images, self._folder, self._progress = request, images, folder, progress
        self._stack = contextlib.ExitStack()
        self._contexts: dict[tuple[InputSize, int | None], DeployContext] = {}
        self._computing: dict[str, bool] = {}  # backends, and whether they compute in bf16
        self._cache = StepCache(folder / "steps")
        source = self._stack.enter_context(contextlib.closing(open_source(request.checkpoint, options=request.options)))
        self.contract, self.note, self._own = source.contract, source.note, source
        own = size_of(source.contract.preprocess)
        for size in sizes:
            self._refuse_size(size)
        self.sizes = sizes or (sizes_around(source.contract.preprocess) if self._has_sizes else (own,))
        if not self._has_sizes and set(self.sizes) != {own}:
            raise ConfigError(
                f"'{source.name}' has the one input size {own}.", hint="give the checkpoint that it was made from"
            )
        self.backends, self.precisions = backends, request.precisions

    def _refuse_size(self, size: InputSize) -> None:
        """Raise ConfigError for what is no input size of this model, before anything is made."""
        path, spec = self._request.checkpoint, self.contract.preprocess
        if isinstance(path, Path) and is_checkpoint(path):
            source_contract(path, options=_sized_options(self._request.options, size, spec))
        elif size != size_of(spec):
            size.of(spec)

    @property
    def _has_sizes(self) -> bool:
        """A checkpoint is exported at any size; a graph runs at others if its height and width are dynamic."""
        path = self._request.checkpoint
        if not isinstance(path, Path) or is_checkpoint(path):
            return True
        return onnx_interface(path).inputs[0].shape[2:] == (None, None)

    def takes_batches(self, backend: str) -> bool:
        """Whether the backend reads graphs with an open batch as they are, and the model can be such a graph."""
        path = self._request.checkpoint
        fixed = isinstance(path, Path) and not is_checkpoint(path) and onnx_interface(path).inputs[0].shape[0]
        return not fixed and ArtifactKind.ONNX in get_backend(backend).accepts

    def computes(self, configuration: Configuration) -> bool:
        """Whether its backend computes in its format on this processor.

        Raises:
            FcosDeployError: as ``open_as``.
        """
        backend = configuration.backend
        if configuration.compute is not ComputeType.F32 and backend not in self._computing:
            variant = self.open_as(replace(configuration, compute=ComputeType.F32))
            self._computing[backend] = in_bf16(variant) is not None
        return configuration.compute is ComputeType.F32 or self._computing[backend]

    @property
    def gate_key(self) -> str:
        """What the layers of a bundle depend on that those of a trial do not: the limits, and on which images."""
        facts = f"{self._request.gate} {self._request.operating_goal} {self._images.evaluation_key}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def annotated(self) -> Dataset | None:
        """The evaluation images with what the annotations say of them."""
        return self._images.annotated

    @property
    def int8_problem(self) -> str:
        """Why INT8 cannot be judged on these images, as half a sentence; empty when it can."""
        return undecided_because(self._images.findings)

    def reference(self) -> DetectorSpec:
        """The model as it came, at its own size: PyTorch, or the graph that was given."""
        return self._own.reference()

    def open_as(self, configuration: Configuration) -> Variant:
        """What runs; it is made if it is not there.

        Raises:
            FcosDeployError: it cannot be made.
        """
        context = self._context(configuration.size, batch=_graph_batch(configuration))
        precision = configuration.precision
        quantized = precision is Precision.INT8
        graph = self._export(context, Precision.FP32 if quantized else precision, backend=configuration.backend)
        if quantized:
            graph = self._quantize(context, graph, backend=configuration.backend)
        return replace(build(context, graph, backend=configuration.backend), options=configuration.session)

    def _export(self, context: DeployContext, precision: Precision, *, backend: str) -> Graph:
        return export(context, tail=self._request.tail, precision=precision, backend=backend)

    def _context(self, size: InputSize, *, batch: int | None = 1) -> DeployContext:
        if (size, batch) not in self._contexts:
            name = f"{size}{'' if batch else '-batches'}".replace(":", "-")
            request = replace(self._sized(size, self._folder / "work" / name), batch=batch)
            source = self._stack.enter_context(
                contextlib.closing(open_source(request.checkpoint, options=request.options))
            )
            writer = self._stack.enter_context(BundleWriter(request.output))
            self._contexts[size, batch] = DeployContext(
                request, source, source.contract, self._images, writer, self._progress, self._cache
            )
        return self._contexts[size, batch]

    def _sized(self, size: InputSize, output: Path) -> DeployRequest:
        """The request with one size, for a checkpoint or a module of one's own."""
        request, own = self._request, size_of(self.contract.preprocess)
        if size == own:
            return replace(request, output=output)
        if not isinstance(request.checkpoint, Path):
            preprocess = size.of(self.contract.preprocess)
            sized = replace(request.checkpoint, contract=request.checkpoint.contract.with_preprocess(preprocess))
            return replace(request, output=output, checkpoint=sized)
        if not is_checkpoint(request.checkpoint):
            return replace(request, output=output, checkpoint=self._sized_graph(request.checkpoint, size))
        return replace(request, output=output, options=_sized_options(request.options, size, self.contract.preprocess))

    def _sized_graph(self, graph: Path, size: InputSize) -> Path:
        """The same graph, with the contract of another size."""
        from fcos_deploy.core.artifact import OnnxGraph
        from fcos_deploy.core.onnx_file import save_onnx, with_contract

        name = f"{graph.stem}-{str(size).replace(':', '-')}.onnx"  # which reports name as the reference
        path = self._folder / "graphs" / self._own.sha256[:16] / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            contract = self.contract.with_preprocess(size.of(self.contract.preprocess))
            record = {"source": self._own.sha256}
            save_onnx(with_contract(OnnxGraph(graph).model, contract, record=record), path)
        return path

    def _quantize(self, context: DeployContext, source: Graph, *, backend: str) -> Graph:
        """The INT8 graph of all layers; whether it keeps its accuracy is what the search measures."""
        from calibration.calibrate import Calibration, load_calibration
        from calibration.placement import placement_for
        from calibration.quantizers import QuantizeRequest

        policy = placement_for(backend)
        name = graph_file(Precision.INT8, tail=source.tail, placement=policy.name)
        path = self._ranges(context, source, backend=backend)

        def make(folder: Path) -> StepOutput:
            # The layers are those of the graph that was calibrated; only the size of what goes through them differs.
            ranges: Calibration = replace(load_calibration(path), graph_sha256=source.artifact.sha256)
            request = QuantizeRequest(
                graph=context.conv_graph(source.artifact),
                output=folder / name,
                placement=policy,
                calibration=ranges,
                seed=self._request.seed,
            )
            quantized = quantize_model(request, progress=self._progress).result
            return StepOutput(artifacts=(int8_draft(name, source, policy, quantized),))

        inputs = int8_inputs(source, path, policy)
        step = context.model_step(f"int8-{policy.name}", stage="quantize", inputs=inputs, make=make)
        return Graph(step.artifacts[0], context.writer.path(name), source.tail)

    def _ranges(self, context: DeployContext, source: Graph, *, backend: str) -> Path:
        """Those of the model's own size, or, where the graph of this size has other tensors, its own."""
        from calibration.calibrate import load_calibration

        own = self._context(size_of(self.contract.preprocess))
        if own is context or self._own_ranges:
            return calibrate(context, source).path
        shared = calibrate(own, self._export(own, Precision.FP32, backend=backend)).path
        if set(context.conv_graph(source.artifact).activations) <= set(load_calibration(shared).tensors):
            return shared
        return calibrate(context, source).path

    def deploy_request(self, configuration: Configuration, output: Path) -> DeployRequest:
        """What makes the bundle of the one that was chosen; what was made for the search is taken from its cache."""
        return replace(
            self._sized(configuration.size, output),
            backends=(configuration.backend,),
            precisions=(configuration.precision,),
            session=configuration.bundle_session,
            batch=_graph_batch(configuration),
            computes=tuple(dict.fromkeys((ComputeType.F32, configuration.compute))),
            cache=self._folder / "steps",
        )

    def close(self) -> None:
        """Let the working folders go; what they hold is in the cache."""
        self._stack.close()


def _graph_batch(configuration: Configuration) -> int | None:
    """A graph with an open batch serves all batches; runtimes are faster where one image is all that may come."""
    return 1 if configuration.batch == 1 else None


def _sized_options(options: CheckpointOptions, size: InputSize, spec: PreprocessSpec) -> CheckpointOptions:
    """``options`` with another size, and the rule by which images are resized if it goes with that."""
    values: dict[str, object] = {"input_size": (size.height, size.width)}
    if size.follows_image:
        values = {"shortest": size.height, "longest": size.width}
    if size_of(spec).follows_image == size.follows_image:
        values["size_rule"] = spec.size_rule
    return override_options(options, values)
