"""One execution context with its stream, buffers and CUDA graph: what one thread uses at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.backend import Tensors
from fcos_deploy.core.errors import BackendError, TensorMismatchError
from fcos_deploy.core.tensorrt_library import TensorRT, library_log, shape_tuple
from runtimes._cuda import Cuda
from runtimes._tensorrt_memory import TensorBuffer, make_output_allocator

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["EngineTensor", "Lane", "LaneOptions"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """An input or output of an engine; ``shape`` has -1 on dynamic axes, ``largest`` is the profile's maximum."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    largest: tuple[int, ...]
    is_input: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOptions:
    """``unified``: host and GPU share memory. ``graphs``: record the launch once per shape and replay it."""

    unified: bool
    graphs: bool


class Lane:
    """Not thread-safe: the session lends each lane to one thread at a time."""

    def __init__(
        self,
        library: TensorRT,
        context: trt.IExecutionContext,
        *,
        cuda: Cuda,
        tensors: tuple[EngineTensor, ...],
        options: LaneOptions,
    ) -> None:
        self._trt = library
        self._context = context
        self._cuda = cuda
        self._inputs = [tensor for tensor in tensors if tensor.is_input]
        self._outputs = [tensor for tensor in tensors if not tensor.is_input]
        self._buffers = {t.name: TensorBuffer(cuda, dtype=t.dtype, unified=options.unified) for t in tensors}
        self._allocators: dict[str, Any] = {}  # Any: see make_output_allocator
        self._shapes: Shapes = {}
        self._output_shapes: Shapes = {}
        self._graphs = options.graphs
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
            TensorMismatchError: a shape outside the optimisation profile.
            BackendError: TensorRT or CUDA failed.
        """
        shapes = {name: array.shape for name, array in feeds.items()}
        if shapes != self._shapes:
            self._set_shapes(shapes)
        for name, array in feeds.items():
            np.copyto(self._buffers[name].view(array.shape), array)
        if self._graph is not None:
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
                self._allocate_late(tensor.name)
            else:
                self._output_shapes[tensor.name] = shape
                self._bind(tensor.name, shape)
        self._shapes = shapes

    def _bind(self, name: str, shape: tuple[int, ...]) -> None:
        buffer = self._buffers[name]
        buffer.reserve(shape)
        self._context.set_tensor_address(name, buffer.device)

    def _allocate_late(self, name: str) -> None:
        """An output whose size depends on the data: TensorRT asks for its memory while it runs, so no graph either."""
        self._graphs = False
        if name not in self._allocators:
            self._allocators[name] = make_output_allocator(self._trt, self._cuda)
            self._context.set_output_allocator(name, self._allocators[name])

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

    @property
    def uses_graph(self) -> bool:
        """Whether the next call of the same shape replays a recorded launch."""
        return self._graph is not None

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


def engine_tensors(
    library: TensorRT, engine: trt.ICudaEngine, *, dtypes: Mapping[str, str]
) -> tuple[EngineTensor, ...]:
    """All inputs and outputs, with shapes from profile 0.

    Raises:
        BackendError: a type that NumPy does not have.
    """
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(_engine_tensor(library, engine, name=name, dtypes=dtypes) for name in names)


def _engine_tensor(library: TensorRT, engine: trt.ICudaEngine, *, name: str, dtypes: Mapping[str, str]) -> EngineTensor:
    dtype = engine.get_tensor_dtype(name).name
    if dtype not in dtypes:
        raise BackendError(f"Tensor '{name}' of the engine has the type {dtype}, which NumPy does not have.")
    shape = shape_tuple(engine.get_tensor_shape(name))
    is_input = engine.get_tensor_mode(name) == library.TensorIOMode.INPUT
    dynamic_input = is_input and min(shape, default=0) < 0
    largest = shape_tuple(engine.get_tensor_profile_shape(name, 0)[2]) if dynamic_input else shape
    return EngineTensor(name=name, dtype=np.dtype(dtypes[dtype]), shape=shape, largest=largest, is_input=is_input)
