"""ONNX Runtime.

Measured with a raw tail of 640x640 and 80 classes (2.9 MB of outputs): ``run`` hands its outputs over without a copy,
so sessions call plain ``run``. I/O binding saves what ``run`` does with names and arrays, and outputs always lie in the
same memory: ``bound``, for image after image.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcos_deploy.core.backend import Backend, BackendProbe, Session, SessionOptions, Tensors
from fcos_deploy.core.contract import TensorSpec
from fcos_deploy.core.enums import ArtifactKind, ComputeType, DeformForm, PerformanceHint, StrEnum
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError, missing_device
from fcos_deploy.core.libraries import lazy_import
from fcos_deploy.core.machine import usable_cpus

__all__ = ["BACKEND", "GraphOptimization", "NodeOrder", "executed_kernels", "open_model"]

ort = lazy_import("onnxruntime", extra="onnxruntime")

_SUFFIX = "ExecutionProvider"
_CPU = "CPUExecutionProvider"
_FATAL_ONLY = 4  # log severity; whatever fails is raised, with its text
_INTEGERS = ("uint8", "int8", "int32", "int64", "bool")
_DTYPES = {
    **{"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"},
    **{f"tensor({name})": name for name in _INTEGERS},
}


class GraphOptimization(StrEnum):
    """What ONNX Runtime may do to a graph; the values are the ends of its ``GraphOptimizationLevel`` names.

    ``EXTENDED`` fuses and folds; ``ALL`` also lays tensors out for the processor that the session runs on.
    """

    DISABLED = "DISABLE_ALL"
    EXTENDED = "ENABLE_EXTENDED"
    ALL = "ENABLE_ALL"


class NodeOrder(StrEnum):
    """In which order nodes run; the values are the library's ``ExecutionOrder`` names.

    ``FILE``: of the nodes that can run, the one that stands first in the file.
    """

    DEFAULT = "DEFAULT"
    FILE = "PRIORITY_BASED"


def open_model(
    model: bytes | Path,
    *,
    threads: int | None = None,
    optimization: GraphOptimization = GraphOptimization.ALL,
    order: NodeOrder = NodeOrder.DEFAULT,
    save_optimized: Path | None = None,
) -> Session:
    """Open a graph on the CPU, for a check or a calibration: any ONNX model, with or without a contract.

    model: a serialized ``onnx.ModelProto``, or an ONNX file.
    threads: for one inference; None takes all cores.
    save_optimized: where to write the graph as ONNX Runtime optimized it.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        BackendLoadError: ONNX Runtime cannot read the graph.
    """
    settings = _settings(threads or 0, optimization=optimization)
    settings.execution_order = getattr(ort.ExecutionOrder, order)
    # A plan of all tensors for each shape of the inputs, which takes more memory than the tensors themselves.
    settings.enable_mem_pattern = order is NodeOrder.DEFAULT
    if save_optimized is not None:
        settings.optimized_model_filepath = str(save_optimized)
    return _OnnxRuntimeSession(_create(model, settings=settings, provider=(_CPU, {})), workers=1, description={})


def executed_kernels(model: Path, feeds: Tensors) -> list[tuple[str, str]]:
    """(node, operator) of each kernel of one inference on the CPU, in the order in which they ran.

    Operators are those after ONNX Runtime's fusions, for example QLinearConv where Q/DQ pairs were fused with a Conv.
    A float convolution whose layout was changed is named after its output.

    Raises:
        MissingDependencyError, BackendLoadError: as ``open_model``.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(0)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "run")
        session = _create(model, settings=settings, provider=(_CPU, {}))
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    # An event is named after its node; a fused node has a number of the optimizer's own behind its name.
    return [
        (re.sub(r"(_token_\d+)?_kernel_time$", "", event["name"]), event["args"]["op_name"])
        for event in events
        if event["name"].endswith("_kernel_time")
    ]


class _OnnxRuntimeSession(Session):
    def __init__(self, session: Any, *, workers: int, description: dict[str, str]) -> None:
        super().__init__(
            inputs=tuple(_spec(node) for node in session.get_inputs()),
            outputs=tuple(_spec(node) for node in session.get_outputs()),
            description=description,
            workers=workers,
        )
        self._session = session
        self._errors = _errors()
        self._names = [spec.name for spec in self.outputs]

    def _run(self, feeds: Tensors) -> Tensors:
        session = self._session
        if session is None:
            raise BackendError("The session is closed.")
        try:
            return dict(zip(self._names, session.run(self._names, feeds), strict=True))
        except self._errors as error:
            raise BackendError(f"ONNX Runtime failed: {_first_line(error)}") from error

    def _bound(self, feeds: Tensors) -> Callable[[], Tensors]:
        session = self._session
        if (
            session is None
            or session.get_providers()[0] != _CPU
            or not all(a.flags.c_contiguous for a in feeds.values())
        ):
            return super()._bound(feeds)
        outputs: Tensors = {}
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        def infer() -> Tensors:
            if outputs:
                try:
                    session.run_with_iobinding(binding)
                except self._errors as error:
                    raise BackendError(f"ONNX Runtime failed: {_first_line(error)}") from error
            else:  # Their shapes are known once they are there.
                arrays = {name: array.copy() for name, array in self._run(feeds).items()}
                for name, array in arrays.items():
                    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
                outputs.update(arrays)
            return outputs

        return infer

    def _close(self) -> None:
        self._session = None


