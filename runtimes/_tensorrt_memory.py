"""Memory of one tensor on host and GPU, and outputs whose size only the network knows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.tensorrt_library import TensorRT, shape_tuple
from runtimes._cuda import Cuda, host_array

__all__ = ["TensorBuffer", "make_output_allocator"]


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
