"""ONNX Runtime.

Measured with a raw tail of 640x640 and 80 classes (2.9 MB of outputs): ``run`` hands its outputs over without a copy,
and I/O binding with preallocated outputs is not faster, so plain ``run`` it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from fcos_deploy.core.backend import (
    Backend,
    BackendProbe,
    ComputeType,
    PerformanceHint,
    Session,
    SessionOptions,
    Tensors,
)
from fcos_deploy.core.contract import find_contract
from fcos_deploy.core.enums import ArtifactKind
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, DeviceError, MissingDependencyError
from fcos_deploy.core.libraries import require
from fcos_deploy.core.machine import usable_cpus
from fcos_deploy.core.tensor_spec import TensorSpec

__all__ = ["BACKEND"]

_SUFFIX = "ExecutionProvider"
_ERRORS_ONLY_FATAL = 4  # severity; whatever fails is raised, with its text
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class _OnnxRuntimeSession(Session):
    def __init__(self, session: Any, *, runtime: ModuleType, workers: int, description: dict[str, str]) -> None:
        super().__init__(
            inputs=tuple(_spec(i) for i in session.get_inputs()),
            outputs=tuple(_spec(o) for o in session.get_outputs()),
            description=description,
        )
        self._session = session
        self._errors = _errors(runtime)
        self._names = [spec.name for spec in self.outputs]
        self._pool = ThreadPoolExecutor(workers, "onnxruntime") if workers > 1 else None

    def _run(self, feeds: Tensors) -> Tensors:
        session = self._session
        if session is None:
            raise BackendError("The session is closed.")
        try:
            return dict(zip(self._names, session.run(self._names, feeds), strict=True))
        except self._errors as error:
            raise BackendError(f"ONNX Runtime failed: {_first_line(error)}") from error

    def _run_many(self, feeds: Sequence[Tensors]) -> list[Tensors]:
        return list(self._pool.map(self._run, feeds)) if self._pool else super()._run_many(feeds)

    def _close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        self._session = None


class _OnnxRuntime(Backend):
    """Runs ONNX files. A device is an execution provider's short name: ``cpu``, ``cuda``, ``cuda:1``."""

    name = "onnxruntime"
    accepts = frozenset({ArtifactKind.ONNX})
    extra = "onnxruntime"
    # It executes every Q/DQ pair as written, wherever it stands; only its speed depends on the placement.
    placements = ("onnxruntime-cpu", "openvino", "portable")
    preferred_for = frozenset({ArtifactKind.ONNX})

    def open(self, path: Path, options: SessionOptions) -> Session:
        runtime = require("onnxruntime", extra=self.extra)
        contract = options.contract or find_contract(path)
        if contract:
            self.check_placement(contract)
        if options.compute is not ComputeType.F32:
            raise ConfigError(
                f"ONNX Runtime computes in the types that the graph has, not in {options.compute} on request.",
                hint="export with --precision fp16, or leave the compute type at f32",
            )
        provider, settings = _provider(runtime, options.device or "cpu")
        streams, threads = _parallelism(options)
        session = _create(runtime, path, provider=(provider, settings), threads=threads)
        if session.get_providers()[0] != provider:
            raise DeviceError(f"ONNX Runtime could not use '{options.device}' and chose {session.get_providers()[0]}.")
        description = {
            "backend": self.name,
            "version": runtime.__version__,
            "device": options.device or "cpu",
            "compute": str(options.compute),
            "hint": str(options.hint),
            "threads": str(threads or "all cores"),
            "streams": str(streams),
        }
        opened = _OnnxRuntimeSession(session, runtime=runtime, workers=streams, description=description)
        opened.contract = contract
        return opened

    def probe(self) -> BackendProbe:
        try:
            runtime = require("onnxruntime", extra=self.extra)
        except MissingDependencyError as error:
            return BackendProbe(available=False, problem=error.message, remedy=error.hint)
        except ImportError as error:
            return BackendProbe(available=False, problem=str(error), remedy="reinstall onnxruntime")
        return BackendProbe(available=True, version=runtime.__version__, devices=tuple(_devices(runtime)))


BACKEND = _OnnxRuntime()


def _create(runtime: ModuleType, path: Path, *, provider: tuple[str, dict[str, str]], threads: int) -> Any:
    settings = runtime.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY_FATAL
    settings.intra_op_num_threads = threads
    # Workers spin between the operators of a run, which is up to a seventh faster, and sleep as soon as it is over:
    # left alone they burn a core for milliseconds more, the time of decoding and of other programs.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return runtime.InferenceSession(str(path), settings, providers=[provider], enable_fallback=0)
    except _errors(runtime) as error:
        raise BackendLoadError(
            f"ONNX Runtime {runtime.__version__} cannot open '{path}': {_first_line(error)}",
            hint="is it a complete ONNX model of an opset that this version reads?",
        ) from error


def _provider(runtime: ModuleType, device: str) -> tuple[str, dict[str, str]]:
    """The execution provider of ``cuda:0``: its full name and its settings.

    Raises:
        DeviceError: this build of ONNX Runtime does not have it.
    """
    name, _, index = device.partition(":")
    found = _devices(runtime).get(name.lower())
    if found is None or (index and not index.isdecimal()):
        raise DeviceError(
            f"ONNX Runtime has no device '{device}' here.", hint=f"devices: {', '.join(_devices(runtime))}"
        )
    return found, {"device_id": index} if index else {}


def _devices(runtime: ModuleType) -> dict[str, str]:
    """Short names of the execution providers, such as ``cpu``, and their full ones."""
    providers = {name.removesuffix(_SUFFIX).lower(): name for name in runtime.get_available_providers()}
    providers.pop("azure", None)  # Not a device: it sends tensors to a web service.
    return providers


def _parallelism(options: SessionOptions) -> tuple[int, int]:
    """(requests at a time, threads of one request); 0 threads is ONNX Runtime's own choice, all cores."""
    if options.hint is PerformanceHint.LATENCY:
        return options.streams or 1, options.threads or 0
    total = options.threads or usable_cpus()
    streams = options.streams or total
    return streams, max(1, total // streams)


def _errors(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """The exceptions that the library raises; they have no base of their own."""
    state = runtime.capi.onnxruntime_pybind11_state
    own = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*own, RuntimeError, ValueError)


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise BackendLoadError(f"Tensor '{node.name}' has type {node.type}, which is not supported.")
    return TensorSpec(node.name, _DTYPES[node.type], tuple(n if isinstance(n, int) else None for n in node.shape))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") + "."
