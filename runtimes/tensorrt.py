"""TensorRT 8.6 to 11, and TensorRT-RTX.

``TensorrtFamily`` opens an engine, ``TensorrtSession`` lends its lanes to threads, and a ``Lane`` is one execution
context with its memory, its CUDA stream and, where that can be recorded, its CUDA graph.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.artifact import sidecar_path
from fcos_deploy.core.backend import Backend, BackendProbe, Session, SessionOptions, Tensors
from fcos_deploy.core.contract import TensorSpec
from fcos_deploy.core.enums import ArtifactKind, ComputeType, PerformanceHint
from fcos_deploy.core.errors import (
    BackendError,
    BackendLoadError,
    ConfigError,
    DeviceError,
    FcosDeployError,
    TensorMismatchError,
)
from fcos_deploy.core.files import sha256_file
from fcos_deploy.core.trust import KeptModel
from runtimes._cuda import Cuda, CudaDevice, host_array, load_cuda
from runtimes._tensorrt_library import TensorRT, library_log, load_tensorrt, shape_tuple

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["BACKEND"]


Shapes = dict[str, tuple[int, ...]]

_DTYPES = {
    **{"FLOAT": "float32", "HALF": "float16"},
    **{name: name.lower() for name in ("INT8", "UINT8", "INT32", "INT64", "BOOL")},
}
_THROUGHPUT_LANES = 2  # the second one's copies overlap with the first one's computation
_CLOSE_NOTICED_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """An input or output of an engine; ``shape`` has -1 on dynamic axes, ``largest`` is the profile's maximum."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    largest: tuple[int, ...]
    is_input: bool

    @property
    def spec(self) -> TensorSpec:
        """As sessions declare it."""
        return TensorSpec(self.name, self.dtype.name, tuple(None if n < 0 else n for n in self.shape))


@dataclass(frozen=True, slots=True)
class ContextFactory:
    """How contexts of an engine are made, what a session's description says about them, and how to let them go."""

    make: Callable[[], trt.IExecutionContext | None]
    description: Mapping[str, str]
    close: Callable[[], None] = lambda: None
    own_graphs: bool = True  # False: the library records launches itself


class TensorrtFamily(Backend):
    """``device`` is ``cuda`` or ``cuda:N``; ``streams`` is the number of execution contexts."""

    @abstractmethod
    def _load(self, record: Mapping[str, str]) -> TensorRT:
        """The library for an engine with this build record; for an empty record any that is installed."""

    @abstractmethod
    def _contexts(
        self, library: TensorRT, engine: trt.ICudaEngine, *, path: Path, options: SessionOptions
    ) -> ContextFactory:
        """How this library makes execution contexts of the engine."""

    def open(self, path: Path, options: SessionOptions) -> Session:
        """Load the engine on the chosen GPU."""
        contract = self.contract_of(path, options)
        if options.compute_type is not ComputeType.F32:
            raise ConfigError(
                f"An engine computes in the types that it was built with, not in {options.compute_type} on request.",
                hint="build an engine from the fp16 ONNX file",
            )
        record = build_record(path)
        library = self._load(record)
        cuda = load_cuda(extra=self.extra)
        device = choose_device(cuda.devices(), options.device)
        cuda.select(device.index)
        brings_code = "version_compatible" in record.get("options", "")
        if brings_code:
            _require_trust(path, options)
        engine = _load_engine(library, path, record=record, device=device, host_code=brings_code)
        tensors = _engine_tensors(library, engine)
        contexts = self._contexts(library, engine, path=path, options=options)

        def make_lane() -> Lane:
            with library_log(library) as (_, log):
                context = contexts.make()
            if context is None:
                raise BackendLoadError(f"'{path}' cannot start: {' | '.join(log.last_lines())}")
            return Lane(
                library, context, cuda=cuda, tensors=tensors, unified=device.integrated, graphs=contexts.own_graphs
            )

        lanes = options.streams or (_THROUGHPUT_LANES if options.goal is PerformanceHint.THROUGHPUT else 1)
        description = {
            "backend": self.name,
            "version": library.__version__,
            "device": str(device),
            "contexts": str(lanes),
            "memory": "unified" if device.integrated else "copied",
            **contexts.description,
        }
        session = TensorrtSession(
            cuda=cuda,
            device=device.index,
            tensors=tensors,
            make_lane=make_lane,
            lanes=lanes,
            description=description,
            on_close=contexts.close,
        )
        session.contract = contract
        return session

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


