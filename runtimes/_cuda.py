"""The few CUDA calls that a TensorRT session needs, through cuda-python, with errors in words.

cuda-python of CUDA 12 and 13 is supported: ``cuda.bindings.runtime``, which before 12.6 was ``cuda.cudart``.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcos_deploy.core.errors import BackendError, DeviceError, MissingDependencyError
from fcos_deploy.core.libraries import require

__all__ = ["Cuda", "CudaDevice", "load_cuda"]

_LOG = logging.getLogger(__name__)

_NO_DRIVER = "No working NVIDIA driver is installed"
_START_AGAIN = "start the program again; if it comes back, look for Xid messages in the kernel log"
# Errors with which CUDA answers on a machine that cannot compute, or no longer: the problem, and what to do.
_DEVICE_PROBLEMS: dict[str, tuple[str, str]] = {
    "cudaErrorInsufficientDriver": (
        "The NVIDIA driver is too old for this CUDA",
        "update the driver, or install a cuda-python of the driver's CUDA version",
    ),
    "cudaErrorNoDevice": ("The NVIDIA driver sees no GPU", "check nvidia-smi, and CUDA_VISIBLE_DEVICES"),
    "cudaErrorStubLibrary": (
        "CUDA was loaded from its stub library, not from the driver",
        "take the folder 'stubs' out of LD_LIBRARY_PATH",
    ),
    "cudaErrorSystemDriverMismatch": (
        "The NVIDIA driver's kernel module and its libraries have different versions",
        "reboot, or reinstall the driver",
    ),
    "cudaErrorSystemNotReady": ("The NVIDIA driver is not ready", "start nvidia-fabricmanager, or reboot"),
    "cudaErrorDevicesUnavailable": ("The GPU is used exclusively by another process", "end that process"),
    "cudaErrorInitializationError": ("The NVIDIA driver could not start", "check nvidia-smi and the kernel log"),
    "cudaErrorLaunchFailure": ("The GPU stopped in the middle of its work", _START_AGAIN),
    "cudaErrorIllegalAddress": ("The GPU stopped in the middle of its work", _START_AGAIN),
    "cudaErrorECCUncorrectable": ("The GPU's memory lost data", _START_AGAIN),
    "cudaErrorUnknown": ("The NVIDIA driver is broken", "check nvidia-smi and the kernel log; a reboot often helps"),
}


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A GPU. ``integrated`` GPUs share the host's memory (Jetson)."""

    index: int
    name: str
    capability: tuple[int, int]
    integrated: bool

    def __str__(self) -> str:
        return f"cuda:{self.index} {self.name} (sm_{self.capability[0]}{self.capability[1]})"


def load_cuda(*, extra: str) -> Cuda:
    """The CUDA runtime, of which nothing has been asked yet.

    Raises:
        MissingDependencyError: cuda-python is not installed.
    """
    try:
        return Cuda(require("cuda.bindings.runtime", extra=extra))
    except (MissingDependencyError, ModuleNotFoundError):
        return Cuda(require("cuda.cudart", extra=extra))


class Cuda:
    """CUDA runtime calls that raise instead of returning codes. Handles and addresses are plain integers or opaque."""

    def __init__(self, runtime: ModuleType) -> None:
        self._cuda: Any = runtime  # Any: cuda-python has no type information for mypy

    def _call(self, name: str, *arguments: Any) -> Any:  # Any: each CUDA function returns its own type
        error, *values = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise self._failure(name, error.name)
        return values[0] if len(values) == 1 else tuple(values)

    def _failure(self, call: str, error: str) -> BackendError:
        if error == "cudaErrorMemoryAllocation":
            return BackendError("The GPU has no memory left.", hint="close other programs, or use a smaller batch")
        if error in _DEVICE_PROBLEMS:
            problem, remedy = _DEVICE_PROBLEMS[error]
            if error == "cudaErrorInsufficientDriver" and self._driver_version() == 0:
                problem, remedy = _NO_DRIVER, "install the NVIDIA driver; in a container, start it with the GPU"
            return DeviceError(f"{problem} ({error}).", hint=remedy)
        return BackendError(
            f"CUDA failed in {call}: {error}.", hint="'fcos-deploy doctor' checks the driver and the GPU"
        )

    def _release(self, name: str, *arguments: Any) -> None:  # Any: as in _call
        """A call that gives something back. On a lost GPU all of them fail, and what they would free went with it."""
        try:
            self._call(name, *arguments)
        except BackendError as error:
            _LOG.warning("%s: %s", name, error.message)

    def _driver_version(self) -> int:
        error, version = self._cuda.cudaDriverGetVersion()
        return int(version) if error == self._cuda.cudaError_t.cudaSuccess else 0

    def versions(self) -> tuple[int, int]:
        """CUDA versions of the driver (0: none) and of the runtime, as 1000 major + 10 minor."""
        return self._driver_version(), int(self._call("cudaRuntimeGetVersion"))

    def devices(self) -> list[CudaDevice]:
        """All GPUs.

        Raises:
            DeviceError: there is none, or the driver does not work.
        """
        devices = []
        for index in range(self._call("cudaGetDeviceCount")):
            properties = self._call("cudaGetDeviceProperties", index)
            name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
            capability = (int(properties.major), int(properties.minor))
            devices.append(CudaDevice(index, name.rstrip("\0"), capability, integrated=bool(properties.integrated)))
        return devices

    def select(self, index: int) -> None:
        """Make a GPU current in the calling thread."""
        self._call("cudaSetDevice", index)

    def allocate(self, size: int) -> int:
        """Address of ``size`` bytes of GPU memory."""
        return int(self._call("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Release ``allocate``'s memory."""
        self._release("cudaFree", address)

    def allocate_host(self, size: int) -> int:
        """Address of ``size`` bytes of page-locked host memory that the GPU can reach too."""
        return int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocMapped))

    def free_host(self, address: int) -> None:
        """Release ``allocate_host``'s memory."""
        self._release("cudaFreeHost", address)

    def device_address(self, host_address: int) -> int:
        """Where the GPU sees page-locked host memory."""
        return int(self._call("cudaHostGetDevicePointer", host_address, 0))

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Release a stream."""
        self._release("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work of a stream."""
        self._call("cudaStreamSynchronize", stream)

    def copy_to_device(self, device: int, host: int, *, size: int, stream: int) -> None:
        """Start copying ``size`` bytes from page-locked memory to the GPU."""
        self._call("cudaMemcpyAsync", device, host, size, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def copy_to_host(self, host: int, device: int, *, size: int, stream: int) -> None:
        """Start copying ``size`` bytes from the GPU to page-locked memory."""
        self._call("cudaMemcpyAsync", host, device, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def begin_capture(self, stream: int) -> None:
        """Record what is put into the stream, instead of doing it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> Any:  # Any: cuda-python's opaque graph
        """The recorded graph, ready to launch."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._release("cudaGraphDestroy", graph)

    def launch(self, graph: Any, stream: int) -> None:  # Any: cuda-python's opaque graph
        """Start a recorded graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:  # Any: cuda-python's opaque graph
        """Release a recorded graph."""
        self._release("cudaGraphExecDestroy", graph)


def host_array(address: int, *, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A NumPy view of page-locked memory, valid until it is freed."""
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    memory = (ctypes.c_uint8 * size).from_address(address)
    view: NDArray[Any] = np.ndarray(shape, dtype, buffer=memoryview(memory))
    return view