class _OnnxRuntime(Backend):
    """Runs ONNX files. A device is an execution provider's short name: ``cpu``, ``cuda``, ``cuda:1``."""

    name = "onnxruntime"
    accepts = frozenset({ArtifactKind.ONNX})
    extra = "onnxruntime"
    # It executes every Q/DQ pair as written, wherever it stands; only its speed depends on the placement.
    placements = ("onnxruntime-cpu", "openvino", "portable")
    preferred_for = frozenset({ArtifactKind.ONNX})
    deform_form = DeformForm.OPERATOR

    def open(self, path: Path, options: SessionOptions) -> Session:
        contract = self.contract_of(path, options)
        if options.compute_type is not ComputeType.F32:
            raise ConfigError(
                f"ONNX Runtime computes in the types that the graph has, not in {options.compute_type} on request.",
                hint="export with --precision fp16, or leave the compute type at f32",
            )
        device = options.device or "cpu"
        provider = _provider(device)
        streams, threads = _parallelism(options)
        session = _create(path, settings=_settings(threads), provider=provider)
        if session.get_providers()[0] != provider[0]:
            raise DeviceError(f"ONNX Runtime could not use '{device}' and chose {session.get_providers()[0]}.")
        description = {
            "backend": self.name,
            "version": ort.__version__,
            "device": device,
            "compute": str(options.compute_type),
            "hint": str(options.goal),
            "threads": str(threads or "all cores"),
            "streams": str(streams),
        }
        opened = _OnnxRuntimeSession(session, workers=streams, description=description)
        opened.contract = contract
        return opened

    def probe(self) -> BackendProbe:
        return BackendProbe.of_library(self.name, lambda: (ort.__version__, list(_devices())))


BACKEND = _OnnxRuntime()


def _settings(threads: int, *, optimization: GraphOptimization = GraphOptimization.ALL) -> Any:
    """The library's SessionOptions; 0 threads is its own choice, all cores."""
    settings = ort.SessionOptions()
    settings.log_severity_level = _FATAL_ONLY
    settings.intra_op_num_threads = threads
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{optimization}")
    # Workers spin between the operators of a run, which is up to a seventh faster, and sleep as soon as it is over:
    # left alone they burn a core for milliseconds more, the time of decoding and of other programs.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return settings


# What ONNX Runtime says when an operator would leave the provider (InferenceSession::Initialize).
_LEAVES_PROVIDER = "fallback to CPU EP has been explicitly disabled"


def _create(model: bytes | Path, *, settings: Any, provider: tuple[str, dict[str, str]]) -> Any:
    source = str(model) if isinstance(model, Path) else model
    if provider[0] != _CPU:
        # Operators that a provider does not have run on the CPU otherwise, and nothing says so.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        # Without enable_fallback=0 a provider that fails to start is replaced by the CPU, and only a log line says so.
        return ort.InferenceSession(source, settings, providers=[provider], enable_fallback=0)
    except _errors() as error:
        what = f"'{model}'" if isinstance(model, Path) else "the graph"
        if _LEAVES_PROVIDER in str(error):
            device = provider[0].removesuffix(_SUFFIX).lower()
            raise DeviceError(
                f"ONNX Runtime's device '{device}' does not have all operators of {what}: some would run on the CPU.",
                hint="export with --tail raw and a fixed --input-size, or choose the device 'cpu'",
            ) from error
        raise BackendLoadError(
            f"ONNX Runtime {ort.__version__} cannot open {what}: {_first_line(error)}",
            hint="is it a complete ONNX model of an opset that this version reads?",
        ) from error


def _provider(device: str) -> tuple[str, dict[str, str]]:
    """The execution provider of ``cuda:0``: its full name and its settings.

    Raises:
        DeviceError: this build of ONNX Runtime does not have it.
    """
    name, _, index = device.partition(":")
    devices = _devices()
    if name.lower() not in devices or (index and not index.isdecimal()):
        raise missing_device("ONNX Runtime", device, devices)
    return devices[name.lower()], {"device_id": index} if index else {}


def _devices() -> dict[str, str]:
    """Short names of the execution providers, such as ``cpu``, and their full ones."""
    providers = {name.removesuffix(_SUFFIX).lower(): name for name in ort.get_available_providers()}
    providers.pop("azure", None)  # Not a device: it sends tensors to a web service.
    return providers


def _parallelism(options: SessionOptions) -> tuple[int, int]:
    """(requests at a time, threads of one request); 0 threads is ONNX Runtime's own choice, all cores."""
    if options.goal is PerformanceHint.LATENCY:
        return options.streams or 1, options.threads or 0
    # One thread a request wastes the least time on waiting, so that by default each core runs a request of its own.
    total = options.threads or usable_cpus()
    streams = options.streams or total
    return streams, max(1, total // streams)


def _errors() -> tuple[type[Exception], ...]:
    """The exceptions that the library raises; they have no base class of their own."""
    state = vars(ort.capi.onnxruntime_pybind11_state).values()
    own = [value for value in state if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError)


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise BackendLoadError(f"Tensor '{node.name}' has type {node.type}, which is not supported.")
    return TensorSpec(node.name, _DTYPES[node.type], tuple(n if isinstance(n, int) else None for n in node.shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