def choose_device(devices: list[CudaDevice], name: str) -> CudaDevice:
    """The GPU called ``cuda:N``; the first one for ``cuda`` or nothing.

    Raises:
        ConfigError: not the name of a GPU.
        DeviceError: there is no such GPU.
    """
    match = re.fullmatch(r"(?:cuda(?::(\d+))?)?", name)
    if match is None:
        raise ConfigError(f"TensorRT runs on 'cuda:0' and so on, not on '{name}'.")
    index = int(match[1] or 0)
    if index >= len(devices):
        raise DeviceError(
            f"There is no cuda:{index}, this machine has {len(devices)} GPUs.", hint="see 'fcos-deploy doctor'"
        )
    return devices[index]


def build_record(path: Path) -> dict[str, str]:
    """How an engine was made, from the json beside it; empty for an engine that another tool built."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return {}
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))["record"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendLoadError(f"'{sidecar}' is damaged: {error}.", hint="copy it again with its engine") from error
    return {str(key): str(value) for key, value in record.items()}


def _load_engine(
    library: TensorRT, path: Path, *, record: Mapping[str, str], device: CudaDevice, host_code: bool
) -> trt.ICudaEngine:
    with library_log(library) as (logger, log):
        # An engine that trtexec of TensorRT 8 built may hold plug-ins (InstanceNormalization). The lean runtime has
        # no function to register them.
        register_plugins = getattr(library, "init_libnvinfer_plugins", None)
        if register_plugins is not None:
            register_plugins(logger, "")
        runtime = library.Runtime(logger)
        if host_code:
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is not None:
        return engine
    builder, reason = record.get("version", ""), ""
    if builder and builder != library.__version__:
        reason = f"It was built by version {builder}, this is {library.__version__}. "
    built_for = record.get("compute_capabilities") or record.get("built_on", "")
    if built_for:
        reason += f"It was built for {built_for}, this is {device}. "
    raise BackendLoadError(
        f"'{path}' cannot be loaded. {reason}{' | '.join(log.last_lines(2))}",
        hint="build the engine on this machine: 'fcos-deploy build'",
    )


def _require_trust(path: Path, options: SessionOptions) -> None:
    """A version-compatible engine brings its own lean runtime, a library that TensorRT loads into this process.

    The sidecar that says so is no proof of where the engine comes from: a signature is, or the word of the user.

    Raises:
        BackendLoadError: neither is there.
    """
    if not options.public_keys and not options.allow_engine_code:
        raise BackendLoadError(
            f"'{path}' is version-compatible: it contains a library, which is executed when it is opened.",
            hint="open the signed bundle with --public-key, or trust this engine with --allow-engine-code",
        )


def _engine_tensors(library: TensorRT, engine: trt.ICudaEngine) -> tuple[EngineTensor, ...]:
    """All inputs and outputs, with shapes from profile 0.

    Raises:
        BackendError: a type that NumPy does not have.
    """
    tensors = []
    for name in [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]:
        dtype = engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise BackendError(f"Tensor '{name}' of the engine has the type {dtype}, which NumPy does not have.")
        shape = largest = shape_tuple(engine.get_tensor_shape(name))  # -1 on dynamic axes
        is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
        if is_input and min(shape, default=0) < 0:
            largest = shape_tuple(engine.get_tensor_profile_shape(name, 0)[2])
        tensors.append(EngineTensor(name, np.dtype(_DTYPES[dtype]), shape, largest, is_input))
    return tuple(tensors)


class TensorrtSession(Session):
    """Lends a lane to each call; the first is made at once, up to ``lanes`` more when threads compete for them."""

    def __init__(
        self,
        *,
        cuda: Cuda,
        device: int,
        tensors: tuple[EngineTensor, ...],
        make_lane: Callable[[], Lane],
        lanes: int,
        description: dict[str, str],
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(
            inputs=tuple(tensor.spec for tensor in tensors if tensor.is_input),
            outputs=tuple(tensor.spec for tensor in tensors if not tensor.is_input),
            description=description,
            workers=lanes,
        )
        self._cuda = cuda
        self._device = device
        self._make_lane = make_lane
        self._on_close = on_close
        self._all = [make_lane()]
        self._limit = lanes
        self._idle: queue.LifoQueue[Lane] = queue.LifoQueue()
        self._idle.put(self._all[0])
        self._lock = threading.Lock()

    def _run(self, feeds: Tensors) -> Tensors:
        self._cuda.select(self._device)  # CUDA's current device belongs to the thread
        lane = self._take()
        try:
            return {name: array.copy() for name, array in lane.infer(feeds).items()}
        finally:
            self._idle.put(lane)

    def _take(self) -> Lane:
        """An idle lane; a new one while there are fewer than allowed; else the next that becomes idle."""
        with contextlib.suppress(queue.Empty):
            return self._idle.get_nowait()
        with self._lock:  # Closing waits for all lanes, so none may be made once it has begun.
            if self._closed:
                raise BackendError("The session is closed.")
            if len(self._all) < self._limit:
                lane = self._make_lane()
                self._all.append(lane)
                return lane
        while not self._closed:
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=_CLOSE_NOTICED_SECONDS)
        raise BackendError("The session is closed.")

    def _close(self) -> None:
        with self._lock:
            lanes = [self._idle.get() for _ in self._all]  # waits for running calls
            self._all.clear()
        with contextlib.suppress(BackendError):  # A GPU that is gone: what is left here is released all the same.
            self._cuda.select(self._device)
        try:
            self._on_close()
        finally:
            for lane in lanes:
                lane.close()
            del self._make_lane, self._on_close  # They hold the engine, whose memory goes with them.


class Lane:
    """An execution context with its memory and stream. Not thread-safe: one thread at a time has it.

    ``unified``: host and GPU share memory. ``graphs``: record the launch once for each shape, and replay it.
    """

    def __init__(
        self,
        library: TensorRT,
        context: trt.IExecutionContext,
        *,
        cuda: Cuda,
        tensors: tuple[EngineTensor, ...],
        unified: bool,
        graphs: bool,
    ) -> None:
        self._trt = library
        self._context = context
        self._cuda = cuda
        self._inputs = [tensor for tensor in tensors if tensor.is_input]
        self._outputs = [tensor for tensor in tensors if not tensor.is_input]
        self._buffers = {t.name: TensorBuffer(cuda, dtype=t.dtype, unified=unified) for t in tensors}
        self._allocators: dict[str, Any] = {}  # Any: see make_output_allocator
        self._shapes: Shapes = {}
        self._output_shapes: Shapes = {}
        self._graphs = graphs
        self._graph: Any = None  # Any: cuda-python's opaque graph
        self._stream = cuda.create_stream()
        try:
            self._set_shapes({tensor.name: tensor.largest for tensor in self._inputs})
        except BaseException:
            self.close()  # Memory that it already has: the session may ask for a lane again and again.
            raise

    def infer(self, feeds: Tensors) -> Tensors:
        """Outputs as views of this lane's memory, which its next call overwrites.

        Raises:
            TensorMismatchError: a shape outside the optimization profile.
            BackendError: TensorRT or CUDA failed.
        """
        shapes = {name: array.shape for name, array in feeds.items()}
        if shapes != self._shapes:
            self._set_shapes(shapes)
        for name, array in feeds.items():  # into page-locked memory, from which the GPU copies without waiting
            np.copyto(self._buffers[name].view(array.shape), array)
        if self._graph is not None:
            # The graph holds the addresses of the buffers, which stay where they are as long as the shapes do.
            self._cuda.launch(self._graph, self._stream)
            self._cuda.synchronize(self._stream)
        else:
            self._enqueue()
            self._cuda.synchronize(self._stream)
            self._capture()
        return {tensor.name: self._result(tensor.name) for tensor in self._outputs}

    def _set_shapes(self, shapes: Shapes) -> None:
        self._drop_graph()
        self._shapes = {}
        for tensor in self._inputs:
            with library_log(self._trt) as (_, log):
                if not self._context.set_input_shape(tensor.name, shapes[tensor.name]):
                    raise TensorMismatchError(
                        f"Tensor '{tensor.name}' of shape {shapes[tensor.name]} does not fit the engine, whose largest "
                        f"is {tensor.largest}: {' | '.join(log.last_lines(1))}"
                    )
            self._bind(tensor.name, shapes[tensor.name])
        for tensor in self._outputs:
            shape = shape_tuple(self._context.get_tensor_shape(tensor.name))
            if min(shape, default=0) < 0:
                # Its size depends on the data: TensorRT asks for memory while it runs, so no launch can be recorded.
                self._graphs = False
                if tensor.name not in self._allocators:
                    self._allocators[tensor.name] = make_output_allocator(self._trt, self._cuda)
                    self._context.set_output_allocator(tensor.name, self._allocators[tensor.name])
            else:
                self._output_shapes[tensor.name] = shape
                self._bind(tensor.name, shape)
        self._shapes = shapes

    def _bind(self, name: str, shape: tuple[int, ...]) -> None:
        buffer = self._buffers[name]
        buffer.reserve(shape)
        self._context.set_tensor_address(name, buffer.device)

    def _enqueue(self) -> None:
        for name, shape in self._shapes.items():
            self._buffers[name].to_device(shape, stream=self._stream)
        with library_log(self._trt) as (_, log):
            if not self._context.execute_async_v3(self._stream):
                raise BackendError(f"TensorRT failed: {' | '.join(log.last_lines())}")
        for name, shape in self._output_shapes.items():
            self._buffers[name].to_host(shape, stream=self._stream)

    def _capture(self) -> None:
        """Record the launch for the next call: TensorRT settles its own state in a first one of the same shape."""
        if not self._graphs:
            return
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue()
        except BackendError:
            self._graphs = False  # Some networks cannot be recorded; they run as well without.
        try:
            graph = self._cuda.end_capture(self._stream)
        except BackendError:
            self._graphs = False
            return
        if self._graphs:
            self._graph = graph
        else:
            self._cuda.destroy_graph(graph)

    def _result(self, name: str) -> NDArray[Any]:
        if name in self._output_shapes:
            return self._buffers[name].view(self._output_shapes[name])
        allocator, buffer = self._allocators[name], self._buffers[name]
        buffer.reserve(allocator.shape)
        buffer.to_host(allocator.shape, stream=self._stream, source=allocator.address)
        self._cuda.synchronize(self._stream)
        return buffer.view(allocator.shape)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._cuda.destroy_graph(self._graph)
            self._graph = None

    def close(self) -> None:
        """Release everything but the context, which goes with its last reference."""
        self._drop_graph()
        for buffer in self._buffers.values():
            buffer.free()
        for allocator in self._allocators.values():
            allocator.free()
        self._cuda.destroy_stream(self._stream)
        del self._context


class TensorBuffer:
    """Page-locked host memory and GPU memory of one tensor; on unified memory both are the same bytes.

    Grows when a larger shape comes and never shrinks, so that addresses change as rarely as possible.
    """

    def __init__(self, cuda: Cuda, *, dtype: np.dtype[Any], unified: bool) -> None:
        self._cuda = cuda
        self._unified = unified
        self.dtype = dtype
        self._capacity = 0
        self._host = 0
        self.device = 0

    def reserve(self, shape: tuple[int, ...]) -> None:
        """Make room for an array of ``shape``; TensorRT wants an address even for an empty one."""
        size = max(1, math.prod(shape) * self.dtype.itemsize)
        if size <= self._capacity:
            return
        self.free()
        self._host = self._cuda.allocate_host(size)
        self.device = self._cuda.device_address(self._host) if self._unified else self._cuda.allocate(size)
        self._capacity = size

    def view(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The host side as an array, overwritten by the next inference."""
        return host_array(self._host, dtype=self.dtype, shape=shape)

    def to_device(self, shape: tuple[int, ...], *, stream: int) -> None:
        """Start moving the host side to the GPU; nothing moves where they are the same."""
        size = math.prod(shape) * self.dtype.itemsize
        if size and not self._unified:
            self._cuda.copy_to_device(self.device, self._host, size=size, stream=stream)

    def to_host(self, shape: tuple[int, ...], *, stream: int, source: int | None = None) -> None:
        """Start moving the GPU side, or memory at ``source``, to the host."""
        size = math.prod(shape) * self.dtype.itemsize
        if size and (source is not None or not self._unified):
            self._cuda.copy_to_host(self._host, source or self.device, size=size, stream=stream)

    def free(self) -> None:
        """Release both sides; may be called twice."""
        if self.device and not self._unified:
            self._cuda.free(self.device)
        if self._host:
            self._cuda.free_host(self._host)
        self._host = self.device = self._capacity = 0


