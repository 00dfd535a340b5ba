"""Opens an engine: what TensorRT and TensorRT-RTX share."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fcos_deploy.core.backend import Backend, BackendProbe, ComputeType, PerformanceHint, Session, SessionOptions
from fcos_deploy.core.contract_io import find_contract, sidecar_path
from fcos_deploy.core.errors import (
    BackendLoadError,
    ConfigError,
    DeviceError,
    FcosDeployError,
    MissingDependencyError,
)
from fcos_deploy.core.tensorrt_library import LibraryLog, TensorRT, library_log, register_plugins
from runtimes._cuda import Cuda, CudaDevice, load_cuda
from runtimes._tensorrt_lane import Lane, LaneOptions, engine_tensors
from runtimes._tensorrt_session import TensorrtSession

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["ContextFactory", "TensorrtFamily"]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
_THROUGHPUT_LANES = 2  # the second one's copies overlap with the first one's computation


@dataclass(frozen=True, slots=True)
class ContextFactory:
    """How contexts of an engine are made, what that says about them, and what is to be done when they go."""

    make: Callable[[], trt.IExecutionContext | None]
    description: Mapping[str, str]
    close: Callable[[], None] = lambda: None
    own_graphs: bool = True  # False: the library records launches itself


class TensorrtFamily(Backend):
    """``device`` is ``cuda`` or ``cuda:N``; ``streams`` is the number of execution contexts."""

    @abstractmethod
    def _load(self, record: Mapping[str, str]) -> TensorRT: ...

    @abstractmethod
    def _contexts(
        self, library: TensorRT, engine: trt.ICudaEngine, *, path: Path, options: SessionOptions
    ) -> ContextFactory: ...

    def open(self, path: Path, options: SessionOptions) -> Session:
        """Load the engine on the chosen GPU."""
        contract = options.contract or find_contract(path)
        if contract:
            self.check_placement(contract)
        if options.compute is not ComputeType.F32:
            raise ConfigError(
                f"An engine computes in the types that it was built with, not in {options.compute} on request.",
                hint="build an engine from the fp16 ONNX file",
            )
        record = build_record(path)
        library = self._load(record)
        cuda = load_cuda(extra=self.extra)
        device = choose_device(cuda.devices(), options.device)
        cuda.select(device.index)
        engine = self._engine(library, path, record=record, device=device)
        return self._session(library, engine, path=path, options=options, cuda=cuda, device=device)

    def _engine(
        self, library: TensorRT, path: Path, *, record: Mapping[str, str], device: CudaDevice
    ) -> trt.ICudaEngine:
        with library_log(library) as (logger, log):
            register_plugins(library, logger)
            runtime = library.Runtime(logger)
            if "version_compatible" in record.get("options", ""):
                runtime.engine_host_code_allowed = True  # A version-compatible engine brings its own lean runtime.
            engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise _load_error(path, library=library, record=record, device=device, log=log)
        return engine

    def _session(
        self,
        library: TensorRT,
        engine: trt.ICudaEngine,
        *,
        path: Path,
        options: SessionOptions,
        cuda: Cuda,
        device: CudaDevice,
    ) -> Session:
        tensors = engine_tensors(library, engine, dtypes=_DTYPES)
        contexts = self._contexts(library, engine, path=path, options=options)
        lane_options = LaneOptions(unified=device.integrated, graphs=contexts.own_graphs)

        def make_lane() -> Lane:
            with library_log(library) as (_, log):
                context = contexts.make()
            if context is None:
                raise BackendLoadError(f"'{path}' cannot start: {' | '.join(log.last_lines())}")
            return Lane(library, context, cuda=cuda, tensors=tensors, options=lane_options)

        lanes = options.streams or (_THROUGHPUT_LANES if options.hint is PerformanceHint.THROUGHPUT else 1)
        return TensorrtSession(
            cuda=cuda,
            device=device.index,
            tensors=tensors,
            make_lane=make_lane,
            lanes=lanes,
            description={
                "backend": self.name,
                "version": library.__version__,
                "device": str(device),
                "contexts": str(lanes),
                "memory": "unified" if device.integrated else "copied",
                **contexts.description,
            },
            on_close=contexts.close,
        )

    def probe(self) -> BackendProbe:
        """The library's version and the GPUs, or what is missing."""
        version = ""
        try:
            library = self._load({})
            version = library.__version__
            devices = tuple(str(device) for device in load_cuda(extra=self.extra).devices())
        except (FcosDeployError, ImportError, OSError) as error:
            message, hint = (error.message, error.hint) if isinstance(error, FcosDeployError) else (str(error), "")
            return BackendProbe(available=False, version=version, problem=message, remedy=hint)
        return BackendProbe(available=True, version=version, devices=devices)


def choose_device(devices: list[CudaDevice], wanted: str) -> CudaDevice:
    """The GPU called ``cuda:N``; the first one for ``cuda`` or nothing.

    Raises:
        ConfigError: not the name of a GPU.
        DeviceError: there is no such GPU.
    """
    match = re.fullmatch(r"(?:cuda(?::(\d+))?)?", wanted)
    if match is None:
        raise ConfigError(f"TensorRT runs on 'cuda:0' and so on, not on '{wanted}'.")
    index = int(match[1] or 0)
    if index >= len(devices):
        raise DeviceError(
            f"There is no cuda:{index}, this machine has {len(devices)} GPUs.", hint="see 'fcos-deploy doctor'"
        )
    return devices[index]


def build_record(path: Path) -> dict[str, str]:
    """How an engine was made, from the json beside it; empty for an engine of elsewhere."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return {}
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))["record"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendLoadError(f"'{sidecar}' is damaged: {error}.", hint="copy it again with its engine") from error
    return {str(key): str(value) for key, value in record.items()}


def _load_error(
    path: Path, *, library: TensorRT, record: Mapping[str, str], device: CudaDevice, log: LibraryLog
) -> BackendLoadError:
    made = record.get("version", "")
    reason = ""
    if made and made != library.__version__:
        reason = f"It was built by version {made}, this is {library.__version__}. "
    built_for = record.get("compute_capabilities") or record.get("built_on", "")
    if built_for:
        reason += f"It was built for {built_for}, this is {device}. "
    return BackendLoadError(
        f"'{path}' cannot be loaded. {reason}{' | '.join(log.last_lines(2))}",
        hint="build the engine on this machine: 'fcos-deploy build'",
    )


def load_first(names: tuple[str, ...], load: Callable[[str], TensorRT]) -> TensorRT:
    """The first of several libraries that is installed.

    Raises:
        MissingDependencyError: of the first, when none is.
    """
    first: MissingDependencyError | None = None
    for name in names:
        try:
            return load(name)
        except MissingDependencyError as error:
            first = first or error
    raise first or ConfigError("No library was named.")