def make_output_allocator(library: TensorRT, cuda: Cuda) -> Any:  # Any: a subclass of a class known at run time only
    """An allocator for outputs with data-dependent shapes: ``address`` and ``shape`` hold the last inference's."""

    class OutputAllocator(library.IOutputAllocator):  # type: ignore[misc, name-defined]  # base known at run time only
        def __init__(self) -> None:
            library.IOutputAllocator.__init__(self)
            self.address = 0
            self.shape: tuple[int, ...] = ()
            self._capacity = 0

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            del tensor_name, memory, alignment  # cudaMalloc aligns to 256 bytes, more than TensorRT asks for
            if size > self._capacity or not self.address:
                self.free()
                self.address = cuda.allocate(max(1, size))
                self._capacity = size
            return self.address

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            del stream
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:  # Any: the library's Dims
            del tensor_name
            self.shape = shape_tuple(shape)

        def free(self) -> None:
            if self.address:
                cuda.free(self.address)
            self.address = self._capacity = 0

    return OutputAllocator()


class _Tensorrt(TensorrtFamily):
    name = "tensorrt"
    accepts = frozenset({ArtifactKind.TENSORRT_ENGINE})
    extra = "tensorrt"
    preferred_for = frozenset({ArtifactKind.TENSORRT_ENGINE})

    def _load(self, record: Mapping[str, str]) -> TensorRT:
        # The lean runtime only runs version-compatible engines; probing (no record) takes what there is.
        lean_enough = not record or "version_compatible" in record.get("options", "")
        names = ("tensorrt", "tensorrt_lean", "tensorrt_dispatch") if lean_enough else ("tensorrt",)
        return load_tensorrt(*names, extra=self.extra)

    def _contexts(
        self, library: TensorRT, engine: trt.ICudaEngine, *, path: Path, options: SessionOptions
    ) -> ContextFactory:
        del library, path, options
        return ContextFactory(make=engine.create_execution_context, description={"cuda_graph": "own"})


_LOG = logging.getLogger(__name__)


class _TensorrtRtx(TensorrtFamily):
    name = "tensorrt-rtx"
    accepts = frozenset({ArtifactKind.TENSORRT_RTX_ENGINE})
    extra = "tensorrt-rtx"
    preferred_for = frozenset({ArtifactKind.TENSORRT_RTX_ENGINE})

    def _load(self, record: Mapping[str, str]) -> TensorRT:
        del record
        return load_tensorrt("tensorrt_rtx", extra=self.extra)

    def _contexts(
        self, library: TensorRT, engine: trt.ICudaEngine, *, path: Path, options: SessionOptions
    ) -> ContextFactory:
        rtx = cast(Any, library)  # Any: names of RTX that the stubs of TensorRT lack
        config = engine.create_runtime_config()
        cast(Any, config).cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # The library checks by itself that a cache fits the driver and the GPU.
        facts = {"model": sha256_file(path), "version": library.__version__}
        cache = _RuntimeCache(config, KeptModel(self.name, facts=facts, folder=options.cache_dir))
        return ContextFactory(
            make=lambda: engine.create_execution_context(runtime_config=config),
            description={"cuda_graph": "TensorRT-RTX's", "runtime_cache": cache.state},
            close=cache.save,
            own_graphs=False,
        )


class _RuntimeCache:
    """What TensorRT-RTX compiled for this GPU, between processes."""

    def __init__(self, config: trt.IRuntimeConfig, kept: KeptModel) -> None:
        rtx_config = cast(Any, config)  # Any: members of RTX that the stubs of TensorRT lack
        self._cache = rtx_config.create_runtime_cache()
        self._kept = kept
        self.state = "new" if kept.enabled else "off"
        content = kept.load()
        if content is not None:
            # A cache of another driver or version is refused, and written anew when the session closes.
            self.state = "loaded" if self._cache.deserialize(content) else "refused, will be written anew"
        rtx_config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """A cache that cannot be written costs time at the next start; what this session found is worth more."""
        if not self._kept.enabled:
            return
        try:
            self._kept.store(bytes(memoryview(self._cache.serialize())))
        except TypeError as error:  # TensorRT-RTX gave nothing.
            _LOG.warning("What was compiled for this GPU is not kept: %s", error)


BACKEND = (_Tensorrt(), _TensorrtRtx())
